/** The vhost-vdpa transport: drives a virtio device that the kernel hands out as a character device. */

import { checkInteger, checkOptions, rangeError, typeError, VirtioError } from "../../errors.js";
import type { MemoryRegion } from "../../memory/index.js";
import { VhostVdpaBackendFeature } from "../../protocol/vhost-vdpa.js";
import { isPowerOfTwo } from "../../virtqueue/layout.js";
import { VirtioFeature } from "../../virtqueue/features.js";
import { chooseFeatures, COMMON_FEATURES } from "../features.js";
import { Lifetime, quietly } from "../lifetime.js";
import { TransportMemory } from "../memory.js";
import { checkQueues } from "../queues.js";
import { StatusSequence } from "../status.js";
import type { QueueNotifier, QueueSetup, VirtioTransport, WaitOptions } from "../transport.js";
import { checkWait, DEFAULT_TIMEOUT, Serial } from "../wait.js";
import { VdpaControl } from "./control.js";
import { type Introduction, introduce } from "./introduction.js";
import { nodeOf, openNode, type VhostVdpaNode } from "./node.js";
import { VdpaQueues } from "./queues.js";

/**
 * Which device: the path of its node, a descriptor that is open for reading and writing, or what stands in for one in
 * a test. Descriptor and stand-in are owned from then on, also when opening fails.
 */
export type VhostVdpaTarget =
  | string
  | { readonly path: string }
  | { readonly fd: number }
  | { readonly node: VhostVdpaNode };

/** Options of {@link VhostVdpa.open}. */
export interface VhostVdpaOptions extends WaitOptions {
  /** Milliseconds that this and every later reset waits at most, unless it says otherwise. Default 10000. */
  readonly timeout?: number;
}

/** The kernel keeps as many mappings as it is asked for; more regions than anybody makes. */
const MAX_REGIONS = 1024;
/** Bytes of config space to be read or written at once: more than any device type has. */
const MAX_CONFIG_BYTES = 0x1_0000;
const U32_MAX = 0xffff_ffff;
const U64_MAX = 0xffff_ffff_ffff_ffffn;
/** What is read at once at most without a doubt (virtio 1.3, 2.5.1): longer reads are made until two agree. */
const ATOMIC_BYTES = 4;
/** Reads of a stretch of config space that keeps changing, until that is taken for a fault. */
const MAX_CONFIG_READS = 16;

/**
 * A vhost-vdpa device, `/dev/vhost-vdpa-0`: a vDPA device in hardware, a simulated one, or one that another program
 * serves by VDUSE.
 *
 * Memory is made by `mapMemory` alone and is always a memory file. Devices that are served by programs reach nothing
 * else: the kernel takes any address, and passes over what is not a shared mapping of a file without a word.
 *
 * Every operation is a few system calls, done at once; only a reset is waited for. A program that serves a device by
 * VDUSE and does not answer makes those calls wait, up to the 30 seconds that the kernel grants it.
 *
 * @example
 * ```ts no-run
 * import { BlockDevice, VhostVdpa } from "virtio-driver";
 *
 * const device = await VhostVdpa.open("/dev/vhost-vdpa-0", { timeout: 2000 });
 * console.log(device.deviceType, device.maxQueues, device.maxQueueSize); // 2 2 128
 * await using disk = await BlockDevice.open(device);
 * ```
 */
export class VhostVdpa implements VirtioTransport {
  readonly address: string;
  readonly deviceType: number;
  readonly offeredFeatures: bigint;
  /** Features of the interface in force, masks of `VhostVdpaBackendFeature`. */
  readonly backendFeatures: bigint;
  readonly maxQueues: number;
  readonly maxQueueSize: number;
  readonly maxRegions = MAX_REGIONS;
  readonly hasConfig: boolean;
  onConfigChange: (() => void) | undefined = undefined;

  readonly #peer: string;
  readonly #timeout: number;
  readonly #control: VdpaControl;
  readonly #status: StatusSequence;
  readonly #configSize: number;
  readonly #memory: TransportMemory;
  readonly #queues: VdpaQueues;
  readonly #lifetime: Lifetime;
  /** Changes of memory and queues, one after the other. */
  readonly #changes = new Serial();
  #features = 0n;
  #phase: "acknowledged" | "negotiated" | "running" | "failed" = "acknowledged";

