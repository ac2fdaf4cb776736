/** The driver's half of a virtqueue, split or packed, behind one class. */

import { checkInteger, checkOptions, rangeError, typeError, type VirtioError } from "../errors.js";
import { DESC_ALIGN, DESC_SIZE } from "./defs.js";
import { VirtioFeature } from "./features.js";
import type { VirtqueueLayout } from "./layout.js";
import { PackedRing } from "./packed.js";
import type { IndirectTables, RequestFrame, RingOptions, SegmentSink } from "./ring.js";
import { SplitRing } from "./split.js";

/** What a {@link Virtqueue} is made from. */
export interface VirtqueueOptions {
  /** Sizes and offsets; its format must be that of `features`. Its `numQueues` does not matter here. */
  readonly layout: VirtqueueLayout;
  /** Queue index on the device, for notifications. Default 0. */
  readonly index?: number;
  /** Memory shared with the device. */
  readonly buffer: ArrayBuffer;
  /** Byte offset of this queue in `buffer`, a multiple of 16. Default 0. */
  readonly offset?: number;
  /** Address of this queue for the device, a multiple of 16. */
  readonly iova: number;
  /** Negotiated features: RING_PACKED, EVENT_IDX, INDIRECT_DESC and IN_ORDER matter here. */
  readonly features: bigint;
  /** Memory for indirect tables; used only when INDIRECT_DESC was negotiated. */
  readonly indirect?: IndirectTables;
  /** Fixed ends of every request, for {@link Virtqueue.addFramed}. */
  readonly frame?: RequestFrame;
  /**
   * Go on where an idle queue on the same memory stood: its {@link Virtqueue.position}. The ring is left as it is in
   * memory, and so is what the device was last asked about notifications. Without it the ring is cleared.
   */
  readonly resume?: number;
}

/**
 * The driver's half of one virtqueue over memory that the device can see. It knows no descriptor, no
 * transport and no device class, and never trusts what the device wrote: an impossible value breaks the
 * queue with `ERR_VIRTIO_QUEUE_BROKEN`, from then on thrown by every call; a length is clamped.
 *
 * A chain is built by `begin`, `push` for each element, `commit`; it lives in a *slot*, the head index
 * (split) or buffer id (packed), which also names the request data of the layout. `publish` makes all
 * committed chains visible at once and tells whether the device wants a notification. `poll` returns the
 * slots of used chains.
 *
 * @throws RangeError for memory that is too small, unaligned or crosses a 4 GiB boundary of addresses.
 * @example
 * ```ts
 * import { Virtqueue, VirtqueueLayout } from "virtio-driver";
 * const layout = new VirtqueueLayout({ queueSize: 8 });
 * const queue = new Virtqueue({ layout, buffer: new ArrayBuffer(4096), iova: 0x10000, features: 0n });
 * const slot = queue.begin(2);
 * queue.push(0x20000, 0, 16, false); // 16 bytes for the device to read
 * queue.push(0x20010, 0, 512, true); // 512 bytes for it to write
 * queue.commit();
 * console.log(slot, queue.publish(), queue.poll()); // 0 true -1
 * ```
 */
export class Virtqueue {
  /** Sizes and offsets of the queue. */
  readonly layout: VirtqueueLayout;
  /** Queue index on the device. */
  readonly index: number;
  /** Largest number of elements of one chain: the queue size (2.7.7.3.1, 2.8.10). */
  readonly maxElements: number;
  /** Bytes from the start of the buffer to the request data of slot 0. */
  readonly requestOffset: number;
  /** Takes the data elements of a framed request, between {@link beginFramed} and {@link commitFramed}. */
  readonly segments: SegmentSink;

  // One of the two exists, as `isPacked` says. A branch on a flag keeps every call site monomorphic when both
  // formats live in one process; two subclasses behind one name would not.
  private readonly isPacked: boolean;
  private readonly split: SplitRing;
  private readonly packed: PackedRing;

