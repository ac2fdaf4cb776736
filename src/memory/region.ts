/** One region of memory that this process and the device share. */

import { checkInteger, checkOptions, rangeError } from "../errors.js";
import { closeFd, createMemfd, HUGE_PAGE_BYTES, type HugePageSize, mapShared, unmapShared } from "../sys/index.js";

/** Size and address of a region are multiples of this: some back-ends map huge pages only. */
export const REGION_ALIGN = HUGE_PAGE_BYTES["2M"];

const NO_FD = -1;

/** What a {@link MemoryRegion} is made of. */
export interface MemoryRegionOptions {
  /** Shown in /proc/PID/maps of both sides. */
  readonly name: string;
  /** Bytes; rounded up to 2 MiB, or to the huge page. */
  readonly size: number;
  /** The device's address of the first byte: a multiple of 2 MiB. */
  readonly iova: number;
  /** Take the memory from the system's reserve of huge pages. */
  readonly hugePages?: HugePageSize;
}

/**
 * A sealed memory file, mapped here at a multiple of 2 MiB and known to the device by an IOVA. The seals keep the peer
 * from resizing it, so no access here can fail. Unused parts cost no memory.
 *
 * @example
 * ```ts
 * import { MemoryRegion } from "virtio-driver";
 * const region = MemoryRegion.create({ name: "example", size: 3_000_000, iova: 2 ** 21 });
 * console.log(region.size); // 4194304
 * new Uint8Array(region.buffer)[0] = 1;
 * region.close();
 * console.log(region.buffer.byteLength); // 0
 * ```
 */
export class MemoryRegion {
  #fd: number;
  readonly #buffer: ArrayBuffer;
  /** Bytes. */
  readonly size: number;
  /** The device's address of the first byte. */
  readonly iova: number;

  private constructor(fd: number, buffer: ArrayBuffer, iova: number) {
    this.#fd = fd;
    this.#buffer = buffer;
    this.size = buffer.byteLength;
    this.iova = iova;
  }

  /**
   * Make a region.
   *
   * @throws RangeError when the size or the address cannot be.
   * @throws VirtioError ERR_VIRTIO_SYSCALL when the kernel refuses; errno ENOMEM: no memory or no huge pages.
   */
  static create(options: MemoryRegionOptions): MemoryRegion {
    checkOptions("options", options, ["name", "size", "iova", "hugePages"]);
    const { name, iova, hugePages } = options;
    const page = hugePages === undefined ? REGION_ALIGN : HUGE_PAGE_BYTES[hugePages];
    const size = Math.ceil(checkInteger("size", options.size, 1) / page) * page;
    checkInteger("iova", iova, REGION_ALIGN, Number.MAX_SAFE_INTEGER - size + 1);
    if (iova % REGION_ALIGN !== 0) throw rangeError("iova", `a multiple of ${REGION_ALIGN}`, iova);
    const fd = createMemfd(name, size, hugePages === undefined ? {} : { hugePages });
    try {
      return new MemoryRegion(fd, mapShared(fd, size), iova);
    } catch (error) {
      closeFd(fd);
      throw error;
    }
  }

  /**
   * Map a region that another thread of this process has made. The device knows it by the same address; what one
   * thread writes, the other sees.
   *
   * @param region.fd the memory file. It stays the other thread's: needed until this returns, never closed here.
   * @throws VirtioError ERR_VIRTIO_SYSCALL when it cannot be mapped; RangeError for a size above the file's.
   */
  static attach({
    fd,
    size,
    iova,
  }: {
    readonly fd: number;
    readonly size: number;
    readonly iova: number;
  }): MemoryRegion {
    return new MemoryRegion(NO_FD, mapShared(fd, size), iova);
  }

  /** The memory file, to be handed to the device; -1 when it is another thread's, and after `close`. */
  get fd(): number {
    return this.#fd;
  }

  /** The memory as this process sees it; detached (length 0) after `close`. */
  get buffer(): ArrayBuffer {
    return this.#buffer;
  }

  /** Unmap and close. The device must have been told before. Idempotent. */
  close(): void {
    if (this.#buffer.byteLength === 0) return;
    const fd = this.#fd;
    this.#fd = NO_FD;
    unmapShared(this.#buffer);
    if (fd !== NO_FD) closeFd(fd);
  }
}
