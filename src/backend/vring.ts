/** One ring of a vhost-user session: its configuration, its two states, and the requests on it. */

import { readlinkSync } from "node:fs";
import { checkInteger, VirtioError } from "../errors.js";
import { type VringAddress, VRING_BASE_PACKED, VRING_BASE_SPLIT } from "../protocol/vhost-user.js";
import { closeFd, EventFd, FdWatcher, faultCounter, JamGuard } from "../sys/index.js";
import { DescriptorChain } from "../virtqueue/device-chain.js";
import { DeviceVirtqueue, ringAreas } from "../virtqueue/device.js";
import type { RingArea } from "../virtqueue/device-ring.js";
import { VirtioFeature } from "../virtqueue/features.js";
import { checkQueueSize } from "../virtqueue/layout.js";
import type { BlkExecutor, CompletionSink } from "./blk-executor.js";
import type { InflightRecord, InflightRegion } from "./inflight.js";
import { PackedInflightRecord } from "./inflight-packed.js";
import { SplitInflightRecord } from "./inflight-split.js";
import type { MemoryTable } from "./memory-table.js";
import type { Pollable } from "./poller.js";
import type { BackendQueueStats, BackendStats } from "./stats.js";
import { type RingQueue, TrackedQueue } from "./tracked-queue.js";

/** What a ring works with; the session exchanges it when memory or features change. */
export interface RingContext {
  /** The front-end's memory. */
  readonly memory: MemoryTable;
  /** Carries out requests on that memory. */
  readonly executor: BlkExecutor;
  /** Virtio features in force. */
  readonly features: bigint;
  /** Where requests in flight are remembered, if they are. */
  readonly inflight: InflightRegion | undefined;
}

/** What a ring tells the session. */
export interface VringEvents {
  /** The driver has sent a notification. */
  notified(ring: Vring): void;
  /** Requests that took their time have been answered: the driver may soon have more. */
  answered(ring: Vring): void;
  /** A ring broke: the device needs a reset. */
  broke(): void;
  /** The front-end makes notifications wait. */
  jammed(): void;
  /** Some process took memory away from us: whether it was memory of this session, which then ends. */
  lost(): boolean;
}

/** Requests, and bytes of data, before the answers are published and the next ring has its turn. */
const MAX_BATCH = 16;
const BATCH_BYTES = 64 * 1024;
/** How fast a depth that is not reached any more is forgotten, from batch to batch. */
const DEPTH_DECAY = 15 / 16;

/**
 * Started and enabled are independent: a ring starts with `SET_VRING_KICK` and stops with `GET_VRING_BASE`;
 * `SET_VRING_ENABLE` only opens the gate. Requests on a ring that is started but disabled stay where they are until
 * it is enabled: a disk must neither carry them out nor answer them with errors that a guest would believe.
 */
export class Vring implements Pollable, CompletionSink {
  /** Queue index. */
  readonly index: number;
  /** What was done on this queue, for clients before as well. */
  readonly counts: BackendQueueStats;
  /** Whether the front-end enabled it. */
  enabled = false;

  private readonly stats: BackendStats;
  private readonly events: VringEvents;
  private size = 0;
  private base: number | undefined;
  private address: VringAddress | undefined;
  private kick: { readonly event: EventFd; readonly watcher: FdWatcher } | undefined;
  private call: EventFd | undefined;
  private error: EventFd | undefined;
  private jam: JamGuard | undefined;

  private queue: RingQueue | undefined;
  private record: InflightRecord | undefined;
  private chain = new DescriptorChain(0);
  private executor: BlkExecutor | undefined;
  private broken = false;
  private inFlight = 0;
  /** Requests that the driver seems to keep in flight. */
  private depth = 2 * MAX_BATCH;
  /** Counts losses of mapped memory; as many as `faultsSeen` have nothing to do with this ring. */
  private readonly faults = faultCounter();
  private faultsSeen = this.faults[0];
  private publishing: NodeJS.Immediate | undefined;
  private readonly onDrained: (() => void)[] = [];
  /** The mapping each area lies in, while it is started. */
  private buffers: readonly ArrayBuffer[] = [];