  /**
   * Open a device, reset it and ask what it is.
   *
   * @throws VirtioError ERR_VIRTIO_CONNECT when there is no such device or it is something else, ERR_VIRTIO_BUSY when
   *   somebody has it open; ERR_VIRTIO_PERMISSION; ERR_VIRTIO_TIMEOUT when its reset does not end in time; ERR_VIRTIO_MEMORY or
   *   ERR_VIRTIO_QUEUES when its limits leave room for nothing; ERR_VIRTIO_SYSCALL when the kernel refuses otherwise;
   *   `signal.reason` when aborted; TypeError or RangeError for a wrong argument.
   */
  static async open(target: VhostVdpaTarget, options: VhostVdpaOptions = {}): Promise<VhostVdpa> {
    const { name, open } = checkTarget(target);
    const { timeout, signal } = checkWait(options, DEFAULT_TIMEOUT);
    signal?.throwIfAborted();
    const control = new VdpaControl(open(), name);
    try {
      const status = new StatusSequence(control, name, timeout);
      const introduction = await introduce(control, status, name, options);
      return new VhostVdpa(name, timeout, control, status, introduction);
    } catch (error) {
      closeAfter(control);
      throw error;
    }
  }

  private constructor(
    name: string,
    timeout: number,
    control: VdpaControl,
    status: StatusSequence,
    introduction: Introduction,
  ) {
    const { ranges, configSize } = introduction;
    this.address = `vhost-vdpa:${name}`;
    this.deviceType = introduction.deviceType;
    this.offeredFeatures = introduction.offeredFeatures;
    this.backendFeatures = introduction.backendFeatures;
    this.maxQueues = introduction.maxQueues;
    this.maxQueueSize = introduction.maxQueueSize;
    this.hasConfig = configSize > 0;
    this.#peer = name;
    this.#timeout = timeout;
    this.#control = control;
    this.#status = status;
    this.#configSize = configSize;
    this.#lifetime = new Lifetime(name);
    this.#memory = new TransportMemory(control, {
      ...{ maxRegions: MAX_REGIONS, peer: name },
      ...(ranges !== undefined && { ranges }),
    });
    this.#queues = new VdpaQueues(control, status, name, () => this.#changed());
  }

  /** Features in force; 0 before `negotiate`. */
  get features(): bigint {
    return this.#features;
  }

  /** Called once when the device is gone; at once when it already is. */
  get onLost(): ((error: Error) => void) | undefined {
    return this.#lifetime.onLost;
  }

  set onLost(callback: ((error: Error) => void) | undefined) {
    this.#lifetime.onLost = callback;
  }

  /**
   * Accept those of the `wanted` features that are offered and that vhost-vdpa can carry; VERSION_1 always, and
   * ACCESS_PLATFORM and ORDER_PLATFORM where offered: the device uses IOVAs, whether it says so or not. Once per
   * device that is open, also when it fails.
   *
   * @throws VirtioError ERR_VIRTIO_FEATURES when VERSION_1 is not offered or the device refuses the set,
   *   ERR_VIRTIO_STATUS the second time; what the kernel refuses.
   */
  async negotiate(wanted: bigint, options: WaitOptions = {}): Promise<bigint> {
    if (typeof wanted !== "bigint") throw typeError("wanted", "a bigint", wanted);
    if (wanted < 0n || wanted > U64_MAX) throw rangeError("wanted", "64 feature bits at most", wanted);
    return this.#change(options, () => {
      if (this.#phase !== "acknowledged") throw this.#wrongOrder("features can be negotiated once; open it again");
      this.#phase = "failed";
      try {
        // Not NOTIFICATION_DATA: an eventfd carries no data. Not RING_RESET: the kernel has no request for it.
        const features = chooseFeatures(this.offeredFeatures, wanted, {
          carried: COMMON_FEATURES | PLATFORM_FEATURES,
          required: PLATFORM_FEATURES,
          peer: this.#peer,
        });
        this.#control.setFeatures(features);
        this.#status.featuresOk(features);
        this.#features = features;
        this.#phase = "negotiated";
        return features;
      } catch (error) {
        this.#status.giveUp();
        throw error;
      }
    });
  }

  /**
   * Read 1 to 65536 bytes of the config space. There is no generation counter: what is longer than 4 bytes is read
   * until two reads in a row agree.
   *
   * @throws VirtioError ERR_VIRTIO_CONFIG when it ends before `offset + length`, or keeps changing.
   */
  async readConfig(offset: number, length: number, options: WaitOptions = {}): Promise<Uint8Array> {
    this.#checkConfigRange(offset, length);
    this.#begin(options);
    this.#checkConfigSize(offset, length);
    let bytes = this.#control.getConfig(offset, length);
    if (length <= ATOMIC_BYTES) return bytes;
    for (let reads = 1; reads < MAX_CONFIG_READS; reads++) {
      const again = this.#control.getConfig(offset, length);
      if (bytes.every((byte, i) => byte === again[i])) return again;
      bytes = again;
    }
    throw new VirtioError(
      "ERR_VIRTIO_CONFIG",
      `${length} bytes of config space at ${offset} of ${this.#peer} were different in each of ${MAX_CONFIG_READS} ` +
        "reads; the device is broken, or read less at once",
    );
  }

  /**
   * Write 1 to 65536 bytes of the config space.
   *
   * @throws VirtioError ERR_VIRTIO_CONFIG when it ends before, ERR_VIRTIO_STATUS before `negotiate`.
   */
  async writeConfig(offset: number, bytes: Uint8Array, options: WaitOptions = {}): Promise<void> {
    if (!(bytes instanceof Uint8Array)) throw typeError("bytes", "a Uint8Array", bytes);
    this.#checkConfigRange(offset, bytes.length);
    this.#begin(options);
    this.#checkNegotiated();
    this.#checkConfigSize(offset, bytes.length);
    this.#control.setConfig(offset, bytes);
  }

  /**
   * Make memory that the device can reach: a sealed memory file at an address that the device can use.
   *
   * @throws VirtioError ERR_VIRTIO_MEMORY when no region or no address is left, ERR_VIRTIO_SYSCALL when the kernel
   *   refuses: errno EFAULT, also where a device keeps memory in place and the limit of `ulimit -l` is reached.
   */
  async mapMemory(size: number, options: WaitOptions = {}): Promise<MemoryRegion> {
    checkInteger("size", size, 1);
    return this.#change(options, () => this.#memory.map(size));
  }

  /**
   * Withdraw memory from the device, then free it.
   *
   * @throws RangeError when it is not memory of this transport; what the kernel refuses, and then it stays.
   */
  async unmapMemory(region: MemoryRegion, options: WaitOptions = {}): Promise<void> {
    return this.#change(options, () => this.#memory.unmap(region));
  }

  /**
   * Configure and start all queues, each with its size, from the beginning of its rings. Once per device that is open,
   * also when it fails; not when the arguments were wrong. The kernel wants powers of two for packed queues, too.
   *
   * @throws VirtioError ERR_VIRTIO_QUEUES for a queue that the device does not have, ERR_VIRTIO_STATUS before
   *   `negotiate` or when queues run, or when the device does not start; RangeError for a wrong size or address.
   */
  async startQueues(queues: readonly QueueSetup[], options: WaitOptions = {}): Promise<QueueNotifier[]> {
    return this.#change(options, () => {
      this.#checkNegotiated();
      if (this.#phase === "running") throw this.#wrongOrder("the queues run already; open the device again");
      const packed = (this.#features & VirtioFeature.RING_PACKED) !== 0n;
      checkQueues(queues, { maxQueues: this.maxQueues, packed, memory: this.#memory });
      for (const { size } of queues) this.#checkQueueSize(size);
      this.#phase = "failed";
      const notifiers = this.#queues.start(queues, packed);
      this.#phase = "running";
      return notifiers;
    });
  }

  /**
   * Stop the device where it is: it touches no memory and sends no notification until {@link resume}. Make nothing
   * available meanwhile.
   *
   * @throws VirtioError ERR_VIRTIO_UNSUPPORTED when the device cannot, ERR_VIRTIO_STATUS when no queues run.
   */
  async suspend(options: WaitOptions = {}): Promise<void> {
    return this.#change(options, () => {
      this.#checkRunning("SUSPEND");
      this.#control.suspend();
    });
  }

  /**
   * Let the device go on after {@link suspend}; every queue is notified.
   *
   * @throws VirtioError ERR_VIRTIO_UNSUPPORTED when the device cannot: close it then. ERR_VIRTIO_STATUS when no
   *   queues run.
   */
  async resume(options: WaitOptions = {}): Promise<void> {
    return this.#change(options, () => {
      this.#checkRunning("RESUME");
      this.#control.resume();
      this.#queues.notifyAll();
    });
  }

  close(): Promise<void> {
    return this.#lifetime.close(() => this.#changes.run(() => this.#shutDown()));
  }

  /** The same as `close`. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  async #shutDown(): Promise<void> {
    // Reset first: afterwards the device touches no memory. One that cannot be reset has its memory taken all the same:
    // a device that runs in the kernel may use our addresses themselves, which are somebody else's when we unmap.
    await this.#status.reset({ timeout: this.#timeout }).catch(() => undefined);
    for (const region of this.#memory.regions) quietly(() => this.#control.remove(region));
    this.#queues.close();
    try {
      this.#control.close();
    } finally {
      // Closing the device resets it and takes all memory, whatever it answered so far.
      this.#memory.close();
      this.#lifetime.end(this.#lifetime.closedError());
    }
  }

  /** Config space or status have changed: the kernel does not say which. */
  #changed(): void {
    if (this.#lifetime.ended !== undefined) return;
    try {
      if (!this.#status.needsReset) {
        this.onConfigChange?.();
        return;
      }
    } catch (error) {
      if (!(error instanceof VirtioError)) throw error;
      this.#lifetime.end(error);
      return;
    }
    this.#lifetime.end(
      new VirtioError(
        "ERR_VIRTIO_STATUS",
        `${this.#peer} has set DEVICE_NEEDS_RESET: it met an error from which only a reset recovers; ` +
          "see the log of what serves it, then open it again",
      ),
    );
  }

  /** Run a change after those before it. */
  async #change<T>(options: WaitOptions, job: () => T | Promise<T>): Promise<T> {
    this.#begin(options);
    let result: { readonly value: T } | undefined;
    await this.#changes.run(async () => {
      this.#begin(options);
      result = { value: await job() };
    });
    if (result === undefined) throw new Error("a change that ended has a result");
    return result.value;
  }

  /** Whether an operation may begin now. */
  #begin(options: WaitOptions): void {
    const { signal } = checkWait(options, this.#timeout);
    signal?.throwIfAborted();
    this.#lifetime.check();
  }

  #checkNegotiated(): void {
    if (this.#phase === "failed") throw this.#wrongOrder("an earlier step failed; close the device and open it again");
    if (this.#phase === "acknowledged") throw this.#wrongOrder("features are not negotiated; call negotiate first");
  }

  #checkRunning(feature: "SUSPEND" | "RESUME"): void {
    if ((this.backendFeatures & VhostVdpaBackendFeature[feature]) === 0n) {
      throw new VirtioError("ERR_VIRTIO_UNSUPPORTED", `${this.#peer} does not offer ${feature}; close it instead`);
    }
    if (this.#phase !== "running") throw this.#wrongOrder("no queues run; call startQueues first");
  }

  #checkQueueSize(size: number): void {
    if (!isPowerOfTwo(size)) throw rangeError("size", "a power of two, which vhost-vdpa wants of every queue", size);
    if (size > this.maxQueueSize) throw rangeError("size", `at most ${this.maxQueueSize}`, size);
  }

  #checkConfigRange(offset: number, length: number): void {
    checkInteger("length", length, 1, MAX_CONFIG_BYTES);
    checkInteger("offset", offset, 0, U32_MAX - length);
  }

  #checkConfigSize(offset: number, length: number): void {
    if (offset + length <= this.#configSize) return;
    throw new VirtioError(
      "ERR_VIRTIO_CONFIG",
      `${length} bytes at ${offset} are beyond the ${this.#configSize} bytes of the config space of ${this.#peer}; ` +
        "use only the fields that the offered features imply",
    );
  }

  #wrongOrder(message: string): VirtioError {
    return new VirtioError("ERR_VIRTIO_STATUS", message);
  }
}

