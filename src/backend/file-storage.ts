/** A virtual disk in a raw image file or on a block device, which never holds up the event loop for the disk. */

import {
  close,
  closeSync,
  constants,
  fdatasync,
  fstatSync,
  ftruncateSync,
  openSync,
  type Stats,
  statfsSync,
} from "node:fs";
import { constants as osConstants } from "node:os";
import { checkInteger, checkOptions, VirtioError } from "../errors.js";
import { SECTOR_SIZE } from "../protocol/blk.js";
import { fallocateLater, ioctl } from "../sys/index.js";
import { FileTransfer, READ, WRITE } from "./file-transfer.js";
import { MemoryParts } from "./memory-parts.js";
import type { BlockStorage } from "./storage.js";

const { EACCES, EPERM, EROFS, ENOENT, ENODEV, ENOSYS, ENOTTY, EINVAL, EOPNOTSUPP } = osConstants.errno;

/** BLKGETSIZE64 of linux/fs.h: the size of a block device in bytes, as u64. */
const BLKGETSIZE64 = 0x8008_1272;

/** What is written again and again where the file system cannot make zeroes itself. */
const ZEROES = new Uint8Array(64 * 1024);

/** File systems that live in memory (linux/magic.h): tmpfs, ramfs, hugetlbfs. */
const IN_MEMORY: ReadonlySet<number> = new Set([0x0102_1994, 0x8584_58f6, 0x9584_58f6]);

const ADVICE: ReadonlyMap<number, string> = new Map([
  [ENOENT, "there is no such file; make one with `truncate -s 1G FILE`, or check the path"],
  [EACCES, "check its owner and mode, or serve it read-only"],
  [EPERM, "check its owner, mode and attributes, or serve it read-only"],
  [EROFS, "the file system is read-only; serve it read-only"],
]);

