/** A virtio-blk device without its queues: what it offers, its config space, its cache mode (virtio 1.3, 5.2). */

import { checkInteger, rangeError, typeError, VirtioError } from "../errors.js";
import { BlkFeature, encodeBlkConfig, SECTOR_SIZE } from "../protocol/blk.js";
import { VirtioFeature } from "../virtqueue/features.js";
import { type BlockStorage, checkCapacity, checkStorage } from "./storage.js";

/** Data elements that a request may have: a chain of 128 with header and status. */
const SEG_MAX = 126;
/** Sectors of one segment of DISCARD, WRITE_ZEROES or SECURE_ERASE at most: 256 MiB. */
export const MAX_SEGMENT_SECTORS = 2 ** 19;
/** Segments of one such request at most. */
export const MAX_SEGMENTS = 16;
/** Largest `blk_size`. */
const MAX_BLOCK_SIZE = 65536;
/** Bytes of `struct virtio_blk_config` with its zoned part, which is zero here. */
const CONFIG_BYTES = 96;

/** What a {@link BlkDevice} is made from. */
export interface BlkDeviceOptions {
  /** Its bytes. */
  readonly storage: BlockStorage;
  /** Request queues. */
  readonly queues: number;
  /** Whether packed virtqueues are offered. */
  readonly packed: boolean;
  /** The block size it names, in bytes. */
  readonly blockSize: number;
}

/** Features, config space and cache mode of one virtual disk, for one driver at a time. */
export class BlkDevice {
  /** Its bytes. */
  readonly storage: BlockStorage;
  /** Feature bits it offers. */
  readonly offered: bigint;
  /** Feature bits in force. */
  features = 0n;
  /** Capacity in sectors. */
  sectors: number;
  /** Whether a write must be safe before it is answered. */
  writeThrough = true;
  /** The answer to GET_ID. */
  readonly id: Uint8Array;

  /** What the front-end was told last of `writeback`, or said itself; undefined: nothing yet. */
  private toldWriteback: boolean | undefined = undefined;
  /** Whether writethrough mode is for want of knowledge, until the driver shows that it knows of the cache. */
  private isCautious = false;
  private readonly queues: number;
  private readonly blockSize: number;

  constructor(options: BlkDeviceOptions) {
    const { storage, queues, packed, blockSize } = options;
    this.storage = checkStorage(storage);
    this.queues = checkInteger("queues", queues, 1, 256);
    this.blockSize = checkInteger("blockSize", blockSize, SECTOR_SIZE, MAX_BLOCK_SIZE);
    if (!Number.isInteger(Math.log2(blockSize))) throw rangeError("blockSize", "a power of two", blockSize);
    this.checkBlocks(storage.capacity);
    if (typeof packed !== "boolean") throw typeError("packed", "a boolean", packed);
    this.sectors = storage.capacity / SECTOR_SIZE;
    this.id = new TextEncoder().encode(storage.id ?? "virtio-driver").slice(0, 20);
    const writable = storage.readOnly !== true;
    this.offered =
      VirtioFeature.VERSION_1 |
      VirtioFeature.INDIRECT_DESC |
      VirtioFeature.EVENT_IDX |
      (packed ? VirtioFeature.RING_PACKED : 0n) |
      BlkFeature.SEG_MAX |
      BlkFeature.BLK_SIZE |
      BlkFeature.FLUSH |
      BlkFeature.CONFIG_WCE |
      BlkFeature.MQ |
      (writable ? 0n : BlkFeature.RO) |
      (writable && storage.discard !== undefined ? BlkFeature.DISCARD : 0n) |
      (writable && storage.writeZeroes !== undefined ? BlkFeature.WRITE_ZEROES : 0n) |
      (writable && storage.secureErase !== undefined ? BlkFeature.SECURE_ERASE : 0n);
  }

  /** `struct virtio_blk_config`; the fields of features that are not offered are 0. */
  get config(): Uint8Array {
    const limits = { maxSectors: MAX_SEGMENT_SECTORS, maxSegments: MAX_SEGMENTS };
    const alignment = this.blockSize / SECTOR_SIZE;
    const has = (feature: bigint): boolean => (this.offered & feature) !== 0n;
    const bytes = new Uint8Array(CONFIG_BYTES);
    bytes.set(
      encodeBlkConfig({
        capacity: BigInt(this.sectors),
        segMax: SEG_MAX,
        blkSize: this.blockSize,
        writeback: this.features === 0n || !this.writeThrough || this.isCautious,
        numQueues: this.queues,
        ...(has(BlkFeature.DISCARD) && { discard: { ...limits, alignment } }),
        ...(has(BlkFeature.WRITE_ZEROES) && { writeZeroes: { ...limits, mayUnmap: true } }),
        ...(has(BlkFeature.SECURE_ERASE) && { secureErase: { ...limits, alignment } }),
      }),
    );
    return bytes;
  }

  /**
   * Give the storage another capacity, or take over the one it has by now. Nothing may be in flight.
   *
   * @throws RangeError when it is not in whole blocks, VirtioError ERR_VIRTIO_UNSUPPORTED when the storage cannot;
   *   what the storage throws. The capacity stays as it was then, unless the storage's own did not.
   */
  async resize(bytes?: number): Promise<void> {
    const { storage } = this;
    if (bytes !== undefined) this.checkBlocks(checkCapacity("bytes", bytes, SECTOR_SIZE));
    if (storage.resize === undefined) {
      throw new VirtioError("ERR_VIRTIO_UNSUPPORTED", "the storage has no method resize, so the disk keeps its size");
    }
    await storage.resize(bytes);
    this.checkBlocks(checkCapacity("storage.capacity", storage.capacity, 0));
    this.sectors = storage.capacity / SECTOR_SIZE;
  }

  private checkBlocks(capacity: number): void {
    const { blockSize } = this;
    if (capacity % blockSize !== 0) throw rangeError("capacity", `a multiple of the block size ${blockSize}`, capacity);
  }

  /** Another front-end has come: nothing is agreed with it, and it was told nothing. */
  begin(): void {
    this.toldWriteback = undefined;
    this.negotiate(0n);
  }

  /**
   * Put the features the driver accepted in force; they decide about the cache mode to begin with (5.2.6.1).
   *
   * By the specification a driver with CONFIG_WCE reads the mode then, and is told writeback. But QEMU reads the config
   * space once, before features are agreed, and goes on to tell its guest what it keeps of it: after a reset of the
   * device, and to a back-end that was started anew. A guest that chose writethrough would lose its writes there with
   * the power, for it does not flush. So whoever was not told writeback, as far as is known here, is served in
   * writethrough mode until he reads the config space, or flushes.
   */
  negotiate(features: bigint): void {
    this.features = features;
    const hasFlush = (features & BlkFeature.FLUSH) !== 0n;
    this.isCautious = hasFlush && (features & BlkFeature.CONFIG_WCE) !== 0n && this.toldWriteback !== true;
    this.writeThrough = !hasFlush || this.isCautious;
  }

  /** The driver has read `writeback` in the config space. */
  told(): void {
    this.flushed();
    this.toldWriteback = this.features === 0n || !this.writeThrough;
  }

  /** The driver has flushed: it knows that there is a cache. */
  flushed(): void {
    if (!this.isCautious) return;
    this.isCautious = false;
    this.writeThrough = false;
  }

  /** Set the cache mode, as the driver does by `writeback` in the config space. */
  setWriteback(writeback: boolean): void {
    this.isCautious = false;
    this.toldWriteback = writeback;
    this.writeThrough = !writeback;
  }
}
