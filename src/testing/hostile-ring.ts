/** Ring memory as a device sees it that writes what no device may write. */

import {
  AVAIL_RING_OFFSET,
  DESC_SIZE,
  USED_ELEM_SIZE,
  USED_RING_OFFSET,
  VIRTQ_DESC_F_AVAIL,
  VIRTQ_DESC_F_INDIRECT,
  VIRTQ_DESC_F_USED,
  VIRTQ_DESC_F_WRITE,
} from "../virtqueue/defs.js";
import type { FakeDevice } from "./fake-device.js";

/** `pvirtq_desc.len`, `id` and `flags`; `virtq_desc.flags` and `next` lie at the last two. */
const LEN = 8;
const ID = 12;
const FLAGS = 14;
const STATE = VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED;

/** Every field of a ring, to be written as it is, beside the honest half that a {@link FakeDevice} is. */
export class HostileRing {
  /** The honest half, with the requests that are held. */
  readonly device: FakeDevice;
  /** Notifies the driver, whatever it wants. */
  readonly interrupt: () => void;

  private readonly view: DataView;

  /** @param interrupt - how to notify the driver; for a `FakeQueue` its `interrupt`. Default: not at all. */
  constructor(device: FakeDevice, interrupt: () => void = () => {}) {
    this.device = device;
    this.interrupt = interrupt;
    this.view = new DataView(device.buffer, device.offset, device.layout.endOffset);
  }

  /** Whether the ring is a packed one. */
  get packed(): boolean {
    return this.device.layout.packed;
  }

  /** Descriptors of the ring. */
  get size(): number {
    return this.device.layout.queueSize;
  }

  /** `used.idx` of a split ring. */
  get usedIdx(): number {
    return this.view.getUint16(this.deviceArea + 2, true);
  }

  set usedIdx(value: number) {
    this.view.setUint16(this.deviceArea + 2, value, true);
  }

  /** Write `used.ring[index % size]` of a split ring. */
  setUsed(index: number, id: number, length: number): void {
    const at = this.deviceArea + USED_RING_OFFSET + USED_ELEM_SIZE * (index % this.size);
    this.view.setUint32(at, id, true);
    this.view.setUint32(at + 4, length, true);
  }

  /** `avail.ring[avail.idx]` of a split ring: the next chain, which is not available yet. */
  get nextHead(): number {
    const area = this.device.layout.driverAreaOffset;
    const idx = this.view.getUint16(area + 2, true) % this.size;
    return this.view.getUint16(area + AVAIL_RING_OFFSET + 2 * idx, true);
  }

  /** Where the next used entry belongs: `used.idx`, or the position on a packed ring. */
  get position(): number {
    return this.packed ? (this.device.queue.base >>> 16) & 0x7fff : this.usedIdx;
  }

  /** Flags of a used entry at {@link position} of a packed ring. */
  get usedFlags(): number {
    return this.device.queue.base >>> 31 === 1 ? STATE : 0;
  }

  /** Flags of a used entry `ahead` descriptors behind {@link position} of a packed ring. */
  flagsAhead(ahead: number): number {
    return this.position + ahead < this.size ? this.usedFlags : this.usedFlags ^ STATE;
  }

  /** Write length, id and flags of a descriptor of a packed ring. */
  setPacked(position: number, id: number, length: number, flags: number): void {
    const at = DESC_SIZE * (position % this.size);
    this.view.setUint32(at + LEN, length, true);
    this.view.setUint16(at + ID, id, true);
    this.view.setUint16(at + FLAGS, flags, true);
  }

  /** Write a used entry at the next position and make it visible; the honest half knows nothing of it. */
  forge(id: number, length: number): void {
    if (this.packed) {
      this.setPacked(this.position, id, length, this.usedFlags | VIRTQ_DESC_F_WRITE);
    } else {
      this.setUsed(this.usedIdx, id, length);
      this.usedIdx++;
    }
  }

  /** Write the device's half of event suppression: `avail_event` and `used.flags`, or event position and flags. */
  setEvent(event: number, flags: number): void {
    const area = this.deviceArea;
    if (this.packed) {
      this.view.setUint16(area, event, true);
      this.view.setUint16(area + 2, flags, true);
    } else {
      this.view.setUint16(area, flags, true);
      this.view.setUint16(area + USED_RING_OFFSET + USED_ELEM_SIZE * this.size, event, true);
    }
  }

  /** Fill the driver area, which is the driver's alone, with `byte`. */
  rewriteDriverArea(byte: number): void {
    const { driverAreaOffset } = this.device.layout;
    const length = this.packed ? 4 : AVAIL_RING_OFFSET + 2 * this.size + 2;
    for (let i = 0; i < length; i++) this.view.setUint8(driverAreaOffset + i, byte);
  }

  /** Rewrite every descriptor, and every indirect table that one leads to: address and length. */
  rewriteDescriptors(): void {
    const { memory } = this.device;
    for (let i = 0; i < this.size; i++) {
      const at = DESC_SIZE * i;
      const flags = this.view.getUint16(at + (this.packed ? FLAGS : ID), true);
      const lo = this.view.getUint32(at, true);
      const hi = this.view.getUint32(at + 4, true);
      const length = this.view.getUint32(at + LEN, true);
      const isTable = (flags & VIRTQ_DESC_F_INDIRECT) !== 0 && length > 0;
      const region = isTable ? memory.find(lo, hi, length) : -1;
      if (region >= 0) {
        const start = memory.offset(region, lo, hi);
        memory.bytes[region].fill(0xa5, start, start + length);
      }
      for (let byte = 0; byte < LEN + 4; byte++) this.view.setUint8(at + byte, 0x5a);
    }
  }

  /** Make the descriptors of a split ring one circle that never ends. */
  linkInCircle(): void {
    for (let i = 0; i < this.size; i++) {
      this.view.setUint16(DESC_SIZE * i + ID, 3, true);
      this.view.setUint16(DESC_SIZE * i + FLAGS, (i + 1) % this.size, true);
    }
  }

  private get deviceArea(): number {
    return this.device.layout.deviceAreaOffset;
  }
}
