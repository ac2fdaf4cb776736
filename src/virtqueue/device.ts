/** The device's half of a virtqueue, split or packed, behind one class. */

import { checkInteger, checkOptions, rangeError } from "../errors.js";
import {
  AVAIL_ALIGN,
  AVAIL_RING_OFFSET,
  DESC_ALIGN,
  DESC_SIZE,
  EVENT_SUPPRESS_ALIGN,
  EVENT_SUPPRESS_SIZE,
  USED_ALIGN,
  USED_ELEM_SIZE,
  USED_RING_OFFSET,
} from "./defs.js";
import type { DescriptorChain } from "./device-chain.js";
import type { DeviceMemory } from "./device-memory.js";
import { DevicePackedRing } from "./device-packed.js";
import type { DeviceRingOptions, RingArea } from "./device-ring.js";
import { DeviceSplitRing } from "./device-split.js";
import { VirtioFeature } from "./features.js";
import { checkQueueSize } from "./layout.js";

/** Bytes and alignment that the specification asks for one area. */
export interface RingAreaShape {
  /** Bytes, the trailing event field included. */
  readonly size: number;
  /** Alignment in bytes. */
  readonly align: number;
}

/**
 * Size and alignment of the three areas of a ring, as virtio 1.3 has them (2.7, 2.8.10).
 *
 * @throws RangeError for a queue size that the format does not allow.
 * @example
 * ```ts
 * import { ringAreas } from "virtio-driver/virtqueue";
 * console.log(ringAreas(8, false).deviceArea); // { size: 70, align: 4 }
 * ```
 */
export function ringAreas(
  queueSize: number,
  packed: boolean,
): { descriptorArea: RingAreaShape; driverArea: RingAreaShape; deviceArea: RingAreaShape } {
  const n = checkQueueSize(queueSize, packed);
  const event = { size: EVENT_SUPPRESS_SIZE, align: EVENT_SUPPRESS_ALIGN };
  return {
    descriptorArea: { size: DESC_SIZE * n, align: DESC_ALIGN },
    driverArea: packed ? event : { size: AVAIL_RING_OFFSET + 2 * n + 2, align: AVAIL_ALIGN },
    deviceArea: packed ? event : { size: USED_RING_OFFSET + USED_ELEM_SIZE * n + 2, align: USED_ALIGN },
  };
}

/** What a {@link DeviceVirtqueue} is made from. */
export interface DeviceVirtqueueOptions {
  /** Descriptors: 1 to 32768, on split rings a power of two. */
  readonly queueSize: number;
  /** Negotiated features: RING_PACKED, EVENT_IDX and INDIRECT_DESC matter here. */
  readonly features: bigint;
  /** The driver's memory, for descriptors and indirect tables. */
  readonly memory: DeviceMemory;
  /** Where the descriptor area is mapped. */
  readonly descriptorArea: RingArea;
  /** Where the driver area is mapped. */
  readonly driverArea: RingArea;
  /** Where the device area is mapped. */
  readonly deviceArea: RingArea;
  /**
   * Where to go on, as vhost-user's `SET_VRING_BASE` has it. Default: a fresh ring (split 0, packed
   * 0x80008000). The used index of a split ring is taken from the ring itself.
   */
  readonly base?: number;
}

/**
 * The device's half of one virtqueue over memory that a driver shares. It trusts nothing in that memory: each
 * field is read once, bounds, loops and counts are checked, and an impossible value breaks the queue with
 * `ERR_VIRTIO_QUEUE_BROKEN`, from then on thrown by every `pop`.
 *
 * `pop` takes chains in the order the driver made them available; `push` gives them back in any order;
 * `publish` makes everything pushed visible at once and tells whether the driver wants a notification.
 *
 * @throws RangeError for a wrong queue size or base, or an area that is unaligned or outside its buffer.
 *   VirtioError ERR_VIRTIO_QUEUE_BROKEN when the used index in the ring cannot belong to `base`.
 * @example
 * ```ts
 * import { DescriptorChain, DeviceMemory, DeviceVirtqueue } from "virtio-driver/virtqueue";
 * import { Virtqueue, VirtqueueLayout } from "virtio-driver";
 * const buffer = new ArrayBuffer(4096);
 * const layout = new VirtqueueLayout({ queueSize: 8 });
 * const driver = new Virtqueue({ layout, buffer, iova: 0x10000, features: 0n });
 * const memory = new DeviceMemory();
 * memory.add(0x10000n, buffer);
 * const device = new DeviceVirtqueue({
 *   queueSize: 8,
 *   features: 0n,
 *   memory,
 *   descriptorArea: { buffer, offset: 0 },
 *   driverArea: { buffer, offset: layout.driverAreaOffset },
 *   deviceArea: { buffer, offset: layout.deviceAreaOffset },
 * });
 * driver.begin(1);
 * driver.push(0x10800, 0, 5, true); // 5 bytes for the device to write
 * const slot = driver.commit();
 * driver.publish();
 *
 * const chain = new DescriptorChain(8);
 * device.pop(chain);
 * const written = chain.write(memory, 0, new TextEncoder().encode("hello"));
 * device.push(chain.id, chain.ringCount, written);
 * device.publish();
 * console.log(driver.poll() === slot, driver.usedLength); // true 5
 * ```
 */
export class DeviceVirtqueue {
  /** Descriptors. */
  readonly queueSize: number;

  private readonly isPacked: boolean;
  // Both halves are there in the eyes of V8, one of them never used: call sites stay monomorphic.
  private readonly split!: DeviceSplitRing;
  private readonly packed!: DevicePackedRing;
  private broken: Error | undefined;

