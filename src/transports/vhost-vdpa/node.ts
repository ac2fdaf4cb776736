/** The seam to the kernel: a vhost-vdpa character device that is open, or what stands in for it in a test. */

import { closeSync, constants as file, fstatSync, openSync, statSync, writeSync } from "node:fs";
import { VirtioError, type VirtioErrorCode } from "../../errors.js";
import { closeFd, errno, errnoName, fileError, ioctl } from "../../sys/index.js";

/**
 * An open vhost-vdpa device. Calls that the kernel refuses throw a VirtioError with `errno` and `syscall`.
 */
export interface VhostVdpaNode {
  /** Issue a request; `argument` is the struct that its number stands for, read and written in place. */
  ioctl(request: number, argument?: Uint8Array): void;
  /** Write one IOTLB message. */
  write(message: Uint8Array): void;
  /** Close the device, which resets it and forgets all mappings. Called once. */
  close(): void;
}

/** Why a device could not be opened, and what to try; other reasons speak for themselves. */
const OPEN_FAILURES: ReadonlyMap<number, readonly [VirtioErrorCode, string]> = new Map([
  [errno.ENOENT, ["ERR_VIRTIO_CONNECT", "no such device; `vdpa dev add` makes one once vhost_vdpa is loaded"]],
  [errno.ENOTDIR, ["ERR_VIRTIO_CONNECT", "a part of the path is not a directory; check the path"]],
  [errno.ENODEV, ["ERR_VIRTIO_CONNECT", "the device behind it is gone; `vdpa dev show` lists those that are there"]],
  [errno.ENXIO, ["ERR_VIRTIO_CONNECT", "the device behind it is gone; `vdpa dev show` lists those that are there"]],
  [errno.EBUSY, ["ERR_VIRTIO_BUSY", "somebody has it open, and it serves one at a time; end the other program"]],
  [errno.EIO, ["ERR_VIRTIO_CONNECT", "the device does not answer; where a program serves it, start that again"]],
  [errno.EACCES, ["ERR_VIRTIO_PERMISSION", "read and write permission is needed; change its owner or mode"]],
]);

/**
 * Open a vhost-vdpa device.
 *
 * @throws VirtioError ERR_VIRTIO_CONNECT when there is no such device or it is something else, ERR_VIRTIO_BUSY when it
 *   is in use, ERR_VIRTIO_PERMISSION.
 */
export function openNode(path: string): VhostVdpaNode {
  try {
    // Opening alone makes some things act: a FIFO waits, a watchdog starts. Look first.
    if (!statSync(path).isCharacterDevice()) throw notVdpa(path, "it is not a character device");
    const fd = openSync(path, file.O_RDWR | file.O_NONBLOCK | file.O_NOCTTY);
    try {
      // Between the two calls the path may have become another's.
      if (!fstatSync(fd).isCharacterDevice()) throw notVdpa(path, "it is not a character device");
    } catch (error) {
      closeSync(fd);
      throw error;
    }
    return nodeOf(fd);
  } catch (error) {
    if (error instanceof VirtioError) throw error;
    const refused = fileError(error, `opening ${path}`);
    const [code, advice] = OPEN_FAILURES.get(refused.errno ?? 0) ?? [];
    if (code === undefined || refused.errno === undefined) throw refused;
    const { errno: number, syscall = "open" } = refused;
    throw new VirtioError(code, `${path}: ${errnoName(number)} from ${syscall}; ${advice}`, { errno: number, syscall });
  }
}

/** Drive a device that is open as `fd`, which is closed with it. */
export function nodeOf(fd: number): VhostVdpaNode {
  return {
    ioctl(request, argument) {
      ioctl(fd, request, argument);
    },
    write(message) {
      let written: number;
      try {
        written = writeSync(fd, message);
      } catch (error) {
        throw fileError(error, `writing to descriptor ${fd}`);
      }
      if (written === message.length) return;
      throw new VirtioError("ERR_VIRTIO_SYSCALL", `write took ${written} of the ${message.length} bytes of a message`, {
        syscall: "write",
      });
    },
    close() {
      closeFd(fd);
    },
  };
}

/** The error of a path or descriptor that leads to something else. */
export function notVdpa(what: string, why: string, details: { errno?: number; syscall?: string } = {}): VirtioError {
  return new VirtioError(
    "ERR_VIRTIO_CONNECT",
    `${what} is not a vhost-vdpa device (${why}); they are called /dev/vhost-vdpa-0 and so on`,
    details,
  );
}
