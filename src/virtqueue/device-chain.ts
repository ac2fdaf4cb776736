/** One buffer that a driver made available, as its device holds it: bounds-checked elements in private memory. */

import { VirtioError } from "../errors.js";
import type { DeviceMemory } from "./device-memory.js";

/** Largest total length of a descriptor chain (virtio 1.3, 2.7.5). */
const MAX_CHAIN_BYTES = 2 ** 32;

/**
 * The elements of one chain. `DeviceVirtqueue.pop` fills it; nothing of it is read again from the driver's
 * memory, so the driver cannot change what was checked. Made once and used for chain after chain.
 *
 * @example
 * ```ts
 * import { DescriptorChain } from "virtio-driver/virtqueue";
 * const chain = new DescriptorChain(128); // for queues of up to 128 descriptors
 * console.log(chain.count, chain.readableBytes, chain.writableBytes); // 0 0 0
 * ```
 */
export class DescriptorChain {
  /** Region index in the device's memory, by element. */
  readonly region: Uint8Array;
  /** Byte offset in that region, by element. */
  readonly offset: Float64Array;
  /** Bytes, by element; at least 1. */
  readonly length: Uint32Array;
  /** What names the chain to the driver: its head descriptor (split) or buffer id (packed). */
  id = 0;
  /** Ring descriptors it takes, the indirect one counted once. */
  ringCount = 0;
  /** Elements. The readable ones come first. */
  count = 0;
  /** Elements that the device may read. */
  readableCount = 0;
  /** Bytes of the readable elements. */
  readableBytes = 0;
  /** Bytes of the writable elements. */
  writableBytes = 0;

  constructor(queueSize: number) {
    this.region = new Uint8Array(queueSize);
    this.offset = new Float64Array(queueSize);
    this.length = new Uint32Array(queueSize);
  }

  /** Make it empty. */
  clear(): void {
    this.count = 0;
    this.readableCount = 0;
    this.readableBytes = 0;
    this.writableBytes = 0;
    this.ringCount = 0;
  }

  /**
   * Add an element at an address of the driver.
   *
   * @throws VirtioError ERR_VIRTIO_QUEUE_BROKEN when it is empty, outside the memory, readable behind a
   *   writable one, or makes the chain longer than 2^32 bytes.
   */
  add(memory: DeviceMemory, lo: number, hi: number, length: number, writable: boolean): void {
    if (length === 0) throw lyingDriver("a descriptor of length 0");
    const region = memory.find(lo, hi, length);
    if (region < 0) throw outsideMemory("a descriptor", lo, hi, length);
    const at = this.count;
    this.region[at] = region;
    this.offset[at] = memory.offset(region, lo, hi);
    this.length[at] = length;
    this.count = at + 1;
    if (writable) {
      this.writableBytes += length;
    } else {
      if (this.writableBytes > 0) throw lyingDriver("a readable descriptor behind a writable one");
      this.readableCount = at + 1;
      this.readableBytes += length;
    }
    if (this.readableBytes + this.writableBytes > MAX_CHAIN_BYTES) throw lyingDriver("a chain of more than 2^32 bytes");
  }

  /**
   * Copy what the driver wrote, from byte `position` of the readable elements on.
   *
   * @returns bytes copied: fewer than `into.length` when the readable elements end.
   */
  read(memory: DeviceMemory, position: number, into: Uint8Array): number {
    let done = 0;
    let skip = position;
    for (let i = 0; i < this.readableCount && done < into.length; i++) {
      const length = this.length[i];
      if (skip >= length) {
        skip -= length;
        continue;
      }
      const start = this.offset[i] + skip;
      const take = Math.min(length - skip, into.length - done);
      into.set(memory.bytes[this.region[i]].subarray(start, start + take), done);
      done += take;
      skip = 0;
    }
    return done;
  }

  /**
   * Copy `from` to the driver, to byte `position` of the writable elements and on.
   *
   * @returns bytes copied: fewer than `from.length` when the writable elements end.
   */
  write(memory: DeviceMemory, position: number, from: Uint8Array): number {
    let done = 0;
    let skip = position;
    for (let i = this.readableCount; i < this.count && done < from.length; i++) {
      const length = this.length[i];
      if (skip >= length) {
        skip -= length;
        continue;
      }
      const start = this.offset[i] + skip;
      const take = Math.min(length - skip, from.length - done);
      memory.bytes[this.region[i]].set(from.subarray(done, done + take), start);
      done += take;
      skip = 0;
    }
    return done;
  }
}

/** The error for a driver that wrote something impossible into its ring. */
export function lyingDriver(what: string): VirtioError {
  return new VirtioError(
    "ERR_VIRTIO_QUEUE_BROKEN",
    `the driver made available ${what}; the queue is stopped until the driver sets it up again`,
  );
}

/** The error for an address range that no region holds. */
export function outsideMemory(what: string, lo: number, hi: number, length: number): VirtioError {
  const address = BigInt(hi) * 2n ** 32n + BigInt(lo);
  return lyingDriver(`${what} of ${length} bytes at 0x${address.toString(16)}, outside the shared memory`);
}