  constructor(options: DeviceVirtqueueOptions) {
    checkOptions("DeviceVirtqueue", options, [
      ...["queueSize", "features", "memory", "descriptorArea", "driverArea", "deviceArea", "base"],
    ]);
    const { queueSize, features, memory, descriptorArea, driverArea, deviceArea } = options;
    this.isPacked = (features & VirtioFeature.RING_PACKED) !== 0n;
    const shapes = ringAreas(queueSize, this.isPacked);
    checkArea("descriptorArea", descriptorArea, shapes.descriptorArea);
    checkArea("driverArea", driverArea, shapes.driverArea);
    checkArea("deviceArea", deviceArea, shapes.deviceArea);
    this.queueSize = queueSize;
    const ring: DeviceRingOptions = {
      ...{ queueSize, memory, descriptorArea, driverArea, deviceArea },
      eventIdx: (features & VirtioFeature.EVENT_IDX) !== 0n,
      indirect: (features & VirtioFeature.INDIRECT_DESC) !== 0n,
      base: checkInteger("base", options.base ?? (this.isPacked ? 0x8000_8000 : 0), 0, 0xffff_ffff),
    };
    if (this.isPacked) this.packed = new DevicePackedRing(ring);
    else this.split = new DeviceSplitRing(ring);
  }

  /**
   * Take the next available chain into `chain`.
   *
   * @returns false when nothing is available.
   * @throws VirtioError ERR_VIRTIO_QUEUE_BROKEN when the driver made something impossible available;
   *   RangeError when `chain` was made for a smaller queue.
   */
  pop(chain: DescriptorChain): boolean {
    if (this.broken !== undefined) throw this.broken;
    if (chain.length.length < this.queueSize) {
      throw rangeError("chain", `room for ${this.queueSize} elements`, chain.length.length);
    }
    try {
      return this.isPacked ? this.packed.pop(chain) : this.split.pop(chain);
    } catch (error) {
      this.broken = error instanceof Error ? error : new Error(String(error));
      throw error;
    }
  }

  /**
   * Take a chain again that another device took before this one went on in its place. `base` counts it as taken.
   *
   * @param id - what names it to the driver: its head (split) or buffer id (packed).
   * @param descriptors - packed rings only: its ring descriptors as they were, 4 words each. Those in the ring may be
   *   overwritten by used entries.
   * @throws VirtioError ERR_VIRTIO_QUEUE_BROKEN when it is impossible.
   */
  refetch(chain: DescriptorChain, id: number, descriptors?: Uint32Array): void {
    if (descriptors === undefined) this.split.refetch(chain, id);
    else this.packed.refetch(chain, descriptors);
    chain.id = id;
  }

  /**
   * How many chains seem to be available, at most `limit`: a hint about the load, by plain reads, for nothing else. On
   * packed rings it takes them to have as many descriptors as the one popped last.
   */
  backlog(limit: number): number {
    return this.isPacked ? this.packed.backlog(limit) : this.split.backlog(limit);
  }

  /**
   * Give a chain back. The driver does not see it before {@link publish}.
   *
   * @param id - `id` of the chain.
   * @param ringCount - `ringCount` of the chain.
   * @param written - bytes written from the start of its first writable element.
   */
  push(id: number, ringCount: number, written: number): void {
    if (this.isPacked) this.packed.push(id, ringCount, written);
    else this.split.push(id, 1, written);
  }

  /**
   * Give a batch of chains back by one used entry, as IN_ORDER allows (virtio 1.3, 2.7.9 and 2.8.9). The
   * chains must be the oldest that the device holds, in the order they were popped.
   *
   * @param lastId - `id` of the last chain of the batch.
   * @param chains - how many chains, at least 1.
   * @param ringCount - sum of their `ringCount`.
   * @param written - bytes written into the last one.
   */
  pushBatch(lastId: number, chains: number, ringCount: number, written: number): void {
    if (this.isPacked) this.packed.push(lastId, ringCount, written);
    else this.split.push(lastId, chains, written);
  }

  /**
   * Make every chain given back visible to the driver.
   *
   * @returns whether the driver must be notified; never true when nothing was pushed.
   */
  publish(): boolean {
    return this.isPacked ? this.packed.publish() : this.split.publish();
  }

  /** Ask the driver not to send available buffer notifications. Some may still come. */
  disableNotifications(): void {
    if (this.isPacked) this.packed.disableNotifications();
    else this.split.disableNotifications();
  }

  /**
   * Ask the driver for a notification at the next chain. To be called after every drain, before waiting.
   *
   * @returns whether chains became available meanwhile: then pop again before waiting.
   */
  enableNotifications(): boolean {
    return this.isPacked ? this.packed.enableNotifications() : this.split.enableNotifications();
  }

  /**
   * Where the queue stands, in the form of vhost-user's `GET_VRING_BASE`: split the next available index;
   * packed next available (bits 0-14, wrap 15) and next used position (bits 16-30, wrap 31).
   */
  get base(): number {
    return this.isPacked ? this.packed.base : this.split.base;
  }
}

function checkArea(name: string, area: RingArea, shape: RingAreaShape): void {
  const { buffer, offset } = area;
  checkInteger(`${name}.offset`, offset, 0, buffer.byteLength);
  if (offset % shape.align !== 0) throw rangeError(`${name}.offset`, `a multiple of ${shape.align}`, offset);
  if (offset + shape.size > buffer.byteLength) {
    throw rangeError(`${name}.offset`, `room for ${shape.size} bytes in ${buffer.byteLength}`, offset);
  }
}
