/** What both halves of the driver's rings share: where a ring lies, its options, and how it breaks. */

import { rangeError, VirtioError } from "../errors.js";
import { DESC_SIZE } from "./defs.js";
import type { VirtqueueLayout } from "./layout.js";

/** 32-bit words of a descriptor of either format. */
export const DESC_WORDS = DESC_SIZE / 4;

/**
 * The fixed ends of every request of a queue, inside the per-request data of its slot: a header that the
 * device reads and a trailer that it writes. Known in advance, their descriptors are written once and
 * stay; per request only the data in between changes.
 */
export interface RequestFrame {
  /** Bytes of the device-readable header at offset 0 of the request. */
  readonly headerLength: number;
  /** Offset of the device-writable trailer in the request. */
  readonly trailerOffset: number;
  /** Bytes of the trailer. */
  readonly trailerLength: number;
}

/** Where the indirect tables of a queue lie, one per slot: in the same buffer as the ring. */
export interface IndirectTables {
  /** Byte offset of the first table in the buffer; a multiple of 16. */
  readonly offset: number;
  /** Address of the first table for the device. */
  readonly iova: number;
  /** Descriptors per table, at least 1. Chains that need more go into the ring. */
  readonly entries: number;
}

/** Everything that one half of a ring needs to know. Checked by `Virtqueue`, not again here. */
export interface RingOptions {
  readonly layout: VirtqueueLayout;
  readonly buffer: ArrayBuffer;
  readonly offset: number;
  readonly iova: number;
  readonly eventIdx: boolean;
  readonly inOrder: boolean;
  readonly indirect: IndirectTables | undefined;
  readonly frame: RequestFrame | undefined;
  /** Where to go on with the ring as it is in memory; a new ring, cleared, when undefined. */
  readonly resume: number | undefined;
}

/** A slot whose descriptors hold no frame. */
export const SHAPE_NONE = 0;
/** A slot whose ring descriptors hold header, one data element and trailer. */
export const SHAPE_FRAME_DIRECT = 1;
/** A slot whose indirect table holds header, one data element and trailer. */
export const SHAPE_FRAME_INDIRECT = 2;

/** Elements of a framed request with one data element. */
export const FRAME_ELEMENTS = 3;

/** Largest total length of a descriptor chain (virtio 1.3, 2.7.5). */
const MAX_CHAIN_BYTES = 2 ** 32;

/**
 * What belongs to each slot beside the ring: the frame of its request and its indirect table, with their
 * addresses for the device.
 */
export class SlotMemory {
  /** All indirect tables, one behind the other. */
  readonly table: Int32Array;
  /** Descriptors of each table; 0 when there are none. */
  readonly tableEntries: number;
  /** Whether a framed request with one data element fits into a table. */
  readonly frameFits: boolean;
  /** Upper half of the address of every table. */
  readonly tableHi: number;
  /** Upper half of the address of every request. */
  readonly requestHi: number;
  /** Bytes of the frame's header. */
  readonly headerLength: number;
  /** Bytes of the frame's trailer. */
  readonly trailerLength: number;

  private readonly tableLo: number;
  private readonly requestLo: number;
  private readonly requestSize: number;
  private readonly trailerOffset: number;

  constructor({ layout, buffer, iova, indirect, frame }: RingOptions) {
    this.tableEntries = indirect === undefined ? 0 : indirect.entries;
    this.table = new Int32Array(buffer, indirect?.offset ?? 0, layout.queueSize * this.tableEntries * DESC_WORDS);
    this.frameFits = this.tableEntries >= FRAME_ELEMENTS;
    this.tableLo = (indirect?.iova ?? 0) | 0;
    this.tableHi = Math.floor((indirect?.iova ?? 0) / 2 ** 32);
    this.requestLo = (iova + layout.reqOffset) | 0;
    this.requestHi = Math.floor(iova / 2 ** 32);
    this.requestSize = layout.requestSize;
    this.headerLength = frame?.headerLength ?? 0;
    this.trailerOffset = frame?.trailerOffset ?? 0;
    this.trailerLength = frame?.trailerLength ?? 0;
  }

  /** Word of `table` at which entry `entry` of a slot's table begins. */
  entryAt(slot: number, entry: number): number {
    return (slot * this.tableEntries + entry) * DESC_WORDS;
  }

  /** Lower half of the address of a slot's table. */
  tableAddress(slot: number): number {
    return (this.tableLo + slot * this.tableEntries * DESC_SIZE) | 0;
  }

  /** Lower half of the address of a slot's header. */
  headerAddress(slot: number): number {
    return (this.requestLo + slot * this.requestSize) | 0;
  }

  /** Lower half of the address of a slot's trailer. */
  trailerAddress(slot: number): number {
    return (this.requestLo + slot * this.requestSize + this.trailerOffset) | 0;
  }

