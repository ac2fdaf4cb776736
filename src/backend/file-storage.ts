/** A virtual disk in a raw image file or on a block device, with positional reads and writes off the event loop. */

import {
  close,
  closeSync,
  constants,
  fdatasync,
  fstatSync,
  openSync,
  read as readFile,
  type Stats,
  write as writeFile,
} from "node:fs";
import { constants as osConstants } from "node:os";
import { checkOptions, VirtioError } from "../errors.js";
import { SECTOR_SIZE } from "../protocol/blk.js";
import { fallocate, ioctl } from "../sys/index.js";
import type { BlockStorage } from "./storage.js";

const { EACCES, EPERM, EROFS, ENOENT, ENODEV, ENOSYS, ENOTTY, EINVAL, EOPNOTSUPP } = osConstants.errno;

/** BLKGETSIZE64 of linux/fs.h: the size of a block device in bytes, as u64. */
const BLKGETSIZE64 = 0x8008_1272;

/** Zeroes that are written at a time where the file system cannot make them itself. */
const ZERO_BYTES = 1024 * 1024;

const ADVICE: ReadonlyMap<number, string> = new Map([
  [ENOENT, "there is no such file; make one with `truncate -s 1G FILE`, or check the path"],
  [EACCES, "check its owner and mode, or serve it read-only"],
  [EPERM, "check its owner, mode and attributes, or serve it read-only"],
  [EROFS, "the file system is read-only; serve it read-only"],
]);

/**
 * A disk in a raw image file, or on a block device. Discarded ranges become holes where the file system can make them.
 *
 * Reads and writes run on the threads of libuv, so a slow one does not hold up others: four at a time, unless the
 * environment variable UV_THREADPOOL_SIZE says more, which pays for slow disks and costs for cached files.
 *
 * @example
 * ```ts
 * import { closeSync, ftruncateSync, mkdtempSync, openSync, rmSync } from "node:fs";
 * import { tmpdir } from "node:os";
 * import { join } from "node:path";
 * import { FileStorage } from "virtio-driver/backend";
 * const folder = mkdtempSync(join(tmpdir(), "example-"));
 * const fd = openSync(join(folder, "disk.img"), "w");
 * ftruncateSync(fd, 1024 * 1024);
 * closeSync(fd);
 *
 * const disk = FileStorage.open(join(folder, "disk.img"));
 * await disk.write(512, new TextEncoder().encode("hello"));
 * await disk.flush();
 * console.log(disk.capacity); // 1048576
 * await disk.close();
 * rmSync(folder, { recursive: true });
 * ```
 */
export class FileStorage implements BlockStorage {
  readonly capacity: number;
  readonly readOnly: boolean;
  readonly id = "virtio-driver file";
  /** The file. */
  readonly path: string;

  #fd: number;

  private constructor(path: string, fd: number, capacity: number, readOnly: boolean) {
    this.path = path;
    this.#fd = fd;
    this.capacity = capacity;
    this.readOnly = readOnly;
  }

  /**
   * Open an image file or a block device.
   *
   * @param options.readOnly open it for reading only. Default false.
   * @throws VirtioError ERR_VIRTIO_BACKEND when it is missing, no file or block device, or its size is 0 or no
   *   multiple of 512 bytes; ERR_VIRTIO_PERMISSION when it may not be opened.
   */
  static open(path: string, options: { readOnly?: boolean } = {}): FileStorage {
    checkOptions("FileStorage", options, ["readOnly"]);
    const { readOnly = false } = options;
    const flags = (readOnly ? constants.O_RDONLY : constants.O_RDWR) | constants.O_NONBLOCK;
    let fd: number;
    try {
      fd = openSync(path, flags);
    } catch (error) {
      throw openError(path, error);
    }
    try {
      const capacity = sizeOf(path, fd, fstatSync(fd));
      if (capacity === 0) throw refused(path, "it is empty; give it a size with `truncate -s 1G FILE`");
      if (capacity % SECTOR_SIZE !== 0) {
        const fit = Math.ceil(capacity / SECTOR_SIZE) * SECTOR_SIZE;
        throw refused(
          path,
          `its size of ${capacity} bytes is no multiple of ${SECTOR_SIZE}; pad it with \`truncate -s ${fit} FILE\``,
        );
      }
      return new FileStorage(path, fd, capacity, readOnly);
    } catch (error) {
      closeSync(fd);
      throw error;
    }
  }

