/** A driver's ring on memory that a test reads and writes byte by byte, as the specification lays it out. */

import type { IndirectTables, RequestFrame } from "../../src/virtqueue/index.js";
import { VirtioFeature, Virtqueue, VirtqueueLayout } from "../../src/virtqueue/index.js";
import { FakeDevice } from "../../src/testing/fake-device.js";

/** Address of the first byte of the memory; above 4 GiB, so that mixing up the halves of addresses shows. */
export const BASE = 0x7_8000_0000;
/** The queue begins here in the memory, and bytes in front of it belong to somebody else. */
export const QUEUE_OFFSET = 64;
/** Address of memory that no test looks into. */
export const DATA = 0x9_1234_5000;

const REQUEST = { size: 48, align: 16 } as const;
export const FRAME: RequestFrame = { headerLength: 16, trailerOffset: 32, trailerLength: 1 };

export interface RawOptions {
  readonly size: number;
  readonly packed?: boolean;
  readonly eventIdx?: boolean;
  readonly inOrder?: boolean;
  /** Entries of the indirect tables; 0, the default, for no such feature. */
  readonly tables?: number;
  /** Queue index. */
  readonly index?: number;
}

/** A descriptor as it stands in memory. */
export interface RawDescriptor {
  readonly addr: bigint;
  readonly len: number;
  readonly flags: number;
  /** `next` of a split, `id` of a packed descriptor. */
  readonly tail: number;
}

export class RawRing {
  readonly packed: boolean;
  readonly features: bigint;
  readonly layout: VirtqueueLayout;
  readonly buffer: ArrayBuffer;
  readonly bytes: Uint8Array;
  readonly view: DataView;
  readonly queue: Virtqueue;
  readonly tablesOffset: number;
  readonly tables: number;

  constructor(options: RawOptions) {
    const { size, packed = false, eventIdx = false, inOrder = false, tables = 0, index = 0 } = options;
    this.packed = packed;
    this.tables = tables;
    this.features =
      VirtioFeature.VERSION_1 |
      (packed ? VirtioFeature.RING_PACKED : 0n) |
      (eventIdx ? VirtioFeature.EVENT_IDX : 0n) |
      (inOrder ? VirtioFeature.IN_ORDER : 0n) |
      (tables > 0 ? VirtioFeature.INDIRECT_DESC : 0n);
    this.layout = new VirtqueueLayout({ queueSize: size, features: this.features, request: REQUEST });
    this.tablesOffset = QUEUE_OFFSET + this.layout.endOffset;
    this.buffer = new ArrayBuffer(this.tablesOffset + size * Math.max(1, tables) * 16 + 64);
    this.bytes = new Uint8Array(this.buffer).fill(0xff);
    this.view = new DataView(this.buffer);
    const indirect: IndirectTables = { offset: this.tablesOffset, iova: BASE + this.tablesOffset, entries: tables };
    this.queue = new Virtqueue({
      ...{ layout: this.layout, index, buffer: this.buffer, offset: QUEUE_OFFSET, iova: BASE + QUEUE_OFFSET },
      ...{ features: this.features, frame: FRAME, ...(tables > 0 && { indirect }) },
    });
  }

  /** An honest device on the same memory, where elements are the memory itself: use {@link own} addresses. */
  device(): FakeDevice {
    const { layout, buffer, features } = this;
    return new FakeDevice({ layout, buffer, offset: QUEUE_OFFSET, iova: BASE + QUEUE_OFFSET, features });
  }

  /** Address of the 16 bytes of data of a slot, inside the memory of the ring. */
  own(slot: number): number {
    return BASE + this.queue.slotOffset(slot) + 16;
  }

  /** Add a chain of 16-byte elements of the ring's own memory; returns its slot. */
  add(readable: number, writable: number): number {
    const { queue } = this;
    const slot = queue.begin(readable + writable);
    if (slot < 0) return slot;
    const address = this.own(slot);
    for (let i = 0; i < readable + writable; i++) {
      queue.push(address >>> 0, Math.floor(address / 2 ** 32), 16, i >= readable);
    }
    return queue.commit();
  }