/**
 * A disk in a raw image file, or on a block device. Discarded ranges become holes where the file system can make them.
 *
 * What the page cache holds is read at once, straight into the driver's memory, and so are writes where the file
 * system can promise not to wait. The rest, and flush, discard and write-zeroes, run on the threads of libuv, so a slow
 * request does not hold up others: four at a time, unless the environment variable UV_THREADPOOL_SIZE says more, which
 * pays for disks with deep queues.
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
  capacity: number;
  readonly readOnly: boolean;
  readonly id = "virtio-driver file";
  /** The file. */
  readonly path: string;

  #fd: number;
  /** What other threads do with the descriptor: closed under their hands, its number could mean another file. */
  readonly #pending = new Set<Promise<unknown>>();
  readonly #reads: FileTransfer;
  readonly #writes: FileTransfer;

  private constructor(path: string, fd: number, capacity: number, options: { readOnly: boolean; inMemory: boolean }) {
    this.path = path;
    this.#fd = fd;
    this.capacity = capacity;
    this.readOnly = options.readOnly;
    this.#reads = new FileTransfer(READ, path, options.inMemory);
    this.#writes = new FileTransfer(WRITE, path, options.inMemory);
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
      const stats = fstatSync(fd);
      const capacity = sizeOf(path, fd, stats);
      // A block device is not where its name is: /dev is in memory, too.
      const inMemory = stats.isFile() && IN_MEMORY.has(statfsSync(`/proc/self/fd/${fd}`).type);
      return new FileStorage(path, fd, capacity, { readOnly, inMemory });
    } catch (error) {
      closeSync(fd);
      throw error;
    }
  }

  /**
   * Give the file another size, or take the size over that somebody else has given it. What is cut off is lost; what is
   * added reads as zeroes. A block device can only be asked for its size.
   */
  resize(bytes?: number): void {
    const fd = this.#open();
    if (bytes !== undefined && bytes !== this.capacity) {
      checkInteger("bytes", bytes, SECTOR_SIZE);
      if (this.readOnly || !fstatSync(fd).isFile()) {
        const why = "is read-only or no regular file; change its size elsewhere, then take it over without a number";
        throw new VirtioError("ERR_VIRTIO_UNSUPPORTED", `${this.path} ${why}`);
      }
      ftruncateSync(fd, bytes);
    }
    this.capacity = sizeOf(this.path, fd, fstatSync(fd));
  }

  async read(offset: number, into: Uint8Array): Promise<void> {
    await this.readInto(offset, partsOf(into));
  }

  async write(offset: number, from: Uint8Array): Promise<void> {
    await this.writeFrom(offset, partsOf(from));
  }

  readInto(offset: number, into: MemoryParts): void | Promise<void> {
    const work = this.#reads.run(this.#open(), offset, into);
    return work === undefined ? undefined : this.#untilDone(work);
  }

  writeFrom(offset: number, from: MemoryParts): void | Promise<void> {
    const work = this.#writes.run(this.#open(), offset, from);
    return work === undefined ? undefined : this.#untilDone(work);
  }

  flush(): Promise<void> {
    const fd = this.#open();
    return this.#untilDone(
      new Promise<void>((resolve, reject) => {
        fdatasync(fd, (error) => (error === null ? resolve() : reject(error)));
      }),
    );
  }

  /** Punch a hole. Where the file system cannot, the range stays as it is, which DISCARD allows. */
  async discard(offset: number, length: number): Promise<void> {
    await this.#allocate("punchHole", offset, length);
  }

  async writeZeroes(offset: number, length: number, mayUnmap: boolean): Promise<void> {
    if (mayUnmap && (await this.#allocate("punchHole", offset, length))) return;
    if (await this.#allocate("zeroRange", offset, length)) return;
    const zeroes = new MemoryParts();
    for (let left = length; left > 0; left -= ZEROES.length) zeroes.add(ZEROES, 0, Math.min(ZEROES.length, left));
    await this.writeFrom(offset, zeroes);
  }

  /** Close the file when nothing is done with it any more. Idempotent. */
  async close(): Promise<void> {
    const fd = this.#fd;
    if (fd < 0) return;
    this.#fd = -1;
    await Promise.allSettled(this.#pending);
    await new Promise<void>((resolve, reject) => {
      close(fd, (error) => (error === null || error === undefined ? resolve() : reject(error)));
    });
  }

  /** Whether the file system or device can do it, and for this range; rejects with any other failure. */
  async #allocate(mode: "punchHole" | "zeroRange", offset: number, length: number): Promise<boolean> {
    const fd = this.#open();
    if (length === 0) return true;
    try {
      await this.#untilDone(fallocateLater(fd, mode, offset, length));
      return true;
    } catch (error) {
      const cannot: readonly (number | undefined)[] = [EOPNOTSUPP, ENOSYS, ENODEV, ENOTTY, EINVAL];
      if (error instanceof VirtioError && cannot.includes(error.errno)) return false;
      throw error;
    }
  }

  async #untilDone<T>(work: Promise<T>): Promise<T> {
    this.#pending.add(work);
    try {
      return await work;
    } finally {
      this.#pending.delete(work);
    }
  }

  #open(): number {
    if (this.#fd < 0) throw new VirtioError("ERR_VIRTIO_CLOSED", `${this.path} is closed; open it again`);
    return this.#fd;
  }
}

function partsOf(bytes: Uint8Array): MemoryParts {
  const parts = new MemoryParts();
  parts.only(bytes, 0, bytes.length);
  return parts;
}

function sizeOf(path: string, fd: number, stats: Stats): number {
  const capacity = bytesOf(path, fd, stats);
  if (capacity === 0) throw refused(path, "it is empty; give it a size with `truncate -s 1G FILE`");
  if (capacity % SECTOR_SIZE !== 0) {
    const fit = Math.ceil(capacity / SECTOR_SIZE) * SECTOR_SIZE;
    throw refused(
      path,
      `its size of ${capacity} bytes is no multiple of ${SECTOR_SIZE}; pad it with \`truncate -s ${fit} FILE\``,
    );
  }
  return capacity;
}

function bytesOf(path: string, fd: number, stats: Stats): number {
  if (stats.isFile()) return stats.size;
  if (stats.isBlockDevice()) {
    const size = new Uint8Array(8);
    ioctl(fd, BLKGETSIZE64, size);
    return Number(new DataView(size.buffer).getBigUint64(0, true));
  }
  throw refused(path, "it is no file and no block device; name a raw disk image");
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
