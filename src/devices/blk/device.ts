/** A virtio-blk device as Node people expect one: promises, FileHandle-like reads and writes, `await using`. */

import type { MessagePort } from "node:worker_threads";
import { checkOptions, typeError, VirtioError } from "../../errors.js";
import { type BufferPool, DeviceBuffer, type MemoryRegion } from "../../memory/index.js";
import {
  BLK_CONFIG_WRITEBACK_OFFSET,
  BLK_ID_SIZE,
  BLK_LIFETIME_SIZE,
  type BlkConfig,
  BlkFeature,
  type BlkLifetime,
  BlkRequestType,
  decodeBlkId,
  decodeBlkLifetime,
  SECTOR_SIZE,
} from "../../protocol/blk.js";
import type { VirtioTransport } from "../../transports/transport.js";
import { isPowerOfTwo } from "../../virtqueue/index.js";
import { adoptQueues } from "./adoption.js";
import { checkMemory, checkPart, checkRange } from "./checks.js";
import { type DeviceCalls, DRAIN_TIMEOUT, forgetDrop, keepFor, lostError, watchForDrop, weakly } from "./dropped.js";
import { BlockEmitter } from "./events.js";
import { Handovers } from "./handover.js";
import { type BlockInfo, describeDevice } from "./info.js";
import { type BlkControl, type BlkMemory, negotiateBlk, readBlkConfig, startBlkQueues } from "./negotiate.js";
import { ControlOperation, type Memory, stretchOf, TransferOperation } from "./operation.js";
import { checkOpenOptions, checkSignal, checkTransferOptions, NO_OPTIONS, rangeList } from "./options.js";
import type { AdoptOptions, BlockRange, HandOverOptions, OpenBlockOptions, TransferOptions } from "./options.js";
import type { CompletionMode } from "../completion.js";
import type { VirtioBlkQueue } from "./queue.js";
import { BlkRecovery, checkReconnect } from "./recovery.js";
import { discardRequests, type SegmentLimits } from "./ranges.js";
import { type ReadResult, Scheduler, type WriteResult } from "./scheduler.js";

/** What others tell a device. Set by the class below. */
let Calls: DeviceCalls<BlockDevice>;

/**
 * An open virtio-blk device. Requests that are larger than the device allows are split, requests that find the
 * ring full wait in order. Plain buffers are copied once; buffers of {@link allocate} are not copied at all.
 *
 * A buffer stays lent to the device until the request is done, whatever was aborted. Nothing orders requests
 * in flight at the same time: await the first where the second depends on it. A completed write is stable after
 * a `flush` that was called after it. Who drops a device without `close` is warned: code WARN_VIRTIO_DROPPED.
 *
 * It emits {@link BlockEvents}: `lost`, `config`, `resize` and more.
 *
 * @example
 * ```ts
 * import { openBlock } from "virtio-driver";
 * await using disk = await openBlock("ram:16M");
 * await disk.write(new TextEncoder().encode("virtio".padEnd(512)), { position: 4096 });
 * await disk.flush();
 * const { buffer, bytesRead } = await disk.read(new Uint8Array(512), { position: 4096 });
 * console.log(bytesRead, new TextDecoder().decode(buffer).trim()); // 512 virtio
 * ```
 */
export class BlockDevice extends BlockEmitter {
  /** The address it was opened by. */
  readonly address: string;
  /** Accepted features. */
  readonly features: bigint;
  /** Smallest unit of reads and writes in bytes: the device's block size, or 512. */
  readonly blockSize: number;
  /** Whether requests that change the disk are refused. */
  readonly readOnly: boolean;

  private readonly transport: BlkControl;
  private readonly allQueues: readonly VirtioBlkQueue[];
  private readonly scheduler: Scheduler;
  private readonly handovers: Handovers;
  private readonly recovery: BlkRecovery;
  private readonly pool: BufferPool;
  private readonly bounce: BufferPool;
  private readonly regions: ReadonlySet<MemoryRegion>;
  private readonly openOptions: OpenBlockOptions;
  private currentConfig: BlkConfig;
  /** The config's capacity once converted: a bigint costs as much as the rest of the checks of a request. */
  private capacityBytes: number;
  private closing: Promise<void> | undefined = undefined;
  private isStopping = false;

