/** A scriptable device on ring memory: takes requests, holds them back, completes them in any order. */

import { checkInteger, checkOptions, rangeError } from "../errors.js";
import { DescriptorChain } from "../virtqueue/device-chain.js";
import { DeviceMemory } from "../virtqueue/device-memory.js";
import { DeviceVirtqueue } from "../virtqueue/device.js";
import { VirtioFeature } from "../virtqueue/features.js";
import type { VirtqueueLayout } from "../virtqueue/layout.js";

/**
 * Memory that a fake device sees: one buffer, whose first byte has the address `address`.
 *
 * @throws RangeError when the address is negative or not a whole number, or the buffer is empty.
 * @example
 * ```ts
 * import { linearMemory } from "virtio-driver/testing";
 * const memory = linearMemory(new ArrayBuffer(4096), 0x10000);
 * console.log(memory.find(0x10fff, 0, 1), memory.find(0x10fff, 0, 2)); // 0 -1
 * ```
 */
export function linearMemory(buffer: ArrayBuffer, address = 0): DeviceMemory {
  const memory = new DeviceMemory();
  memory.add(BigInt(checkInteger("address", address, 0)), buffer);
  return memory;
}

/** What a {@link FakeDevice} is made from: the same values as the driver's `Virtqueue`. */
export interface FakeDeviceOptions {
  /** Sizes and offsets of the queue. */
  readonly layout: VirtqueueLayout;
  /** The memory that the driver's half works on. */
  readonly buffer: ArrayBuffer;
  /** Byte offset of the queue in `buffer`. Default 0. */
  readonly offset?: number;
  /** Address of the queue for the device. Default: `offset`. */
  readonly iova?: number;
  /** Negotiated features: EVENT_IDX and INDIRECT_DESC matter; the format is that of the layout. */
  readonly features?: bigint;
  /** All memory that descriptors may point to. Default: `buffer`, so that the queue lies at `iova`. */
  readonly memory?: DeviceMemory;
  /** Where the queue goes on, in the form of vhost-user's `SET_VRING_BASE`. Default: a fresh queue. */
  readonly base?: number;
}

/** A request that a {@link FakeDevice} holds. */
export class FakeRequest {
  /** Head descriptor (split) or buffer id (packed). */
  readonly id: number;
  /** Ring descriptors. */
  readonly ringCount: number;
  /** Bytes of each element that the device may read, in order. */
  readonly readableLengths: readonly number[];
  /** Bytes of each element that the device may write, in order. */
  readonly writableLengths: readonly number[];
  /** End of what {@link write} wrote so far, in bytes from the start of the writable elements. */
  written = 0;

  private readonly chain: DescriptorChain;
  private readonly memory: DeviceMemory;

  constructor(chain: DescriptorChain, memory: DeviceMemory) {
    const lengths = Array.from(chain.length.subarray(0, chain.count));
    this.id = chain.id;
    this.ringCount = chain.ringCount;
    this.readableLengths = lengths.slice(0, chain.readableCount);
    this.writableLengths = lengths.slice(chain.readableCount);
    this.chain = chain;
    this.memory = memory;
  }

  /** All bytes that the driver sent, read now. */
  read(): Uint8Array {
    const bytes = new Uint8Array(this.chain.readableBytes);
    this.chain.read(this.memory, 0, bytes);
    return bytes;
  }

  /**
   * Write bytes into the writable elements, from byte `position` of them.
   *
   * @returns this request.
   * @throws RangeError when they do not fit.
   */
  write(bytes: Uint8Array, position = 0): this {
    checkInteger("position", position, 0, this.chain.writableBytes);
    if (position + bytes.length > this.chain.writableBytes) {
      throw rangeError("bytes", `at most ${this.chain.writableBytes - position} bytes`, bytes.length);
    }
    this.chain.write(this.memory, position, bytes);
    this.written = Math.max(this.written, position + bytes.length);
    return this;
  }

  /** Fill what the driver sent with `byte`, although a device may only read it. */
  scribble(byte: number): void {
    const { offset, length, region, readableCount } = this.chain;
    for (let i = 0; i < readableCount; i++) {
      this.memory.bytes[region[i]].fill(byte, offset[i], offset[i] + length[i]);
    }
  }
}

