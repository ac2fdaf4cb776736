/** The virtio-PCI transport: drives a modern virtio device on a PCI function that this process owns. */

import { setTimeout as sleep } from "node:timers/promises";
import { checkInteger, rangeError, typeError, VirtioError } from "../../errors.js";
import type { MemoryRegion } from "../../memory/index.js";
import { VirtioPciCommon } from "../../protocol/virtio-pci.js";
import { EventFd, FdWatcher } from "../../sys/index.js";
import { VirtioFeature } from "../../virtqueue/features.js";
import { chooseFeatures, COMMON_FEATURES } from "../features.js";
import { quietly } from "../lifetime.js";
import { TransportMemory } from "../memory.js";
import { checkQueues } from "../queues.js";
import type { QueueNotifier, QueueSetup, VirtioTransport, WaitOptions } from "../transport.js";
import { checkWait } from "../wait.js";
import { AttachedDevice, type QueueLimits } from "./attach.js";
import type { PciSharedMemory } from "./capabilities.js";
import type { PciFunction } from "./function.js";
import { PciInterrupts } from "./interrupts.js";
import { PciQueue, PciQueues } from "./queues.js";
import { openVfio } from "./vfio.js";

/** Options of {@link Pci.open} and {@link Pci.attach}. */
export interface PciOptions extends WaitOptions {
  /** Milliseconds that this and every later operation waits at most, unless it says otherwise. Default 10000. */
  readonly timeout?: number;
}

const U128_MAX = (1n << 128n) - 1n;
/** Milliseconds between two looks at a queue that has not finished its reset. */
const RESET_INTERVAL = 1;

/**
 * Accepted beside what the device class wants, where it is offered. The addresses we pass are the IOMMU's, hence
 * ACCESS_PLATFORM. ORDER_PLATFORM asks for barriers fit for hardware: indices and flags of the rings are published by
 * Atomics, which are sequentially consistent, and every access to a register has a device barrier before it.
 */
const PLATFORM_FEATURES =
  VirtioFeature.ACCESS_PLATFORM | VirtioFeature.ORDER_PLATFORM | VirtioFeature.NOTIFICATION_DATA;

/**
 * A virtio device on the PCI bus (virtio 1.3, clause 4.1), reached through VFIO or, in tests, a model of it.
 *
 * It has to be a modern device (one with virtio capabilities) that offers ACCESS_PLATFORM, since all addresses that it
 * is given are translated by the IOMMU. Each queue has an MSI-X vector of its own where there are enough; where they
 * are fewer, queues share them, and a wake-up takes a turn of the event loop more; without MSI-X there is INTx.
 *
 * @example
 * ```ts
 * import { Pci, VirtioFeature } from "virtio-driver";
 * import { FakePciFunction } from "virtio-driver/testing";
 *
 * await using device = await Pci.attach(new FakePciFunction({ config: Uint8Array.of(8, 0, 0, 0, 0, 0, 0, 0) }));
 * await device.negotiate(VirtioFeature.VERSION_1);
 * console.log(device.deviceType, (await device.readConfig(0, 8))[0]); // 2 8
 * ```
 */
export class Pci implements VirtioTransport {
  readonly address: string;
  readonly deviceType: number;
  readonly offeredFeatures: bigint;
  readonly maxQueues: number;
  /** The size that every queue of the device takes. */
  readonly maxQueueSize: number;
  readonly maxRegions: number;
  readonly hasConfig: boolean;
  /** Shared memory regions of the device: listed, not mapped. */
  readonly sharedMemory: readonly PciSharedMemory[];
  onConfigChange: (() => void) | undefined = undefined;

  readonly #device: AttachedDevice;
  readonly #memory: TransportMemory;
  readonly #queues: PciQueues;
  readonly #interrupts: PciInterrupts;
  readonly #release: ReleaseRequest;
  /** All queues that were started, by index. */
  readonly #started = new Map<number, PciQueue>();
  #phase: "acknowledged" | "negotiated" | "running" | "failed" = "acknowledged";
  #features = 0n;
  /** Generation of the config at the last interrupt that was about it. */
  #generation = 0;

