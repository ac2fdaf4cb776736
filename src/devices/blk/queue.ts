/** One request queue of a virtio-blk device: the allocation-free way to submit requests and reap them. */

import { checkInteger, rangeError, type VirtioError } from "../../errors.js";
import type { DeviceBuffer } from "../../memory/index.js";
import {
  BLK_HEADER_SIZE,
  BLK_STATUS_SIZE,
  BLK_STATUS_UNWRITTEN,
  BlkRequestType,
  SECTOR_SIZE,
} from "../../protocol/blk.js";
import type { QueueNotifier, QueueSetup } from "../../transports/transport.js";
import {
  DESC_SIZE,
  type IndirectTables,
  VIRTQUEUE_MAX_SIZE,
  VirtioFeature,
  Virtqueue,
  VirtqueueLayout,
} from "../../virtqueue/index.js";
import { type CompletionMode, CompletionWatch } from "../completion.js";
import { PollPacer } from "../pacer.js";
import type { BlkLimits } from "./limits.js";

/** A stretch of a lent buffer: one data element, or several when the device's `size_max` is smaller. */
export interface DataSegment {
  /** Memory lent by the device's pool. */
  readonly buffer: DeviceBuffer;
  /** First byte in the buffer. */
  readonly offset: number;
  /** Bytes, at least 1. */
  readonly length: number;
}

/** What a {@link VirtioBlkQueue} is made from. */
export interface VirtioBlkQueueOptions {
  /** Queue index on the device. */
  readonly index: number;
  /** Descriptors; at least 3. */
  readonly queueSize: number;
  /** Negotiated features. */
  readonly features: bigint;
  /** Bounds of a request. */
  readonly limits: BlkLimits;
  /** Size of the disk in sectors; see {@link VirtioBlkQueue.capacity}. */
  readonly capacity: number;
  /** Memory of {@link VirtioBlkQueue.bytesNeeded} bytes that the device can reach. */
  readonly memory: { readonly buffer: ArrayBuffer; readonly offset: number; readonly iova: number };
  /** Go on where another driver left the queue; see {@link VirtioBlkQueue.position}. Default: a new queue. */
  readonly resume?: number;
}

// struct virtio_blk_req around its data, in the slot's request memory: header @0, status @16. Half a cache
// line each, so that two requests share one line and none straddles two.
const REQUEST_SIZE = 32;
const REQUEST_WORDS = REQUEST_SIZE / 4;
const STATUS_OFFSET = BLK_HEADER_SIZE;
const REQUEST = { size: REQUEST_SIZE, align: 16 } as const;
const FRAME = { headerLength: BLK_HEADER_SIZE, trailerOffset: STATUS_OFFSET, trailerLength: BLK_STATUS_SIZE } as const;
// An imported binding is loaded and checked at each use, a constant of the module is folded into the machine code.
const { IN, OUT } = BlkRequestType;
const SECTOR = SECTOR_SIZE;
const UNWRITTEN = BLK_STATUS_UNWRITTEN;
/** Elements of the shortest request with data: header, data, status. */
const MIN_ELEMENTS = 3;

/**
 * A queue that speaks virtio-blk. `submit…` writes a request and returns its slot, `kick` makes all
 * submitted requests visible and notifies the device, completions arrive at {@link onComplete} with the slot.
 * A buffer stays lent to the device from submit to completion.
 *
 * Get one from an open `BlockDevice` by `takeQueue()`.
 *
 * @example
 * ```ts
 * import { openBlock } from "virtio-driver";
 * await using disk = await openBlock("ram:1M", { mode: "poll" });
 * const queue = disk.takeQueue();
 * const buffer = await disk.allocate(4096);
 * let done = -1;
 * queue.onComplete = (slot, status) => {
 *   done = slot;
 *   console.log("status", status); // status 0
 * };
 * const slot = queue.submitRead(0, buffer, 0, 4096); // sector 0
 * queue.kick();
 * while (done !== slot) queue.poll();
 * ```
 */
export class VirtioBlkQueue {
  /** Queue index on the device. */
  readonly index: number;
  /** Descriptors; slots are 0 to `queueSize - 1`. */
  readonly queueSize: number;
  /** Bounds of a request. */
  readonly limits: BlkLimits;
  /** Where the queue lies, in addresses of the device. */
  readonly setup: QueueSetup;
  /** Size of the disk in sectors; requests behind it are refused. Set anew when the device changes it. */
  capacity: number;
  /**
   * Called for each completed request: its slot, the status byte (0 OK, 1 IOERR, 2 UNSUPP, 255 never
   * written, others unknown) and the bytes that the device says it wrote, the status among them.
   */
  onComplete: (slot: number, status: number, written: number) => void = () => {};
  /** Called once when the queue breaks while waiting for events (`poll` throws instead), or its device has ended. */
  onError: (error: Error) => void = () => {};