/**
 * A device that does what a test tells it, on the same memory as a driver's `Virtqueue`. It is built on the
 * device's half that the embedded back-end uses, so it checks all that the driver writes.
 *
 * @example
 * ```ts
 * import { Virtqueue, VirtqueueLayout } from "virtio-driver";
 * import { FakeDevice } from "virtio-driver/testing";
 *
 * const layout = new VirtqueueLayout({ queueSize: 4 });
 * const buffer = new ArrayBuffer(4096);
 * const queue = new Virtqueue({ layout, buffer, iova: 0x10000, features: 0n });
 * const device = new FakeDevice({ layout, buffer, iova: 0x10000 });
 *
 * for (const address of [0x10800, 0x10900]) {
 *   queue.begin(1);
 *   queue.push(address, 0, 16, true);
 *   queue.commit();
 * }
 * queue.publish();
 *
 * const [first, second] = device.take(); // both requests, held back
 * device.complete(second.write(new Uint8Array([7]))); // the later one first
 * device.publish();
 * console.log(queue.poll() === second.id, queue.usedLength, queue.poll()); // true 1 -1
 * device.complete(first);
 * console.log(device.publish()); // true: the driver wants a notification
 * ```
 */
export class FakeDevice {
  /** Negotiated features. */
  readonly features: bigint;
  /** Sizes and offsets of the queue. */
  readonly layout: VirtqueueLayout;
  /** The memory that the queue lies in. */
  readonly buffer: ArrayBuffer;
  /** Byte offset of the queue in `buffer`. */
  readonly offset: number;
  /** The device's half of the queue, for what this class does not offer. */
  readonly queue: DeviceVirtqueue;
  /** All memory that descriptors may point to. */
  readonly memory: DeviceMemory;
  /** Times that `publish` found that the driver wants a notification. */
  notifications = 0;

  private readonly requests: FakeRequest[] = [];

  constructor(options: FakeDeviceOptions) {
    checkOptions("FakeDevice", options, [...["layout", "buffer", "offset", "iova", "features", "memory", "base"]]);
    const { layout, buffer, offset = 0, features = 0n } = options;
    const { iova = offset } = options;
    const packed = VirtioFeature.RING_PACKED;
    this.features = features;
    this.layout = layout;
    this.buffer = buffer;
    this.offset = offset;
    this.memory = options.memory ?? linearMemory(buffer, iova - offset);
    this.queue = new DeviceVirtqueue({
      queueSize: layout.queueSize,
      features: layout.packed ? features | packed : features & ~packed,
      memory: this.memory,
      descriptorArea: { buffer, offset },
      driverArea: { buffer, offset: offset + layout.driverAreaOffset },
      deviceArea: { buffer, offset: offset + layout.deviceAreaOffset },
      ...(options.base !== undefined && { base: options.base }),
    });
  }

  /** The requests taken and not completed, oldest first. */
  get held(): readonly FakeRequest[] {
    return this.requests;
  }

  /**
   * Take available requests and hold them.
   *
   * @param max - at most so many. Default: all there are.
   * @throws VirtioError ERR_VIRTIO_QUEUE_BROKEN when the driver wrote something impossible.
   */
  take(max = Number.POSITIVE_INFINITY): FakeRequest[] {
    const taken: FakeRequest[] = [];
    while (taken.length < max) {
      const chain = new DescriptorChain(this.queue.queueSize);
      if (!this.queue.pop(chain)) break;
      taken.push(new FakeRequest(chain, this.memory));
    }
    this.requests.push(...taken);
    return taken;
  }

  /**
   * Give one held request back, whatever its place. The driver sees it after {@link publish}.
   *
   * @param written - the length to report. Default: what the request's `write` wrote.
   * @throws RangeError when the request is not held.
   */
  complete(request: FakeRequest, written = request.written): void {
    const at = this.requests.indexOf(request);
    if (at < 0) throw rangeError("request", "one that is held", request.id);
    this.requests.splice(at, 1);
    this.queue.push(request.id, request.ringCount, written);
  }

  /**
   * Give the oldest `count` held requests back by a single used entry, as a device with IN_ORDER may.
   *
   * @param written - the length to report for the last of them. Default: what its `write` wrote.
   * @throws RangeError when fewer are held.
   */
  completeBatch(count: number, written?: number): void {
    checkInteger("count", count, 1, this.requests.length);
    const batch = this.requests.splice(0, count);
    const last = batch[count - 1];
    const ringCount = batch.reduce((sum, request) => sum + request.ringCount, 0);
    this.queue.pushBatch(last.id, count, ringCount, written ?? last.written);
  }

  /**
   * Write a used entry that answers no request, as a broken or hostile device would.
   *
   * @param ringCount - descriptors to move on by; matters on packed queues only.
   */
  forge(id: number, written: number, ringCount = 1): void {
    this.queue.push(id, ringCount, written);
  }

  /**
   * Make completed requests visible.
   *
   * @returns whether the driver wants a notification.
   */
  publish(): boolean {
    const wanted = this.queue.publish();
    if (wanted) this.notifications++;
    return wanted;
  }

  /** Ask the driver not to notify; it need not obey. */
  disableNotifications(): void {
    this.queue.disableNotifications();
  }

  /**
   * Ask the driver to notify at the next request.
   *
   * @returns whether requests became available meanwhile.
   */
  enableNotifications(): boolean {
    return this.queue.enableNotifications();
  }
}
