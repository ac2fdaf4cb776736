/** The least that a device can do with a ring: mark every available chain as used, in order. Checks nothing. */

import {
  type VirtqueueLayout,
  VIRTQ_DESC_F_AVAIL,
  VIRTQ_DESC_F_USED,
  VIRTQ_DESC_F_WRITE,
} from "../src/virtqueue/index.js";

/** What a benchmark needs of a device. */
export interface MinimalDevice {
  /** Use everything that is available. */
  run(): void;
  /** Let the same `chains` look available again, so that the device can be timed without a driver. */
  replay(chains: number): void;
}

/** Length that the device reports for every chain: 4 KiB and a status. */
const WRITTEN = 4097;

/** A device on a split ring. */
export class MinimalSplitDevice implements MinimalDevice {
  private readonly avail: Uint16Array;
  private readonly used16: Uint16Array;
  private readonly used32: Uint32Array;
  private readonly mask: number;
  private readonly availEventAt: number;
  private lastAvail = 0;

  constructor(buffer: ArrayBuffer, layout: VirtqueueLayout) {
    const n = layout.queueSize;
    this.mask = n - 1;
    this.avail = new Uint16Array(buffer, layout.driverAreaOffset, n + 3);
    this.used16 = new Uint16Array(buffer, layout.deviceAreaOffset, 4 * n + 4);
    this.used32 = new Uint32Array(buffer, layout.deviceAreaOffset, 2 * n + 2);
    this.availEventAt = 2 + 4 * n;
  }

  run(): void {
    const idx = Atomics.load(this.avail, 1);
    let last = this.lastAvail;
    while (last !== idx) {
      const at = last & this.mask;
      this.used32[1 + 2 * at] = this.avail[2 + at];
      this.used32[2 + 2 * at] = WRITTEN;
      last = (last + 1) & 0xffff;
    }
    this.lastAvail = last;
    this.used16[this.availEventAt] = last;
    Atomics.store(this.used16, 1, last);
  }

  replay(chains: number): void {
    this.avail[1] = (this.lastAvail + chains) & 0xffff;
  }
}

/** A device on a packed ring whose chains all take the same number of descriptors. */
export class MinimalPackedDevice implements MinimalDevice {
  private readonly desc16: Uint16Array;
  private readonly desc32: Uint32Array;
  private readonly size: number;
  private readonly ringCount: number;
  private position = 0;
  private wrap = 1;

  constructor(buffer: ArrayBuffer, layout: VirtqueueLayout, ringCount: number) {
    this.size = layout.queueSize;
    this.ringCount = ringCount;
    this.desc16 = new Uint16Array(buffer, 0, this.size * 8);
    this.desc32 = new Uint32Array(buffer, 0, this.size * 4);
  }

  run(): void {
    for (;;) {
      const available = this.wrap === 1 ? VIRTQ_DESC_F_AVAIL : VIRTQ_DESC_F_USED;
      const flags = this.desc16[this.position * 8 + 7] & (VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED);
      if (flags !== available) return;
      this.desc32[this.position * 4 + 2] = WRITTEN;
      const used = this.wrap === 1 ? VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED : 0;
      Atomics.store(this.desc16, this.position * 8 + 7, used | VIRTQ_DESC_F_WRITE);
      this.position += this.ringCount;
      if (this.position >= this.size) {
        this.position -= this.size;
        this.wrap ^= 1;
      }
    }
  }

  replay(chains: number): void {
    let position = this.position;
    let wrap = this.wrap;
    for (let i = 0; i < chains; i++) {
      this.desc16[position * 8 + 7] = wrap === 1 ? VIRTQ_DESC_F_AVAIL : VIRTQ_DESC_F_USED;
      position += this.ringCount;
      if (position >= this.size) {
        position -= this.size;
        wrap ^= 1;
      }
    }
  }
}
