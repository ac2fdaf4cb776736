/** Lends buffers out of the memory that a device can reach, and grows when it is all lent. */

import { checkInteger, rangeError, typeError, VirtioError } from "../errors.js";
import { type Lending, Lendings } from "./lendings.js";
import type { MemoryRegion } from "./region.js";
import { FreeRuns } from "./runs.js";

/** Buffers begin at multiples of this. */
const GRANULE_BYTES = 4096;

/** The first region asked for. Untouched memory is free of cost, and regions are few, so ask for much. */
const FIRST_GROWTH_BYTES = 64 * 2 ** 20;

/** Regions double up to here; only a single buffer that is larger gets more. */
const LARGEST_GROWTH_BYTES = 2 ** 30;

const UPPER_HALF = 2 ** 32;
const NO_BYTES = new Uint8Array(0);

/**
 * A buffer in memory that the device can reach, lent by a {@link BufferPool} until {@link DeviceBuffer.release}.
 *
 * `bytes` has length 0 from then on. A view that was kept from before still points at the memory, which may be lent
 * to somebody else by then: do not keep one. A driver lends the bytes of each request on to the device, so that two
 * requests never have the same bytes but to be read by both, and that memory which the device may still write is never
 * lent again, even if it is released.
 *
 * @example
 * ```ts
 * import { BufferPool, MemoryRegion } from "virtio-driver";
 * const region = MemoryRegion.create({ name: "example", size: 2 ** 21, iova: 2 ** 32 });
 * const pool = new BufferPool(() => Promise.reject(new Error("one region is enough")));
 * pool.addRegion(region);
 * const buffer = await pool.allocate(512);
 * console.log(buffer.iovaHi, buffer.iovaLo, buffer.bytes.length); // 1 0 512
 * buffer.lend(0, 512, true); // a request is in flight
 * buffer.release();
 * console.log(buffer.bytes.length, pool.lent); // 0 4096
 * buffer.giveBack(0, 512); // the request has ended
 * console.log(pool.lent); // 0
 * ```
 */
export class DeviceBuffer {
  readonly #pool: BufferPool;
  #bytes: Uint8Array;
  #released = false;
  /** Requests that have bytes of it. */
  #lendings = 0;
  // The bytes of a request that came when there was no other; none when `end` is 0. Those of all others are in `more`.
  #start = 0;
  #end = 0;
  #deviceWrites = false;
  #more: Lendings | undefined = undefined;
  /** Bytes, as asked for. */
  readonly length: number;
  /** Where it lies. */
  readonly region: MemoryRegion;
  /** The device's address of the first byte, lower 32 bits. No buffer of up to 4 GiB crosses a multiple of 4 GiB. */
  readonly iovaLo: number;
  /** The device's address, upper 32 bits. */
  readonly iovaHi: number;

  /** Made by the pool only. */
  constructor(pool: BufferPool, region: MemoryRegion, iova: number, length: number) {
    this.#pool = pool;
    this.region = region;
    this.length = length;
    this.iovaLo = (iova % UPPER_HALF) >>> 0;
    this.iovaHi = Math.floor(iova / UPPER_HALF);
    this.#bytes = new Uint8Array(region.buffer, iova - region.iova, length);
  }

  /** The memory, not cleared; of length 0 once released. */
  get bytes(): Uint8Array {
    return this.#bytes;
  }

  /** Whether `release` was called. A driver refuses such a buffer. */
  get released(): boolean {
    return this.#released;
  }

