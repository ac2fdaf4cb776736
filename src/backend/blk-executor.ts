/** Carries out virtio-blk requests on a storage (virtio 1.3, 5.2.6). Every number of the driver is checked here. */

import {
  BLK_HEADER_SIZE,
  BLK_ID_SIZE,
  BLK_SEGMENT_SIZE,
  BLK_STATUS_SIZE,
  BlkFeature,
  BlkRequestType,
  BlkStatus,
  SECTOR_SIZE,
  VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
} from "../protocol/blk.js";
import type { DescriptorChain } from "../virtqueue/device-chain.js";
import type { DeviceMemory } from "../virtqueue/device-memory.js";
import { type BlkDevice, MAX_SEGMENT_SECTORS, MAX_SEGMENTS } from "./blk-device.js";
import { MemoryParts } from "./memory-parts.js";
import { type BackendQueueStats, type BackendStats, NO_STATUS, OTHER_TYPE } from "./stats.js";
import type { BlockStorage } from "./storage.js";

/** Returned by `execute` when the request is answered later. */
export const PENDING = -1;

const SECTOR_MASK = SECTOR_SIZE - 1;
const HIGH = 2 ** 32;

/** Where a request is answered that took its time. */
export interface CompletionSink {
  /** Where its requests are counted. */
  readonly counts: BackendQueueStats;
  /** A request is being worked on. */
  begin(): void;
  /** It is done, its status is written. */
  complete(id: number, ringCount: number, written: number): void;
}

/** What is kept of a request that is answered later. */
interface Answer {
  readonly id: number;
  readonly ringCount: number;
  readonly written: number;
  readonly writtenByFailure: number;
  readonly memory: Uint8Array;
  readonly statusAt: number;
}

type PartsStorage = BlockStorage & Required<Pick<BlockStorage, "readInto" | "writeFrom">>;

/**
 * The header may be cut into descriptors in any way, and so may the data; the status is the last byte that the device
 * may write (virtio 1.3, 2.6.4). A request that makes no sense is answered with an error and harms nobody else.
 *
 * The length reported to the driver is that of the bytes written without a gap from the start: on a failed read none,
 * although the status at the end is written.
 */
export class BlkExecutor {
  private readonly device: BlkDevice;
  private readonly memory: DeviceMemory;
  private readonly stats: BackendStats;
  /** Where the request at hand is counted. */
  private counts: BackendQueueStats;
  private readonly storage: BlockStorage;
  /** The storage again when it is asked without views; undefined otherwise. */
  private readonly direct: PartsStorage | undefined;
  /** Where the data of the request at hand are. */
  private readonly parts = new MemoryParts();
  private readonly readOnly: boolean;
  private readonly header = new Uint8Array(BLK_HEADER_SIZE);
  private readonly header32 = new Uint32Array(this.header.buffer);

  constructor(device: BlkDevice, memory: DeviceMemory, stats: BackendStats) {
    this.device = device;
    this.memory = memory;
    this.stats = stats;
    this.counts = stats.queues[0];
    this.storage = device.storage;
    this.direct = takesParts(device.storage) ? device.storage : undefined;
    this.readOnly = device.storage.readOnly === true;
  }

  /**
   * Carry out a request.
   *
   * @returns bytes written for the used entry, or {@link PENDING}: then `sink.complete` follows.
   */
  execute(chain: DescriptorChain, sink: CompletionSink): number {
    this.counts = sink.counts;
    try {
      return this.begin(chain, sink);
    } catch (error) {
      this.stats.failed("storage", error);
      return this.answer(chain, BlkStatus.IOERR);
    }
  }

  private begin(chain: DescriptorChain, sink: CompletionSink): number {
    // Without a byte for the status nothing can be answered; the chain goes back as it came.
    const { taken, answered } = this.counts;
    if (chain.writableBytes < BLK_STATUS_SIZE) {
      taken[OTHER_TYPE]++;
      answered[NO_STATUS]++;
      return 0;
    }
    if (chain.readableBytes < BLK_HEADER_SIZE) {
      taken[OTHER_TYPE]++;
      return this.answer(chain, BlkStatus.IOERR);
    }
    const header = this.header32;
    const first = chain.offset[0];
    if (chain.length[0] >= BLK_HEADER_SIZE && (first & 3) === 0) {
      const words = this.memory.words[chain.region[0]];
      const at = (first / 4) | 0;
      header[0] = words[at];
      header[2] = words[at + 2];
      header[3] = words[at + 3];
    } else {
      chain.read(this.memory, 0, this.header);
    }
    const sector = header[3] * HIGH + header[2];
    taken[header[0] < OTHER_TYPE ? header[0] : OTHER_TYPE]++;
    switch (header[0]) {
      case BlkRequestType.IN:
        return this.read(chain, sector, sink);
      case BlkRequestType.OUT:
        return this.write(chain, sector, sink);
      case BlkRequestType.FLUSH:
        this.device.flushed();
        return this.finish(chain, sink, this.storage.flush(), BLK_STATUS_SIZE);
      case BlkRequestType.GET_ID:
        return this.getId(chain);
      case BlkRequestType.DISCARD:
        return this.segments(chain, sink, BlkFeature.DISCARD);
      case BlkRequestType.WRITE_ZEROES:
        return this.segments(chain, sink, BlkFeature.WRITE_ZEROES);
      case BlkRequestType.SECURE_ERASE:
        return this.segments(chain, sink, BlkFeature.SECURE_ERASE);
      default:
        return this.answer(chain, BlkStatus.UNSUPP);
    }
  }

