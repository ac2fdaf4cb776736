/** A vhost-vdpa device of a kernel that exists in this process only: every byte that a driver says to it is checked. */

import { checkInteger, checkOptions, rangeError, typeError } from "../errors.js";
import { VIRTIO_ID_BLOCK } from "../protocol/blk.js";
import { VirtioStatus } from "../protocol/device-status.js";
import { u64Codec } from "../protocol/vhost-user.js";
import {
  vdpaConfigCodec,
  vdpaIovaRangeCodec,
  VhostVdpaBackendFeature,
  VhostVdpaRequest,
  vhostVdpaRequestName,
} from "../protocol/vhost-vdpa.js";
import { duplicateFd, errno, EventFd, systemError } from "../sys/index.js";
import type { VhostVdpaNode } from "../transports/vhost-vdpa/node.js";
import type { DeviceMemory } from "../virtqueue/device-memory.js";
import { VirtioFeature } from "../virtqueue/features.js";
import type { FakeQueue } from "./fake-transport.js";
import { FakeIotlb } from "./fake-vdpa-iotlb.js";
import { FakeVdpaVrings } from "./fake-vdpa-vrings.js";
import { Refusal } from "./refusal.js";

const UNLIMITED = 0xffff_ffff_ffff_ffffn;

/** What a {@link FakeVhostVdpa} is made from. */
export interface FakeVhostVdpaOptions {
  /** Feature bits that the device offers. Default: VERSION_1 and ACCESS_PLATFORM. */
  readonly features?: bigint;
  /** What the interface offers, masks of `VhostVdpaBackendFeature`. Default: as VDUSE, bits 1 to 3. */
  readonly backendFeatures?: bigint;
  /** The device's config space; copied. Default: none. */
  readonly config?: Uint8Array;
  /** Device type (virtio 1.3, clause 5). Default 2, block. */
  readonly deviceType?: number;
  /** Queues. Default 1. */
  readonly maxQueues?: number;
  /** Most descriptors of a queue, 0 to 65535. Default 256. */
  readonly maxQueueSize?: number;
  /** Addresses that the device can use. Default: all. */
  readonly iovaRange?: { readonly first: bigint; readonly last: bigint };
  /** Requests that this kernel is too old to know, of `VhostVdpaRequest`. Default: none. */
  readonly unknown?: readonly number[];
  /** Reads of the status after a reset that still do not give 0; may be Infinity. Default 0. */
  readonly resetReads?: number;
  /** Do not keep FEATURES_OK, whatever the features are. Default false. */
  readonly refuseFeatures?: boolean;
  /** Say that the config space has so many bytes, although it has not. */
  readonly configSize?: number;
  /**
   * What the device does when the driver notifies a queue. Called in a turn of the event loop; afterwards the device
   * asks for the next notification. Default: nothing.
   */
  readonly onNotify?: (queue: FakeQueue) => void;
}

/**
 * The kernel's side of a vhost-vdpa device, with a device behind it: for tests of what drives one, where no kernel has
 * any. It takes the bytes of ioctls and IOTLB messages, keeps the kernel's rules (who comes before the owner gets
 * EPERM, a mapping over another EFAULT, and so on; stricter than the kernel in what that rounds or ignores without
 * a word), finds the memory behind the addresses and serves real virtqueues there. It records all that was said, and
 * can refuse any call.
 *
 * @throws RangeError or TypeError for a wrong option.
 * @example
 * ```ts
 * import { BlockDevice, VhostVdpa } from "virtio-driver";
 * import { encodeBlkConfig } from "virtio-driver/protocol";
 * import { FakeVhostVdpa, takeBlk } from "virtio-driver/testing";
 *
 * const kernel = new FakeVhostVdpa({
 *   config: encodeBlkConfig({ capacity: 2048n }),
 *   onNotify: (queue) => {
 *     for (const request of takeBlk(queue)) request.answer({ data: new Uint8Array(request.room).fill(7) });
 *   },
 * });
 * const disk = await BlockDevice.open(await VhostVdpa.open({ node: kernel.open() }));
 * const { buffer, bytesRead } = await disk.read(new Uint8Array(512));
 * console.log(bytesRead, buffer[511]); // 512 7
 * await disk.close();
 * console.log(kernel.log[0], kernel.log.at(-1)); // SET_OWNER close
 *
 * kernel.failures.set("SET_FEATURES", 5); // EIO
 * const again = await VhostVdpa.open({ node: kernel.open() });
 * await again.negotiate(0n).catch((error) => console.log(error.errno)); // 5
 * await again.close();
 * ```
 */
