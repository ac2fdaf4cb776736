/** The calls of a block device that send requests: checked, cut to size, bounded in time, watched. */

import { requestsWatched, watchRequest } from "../../diagnostics.js";
import { typeError, VirtioError } from "../../errors.js";
import { DeviceBuffer, type MemoryRegion } from "../../memory/index.js";
import { BlkFeature, BlkRequestType, SECTOR_SIZE } from "../../protocol/blk.js";
import { checkMemory, checkPart, checkRange, type Disk } from "./checks.js";
import { bounded, lateError } from "./deadline.js";
import { ControlOperation, type Memory, type Operation, stretchOf, TransferOperation } from "./operation.js";
import { checkBounds, checkCallOptions, checkTransferOptions, rangeList } from "./options.js";
import type { BlockRange, CallOptions, TransferOptions, VectorOptions } from "./options.js";
import type { VirtioBlkQueue } from "./queue.js";
import { discardRequests, type SegmentLimits } from "./ranges.js";
import type { ReadResult, Scheduler, WriteResult } from "./scheduler.js";

const { IN, OUT } = BlkRequestType;

/** What calls are made over. */
export interface CallParts {
  readonly scheduler: Scheduler;
  readonly queues: readonly VirtioBlkQueue[];
  /** Memory whose buffers need not be copied. */
  readonly regions: ReadonlySet<MemoryRegion>;
  /** Accepted features. */
  readonly features: bigint;
}

/** What a call is about, for messages. */
interface Subject {
  readonly operation: string;
  readonly position: number | undefined;
  readonly length: number;
}

/** What requests are made of, and whether any more are taken. */
export class BlockCalls implements Disk {
  readonly address: string;
  readonly blockSize: number;
  readonly readOnly: boolean;
  readonly features: bigint;
  /** Set anew when the disk changes its size. */
  capacity: number;
  /** Whether the device is being closed: then new calls are refused. */
  isClosing = false;
  private readonly scheduler: Scheduler;
  private readonly queues: readonly VirtioBlkQueue[];
  private readonly regions: ReadonlySet<MemoryRegion>;

  constructor(disk: Disk, { scheduler, queues, regions, features }: CallParts) {
    this.address = disk.address;
    this.blockSize = disk.blockSize;
    this.readOnly = disk.readOnly;
    this.capacity = disk.capacity;
    this.features = features;
    this.scheduler = scheduler;
    this.queues = queues;
    this.regions = regions;
  }

  /** Why no more calls are taken, when none are. */
  get ended(): VirtioError | undefined {
    if (this.scheduler.failure !== undefined) return this.scheduler.failure;
    if (!this.isClosing) return undefined;
    return new VirtioError("ERR_VIRTIO_CLOSED", `${this.address} is closed; open it again`);
  }

  throwIfEnded(): void {
    const ended = this.ended;
    if (ended !== undefined) throw ended;
  }

  has(feature: bigint): boolean {
    return (this.features & feature) !== 0n;
  }

  /** @throws VirtioError ERR_VIRTIO_UNSUPPORTED when `feature` was not negotiated; what ended the device. */
  requireFeature(what: string, feature: bigint): void {
    this.throwIfEnded();
    if (this.has(feature)) return;
    throw new VirtioError("ERR_VIRTIO_UNSUPPORTED", `${this.address} does not offer ${what}; see info.features`);
  }

  /** `read` and `write` of one buffer. */
  transfer(type: number, buffer: Memory, options: TransferOptions): Promise<ReadResult<Memory> | WriteResult<Memory>> {
    try {
      checkTransferOptions(options);
      checkMemory(buffer, this.regions);
      const { position = 0, offset = 0, signal, timeout } = options;
      const length = options.length ?? buffer.length - offset;
      if (signal !== undefined || timeout !== undefined) checkBounds(timeout, signal);
      checkPart(buffer, offset, length);
      this.throwIfEnded();
      checkRange(this, type, position, length);
      if (requestsWatched()) return this.watchTransfer(type, buffer, position, offset, length, options);
      if (buffer instanceof DeviceBuffer && signal === undefined && timeout === undefined) {
        return this.transferNow(type, buffer, position, offset, length, options);
      }
      return this.transferLater(type, buffer, position, offset, length, options);
    } catch (error) {
      return Promise.reject(error);
    }
  }