  constructor(options: VirtqueueOptions) {
    const known = ["layout", "index", "buffer", "offset", "iova", "features", "indirect", "frame", "resume"];
    checkOptions("Virtqueue", options, known);
    const { layout, buffer, features, frame } = options;
    if (typeof features !== "bigint") throw typeError("features", "a bigint", features);
    if (layout.packed !== ((features & VirtioFeature.RING_PACKED) !== 0n)) {
      throw rangeError("layout", "the format that the features say", layout.packed ? "packed" : "split");
    }
    if (!(buffer instanceof ArrayBuffer)) throw typeError("buffer", "an ArrayBuffer", buffer);
    if (buffer.byteLength < layout.endOffset) {
      throw rangeError("buffer", `at least the ${layout.endOffset} bytes of the layout`, buffer.byteLength);
    }
    const offset = checkInteger("offset", options.offset ?? 0, 0, buffer.byteLength - layout.endOffset);
    const iova = checkAddress("iova", options.iova, layout.endOffset);
    if (offset % DESC_ALIGN !== 0) throw rangeError("offset", `a multiple of ${DESC_ALIGN}`, offset);
    if (frame !== undefined) {
      checkInteger("frame.headerLength", frame.headerLength, 1, layout.requestSize);
      checkInteger("frame.trailerLength", frame.trailerLength, 1, layout.requestSize - frame.headerLength);
      const lastOffset = layout.requestSize - frame.trailerLength;
      checkInteger("frame.trailerOffset", frame.trailerOffset, frame.headerLength, lastOffset);
    }
    let indirect: IndirectTables | undefined;
    if (options.indirect !== undefined && (features & VirtioFeature.INDIRECT_DESC) !== 0n) {
      indirect = options.indirect;
      const entries = checkInteger("indirect.entries", indirect.entries, 1, layout.queueSize);
      const bytes = layout.queueSize * entries * DESC_SIZE;
      if (buffer.byteLength < bytes) {
        throw rangeError("indirect.entries", `tables that fit into ${buffer.byteLength} bytes`, entries);
      }
      checkInteger("indirect.offset", indirect.offset, 0, buffer.byteLength - bytes);
      if (indirect.offset % DESC_ALIGN !== 0) throw rangeError("indirect.offset", "a multiple of 16", indirect.offset);
      checkAddress("indirect.iova", indirect.iova, bytes);
    }
    this.layout = layout;
    this.index = checkInteger("index", options.index ?? 0, 0, 65535);
    this.maxElements = layout.queueSize;
    this.requestOffset = offset + layout.reqOffset;
    const inOrder = (features & VirtioFeature.IN_ORDER) !== 0n;
    const resume = options.resume === undefined ? undefined : checkPosition(options.resume, layout, inOrder);
    const ring: RingOptions = {
      ...{ layout, buffer, offset, iova, indirect, frame, inOrder, resume },
      eventIdx: (features & VirtioFeature.EVENT_IDX) !== 0n,
    };
    this.isPacked = layout.packed;
    this.packed = layout.packed ? new PackedRing(ring) : NO_RING;
    this.split = layout.packed ? NO_RING : new SplitRing(ring);
    this.segments = layout.packed ? this.packed.segments : this.split.segments;
  }

  /**
   * Start a chain of at most `count` elements. Nothing is visible to the device before {@link publish}. Until
   * `commit` or `rewind` neither `poll` nor `addFramed` may be called; `commit` refuses otherwise.
   *
   * @param count - elements, 1 to {@link maxElements}, readable ones first.
   * @returns the slot, or -1 when there is no room now.
   * @throws RangeError for another count, or while another chain is being built.
   */
  begin(count: number): number {
    if (this.broken !== undefined) throw this.broken;
    if (!(Number.isSafeInteger(count) && count >= 1 && count <= this.maxElements)) {
      throw rangeError("count", `1 to ${this.maxElements}`, count);
    }
    return this.isPacked ? this.packed.begin(count) : this.split.begin(count);
  }

  /**
   * Add an element to the chain.
   *
   * @param lo - lower half of its address for the device.
   * @param hi - upper half.
   * @param length - bytes, 1 to 2^32-1.
   * @param isWritable - the device may only write it; otherwise only read.
   * @throws RangeError for an empty element, one too many, a readable one after a writable one, or a chain
   *   above 2^32 bytes. `rewind` then, or `commit` without it.
   */
  push(lo: number, hi: number, length: number, isWritable: boolean): void {
    if (this.isPacked) this.packed.push(lo, hi, length, isWritable);
    else this.split.push(lo, hi, length, isWritable);
  }