  constructor(index: number, stats: BackendStats, events: VringEvents) {
    this.index = index;
    this.stats = stats;
    this.counts = stats.queues[index];
    this.events = events;
  }

  /** Whether it was started and not stopped. */
  get started(): boolean {
    return this.queue !== undefined;
  }

  /** Whether requests may be taken from it now. */
  get runnable(): boolean {
    return this.queue !== undefined && this.enabled && !this.broken;
  }

  /** Whether the driver wrote something impossible into it, or cannot be notified. */
  get isBroken(): boolean {
    return this.broken;
  }

  /** Whether requests are being worked on that finish later. */
  get busy(): boolean {
    return this.inFlight > 0;
  }

  /** `SET_VRING_NUM`. */
  setSize(size: number): void {
    this.refuseStarted("its size");
    this.size = checkQueueSize(size, true);
  }

  /** `SET_VRING_BASE`. */
  setBase(base: number): void {
    this.refuseStarted("its base");
    this.base = checkInteger("base", base, 0, 0xffff_ffff);
  }

  /** `SET_VRING_ADDR`. */
  setAddress(address: VringAddress): void {
    this.refuseStarted("its addresses");
    this.address = address;
  }

  /**
   * `SET_VRING_KICK`: start the ring, or exchange the descriptor of a started one.
   *
   * @throws VirtioError or RangeError when its size, base or addresses are missing or cannot be.
   */
  start(fd: number, context: RingContext): void {
    const event = eventFrom(fd);
    try {
      if (this.queue === undefined) this.build(context, this.base);
      const watcher = new FdWatcher(event.fd, { drain: true }, () => {
        this.counts.kicks++;
        this.events.notified(this);
      });
      this.closeKick();
      this.kick = { event, watcher };
    } catch (error) {
      event.close();
      throw error;
    }
  }

  /**
   * Refuse memory that a started ring does not lie in.
   *
   * @throws VirtioError ERR_VIRTIO_PROTOCOL.
   */
  checkAreas(memory: MemoryTable, features: bigint): void {
    if (this.queue !== undefined) this.areas(memory, features);
  }

  /** Go on in other memory, if started; it was checked. No request may be in flight. */
  rebuild(context: RingContext): void {
    if (this.queue === undefined) return;
    try {
      this.build(context, this.queue.base);
    } catch (error) {
      this.breakDown(error);
    }
  }

  /** Whether it is started and an area of it lies in this mapping. */
  liesIn(buffer: ArrayBuffer): boolean {
    return this.buffers.includes(buffer);
  }

  /** `SET_VRING_CALL`; undefined: the driver polls. */
  setCall(fd: number | undefined): void {
    const event = this.guarded(fd);
    this.drop(this.call);
    this.call = event;
    // What the driver did not hear by the old descriptor, it hears by the new one.
    if (this.queue !== undefined) event?.signal();
  }

  /** `SET_VRING_ERR`. */
  setError(fd: number | undefined): void {
    const event = this.guarded(fd);
    this.drop(this.error);
    this.error = event;
  }

  /**
   * Have the next start believe `SET_VRING_BASE`, not the record of requests in flight: the front-end is about to learn
   * the position. No request may be in flight; what was not even carried out again yet stays recorded.
   */
  settle(): void {
    this.record?.settle();
  }

  /**
   * Stop the ring. No request may be in flight.
   *
   * @returns its position, for `GET_VRING_BASE`.
   */
  stop(): number {
    if (this.queue !== undefined) this.base = this.queue.base;
    this.queue = undefined;
    this.record = undefined;
    this.buffers = [];
    this.executor = undefined;
    this.broken = false;
    this.closeKick();
    this.setCall(undefined);
    return this.base ?? 0;
  }

