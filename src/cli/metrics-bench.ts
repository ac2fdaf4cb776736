/** What `virtio bench --metrics` tells: the requests counted so far, how long they took, and the queues of the device. */

import { Gauge, Histogram } from "prom-client";
import type { BlockDevice, QueueStats } from "../index.js";
import type { BenchPlan, Progress } from "./bench-plan.js";
import { LatencyHistogram } from "./histogram.js";
import type { MetricsPage, Sample } from "./metrics.js";

/** Upper ends of the buckets of latencies in nanoseconds: 1, 2 and 5 of each power of ten from 1 µs to 2 s. */
const BOUNDS_NS = [1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9].flatMap((ns) => [ns, 2 * ns, 5 * ns]).slice(0, -1);

/** Have a device on a page. */
export function addDevice(page: MetricsPage, disk: BlockDevice): void {
  const byQueue = (valueOf: (queue: QueueStats) => number) => (): Sample[] =>
    disk.stats().queues.map((queue) => ({ labels: { queue: queue.index }, value: valueOf(queue) }));

  page.counter("virtio_device_reconnects_total", "Times that a back-end was reached again.", () => [
    { value: disk.stats().reconnects },
  ]);
  page.counter(
    "virtio_device_errors_total",
    "Calls and requests that failed, by error code, those of all queues among them.",
    () => Object.entries(disk.stats().errors).map(([code, value]) => ({ labels: { code }, value })),
    ["code"],
  );
  page.gauge("virtio_device_waiting_calls", "Calls that wait for room in a queue, or for memory.", () => [
    { value: disk.stats().waiting },
  ]);
  page.gauge("virtio_device_lent_bytes", "Memory that is lent to the program or the device.", () => [
    { value: disk.stats().lentBytes },
  ]);
  page.counter(
    "virtio_queue_submitted_requests_total",
    "Requests put into a queue.",
    byQueue((queue) => queue.submitted),
    ["queue"],
  );
  page.counter(
    "virtio_queue_completed_requests_total",
    "Requests that the device has returned.",
    byQueue((queue) => queue.completed),
    ["queue"],
  );
  page.gauge(
    "virtio_queue_requests_in_flight",
    "Requests that the device has.",
    byQueue((queue) => queue.inFlight),
    ["queue"],
  );
  page.gauge(
    "virtio_queue_abandoned_requests",
    "Requests that the device has and nobody waits for any more.",
    byQueue((queue) => queue.abandoned),
    ["queue"],
  );
  page.counter(
    "virtio_queue_kicks_total",
    "Notifications sent to the device.",
    byQueue((queue) => queue.kicks),
    ["queue"],
  );
  page.counter(
    "virtio_queue_wake_ups_total",
    "Notifications of the device that woke this process.",
    byQueue((queue) => queue.wakeUps),
    ["queue"],
  );
  page.counter(
    "virtio_queue_replayed_requests_total",
    "Requests submitted again after a reconnection.",
    byQueue((queue) => queue.replayed),
    ["queue"],
  );
  page.counter(
    "virtio_queue_errors_total",
    "Requests that failed, by error code.",
    () =>
      disk
        .stats()
        .queues.flatMap(({ index, errors }) =>
          Object.entries(errors).map(([code, value]) => ({ labels: { queue: index, code }, value })),
        ),
    ["queue", "code"],
  );
}

/** Have a measurement on a page. In the ramp, and until it begins, nothing is counted. */
export function addProgress(page: MetricsPage, progress: Progress, { blockSize }: BenchPlan): void {
  const counted = (): LatencyHistogram => (progress.countedMs === 0 ? new LatencyHistogram() : progress.counts());
  page.gauge("virtio_bench_counted_seconds", "How long requests have been counted; 0 in the ramp.", () => [
    { value: progress.countedMs / 1000 },
  ]);
  page.counter("virtio_bench_requests_total", "Requests that completed while counting.", () => [
    { value: counted().count },
  ]);
  page.counter("virtio_bench_bytes_total", "Bytes read and written by these requests.", () => [
    { value: counted().count * blockSize },
  ]);
  page.registry.registerMetric(
    new LatencyMetric(
      "virtio_bench_request_duration_seconds",
      "From submission to the moment the program sees the completion; bounds are up to 1.6 % lower.",
      counted,
    ),
  );
}

/**
 * A histogram of what was counted elsewhere. The library's own can only be told of one duration after the other; so this
 * is a gauge to the library, which asks for its values, and gets those of a histogram.
 */
class LatencyMetric extends Gauge<"le"> {
  private readonly frame: Histogram<"le">;
  private readonly counted: () => LatencyHistogram;

  constructor(name: string, help: string, counted: () => LatencyHistogram) {
    super({ name, help, registers: [] });
    this.frame = new Histogram({ name, help, registers: [] });
    this.counted = counted;
  }

  override async get() {
    const counts = this.counted(); // before anything else runs: all of a page is of one moment
    const { name, help, type, aggregator, collect } = await this.frame.get();
    const upTo = counts.upTo(BOUNDS_NS);
    const bucket = `${name}_bucket`;
    return {
      ...{ name, help, type, aggregator, collect },
      values: [
        ...BOUNDS_NS.map((ns, i) => ({ metricName: bucket, labels: { le: ns / 1e9 }, value: upTo[i] })),
        { metricName: bucket, labels: { le: "+Inf" }, value: counts.count },
        { metricName: `${name}_sum`, labels: {}, value: counts.total / 1e9 },
        { metricName: `${name}_count`, labels: {}, value: counts.count },
      ],
    };
  }
}