  /**
   * End the chain; the next {@link publish} makes it visible.
   *
   * @returns its slot.
   * @throws RangeError when it has no element, or no chain was begun.
   */
  commit(): number {
    return this.isPacked ? this.packed.commit() : this.split.commit();
  }

  /** Drop the chain under construction; everything is as before `begin`. */
  rewind(): void {
    if (this.isPacked) this.packed.rewind();
    else this.split.rewind();
  }

  /**
   * Add a whole request at once: the slot's header, one data element, the slot's trailer, as told by
   * `frame`. The fast form of `begin`, three times `push` and `commit`; it checks nothing.
   *
   * @param lo - lower half of the data's address for the device.
   * @param hi - upper half.
   * @param length - bytes of data, at least 1.
   * @param isWritable - the device writes the data; otherwise it reads them.
   * @returns the slot, whose header the caller fills in before {@link publish}; -1 when there is no room.
   */
  addFramed(lo: number, hi: number, length: number, isWritable: boolean): number {
    return this.isPacked
      ? this.packed.addFramed(lo, hi, length, isWritable)
      : this.split.addFramed(lo, hi, length, isWritable);
  }

  /**
   * Start a whole request with any number of data elements, also none, all readable or all writable: the slot's
   * header, what is added to {@link segments}, the slot's trailer. As for `begin`, neither `poll` nor `addFramed`
   * may be called before `commitFramed` or `rewind`.
   *
   * @param count - data elements, at most {@link maxElements} - 2.
   * @returns the slot, or -1 when there is no room now.
   * @throws RangeError for another count, or while another chain is being built.
   */
  beginFramed(count: number, isWritable: boolean): number {
    if (this.broken !== undefined) throw this.broken;
    if (!(Number.isSafeInteger(count) && count >= 0 && count <= this.maxElements - 2)) {
      throw rangeError("count", `0 to ${this.maxElements - 2}`, count);
    }
    return this.isPacked ? this.packed.beginFramed(count, isWritable) : this.split.beginFramed(count, isWritable);
  }

  /**
   * End the framed request; the next {@link publish} makes it visible.
   *
   * @returns its slot.
   * @throws RangeError when fewer elements were added than announced, or none was begun. `rewind` then.
   */
  commitFramed(): number {
    return this.isPacked ? this.packed.commitFramed() : this.split.commitFramed();
  }

  /**
   * Make every committed chain visible to the device.
   *
   * @returns whether the device must be notified; never true when nothing was committed.
   */
  publish(): boolean {
    return this.isPacked ? this.packed.publish() : this.split.publish();
  }

  /**
   * Take back one used chain. Its memory belongs to the driver again.
   *
   * @returns its slot, or -1 when there is none. {@link usedLength} then says what the device wrote.
   * @throws VirtioError ERR_VIRTIO_QUEUE_BROKEN when the device wrote something impossible.
   */
  poll(): number {
    return this.isPacked ? this.packed.poll() : this.split.poll();
  }

  /** Bytes the device wrote into the chain that {@link poll} returned last, at most its writable bytes. */
  get usedLength(): number {
    return this.isPacked ? this.packed.usedLength : this.split.usedLength;
  }

  /** Whether the device has used a chain that {@link poll} has not returned. */
  hasUsed(): boolean {
    if (this.broken !== undefined) throw this.broken;
    return this.isPacked ? this.packed.hasUsed() : this.split.hasUsed();
  }

  /** Ask the device not to send used buffer notifications. Some may still come. Nothing happens on a broken queue. */
  disableNotifications(): void {
    if (this.broken !== undefined) return;
    if (this.isPacked) this.packed.disableNotifications();
    else this.split.disableNotifications();
  }