  /**
   * Take a PCI function that is bound to vfio-pci, by its address as `lspci` shows it: `0000:00:04.0`. Nobody else can
   * use it, or another function of its IOMMU group, until it is closed.
   *
   * @throws VirtioError ERR_VIRTIO_CONNECT when it is not there, not bound to vfio-pci, or has no IOMMU; ERR_VIRTIO_BUSY
   *   when somebody has it; ERR_VIRTIO_PERMISSION; ERR_VIRTIO_UNSUPPORTED in the no-IOMMU mode; and as {@link attach}.
   */
  static async open(address: string, options: PciOptions = {}): Promise<Pci> {
    return Pci.attach(openVfio(address), options);
  }

  /**
   * Find the virtio device of a function, reset and acknowledge it. The function is the transport's from now on; it is
   * closed with it, and also when this fails.
   *
   * @throws VirtioError ERR_VIRTIO_ADDRESS when it is no virtio device, ERR_VIRTIO_FEATURES when it is a legacy one,
   *   ERR_VIRTIO_CONFIG when its structures cannot be used, ERR_VIRTIO_TIMEOUT when it does not finish its reset,
   *   ERR_VIRTIO_DISCONNECTED when it does not answer; what the function throws; `signal.reason` when aborted.
   */
  static async attach(fn: PciFunction, options: PciOptions = {}): Promise<Pci> {
    try {
      const device = await AttachedDevice.attach(fn, options);
      try {
        const limits = await device.readQueueLimits(options);
        return new Pci(device, device.common.readFeatures(), limits);
      } catch (error) {
        device.release();
        throw error;
      }
    } catch (error) {
      quietly(() => fn.close());
      throw error;
    }
  }