export class FakeVhostVdpa {
  /**
   * All that was said, in order: `SET_STATUS 3`, `SET_VRING_NUM 0 256`, `IOTLB_UPDATE 0x200000 67108864`, `close`, and
   * `kick 0` for each time that a notification was seen. What was refused ends as in ` -> EPERM`.
   */
  readonly log: string[] = [];
  /**
   * Calls to be refused with an errno: by the name that the log has them by, each time; or by their number, the first
   * call after `open` being 0. Calls are ioctls, IOTLB messages and `close`, which closes all the same.
   */
  readonly failures = new Map<string | number, number>();
  /** The config space as it is now. */
  readonly config: Uint8Array;
  /** Calls since `open`. */
  calls = 0;

  private readonly options: Required<Omit<FakeVhostVdpaOptions, "config" | "configSize" | "onNotify">>;
  private readonly configSize: number;
  private readonly vrings: FakeVdpaVrings;
  private readonly iotlb: FakeIotlb;
  private isOpen = false;
  private isOwned = false;
  private accepted = 0n;
  private backend = 0n;
  private statusBits = 0;
  private resetReadsLeft = 0;
  private lingeringStatus = 0;
  private configCall: EventFd | undefined = undefined;

  constructor(options: FakeVhostVdpaOptions = {}) {
    checkOptions("FakeVhostVdpa", options, [
      ...["features", "backendFeatures", "config", "deviceType", "maxQueues", "maxQueueSize", "iovaRange"],
      ...["unknown", "resetReads", "refuseFeatures", "configSize", "onNotify"],
    ]);
    const { config = new Uint8Array(0), onNotify = () => {} } = options;
    if (!(config instanceof Uint8Array)) throw typeError("config", "a Uint8Array", config);
    if (typeof onNotify !== "function") throw typeError("onNotify", "a function", onNotify);
    const { first, last } = options.iovaRange ?? { first: 0n, last: UNLIMITED };
    const u64 = (name: string, value: bigint): bigint => {
      if (typeof value !== "bigint") throw typeError(name, "a bigint", value);
      if (value < 0n || value > UNLIMITED) throw rangeError(name, "a number from 0 to 2^64 - 1", value);
      return value;
    };
    this.options = {
      features: u64("features", options.features ?? VirtioFeature.VERSION_1 | VirtioFeature.ACCESS_PLATFORM),
      backendFeatures: u64("backendFeatures", options.backendFeatures ?? DEFAULT_BACKEND_FEATURES),
      deviceType: checkInteger("deviceType", options.deviceType ?? VIRTIO_ID_BLOCK, 0, 0xffff_ffff),
      maxQueues: checkInteger("maxQueues", options.maxQueues ?? 1, 0, 0xffff_ffff),
      maxQueueSize: checkInteger("maxQueueSize", options.maxQueueSize ?? 256, 0, 0xffff),
      iovaRange: { first: u64("first", first), last: u64("last", last) },
      unknown: options.unknown ?? [],
      resetReads: options.resetReads ?? 0,
      refuseFeatures: options.refuseFeatures ?? false,
    };
    this.config = Uint8Array.from(config);
    this.configSize = checkInteger("configSize", options.configSize ?? config.length, 0, 0xffff_ffff);
    this.iotlb = new FakeIotlb(this.options.iovaRange);
    this.vrings = new FakeVdpaVrings(this.options.maxQueues, this.iotlb, {
      onKick: (index) => this.log.push(`kick ${index}`),
      onNotify,
    });
  }

  /** The queues that run, by index: from DRIVER_OK to the next reset. */
  get queues(): readonly FakeQueue[] {
    return this.vrings.queues;
  }

  /** All memory that the device can reach. */
  get memory(): DeviceMemory {
    return this.iotlb.memory;
  }

  /** Mappings that exist, those of memory that the device cannot reach included. */
  get mappings(): number {
    return this.iotlb.size;
  }

  /** The device status as the driver reads it. */
  get status(): number {
    return this.statusBits;
  }

  /** Features that the driver has accepted. */
  get features(): bigint {
    return this.accepted;
  }

  /**
   * Open the device, as `open(2)` does: that resets it.
   *
   * @throws VirtioError with errno EBUSY when it is open.
   */
  open(): VhostVdpaNode {
    if (this.isOpen) throw systemError(-errno.EBUSY, "open", "opening a fake vhost-vdpa device");
    this.isOpen = true;
    this.calls = 0;
    this.reset();
    return {
      ioctl: (request, argument = new Uint8Array(0)) => this.ioctl(request, argument),
      write: (message) => this.write(message),
      close: () => this.close(),
    };
  }

  /** The device changes its config space from byte `offset` on, and says so. */
  changeConfig(bytes: Uint8Array, offset = 0): void {
    this.config.set(bytes, offset);
    this.configCall?.signal();
  }