/**
 * Accepted wherever offered. The addresses we pass are IOVAs, hence ACCESS_PLATFORM, without which many drivers in the
 * kernel refuse to work. ORDER_PLATFORM asks for barriers fit for hardware: indices and flags of the rings are published
 * by Atomics, which are sequentially consistent, and the notification behind them is a system call.
 */
const PLATFORM_FEATURES = VirtioFeature.ACCESS_PLATFORM | VirtioFeature.ORDER_PLATFORM;

function checkTarget(target: VhostVdpaTarget): { name: string; open: () => VhostVdpaNode } {
  if (typeof target === "string") return checkTarget({ path: target });
  if (typeof target !== "object" || target === null) throw typeError("target", "a path, { path } or { fd }", target);
  const key = "path" in target ? "path" : "fd" in target ? "fd" : "node";
  checkOptions("target", target, [key]);
  if ("path" in target) {
    const { path } = target;
    if (typeof path !== "string") throw typeError("path", "a string", path);
    if (path === "" || path.includes("\0")) throw rangeError("path", "at least 1 byte and no NUL", path);
    return { name: path, open: () => openNode(path) };
  }
  if ("fd" in target) {
    const fd = checkInteger("fd", target.fd, 0, 0x7fff_ffff);
    return { name: `descriptor ${fd}`, open: () => nodeOf(fd) };
  }
  const { node } = target;
  if (typeof node !== "object" || node === null) throw typeError("node", "an open node", node);
  return { name: "a stand-in", open: () => node };
}

/** Close what cannot be used; why it cannot be used matters more than how that ends. */
function closeAfter(control: VdpaControl): void {
  try {
    control.close();
  } catch {
    // It is closed all the same.
  }
}
