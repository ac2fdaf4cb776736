/** Turns the `-errno` of a system call into a VirtioError that says what to try. */

import { constants } from "node:os";
import { getSystemErrorName } from "node:util";
import { VirtioError } from "../errors.js";

/** Positive `errno` values by name, of this platform. */
export const errno = constants.errno;

/** What to try when the kernel refused, where the errno alone tells. */
const ADVICE: ReadonlyMap<number, string> = new Map([
  [errno.EACCES, "check the owner and mode of the file or device, or run as a user that may use it"],
  [errno.EBADF, "the descriptor is not open, or not open for this; it may have been closed too early"],
  [errno.EINVAL, "the kernel does not take these values"],
  [errno.EMFILE, "this process has too many open descriptors; close some or raise `ulimit -n`"],
  [errno.ENFILE, "the system has too many open files; close some or raise fs.file-max"],
  [errno.ENODEV, "the descriptor cannot do this; use a memfd, a regular file or a device that can"],
  [errno.ENOMEM, "there is not enough memory (or huge pages, or `ulimit -l`/`ulimit -v`); ask for less or free some"],
  [errno.ENOSPC, "there is no space left; free some"],
  [errno.ENOSYS, "this kernel does not have the call; use a newer one"],
  [errno.ENOTTY, "the descriptor is not a device that knows this request"],
  [errno.EOPNOTSUPP, "the file system or device does not have this operation"],
  [errno.EPERM, "it is forbidden (a seal, a missing capability, or a security policy)"],
  [errno.EPIPE, "the other side has closed the connection"],
  [errno.ECONNRESET, "the other side has closed the connection"],
]);

/** `ENOENT` for 2; `errno 9999` for what has no name. */
export function errnoName(code: number): string {
  const name = getSystemErrorName(-code);
  return name.startsWith("Unknown") ? `errno ${code}` : name;
}

/**
 * The error for a system call that returned `result` (`-errno`): ERR_VIRTIO_PERMISSION for EACCES and EPERM,
 * ERR_VIRTIO_SYSCALL for the rest.
 *
 * @param what what was attempted, with its values: `mapping 4096 bytes of descriptor 7`
 * @param advice what to try; default: what the errno suggests.
 */
export function systemError(result: number, syscall: string, what: string, advice?: string): VirtioError {
  const code = -result;
  const hint = advice ?? ADVICE.get(code);
  return new VirtioError(
    code === errno.EACCES || code === errno.EPERM ? "ERR_VIRTIO_PERMISSION" : "ERR_VIRTIO_SYSCALL",
    `${what}: ${errnoName(code)} from ${syscall}${hint === undefined ? "" : `; ${hint}`}`,
    { errno: code, syscall },
  );
}

/**
 * The error for what a function of `node:fs` threw, as {@link systemError} makes it; what is no refusal of the kernel is
 * thrown on.
 *
 * @param what what was attempted, with its values.
 */
export function fileError(error: unknown, what: string, advice?: string): VirtioError {
  if (!(error instanceof Error && "errno" in error && typeof error.errno === "number")) throw error;
  const syscall = "syscall" in error && typeof error.syscall === "string" ? error.syscall : "open";
  return systemError(error.errno, syscall, what, advice);
}