  async read(offset: number, into: Uint8Array): Promise<void> {
    for (let done = 0; done < into.length; ) {
      const count = await readAt(this.#open(), into, done, offset + done);
      if (count === 0) throw refused(this.path, `it ends at ${offset + done}, before its ${this.capacity} bytes do`);
      done += count;
    }
  }

  async write(offset: number, from: Uint8Array): Promise<void> {
    for (let done = 0; done < from.length; ) {
      const count = await writeAt(this.#open(), from, done, offset + done);
      if (count === 0) throw refused(this.path, `nothing can be written at ${offset + done}`);
      done += count;
    }
  }

  flush(): Promise<void> {
    const fd = this.#open();
    return new Promise((resolve, reject) => {
      fdatasync(fd, (error) => (error === null ? resolve() : reject(error)));
    });
  }

  /** Punch a hole. Where the file system cannot, the range stays as it is, which DISCARD allows. */
  discard(offset: number, length: number): void {
    allocate(this.#open(), "punchHole", offset, length);
  }

  async writeZeroes(offset: number, length: number, mayUnmap: boolean): Promise<void> {
    if (mayUnmap && allocate(this.#open(), "punchHole", offset, length)) return;
    if (allocate(this.#open(), "zeroRange", offset, length)) return;
    const zeroes = new Uint8Array(Math.min(ZERO_BYTES, length));
    for (let done = 0; done < length; done += zeroes.length) {
      await this.write(offset + done, zeroes.subarray(0, Math.min(zeroes.length, length - done)));
    }
  }

  /** Close the file. Idempotent. */
  close(): Promise<void> {
    const fd = this.#fd;
    if (fd < 0) return Promise.resolve();
    this.#fd = -1;
    return new Promise((resolve, reject) => {
      close(fd, (error) => (error === null || error === undefined ? resolve() : reject(error)));
    });
  }

  #open(): number {
    if (this.#fd < 0) throw new VirtioError("ERR_VIRTIO_CLOSED", `${this.path} is closed; open it again`);
    return this.#fd;
  }
}

/** Whether the file system or device can do it, and for this range; any other failure is thrown. */
function allocate(fd: number, mode: "punchHole" | "zeroRange", offset: number, length: number): boolean {
  if (length === 0) return true;
  try {
    fallocate(fd, mode, offset, length);
    return true;
  } catch (error) {
    const cannot: readonly (number | undefined)[] = [EOPNOTSUPP, ENOSYS, ENODEV, ENOTTY, EINVAL];
    if (error instanceof VirtioError && cannot.includes(error.errno)) return false;
    throw error;
  }
}

function sizeOf(path: string, fd: number, stats: Stats): number {
  if (stats.isFile()) return stats.size;
  if (stats.isBlockDevice()) {
    const size = new Uint8Array(8);
    ioctl(fd, BLKGETSIZE64, size);
    return Number(new DataView(size.buffer).getBigUint64(0, true));
  }
  throw refused(path, "it is no file and no block device; name a raw disk image");
}

function readAt(fd: number, into: Uint8Array, at: number, offset: number): Promise<number> {
  return new Promise((resolve, reject) => {
    readFile(fd, into, at, into.length - at, offset, (error, count) =>
      error === null ? resolve(count) : reject(error),
    );
  });
}

function writeAt(fd: number, from: Uint8Array, at: number, offset: number): Promise<number> {
  return new Promise((resolve, reject) => {
    writeFile(fd, from, at, from.length - at, offset, (error, count) =>
      error === null ? resolve(count) : reject(error),
    );
  });
}

function openError(path: string, error: unknown): VirtioError {
  const code = error instanceof Error && "errno" in error && typeof error.errno === "number" ? -error.errno : 0;
  const advice = ADVICE.get(code) ?? (error instanceof Error ? error.message : String(error));
  const kind = code === EACCES || code === EPERM ? "ERR_VIRTIO_PERMISSION" : "ERR_VIRTIO_BACKEND";
  return new VirtioError(kind, `${path} cannot be opened: ${advice}`, { errno: code, syscall: "open", cause: error });
}

function refused(path: string, why: string): VirtioError {
  return new VirtioError("ERR_VIRTIO_BACKEND", `${path} cannot be a disk: ${why}`);
}
