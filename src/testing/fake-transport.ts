/** A device in this process behind the transport interface: what a test of a driver drives instead of hardware. */

import { checkInteger, checkOptions, rangeError, typeError, VirtioError } from "../errors.js";
import { IovaSpace, MemoryRegion } from "../memory/index.js";
import { EventFd, FdWatcher } from "../sys/index.js";
import type { QueueNotifier, QueueSetup, Recovery, VirtioTransport, WaitOptions } from "../transports/transport.js";
import { DeviceMemory } from "../virtqueue/device-memory.js";
import { VirtioFeature } from "../virtqueue/features.js";
import { checkQueueSize, VirtqueueLayout } from "../virtqueue/layout.js";
import { FakeDevice, type FakeRequest } from "./fake-device.js";

/** What a driver did to a {@link FakeTransport}, in order; see `FakeTransport.log`. */
export type FakeEvent =
  | { readonly step: "negotiate"; readonly wanted: bigint; readonly accepted: bigint }
  | { readonly step: "readConfig"; readonly offset: number; readonly length: number }
  | { readonly step: "writeConfig"; readonly offset: number; readonly bytes: Uint8Array }
  | { readonly step: "mapMemory"; readonly size: number; readonly iova: number }
  | { readonly step: "unmapMemory"; readonly iova: number }
  | { readonly step: "startQueues"; readonly queues: readonly QueueSetup[] }
  | { readonly step: "notify"; readonly index: number; readonly data: number }
  | { readonly step: "kick"; readonly index: number }
  | { readonly step: "close" };

/** A step that can be made to fail; see `FakeTransport.failures`. */
export type FakeStep = Exclude<FakeEvent["step"], "notify" | "kick" | "close">;

/** What a {@link FakeTransport} is made from. */
export interface FakeTransportOptions {
  /** Feature bits that the device offers. Default: VERSION_1. */
  readonly features?: bigint;
  /** The device's config space; copied. Default: it has none that can be reached (`hasConfig` is false). */
  readonly config?: Uint8Array;
  /** Device type (virtio 1.3, clause 5). Default: the transport cannot tell. */
  readonly deviceType?: number;
  /** Queues of the device. Default 1. */
  readonly maxQueues?: number;
  /** Largest queue size. Default 32768. */
  readonly maxQueueSize?: number;
  /** Regions that can be mapped at the same time. Default 8. */
  readonly maxRegions?: number;
  /**
   * What the device does when the driver notifies a queue. Called in a microtask; afterwards the device asks for
   * the next notification. Default: nothing.
   */
  readonly onNotify?: (queue: FakeQueue) => void;
}

/** The first address that the device knows; the upper half is not 0, so that mixing halves up shows. */
const FIRST_IOVA = 0x5_4000_0000;
const LAST_IOVA = 2 ** 46 - 1;
const MAX_REGIONS = 8;

/** How a fake device tells its driver that it has used buffers. */
export interface FakeInterrupt {
  /** -1 when there is nobody to tell any more: the queue is stopped. */
  readonly fd: number;
  signal(): void;
}

/** The device's end of a started queue of a fake device. */
export class FakeQueue {
  /** Queue index. */
  readonly index: number;
  /** What the driver said of the queue. */
  readonly setup: QueueSetup;
  /** The device's half of the ring; another one when a new device took the place of the one before. */
  device: FakeDevice;
  /** The value of each notification that the driver sent. */
  readonly notifications: number[] = [];

  private readonly completion: FakeInterrupt;

  constructor(setup: QueueSetup, device: FakeDevice, completion: FakeInterrupt) {
    this.index = setup.index;
    this.setup = setup;
    this.device = device;
    this.completion = completion;
  }

  /** Take available requests and hold them; see `FakeDevice.take`. None once the transport is closed. */
  take(max?: number): FakeRequest[] {
    return this.completion.fd < 0 ? [] : this.device.take(max);
  }

  /**
   * Give held requests back, in this order, make them visible, and notify the driver if it wants that.
   *
   * @throws RangeError for a request that is not held.
   */
  complete(...requests: readonly FakeRequest[]): void {
    for (const request of requests) this.device.complete(request);
    this.publish();
  }

  /** Make what was given back visible, and notify the driver if it wants that. */
  publish(): void {
    if (this.device.publish()) this.completion.signal();
  }

  /** Notify the driver without a reason, as any device may. */
  interrupt(): void {
    this.completion.signal();
  }