  /** `readv` and `writev`. Resolves to the bytes transferred. */
  async transferVector(type: number, buffers: readonly Memory[], options: VectorOptions): Promise<number> {
    checkCallOptions(options, "position");
    const given: unknown = buffers; // isArray would make any[] of it
    if (!Array.isArray(given) || given.length === 0) throw typeError("buffers", "an array of buffers", buffers);
    const { position = 0 } = options;
    for (const buffer of buffers) checkMemory(buffer, this.regions);
    const length = buffers.reduce((sum, buffer) => sum + buffer.length, 0);
    this.throwIfEnded();
    checkRange(this, type, position, length);
    const stretches = buffers.filter(({ length: bytes }) => bytes > 0).map((each) => stretchOf(each, 0, each.length));
    const subject = { operation: type === IN ? "readv" : "writev", position, length };
    const operation = new TransferOperation(type, stretches, position, this.limits);
    await this.run(subject, operation, options, () => operation.transferred);
    return operation.transferred;
  }

  /** FLUSH, where the device has it. */
  async flush(options: CallOptions): Promise<void> {
    checkCallOptions(options);
    this.throwIfEnded();
    if (!this.has(BlkFeature.FLUSH)) return;
    const operation = new ControlOperation(BlkRequestType.FLUSH, [new Uint8Array(0)], false);
    await this.run({ operation: "flush", position: undefined, length: 0 }, operation, options);
  }

  /** DISCARD, WRITE_ZEROES or SECURE_ERASE, each a method of another name. */
  async changeRanges(
    operation: "discard" | "writeZeroes" | "secureErase",
    limits: SegmentLimits | undefined,
    ranges: BlockRange | readonly BlockRange[],
    options: CallOptions,
    unmap = false,
  ): Promise<void> {
    const name = RANGE_REQUESTS[operation];
    const type = BlkRequestType[name];
    this.requireFeature(name, BlkFeature[name]);
    const list = rangeList(ranges);
    for (const { position, length } of list) checkRange(this, type, position, length);
    if (list.length === 0 || limits === undefined) return;
    const requests = discardRequests(list, limits, this.limits.maxRequestBytes, unmap);
    const total = list.reduce((sum, { length }) => sum + length, 0);
    const subject = { operation, position: list[0].position, length: total };
    await this.run(subject, new ControlOperation(type, requests, false, list), options);
  }

  /** A request that the device answers with `length` bytes. */
  async ask(operation: string, type: number, length: number, options: CallOptions): Promise<Uint8Array> {
    this.throwIfEnded();
    const answer = new Uint8Array(length);
    await this.run({ operation, position: undefined, length: 0 }, new ControlOperation(type, [answer], true), options);
    return answer;
  }

  /**
   * Wait for `work`, which sends no request, within the bounds of a call. It goes on when the wait is given up.
   *
   * @param what - the call, for messages.
   * @param undo - called in that case with what the work comes to.
   */
  async within<T>(what: string, options: CallOptions, work: () => Promise<T>, undo?: (late: T) => void): Promise<T> {
    const { signal, timeout } = options;
    if (signal === undefined && timeout === undefined) return work();
    signal?.throwIfAborted();
    const working = work();
    const late = (): VirtioError => {
      return lateError(`${what} of ${this.address}`, timeout, "it goes on, and nobody hears how it ends");
    };
    // What it comes to then is nobody's business any more; its failure as well.
    return bounded(working, options, late, () => void working.then(undo, () => undefined));
  }