  /** Stop it and forget its configuration. No request may be in flight. */
  reset(): void {
    this.stop();
    this.setError(undefined);
    this.jam?.close();
    this.jam = undefined;
    this.enabled = false;
    this.size = 0;
    this.base = undefined;
    this.address = undefined;
  }

  /** Resolves when no request is in flight and all answers are published. Call it when nothing more is taken. */
  drained(): Promise<void> {
    if (this.inFlight === 0) {
      this.publish();
      return Promise.resolve();
    }
    return new Promise((resolve) => {
      this.onDrained.push(resolve);
    });
  }

  /**
   * Answers are published when half of what the driver keeps in flight is done: so it works on one half while this
   * side works on the other, and neither waits.
   */
  process(): number {
    const { queue, executor, chain, counts } = this;
    if (queue === undefined || executor === undefined || !this.runnable) return 0;
    const limit = Math.min(MAX_BATCH, Math.ceil(this.depth / 2));
    const bytes = counts.bytesRead + counts.bytesWritten + BATCH_BYTES;
    let count = 0;
    try {
      while (count < limit && counts.bytesRead + counts.bytesWritten < bytes && queue.pop(chain)) {
        count++;
        const written = executor.execute(chain, this);
        // A request over memory that is gone had other data than the driver's: it must not count as done.
        if (this.isLost()) return count;
        if (written >= 0) queue.push(chain.id, chain.ringCount, written);
      }
    } catch (error) {
      // A ring whose memory is gone looks as if the driver had written nonsense.
      if (this.isLost()) return count;
      this.breakDown(error);
    }
    if (this.isLost()) return count;
    if (count > 0) {
      this.publish();
      this.adapt(count, queue);
    }
    return count;
  }

  private adapt(count: number, queue: RingQueue): void {
    // With a full batch and more to do, the driver is far enough ahead.
    if (count === MAX_BATCH && queue.backlog(1) > 0) return;
    const held = count + this.inFlight + queue.backlog(2 * MAX_BATCH - count);
    this.depth = Math.max(held, this.depth * DEPTH_DECAY);
  }

  disarm(): void {
    this.queue?.disableNotifications();
  }

  arm(): boolean {
    return this.queue !== undefined && this.runnable && this.queue.enableNotifications();
  }

  begin(): void {
    this.inFlight++;
  }

  /** Answers that come in the same turn of the event loop are published together. */
  complete(id: number, ringCount: number, written: number): void {
    this.queue?.push(id, ringCount, written);
    this.inFlight--;
    if (this.inFlight === 0 && this.onDrained.length > 0) {
      this.publish();
      for (const resolve of this.onDrained.splice(0)) resolve();
      return;
    }
    this.publishing ??= setImmediate(() => {
      this.publish();
      this.events.answered(this);
    });
  }

  private publish(): void {
    if (this.publishing !== undefined) {
      clearImmediate(this.publishing);
      this.publishing = undefined;
    }
    if (this.isLost()) return;
    if (this.queue?.publish() !== true || this.call === undefined) return;
    this.counts.notifications++;
    try {
      this.call.signal();
    } catch (error) {
      this.breakDown(error);
    }
  }

  /** Whether memory of the session is gone; then it has ended. */
  private isLost(): boolean {
    if (this.faults[0] === this.faultsSeen) return false;
    this.faultsSeen = this.faults[0];
    return this.events.lost();
  }

  /** Its memory is gone: take and answer nothing more. */
  abandon(): void {
    this.queue = undefined;
    this.record = undefined;
    this.executor = undefined;
  }