  /**
   * Give the buffer back to the pool: at once, or when no request has bytes of it any more.
   *
   * @throws VirtioError ERR_VIRTIO_CLOSED when it was released already.
   */
  release(): void {
    if (this.#released) throw alreadyReleased("release");
    this.#released = true;
    this.#bytes = NO_BYTES;
    if (this.#lendings === 0) takeBack(this.#pool, this);
  }

  /**
   * Lend bytes to the device for one request, until {@link giveBack} with the same range. For drivers: `BlockDevice`
   * and `VirtioBlkQueue` do it themselves.
   *
   * @param offset - first byte in the buffer.
   * @param length - bytes, at least 1.
   * @param deviceWrites - whether the device may write them, or reads them only.
   * @throws VirtioError ERR_VIRTIO_BUSY when another request has some of these bytes, unless the device only reads
   *   both; ERR_VIRTIO_CLOSED when the buffer was released. RangeError for bytes outside of it.
   */
  lend(offset: number, length: number, deviceWrites: boolean): void {
    const end = offset + length;
    // Short, to be compiled into its callers: nothing else is lent, and the range is right.
    const isRight = offset >= 0 && end > offset && end <= this.length && Number.isSafeInteger(end);
    if (isRight && this.#lendings === 0 && !this.#released) {
      this.#start = offset;
      this.#end = end;
      this.#deviceWrites = deviceWrites;
      this.#lendings = 1;
    } else this.#lendMore(offset, length, deviceWrites);
  }

  /**
   * Undo one {@link DeviceBuffer.lend}: the device has returned the request.
   *
   * @throws RangeError when that range is not lent.
   */
  giveBack(offset: number, length: number): void {
    const end = offset + length;
    if (this.#start === offset && this.#end === end) this.#end = 0;
    else this.#giveBackMore(offset, end);
    this.#lendings--;
    if (this.#lendings === 0 && this.#released) takeBack(this.#pool, this);
  }

  #giveBackMore(start: number, end: number): void {
    if (this.#more?.giveBack(start, end) !== true) throw rangeError("offset", "a range of bytes that is lent", start);
  }

  #lendMore(start: number, length: number, deviceWrites: boolean): void {
    if (this.#released) throw alreadyReleased("lend");
    checkInteger("offset", start, 0, this.length);
    checkInteger("length", length, 1, this.length - start);
    const end = start + length;
    const obstacle =
      this.#start < end && this.#end > start && (deviceWrites || this.#deviceWrites)
        ? { start: this.#start, end: this.#end, deviceWrites: this.#deviceWrites }
        : (this.#more ??= new Lendings()).lend(start, end, deviceWrites);
    if (obstacle !== undefined) throw inUse({ start, end, deviceWrites }, obstacle);
    this.#lendings++;
  }
}

/** The pool's half of a release, out of reach of others. Set by the class below. */
let takeBack: (pool: BufferPool, buffer: DeviceBuffer) => void;

/**
 * Lends {@link DeviceBuffer}s in granules of 4096 bytes, lowest address first, neighbours joined when they return.
 * When none fits it asks `grow` for one more region, at least as large as all before together, so that the regions
 * stay few. The regions are not the pool's: who made them closes them.
 *
 * @example
 * ```ts
 * import { BufferPool, IovaSpace, MemoryRegion } from "virtio-driver";
 * const space = new IovaSpace();
 * const pool = new BufferPool(async (size) => {
 *   return MemoryRegion.create({ name: "example", size, iova: space.allocate(size, 2 ** 21) });
 * });
 * const buffers = await Promise.all([pool.allocate(512), pool.allocate(8192)]);
 * console.log(pool.lent, buffers[0]?.region === buffers[1]?.region); // 12288 true
 * ```
 */
export class BufferPool {
  readonly #grow: (size: number) => Promise<MemoryRegion>;
  /** What is free of each region, as IOVAs; apart, because a buffer lies in one region even if two are adjacent. */
  readonly #runs = new Map<MemoryRegion, FreeRuns>();
  #growing: Promise<void> | undefined;
  #lent = 0;
  #closed = false;

  static {
    takeBack = (pool, buffer) => pool.#takeBack(buffer);
  }

  /** @param grow makes one more region of at least `size` bytes known to the device. */
  constructor(grow: (size: number) => Promise<MemoryRegion>) {
    if (typeof grow !== "function") throw typeError("grow", "a function", grow);
    this.#grow = grow;
  }

  /** Bytes lent, in whole granules; what is released while a request has it counts. */
  get lent(): number {
    return this.#lent;
  }

  /** Bytes left to lend without growing, in whole granules. */
  get free(): number {
    let total = 0;
    for (const runs of this.#runs.values()) total += runs.total;
    return total;
  }

  /**
   * Add a region, or the part [start, end) of one, to what can be lent. Only whole granules count.
   *
   * @throws RangeError when the part is not within the region, or overlaps memory that the pool has.
   */
  addRegion(region: MemoryRegion, start = 0, end: number = region.size): void {
    this.#checkOpen();
    checkInteger("start", start, 0, region.size);
    checkInteger("end", end, start, region.size);
    const from = region.iova + roundUp(start);
    const to = region.iova + Math.floor(end / GRANULE_BYTES) * GRANULE_BYTES;
    if (from >= to) return;
    const runs = this.#runs.get(region) ?? new FreeRuns();
    if (!runs.give(from, to)) throw rangeError("region", "memory that the pool does not have yet", region.iova);
    this.#runs.set(region, runs);
  }

  /**
   * Lend `length` bytes, growing when there is no room. What they hold is not cleared.
   *
   * @throws RangeError when `length` is not at least 1.
   * @throws VirtioError ERR_VIRTIO_CLOSED after `close`; whatever `grow` throws.
   */
  async allocate(length: number): Promise<DeviceBuffer> {
    for (;;) {
      const buffer = this.tryAllocate(length);
      if (buffer !== undefined) return buffer;
      // Whoever comes while the pool grows waits for the same region, and looks again.
      this.#growing ??= this.#growFor(roundUp(length)).finally(() => {
        this.#growing = undefined;
      });
      await this.#growing;
    }
  }

  /**
   * Lend `length` bytes if there is room now.
   *
   * @throws RangeError when `length` is not at least 1.
   * @throws VirtioError ERR_VIRTIO_CLOSED after `close`.
   */
  tryAllocate(length: number): DeviceBuffer | undefined {
    this.#checkOpen();
    const size = roundUp(checkInteger("length", length, 1));
    for (const [region, runs] of this.#runs) {
      if (region.buffer.byteLength === 0) throw closed("a region of the pool was closed");
      const iova = runs.take(size, GRANULE_BYTES);
      if (iova < 0) continue;
      this.#lent += size;
      return new DeviceBuffer(this, region, iova, length);
    }
    return undefined;
  }

  /** Lend nothing any more; what is lent can still be released. Idempotent. */
  close(): void {
    this.#closed = true;
  }

  async #growFor(size: number): Promise<void> {
    let total = 0;
    for (const region of this.#runs.keys()) total += region.size;
    const wanted = Math.max(size, Math.min(Math.max(total, FIRST_GROWTH_BYTES), LARGEST_GROWTH_BYTES));
    const region = await this.#grow(wanted);
    if (region.size < size) {
      throw new VirtioError(
        "ERR_VIRTIO_MEMORY",
        `the pool asked for a region of ${wanted} bytes and got ${region.size}, which cannot hold a buffer of ${size}; ` +
          "allocate smaller buffers",
      );
    }
    this.addRegion(region);
  }

  #takeBack(buffer: DeviceBuffer): void {
    const size = roundUp(buffer.length);
    const iova = buffer.iovaHi * UPPER_HALF + buffer.iovaLo;
    this.#runs.get(buffer.region)?.give(iova, iova + size);
    this.#lent -= size;
  }

  #checkOpen(): void {
    if (this.#closed) throw closed("the buffer pool is closed");
  }
}

function roundUp(length: number): number {
  return Math.ceil(length / GRANULE_BYTES) * GRANULE_BYTES;
}

function closed(what: string): VirtioError {
  return new VirtioError("ERR_VIRTIO_CLOSED", `${what}; open the device again`);
}

function alreadyReleased(what: string): VirtioError {
  return new VirtioError("ERR_VIRTIO_CLOSED", `${what} of a device buffer that was released; allocate another`);
}

function inUse(wanted: Lending, other: Lending): VirtioError {
  const use = ({ deviceWrites }: Lending): string => (deviceWrites ? "write" : "read");
  return new VirtioError(
    "ERR_VIRTIO_BUSY",
    `bytes ${wanted.start} to ${wanted.end - 1} of a device buffer cannot be lent for the device to ${use(wanted)}: ` +
      `a request in flight has it ${use(other)} bytes ${other.start} to ${other.end - 1}; ` +
      "await that one first, or allocate another buffer",
  );
}
