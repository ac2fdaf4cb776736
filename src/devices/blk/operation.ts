/** A call of the promise API on its way: cut into requests, put together again, settled once. */

import { DeviceBuffer } from "../../memory/index.js";
import { BlkRequestType, SECTOR_SIZE } from "../../protocol/blk.js";
import { beyondEnd } from "./checks.js";
import type { BlkLimits } from "./limits.js";
import type { BlockRange } from "./options.js";
import type { DataSegment } from "./queue.js";

/** One request of an {@link Operation}, in the slot of a queue. */
export interface Part {
  readonly operation: Operation;
  /** Bytes of the operation before this part. */
  readonly start: number;
  /** Bytes of data. */
  readonly length: number;
  /** Memory of the pool that stands in for the caller's; goes back when the part is done. */
  readonly bounce: DeviceBuffer | undefined;
}

/** What the next request of an operation is to be; `undefined` while memory for it is lacking. */
export interface NextRequest {
  readonly sector: number;
  readonly segments: readonly DataSegment[];
  readonly part: Part;
}

/** Memory given by the caller: plain bytes, or a buffer lent by the device. */
export type Memory = Uint8Array | DeviceBuffer;

/** A stretch of the caller's memory; `lent` when the device can reach it. */
export interface Stretch {
  readonly bytes: Uint8Array;
  readonly lent: DataSegment | undefined;
}

/** The `length` bytes of `memory` from `offset`. */
export function stretchOf(memory: Memory, offset: number, length: number): Stretch {
  return memory instanceof DeviceBuffer
    ? { bytes: memory.bytes.subarray(offset, offset + length), lent: { buffer: memory, offset, length } }
    : { bytes: memory.subarray(offset, offset + length), lent: undefined };
}

const NO_RANGES: readonly BlockRange[] = [];
/** Bytes that one request carries for a caller whose memory the device cannot reach. */
const BOUNCE_BYTES = 1024 * 1024;

/**
 * Base of all operations. The scheduler asks for one request after the other with {@link next} until
 * {@link submitted} is complete, and reports each one's end with {@link partDone}.
 */
export abstract class Operation {
  /** `BlkRequestType` of its requests. */
  readonly type: number;
  /** What it touches of the disk. */
  private readonly ranges: readonly BlockRange[];
  /** Resolves or rejects when every part has come back; rejects at once when aborted. */
  readonly promise: Promise<void>;
  /** Whether every request was handed to a queue, or no more shall be. */
  allSubmitted = false;
  /** Requests in flight. */
  outstanding = 0;

  private failure: Error | undefined = undefined;
  private isSettled = false;
  private readonly resolve: () => void;
  private readonly reject: (error: unknown) => void;

  protected constructor(type: number, ranges: readonly BlockRange[]) {
    this.type = type;
    this.ranges = ranges;
    let resolve: () => void = () => {};
    let reject: (error: unknown) => void = () => {};
    this.promise = new Promise<void>((yes, no) => {
      resolve = yes;
      reject = no;
    });
    this.resolve = resolve;
    this.reject = reject;
  }

  /** Whether the device writes the data of the requests. */
  get deviceWrites(): boolean {
    return this.type !== BlkRequestType.OUT;
  }

  /** Whether the promise is settled. */
  get settled(): boolean {
    return this.isSettled;
  }

  /** Describe the next request, or `undefined` while there is no memory for it. */
  abstract next(take: (length: number) => DeviceBuffer | undefined): NextRequest | undefined;

  /** The request from {@link next} was submitted. */
  submitted(part: Part): void {
    this.outstanding++;
    this.advance(part);
  }

  /** A request came back, failed or not. Data are handed over only as far as the device wrote. */
  partDone(part: Part, failure: Error | undefined, written: number): void {
    this.outstanding--;
    if (failure !== undefined) {
      this.failure ??= failure;
      this.allSubmitted = true;
    } else if (!this.isSettled) {
      this.deliver(part, Math.max(0, Math.min(part.length, written - 1)));
    }
    part.bounce?.release();
    this.settleIfDone();
  }

  /** Settle with `error` now; parts in flight come back later and change nothing. */
  abort(error: unknown): void {
    this.allSubmitted = true;
    if (this.isSettled) return;
    this.isSettled = true;
    this.letGo();
    this.reject(error);
  }

  /** End an operation that wants bytes behind the end of a disk of this size; returns whether it does. */
  refuseBeyond(capacity: number): boolean {
    const outside = this.ranges.find(({ position, length }) => position + length > capacity);
    if (outside === undefined || this.isSettled) return false;
    this.abort(beyondEnd(capacity, outside.position, outside.length));
    return true;
  }

  /** Settle when nothing is in flight and nothing is to come. */
  settleIfDone(): void {
    if (this.isSettled || !this.allSubmitted || this.outstanding > 0) return;
    this.isSettled = true;
    this.letGo();
    if (this.failure === undefined) this.resolve();
    else this.reject(this.failure);
  }

  /** Go on behind `part`; sets {@link allSubmitted} at the end. */
  protected abstract advance(part: Part): void;

  /** Take `length` delivered bytes of a part. */
  protected abstract deliver(part: Part, length: number): void;

  /** The caller's memory is not needed any more, but for requests in flight. */
  protected letGo(): void {}
}

/** A read or write of any length, from or to any memory. */
export class TransferOperation extends Operation {
  private readonly position: number;
  private readonly limits: BlkLimits;
  private readonly pieces: readonly DataSegment[] | undefined;
  private readonly memory: readonly Stretch[];
  private readonly total: number;
  private done = 0;
  /** First byte that a successful read did not deliver. */
  private end: number;