  /**
   * Answer a notification: let the device look, then ask for the next notification; again if it took some and more came.
   *
   * @param onNotify what the device does.
   * @param isAlive whether it may go on; it does not once the queue is closed.
   */
  serve(onNotify: (queue: FakeQueue) => void, isAlive: () => boolean = () => true): void {
    const { device, completion } = this;
    let before = -1;
    while (completion.fd >= 0 && isAlive() && device.queue.base !== before) {
      before = device.queue.base;
      onNotify(this);
      if (completion.fd < 0 || !isAlive() || !device.enableNotifications()) return;
    }
  }
}

/**
 * A virtio device that exists in this process only, for tests of drivers: real shared memory and completions,
 * no other side. It records all that the driver does to it, refuses what the interface forbids, and answers
 * requests as a test tells it, in any order or not at all.
 *
 * @throws RangeError or TypeError for a wrong option.
 * @example
 * ```ts
 * import { BlockDevice } from "virtio-driver";
 * import { encodeBlkConfig } from "virtio-driver/protocol";
 * import { FakeTransport, takeBlk } from "virtio-driver/testing";
 *
 * const transport = new FakeTransport({
 *   config: encodeBlkConfig({ capacity: 2048n }),
 *   onNotify: (queue) => {
 *     for (const request of takeBlk(queue)) request.answer({ data: new Uint8Array(request.room).fill(7) });
 *   },
 * });
 * const disk = await BlockDevice.open(transport);
 * const { buffer, bytesRead } = await disk.read(new Uint8Array(512));
 * console.log(bytesRead, buffer[511]); // 512 7
 * await disk.close();
 * console.log(transport.log.map(({ step }) => step).join(" "));
 * // negotiate readConfig mapMemory startQueues notify close
 * ```
 */
export class FakeTransport implements VirtioTransport {
  readonly address = "fake:";
  readonly deviceType: number | undefined;
  readonly offeredFeatures: bigint;
  readonly maxQueues: number;
  readonly maxQueueSize: number;
  readonly maxRegions: number;
  readonly hasConfig: boolean;
  readonly reconnects = true;
  recovery: Recovery | undefined = undefined;
  onConfigChange: (() => void) | undefined = undefined;

  /** Everything that the driver did, in order. */
  readonly log: FakeEvent[] = [];
  /** Steps that fail with the given error, until it is taken out again. */
  readonly failures = new Map<FakeStep, Error>();
  /** The config space as it is now; empty when there is none. */
  readonly config: Uint8Array;
  /** The queues that were started, in the order in which the driver named them. */
  readonly queues: FakeQueue[] = [];
  /** All memory that the device can reach. */
  readonly memory = new DeviceMemory();
  /** Regions that were ever mapped. */
  regionsMapped = 0;
  /** Regions that were withdrawn and freed. */
  regionsClosed = 0;

  private readonly iova = new IovaSpace({ ranges: [{ start: FIRST_IOVA, end: LAST_IOVA }] });
  private readonly regions = new Set<MemoryRegion>();
  /** What is to be closed at the end: eventfds and their watchers. */
  private readonly events: { close(): void }[] = [];
  private readonly onNotify: (queue: FakeQueue) => void;
  private accepted: bigint | undefined = undefined;
  private ended: Error | undefined = undefined;
  private told = false;
  private isAway = false;
  private lost: ((error: Error) => void) | undefined;

  constructor(options: FakeTransportOptions = {}) {
    checkOptions("FakeTransport", options, [
      ...["features", "config", "deviceType", "maxQueues", "maxQueueSize", "maxRegions", "onNotify"],
    ]);
    const { features = VirtioFeature.VERSION_1, config, deviceType, onNotify = () => {} } = options;
    if (typeof features !== "bigint") throw typeError("features", "a bigint", features);
    if (typeof onNotify !== "function") throw typeError("onNotify", "a function", onNotify);
    if (config !== undefined && !(config instanceof Uint8Array)) throw typeError("config", "a Uint8Array", config);
    this.offeredFeatures = features;
    this.hasConfig = config !== undefined;
    this.config = Uint8Array.from(config ?? []);
    this.deviceType = deviceType;
    this.maxQueues = checkInteger("maxQueues", options.maxQueues ?? 1, 1, 65536);
    this.maxQueueSize = checkInteger("maxQueueSize", options.maxQueueSize ?? 32768, 1, 32768);
    this.maxRegions = checkInteger("maxRegions", options.maxRegions ?? MAX_REGIONS, 1);
    this.onNotify = onNotify;
  }

  /** Features in force; 0 before `negotiate`. */
  get features(): bigint {
    return this.accepted ?? 0n;
  }

