/** What both halves of the driver's rings share: where a ring lies, its options, and how it breaks. */

import { rangeError, VirtioError } from "../errors.js";
import { DESC_SIZE } from "./defs.js";
import type { VirtqueueLayout } from "./layout.js";

/** 32-bit words of a descriptor of either format. */
export const DESC_WORDS = DESC_SIZE / 4;
// An exported or imported binding is loaded and checked at each use; a constant of the module is folded.
const WORDS = DESC_WORDS;

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

/** What a slot's descriptors hold of the frame: nothing. */
export const SHAPE_NONE = 0;
/**
 * Header, one data element and trailer in the ring itself. Any other shape is the entry of the slot's indirect
 * table at which the trailer stands, behind the header and the data elements; see {@link listShape}.
 */
export const SHAPE_DIRECT = 0xffff;

/** Shape of a table whose `count` data elements, too, have the last word that belongs to their place. */
export function listShape(count: number, isWritable: boolean): number {
  return (count + 1) | (isWritable ? 0x20000 : 0x10000);
}

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

  private readonly tableWords: number;
  private readonly tableLo: number;
  private readonly requestLo: number;
  private readonly requestSize: number;
  private readonly trailerOffset: number;

  constructor({ layout, buffer, iova, indirect, frame }: RingOptions) {
    this.tableEntries = indirect === undefined ? 0 : indirect.entries;
    this.tableWords = this.tableEntries * WORDS;
    this.table = new Int32Array(buffer, indirect?.offset ?? 0, layout.queueSize * this.tableWords);
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
    return slot * this.tableWords + entry * WORDS;
  }

  /** Lower half of the address of a slot's table. */
  tableAddress(slot: number): number {
    return (this.tableLo + slot * this.tableWords * 4) | 0;
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

  /** Write the last words of `count` data elements of a slot's table; from one to the next they grow by `step`. */
  writeTails(slot: number, count: number, tail: number, step: number): void {
    for (let entry = 1; entry <= count; entry++) this.table[this.entryAt(slot, entry) + 3] = tail + (entry - 1) * step;
  }
}

/** Where the data elements of a framed request go; see `Virtqueue.beginFramed`. */
export interface SegmentSink {
  /**
   * Add an element.
   *
   * @param lo - lower half of its address for the device.
   * @param hi - upper half.
   * @param length - bytes, 1 to 2^32-1.
   * @throws RangeError for one more than announced, or for an empty element.
   */
  add(lo: number, hi: number, length: number): void;
}

/**
 * Writes the data elements of a framed request as descriptors, one behind the other: straight into the slot's
 * indirect table, or into private memory from which they go into the ring.
 */
export class SegmentWriter implements SegmentSink {
  /** Bytes of all elements. */
  bytes = 0;
  /** Elements announced. */
  count = 0;
  /** Elements of a request that has no table, as descriptors. */
  readonly staging: Int32Array;

  private words: Int32Array;
  private at = 0;
  private end = 0;

  /** @param capacity - elements there is room for outside tables. */
  constructor(capacity: number) {
    this.staging = new Int32Array(capacity * WORDS);
    this.words = this.staging;
  }

  /**
   * Begin with an empty list.
   *
   * @param words - where the descriptors go, the first one at word `at`. Their last words are not written.
   */
  start(words: Int32Array, at: number, count: number): void {
    this.words = words;
    this.at = at;
    this.end = at + count * WORDS;
    this.count = count;
    this.bytes = 0;
  }

  add(lo: number, hi: number, length: number): void {
    const { words, at } = this;
    if (at >= this.end) throw rangeError("elements", `at most the ${this.count} announced`, this.count + 1);
    if (length >>> 0 !== length || length === 0) throw rangeError("length", "1 to 2^32-1 bytes", length);
    words[at] = lo | 0;
    words[at + 1] = hi | 0;
    words[at + 2] = length | 0;
    this.at = at + WORDS;
    this.bytes += length;
  }

  /** End the list; it is complete. */
  finish(): void {
    const left = (this.end - this.at) / WORDS;
    if (left > 0) throw rangeError("elements", `the ${this.count} announced`, this.count - left);
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
  /** Whether a framed request is being built. */
  isFramed = false;
  /** Whether the data elements of the framed request are writable. */
  isWritable = false;
  /** Bytes of all writable elements. */
  writable = 0;
  /** Bytes of all elements. */
  total = 0;

  /** Start a chain of at most `limit` elements. */
  start(limit: number, indirect: boolean): void {
    this.checkIdle();
    this.limit = limit;
    this.count = 0;
    this.indirect = indirect;
    this.writable = 0;
    this.total = 0;
  }

  /** Start a framed request; its data elements are the matter of a `SegmentWriter`. */
  startFramed(indirect: boolean, isWritable: boolean): void {
    this.checkIdle();
    this.isFramed = true;
    this.indirect = indirect;
    this.isWritable = isWritable;
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

  /** End the framed request; see {@link finish}. */
  finishFramed(intact: boolean, segments: SegmentWriter): void {
    if (!this.isFramed) throw rangeError("commitFramed", "beginFramed() before", "none");
    segments.finish();
    if (!intact) throw rangeError("commitFramed", "neither poll() nor addFramed() since beginFramed()", "one of them");
    this.isFramed = false;
  }

  /** Forget the chain. */
  discard(): void {
    this.limit = 0;
    this.isFramed = false;
  }

  private checkIdle(): void {
    if (this.limit !== 0 || this.isFramed) {
      throw rangeError("begin", "commit() or rewind() of the chain before", "a second begin");
    }
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
