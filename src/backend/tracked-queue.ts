/** The device's half of a ring that keeps its record in the region of requests in flight. */

import type { DescriptorChain } from "../virtqueue/device-chain.js";
import type { DeviceVirtqueue } from "../virtqueue/device.js";
import type { InflightRecord } from "./inflight.js";
import type { BackendQueueStats } from "./stats.js";

/** What a ring of a session works on. */
export type RingQueue = Omit<DeviceVirtqueue, "queueSize" | "pushBatch" | "refetch">;

/** A {@link DeviceVirtqueue} with its record: first it gives the requests again that another back-end left behind. */
export class TrackedQueue implements RingQueue {
  private readonly queue: DeviceVirtqueue;
  private readonly record: InflightRecord;
  private readonly counts: BackendQueueStats;

  constructor(queue: DeviceVirtqueue, record: InflightRecord, counts: BackendQueueStats) {
    this.queue = queue;
    this.record = record;
    this.counts = counts;
  }

  get base(): number {
    return this.queue.base;
  }

  pop(chain: DescriptorChain): boolean {
    if (this.record.waiting > 0) {
      this.record.refetch(this.queue, chain);
      this.counts.replayed++;
      return true;
    }
    if (!this.queue.pop(chain)) return false;
    this.record.fetched(chain);
    return true;
  }

  push(id: number, ringCount: number, written: number): void {
    this.record.done(id);
    this.queue.push(id, ringCount, written);
  }

  publish(): boolean {
    this.record.publishing(this.queue.base);
    const notify = this.queue.publish();
    this.record.published();
    return notify;
  }

  backlog(limit: number): number {
    return Math.min(limit, this.record.waiting + this.queue.backlog(limit));
  }

  disableNotifications(): void {
    this.queue.disableNotifications();
  }

  enableNotifications(): boolean {
    return this.queue.enableNotifications() || this.record.waiting > 0;
  }
}