  /** Add a framed request on the ring's own memory. */
  addFramed(writable = true): number {
    const address = BASE + QUEUE_OFFSET + this.layout.reqOffset + 16;
    return this.queue.addFramed(address | 0, Math.floor(address / 2 ** 32), 16, writable);
  }

  /** Let `count` single-descriptor chains pass, one after the other, so that the positions move on. */
  advance(device: FakeDevice, count: number): void {
    for (let done = 0; done < count; done++) {
      this.add(0, 1);
      this.queue.publish();
      const [request] = device.take();
      device.complete(request);
      device.publish();
      this.queue.poll();
    }
  }

  /** Descriptor `i` of the ring. */
  desc(i: number): RawDescriptor {
    return this.descriptorAt(QUEUE_OFFSET + 16 * i);
  }

  /** All descriptors of the ring. */
  get descriptors(): RawDescriptor[] {
    return Array.from({ length: this.layout.queueSize }, (_, i) => this.desc(i));
  }

  /** The entries of the indirect table of a slot, `count` of them. */
  table(slot: number, count: number): RawDescriptor[] {
    const first = this.tablesOffset + slot * this.tables * 16;
    return Array.from({ length: count }, (_, i) => this.descriptorAt(first + 16 * i));
  }

  /** A 16-bit field of the driver area, in bytes from its start. */
  driver16(offset: number): number {
    return this.view.getUint16(QUEUE_OFFSET + this.layout.driverAreaOffset + offset, true);
  }

  /** A 16-bit field of the device area, in bytes from its start. */
  device16(offset: number): number {
    return this.view.getUint16(QUEUE_OFFSET + this.layout.deviceAreaOffset + offset, true);
  }

  /** Write a 16-bit field of the device area, as the device would. */
  setDevice16(offset: number, value: number): void {
    this.view.setUint16(QUEUE_OFFSET + this.layout.deviceAreaOffset + offset, value, true);
  }

  // Split rings.
  get availFlags(): number {
    return this.driver16(0);
  }
  get availIdx(): number {
    return this.driver16(2);
  }
  availRing(slot: number): number {
    return this.driver16(4 + 2 * slot);
  }
  get usedEvent(): number {
    return this.driver16(4 + 2 * this.layout.queueSize);
  }
  set usedFlags(value: number) {
    this.setDevice16(0, value);
  }
  set usedIdx(value: number) {
    this.setDevice16(2, value);
  }
  set availEvent(value: number) {
    this.setDevice16(4 + 8 * this.layout.queueSize, value);
  }
  /** Write `used.ring[slot]`. */
  setUsed(slot: number, id: number, len: number): void {
    const at = QUEUE_OFFSET + this.layout.deviceAreaOffset + 4 + 8 * slot;
    this.view.setUint32(at, id, true);
    this.view.setUint32(at + 4, len, true);
  }

  // Packed rings.
  /** The driver's event suppression: desc and flags. */
  get driverEvent(): readonly [desc: number, flags: number] {
    return [this.driver16(0), this.driver16(2)];
  }
  /** Write the device's event suppression. */
  setDeviceEvent(desc: number, flags: number): void {
    this.setDevice16(0, desc);
    this.setDevice16(2, flags);
  }
  /** Write id, len and flags of the descriptor at a position, as a device that used it. */
  setPacked(position: number, id: number, len: number, flags: number): void {
    const at = QUEUE_OFFSET + 16 * position;
    this.view.setUint32(at + 8, len, true);
    this.view.setUint16(at + 12, id, true);
    this.view.setUint16(at + 14, flags, true);
  }

  private descriptorAt(at: number): RawDescriptor {
    const { view, packed } = this;
    const third = view.getUint16(at + 12, true);
    const fourth = view.getUint16(at + 14, true);
    return {
      addr: view.getBigUint64(at, true),
      len: view.getUint32(at + 8, true),
      flags: packed ? fourth : third,
      tail: packed ? third : fourth,
    };
  }
}

export const NEXT = 1;
export const WRITE = 2;
export const INDIRECT = 4;
export const AVAIL = 0x80;
export const USED = 0x8000;
