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
import { type DataSegment, giveBackAll, lendAll } from "./segments.js";

/** What a queue has done since it began. */
export interface QueueCounters {
  /** Requests submitted. */
  readonly submitted: number;
  /** Requests that the device has returned. */
  readonly completed: number;
  /** Notifications sent to the device. */
  readonly kicks: number;
  /** Notifications of the device that were heard. */
  readonly wakeUps: number;
  /** Requests submitted again to a device that took the place of the one before. */
  readonly replayed: number;
}

/** A request whose data lie in several places, or that has none. */
interface Chain {
  readonly segments: readonly DataSegment[];
  readonly deviceWrites: boolean;
  /** Whether the queue lent the segments to the device, and gives them back; otherwise who submitted it does. */
  readonly isLender: boolean;
}

/** A request in flight, out of its slot. */
interface Request extends Chain {
  readonly slot: number;
  readonly type: number;
  readonly sector: number;
  readonly sequence: number;
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
/** Polls in vain after which to see whether the device is still there: a system call, every millisecond or so. */
const IDLE_POLLS = 0x4000;
// What was asked for in each slot: four numbers in one array, which cost less than four arrays. The first: the sector.
const RECORD_SIZE = 4;
/** Position in the order of submission. */
const SEQUENCE = 1;
/** The stretch of the lent buffer, when there is one. */
const OFFSET = 2;
const LENGTH = 3;
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
  /**
   * Called when another device has taken the place of the one before and requests were submitted to it again, in
   * the order of their submission: `moves[slot]` is the slot that the request in `slot` is in now, -1 for none.
   */
  onReplay: (moves: Int32Array) => void = () => {};

  private readonly queue: Virtqueue;
  private readonly words: Int32Array;
  private readonly bytes: Uint8Array;
  /** Ring descriptors of the shortest request with data: one when there are tables for the rest. */
  private readonly leastDescriptors: number;
  // What was asked for in each slot, for a device that has to be asked again: the shared memory may have changed.
  private readonly types: Uint8Array;
  private readonly records: Float64Array;
  private readonly lent: (DeviceBuffer | undefined)[];
  private readonly chains: (Chain | undefined)[];
  private readonly watch: CompletionWatch;
  private readonly pacer = new PollPacer();
  private notifier: QueueNotifier | undefined = undefined;
  private isReported = false;
  /** Submitted for the first time or again: requests in flight keep their order over several devices. */
  private sequence = 0;
  private kicks = 0;
  private replayed = 0;
  private idlePolls = 0;

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
    this.records = new Float64Array(queueSize * RECORD_SIZE);
    this.lent = new Array<DeviceBuffer | undefined>(queueSize).fill(undefined);
    this.chains = new Array<Chain | undefined>(queueSize).fill(undefined);
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