  private read(chain: DescriptorChain, sector: number, sink: CompletionSink): number {
    const length = chain.writableBytes - BLK_STATUS_SIZE;
    if (!this.isInside(sector, length)) return this.answer(chain, BlkStatus.IOERR);
    this.counts.bytesRead += length;
    const { parts, direct } = this;
    this.find(chain, chain.readableCount, 0, length);
    const offset = sector * SECTOR_SIZE;
    const work = direct === undefined ? readAll(this.storage, offset, parts.views()) : direct.readInto(offset, parts);
    return this.finish(chain, sink, work, length + BLK_STATUS_SIZE);
  }

  private write(chain: DescriptorChain, sector: number, sink: CompletionSink): number {
    const length = chain.readableBytes - BLK_HEADER_SIZE;
    if (this.readOnly || !this.isInside(sector, length)) return this.answer(chain, BlkStatus.IOERR);
    this.counts.bytesWritten += length;
    const { parts, direct } = this;
    this.find(chain, 0, BLK_HEADER_SIZE, length);
    const offset = sector * SECTOR_SIZE;
    const work = direct === undefined ? writeAll(this.storage, offset, parts.views()) : direct.writeFrom(offset, parts);
    return this.finish(chain, sink, this.stable(work), BLK_STATUS_SIZE);
  }

  private getId(chain: DescriptorChain): number {
    const room = Math.min(chain.writableBytes - BLK_STATUS_SIZE, BLK_ID_SIZE);
    const id = new Uint8Array(BLK_ID_SIZE);
    id.set(this.device.id);
    chain.write(this.memory, 0, id.subarray(0, room));
    this.setStatus(chain, BlkStatus.OK);
    return chain.writableBytes === room + BLK_STATUS_SIZE ? chain.writableBytes : room;
  }

  /** DISCARD, WRITE_ZEROES and SECURE_ERASE: all segments are checked before the first is touched. */
  private segments(chain: DescriptorChain, sink: CompletionSink, feature: bigint): number {
    const length = chain.readableBytes - BLK_HEADER_SIZE;
    if ((this.device.features & feature) === 0n) return this.answer(chain, BlkStatus.UNSUPP);
    if (length === 0 || length % BLK_SEGMENT_SIZE !== 0 || length > MAX_SEGMENTS * BLK_SEGMENT_SIZE) {
      return this.answer(chain, BlkStatus.IOERR);
    }
    const words = new Uint32Array(length / 4);
    chain.read(this.memory, BLK_HEADER_SIZE, new Uint8Array(words.buffer));
    const known = feature === BlkFeature.WRITE_ZEROES ? VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP : 0;
    for (let at = 0; at < words.length; at += BLK_SEGMENT_SIZE / 4) {
      if ((words[at + 3] & ~known) !== 0) return this.answer(chain, BlkStatus.UNSUPP);
      const sectors = words[at + 2];
      const sector = words[at + 1] * HIGH + words[at];
      if (sectors > MAX_SEGMENT_SECTORS || !this.isInside(sector, sectors * SECTOR_SIZE)) {
        return this.answer(chain, BlkStatus.IOERR);
      }
    }
    return this.finish(chain, sink, this.stable(eachSegment(this.storage, feature, words)), BLK_STATUS_SIZE);
  }

  /** In writethrough mode a write is finished when a flush after it is (5.2.6.2). */
  private stable(written: void | Promise<void>): void | Promise<void> {
    if (!this.device.writeThrough) return written;
    return written === undefined ? this.storage.flush() : written.then(() => this.storage.flush());
  }

  /**
   * Answer now, or when `work` settles. The chain is used for the next request meanwhile: what is needed of it is kept
   * here.
   */
  private finish(chain: DescriptorChain, sink: CompletionSink, work: void | Promise<void>, expected: number): number {
    const written = chain.writableBytes === expected ? expected : 0;
    if (work === undefined) {
      this.setStatus(chain, BlkStatus.OK);
      return written;
    }
    const last = chain.count - 1;
    sink.begin();
    void this.answerLater(work, sink, {
      id: chain.id,
      ringCount: chain.ringCount,
      written,
      writtenByFailure: chain.writableBytes === BLK_STATUS_SIZE ? BLK_STATUS_SIZE : 0,
      memory: this.memory.bytes[chain.region[last]],
      statusAt: chain.offset[last] + chain.length[last] - 1,
    });
    return PENDING;
  }