  /**
   * Bring up a block device behind a connected transport. The transport is the device's from now on, and is
   * closed with it or when this fails.
   *
   * @throws VirtioError ERR_VIRTIO_FEATURES, ERR_VIRTIO_CONFIG, ERR_VIRTIO_QUEUES, and what the transport throws.
   */
  static async open(transport: VirtioTransport, options: OpenBlockOptions = {}): Promise<BlockDevice> {
    try {
      checkOpenOptions(options);
      checkReconnect(transport, options);
      const features = await negotiateBlk(transport, options);
      const config = await readBlkConfig(transport, features, options);
      const memory = await startBlkQueues(transport, config, options);
      const device = new BlockDevice(transport, config, memory, options);
      transport.onConfigChange = weakly(device, Calls.refresh);
      return device;
    } catch (error) {
      // Why it could not be opened matters more than whether what stands behind it ended well.
      await transport.close().catch(() => undefined);
      throw error;
    }
  }

  /**
   * Drive queues that another thread has handed over ({@link handOver}), as a device of this thread: everything is
   * as ever, over those queues and the memory that came with them. The config space and the device's end go through
   * the other thread, which has to give its event loop turns. `close` gives the queues back; where a thread ends
   * without it, they are lost to the device until it is opened again.
   *
   * @param port - from {@link handOver}. It is this object's from now on.
   * @throws TypeError for anything else, or a port that was adopted before; VirtioError ERR_VIRTIO_CLOSED, or why the
   *   device was lost, when it has ended meanwhile. What was handed over goes back then.
   */
  static async adopt(port: MessagePort, options: AdoptOptions = {}): Promise<BlockDevice> {
    const { control, config, memory, options: openOptions } = adoptQueues(port, options);
    const device = new BlockDevice(control, config, memory, openOptions);
    control.onConfig = weakly(device, Calls.configure);
    control.onClosing = weakly(device, Calls.closing);
    control.start();
    return device;
  }

  private constructor(transport: BlkControl, config: BlkConfig, memory: BlkMemory, options: OpenBlockOptions) {
    super();
    this.transport = transport;
    this.address = transport.address;
    this.features = transport.features;
    this.currentConfig = config;
    this.capacityBytes = Number(config.capacity) * SECTOR_SIZE;
    this.allQueues = memory.queues;
    this.pool = memory.pool;
    this.bounce = memory.bounce;
    this.regions = memory.regions;
    this.openOptions = options;
    const { blkSize } = config;
    this.blockSize = blkSize !== undefined && blkSize >= SECTOR_SIZE && isPowerOfTwo(blkSize) ? blkSize : SECTOR_SIZE;
    this.readOnly = options.readOnly === true || this.has(BlkFeature.RO);
    this.scheduler = new Scheduler(memory.queues, this.bounce, weakly(this, Calls.lose));
    this.handovers = new Handovers(transport, memory, this.scheduler, config, {
      options,
      ended: () => this.ended,
      refresh: () => this.refresh(),
      lose: (error) => this.lose(error),
    });
    transport.onLost = weakly(this, Calls.lose);
    this.recovery = new BlkRecovery(config, {
      ...{ features: this.features, options, queues: memory.queues, scheduler: this.scheduler },
      calls: {
        disconnected: weakly(this, Calls.disconnected),
        reconnecting: weakly(this, Calls.reconnecting),
        reconnected: weakly(this, Calls.reconnected),
      },
    });
    if (options.reconnect !== false && transport.reconnects === true) transport.recovery = this.recovery;
    watchForDrop(this, { transport, scheduler: this.scheduler, queues: memory.queues });
    keepFor(memory.pool, this);
  }

  // Not in the constructor, whose closures would keep the device: see weakly().
  static {
    Calls = {
      lose: (device, error) => device.lose(error),
      configure: (device, latest, isChanged) => device.configure(latest, isChanged),
      closing: (device, error) => {
        if (device.closing !== undefined) return;
        void device.close();
        device.tell("lost", error);
      },
      refresh: (device) => void device.followConfig(),
      disconnected: (device, error) => {
        if (device.isStopping || device.handovers.areOut) return false;
        device.tell("disconnect", error);
        return true;
      },
      reconnecting: (device, attempt) => device.tell("reconnecting", attempt),
      reconnected: (device, config, outcome) => {
        device.configure(config, false);
        device.tell("reconnect", outcome);
      },
    };
  }

