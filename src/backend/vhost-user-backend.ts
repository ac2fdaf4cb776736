/** A virtual disk that vhost-user front-ends connect to: one client after another. */

import { rmSync, statSync, unlinkSync } from "node:fs";
import { checkOptions, typeError, VirtioError } from "../errors.js";
import { SECTOR_SIZE } from "../protocol/blk.js";
import { acceptUnix, closeFd, FdWatcher, listenUnix } from "../sys/index.js";
import { BlkDevice } from "./blk-device.js";
import { Session, type SharedMemory } from "./session.js";
import { BackendStats } from "./stats.js";
import { type BlockStorage, RamStorage } from "./storage.js";

/** What a {@link VhostUserBackend} is made from. */
export interface VhostUserBackendOptions {
  /** Where to listen: the path of a Unix socket. A stale socket there is replaced. */
  readonly path: string;
  /** The bytes of the disk. The back-end closes it when it is closed itself. */
  readonly storage: BlockStorage;
  /** Request queues, 1 to 256. Default 1. */
  readonly queues?: number;
  /** Whether to offer packed virtqueues. Default true. */
  readonly packed?: boolean;
  /** Block size that the disk names, in bytes: a power of two from 512 to 65536. Default 512. */
  readonly blockSize?: number;
  /**
   * Refuse a front-end whose memory could be shrunk. Memory of virtual machines often cannot be sealed. Without it, one
   * that takes its memory away ends its own connection and harms nobody else; see the chapter on it in the guide.
   * Default false.
   */
  readonly sealedMemory?: boolean;
  /**
   * Whether to offer to remember requests in flight beyond the back-end's death (INFLIGHT_SHMFD). It costs some tens of
   * nanoseconds a request. Default: true, unless `storage` is a `RamStorage`, whose bytes do not outlive the process.
   */
  readonly inflight?: boolean;
  /** Told of storage failures, bad messages and broken queues; each harms one front-end, never the back-end. */
  readonly onError?: (error: unknown) => void;
}

/** How long accepting pauses when it failed, for example for want of descriptors. */
const ACCEPT_RETRY_MS = 100;

/**
 * The device side of vhost-user with a virtio-blk disk: split and packed virtqueues, indirect descriptors, EVENT_IDX,
 * several queues, flush, discard, write-zeroes, secure erase, cache mode. It keeps the process alive until `close`.
 *
 * Everything the front-end sends and shares is checked. Clients are served one after another; those that wait are
 * connected and hear nothing until it is their turn.
 *
 * @example
 * ```ts
 * import { mkdtempSync, rmSync } from "node:fs";
 * import { tmpdir } from "node:os";
 * import { join } from "node:path";
 * import { RamStorage, VhostUserBackend } from "virtio-driver/backend";
 *
 * const folder = mkdtempSync(join(tmpdir(), "example-"));
 * const backend = VhostUserBackend.listen({
 *   path: join(folder, "disk.sock"),
 *   storage: new RamStorage(64 * 1024 * 1024),
 *   queues: 2,
 * });
 * // openBlock(`vhost-user:${backend.path}`) reaches it, and so does QEMU's vhost-user-blk-pci.
 * await backend.close();
 * rmSync(folder, { recursive: true });
 * ```
 */
export class VhostUserBackend {
  /** Where it listens. */
  readonly path: string;
  /** What it has done so far. */
  readonly stats: BackendStats;

  readonly #device: BlkDevice;
  readonly #queues: number;
  readonly #sealedMemory: boolean;
  readonly #inflight: boolean;
  readonly #fd: number;
  readonly #inode: number;
  #watcher: FdWatcher | undefined;
  #retry: NodeJS.Timeout | undefined;
  #session: Session | undefined;
  #closed: Promise<void> | undefined;
  /** Changes of the size, one after the other. */
  #resized: Promise<void> = Promise.resolve();

