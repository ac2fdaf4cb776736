/** Reads, writes and ranges of files, at once or on a thread of libuv's pool. */

import { checkInteger, rangeError } from "../errors.js";
import { checkFd } from "./descriptor.js";
import { systemError } from "./errno.js";
import { type NativeTransfer, native } from "./native.js";

/** Flag of {@link readParts} and {@link writeParts}: do only what is possible without waiting (linux/fs.h). */
export const RWF_NOWAIT = 8;

/** Parts that one call takes at most (UIO_MAXIOV of the kernel). */
export const MAX_PARTS = 1024;

/** FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE; FALLOC_FL_KEEP_SIZE | FALLOC_FL_ZERO_RANGE; plain (linux/falloc.h). */
const FALLOCATE_MODES = { punchHole: 0x01 | 0x02, zeroRange: 0x01 | 0x10, allocate: 0 } as const;

/** What {@link fallocate} can do to a range. */
export type FallocateMode = keyof typeof FALLOCATE_MODES;

/**
 * Read a file into parts of `memory`, in this thread (preadv2). Arguments that cannot be are answered by the kernel.
 *
 * @param places pairs of offset and length in `memory`, in bytes.
 * @param count pairs to use, at most {@link MAX_PARTS}.
 * @param position first byte in the file.
 * @param flags 0, or {@link RWF_NOWAIT}: -EAGAIN instead of waiting, and fewer bytes when only some are in memory.
 * @returns bytes read, which may be fewer than asked for; -errno when the kernel refused.
 */
export function readParts(
  fd: number,
  memory: Uint8Array,
  places: Float64Array,
  count: number,
  position: number,
  flags: number,
): number {
  return native().preadv(fd, memory, places, count, position, flags);
}

/** Write parts of `memory` to a file, in this thread (pwritev2); as {@link readParts}. */
export function writeParts(
  fd: number,
  memory: Uint8Array,
  places: Float64Array,
  count: number,
  position: number,
  flags: number,
): number {
  return native().pwritev(fd, memory, places, count, position, flags);
}

/**
 * As {@link readParts}, on a thread of libuv's pool. `places` is copied at once; the memory is in use until the end,
 * and must stay mapped.
 *
 * @returns bytes read, or -errno.
 */
export function readPartsLater(
  fd: number,
  memory: Uint8Array,
  places: Float64Array,
  count: number,
  position: number,
): Promise<number> {
  return transferLater(native().preadv, fd, memory, places, count, position);
}

/** As {@link writeParts}, on a thread of libuv's pool; see {@link readPartsLater}. */
export function writePartsLater(
  fd: number,
  memory: Uint8Array,
  places: Float64Array,
  count: number,
  position: number,
): Promise<number> {
  return transferLater(native().pwritev, fd, memory, places, count, position);
}

function transferLater(
  call: NativeTransfer,
  fd: number,
  memory: Uint8Array,
  places: Float64Array,
  count: number,
  position: number,
): Promise<number> {
  return new Promise((resolve) => {
    const refused = call(fd, memory, places, count, position, 0, resolve);
    if (refused < 0) resolve(refused);
  });
}

/**
 * Change how a range of a file is stored: give its blocks back and read zeroes (`punchHole`), read zeroes and
 * keep the blocks (`zeroRange`), or make sure that there are blocks (`allocate`, which grows the file).
 *
 * @throws VirtioError ERR_VIRTIO_SYSCALL; errno EOPNOTSUPP when the file system cannot.
 */
export function fallocate(fd: number, mode: FallocateMode, offset: number, length: number): void {
  checkRange(fd, mode, offset, length);
  throwIfRefused(native().fallocate(fd, FALLOCATE_MODES[mode], offset, length), fd, mode, offset, length);
}

/** As {@link fallocate}, on a thread of libuv's pool; rejects with what that throws. */
export async function fallocateLater(fd: number, mode: FallocateMode, offset: number, length: number): Promise<void> {
  checkRange(fd, mode, offset, length);
  const result = await new Promise<number>((resolve) => {
    const refused = native().fallocate(fd, FALLOCATE_MODES[mode], offset, length, resolve);
    if (refused < 0) resolve(refused);
  });
  throwIfRefused(result, fd, mode, offset, length);
}

function checkRange(fd: number, mode: FallocateMode, offset: number, length: number): void {
  checkFd("fd", fd);
  if (!Object.hasOwn(FALLOCATE_MODES, mode)) throw rangeError("mode", "punchHole, zeroRange or allocate", mode);
  checkInteger("offset", offset, 0);
  checkInteger("length", length, 1);
}

function throwIfRefused(result: number, fd: number, mode: FallocateMode, offset: number, length: number): void {
  if (result >= 0) return;
  throw systemError(result, "fallocate", `${mode} of ${length} bytes at ${offset} of descriptor ${fd}`);
}
