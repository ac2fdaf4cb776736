/** What a virtual disk keeps its bytes in: the interface, and memory as the simplest of it. */

import { checkInteger, checkOptions, rangeError, typeError, VirtioError } from "../errors.js";
import { SECTOR_SIZE } from "../protocol/blk.js";
import { closeFd, createMemfd, fallocate, fallocateLater, growMemfd, mapShared, unmapShared } from "../sys/index.js";
import type { MemoryParts } from "./memory-parts.js";

/**
 * The bytes of a virtual disk. Implement it and hand it to `VhostUserBackend.listen`.
 *
 * The back-end checks every request before it asks: ranges are inside the capacity and multiples of 512 bytes, and
 * nothing is written when the disk is read-only. A method may finish at once (return nothing) or later (return a
 * promise); other requests go on meanwhile, in any order. What it throws or rejects with is answered as an I/O
 * error. The memory it is given belongs to the driver: read or write it until the call is finished, then let go.
 *
 * @example
 * ```ts
 * import type { BlockStorage } from "virtio-driver/backend";
 * const zeroes: BlockStorage = {
 *   capacity: 1024 * 1024,
 *   readOnly: true,
 *   read: (_offset, into) => void into.fill(0),
 *   write: () => undefined,
 *   flush: () => undefined,
 * };
 * console.log(zeroes.capacity); // 1048576
 * ```
 */
export interface BlockStorage {
  /** Size of the disk in bytes, a multiple of 512. The back-end looks at it again after `resize`, and only then. */
  readonly capacity: number;
  /** Whether writing is refused. Default false. */
  readonly readOnly?: boolean;
  /** What the disk answers to GET_ID: ASCII, cut after 20 characters. Default: `virtio-driver`. */
  readonly id?: string;
  /** Fill `into` with the bytes from `offset` on. */
  read(offset: number, into: Uint8Array): void | Promise<void>;
  /** Keep the bytes of `from` at `offset`. */
  write(offset: number, from: Uint8Array): void | Promise<void>;
  /** Finish when everything written before is safe from a crash. */
  flush(): void | Promise<void>;
  /** Forget a range; what is read there afterwards does not matter. Without it DISCARD is not offered. */
  discard?(offset: number, length: number): void | Promise<void>;
  /** Make a range read as zeroes; `mayUnmap` allows to free its space. Without it the request is not offered. */
  writeZeroes?(offset: number, length: number, mayUnmap: boolean): void | Promise<void>;
  /** Destroy a range beyond recovery; it reads as zeroes or anything. Without it the request is not offered. */
  secureErase?(offset: number, length: number): void | Promise<void>;
  /**
   * As `read`, into all parts of the driver's memory, one after the other. A storage that has both this and
   * `writeFrom` is asked so instead: it spares views, and can transfer a request in one go. The parts are used for
   * the next request when the call has returned; one that finishes later keeps `into.rest(0)`.
   */
  readInto?(offset: number, into: MemoryParts): void | Promise<void>;
  /** As `write`, from all parts of the driver's memory; see `readInto`. */
  writeFrom?(offset: number, from: MemoryParts): void | Promise<void>;
  /**
   * Take another capacity: `bytes`, or without it the one that the medium has by now. Nothing else is asked meanwhile.
   * What is cut off is lost. Without it `VhostUserBackend.resize` is refused.
   */
  resize?(bytes?: number): void | Promise<void>;
  /** Release what the storage holds. Called once, after the last request and a flush. */
  close?(): void | Promise<void>;
}

/** A part of the memory of a disk that is mapped. */
interface Window {
  readonly buffer: ArrayBuffer;
  readonly bytes: Uint8Array;
}

/** Bytes of memory that are mapped at a time, when first used. */
const WINDOW_BYTES = 2 ** 30;
const PAGE_BYTES = 4096;
/** Bytes that are zeroed at once at most, which takes up to 0.2 ms. Another thread zeroes larger ranges. */
const MAX_ZERO_AT_ONCE = 2 ** 20;