  /** Called once when the device is gone; at once when it already is. */
  get onLost(): ((error: Error) => void) | undefined {
    return this.lost;
  }

  set onLost(callback: ((error: Error) => void) | undefined) {
    this.lost = callback;
    this.tellLost();
  }

  /** Steps of the log by name, for comparison with the order that a driver must keep. */
  get steps(): readonly FakeEvent["step"][] {
    return this.log.map(({ step }) => step);
  }

  async negotiate(wanted: bigint, options?: WaitOptions): Promise<bigint> {
    if (typeof wanted !== "bigint") throw typeError("wanted", "a bigint", wanted);
    const accepted = wanted & this.offeredFeatures;
    this.begin({ step: "negotiate", wanted, accepted }, options);
    if (this.accepted !== undefined) throw wrongOrder("features can be negotiated once");
    if ((accepted & VirtioFeature.VERSION_1) === 0n) {
      throw new VirtioError("ERR_VIRTIO_FEATURES", "VERSION_1 is not among the features; it is always needed");
    }
    this.accepted = accepted;
    return accepted;
  }

  async readConfig(offset: number, length: number, options?: WaitOptions): Promise<Uint8Array> {
    this.begin({ step: "readConfig", offset, length }, options);
    this.checkConfig(offset, length);
    return this.config.slice(offset, offset + length);
  }

  async writeConfig(offset: number, bytes: Uint8Array, options?: WaitOptions): Promise<void> {
    this.begin({ step: "writeConfig", offset, bytes: bytes.slice() }, options);
    if (this.accepted === undefined) throw wrongOrder("the config space may be written after negotiate only");
    this.checkConfig(offset, bytes.length);
    this.config.set(bytes, offset);
  }

  async mapMemory(size: number, options?: WaitOptions): Promise<MemoryRegion> {
    checkInteger("size", size, 1);
    const align = 2 ** 21;
    const iova = this.iova.allocate(Math.ceil(size / align) * align, align);
    this.begin({ step: "mapMemory", size, iova }, options);
    if (this.regions.size === this.maxRegions) {
      throw new VirtioError("ERR_VIRTIO_MEMORY", `the device takes ${this.maxRegions} regions, and all are mapped`);
    }
    const region = MemoryRegion.create({ name: "virtio-driver-fake", size, iova });
    this.regions.add(region);
    this.memory.add(BigInt(iova), region.buffer);
    this.regionsMapped++;
    return region;
  }

  async unmapMemory(region: MemoryRegion, options?: WaitOptions): Promise<void> {
    this.begin({ step: "unmapMemory", iova: region.iova }, options);
    if (!this.regions.has(region)) throw rangeError("region", "memory of this transport", region.iova);
    this.free(region);
  }

  async startQueues(queues: readonly QueueSetup[], options?: WaitOptions): Promise<QueueNotifier[]> {
    this.begin({ step: "startQueues", queues }, options);
    if (this.accepted === undefined) throw wrongOrder("queues can be started after negotiate only");
    if (this.queues.length > 0) throw wrongOrder("the queues run already");
    for (const { index } of queues) {
      if (index < this.maxQueues) continue;
      throw new VirtioError("ERR_VIRTIO_QUEUES", `the device has ${this.maxQueues} queues, there is no queue ${index}`);
    }
    return queues.map((setup) => this.start(setup));
  }

  async close(): Promise<void> {
    this.log.push({ step: "close" });
    this.end(new VirtioError("ERR_VIRTIO_CLOSED", `${this.address} is closed; make a new one`));
    for (const event of this.events.splice(0)) event.close();
    for (const region of this.regions) this.free(region);
  }

  /** The device is gone: every later step fails with `error`, and `onLost` is called with it. */
  lose(error: Error): void {
    this.end(error);
  }

  /**
   * The device is gone, and may come back: until {@link comeBack} nobody answers. A driver that does not go on with
   * another device loses it.
   */
  disconnect(): void {
    const error = new VirtioError("ERR_VIRTIO_DISCONNECTED", `${this.address} is gone for now`);
    if (this.recovery?.disconnected(error) !== true) this.end(error);
    this.isAway = true;
  }