  private readonly queue: Virtqueue;
  private readonly words: Int32Array;
  private readonly bytes: Uint8Array;
  /** Ring descriptors of the shortest request with data: one when there are tables for the rest. */
  private readonly leastDescriptors: number;
  private readonly types: Uint8Array;
  private readonly lent: (DeviceBuffer | undefined)[];
  private readonly lentMore: (readonly DeviceBuffer[] | undefined)[];
  private readonly watch: CompletionWatch;
  private readonly pacer = new PollPacer();
  private notifier: QueueNotifier | undefined = undefined;
  private isReported = false;
  private submitted = 0;
  private kicks = 0;

  /** Bytes of device memory that a queue needs, 16-aligned; see `VirtioBlkQueueOptions.memory`. */
  static bytesNeeded(options: Pick<VirtioBlkQueueOptions, "queueSize" | "features" | "limits">): number {
    return blkLayout(options).endOffset + tableBytes(options);
  }

  constructor(options: VirtioBlkQueueOptions) {
    const { index, queueSize, features, limits, memory } = options;
    const layout = blkLayout(options);
    checkInteger("queueSize", queueSize, MIN_ELEMENTS, VIRTQUEUE_MAX_SIZE);
    this.index = index;
    this.queueSize = queueSize;
    this.limits = limits;
    this.capacity = options.capacity;
    this.queue = new Virtqueue({
      ...{ layout, index, features, buffer: memory.buffer, offset: memory.offset, iova: memory.iova, frame: FRAME },
      ...indirectTables(options, layout),
      ...(options.resume !== undefined && { resume: options.resume }),
    });
    this.setup = {
      ...{ index, size: queueSize, descriptorArea: memory.iova },
      driverArea: memory.iova + layout.driverAreaOffset,
      deviceArea: memory.iova + layout.deviceAreaOffset,
    };
    this.leastDescriptors = tableEntries(options) >= MIN_ELEMENTS ? 1 : MIN_ELEMENTS;
    this.words = new Int32Array(memory.buffer, this.queue.requestOffset, queueSize * REQUEST_WORDS);
    this.bytes = new Uint8Array(memory.buffer, this.queue.requestOffset, queueSize * REQUEST_SIZE);
    this.words.fill(0);
    this.types = new Uint8Array(queueSize);
    this.lent = new Array<DeviceBuffer | undefined>(queueSize).fill(undefined);
    this.lentMore = new Array<readonly DeviceBuffer[] | undefined>(queueSize).fill(undefined);
    this.watch = new CompletionWatch(
      this.queue,
      (limit) => this.reap(limit),
      (error) => this.report(error),
    );
  }

  /** Requests submitted and not yet completed. */
  get inFlight(): number {
    return this.queue.inFlight;
  }

  /** Where the queue stands, for another one to go on with its memory; undefined while requests are in flight. */
  get position(): number | undefined {
    return this.queue.position;
  }

  /** What was counted since the queue was made. */
  get counters(): Record<"submitted" | "completed" | "kicks" | "wakeUps" | "replayed", number> {
    const { submitted, kicks } = this;
    return { submitted, completed: submitted - this.inFlight, kicks, wakeUps: 0, replayed: 0 };
  }

  /** Whether not even a request with one data element fits now. */
  get isFull(): boolean {
    return this.queue.numFree < this.leastDescriptors;
  }

  /** Type (`BlkRequestType`) of the request in `slot`, until the slot is used again. */
  requestType(slot: number): number {
    return this.types[slot];
  }

  /** Begin to use the started queue; called by the device that made it. */
  start(notifier: QueueNotifier, mode: CompletionMode): void {
    this.notifier = notifier;
    this.watch.start(notifier.completion, mode);
  }

  /** How completions are learnt of; may be switched at any time. */
  get mode(): CompletionMode {
    return this.watch.mode;
  }

  set mode(mode: CompletionMode) {
    this.watch.mode = mode;
  }

