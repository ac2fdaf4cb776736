/** Memory shared with another process or a device, mapped as the memory of an ArrayBuffer. */

import { constants } from "node:buffer";
import { checkInteger, checkOptions, rangeError, typeError } from "../errors.js";
import { errno, systemError } from "./errno.js";
import { fileStat, HUGE_PAGE_BYTES } from "./memfd.js";
import { native } from "./native.js";

const PAGE_BYTES = 4096;

/** How {@link mapShared} maps. */
export interface MapOptions {
  /** Where in the file the mapping begins, in bytes; a multiple of the page. Default 0. */
  readonly offset?: number;
  /** The mapping's address is a multiple of this power of two. Default: 2 MiB for 2 MiB and more, else a page. */
  readonly align?: number;
  /** Whether it may be written. Writing to a mapping that may not kills the process (SIGSEGV). Default true. */
  readonly writable?: boolean;
  /**
   * Survive the loss of its memory: what the file does not have any more when it is touched is replaced, to the end of
   * the mapping, by memory of this process alone, all zero; {@link faultCounter} and {@link isLost} tell. For the whole
   * process, SIGBUS is handled from then on; a listener for that signal that is added later ends this. Default false.
   */
  readonly guarded?: boolean;
}

/**
 * Map `length` bytes of a file or device into this process (mmap with MAP_SHARED).
 *
 * The mapping lives until {@link unmapShared}, or until the ArrayBuffer is collected. It reaches to the end of
 * a regular file at most; a file that somebody can shrink (see `memfdSeals`) can still fail later, and then the
 * kernel kills the process (SIGBUS), unless the mapping is guarded.
 *
 * @throws RangeError when the range is not within the file, or longer than an ArrayBuffer can be.
 * @throws VirtioError ERR_VIRTIO_SYSCALL (errno ENOMEM: no memory or no huge pages; ENODEV: cannot be mapped),
 *   ERR_VIRTIO_PERMISSION when the descriptor is not open for this.
 */
export function mapShared(fd: number, length: number, options: MapOptions = {}): ArrayBuffer {
  checkOptions("options", options, ["offset", "align", "writable", "guarded"]);
  checkInteger("length", length, 1, constants.MAX_LENGTH);
  const huge = HUGE_PAGE_BYTES["2M"];
  const { offset = 0, align = length >= huge ? huge : PAGE_BYTES } = options;
  const { writable = true, guarded = false } = options;
  checkInteger("offset", offset, 0);
  if (offset % PAGE_BYTES !== 0) throw rangeError("offset", `a multiple of ${PAGE_BYTES}`, offset);
  checkInteger("align", align, 1, 2 ** 40);
  if (!Number.isInteger(Math.log2(align))) throw rangeError("align", "a power of two", align);
  if (typeof writable !== "boolean") throw typeError("writable", "a boolean", writable);
  if (typeof guarded !== "boolean") throw typeError("guarded", "a boolean", guarded);
  const { size, blockSize, isFile } = fileStat(fd);
  if (isFile && offset + length > size) {
    throw rangeError("length", `at most ${Math.max(0, size - offset)} (the file has ${size} bytes)`, length);
  }
  // A file on huge pages is mapped in whole ones.
  const granule = isFile && blockSize >= huge ? blockSize : PAGE_BYTES;
  const span = Math.ceil(length / granule) * granule;
  const result = native().mmap(
    ...([fd, length, span, offset, Math.max(align, granule), writable, guarded ? granule : 0] as const),
  );
  if (typeof result === "number") {
    throw systemError(result, "mmap", `mapping ${length} bytes at ${offset} of descriptor ${fd}`);
  }
  return result;
}

/**
 * Unmap what {@link mapShared} mapped. The ArrayBuffer is detached: every view of it has length 0 afterwards.
 * Nothing may still use its memory outside of JavaScript's sight, such as a file read in progress.
 *
 * @throws VirtioError ERR_VIRTIO_SYSCALL (errno EINVAL) when the buffer is not a mapping, or was unmapped already.
 */
export function unmapShared(buffer: ArrayBuffer): void {
  if (!(buffer instanceof ArrayBuffer)) throw typeError("buffer", "an ArrayBuffer of mapShared", buffer);
  const result = native().munmap(buffer);
  if (result === -errno.EINVAL) {
    throw systemError(result, "munmap", "unmapping a buffer", "it is not of mapShared, or was unmapped already");
  }
  if (result < 0) throw systemError(result, "munmap", `unmapping ${buffer.byteLength} bytes`);
}

/**
 * How many times guarded mappings of this process lost memory: one number, to be looked at again and again. Before what
 * was read from a guarded mapping is believed, it must be what it was before the reading.
 *
 * @throws VirtioError ERR_VIRTIO_SYSCALL where a runtime allows no memory of its own in an ArrayBuffer (Electron).
 */
export function faultCounter(): Uint32Array {
  const result = native().faultCounter();
  if (typeof result === "number") throw systemError(result, "faultCounter", "watching for lost memory");
  return new Uint32Array(result);
}

/** Whether a guarded mapping lost memory; false for others. */
export function isLost(buffer: ArrayBuffer): boolean {
  return native().isLost(buffer) === 1;
}

/**
 * Where a mapping lies in this process: what the kernel wants to know of memory that it shall map for a device. No
 * device and no other process ever learns it from us.
 *
 * @throws TypeError when the buffer is not an ArrayBuffer, or was unmapped.
 */
export function addressOf(buffer: ArrayBuffer): number {
  if (!(buffer instanceof ArrayBuffer) || buffer.byteLength === 0) {
    throw typeError("buffer", "an ArrayBuffer that is mapped", buffer);
  }
  const result = native().address(buffer);
  if (result < 0) throw systemError(result, "address", "asking for the address of a buffer");
  return result;
}
