/** System calls on any descriptor. */

import { checkInteger, rangeError, typeError } from "../errors.js";
import { systemError } from "./errno.js";
import { native } from "./native.js";

/** Largest descriptor number there can be. */
const MAX_FD = 0x7fff_ffff;

/** Return `fd` when it can be a descriptor. */
export function checkFd(name: string, fd: unknown): number {
  return checkInteger(name, fd, 0, MAX_FD);
}

/**
 * Close a descriptor.
 *
 * @throws VirtioError ERR_VIRTIO_SYSCALL when it is not open (EBADF).
 */
export function closeFd(fd: number): void {
  const result = native().close(checkFd("fd", fd));
  if (result < 0) throw systemError(result, "close", `closing descriptor ${fd}`);
}

/** Command of fcntl (linux/fcntl.h). */
const F_DUPFD_CLOEXEC = 1030;

/**
 * Make another descriptor of the same open file, close-on-exec.
 *
 * @returns the new descriptor; it stays open when `fd` is closed.
 * @throws VirtioError ERR_VIRTIO_SYSCALL when `fd` is not open (EBADF), or too many are (EMFILE).
 */
export function duplicateFd(fd: number): number {
  const result = native().fcntl(checkFd("fd", fd), F_DUPFD_CLOEXEC, 0);
  if (result < 0) throw systemError(result, "fcntl", `duplicating descriptor ${fd}`);
  return result;
}

/**
 * Issue a device request. A `Uint8Array` is read and written in place; a number is passed by value.
 *
 * @param request the request's number, as in the kernel's headers.
 * @returns what the request returns; 0 for most.
 * @throws RangeError when the request's number says that the kernel takes more bytes than `argument` has.
 * @throws VirtioError ERR_VIRTIO_SYSCALL or ERR_VIRTIO_PERMISSION when the kernel or device refuses.
 */
export function ioctl(fd: number, request: number, argument: number | Uint8Array = 0): number {
  checkFd("fd", fd);
  checkInteger("request", request, 0, 0xffff_ffff);
  if (argument instanceof Uint8Array) {
    // _IOC_SIZE of asm-generic/ioctl.h; 0 in old requests and in those whose struct carries its own size.
    const size = (request >>> 16) & 0x3fff;
    if (argument.length < size) {
      throw rangeError("argument", `at least ${size} bytes for request 0x${request.toString(16)}`, argument.length);
    }
  } else if (typeof argument === "number") {
    checkInteger("argument", argument, 0);
  } else {
    throw typeError("argument", "a number or a Uint8Array", argument);
  }
  const result = native().ioctl(fd, request, argument);
  if (result < 0) throw systemError(result, "ioctl", `request 0x${request.toString(16)} on descriptor ${fd}`);
  return result;
}