  /** Size of the disk in bytes. */
  get capacity(): number {
    return this.capacityBytes;
  }

  /** The device's config space, as far as the accepted features reach. */
  get config(): BlkConfig {
    return this.currentConfig;
  }

  /** Everything that is known of the device, for people and for `--json`. */
  get info(): BlockInfo {
    return describeDevice(this.transport, this.currentConfig, this.allQueues, this);
  }

  /** How completions are learnt of; may be switched at any time. In mode `"poll"` by calls of {@link poll} alone. */
  get mode(): CompletionMode {
    return this.scheduler.mode;
  }

  set mode(mode: CompletionMode) {
    this.scheduler.setMode(mode);
  }

  /** Requests in flight, and calls that wait for room. */
  get pending(): number {
    return this.scheduler.pending;
  }

  /**
   * Lend a buffer that the device can reach: reads and writes on it copy nothing.
   *
   * @param length - bytes. What they hold is not cleared.
   * @throws VirtioError ERR_VIRTIO_MEMORY when the device takes no more memory, ERR_VIRTIO_CLOSED after `close`.
   */
  async allocate(length: number): Promise<DeviceBuffer> {
    this.throwIfEnded();
    return this.pool.allocate(length);
  }

  /**
   * Read into `buffer`.
   *
   * @returns `bytesRead`, less than asked for only when the device delivered less, and the buffer.
   * @throws RangeError for a range outside the disk or the buffer, or one that is not of whole blocks.
   *   VirtioError ERR_VIRTIO_IO when the device fails the request.
   */
  read<M extends Memory>(buffer: M, options: TransferOptions = NO_OPTIONS): Promise<ReadResult<M>> {
    return this.transfer(BlkRequestType.IN, buffer, options) as Promise<ReadResult<M>>;
  }

  /**
   * Write `buffer` to the disk.
   *
   * @throws as {@link read}; VirtioError ERR_VIRTIO_READ_ONLY for a read-only disk.
   */
  write<M extends Memory>(buffer: M, options: TransferOptions = NO_OPTIONS): Promise<WriteResult<M>> {
    return this.transfer(BlkRequestType.OUT, buffer, options) as Promise<WriteResult<M>>;
  }

  /** Read consecutive bytes into several buffers, in order. Together they are of whole blocks. */
  async readv<M extends Memory>(
    buffers: readonly M[],
    options: Pick<TransferOptions, "position" | "signal"> = NO_OPTIONS,
  ): Promise<{ readonly bytesRead: number; readonly buffers: readonly M[] }> {
    const operation = this.vectorOperation(BlkRequestType.IN, buffers, options);
    await this.run(operation, options.signal);
    return { bytesRead: operation.transferred, buffers };
  }

  /** Write several buffers to consecutive bytes, in order. Together they are of whole blocks. */
  async writev<M extends Memory>(
    buffers: readonly M[],
    options: Pick<TransferOptions, "position" | "signal"> = NO_OPTIONS,
  ): Promise<{ readonly bytesWritten: number; readonly buffers: readonly M[] }> {
    const operation = this.vectorOperation(BlkRequestType.OUT, buffers, options);
    await this.run(operation, options.signal);
    return { bytesWritten: operation.transferred, buffers };
  }

  /**
   * Make every write that has completed before this call stable. A device without the FLUSH request has nothing
   * to offer here: then it resolves at once, and `info.cache` says what is known.
   */
  async flush(options: { readonly signal?: AbortSignal } = NO_OPTIONS): Promise<void> {
    checkOptions("options", options, ["signal"]);
    checkSignal(options.signal);
    this.throwIfEnded();
    if (!this.has(BlkFeature.FLUSH)) return;
    await this.run(new ControlOperation(BlkRequestType.FLUSH, [new Uint8Array(0)], false), options.signal);
  }