  private get limits(): VirtioBlkQueue["limits"] {
    return this.queues[0].limits;
  }

  private fits(length: number): boolean {
    const { maxRequestBytes, maxSegmentBytes } = this.limits;
    return length <= maxSegmentBytes && length <= maxRequestBytes;
  }

  /** The fast path, where there is room; otherwise the line. */
  private transferNow(
    type: number,
    buffer: DeviceBuffer,
    position: number,
    offset: number,
    length: number,
    options: TransferOptions,
  ): Promise<ReadResult<Memory> | WriteResult<Memory>> {
    const { scheduler } = this;
    if (!scheduler.isBacklogged && this.fits(length)) {
      const promise = scheduler.transfer(type, position / SECTOR_SIZE, buffer, offset, length);
      if (promise !== undefined) return promise;
    }
    return this.transferLater(type, buffer, position, offset, length, options);
  }

  private async transferLater(
    type: number,
    buffer: Memory,
    position: number,
    offset: number,
    length: number,
    options: TransferOptions,
  ): Promise<ReadResult<Memory> | WriteResult<Memory>> {
    const operation = new TransferOperation(type, [stretchOf(buffer, offset, length)], position, this.limits);
    await this.carryOut(transferSubject(type, position, length), operation, options);
    const { transferred } = operation;
    return type === IN ? { bytesRead: transferred, buffer } : { bytesWritten: transferred, buffer };
  }

  /** The same with somebody watching. */
  private watchTransfer(
    type: number,
    buffer: Memory,
    position: number,
    offset: number,
    length: number,
    options: TransferOptions,
  ): Promise<ReadResult<Memory> | WriteResult<Memory>> {
    const { address } = this;
    const isPlain = options.signal === undefined && options.timeout === undefined;
    return watchRequest(
      { address, ...transferSubject(type, position, length) },
      () =>
        buffer instanceof DeviceBuffer && isPlain
          ? this.transferNow(type, buffer, position, offset, length, options)
          : this.transferLater(type, buffer, position, offset, length, options),
      (result) => ("bytesRead" in result ? result.bytesRead : result.bytesWritten),
    );
  }

  private run(
    subject: Subject,
    operation: Operation,
    options: CallOptions,
    transferred: () => number = () => 0,
  ): Promise<void> {
    if (!requestsWatched()) return this.carryOut(subject, operation, options);
    const call = (): Promise<void> => this.carryOut(subject, operation, options);
    return watchRequest({ address: this.address, ...subject }, call, transferred);
  }

  /** Put an operation into the line and wait for it within its bounds. */
  private carryOut(subject: Subject, operation: Operation, options: CallOptions): Promise<void> {
    const { scheduler } = this;
    const { signal, timeout } = options;
    if (signal?.aborted === true) {
      operation.abort(signal.reason);
      return operation.promise;
    }
    scheduler.enqueue(operation);
    if (signal === undefined && timeout === undefined) return operation.promise;
    const late = (): VirtioError => this.late(subject, operation, timeout);
    return bounded(operation.promise, options, late, (error) => scheduler.giveUp(operation, error));
  }

  private late(
    { operation, position, length }: Subject,
    { outstanding }: Operation,
    timeout: number | undefined,
  ): VirtioError {
    const what = position === undefined ? operation : `${operation} of ${length} bytes at ${position}`;
    return lateError(
      `${what} of ${this.address}`,
      timeout,
      outstanding === 0
        ? "nothing of it is with the device: the ring had no room, see stats()"
        : "it is with the device, and its memory stays lent to it until the device returns it or close() stops the device",
    );
  }
}

const RANGE_REQUESTS = { discard: "DISCARD", writeZeroes: "WRITE_ZEROES", secureErase: "SECURE_ERASE" } as const;

function transferSubject(type: number, position: number, length: number): Subject {
  return { operation: type === OUT ? "write" : "read", position, length };
}