  /**
   * @param type - IN or OUT.
   * @param memory - where the data come from or go to, in order; together a multiple of 512 bytes.
   * @param position - first byte on the disk, a multiple of 512.
   */
  constructor(type: number, memory: readonly Stretch[], position: number, limits: BlkLimits) {
    const total = memory.reduce((sum, piece) => sum + piece.bytes.length, 0);
    super(type, [{ position, length: total }]);
    this.position = position;
    this.limits = limits;
    this.memory = memory;
    this.total = total;
    this.end = this.total;
    this.pieces = lentPieces(memory, limits, this.total);
    // Until the promise is settled data may be copied from or to it, so nobody else may get the memory.
    for (const { lent } of memory) lent?.buffer.retain();
  }

  /** Bytes that arrived without a gap from the start. */
  get transferred(): number {
    return this.end;
  }

  next(take: (length: number) => DeviceBuffer | undefined): NextRequest | undefined {
    const sector = (this.position + this.done) / SECTOR_SIZE;
    const start = this.done;
    if (this.pieces !== undefined) {
      const length = Math.min(this.total - start, this.limits.maxRequestBytes);
      const segments = cut(this.pieces, start, length);
      return { sector, segments, part: { operation: this, start, length, bounce: undefined } };
    }
    const length = Math.min(this.total - start, this.limits.maxRequestBytes, BOUNCE_BYTES);
    const bounce = take(length);
    if (bounce === undefined) return undefined;
    if (this.type === BlkRequestType.OUT) copyPieces(this.memory, start, bounce.bytes, length, true);
    return {
      sector,
      segments: [{ buffer: bounce, offset: 0, length }],
      part: { operation: this, start, length, bounce },
    };
  }

  protected advance(part: Part): void {
    this.done += part.length;
    if (this.done === this.total) this.allSubmitted = true;
  }

  protected deliver(part: Part, length: number): void {
    if (this.type === BlkRequestType.OUT) return;
    if (part.bounce !== undefined) copyPieces(this.memory, part.start, part.bounce.bytes, length, false);
    if (length < part.length) this.end = Math.min(this.end, part.start + length);
  }

  protected override letGo(): void {
    for (const { lent } of this.memory) lent?.buffer.unretain();
  }
}

/** A request without data, or with a little data of its own: FLUSH, DISCARD, GET_ID and their kind. */
export class ControlOperation extends Operation {
  private readonly requests: readonly Uint8Array[];
  private readonly answers: boolean;
  private index = 0;

  /**
   * @param requests - the data of one request after the other: to be sent, or to be filled by the device.
   * @param answers - whether the device writes the data.
   * @param ranges - what the requests touch of the disk.
   */
  constructor(
    type: number,
    requests: readonly Uint8Array[],
    answers: boolean,
    ranges: readonly BlockRange[] = NO_RANGES,
  ) {
    super(type, ranges);
    this.requests = requests;
    this.answers = answers;
  }

  override get deviceWrites(): boolean {
    return this.answers;
  }

  next(take: (length: number) => DeviceBuffer | undefined): NextRequest | undefined {
    const data = this.requests[this.index];
    const part = { operation: this, start: this.index, length: data.length };
    if (data.length === 0) return { sector: 0, segments: [], part: { ...part, bounce: undefined } };
    const bounce = take(data.length);
    if (bounce === undefined) return undefined;
    if (this.answers) bounce.bytes.fill(0, 0, data.length);
    else bounce.bytes.set(data);
    return { sector: 0, segments: [{ buffer: bounce, offset: 0, length: data.length }], part: { ...part, bounce } };
  }

  protected advance(): void {
    this.index++;
    if (this.index === this.requests.length) this.allSubmitted = true;
  }

  protected deliver(part: Part, length: number): void {
    if (this.answers && part.bounce !== undefined) {
      this.requests[part.start].set(part.bounce.bytes.subarray(0, length));
    }
  }
}

/**
 * The memory as data elements, when all of it is lent and can be cut anywhere at a sector's end: one piece,
 * or so many that they fit into one request. Otherwise `undefined`: then the data are copied.
 */
function lentPieces(memory: readonly Stretch[], limits: BlkLimits, total: number): readonly DataSegment[] | undefined {
  const pieces: DataSegment[] = [];
  let elements = 0;
  for (const { lent } of memory) {
    if (lent === undefined) return undefined;
    pieces.push(lent);
    elements += Math.ceil(lent.length / limits.maxSegmentBytes);
  }
  const fits = elements <= limits.maxSegments && total <= limits.maxRequestBytes;
  return pieces.length === 1 || fits ? pieces : undefined;
}

/** The stretch of `length` bytes from byte `start` of consecutive pieces. */
function cut(pieces: readonly DataSegment[], start: number, length: number): DataSegment[] {
  const result: DataSegment[] = [];
  let skip = start;
  let rest = length;
  for (const piece of pieces) {
    if (rest === 0) break;
    if (skip >= piece.length) {
      skip -= piece.length;
      continue;
    }
    const taken = Math.min(piece.length - skip, rest);
    result.push({ buffer: piece.buffer, offset: piece.offset + skip, length: taken });
    rest -= taken;
    skip = 0;
  }
  return result;
}

/** Copy between consecutive pieces from byte `start`, and one buffer. */
function copyPieces(
  pieces: readonly Stretch[],
  start: number,
  buffer: Uint8Array,
  length: number,
  intoBuffer: boolean,
): void {
  let skip = start;
  let done = 0;
  for (const { bytes: piece } of pieces) {
    if (done === length) break;
    if (skip >= piece.length) {
      skip -= piece.length;
      continue;
    }
    const taken = Math.min(piece.length - skip, length - done);
    if (intoBuffer) buffer.set(piece.subarray(skip, skip + taken), done);
    else piece.set(buffer.subarray(done, done + taken), skip);
    done += taken;
    skip = 0;
  }
}