  /** What the queue has done since it began. */
  get counters(): QueueCounters {
    const { kicks, replayed } = this;
    const submitted = this.sequence - replayed;
    return { submitted, completed: submitted - this.inFlight, kicks, wakeUps: this.watch.wakeUps, replayed };
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
   * @throws RangeError for a range outside the disk or the buffer, or an odd length. VirtioError ERR_VIRTIO_BUSY when a
   *   request in flight has some of these bytes of the buffer, unless the device only reads both.
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
    return this.submitLent(BlkRequestType.FLUSH, 0, NO_SEGMENTS, false);
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
   *   VirtioError ERR_VIRTIO_BUSY as {@link submitRead}, also when segments of a read overlap each other.
   */
  submitChain(type: number, sector: number, segments: readonly DataSegment[], deviceWrites: boolean): number {
    this.checkChain(type, sector, segments);
    this.throwIfBroken();
    const copy = segments.map(({ buffer, offset, length }) => ({ buffer, offset, length }));
    lendAll(copy, deviceWrites);
    let slot = -1;
    try {
      slot = this.submitSegments(type, sector, { segments: copy, deviceWrites, isLender: true });
    } finally {
      if (slot < 0) giveBackAll(copy);
    }
    return slot;
  }

  /**
   * Submit a request on memory that the caller has lent to the device already (`DeviceBuffer.lend`), or that he alone
   * has, and keeps so until the request has completed; otherwise as {@link submitChain}.
   *
   * @param segments - not to be changed any more.
   */
  submitLent(type: number, sector: number, segments: readonly DataSegment[], deviceWrites: boolean): number {
    this.checkChain(type, sector, segments);
    return this.submitSegments(type, sector, { segments, deviceWrites, isLender: false });
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
   * @throws VirtioError ERR_VIRTIO_QUEUE_BROKEN when the device wrote something impossible, ERR_VIRTIO_DISCONNECTED
   *   when it is gone and the event loop has had no turn to learn of it: give it turns to have the device back.
   */
  poll(limit = Number.MAX_SAFE_INTEGER): number {
    const { pacer, inFlight } = this;
    pacer.wait();
    const count = this.reap(limit);
    if (count > 0) {
      this.idlePolls = 0;
      pacer.adapt(count, inFlight);
    } else if (++this.idlePolls === IDLE_POLLS) {
      this.idlePolls = 0;
      const gone = this.notifier?.look?.();
      if (gone !== undefined) throw gone;
    }
    return count;
  }

  /** In mode `"hybrid"`: look for completions right now, within this turn's share of time. */
  lookNow(): void {
    this.watch.lookNow();
  }

  /**
   * Reap what a device has completed that is gone, and tell where one goes on that takes its place and knows what is
   * in flight: the value of SET_VRING_BASE.
   */
  settle(): number {
    this.reap(this.inFlight);
    return this.queue.usedPosition;
  }

  /**
   * Begin the ring anew for a device that knows nothing of what is in flight, and submit that again, in the order in
   * which it was submitted. {@link onReplay} tells of the new slots.
   *
   * @param isWanted - whether the request in a slot is to be submitted again; otherwise its buffers come back.
   * @returns how many were.
   */
  replay(isWanted: (slot: number) => boolean): number {
    const requests = this.requestsInFlight();
    const wanted = requests.map(({ slot }) => isWanted(slot));
    const moves = new Int32Array(this.queueSize).fill(-1);
    this.queue.restart();
    for (const { slot } of requests) {
      this.lent[slot] = undefined;
      this.chains[slot] = undefined;
    }
    let count = 0;
    requests.forEach(({ slot, type, sector, segments, deviceWrites, isLender }, i) => {
      if (!wanted[i]) {
        if (isLender) giveBackAll(segments);
        return;
      }
      moves[slot] = this.submitSegments(type, sector, { segments, deviceWrites, isLender });
      count++;
    });
    this.replayed += count;
    this.queue.publish();
    this.onReplay(moves);
    return count;
  }

  /** Go on with a device that has taken the place of the one before: it may have completed requests already. */
  goOn(): void {
    this.watch.restart();
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
    // All else that may be wrong of it is for lend() to find.
    if (buffer.released) checkStretch(buffer, offset, length);
    if (length > this.limits.maxSegmentBytes) {
      return this.submitChain(type, sector, [{ buffer, offset, length }], deviceWrites);
    }
    const lo = buffer.iovaLo + offset;
    const hi = lo > 0xffffffff ? buffer.iovaHi + 1 : buffer.iovaHi;
    this.throwIfBroken();
    buffer.lend(offset, length, deviceWrites);
    const slot = this.queue.addFramed(lo | 0, hi, length, deviceWrites);
    if (slot < 0) {
      buffer.giveBack(offset, length);
      return -1;
    }
    this.writeHeader(slot, type, sector);
    this.lent[slot] = buffer;
    const { records } = this;
    const record = slot * RECORD_SIZE;
    records[record + OFFSET] = offset;
    records[record + LENGTH] = length;
    return slot;
  }

  /** Data elements of a request, each at most `size_max` bytes. */
  private elementsOf(segments: readonly DataSegment[]): number {
    const { maxSegmentBytes } = this.limits;
    let elements = 0;
    for (const { length } of segments) elements += Math.ceil(length / maxSegmentBytes);
    return elements;
  }

  private checkChain(type: number, sector: number, segments: readonly DataSegment[]): void {
    const { maxSegments } = this.limits;
    let bytes = 0;
    for (const { buffer, offset, length } of segments) {
      checkStretch(buffer, offset, length);
      bytes += length;
    }
    const elements = this.elementsOf(segments);
    if (elements > maxSegments) throw rangeError("segments", `at most ${maxSegments} data elements`, elements);
    if (type === IN || type === OUT) this.checkSectors(sector, bytes);
  }

  /** What was lent to a queue that is broken stays lent: that it is broken is to be said first. */
  private throwIfBroken(): void {
    const { broken } = this.queue;
    if (broken !== undefined) throw broken;
  }

  /** Put a request of any number of data elements into the ring; -1 when there is no room. */
  private submitSegments(type: number, sector: number, chain: Chain): number {
    const { queue } = this;
    const { maxSegmentBytes } = this.limits;
    const { segments, deviceWrites } = chain;
    const slot = queue.beginFramed(this.elementsOf(segments), deviceWrites);
    if (slot < 0) return -1;
    for (const { buffer, offset, length } of segments) {
      for (let done = 0; done < length; done += maxSegmentBytes) {
        const lo = buffer.iovaLo + offset + done;
        const hi = lo > 0xffffffff ? buffer.iovaHi + 1 : buffer.iovaHi;
        queue.segments.add(lo | 0, hi, Math.min(maxSegmentBytes, length - done));
      }
    }
    queue.commitFramed();
    this.writeHeader(slot, type, sector);
    this.chains[slot] = chain;
    return slot;
  }

  /** What is in flight, oldest first. */
  private requestsInFlight(): Request[] {
    const found: Request[] = [];
    for (let slot = 0; slot < this.queueSize; slot++) {
      const chain = this.chains[slot] ?? this.plainRequest(slot);
      if (chain === undefined) continue;
      const [sector, sequence] = this.records.subarray(slot * RECORD_SIZE);
      found.push({ ...chain, slot, type: this.types[slot], sector, sequence });
    }
    return found.sort((a, b) => a.sequence - b.sequence);
  }

  /** The request in `slot` when it has one data element. */
  private plainRequest(slot: number): Chain | undefined {
    const buffer = this.lent[slot];
    if (buffer === undefined) return undefined;
    const offset = this.records[slot * RECORD_SIZE + OFFSET];
    const length = this.records[slot * RECORD_SIZE + LENGTH];
    const segments = [{ buffer, offset, length }];
    return { segments, deviceWrites: this.types[slot] !== OUT, isLender: true };
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
    const { records } = this;
    const record = slot * RECORD_SIZE;
    records[record] = sector;
    records[record + SEQUENCE] = this.sequence++;
  }

  private returnBuffers(slot: number): void {
    const buffer = this.lent[slot];
    if (buffer !== undefined) {
      this.lent[slot] = undefined;
      const { records } = this;
      const record = slot * RECORD_SIZE;
      buffer.giveBack(records[record + OFFSET], records[record + LENGTH]);
      return;
    }
    const chain = this.chains[slot];
    if (chain === undefined) return;
    this.chains[slot] = undefined;
    if (chain.isLender) giveBackAll(chain.segments);
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
