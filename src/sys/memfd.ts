/** Anonymous memory files that can be shared with another process, sealed so that it cannot take them away. */

import { fstatSync } from "node:fs";
import { checkInteger, checkOptions, rangeError, typeError } from "../errors.js";
import { checkFd, closeFd } from "./descriptor.js";
import { errno, systemError } from "./errno.js";
import { native } from "./native.js";

/** Flags of memfd_create (linux/memfd.h). */
const MFD_CLOEXEC = 0x1;
const MFD_ALLOW_SEALING = 0x2;
const MFD_HUGETLB = 0x4;
const MFD_NOEXEC_SEAL = 0x8;
const MFD_HUGE_SHIFT = 26;

/** Commands and bits of fcntl for seals (linux/fcntl.h). */
const F_ADD_SEALS = 1033;
const F_GET_SEALS = 1034;

/** Bits of {@link memfdSeals}: what can never be done to the file again (linux/fcntl.h). */
export const MemfdSeal = {
  /** No more seals. */
  SEAL: 0x1,
  /** The file never becomes smaller, so that no access to a mapping can fail. */
  SHRINK: 0x2,
  /** The file never becomes larger. */
  GROW: 0x4,
} as const;

/** Sizes of huge pages by name, in bytes. */
export const HUGE_PAGE_BYTES = { "2M": 2 ** 21, "1G": 2 ** 30 } as const;

/** A size of huge pages. */
export type HugePageSize = keyof typeof HUGE_PAGE_BYTES;

/**
 * Make an anonymous memory file of `size` bytes, sealed so that neither this process nor a peer that receives the
 * descriptor can change its size: a peer cannot make accesses here fail with SIGBUS. Close-on-exec.
 *
 * @param name shown in /proc/PID/maps; at most 249 bytes.
 * @param options.growable leave it possible to make it larger by {@link growMemfd}. Default false.
 * @param options.hugePages take the memory from the system's reserve of huge pages; `size` is a multiple of theirs.
 * @returns the descriptor.
 * @throws VirtioError ERR_VIRTIO_SYSCALL when the kernel refuses.
 */
export function createMemfd(
  name: string,
  size: number,
  options: { growable?: boolean; hugePages?: HugePageSize } = {},
): number {
  if (typeof name !== "string") throw typeError("name", "a string", name);
  checkInteger("size", size, 1);
  checkOptions("options", options, ["growable", "hugePages"]);
  let flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
  if (options.hugePages !== undefined) {
    if (!Object.hasOwn(HUGE_PAGE_BYTES, options.hugePages)) {
      throw rangeError("hugePages", `"2M" or "1G"`, options.hugePages);
    }
    const page = HUGE_PAGE_BYTES[options.hugePages];
    if (size % page !== 0) throw rangeError("size", `a multiple of ${page} bytes, the huge page`, size);
    flags |= MFD_HUGETLB | (Math.log2(page) << MFD_HUGE_SHIFT);
  }
  // Systems can refuse memory files that could be executed (vm.memfd_noexec); Linux before 6.3 has no such flag.
  let fd = native().memfdCreate(name, flags | MFD_NOEXEC_SEAL);
  if (fd === -errno.EINVAL) fd = native().memfdCreate(name, flags);
  if (fd < 0) throw systemError(fd, "memfd_create", `making a memory file "${name}"`);
  let result = native().ftruncate(fd, size);
  let syscall = "ftruncate";
  if (result === 0) {
    syscall = "fcntl";
    const growth = options.growable === true ? 0 : MemfdSeal.GROW;
    result = native().fcntl(fd, F_ADD_SEALS, MemfdSeal.SHRINK | growth | MemfdSeal.SEAL);
  }
  if (result < 0) {
    closeFd(fd);
    throw systemError(result, syscall, `giving the memory file "${name}" its ${size} bytes for good`);
  }
  return fd;
}

/**
 * Make a memory file larger that was made `growable`; what is added reads as zeroes.
 *
 * @throws VirtioError ERR_VIRTIO_SYSCALL or ERR_VIRTIO_PERMISSION when the kernel refuses.
 */
export function growMemfd(fd: number, size: number): void {
  const result = native().ftruncate(checkFd("fd", fd), checkInteger("size", size, 1));
  if (result < 0) throw systemError(result, "ftruncate", `making a memory file ${size} bytes large`);
}

/**
 * The seals of a memory file, as bits of {@link MemfdSeal}; 0 for a file that cannot have any.
 *
 * @throws VirtioError ERR_VIRTIO_SYSCALL when the descriptor is not open.
 */
export function memfdSeals(fd: number): number {
  const result = native().fcntl(checkFd("fd", fd), F_GET_SEALS, 0);
  if (result === -errno.EINVAL) return 0;
  if (result < 0) throw systemError(result, "fcntl", `asking for the seals of descriptor ${fd}`);
  return result;
}

/**
 * The size of a file in bytes.
 *
 * @throws VirtioError ERR_VIRTIO_SYSCALL when the descriptor is not open.
 */
export function fileSize(fd: number): number {
  return fileStat(fd).size;
}

/** What fstat tells about a descriptor. */
export function fileStat(fd: number): { size: number; blockSize: number; isFile: boolean } {
  checkFd("fd", fd);
  try {
    const stats = fstatSync(fd);
    return { size: stats.size, blockSize: stats.blksize, isFile: stats.isFile() };
  } catch (error) {
    const code = error instanceof Error && "errno" in error && typeof error.errno === "number" ? error.errno : 0;
    throw systemError(code, "fstat", `asking for the size of descriptor ${fd}`);
  }
}