  /**
   * Tell the device that the ranges are no longer needed. What they read as afterwards is not known.
   *
   * @throws VirtioError ERR_VIRTIO_UNSUPPORTED when the device has no DISCARD.
   */
  async discard(ranges: BlockRange | readonly BlockRange[]): Promise<void> {
    const { discard: limits } = this.config;
    await this.changeRanges("DISCARD", BlkRequestType.DISCARD, limits, ranges, false);
  }

  /**
   * Fill the ranges with zeroes.
   *
   * @param options - `unmap`: the device may deallocate them; they read as zeroes all the same. Default false.
   * @throws VirtioError ERR_VIRTIO_UNSUPPORTED when the device has no WRITE_ZEROES.
   */
  async writeZeroes(
    ranges: BlockRange | readonly BlockRange[],
    options: { readonly unmap?: boolean } = NO_OPTIONS,
  ): Promise<void> {
    checkOptions("options", options, ["unmap"]);
    const { unmap = false } = options;
    if (typeof unmap !== "boolean") throw typeError("unmap", "a boolean", unmap);
    const { writeZeroes: limits } = this.config;
    await this.changeRanges("WRITE_ZEROES", BlkRequestType.WRITE_ZEROES, limits, ranges, unmap);
  }

  /**
   * Erase the ranges and every copy of their data.
   *
   * @throws VirtioError ERR_VIRTIO_UNSUPPORTED when the device has no SECURE_ERASE.
   */
  async secureErase(ranges: BlockRange | readonly BlockRange[]): Promise<void> {
    const { secureErase: limits } = this.config;
    await this.changeRanges("SECURE_ERASE", BlkRequestType.SECURE_ERASE, limits, ranges, false);
  }

  /**
   * Ask the device for its identity, at most 20 ASCII characters.
   *
   * @throws VirtioError ERR_VIRTIO_UNSUPPORTED when the device does not say.
   */
  async getId(): Promise<string> {
    return decodeBlkId(await this.ask(BlkRequestType.GET_ID, BLK_ID_SIZE));
  }

  /**
   * Ask the device how worn its storage is.
   *
   * @throws VirtioError ERR_VIRTIO_UNSUPPORTED when LIFETIME was not negotiated.
   */
  async getLifetime(): Promise<BlkLifetime> {
    this.requireFeature("GET_LIFETIME", BlkFeature.LIFETIME);
    return decodeBlkLifetime(await this.ask(BlkRequestType.GET_LIFETIME, BLK_LIFETIME_SIZE));
  }

  /**
   * Switch the device's write cache on or off. Earlier writes are not made stable by switching it off: flush too.
   *
   * @returns the mode that the device is in now.
   * @throws VirtioError ERR_VIRTIO_UNSUPPORTED when CONFIG_WCE was not negotiated.
   */
  async setWriteback(enabled: boolean): Promise<boolean> {
    this.requireFeature("the writeback field", BlkFeature.CONFIG_WCE);
    if (typeof enabled !== "boolean") throw typeError("enabled", "a boolean", enabled);
    await this.transport.writeConfig(BLK_CONFIG_WRITEBACK_OFFSET, Uint8Array.of(enabled ? 1 : 0));
    await this.refresh();
    return this.currentConfig.writeback === true;
  }

  /** Read the config space again. The events tell of another size of the disk, if it has one. */
  async refresh(): Promise<BlkConfig> {
    this.throwIfEnded();
    return this.readConfig(false);
  }

  /**
   * Reap completions now; in mode `"poll"` the only way to get any. Promises resolve before the next turn.
   *
   * @returns how many requests completed.
   */
  poll(): number {
    return this.scheduler.poll();
  }

  /**
   * Take a queue for the low-level API; the calls of this object use the others from now on.
   *
   * @throws VirtioError ERR_VIRTIO_QUEUES when calls are pending, or every queue was taken already.
   */
  takeQueue(): VirtioBlkQueue {
    this.throwIfEnded();
    const queue = this.scheduler.takeQueue();
    keepFor(queue, this);
    return queue;
  }

