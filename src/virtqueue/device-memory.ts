/** The driver's memory as a device sees it: regions by guest address, looked up without trusting the address. */

import { checkInteger, rangeError } from "../errors.js";

/** Regions a device keeps at most. */
export const MAX_DEVICE_REGIONS = 64;

/** What one typed array holds at most. */
const MAX_REGION_BYTES = 2 ** 32;
const HIGH = 2 ** 32;

/**
 * The memory that a driver shares with a device: translates the driver's addresses (IOVA or guest-physical,
 * 64 bits as two unsigned halves) into offsets of mapped memory. The lookup cannot overflow, whatever
 * address and length a descriptor holds: differences are taken as doubles, exact below 2^53 and certainly
 * outside every region above.
 *
 * @example
 * ```ts
 * import { DeviceMemory } from "virtio-driver/virtqueue";
 * const memory = new DeviceMemory();
 * memory.add(0x10000n, new ArrayBuffer(4096));
 * const index = memory.find(0x10010, 0, 16); // 0: the address halves, 16 bytes
 * console.log(index, memory.offset(index, 0x10010, 0), memory.find(0x10ff8, 0, 16)); // 0 16 -1
 * ```
 */
export class DeviceMemory {
  /** The bytes of each region, by region index. */
  readonly bytes: Uint8Array[] = [];
  /** The same bytes in 32-bit units. */
  readonly words: Uint32Array[] = [];

  private readonly baseLo = new Float64Array(MAX_DEVICE_REGIONS);
  private readonly baseHi = new Float64Array(MAX_DEVICE_REGIONS);
  private readonly size = new Float64Array(MAX_DEVICE_REGIONS);
  /** The regions found last and before that: requests have their frames in one and their data in another. */
  private last = 0;
  private before = 0;

  /**
   * Add a region: `size` bytes of `buffer` from `offset`, known to the driver as `address`.
   *
   * @throws RangeError for a region that is empty, above 4 GiB, outside the buffer or the 64-bit address space, or
   *   overlaps another, for an offset that is not a multiple of 8, or when no region is left.
   */
  add(address: bigint, buffer: ArrayBuffer, offset = 0, size = buffer.byteLength - offset): void {
    checkInteger("offset", offset, 0, buffer.byteLength);
    if (offset % 8 !== 0) throw rangeError("offset", "a multiple of 8", offset);
    checkInteger("size", size, 1, Math.min(buffer.byteLength - offset, MAX_REGION_BYTES));
    if (address < 0n || address + BigInt(size) > 1n << 64n) {
      throw rangeError("address", `${size} bytes inside the 64-bit address space`, address);
    }
    const index = this.bytes.length;
    if (index === MAX_DEVICE_REGIONS) throw rangeError("regions", `at most ${MAX_DEVICE_REGIONS}`, index + 1);
    for (let i = 0; i < index; i++) {
      const base = BigInt(this.baseHi[i]) * BigInt(HIGH) + BigInt(this.baseLo[i]);
      if (address < base + BigInt(this.size[i]) && base < address + BigInt(size)) {
        throw rangeError("address", "a region that overlaps no other", address);
      }
    }
    this.bytes.push(new Uint8Array(buffer, offset, size));
    this.words.push(new Uint32Array(buffer, offset, Math.floor(size / 4)));
    this.baseLo[index] = Number(address % BigInt(HIGH));
    this.baseHi[index] = Number(address / BigInt(HIGH));
    this.size[index] = size;
  }

  /** Forget every region over `buffer`. Region indices change: no chain may be in use. */
  remove(buffer: ArrayBuffer): void {
    let kept = 0;
    for (let i = 0; i < this.bytes.length; i++) {
      if (this.bytes[i].buffer === buffer) continue;
      this.bytes[kept] = this.bytes[i];
      this.words[kept] = this.words[i];
      this.baseLo[kept] = this.baseLo[i];
      this.baseHi[kept] = this.baseHi[i];
      this.size[kept] = this.size[i];
      kept++;
    }
    this.size.fill(0, kept);
    this.bytes.length = kept;
    this.words.length = kept;
  }

  /**
   * Index of the region that holds the whole of `length` bytes at an address, or -1.
   *
   * @param lo - lower half of the address, unsigned.
   * @param hi - upper half, unsigned.
   * @param length - bytes, at least 1.
   */
  find(lo: number, hi: number, length: number): number {
    const last = this.last;
    const at = (hi - this.baseHi[last]) * HIGH + (lo - this.baseLo[last]);
    if (at >= 0 && at + length <= this.size[last]) return last;
    const { before } = this;
    this.before = last;
    this.last = before;
    const there = (hi - this.baseHi[before]) * HIGH + (lo - this.baseLo[before]);
    if (there >= 0 && there + length <= this.size[before]) return before;
    return this.search(lo, hi, length);
  }

  /** Byte offset inside region `index`, found by {@link find}, of an address. */
  offset(index: number, lo: number, hi: number): number {
    return (hi - this.baseHi[index]) * HIGH + (lo - this.baseLo[index]);
  }

  private search(lo: number, hi: number, length: number): number {
    for (let i = 0; i < this.bytes.length; i++) {
      const at = this.offset(i, lo, hi);
      if (at >= 0 && at + length <= this.size[i]) {
        this.last = i;
        return i;
      }
    }
    return -1;
  }
}
