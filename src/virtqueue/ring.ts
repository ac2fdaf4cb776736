/** What both halves of the driver's rings share: where a ring lies, its options, and how it breaks. */

import { rangeError, VirtioError } from "../errors.js";
import type { VirtqueueLayout } from "./layout.js";

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