  /**
   * Another device takes the place of the one that is gone.
   *
   * @param options.tracked - it knows what that one had taken from the rings, and holds it.
   * @param options.leaves - it is gone again before its queues run.
   * @throws what the driver has against it; the device is lost then.
   */
  async comeBack(options: { readonly tracked?: boolean; readonly leaves?: boolean } = {}): Promise<void> {
    checkOptions("comeBack", options, ["tracked", "leaves"]);
    const { tracked = false, leaves = false } = options;
    const { address, hasConfig, recovery } = this;
    if (!this.isAway || recovery === undefined) throw wrongOrder("the device is not gone; disconnect it first");
    recovery.reconnecting(1, 0);
    try {
      await recovery.restart({
        ...{ address, hasConfig, tracked },
        readConfig: (offset, length) => this.readConfig(offset, length),
        writeConfig: (offset, bytes) => this.writeConfig(offset, bytes),
      });
    } catch (error) {
      this.end(new VirtioError("ERR_VIRTIO_DISCONNECTED", `${address} came back as another device`, { cause: error }));
      throw error;
    }
    if (!tracked) for (const queue of this.queues) queue.device = this.deviceFor(queue.setup);
    if (leaves) return;
    this.isAway = false;
    recovery.reconnected(1);
    for (const queue of this.queues) queueMicrotask(() => this.serve(queue));
  }

  /** The device changes its config space from byte `offset` on, and says so. */
  changeConfig(bytes: Uint8Array, offset = 0): void {
    this.config.set(bytes, offset);
    this.onConfigChange?.();
  }

  private begin(event: FakeEvent & { step: FakeStep }, options: WaitOptions = {}): void {
    options.signal?.throwIfAborted();
    if (this.ended !== undefined) throw this.ended;
    this.log.push(event);
    const failure = this.failures.get(event.step);
    if (failure !== undefined) throw failure;
  }

  private checkConfig(offset: number, length: number): void {
    if (offset >= 0 && length >= 1 && offset + length <= this.config.length) return;
    throw new VirtioError(
      "ERR_VIRTIO_CONFIG",
      `bytes ${offset} to ${offset + length} of a config space of ${this.config.length} bytes`,
    );
  }

  private start(setup: QueueSetup): QueueNotifier {
    const { index } = setup;
    const device = this.deviceFor(setup);
    const completion = EventFd.create();
    const kick = EventFd.create();
    const queue = new FakeQueue(setup, device, completion);
    this.queues.push(queue);
    const watcher = new FdWatcher(kick.fd, { drain: true }, () => {
      this.log.push({ step: "kick", index });
      this.serve(queue);
    });
    watcher.unref();
    this.events.push(watcher, kick, completion);
    return {
      index,
      completion,
      kick,
      notify: (data) => {
        this.log.push({ step: "notify", index, data });
        queue.notifications.push(data);
        queueMicrotask(() => this.serve(queue));
      },
    };
  }

  private deviceFor({ size, descriptorArea, driverArea, deviceArea }: QueueSetup): FakeDevice {
    const packed = (this.features & VirtioFeature.RING_PACKED) !== 0n;
    if (checkQueueSize(size, packed) > this.maxQueueSize) {
      throw rangeError("size", `at most ${this.maxQueueSize}`, size);
    }
    const layout = new VirtqueueLayout({ queueSize: size, features: this.features });
    if (
      driverArea !== descriptorArea + layout.driverAreaOffset ||
      deviceArea !== descriptorArea + layout.deviceAreaOffset
    ) {
      throw rangeError("queue", "its areas one behind the other, as in VirtqueueLayout", descriptorArea);
    }
    const region = [...this.regions].find(({ iova, size: bytes }) => {
      return descriptorArea >= iova && descriptorArea + layout.endOffset <= iova + bytes;
    });
    if (region === undefined) throw rangeError("descriptorArea", "memory of mapMemory", descriptorArea);
    return new FakeDevice({
      ...{ layout, buffer: region.buffer, offset: descriptorArea - region.iova, iova: descriptorArea },
      ...{ features: this.features, memory: this.memory },
    });
  }

  private serve(queue: FakeQueue): void {
    if (!this.isAway) queue.serve(this.onNotify, () => this.ended === undefined && !this.isAway);
  }

  private free(region: MemoryRegion): void {
    this.regions.delete(region);
    this.memory.remove(region.buffer);
    this.iova.free(region.iova);
    region.close();
    this.regionsClosed++;
  }

  private end(error: Error): void {
    this.ended ??= error;
    this.tellLost();
  }

  private tellLost(): void {
    const callback = this.lost;
    const error = this.ended;
    if (callback === undefined || error === undefined || this.told) return;
    this.told = true;
    queueMicrotask(() => callback(error));
  }
}

function wrongOrder(message: string): VirtioError {
  return new VirtioError("ERR_VIRTIO_STATUS", message);
}