  /**
   * Give idle queues to another thread, the last ones first, with memory of their own: send the port there, by
   * `workerData` or `postMessage` with the port in the transfer list, and {@link adopt} it. The calls of this object
   * use the queues that are left, if any, until the other thread calls `close`, or closes a port it did not adopt.
   *
   * @throws VirtioError ERR_VIRTIO_QUEUES when calls are pending or fewer queues are left, ERR_VIRTIO_MEMORY when the
   *   device takes no more memory, ERR_VIRTIO_UNSUPPORTED for a device that was adopted itself.
   */
  async handOver(options: HandOverOptions = NO_OPTIONS): Promise<MessagePort> {
    return this.handovers.handOver(options);
  }

  /**
   * Wait for what is pending (5 seconds at most), stop the device, release all memory. Lent buffers end with it.
   * Other threads that drive queues of it do the same first; what they still have pending after 6 seconds rejects.
   * In a thread that adopted its queues: wait for what is pending, then give them back.
   * Idempotent: a second call waits for the first.
   *
   * @throws VirtioError ERR_VIRTIO_BACKEND when the embedded back-end of a `ram:` or `file:` address could not
   *   flush, or had ended before. Everything is released all the same.
   */
  close(): Promise<void> {
    this.closing ??= this.shutDown();
    return this.closing;
  }

  /** Same as {@link close}: `await using disk = await openBlock(…)`. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  private async shutDown(): Promise<void> {
    forgetDrop(this);
    try {
      if (this.scheduler.failure === undefined) {
        this.scheduler.setMode("event");
        await Promise.all([this.scheduler.idle(DRAIN_TIMEOUT), this.handovers.callBack(DRAIN_TIMEOUT)]);
      }
    } finally {
      // Also when there was no descriptor left to wait with.
      await this.shutOff();
    }
  }

  private async shutOff(): Promise<void> {
    const closed = new VirtioError("ERR_VIRTIO_CLOSED", `${this.address} is closed; open it again`);
    // From here on nobody looks at the memory, which is about to go. What is still in flight is told only when
    // the device cannot touch it any more.
    this.isStopping = true;
    for (const queue of this.allQueues) queue.fail(closed);
    try {
      await this.transport.close();
    } finally {
      this.endAll(closed);
    }
  }

  private endAll(error: VirtioError): void {
    this.scheduler.fail(error);
    this.handovers.tellLost(error);
    this.pool.close();
    this.bounce.close();
  }

  private lose(cause: unknown): void {
    if (this.isStopping || this.scheduler.failure !== undefined) return;
    const error = lostError(this.address, cause);
    this.transport.report?.(error);
    this.endAll(error);
    // Whoever called `close` knows already that the device is no more.
    if (this.closing === undefined) this.tell("lost", error);
  }

  /** The device said that its config space changed. */
  private async followConfig(): Promise<void> {
    try {
      await this.readConfig(true);
    } catch (error) {
      // A device that is away has its config read when it is back.
      if (this.closing === undefined && !this.recovery.isAway) this.lose(error);
    }
  }

  private async readConfig(isChanged: boolean): Promise<BlkConfig> {
    const config = await readBlkConfig(this.transport, this.features, this.openOptions);
    this.handovers.tellConfig(config, isChanged);
    this.configure(config, isChanged);
    return config;
  }

  /** Go on with another config. Listeners hear of it when the device changed it, or the size at least. */
  private configure(config: BlkConfig, isChanged: boolean): void {
    const previous = this.capacityBytes;
    const capacity = Number(config.capacity) * SECTOR_SIZE;
    this.currentConfig = config;
    this.recovery.config = config;
    this.capacityBytes = capacity;
    for (const queue of this.allQueues) queue.capacity = capacity / SECTOR_SIZE;
    if (this.ended !== undefined) return;
    if (isChanged || capacity !== previous) this.tell("config", config);
    if (capacity !== previous) this.tell("resize", capacity, previous);
  }

  private has(feature: bigint): boolean {
    return (this.features & feature) !== 0n;
  }

  private throwIfEnded(): void {
    const ended = this.ended;
    if (ended !== undefined) throw ended;
  }

  private get ended(): VirtioError | undefined {
    if (this.scheduler.failure !== undefined) return this.scheduler.failure;
    if (this.closing === undefined) return undefined;
    return new VirtioError("ERR_VIRTIO_CLOSED", `${this.address} is closed; open it again`);
  }