/** The largest size of {@link RamStorage}: that of the largest memory file. */
const MAX_RAM_BYTES = 2 ** 46;

/**
 * A disk in memory. Only what was written takes memory: `ram:64G` is possible, and discarded ranges are given back.
 *
 * @throws RangeError when the size is not a multiple of 512 bytes, or 0.
 * @example
 * ```ts
 * import { RamStorage } from "virtio-driver/backend";
 * const disk = new RamStorage(64 * 1024 * 1024);
 * disk.write(4096, new TextEncoder().encode("hello"));
 * const bytes = new Uint8Array(5);
 * disk.read(4096, bytes);
 * console.log(new TextDecoder().decode(bytes)); // hello
 * disk.close();
 * ```
 */
export class RamStorage implements BlockStorage {
  capacity: number;
  readonly id: string;

  readonly #windows: (Window | undefined)[];
  #fd: number;
  /** The memory of the last write and its buffer: asking a view for its buffer is slow. */
  #source: Uint8Array = new Uint8Array(0);
  #sourceBuffer: ArrayBufferLike = this.#source.buffer;

  constructor(size: number, options: { id?: string } = {}) {
    checkOptions("RamStorage", options, ["id"]);
    this.capacity = checkCapacity("size", size, SECTOR_SIZE, MAX_RAM_BYTES);
    this.id = options.id ?? "virtio-driver ram";
    this.#fd = createMemfd("virtio-ram", Math.ceil(size / PAGE_BYTES) * PAGE_BYTES, { growable: true });
    this.#windows = Array.from({ length: Math.ceil(size / WINDOW_BYTES) }, () => undefined);
  }

