/** The requests of a vhost-vdpa device, each by its name: what is asked, what is answered, why it was refused. */

import { VirtioError } from "../../errors.js";
import type { MemoryRegion } from "../../memory/index.js";
import { u64Codec, vringAddressCodec, vringStateCodec } from "../../protocol/vhost-user.js";
import {
  IotlbAccess,
  type IotlbMessage,
  iotlbMessageCodec,
  IotlbType,
  VDPA_CONFIG_HEADER_SIZE,
  vdpaConfigCodec,
  type VdpaIovaRange,
  vdpaIovaRangeCodec,
  VhostVdpaRequest,
  vhostVdpaRequestName,
  vringFileCodec,
} from "../../protocol/vhost-vdpa.js";
import { addressOf, errno, type EventFd, systemError } from "../../sys/index.js";
import type { RegionMapper } from "../memory.js";
import type { StatusRegister } from "../status.js";
import type { QueueSetup } from "../transport.js";
import { notVdpa, type VhostVdpaNode } from "./node.js";

/** What kernels answer to a request that they do not have; which of them depends on the version. */
const UNKNOWN_REQUEST: readonly number[] = [
  ...[errno.ENOTTY, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOBUFS],
];

/** What to try, where it is other than what the errno says of itself. */
const ADVICE: ReadonlyMap<number, string> = new Map([
  [errno.EPERM, "the device belongs to another process; it is bound to the one that used it first"],
  [errno.ENODEV, "the device is gone; `vdpa dev show` lists those that are there"],
  [errno.EIO, "the device or the program that serves it failed; see the kernel's log"],
  [errno.ETIMEDOUT, "the program that serves the device did not answer; see whether it runs"],
]);

/** The kernel says EFAULT whatever it does not like of a message, the limit of locked memory included. */
const MAP_ADVICE =
  "the kernel does not say why; a device in hardware keeps its memory in place, so raise `ulimit -l`, or ask for less; " +
  "the kernel's log may tell more";

/** One open device. Every call is one system call and waits for what the kernel does; none waits for I/O. */
export class VdpaControl implements StatusRegister, RegionMapper {
  /** Version of the IOTLB messages: 2 once it is agreed on. */
  iotlbVersion: 1 | 2 = 1;

  readonly #node: VhostVdpaNode;
  readonly #peer: string;

  /** @param peer the device, for messages. */
  constructor(node: VhostVdpaNode, peer: string) {
    this.#node = node;
    this.#peer = peer;
  }

  /**
   * Make this process the owner.
   *
   * @throws VirtioError ERR_VIRTIO_CONNECT when it is no vhost-vdpa device, ERR_VIRTIO_BUSY when it has an owner.
   */
  setOwner(): void {
    try {
      this.#introduce(VhostVdpaRequest.SET_OWNER);
    } catch (error) {
      if (!(error instanceof VirtioError) || error.errno !== errno.EBUSY) throw error;
      throw new VirtioError(
        "ERR_VIRTIO_BUSY",
        `${this.#peer} has an owner: EBUSY from ioctl; it was used before, open it anew instead`,
        { errno: error.errno, syscall: "ioctl", cause: error },
      );
    }
  }