  private build(context: RingContext, base: number | undefined): void {
    if (this.size === 0 || this.address === undefined) {
      throw new VirtioError(
        "ERR_VIRTIO_PROTOCOL",
        `ring ${this.index} cannot start before SET_VRING_NUM and SET_VRING_ADDR`,
      );
    }
    const { memory, executor, features, inflight } = context;
    const areas = this.areas(memory, features);
    const record = inflight === undefined ? undefined : this.open(inflight, features, areas, base);
    const start = record?.base ?? base;
    const queue = new DeviceVirtqueue({
      ...{ queueSize: this.size, features, memory: memory.guest },
      ...areas,
      ...(start !== undefined && { base: start }),
    });
    this.queue = record === undefined ? queue : new TrackedQueue(queue, record, this.counts);
    this.record = record;
    this.buffers = [areas.descriptorArea.buffer, areas.driverArea.buffer, areas.deviceArea.buffer];
    this.executor = executor;
    this.chain = new DescriptorChain(this.size);
    this.broken = false;
  }

  /** Open the record of requests in flight; where it is in use, the ring goes on from what it says. */
  private open(
    inflight: InflightRegion,
    features: bigint,
    areas: { readonly descriptorArea: RingArea; readonly deviceArea: RingArea },
    base: number | undefined,
  ): InflightRecord {
    const { size } = this;
    const packed = (features & VirtioFeature.RING_PACKED) !== 0n;
    const views = inflight.part(this.index, size, packed);
    if (packed) {
      return new PackedInflightRecord(views, size, inflight.queueSize, areas.descriptorArea, base ?? VRING_BASE_PACKED);
    }
    const { buffer, offset } = areas.deviceArea;
    const usedIdx = Atomics.load(new Uint16Array(buffer, offset, 2), 1);
    return new SplitInflightRecord(views, size, inflight.queueSize, usedIdx, base ?? VRING_BASE_SPLIT);
  }

  private areas(memory: MemoryTable, features: bigint) {
    const shapes = ringAreas(this.size, (features & VirtioFeature.RING_PACKED) !== 0n);
    const { desc = 0n, avail = 0n, used = 0n } = this.address ?? {};
    return {
      descriptorArea: memory.area("descriptor area", desc, shapes.descriptorArea),
      driverArea: memory.area("driver area", avail, shapes.driverArea),
      deviceArea: memory.area("device area", used, shapes.deviceArea),
    };
  }

  /** Stop working on a ring that cannot be understood; the front-end hears of it by the error descriptor. */
  private breakDown(error: unknown): void {
    this.broken = true;
    this.stats.failed("ring", error);
    try {
      this.error?.signal();
    } catch (signalError) {
      this.stats.failed("ring", signalError);
    }
    this.events.broke();
  }

  /** An event to signal. The front-end has its flags, too, and could make a signal wait. */
  private guarded(fd: number | undefined): EventFd | undefined {
    if (fd === undefined) return undefined;
    const event = eventFrom(fd);
    try {
      this.jam ??= new JamGuard(() => this.events.jammed());
      this.jam.add(event);
      return event;
    } catch (error) {
      event.close();
      throw error;
    }
  }

  private drop(event: EventFd | undefined): void {
    if (event === undefined) return;
    this.jam?.remove(event);
    event.close();
  }

  private closeKick(): void {
    this.kick?.watcher.close();
    this.kick?.event.close();
    this.kick = undefined;
  }

  private refuseStarted(what: string): void {
    if (this.queue === undefined) return;
    throw new VirtioError(
      "ERR_VIRTIO_PROTOCOL",
      `ring ${this.index} is started; stop it with GET_VRING_BASE before changing ${what}`,
    );
  }
}

/**
 * Take a descriptor over as an eventfd. Anything else is refused: a write to a pipe or file of the front-end's
 * choice could wait for ever.
 */
function eventFrom(fd: number): EventFd {
  const target = readlinkSync(`/proc/self/fd/${fd}`);
  if (target !== "anon_inode:[eventfd]") {
    closeFd(fd);
    throw new VirtioError("ERR_VIRTIO_PROTOCOL", `a notification descriptor is an eventfd, got ${target}`);
  }
  return EventFd.fromFd(fd);
}