  private constructor(options: VhostUserBackendOptions) {
    checkOptions("VhostUserBackend", options, [
      ...["path", "storage", "queues", "packed", "blockSize", "sealedMemory", "inflight", "onError"],
    ]);
    const { path, storage, queues = 1, packed = true, blockSize = 512, sealedMemory = false } = options;
    const { inflight = !(storage instanceof RamStorage), onError = () => undefined } = options;
    if (typeof sealedMemory !== "boolean") throw typeError("sealedMemory", "a boolean", sealedMemory);
    if (typeof inflight !== "boolean") throw typeError("inflight", "a boolean", inflight);
    if (typeof onError !== "function") throw typeError("onError", "a function", onError);
    this.#device = new BlkDevice({ storage, queues, packed, blockSize });
    this.#queues = queues;
    this.#sealedMemory = sealedMemory;
    this.#inflight = inflight;
    this.stats = new BackendStats(queues, onError);
    this.path = path;
    this.#fd = listenUnix(path);
    try {
      this.#inode = statSync(path).ino;
      this.#watch();
    } catch (error) {
      closeFd(this.#fd);
      rmSync(path, { force: true });
      throw error;
    }
  }

  /**
   * Listen at `path` and serve who connects.
   *
   * @throws RangeError or TypeError for wrong options; VirtioError ERR_VIRTIO_SYSCALL when somebody listens there
   *   already, ERR_VIRTIO_PERMISSION when the socket may not be made.
   */
  static listen(options: VhostUserBackendOptions): VhostUserBackend {
    return new VhostUserBackend(options);
  }

  /** Bytes of the disk, as the driver is told. */
  get capacity(): number {
    return this.#device.sectors * SECTOR_SIZE;
  }

  /** The memory that the client of the moment shares; undefined while there is none. */
  get clientMemory(): SharedMemory | undefined {
    return this.#session?.memory;
  }

  /**
   * Finish the requests in flight, hang up, flush and close the storage, remove the socket. Further calls wait for the
   * first.
   *
   * @throws what the storage throws when it is flushed or closed; everything else is released even then.
   */
  close(): Promise<void> {
    this.#closed ??= this.#close();
    return this.#closed;
  }

  /**
   * Make the disk larger or smaller while it is in use: to `bytes`, or without a number to the size that its storage has
   * by now (a file that was enlarged, a block device). Requests in flight are finished first. A driver that listens is
   * told (VHOST_USER_BACKEND_CONFIG_CHANGE_MSG). Requests beyond the new end fail, what is cut off is lost.
   *
   * @throws RangeError when it is no multiple of 512 bytes and of the block size; VirtioError ERR_VIRTIO_UNSUPPORTED
   *   when the storage cannot change its size, ERR_VIRTIO_CLOSED when the back-end is closed; what the storage throws.
   */
  resize(bytes?: number): Promise<void> {
    const turn = this.#resized.then(() => this.#resize(bytes));
    this.#resized = turn.catch(() => undefined);
    return turn;
  }

  async #resize(bytes: number | undefined): Promise<void> {
    if (this.#closed !== undefined) throw new VirtioError("ERR_VIRTIO_CLOSED", "the back-end is closed; start another");
    const change = (): Promise<void> => this.#device.resize(bytes);
    await (this.#session === undefined ? change() : this.#session.resize(change));
  }

  async #close(): Promise<void> {
    await this.#resized;
    this.#unwatch();
    closeFd(this.#fd);
    // Somebody may have replaced the socket by his own.
    if (statSync(this.path, { throwIfNoEntry: false })?.ino === this.#inode) unlinkSync(this.path);
    await this.#session?.close();
    const { storage } = this.#device;
    try {
      if (storage.readOnly !== true) await storage.flush();
    } finally {
      await storage.close?.();
    }
  }

  /** Accept the next client. */
  #watch(): void {
    this.#watcher = new FdWatcher(this.#fd, { drain: false }, () => this.#accept());
  }

  #unwatch(): void {
    this.#watcher?.close();
    this.#watcher = undefined;
    clearTimeout(this.#retry);
  }

  #accept(): void {
    let fd: number | undefined;
    try {
      fd = acceptUnix(this.#fd);
      if (fd === undefined) return;
      this.#serve(fd);
      this.#unwatch();
    } catch (error) {
      this.stats.failed("connection", error);
      if (fd !== undefined) closeFd(fd);
      this.#unwatch();
      this.#retry = setTimeout(() => this.#watch(), ACCEPT_RETRY_MS);
    }
  }

  #serve(fd: number): void {
    const session = new Session({
      ...{ fd, device: this.#device, queues: this.#queues, stats: this.stats },
      ...{ sealedMemory: this.#sealedMemory, inflight: this.#inflight },
    });
    this.stats.connections++;
    this.#session = session;
    void this.#served(session);
  }

  async #served(session: Session): Promise<void> {
    await session.closed;
    this.#session = undefined;
    if (this.#closed === undefined) this.#watch();
  }
}