  /** Write header and trailer into a slot's table, as first entry and as entry `last`. */
  writeFrame(slot: number, last: number, headerTail: number, trailerTail: number): void {
    const { table, requestHi, headerLength, trailerLength } = this;
    writeDescriptor(table, this.entryAt(slot, 0), this.headerAddress(slot), requestHi, headerLength, headerTail);
    writeDescriptor(table, this.entryAt(slot, last), this.trailerAddress(slot), requestHi, trailerLength, trailerTail);
  }
}

/**
 * The data elements of one framed request, in arrays that are made once: `Virtqueue.addFramedList` takes them in a
 * single call. Addresses are pairs of 32-bit halves, as everywhere on the hot path.
 *
 * @example
 * ```ts
 * import { SegmentList } from "virtio-driver";
 * const list = new SegmentList(126);
 * list.clear();
 * list.add(0x20000, 0, 4096);
 * console.log(list.count, list.bytes); // 1 4096
 * ```
 */
export class SegmentList {
  /** Lower halves of the addresses. */
  readonly lo: Int32Array;
  /** Upper halves. */
  readonly hi: Int32Array;
  /** Bytes of each element. */
  readonly length: Uint32Array;
  /** Elements. */
  count = 0;
  /** Bytes of all elements. */
  bytes = 0;

  /** @param capacity - elements there is room for. */
  constructor(capacity: number) {
    this.lo = new Int32Array(capacity);
    this.hi = new Int32Array(capacity);
    this.length = new Uint32Array(capacity);
  }

  /** Make it empty. */
  clear(): void {
    this.count = 0;
    this.bytes = 0;
  }

  /**
   * Add an element.
   *
   * @param lo - lower half of its address for the device.
   * @param hi - upper half.
   * @param length - bytes, 1 to 2^32-1.
   * @throws RangeError when there is no room, or for an empty element.
   */
  add(lo: number, hi: number, length: number): void {
    const at = this.count;
    if (at >= this.length.length) throw rangeError("elements", `at most ${this.length.length}`, at + 1);
    if (length >>> 0 !== length || length === 0) throw rangeError("length", "1 to 2^32-1 bytes", length);
    this.lo[at] = lo;
    this.hi[at] = hi;
    this.length[at] = length;
    this.count = at + 1;
    this.bytes += length;
  }
}

/** Write one descriptor; `tail` is its last word: flags and next (split), or id and flags (packed). */
export function writeDescriptor(
  words: Int32Array,
  at: number,
  lo: number,
  hi: number,
  length: number,
  tail: number,
): void {
  words[at] = lo;
  words[at + 1] = hi;
  words[at + 2] = length;
  words[at + 3] = tail;
}

/**
 * The chain under construction, alike on both formats: how many elements, how long, and that writable
 * elements stand last. Nothing of it is visible to the device.
 */
export class ChainBuilder {
  /** Elements announced to `begin`; 0 when no chain is being built. */
  limit = 0;
  /** Elements added so far. */
  count = 0;
  /** Whether the elements go into the slot's indirect table. */
  indirect = false;
  /** Bytes of all writable elements. */
  writable = 0;
  /** Bytes of all elements. */
  total = 0;

  /** Start a chain of at most `limit` elements. */
  start(limit: number, indirect: boolean): void {
    if (this.limit !== 0) throw rangeError("begin", "commit() or rewind() of the chain before", "a second begin()");
    this.limit = limit;
    this.count = 0;
    this.indirect = indirect;
    this.writable = 0;
    this.total = 0;
  }

  /** Account for one more element. */
  add(length: number, isWritable: boolean): void {
    if (this.count >= this.limit) {
      throw rangeError("elements", `at most the ${this.limit} announced to begin()`, this.count + 1);
    }
    if (length >>> 0 !== length || length === 0) throw rangeError("length", "1 to 2^32-1 bytes", length);
    if (this.total + length > MAX_CHAIN_BYTES) {
      throw rangeError("length", "a chain of at most 2^32 bytes in all", this.total + length);
    }
    if (isWritable) this.writable += length;
    else if (this.writable > 0) throw rangeError("element", "readable elements before writable ones", "readable last");
    this.total += length;
    this.count++;
  }

  /** End the chain; it is complete. `intact` says whether its place in the ring is still its own. */
  finish(intact: boolean): void {
    if (this.limit === 0 || this.count === 0)
      throw rangeError("elements", "at least one between begin() and commit()", 0);
    if (!intact) throw rangeError("commit", "neither poll() nor addFramed() since begin()", "one of them");
    this.limit = 0;
  }

  /** Forget the chain. */
  discard(): void {
    this.limit = 0;
  }
}

/** Clamp a byte count to what the private u32 records hold. */
export function clampU32(bytes: number): number {
  return bytes > 0xffffffff ? 0xffffffff : bytes;
}

/** The error for a device that wrote something impossible into the ring. */
export function brokenRing(what: string, got: number, expected: string): VirtioError {
  return new VirtioError(
    "ERR_VIRTIO_QUEUE_BROKEN",
    `the device wrote ${what} ${got}, expected ${expected}; the queue is unusable until the device is reset`,
  );
}