  private async answerLater(work: Promise<void>, sink: CompletionSink, answer: Answer): Promise<void> {
    const { id, ringCount, memory, statusAt } = answer;
    try {
      await work;
    } catch (error) {
      this.stats.failed("storage", error);
      memory[statusAt] = BlkStatus.IOERR;
      sink.counts.answered[BlkStatus.IOERR]++;
      sink.complete(id, ringCount, answer.writtenByFailure);
      return;
    }
    memory[statusAt] = BlkStatus.OK;
    sink.counts.answered[BlkStatus.OK]++;
    sink.complete(id, ringCount, answer.written);
  }

  /** Put `length` bytes of the elements from `first` on into `parts`, without the first `skip`. */
  private find(chain: DescriptorChain, first: number, skip: number, length: number): void {
    const { parts } = this;
    const { bytes } = this.memory;
    let i = first;
    let lead = skip;
    for (; lead > 0 && lead >= chain.length[i]; i++) lead -= chain.length[i];
    if (lead === 0 && length > 0 && length <= chain.length[i]) {
      parts.only(bytes[chain.region[i]], chain.offset[i], length);
      return;
    }
    parts.clear();
    for (let left = length; left > 0; i++) {
      const rest = chain.length[i] - lead;
      const take = rest < left ? rest : left;
      parts.add(bytes[chain.region[i]], chain.offset[i] + lead, take);
      left -= take;
      lead = 0;
    }
  }

  /** Whether the range begins and ends inside the disk, in whole sectors. No sum here can overflow a double. */
  private isInside(sector: number, length: number): boolean {
    return (length & SECTOR_MASK) === 0 && sector + length / SECTOR_SIZE <= this.device.sectors;
  }

  /** Write the status of a request that writes nothing else. */
  private answer(chain: DescriptorChain, status: number): number {
    this.setStatus(chain, status);
    return chain.writableBytes === BLK_STATUS_SIZE ? BLK_STATUS_SIZE : 0;
  }

  private setStatus(chain: DescriptorChain, status: number): void {
    this.counts.answered[status]++;
    const last = chain.count - 1;
    this.memory.bytes[chain.region[last]][chain.offset[last] + chain.length[last] - 1] = status;
  }
}

function takesParts(storage: BlockStorage): storage is PartsStorage {
  return storage.readInto !== undefined && storage.writeFrom !== undefined;
}

function readAll(storage: BlockStorage, offset: number, views: readonly Uint8Array[]): void | Promise<void> {
  let at = offset;
  return all(views, (view) => {
    const start = at;
    at += view.length;
    return storage.read(start, view);
  });
}

function writeAll(storage: BlockStorage, offset: number, views: readonly Uint8Array[]): void | Promise<void> {
  let at = offset;
  return all(views, (view) => {
    const start = at;
    at += view.length;
    return storage.write(start, view);
  });
}

/** Start a piece of work for each view. Settles when the last has: the driver's memory is in use until then. */
function all(views: readonly Uint8Array[], work: (view: Uint8Array) => void | Promise<void>): void | Promise<void> {
  const pending: Promise<void>[] = [];
  for (const view of views) {
    try {
      const promise = work(view);
      if (promise !== undefined) pending.push(promise);
    } catch (error) {
      if (pending.length === 0) throw error;
      pending.push(Promise.reject(error instanceof Error ? error : new Error(String(error))));
      break;
    }
  }
  if (pending.length === 0) return undefined;
  if (pending.length === 1) return pending[0];
  return settled(pending);
}

/** Wait for all of them, then fail as the first that failed. */
async function settled(pending: readonly Promise<void>[]): Promise<void> {
  const results = await Promise.allSettled(pending);
  for (const result of results) if (result.status === "rejected") throw result.reason;
}

/** One segment after the other; the words were checked. */
function eachSegment(storage: BlockStorage, feature: bigint, words: Uint32Array, from = 0): void | Promise<void> {
  for (let at = from; at < words.length; at += BLK_SEGMENT_SIZE / 4) {
    const offset = (words[at + 1] * HIGH + words[at]) * SECTOR_SIZE;
    const length = words[at + 2] * SECTOR_SIZE;
    const mayUnmap = (words[at + 3] & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) !== 0;
    if (length === 0) continue;
    let promise: void | Promise<void>;
    if (feature === BlkFeature.DISCARD) promise = storage.discard?.(offset, length);
    else if (feature === BlkFeature.SECURE_ERASE) promise = storage.secureErase?.(offset, length);
    else promise = storage.writeZeroes?.(offset, length, mayUnmap);
    const next = at + BLK_SEGMENT_SIZE / 4;
    if (promise !== undefined) return promise.then(() => eachSegment(storage, feature, words, next));
  }
  return undefined;
}