  /** The device meets an error, sets DEVICE_NEEDS_RESET and says so; it does nothing more. */
  breakDown(): void {
    this.statusBits |= VirtioStatus.DEVICE_NEEDS_RESET;
    this.vrings.stop();
    this.configCall?.signal();
  }

  private ioctl(request: number, argument: Uint8Array): void {
    const name = vhostVdpaRequestName(request).replace(/^VHOST_(VDPA_)?/, "");
    this.attempt(name, describe(request, argument), "ioctl", () => {
      if (!this.isOpen) throw new Refusal(errno.EBADF);
      if (this.options.unknown.includes(request)) throw new Refusal(errno.ENOTTY);
      const answer = this.answer(request, argument);
      if (answer !== undefined) argument.set(answer);
    });
  }

  private write(message: Uint8Array): void {
    const { name, detail } = FakeIotlb.describe(message);
    this.attempt(name, detail, "write", () => {
      if (!this.isOpen) throw new Refusal(errno.EBADF);
      if (!this.isOwned) throw new Refusal(errno.EFAULT);
      this.iotlb.apply(message);
    });
  }

  private close(): void {
    try {
      this.attempt("close", "", "close", () => {
        if (!this.isOpen) throw new Refusal(errno.EBADF);
      });
    } finally {
      this.reset();
      this.isOpen = false;
      this.isOwned = false;
      this.backend = 0n;
      this.vrings.release();
      this.iotlb.clear();
      this.setConfigCall(-1);
    }
  }

  /** Carry out a call, or refuse it as a test wants; write it down in either case. */
  private attempt(name: string, detail: string, syscall: string, call: () => void): void {
    const said = detail === "" ? name : `${name} ${detail}`;
    try {
      const planned = this.failures.get(this.calls++) ?? this.failures.get(name);
      if (planned !== undefined) throw new Refusal(planned);
      call();
      this.log.push(said);
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      const refused = systemError(-error.errno, syscall, said);
      this.log.push(`${said} -> ${/: (\S+) from/.exec(refused.message)?.[1] ?? error.errno}`);
      throw refused;
    }
  }

  /** What the kernel writes back; undefined when nothing. */
  private answer(request: number, argument: Uint8Array): Uint8Array | undefined {
    const { options } = this;
    switch (request) {
      case VhostVdpaRequest.SET_OWNER:
        if (this.isOwned) throw new Refusal(errno.EBUSY);
        this.isOwned = true;
        return undefined;
      case VhostVdpaRequest.GET_DEVICE_ID:
        return u32(options.deviceType);
      case VhostVdpaRequest.GET_BACKEND_FEATURES:
        return u64Codec.encode(options.backendFeatures);
      case VhostVdpaRequest.SET_BACKEND_FEATURES:
        this.backend = u64Codec.decode(argument);
        if ((this.backend & ~options.backendFeatures) !== 0n) throw new Refusal(errno.EOPNOTSUPP);
        return undefined;
      case VhostVdpaRequest.GET_IOVA_RANGE:
        return vdpaIovaRangeCodec.encode(options.iovaRange);
      case VhostVdpaRequest.GET_CONFIG_SIZE:
        return u32(this.configSize);
      case VhostVdpaRequest.GET_VQS_COUNT:
        return u32(options.maxQueues);
      case VhostVdpaRequest.GET_VRING_NUM:
        return new Uint8Array(Uint16Array.of(options.maxQueueSize).buffer);
      case VhostVdpaRequest.GET_FEATURES:
        return u64Codec.encode(options.features);
      case VhostVdpaRequest.SET_FEATURES:
        this.setFeatures(u64Codec.decode(argument));
        return undefined;
      case VhostVdpaRequest.GET_STATUS:
        return Uint8Array.of(this.readStatus());
      case VhostVdpaRequest.SET_STATUS:
        this.writeStatus(argument[0]);
        return undefined;
      case VhostVdpaRequest.GET_CONFIG: {
        const { offset, data } = this.configStretch(argument);
        return vdpaConfigCodec.encode({ offset, data: this.config.slice(offset, offset + data.length) });
      }
      case VhostVdpaRequest.SET_CONFIG: {
        const { offset, data } = this.configStretch(argument);
        this.config.set(data, offset);
        return undefined;
      }
      case VhostVdpaRequest.SET_CONFIG_CALL:
        this.setConfigCall(new DataView(argument.buffer, argument.byteOffset).getInt32(0, true));
        return undefined;
      case VhostVdpaRequest.SUSPEND:
        this.checkBackend(VhostVdpaBackendFeature.SUSPEND);
        this.vrings.isSuspended = true;
        return undefined;
      case VhostVdpaRequest.RESUME:
        this.checkBackend(VhostVdpaBackendFeature.RESUME);
        this.vrings.isSuspended = false;
        return undefined;
      default:
        this.checkOwner();
        this.vrings.ioctl(request, argument, { packed: (this.accepted & VirtioFeature.RING_PACKED) !== 0n });
        return undefined;
    }
  }

