/** What `virtio serve --metrics` tells: the counters of the back-end, and of each of its queues. */

import type { BackendQueueStats, VhostUserBackend } from "../backend/index.js";
import type { MetricsPage, Sample } from "./metrics.js";

/** Have a back-end on a page. Nothing is counted for it that is not counted anyway. */
export function addBackend(page: MetricsPage, backend: VhostUserBackend): void {
  const { stats } = backend;
  const byQueue = (valueOf: (queue: BackendQueueStats) => number) => (): Sample[] =>
    stats.queues.map((queue) => ({ labels: { queue: queue.index }, value: valueOf(queue) }));
  const named = (label: string, counts: object, more: Sample["labels"] = {}): Sample[] =>
    Object.entries<number>({ ...counts }).map(([name, value]) => ({ labels: { ...more, [label]: name }, value }));

  page.gauge("virtio_backend_capacity_bytes", "Size of the disk.", () => [{ value: backend.capacity }]);
  page.counter("virtio_backend_connections_total", "Clients that connected.", () => [{ value: stats.connections }]);
  page.gauge("virtio_backend_clients", "Clients connected and being served: 1 or 0.", () => [
    { value: backend.clientMemory === undefined ? 0 : 1 },
  ]);
  page.gauge("virtio_backend_memory_regions", "Regions of memory that the client shares.", () => [
    { value: backend.clientMemory?.regions ?? 0 },
  ]);
  page.gauge("virtio_backend_memory_bytes", "Memory that the client shares.", () => [
    { value: backend.clientMemory?.bytes ?? 0 },
  ]);
  page.counter(
    "virtio_backend_requests_total",
    "Requests taken from a queue, by type.",
    () => stats.queues.flatMap((queue) => named("type", queue.requestsByType, { queue: queue.index })),
    ["queue", "type"],
  );
  page.counter(
    "virtio_backend_answers_total",
    "Requests answered, by status; none: the request had no room for one.",
    () => stats.queues.flatMap((queue) => named("status", queue.answersByStatus, { queue: queue.index })),
    ["queue", "status"],
  );
  page.gauge(
    "virtio_backend_requests_in_flight",
    "Requests taken and not answered yet.",
    byQueue((queue) => queue.inFlight),
    ["queue"],
  );
  page.counter(
    "virtio_backend_read_bytes_total",
    "Bytes read from the storage for requests.",
    byQueue((queue) => queue.bytesRead),
    ["queue"],
  );
  page.counter(
    "virtio_backend_written_bytes_total",
    "Bytes written to the storage by requests.",
    byQueue((queue) => queue.bytesWritten),
    ["queue"],
  );
  page.counter(
    "virtio_backend_kicks_total",
    "Times that notifications of the driver were heard.",
    byQueue((queue) => queue.kicks),
    ["queue"],
  );
  page.counter(
    "virtio_backend_notifications_total",
    "Notifications sent to the driver.",
    byQueue((queue) => queue.notifications),
    ["queue"],
  );
  page.counter(
    "virtio_backend_replayed_requests_total",
    "Requests carried out again that a back-end before had left in flight.",
    byQueue((queue) => queue.replayed),
    ["queue"],
  );
  page.counter(
    "virtio_backend_errors_total",
    "Failures by place: the storage, a ring that makes no sense, a connection with its messages.",
    () => named("place", stats.errorsByPlace),
    ["place"],
  );
}