  /**
   * Ask the device for a notification at the next chain that it uses. To be called after every drain.
   *
   * @param unnoticed - how many entries of the used ring (split) or descriptors (packed) the device may use first
   *   without a notification; at most half of what is in flight is taken. Without EVENT_IDX there is always one at
   *   the next chain. What is used so waits unnoticed: have another way to look after a while.
   * @returns whether so many were used meanwhile that no notification will come: then poll again before waiting.
   */
  enableNotifications(unnoticed = 0): boolean {
    if (this.broken !== undefined) throw this.broken;
    return this.isPacked ? this.packed.enableNotifications(unnoticed) : this.split.enableNotifications(unnoticed);
  }

  /** Chains committed and not yet returned by {@link poll}. */
  get inFlight(): number {
    return this.isPacked ? this.packed.inFlight : this.split.inFlight;
  }

  /** Ring descriptors that are free. */
  get numFree(): number {
    return this.isPacked ? this.packed.numFree : this.split.numFree;
  }

  /** The 32-bit value of a notification with NOTIFICATION_DATA (virtio 1.3, 2.9): index and ring position. */
  get notificationData(): number {
    const position = this.isPacked ? this.packed.notificationOffset : this.split.notificationOffset;
    return position * 0x10000 + this.index;
  }

  /**
   * Where the queue stands, for the option `resume` of another `Virtqueue` that goes on with its memory; undefined
   * while a chain is in flight. Also the value of vhost-user's `SET_VRING_BASE`, for split queues in the lower half.
   */
  get position(): number | undefined {
    if (this.inFlight > 0) return undefined;
    return this.isPacked ? this.packed.usedPosition : this.split.position;
  }

  /**
   * Where a device goes on that takes the place of a dead one and knows what is in flight: the value of vhost-user's
   * `SET_VRING_BASE`, which counts only what {@link poll} has returned. So poll until there is nothing more before.
   */
  get usedPosition(): number {
    return this.isPacked ? this.packed.usedPosition : this.split.usedPosition;
  }

  /**
   * Clear the ring and forget every chain, for a device that begins anew: one that was reset, or that has taken the
   * place of a dead one. No device may use the ring meanwhile. Notifications are as on a new queue.
   *
   * @throws what broke the queue, if something did.
   */
  restart(): void {
    if (this.broken !== undefined) throw this.broken;
    if (this.isPacked) this.packed.restart();
    else this.split.restart();
  }

  /** Byte offset in the buffer of the request data of `slot`. */
  slotOffset(slot: number): number {
    return this.requestOffset + slot * this.layout.requestSize;
  }

  /** Break the queue: every later call that would touch the device's memory throws `error`. */
  fail(error: VirtioError): void {
    if (this.isPacked) this.packed.fail(error);
    else this.split.fail(error);
  }

  /** What broke the queue, and is thrown by every call; undefined while it is in order. */
  get broken(): Error | undefined {
    return this.isPacked ? this.packed.failure : this.split.failure;
  }
}

/** The ring that a queue does not have: assigned all the same, so that all queues have one hidden class. */
const NO_RING = undefined as never;
/** Return `position` when an idle queue of this layout can stand there. */
function checkPosition(position: number, { packed, queueSize }: VirtqueueLayout, inOrder: boolean): number {
  checkInteger("resume", position, 0, 0xffff_ffff);
  const upper = position >>> 16;
  const isPossible = packed
    ? upper === (position & 0xffff) && (upper & 0x7fff) < queueSize
    : upper < (inOrder ? queueSize : 1);
  if (!isPossible) throw rangeError("resume", `where an idle queue of ${queueSize} can stand`, position);
  return position;
}

/** Return `iova` when `bytes` from there are 16-aligned and share the upper half of their addresses. */
function checkAddress(name: string, iova: number, bytes: number): number {
  checkInteger(name, iova, 0, Number.MAX_SAFE_INTEGER - bytes);
  if (iova % DESC_ALIGN !== 0) throw rangeError(name, `a multiple of ${DESC_ALIGN}`, iova);
  if (bytes > 0 && Math.floor(iova / 2 ** 32) !== Math.floor((iova + bytes - 1) / 2 ** 32)) {
    throw rangeError(name, `${bytes} bytes that do not cross a 4 GiB boundary`, iova);
  }
  return iova;
}