  private constructor(device: AttachedDevice, offeredFeatures: bigint, { maxQueues, maxQueueSize }: QueueLimits) {
    const { fn, layout, peer, common, isr, config } = device;
    this.address = `pci:${fn.address}`;
    this.deviceType = layout.deviceType;
    this.offeredFeatures = offeredFeatures;
    this.maxQueues = maxQueues;
    this.maxQueueSize = maxQueueSize;
    this.maxRegions = fn.maxRegions;
    this.hasConfig = config !== undefined;
    this.sharedMemory = layout.sharedMemory;
    this.#device = device;
    this.#memory = new TransportMemory(
      { add: (region) => fn.mapDma(region), remove: (region) => fn.unmapDma(region) },
      { maxRegions: fn.maxRegions, peer, ranges: fn.iovaRanges },
    );
    this.#queues = new PciQueues(fn, common, layout.notify, peer);
    this.#interrupts = new PciInterrupts({
      ...{ fn, common, isr, peer, msixVectors: layout.msixVectors },
      onConfig: (isCertain) => this.#configInterrupt(isCertain),
      onFailure: (error) => this.#lose(error),
    });
    this.#release = new ReleaseRequest(fn, () => {
      this.#lose(
        new VirtioError(
          "ERR_VIRTIO_DISCONNECTED",
          `${peer} is wanted back by the system, which unbinds or removes it as soon as it is closed here; close it`,
        ),
      );
    });
  }

  /** Features in force; 0 before `negotiate`. */
  get features(): bigint {
    return this.#features;
  }

  /**
   * Called once when the device is gone: it was removed, it asked for a reset (DEVICE_NEEDS_RESET), the system wants it
   * back, or `close` ran. What it held stays held until `close`.
   */
  get onLost(): ((error: Error) => void) | undefined {
    return this.#device.lifetime.onLost;
  }

  set onLost(callback: ((error: Error) => void) | undefined) {
    this.#device.lifetime.onLost = callback;
  }

  /**
   * Accept those of the `wanted` features that are offered and that PCI can carry, and of its own ACCESS_PLATFORM,
   * ORDER_PLATFORM, NOTIFICATION_DATA, NOTIF_CONFIG_DATA and RING_RESET. Once; after a failure the device is FAILED.
   *
   * @throws VirtioError ERR_VIRTIO_FEATURES when VERSION_1 or ACCESS_PLATFORM is not offered, or the device refuses the
   *   set; ERR_VIRTIO_STATUS the second time.
   */
  async negotiate(wanted: bigint, options: WaitOptions = {}): Promise<bigint> {
    if (typeof wanted !== "bigint") throw typeError("wanted", "a bigint", wanted);
    if (wanted < 0n || wanted > U128_MAX) throw rangeError("wanted", "128 feature bits at most", wanted);
    this.#begin(options);
    if (this.#phase !== "acknowledged") throw wrongOrder("features can be negotiated once; open the device again");
    this.#phase = "failed";
    const { common, status } = this.#device;
    let features: bigint;
    try {
      features = this.#chooseFeatures(wanted);
      common.writeFeatures(features, this.offeredFeatures);
    } catch (error) {
      status.giveUp();
      throw error;
    }
    status.featuresOk(features);
    this.#features = features;
    this.#phase = "negotiated";
    return features;
  }

  /**
   * Read 1 to 4096 bytes of the config space, all of one generation (virtio 1.3, 4.1.4.3.1).
   *
   * @throws VirtioError ERR_VIRTIO_CONFIG when there is none, it is shorter, or it changes all the time.
   */
  async readConfig(offset: number, length: number, options: WaitOptions = {}): Promise<Uint8Array> {
    this.#begin(options);
    const bytes = this.#config.read(offset, length);
    this.#device.common.readStatus();
    return bytes;
  }

  /**
   * Write whole fields of the config space.
   *
   * @throws VirtioError ERR_VIRTIO_CONFIG when there is none, or it is shorter, ERR_VIRTIO_STATUS before `negotiate`;
   *   RangeError for a part of a field.
   */
  async writeConfig(offset: number, bytes: Uint8Array, options: WaitOptions = {}): Promise<void> {
    this.#begin(options);
    this.#checkNegotiated();
    this.#config.write(offset, bytes);
  }

  /**
   * Make memory that the device can reach: a sealed memfd, pinned and mapped in the IOMMU at an address of our choice.
   *
   * @throws VirtioError ERR_VIRTIO_MEMORY when no region is left, and what the function throws: where it is VFIO, the
   *   kernel counts the memory against RLIMIT_MEMLOCK.
   */
  async mapMemory(size: number, options: WaitOptions = {}): Promise<MemoryRegion> {
    checkInteger("size", size, 1);
    this.#begin(options);
    return this.#memory.map(size);
  }

  /**
   * Take memory from the device, then free it. An access of the device that comes all the same is blocked.
   *
   * @throws RangeError when it is not memory of this transport.
   */
  async unmapMemory(region: MemoryRegion, options: WaitOptions = {}): Promise<void> {
    this.#begin(options);
    await this.#memory.unmap(region);
  }

  /**
   * Configure and start all queues, connect their interrupts, and say DRIVER_OK. Once; when the device or the system
   * refuses something, the device is FAILED.
   *
   * @throws VirtioError ERR_VIRTIO_QUEUES for a queue that the device does not have, ERR_VIRTIO_REJECTED when it takes
   *   no vector, ERR_VIRTIO_UNSUPPORTED when it has no interrupts, ERR_VIRTIO_CONFIG when a notification address is
   *   impossible, ERR_VIRTIO_STATUS before `negotiate` or when queues run; RangeError for a wrong size or address.
   */
  async startQueues(setups: readonly QueueSetup[], options: WaitOptions = {}): Promise<QueueNotifier[]> {
    this.#begin(options);
    this.#checkNegotiated();
    if (this.#phase === "running") throw wrongOrder("the queues run already; open the device again for others");
    this.#checkSetups(setups);
    const { status } = this.#device;
    this.#phase = "failed";
    try {
      const queues = setups.map((setup) => this.#makeQueue(setup.index));
      this.#interrupts.connect(queues);
      for (const setup of setups) this.#queues.configure(setup);
      for (const { index } of setups) this.#queues.enable(index);
      this.#generation = this.#device.common.read(VirtioPciCommon.CONFIG_GENERATION);
      status.driverOk();
      this.#phase = "running";
      return queues;
    } catch (error) {
      status.giveUp();
      quietly(() => this.#interrupts.disconnect());
      for (const queue of this.#started.values()) queue.close();
      throw error;
    }
  }

  /**
   * Take a running queue out of the device's hands (RING_RESET, virtio 1.3, 2.6.1), and wait until the device says that
   * it is. No notification may be sent meanwhile and afterwards; the memory of the rings and all that was in flight
   * belong to the driver again. The queue goes on by {@link enableQueue}. A wait that ended early is taken up by
   * another call.
   *
   * @throws VirtioError ERR_VIRTIO_UNSUPPORTED when RING_RESET was not negotiated, ERR_VIRTIO_TIMEOUT when the device
   *   does not finish, ERR_VIRTIO_STATUS before `startQueues`; RangeError for a queue that was not started.
   */
  async resetQueue(index: number, options: WaitOptions = {}): Promise<void> {
    const { timeout, signal } = this.#begin(options);
    const queue = this.#startedQueue(index);
    const { common, lifetime, peer } = this.#device;
    common.readStatus();
    if (queue.state === "running") {
      queue.state = "resetting";
      this.#queues.beginReset(index);
    }
    const end = performance.now() + timeout;
    while (queue.state === "resetting" && !this.#queues.isResetDone(index)) {
      common.readStatus();
      if (performance.now() >= end) {
        throw new VirtioError(
          "ERR_VIRTIO_TIMEOUT",
          `${peer} did not finish the reset of queue ${index} within ${timeout} ms; wait again, or close the device`,
        );
      }
      await sleep(RESET_INTERVAL);
      signal?.throwIfAborted();
      lifetime.check();
    }
    queue.state = "reset";
  }

  /**
   * Start a queue again after {@link resetQueue}, from the beginning of its rings; size and place may be others.
   *
   * @returns the notifier that `startQueues` had returned for it.
   * @throws VirtioError ERR_VIRTIO_STATUS when it was not reset, ERR_VIRTIO_REJECTED when the device does not take its
   *   vector again; RangeError for a wrong size or address. It stays reset then.
   */
  async enableQueue(setup: QueueSetup, options: WaitOptions = {}): Promise<QueueNotifier> {
    this.#begin(options);
    const queue = this.#startedQueue(setup.index);
    if (queue.state !== "reset") throw wrongOrder(`queue ${setup.index} was not reset; call resetQueue first`);
    this.#checkSetups([setup]);
    this.#interrupts.assign(setup.index);
    this.#queues.configure(setup);
    this.#queues.enable(setup.index);
    queue.state = "running";
    return queue;
  }

  close(): Promise<void> {
    return this.#device.lifetime.close(() => this.#shutDown());
  }

  /** The same as `close`. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  /** From the device's end to ours: it stops, it cannot wake us, it cannot reach memory, it knows none, it is gone. */
  async #shutDown(): Promise<void> {
    const { fn, lifetime, status } = this.#device;
    lifetime.end(lifetime.closedError());
    // One that does not finish, or was removed, has had its chance: the steps below need no help of it.
    await status.reset().catch(() => undefined);
    this.#release.close();
    quietly(() => this.#interrupts.disconnect());
    quietly(() => this.#device.stopMaster());
    for (const region of this.#memory.regions) quietly(() => fn.unmapDma(region));
    quietly(() => this.#queues.close());
    this.#device.release();
    try {
      fn.close();
    } finally {
      // Closing it has stopped it, whatever was refused before, and what it still did went to pages that were pinned.
      for (const queue of this.#started.values()) queue.close();
      this.#memory.close();
    }
  }

  #chooseFeatures(wanted: bigint): bigint {
    const { common, peer } = this.#device;
    const { offeredFeatures } = this;
    let own = PLATFORM_FEATURES;
    if (common.has(VirtioPciCommon.QUEUE_NOTIF_CONFIG_DATA)) own |= VirtioFeature.NOTIF_CONFIG_DATA;
    if (common.has(VirtioPciCommon.QUEUE_RESET)) own |= VirtioFeature.RING_RESET;
    const features = chooseFeatures(offeredFeatures, wanted, { carried: COMMON_FEATURES | own, required: own, peer });
    if ((features & VirtioFeature.ACCESS_PLATFORM) !== 0n) return features;
    // Such a device takes the addresses that it is given for physical ones and goes past the IOMMU, which translates
    // ours: it would read and write memory of somebody else.
    throw new VirtioError(
      "ERR_VIRTIO_FEATURES",
      `${peer} offers features 0x${offeredFeatures.toString(16)} without ACCESS_PLATFORM: it does not say that the ` +
        "IOMMU translates its addresses, and could reach any memory; have it offer that (QEMU: iommu_platform=on)",
    );
  }

  #makeQueue(index: number): PciQueue {
    const doorbell = this.#queues.doorbell(index, this.#features);
    const queue = new PciQueue(index, EventFd.create(), doorbell);
    this.#started.set(index, queue);
    return queue;
  }

  /** Nothing is written to the device but which queue is looked at. */
  #checkSetups(setups: readonly QueueSetup[]): void {
    const packed = (this.#features & VirtioFeature.RING_PACKED) !== 0n;
    checkQueues(setups, { maxQueues: this.maxQueues, packed, memory: this.#memory });
    this.#device.common.readStatus();
    for (const setup of setups) this.#queues.check(setup);
  }

  #startedQueue(index: number): PciQueue {
    checkInteger("index", index, 0);
    if (this.#phase !== "running") throw wrongOrder("no queue runs; call startQueues first");
    if ((this.#features & VirtioFeature.RING_RESET) === 0n) {
      const { peer } = this.#device;
      throw new VirtioError("ERR_VIRTIO_UNSUPPORTED", `${peer} does not offer RING_RESET; close it to stop its queues`);
    }
    const queue = this.#started.get(index);
    if (queue === undefined) throw rangeError("index", "a queue that was started", index);
    return queue;
  }

  /** @param isCertain false when queues have the same interrupt: then only a new generation means a change. */
  #configInterrupt(isCertain: boolean): void {
    const { common, lifetime, peer, status } = this.#device;
    if (lifetime.ended !== undefined) return;
    let isChanged = isCertain;
    try {
      if (status.needsReset) {
        status.fail();
        this.#lose(
          new VirtioError(
            "ERR_VIRTIO_STATUS",
            `${peer} has met an error and says DEVICE_NEEDS_RESET; it is stopped, close it and open it again`,
          ),
        );
        return;
      }
      const generation = common.read(VirtioPciCommon.CONFIG_GENERATION);
      isChanged ||= generation !== this.#generation;
      this.#generation = generation;
    } catch (error) {
      this.#lose(error);
      return;
    }
    if (isChanged) this.onConfigChange?.();
  }

  #lose(cause: unknown): void {
    const { lifetime, peer } = this.#device;
    const error =
      cause instanceof VirtioError
        ? cause
        : new VirtioError("ERR_VIRTIO_DISCONNECTED", `${peer} is lost: ${String(cause)}`, { cause });
    lifetime.end(error);
  }

  /** What every operation begins with. */
  #begin(options: WaitOptions): { timeout: number; signal?: AbortSignal } {
    const wait = checkWait(options, this.#device.timeout);
    wait.signal?.throwIfAborted();
    this.#device.lifetime.check();
    return wait;
  }

  #checkNegotiated(): void {
    if (this.#phase === "failed") throw wrongOrder("the device was given up as FAILED; close it and open it again");
    if (this.#phase === "acknowledged") throw wrongOrder("features are not negotiated; call negotiate first");
  }

  get #config(): NonNullable<AttachedDevice["config"]> {
    const { config, peer } = this.#device;
    if (config !== undefined) return config;
    throw new VirtioError("ERR_VIRTIO_CONFIG", `${peer} has no config space that can be reached`);
  }
}

/** Hears of the system wanting the function back. */
class ReleaseRequest {
  readonly #fn: PciFunction;
  readonly #event: EventFd;
  readonly #watcher: FdWatcher;

  constructor(fn: PciFunction, onRequest: () => void) {
    this.#fn = fn;
    const event = EventFd.create();
    let watcher: FdWatcher | undefined;
    try {
      watcher = new FdWatcher(event.fd, { drain: true }, onRequest);
      watcher.unref();
      fn.setRelease(event);
      this.#event = event;
      this.#watcher = watcher;
    } catch (error) {
      watcher?.close();
      event.close();
      throw error;
    }
  }

  close(): void {
    quietly(() => this.#fn.setRelease(undefined));
    this.#watcher.close();
    this.#event.close();
  }
}

function wrongOrder(message: string): VirtioError {
  return new VirtioError("ERR_VIRTIO_STATUS", message);
}