  /**
   * Submit a read of `length` bytes from `sector` into a lent buffer.
   *
   * @param sector - first sector of 512 bytes.
   * @param offset - first byte in the buffer.
   * @param length - bytes, a multiple of 512, at most `limits.maxRequestBytes`.
   * @returns the slot, or -1 when the ring is full: reap, then try again.
   * @throws RangeError for a range outside the disk or the buffer, or an odd length.
   */
  submitRead(sector: number, buffer: DeviceBuffer, offset: number, length: number): number {
    return this.submitData(IN, sector, buffer, offset, length, true);
  }

  /** Submit a write of `length` bytes from a lent buffer to `sector`; otherwise as {@link submitRead}. */
  submitWrite(sector: number, buffer: DeviceBuffer, offset: number, length: number): number {
    return this.submitData(OUT, sector, buffer, offset, length, false);
  }

  /** Submit FLUSH: writes completed before this call are stable when it completes. */
  submitFlush(): number {
    return this.submitChain(BlkRequestType.FLUSH, 0, NO_SEGMENTS, false);
  }

  /**
   * Submit a request whose data lie in several pieces of lent buffers, or one of another type.
   *
   * @param type - `BlkRequestType`.
   * @param sector - first sector; 0 for all types but IN and OUT.
   * @param segments - data elements in order, at most `limits.maxSegments` after cutting at `size_max`.
   * @param deviceWrites - the device writes the data (IN, GET_ID, GET_LIFETIME) or reads them.
   * @returns the slot, or -1 when the ring is full.
   * @throws RangeError for segments that are too many, too long, or outside their buffers or the disk.
   */
  submitChain(type: number, sector: number, segments: readonly DataSegment[], deviceWrites: boolean): number {
    const { maxSegmentBytes, maxSegments } = this.limits;
    let elements = 0;
    let bytes = 0;
    for (const { buffer, offset, length } of segments) {
      checkStretch(buffer, offset, length);
      elements += Math.ceil(length / maxSegmentBytes);
      bytes += length;
    }
    if (elements > maxSegments) throw rangeError("segments", `at most ${maxSegments} data elements`, elements);
    if (type === IN || type === OUT) this.checkSectors(sector, bytes);

    const { queue } = this;
    const slot = queue.beginFramed(elements, deviceWrites);
    if (slot < 0) return -1;
    for (const { buffer, offset, length } of segments) {
      for (let done = 0; done < length; done += maxSegmentBytes) {
        const lo = buffer.iovaLo + offset + done;
        const hi = lo > 0xffffffff ? buffer.iovaHi + 1 : buffer.iovaHi;
        queue.segments.add(lo | 0, hi, Math.min(maxSegmentBytes, length - done));
      }
    }
    queue.commitFramed();
    for (const { buffer } of segments) buffer.retain();
    this.writeHeader(slot, type, sector);
    this.lentMore[slot] = segments.map(({ buffer }) => buffer);
    return slot;
  }

  /** Make all submitted requests visible to the device and notify it if it wants that. */
  kick(): void {
    if (this.queue.publish()) {
      this.kicks++;
      this.notifier?.notify(this.queue.notificationData);
    }
    this.watch.kicked();
  }

  /**
   * Reap completed requests: {@link onComplete} is called for each. Meant to be called again and again: before it
   * looks it pauses, at most about a microsecond, for as long as that has been making the device faster.
   *
   * @param limit - reap at most so many.
   * @returns how many.
   * @throws VirtioError ERR_VIRTIO_QUEUE_BROKEN when the device wrote something impossible.
   */
  poll(limit = Number.MAX_SAFE_INTEGER): number {
    const { pacer, inFlight } = this;
    pacer.wait();
    const count = this.reap(limit);
    if (count > 0) pacer.adapt(count, inFlight);
    return count;
  }

  /** In mode `"hybrid"`: look for completions right now, within this turn's share of time. */
  lookNow(): void {
    this.watch.lookNow();
  }

  /** Whether a completed request waits to be reaped. */
  hasCompleted(): boolean {
    return this.queue.hasUsed();
  }

  /** Make every later call throw `error`, and stop listening. What is in flight stays lent. */
  fail(error: VirtioError): void {
    this.queue.fail(error);
    this.stop();
  }

  /** Tell the owner that the queue is of no use any more; once. */
  report(error: Error): void {
    if (this.isReported) return;
    this.isReported = true;
    this.onError(error);
  }

  /** Stop listening for completions. */
  stop(): void {
    this.watch.stop();
    this.notifier = undefined;
  }