  /**
   * Device type (virtio 1.3, clause 5).
   *
   * @throws VirtioError ERR_VIRTIO_CONNECT when it is another kind of vhost device.
   */
  getDeviceId(): number {
    return asNumber(this.#introduce(VhostVdpaRequest.GET_DEVICE_ID, new Uint8Array(4)));
  }

  /** Features of the interface; none on kernels without the request. */
  getBackendFeatures(): bigint {
    const bytes = this.#ask(VhostVdpaRequest.GET_BACKEND_FEATURES, new Uint8Array(8));
    return bytes === undefined ? 0n : u64Codec.decode(bytes);
  }

  setBackendFeatures(features: bigint): void {
    this.#call(VhostVdpaRequest.SET_BACKEND_FEATURES, u64Codec.encode(features));
  }

  /** Addresses that the device can use; undefined where the kernel does not say. */
  getIovaRange(): VdpaIovaRange | undefined {
    const bytes = this.#ask(VhostVdpaRequest.GET_IOVA_RANGE, new Uint8Array(16));
    return bytes === undefined ? undefined : vdpaIovaRangeCodec.decode(bytes);
  }

  /** Bytes of the config space; undefined where the kernel does not say. */
  getConfigSize(): number | undefined {
    const bytes = this.#ask(VhostVdpaRequest.GET_CONFIG_SIZE, new Uint8Array(4));
    return bytes === undefined ? undefined : asNumber(bytes);
  }

  /** Queues of the device; undefined on kernels before 5.18. */
  getVqsCount(): number | undefined {
    const bytes = this.#ask(VhostVdpaRequest.GET_VQS_COUNT, new Uint8Array(4));
    return bytes === undefined ? undefined : asNumber(bytes);
  }

  /** Most descriptors of any queue. */
  getVringNum(): number {
    return asNumber(this.#call(VhostVdpaRequest.GET_VRING_NUM, new Uint8Array(2)));
  }

  getFeatures(): bigint {
    return u64Codec.decode(this.#call(VhostVdpaRequest.GET_FEATURES, new Uint8Array(8)));
  }

  /**
   * The features to be in force.
   *
   * @throws VirtioError ERR_VIRTIO_FEATURES when the device refuses the set.
   */
  setFeatures(features: bigint): void {
    try {
      this.#call(VhostVdpaRequest.SET_FEATURES, u64Codec.encode(features));
    } catch (error) {
      if (!(error instanceof VirtioError) || error.errno !== errno.EINVAL) throw error;
      throw new VirtioError(
        "ERR_VIRTIO_FEATURES",
        `${this.#peer} refuses the features 0x${features.toString(16)}: EINVAL from ioctl; ask for fewer of them`,
        { errno: error.errno, syscall: "ioctl", cause: error },
      );
    }
  }

  readStatus(): number {
    return asNumber(this.#call(VhostVdpaRequest.GET_STATUS, new Uint8Array(1)));
  }

  writeStatus(status: number): void {
    this.#call(VhostVdpaRequest.SET_STATUS, Uint8Array.of(status));
  }

  /** Read config space by one request. */
  getConfig(offset: number, length: number): Uint8Array {
    const argument = vdpaConfigCodec.encode({ offset, data: new Uint8Array(length) });
    return this.#config(VhostVdpaRequest.GET_CONFIG, offset, argument).slice(VDPA_CONFIG_HEADER_SIZE);
  }

  /** Write config space by one request. */
  setConfig(offset: number, data: Uint8Array): void {
    this.#config(VhostVdpaRequest.SET_CONFIG, offset, vdpaConfigCodec.encode({ offset, data }));
  }

  /** Have `event` signalled when config space or status change. */
  setConfigCall(event: EventFd): void {
    this.#call(VhostVdpaRequest.SET_CONFIG_CALL, new Uint8Array(Int32Array.of(event.fd).buffer));
  }

  /** Size, first position and addresses of a queue, its two events, and that it is to run. */
  setUpQueue(setup: QueueSetup, base: number, events: { readonly completion: EventFd; readonly kick: EventFd }): void {
    const { index, size, descriptorArea, driverArea, deviceArea } = setup;
    const state = (num: number): Uint8Array => vringStateCodec.encode({ index, num });
    const file = (event: EventFd): Uint8Array => vringFileCodec.encode({ index, fd: event.fd });
    const areas = { index, flags: 0, desc: descriptorArea, used: deviceArea, avail: driverArea, log: 0 };
    this.#call(VhostVdpaRequest.SET_VRING_NUM, state(size));
    this.#call(VhostVdpaRequest.SET_VRING_BASE, state(base));
    this.#call(VhostVdpaRequest.SET_VRING_ADDR, vringAddressCodec.encode(areas));
    this.#call(VhostVdpaRequest.SET_VRING_CALL, file(events.completion));
    this.#call(VhostVdpaRequest.SET_VRING_KICK, file(events.kick));
    this.#call(VhostVdpaRequest.SET_VRING_ENABLE, state(1));
  }

  suspend(): void {
    this.#call(VhostVdpaRequest.SUSPEND);
  }

  resume(): void {
    this.#call(VhostVdpaRequest.RESUME);
  }

  /** Let the device reach a region. The kernel is told where it is mapped here; the device learns the IOVA alone. */
  add(region: MemoryRegion): void {
    const uaddr = addressOf(region.buffer);
    this.#tell(region, { type: IotlbType.UPDATE, uaddr, perm: IotlbAccess.READ_WRITE });
  }

  /** Take a region from the device. */
  remove(region: MemoryRegion): void {
    this.#tell(region, { type: IotlbType.INVALIDATE, uaddr: 0, perm: IotlbAccess.NONE });
  }

  /** Close the device. */
  close(): void {
    this.#node.close();
  }

  #tell({ iova, size }: MemoryRegion, message: Pick<IotlbMessage<number>, "type" | "uaddr" | "perm">): void {
    try {
      this.#node.write(iotlbMessageCodec.encode({ version: this.iotlbVersion, asid: 0, iova, size, ...message }));
    } catch (error) {
      const what = message.type === IotlbType.UPDATE ? "mapping" : "unmapping";
      throw this.#named(error, `${what} ${size} bytes at 0x${iova.toString(16)} for ${this.#peer}`, MAP_ADVICE);
    }
  }

  #call(request: number, argument: Uint8Array = new Uint8Array(0)): Uint8Array {
    try {
      this.#node.ioctl(request, argument);
      return argument;
    } catch (error) {
      throw this.#named(error, `${vhostVdpaRequestName(request)} on ${this.#peer}`);
    }
  }

  /** A request that newer kernels have; undefined when this one does not. */
  #ask(request: number, argument: Uint8Array): Uint8Array | undefined {
    try {
      return this.#call(request, argument);
    } catch (error) {
      if (error instanceof VirtioError && UNKNOWN_REQUEST.includes(error.errno ?? 0)) return undefined;
      throw error;
    }
  }

  /** A request that every vhost-vdpa device has. */
  #introduce(request: number, argument?: Uint8Array): Uint8Array {
    try {
      return this.#call(request, argument);
    } catch (error) {
      if (!(error instanceof VirtioError) || error.errno === undefined) throw error;
      if (error.errno !== errno.ENOTTY && error.errno !== errno.EINVAL) throw error;
      const { errno: code, syscall } = error;
      const why = `it does not know ${vhostVdpaRequestName(request)}`;
      throw notVdpa(this.#peer, why, { errno: code, ...(syscall !== undefined && { syscall }) });
    }
  }

  #config(request: number, offset: number, argument: Uint8Array): Uint8Array {
    try {
      return this.#call(request, argument);
    } catch (error) {
      if (!(error instanceof VirtioError)) throw error;
      if (error.errno !== errno.EINVAL && error.errno !== errno.E2BIG) throw error;
      throw new VirtioError(
        "ERR_VIRTIO_CONFIG",
        `${this.#peer} refused ${argument.length - VDPA_CONFIG_HEADER_SIZE} bytes of config space at ${offset}; ` +
          "it is probably shorter, use only the fields that the offered features imply",
        { errno: error.errno, syscall: "ioctl", cause: error },
      );
    }
  }

  #named(error: unknown, what: string, advice?: string): unknown {
    if (!(error instanceof VirtioError) || error.errno === undefined) return error;
    return systemError(-error.errno, error.syscall ?? "ioctl", what, advice ?? ADVICE.get(error.errno));
  }
}

/** The number that the kernel wrote: 1, 2 or 4 bytes in the order of the machine, which is little-endian. */
function asNumber(bytes: Uint8Array): number {
  return bytes.reduceRight((sum, byte) => sum * 0x100 + byte, 0);
}
