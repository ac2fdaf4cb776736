/** The queues of a fake vhost-vdpa device: what the driver says of them, and devices' halves on its memory. */

import { VirtioError } from "../errors.js";
import { VRING_BASE_PACKED, VRING_BASE_SPLIT, vringAddressCodec, vringStateCodec } from "../protocol/vhost-user.js";
import { VhostVdpaRequest, vringFileCodec } from "../protocol/vhost-vdpa.js";
import { duplicateFd, errno, EventFd, FdWatcher } from "../sys/index.js";
import { isPowerOfTwo, VirtqueueLayout } from "../virtqueue/layout.js";
import { FakeDevice } from "./fake-device.js";
import { FakeQueue } from "./fake-transport.js";
import type { FakeIotlb } from "./fake-vdpa-iotlb.js";
import { Refusal } from "./refusal.js";

const MAX_VRING_SIZE = 0x8000;

/** What is known of one queue. */
interface Vring {
  size: number;
  isEnabled: boolean;
  /** Descriptor, driver and device area. */
  areas: readonly [bigint, bigint, bigint];
  completion: EventFd | undefined;
  kick: FdWatcher | undefined;
  queue: FakeQueue | undefined;
}

/** All queues of one device. */
export class FakeVdpaVrings {
  /** The device stands still. */
  isSuspended = false;

  private readonly count: number;
  private readonly iotlb: FakeIotlb;
  private readonly hooks: { onKick(index: number): void; onNotify(queue: FakeQueue): void };
  private readonly vrings = new Map<number, Vring>();

  constructor(
    count: number,
    iotlb: FakeIotlb,
    hooks: { onKick(index: number): void; onNotify(queue: FakeQueue): void },
  ) {
    this.count = count;
    this.iotlb = iotlb;
    this.hooks = hooks;
  }

  /** The queues that run, by index. */
  get queues(): FakeQueue[] {
    return [...this.vrings.values()].flatMap(({ queue }) => (queue === undefined ? [] : [queue]));
  }

  /** Carry out a request about one queue. */
  ioctl(request: number, argument: Uint8Array, { packed }: { packed: boolean }): void {
    if (argument.length < 8) throw new Refusal(errno.ENOTTY);
    const { index, num } = vringStateCodec.decode(argument.subarray(0, 8));
    if (index >= this.count) throw new Refusal(errno.ENOBUFS);
    const vring = this.vring(index);
    switch (request) {
      case VhostVdpaRequest.SET_VRING_NUM:
        if (num === 0 || num > MAX_VRING_SIZE || !isPowerOfTwo(num)) throw new Refusal(errno.EINVAL);
        vring.size = num;
        return;
      case VhostVdpaRequest.SET_VRING_BASE:
        // As virtio-pci behind vDPA, which can begin at the beginning only.
        if (num !== (packed ? VRING_BASE_PACKED : VRING_BASE_SPLIT)) throw new Refusal(errno.EINVAL);
        return;
      case VhostVdpaRequest.SET_VRING_ADDR: {
        const { flags, desc, avail, used } = vringAddressCodec.decode(argument);
        if (flags > 1) throw new Refusal(errno.EOPNOTSUPP);
        if (desc % 16n !== 0n || avail % 2n !== 0n || used % 4n !== 0n) throw new Refusal(errno.EINVAL);
        vring.areas = [desc, avail, used];
        return;
      }
      case VhostVdpaRequest.SET_VRING_CALL: {
        const event = this.eventOf(argument);
        vring.completion?.close();
        vring.completion = event;
        return;
      }
      case VhostVdpaRequest.SET_VRING_KICK: {
        const event = this.eventOf(argument);
        vring.kick?.close();
        vring.kick = event === undefined ? undefined : this.watch(index, event);
        return;
      }
      case VhostVdpaRequest.SET_VRING_ENABLE:
        if (num > 1) throw new Refusal(errno.EINVAL);
        vring.isEnabled = num === 1;
        return;
      default:
        throw new Refusal(errno.ENOTTY);
    }
  }

  /**
   * DRIVER_OK: serve the queues that are enabled.
   *
   * @returns false when there is no queue where the driver says that one is.
   */
  start(features: bigint): boolean {
    for (const [index, vring] of this.vrings) {
      if (!vring.isEnabled) continue;
      const queue = this.queueOf(index, vring, features);
      if (queue === undefined) return false;
      vring.queue = queue;
    }
    return true;
  }

  /** The device does nothing more; the driver's settings stay. */
  stop(): void {
    for (const vring of this.vrings.values()) vring.queue = undefined;
  }

  /** The device is reset: only the eventfds stay, which are the kernel's. */
  reset(): void {
    this.stop();
    this.isSuspended = false;
    for (const vring of this.vrings.values()) vring.isEnabled = false;
  }

  /** The device is closed. */
  release(): void {
    for (const { completion, kick } of this.vrings.values()) {
      completion?.close();
      kick?.close();
    }
    this.vrings.clear();
  }

  private vring(index: number): Vring {
    const known = this.vrings.get(index);
    if (known !== undefined) return known;
    const vring: Vring = {
      ...{ size: 0, isEnabled: false, areas: [0n, 0n, 0n] },
      ...{ completion: undefined, kick: undefined, queue: undefined },
    };
    this.vrings.set(index, vring);
    return vring;
  }

  private eventOf(argument: Uint8Array): EventFd | undefined {
    const { fd } = vringFileCodec.decode(argument);
    if (fd < 0) return undefined;
    try {
      return EventFd.fromFd(duplicateFd(fd));
    } catch (error) {
      if (error instanceof VirtioError && error.errno !== undefined) throw new Refusal(error.errno);
      throw error;
    }
  }

  private watch(index: number, event: EventFd): FdWatcher {
    const onKick = (): void => {
      this.hooks.onKick(index);
      const queue = this.vrings.get(index)?.queue;
      if (queue !== undefined && !this.isSuspended) queue.serve((each) => this.hooks.onNotify(each));
    };
    try {
      const watcher = new FdWatcher(event.fd, { drain: true }, onKick);
      watcher.unref();
      return watcher;
    } finally {
      event.close();
    }
  }

  /** The device's half of a queue, whose areas lie one behind the other as in `VirtqueueLayout`. */
  private queueOf(index: number, vring: Vring, features: bigint): FakeQueue | undefined {
    const { size, completion } = vring;
    const [descriptorArea, driverArea, deviceArea] = vring.areas.map(Number);
    if (size === 0 || completion === undefined) return undefined;
    const layout = new VirtqueueLayout({ queueSize: size, features });
    if (driverArea !== descriptorArea + layout.driverAreaOffset) return undefined;
    if (deviceArea !== descriptorArea + layout.deviceAreaOffset) return undefined;
    const place = this.iotlb.find(descriptorArea, layout.endOffset);
    if (place === undefined) return undefined;
    const device = new FakeDevice({ layout, ...place, iova: descriptorArea, features, memory: this.iotlb.memory });
    return new FakeQueue({ index, size, descriptorArea, driverArea, deviceArea }, device, completion);
  }
}