  private reap(limit: number): number {
    const queue = this.queue;
    let count = 0;
    while (count < limit) {
      const slot = queue.poll();
      if (slot < 0) break;
      count++;
      const status = this.bytes[slot * REQUEST_SIZE + STATUS_OFFSET];
      this.returnBuffers(slot);
      this.onComplete(slot, status, queue.usedLength);
      // Nothing can have come: another look would only take the cache line from the device.
      if (queue.inFlight === 0) break;
    }
    return count;
  }

  private submitData(
    type: number,
    sector: number,
    buffer: DeviceBuffer,
    offset: number,
    length: number,
    deviceWrites: boolean,
  ): number {
    this.checkSectors(sector, length);
    checkStretch(buffer, offset, length);
    if (length > this.limits.maxSegmentBytes) {
      return this.submitChain(type, sector, [{ buffer, offset, length }], deviceWrites);
    }
    const lo = buffer.iovaLo + offset;
    const hi = lo > 0xffffffff ? buffer.iovaHi + 1 : buffer.iovaHi;
    const slot = this.queue.addFramed(lo | 0, hi, length, deviceWrites);
    if (slot < 0) return -1;
    this.writeHeader(slot, type, sector);
    buffer.retain();
    this.lent[slot] = buffer;
    return slot;
  }

  /** Fill in `struct virtio_blk_req` of a slot; `reserved` stays 0 from the start. */
  private writeHeader(slot: number, type: number, sector: number): void {
    const at = slot * REQUEST_WORDS;
    this.words[at] = type;
    this.words[at + 2] = sector | 0;
    this.words[at + 3] = sector > 0xffffffff ? Math.floor(sector / 2 ** 32) : 0;
    // No device answers 0xff: a status that was never written cannot look like success.
    this.bytes[slot * REQUEST_SIZE + STATUS_OFFSET] = UNWRITTEN;
    this.types[slot] = type;
    this.submitted++;
  }

  private returnBuffers(slot: number): void {
    const buffer = this.lent[slot];
    if (buffer !== undefined) {
      this.lent[slot] = undefined;
      buffer.unretain();
      return;
    }
    const more = this.lentMore[slot];
    if (more === undefined) return;
    this.lentMore[slot] = undefined;
    for (const each of more) each.unretain();
  }

  private checkSectors(sector: number, length: number): void {
    if (!(length > 0 && length % SECTOR === 0)) throw rangeError("length", "a positive multiple of 512", length);
    if (!(Number.isSafeInteger(sector) && sector >= 0 && sector + length / SECTOR <= this.capacity)) {
      const last = this.capacity - length / SECTOR;
      const room = last < 0 ? `nothing: the disk has ${this.capacity} sectors` : `0 to ${last}`;
      throw rangeError("sector", room, sector);
    }
  }
}

const NO_SEGMENTS: readonly DataSegment[] = [];

function checkStretch(buffer: DeviceBuffer, offset: number, length: number): void {
  if (buffer.released) throw rangeError("buffer", "a lent buffer that was not released", "a released one");
  if (!(offset >= 0 && length > 0 && offset + length <= buffer.length && Number.isSafeInteger(offset + length))) {
    checkInteger("offset", offset, 0, buffer.length);
    checkInteger("length", length, 1, buffer.length - offset);
  }
}

function blkLayout(options: Pick<VirtioBlkQueueOptions, "queueSize" | "features">): VirtqueueLayout {
  return new VirtqueueLayout({ queueSize: options.queueSize, features: options.features, request: REQUEST });
}

/** Entries of each indirect table: a whole request within the limits, never more than the queue size. */
function tableEntries(options: Pick<VirtioBlkQueueOptions, "queueSize" | "features" | "limits">): number {
  if ((options.features & VirtioFeature.INDIRECT_DESC) === 0n) return 0;
  return Math.min(options.limits.maxSegments + 2, options.queueSize);
}

function tableBytes(options: Pick<VirtioBlkQueueOptions, "queueSize" | "features" | "limits">): number {
  return options.queueSize * tableEntries(options) * DESC_SIZE;
}

function indirectTables(options: VirtioBlkQueueOptions, layout: VirtqueueLayout): { indirect?: IndirectTables } {
  const entries = tableEntries(options);
  if (entries === 0) return {};
  const { offset, iova } = options.memory;
  return { indirect: { offset: offset + layout.endOffset, iova: iova + layout.endOffset, entries } };
}