  private checkOwner(): void {
    if (!this.isOwned) throw new Refusal(errno.EPERM);
  }

  private checkBackend(feature: bigint): void {
    if ((this.options.backendFeatures & feature) === 0n) throw new Refusal(errno.EOPNOTSUPP);
  }

  private setFeatures(features: bigint): void {
    if ((this.statusBits & VirtioStatus.FEATURES_OK) !== 0) throw new Refusal(errno.EBUSY);
    const platform = this.options.features & VirtioFeature.ACCESS_PLATFORM;
    // As the drivers in the kernel: nothing that was not offered, and not without ACCESS_PLATFORM.
    if ((features & ~this.options.features) !== 0n) throw new Refusal(errno.EINVAL);
    if ((features & platform) !== platform) throw new Refusal(errno.EINVAL);
    this.accepted = features;
  }

  private readStatus(): number {
    if (this.resetReadsLeft === 0) return this.statusBits;
    this.resetReadsLeft--;
    return this.lingeringStatus;
  }

  private writeStatus(status: number): void {
    if (status === 0) {
      this.lingeringStatus = this.statusBits === 0 ? VirtioStatus.ACKNOWLEDGE : this.statusBits;
      this.resetReadsLeft = this.options.resetReads;
      this.reset();
      return;
    }
    if ((this.statusBits & ~status) !== 0) throw new Refusal(errno.EINVAL);
    const added = status & ~this.statusBits;
    this.statusBits = status;
    if (this.options.refuseFeatures) this.statusBits &= ~VirtioStatus.FEATURES_OK;
    if ((added & VirtioStatus.DRIVER_OK) !== 0 && !this.vrings.start(this.accepted)) this.breakDown();
  }

  private configStretch(argument: Uint8Array): { offset: number; data: Uint8Array } {
    const stretch = vdpaConfigCodec.decode(argument);
    const { offset, data } = stretch;
    if (data.length === 0 || offset + data.length > this.config.length) throw new Refusal(errno.EINVAL);
    return stretch;
  }

  private setConfigCall(fd: number): void {
    const event = fd < 0 ? undefined : EventFd.fromFd(duplicateFd(fd));
    this.configCall?.close();
    this.configCall = event;
  }

  private reset(): void {
    this.statusBits = 0;
    this.accepted = 0n;
    this.vrings.reset();
  }
}

const DEFAULT_BACKEND_FEATURES =
  VhostVdpaBackendFeature.IOTLB_MSG_V2 | VhostVdpaBackendFeature.IOTLB_BATCH | VhostVdpaBackendFeature.IOTLB_ASID;

function u32(value: number): Uint8Array {
  return new Uint8Array(Uint32Array.of(value).buffer);
}

/** The argument of a request that takes one, as numbers. */
function describe(request: number, argument: Uint8Array): string {
  // Bit 30 of the number: the kernel reads the argument.
  if ((request & 0x4000_0000) === 0) return "";
  const view = new DataView(argument.buffer, argument.byteOffset, argument.byteLength);
  switch (request) {
    case VhostVdpaRequest.SET_FEATURES:
    case VhostVdpaRequest.SET_BACKEND_FEATURES:
      return `0x${view.getBigUint64(0, true).toString(16)}`;
    case VhostVdpaRequest.SET_STATUS:
      return `${view.getUint8(0)}`;
    case VhostVdpaRequest.SET_CONFIG:
      return `${view.getUint32(0, true)} ${Buffer.from(argument.subarray(8)).toString("hex")}`;
    case VhostVdpaRequest.SET_VRING_NUM:
    case VhostVdpaRequest.SET_VRING_ENABLE:
      return `${view.getUint32(0, true)} ${view.getUint32(4, true)}`;
    case VhostVdpaRequest.SET_VRING_BASE:
      return `${view.getUint32(0, true)} 0x${view.getUint32(4, true).toString(16)}`;
    case VhostVdpaRequest.SET_VRING_ADDR:
      return [0, 8, 24, 16]
        .map((at) => (at === 0 ? view.getUint32(0, true) : `0x${view.getBigUint64(at, true).toString(16)}`))
        .join(" ");
    case VhostVdpaRequest.SET_VRING_CALL:
    case VhostVdpaRequest.SET_VRING_KICK:
      // Not the descriptor: its number is nobody's business.
      return `${view.getUint32(0, true)}`;
    default:
      return "";
  }
}