  /** Grow by zeroes, or give the memory of what is cut off back: it reads as zeroes when the disk grows again. */
  async resize(bytes = this.capacity): Promise<void> {
    checkCapacity("bytes", bytes, SECTOR_SIZE, MAX_RAM_BYTES);
    if (this.#fd < 0) throw new VirtioError("ERR_VIRTIO_CLOSED", "the memory disk is closed; make a new one");
    const old = this.capacity;
    if (bytes > old) growMemfd(this.#fd, Math.ceil(bytes / PAGE_BYTES) * PAGE_BYTES);
    else if (bytes < old) await fallocateLater(this.#fd, "punchHole", bytes, old - bytes);
    this.capacity = bytes;
    // The last window may be too short now, and others are not needed any more.
    const from = Math.floor(Math.min(old, bytes) / WINDOW_BYTES);
    for (const window of this.#windows.splice(from)) if (window !== undefined) unmapShared(window.buffer);
    this.#windows.length = Math.ceil(bytes / WINDOW_BYTES);
  }

  read(offset: number, into: Uint8Array): void {
    this.#copyOut(offset, into, 0, into.length);
  }

  write(offset: number, from: Uint8Array): void {
    this.#copyIn(offset, from, 0, from.length);
  }

  readInto(offset: number, into: MemoryParts): void {
    const { memory, places } = into;
    for (let i = 0, at = offset; i < into.count; i++) {
      const length = places[2 * i + 1];
      this.#copyOut(at, memory[i], places[2 * i], length);
      at += length;
    }
  }

  writeFrom(offset: number, from: MemoryParts): void {
    const { memory, places } = from;
    for (let i = 0, at = offset; i < from.count; i++) {
      const length = places[2 * i + 1];
      this.#copyIn(at, memory[i], places[2 * i], length);
      at += length;
    }
  }

  #copyOut(offset: number, memory: Uint8Array, at: number, length: number): void {
    for (let done = 0; done < length; ) {
      const index = Math.floor((offset + done) / WINDOW_BYTES);
      const window = this.#windows[index] ?? this.#map(index);
      const start = offset + done - index * WINDOW_BYTES;
      const take = Math.min(length - done, WINDOW_BYTES - start);
      memory.set(new Uint8Array(window.buffer, start | 0, take | 0), at + done);
      done += take;
    }
  }

  #copyIn(offset: number, memory: Uint8Array, at: number, length: number): void {
    if (memory !== this.#source) {
      this.#source = memory;
      this.#sourceBuffer = memory.buffer;
    }
    const from = memory.byteOffset + at;
    for (let done = 0; done < length; ) {
      const index = Math.floor((offset + done) / WINDOW_BYTES);
      const window = this.#windows[index] ?? this.#map(index);
      const start = offset + done - index * WINDOW_BYTES;
      const take = Math.min(length - done, WINDOW_BYTES - start);
      window.bytes.set(new Uint8Array(this.#sourceBuffer, from + done, take | 0), start | 0);
      done += take;
    }
  }

  /** Nothing outlives the process: there is nothing to make safe. */
  flush(): void {
    // Memory has no cache in front of it.
  }

  discard(offset: number, length: number): void | Promise<void> {
    return this.#zero(offset, length);
  }

  writeZeroes(offset: number, length: number): void | Promise<void> {
    return this.#zero(offset, length);
  }

  /** The pages go back to the kernel, which clears them before anyone sees them. */
  secureErase(offset: number, length: number): void | Promise<void> {
    return this.#zero(offset, length);
  }

  /** Give all memory back. Idempotent. */
  close(): void {
    if (this.#fd < 0) return;
    closeFd(this.#fd);
    this.#fd = -1;
    for (const window of this.#windows) if (window !== undefined) unmapShared(window.buffer);
    this.#windows.length = 0;
    this.#source = new Uint8Array(0);
    this.#sourceBuffer = this.#source.buffer;
  }

  #map(index: number): Window {
    const start = index * WINDOW_BYTES;
    if (this.#fd < 0) throw new VirtioError("ERR_VIRTIO_CLOSED", "the memory disk is closed; make a new one");
    if (start >= this.capacity) throw rangeError("offset", `inside the ${this.capacity} bytes of the disk`, start);
    const length = Math.min(WINDOW_BYTES, Math.ceil((this.capacity - start) / PAGE_BYTES) * PAGE_BYTES);
    const buffer = mapShared(this.#fd, length, { offset: start });
    const window = { buffer, bytes: new Uint8Array(buffer) };
    this.#windows[index] = window;
    return window;
  }

  /** The kernel clears partial pages at both ends and frees the whole ones between: many take their time. */
  #zero(offset: number, length: number): void | Promise<void> {
    if (length === 0) return undefined;
    if (this.#fd < 0) throw new VirtioError("ERR_VIRTIO_CLOSED", "the memory disk is closed; make a new one");
    if (length > MAX_ZERO_AT_ONCE) return fallocateLater(this.#fd, "punchHole", offset, length);
    return fallocate(this.#fd, "punchHole", offset, length);
  }
}

/** Return `size` when it is a possible size of a disk in bytes. */
export function checkCapacity(name: string, size: number, min: number, max = Number.MAX_SAFE_INTEGER): number {
  checkInteger(name, size, min, max);
  if (size % SECTOR_SIZE !== 0) throw rangeError(name, `a multiple of ${SECTOR_SIZE} bytes`, size);
  return size;
}

/**
 * Return `storage` when it has what {@link BlockStorage} demands.
 *
 * @throws TypeError when a method is missing, RangeError when the capacity cannot be.
 */
export function checkStorage(storage: BlockStorage): BlockStorage {
  if (typeof storage !== "object" || storage === null) throw typeError("storage", "an object", storage);
  checkCapacity("storage.capacity", storage.capacity, 0);
  for (const method of ["read", "write", "flush"] as const) {
    if (typeof storage[method] !== "function") throw typeError(`storage.${method}`, "a function", storage[method]);
  }
  return storage;
}
