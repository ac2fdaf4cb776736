/** The addresses by which a device knows our memory: a space of our own, so that it never learns our pointers. */

import { checkInteger, checkOptions, rangeError, typeError, VirtioError } from "../errors.js";
import { FreeRuns } from "./runs.js";

/** What every IOMMU maps: allocations are whole multiples of this. */
const GRANULE_BYTES = 4096;

/** Below 2 MiB and above 2^46 - 1 lie addresses that some IOMMUs and back-ends treat specially. */
const DEFAULT_RANGES: readonly IovaRange[] = [{ start: 2 ** 21, end: 2 ** 46 - 1 }];

/** Usable addresses, both ends included. */
export interface IovaRange {
  /** First usable address. */
  readonly start: number;
  /** Last usable address. */
  readonly end: number;
}

/**
 * Hands out I/O virtual addresses (IOVAs). The lowest free address that fits is taken, so the same requests give
 * the same addresses; address 0 is never handed out; an allocation up to 4 GiB never crosses a multiple of
 * 4 GiB, so that the upper half of its addresses is one constant.
 *
 * @example
 * ```ts
 * import { IovaSpace } from "virtio-driver";
 * const space = new IovaSpace({ ranges: [{ start: 0x10_0000, end: 0xffff_ffff }] });
 * const iova = space.allocate(64 * 1024, 2 ** 21);
 * console.log(iova.toString(16)); // "200000"
 * space.free(iova);
 * ```
 */
export class IovaSpace {
  readonly #runs = new FreeRuns();
  readonly #sizes = new Map<number, number>();
  #allocated = 0;

  /**
   * @param options.ranges usable addresses, as vhost-vdpa and VFIO report them; default 2 MiB to 2^46 - 1.
   * @throws RangeError when a range ends before it starts, exceeds 2^53 - 1, or overlaps another.
   */
  constructor(options: { ranges?: readonly IovaRange[] } = {}) {
    checkOptions("options", options, ["ranges"]);
    const { ranges = DEFAULT_RANGES } = options;
    const given: unknown = ranges;
    if (!Array.isArray(given)) throw typeError("ranges", "an array of { start, end }", ranges);
    for (const [index, range] of ranges.entries()) {
      const start = checkInteger(`ranges[${index}].start`, range.start, 0);
      const end = checkInteger(`ranges[${index}].end`, range.end, start);
      const usableStart = Math.max(GRANULE_BYTES, roundUp(start, GRANULE_BYTES));
      const usableEnd = Math.floor((end + 1) / GRANULE_BYTES) * GRANULE_BYTES;
      if (usableStart < usableEnd && !this.#runs.give(usableStart, usableEnd)) {
        throw rangeError("ranges", "ranges that do not overlap", `${start} to ${end}`);
      }
    }
  }

  /** Bytes handed out, in whole granules of 4096. */
  get allocated(): number {
    return this.#allocated;
  }

  /**
   * Take `size` bytes of addresses, rounded up to 4096.
   *
   * @param align the address is a multiple of this power of two; at least 4096, the default.
   * @throws RangeError when `size` or `align` cannot be.
   * @throws VirtioError ERR_VIRTIO_MEMORY when no room is left.
   */
  allocate(size: number, align: number = GRANULE_BYTES): number {
    checkInteger("size", size, 1);
    checkInteger("align", align, GRANULE_BYTES, 2 ** 52);
    if (!Number.isInteger(Math.log2(align))) throw rangeError("align", "a power of two", align);
    const taken = roundUp(size, GRANULE_BYTES);
    const iova = this.#runs.take(taken, align);
    if (iova < 0) {
      throw new VirtioError(
        "ERR_VIRTIO_MEMORY",
        `no ${size} bytes of device addresses in a row are left (${this.#allocated} taken, ${this.#runs.total} ` +
          "free); free memory that the device no longer needs, or use fewer or smaller regions",
      );
    }
    this.#sizes.set(iova, taken);
    this.#allocated += taken;
    return iova;
  }

  /**
   * Give an allocation back whole.
   *
   * @throws RangeError when `iova` is not the start of an allocation.
   */
  free(iova: number): void {
    const size = this.#sizes.get(iova);
    if (size === undefined) throw rangeError("iova", "an address that allocate returned and that is not free", iova);
    this.#sizes.delete(iova);
    this.#allocated -= size;
    this.#runs.give(iova, iova + size);
  }
}

function roundUp(value: number, multiple: number): number {
  return Math.ceil(value / multiple) * multiple;
}