  private transfer(
    type: number,
    buffer: Memory,
    options: TransferOptions,
  ): Promise<ReadResult<Memory> | WriteResult<Memory>> {
    try {
      checkTransferOptions(options);
      checkMemory(buffer, this.regions);
      const { position = 0, offset = 0, signal } = options;
      const length = options.length ?? buffer.length - offset;
      checkSignal(signal);
      checkPart(buffer, offset, length);
      this.throwIfEnded();
      checkRange(this, type, position, length);
      const { scheduler } = this;
      if (buffer instanceof DeviceBuffer && signal === undefined && !scheduler.isBacklogged && this.fits(length)) {
        const promise = scheduler.transfer(type, position / SECTOR_SIZE, buffer, offset, length);
        if (promise !== undefined) return promise;
      }
      return this.transferLater(type, buffer, position, offset, length, signal);
    } catch (error) {
      return Promise.reject(error);
    }
  }

  private async transferLater(
    type: number,
    buffer: Memory,
    position: number,
    offset: number,
    length: number,
    signal: AbortSignal | undefined,
  ): Promise<ReadResult<Memory> | WriteResult<Memory>> {
    const operation = new TransferOperation(type, [stretchOf(buffer, offset, length)], position, this.limits);
    await this.run(operation, signal);
    const { transferred } = operation;
    return type === BlkRequestType.IN ? { bytesRead: transferred, buffer } : { bytesWritten: transferred, buffer };
  }

  private get limits(): VirtioBlkQueue["limits"] {
    return this.allQueues[0].limits;
  }

  private fits(length: number): boolean {
    const { maxRequestBytes, maxSegmentBytes } = this.limits;
    return length <= maxSegmentBytes && length <= maxRequestBytes;
  }

  private vectorOperation(
    type: number,
    buffers: readonly Memory[],
    options: Pick<TransferOptions, "position" | "signal">,
  ): TransferOperation {
    checkOptions("options", options, ["position", "signal"]);
    checkSignal(options.signal);
    const given: unknown = buffers; // isArray would make any[] of it
    if (!Array.isArray(given) || given.length === 0) throw typeError("buffers", "an array of buffers", buffers);
    const { position = 0 } = options;
    for (const buffer of buffers) checkMemory(buffer, this.regions);
    const total = buffers.reduce((sum, buffer) => sum + buffer.length, 0);
    this.throwIfEnded();
    checkRange(this, type, position, total);
    const stretches = buffers.filter(({ length }) => length > 0).map((buffer) => stretchOf(buffer, 0, buffer.length));
    return new TransferOperation(type, stretches, position, this.limits);
  }

  private run(operation: TransferOperation | ControlOperation, signal: AbortSignal | undefined): Promise<void> {
    if (signal === undefined) {
      this.scheduler.enqueue(operation);
      return operation.promise;
    }
    const onAbort = (): void => operation.abort(signal.reason);
    if (signal.aborted) onAbort();
    else this.scheduler.enqueue(operation);
    signal.addEventListener("abort", onAbort, { once: true });
    return operation.promise.finally(() => signal.removeEventListener("abort", onAbort));
  }

  private async ask(type: number, length: number): Promise<Uint8Array> {
    this.throwIfEnded();
    const answer = new Uint8Array(length);
    await this.run(new ControlOperation(type, [answer], true), undefined);
    return answer;
  }

  private async changeRanges(
    name: "DISCARD" | "WRITE_ZEROES" | "SECURE_ERASE",
    type: number,
    limits: SegmentLimits | undefined,
    ranges: BlockRange | readonly BlockRange[],
    unmap: boolean,
  ): Promise<void> {
    this.requireFeature(name, BlkFeature[name]);
    const list = rangeList(ranges);
    for (const { position, length } of list) checkRange(this, type, position, length);
    if (list.length === 0 || limits === undefined) return;
    const requests = discardRequests(list, limits, this.limits.maxRequestBytes, unmap);
    await this.run(new ControlOperation(type, requests, false), undefined);
  }

  private requireFeature(what: string, feature: bigint): void {
    this.throwIfEnded();
    if (this.has(feature)) return;
    throw new VirtioError("ERR_VIRTIO_UNSUPPORTED", `${this.address} does not offer ${what}; see info.features`);
  }
}
