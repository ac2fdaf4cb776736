/** The device of the fuzzer: it answers honestly most of the time, and writes anything anywhere for the rest of it. */

import type { VirtqueueLayout } from "../../src/virtqueue/index.js";
import type { Chain, Oracle } from "./oracle.js";
import type { Random } from "./random.js";

const AVAIL = 0x80;
const USED = 0x8000;
const WRITE = 2;

/** Numbers at which things go wrong. */
const EDGES = [0, 1, 2, 0x7fff, 0x8000, 0xffff, 0x1_0000, 0x7fff_ffff, 0x8000_0000, 0xffff_fffe, 0xffff_ffff];

/** Writes into the memory of a driver's ring as a device with a mind of its own. */
export class Liar {
  /** Lies told. */
  lies = 0;

  private readonly oracle: Oracle;
  private readonly random: Random;
  private readonly view: DataView;
  private readonly base: number;
  private readonly end: number;
  private readonly size: number;
  private readonly packed: boolean;
  private readonly inOrder: boolean;
  private readonly deviceArea: number;
  private readonly deviceEnd: number;
  /** Honest answers that the driver has not found yet, by slot. */
  private readonly answered = new Set<Chain>();
  /** Split: `used.idx` as an honest device has it, maybe not told yet. */
  private usedIdx = 0;
  /** Packed: where an honest device writes next. */
  private readonly nextUsed = { at: 0, wrap: true };

  constructor(
    oracle: Oracle,
    random: Random,
    layout: VirtqueueLayout,
    view: DataView,
    memory: { readonly base: number; readonly end: number; readonly inOrder: boolean },
  ) {
    this.oracle = oracle;
    this.random = random;
    this.view = view;
    this.base = memory.base;
    this.end = memory.end;
    this.inOrder = memory.inOrder;
    this.size = layout.queueSize;
    this.packed = layout.packed;
    this.deviceArea = memory.base + layout.deviceAreaOffset;
    this.deviceEnd = memory.base + layout.deviceAreaEnd;
  }

  /** The driver took a chain back. */
  returned(chain: Chain): void {
    this.answered.delete(chain);
  }

  /** Answer a published chain by the book, if there is one; the length may be any. */
  answer(): void {
    const { random, oracle } = this;
    const open = oracle.inFlight.filter((chain) => chain.isPublished && !this.answered.has(chain));
    if (open.length === 0) return;
    const index = random.below(open.length);
    const taken = this.inOrder ? open.slice(0, index + 1) : [open[index]];
    const last = taken[taken.length - 1];
    for (const chain of taken) this.answered.add(chain);
    this.writeUsed(last.slot, this.length(last));
    if (this.packed) {
      for (const chain of taken) oracle.move(this.nextUsed, chain.ringCount);
    } else {
      this.usedIdx = (this.usedIdx + taken.length) & 0xffff;
      if (!random.oneIn(4)) this.tell();
    }
  }

  /** Split: make honest answers visible. */
  tell(): void {
    if (!this.packed) this.view.setUint16(this.deviceArea + 2, this.usedIdx, true);
  }

  /** Write the device's half of event suppression: anything. */
  suppress(): void {
    const { view, deviceArea, random } = this;
    const event = random.oneIn(2) ? random.below(this.size + 2) | (random.u32() & 0x8000) : random.u32() & 0xffff;
    if (this.packed) {
      view.setUint16(deviceArea, event, true);
      view.setUint16(deviceArea + 2, random.oneIn(4) ? random.u32() & 0xffff : random.below(4), true);
    } else {
      view.setUint16(deviceArea, random.u32() & 0xffff, true);
      view.setUint16(deviceArea + 4 + 8 * this.size, event, true);
    }
  }

  /** Tell one lie. */
  lie(): void {
    this.lies++;
    const { random } = this;
    switch (random.below(8)) {
      case 0:
        return this.forge(this.anyId());
      case 1: {
        const { inFlight } = this.oracle;
        return this.forge(inFlight.length === 0 ? 0 : inFlight[random.below(inFlight.length)].slot);
      }
      case 2:
        return this.moveIndex();
      case 3:
        return this.suppress();
      case 4:
        return this.rewriteEntry();
      case 5:
        return this.scribble(this.base, this.end);
      case 6:
        return this.scribble(this.deviceArea, this.deviceEnd);
      default:
        for (let bytes = random.below(64); bytes > 0; bytes--) this.scribble(this.base, this.end);
    }
  }

  private length(chain: Chain): number {
    const { random } = this;
    switch (random.below(4)) {
      case 0:
        return EDGES[random.below(EDGES.length)];
      case 1:
        return (chain.writable + 1) % 2 ** 32;
      case 2:
        return random.below(chain.writable + 1);
      default:
        return chain.writable;
    }
  }

  private anyId(): number {
    const { random, size } = this;
    return random.oneIn(2) ? random.below(size + 2) : EDGES[random.below(EDGES.length)];
  }

  /** A used entry where one belongs, visible at once, with an id that is none of its business. */
  private forge(id: number): void {
    this.writeUsed(id, this.random.u32());
    if (this.packed) return;
    this.usedIdx = (this.usedIdx + 1) & 0xffff;
    this.tell();
  }

  private moveIndex(): void {
    const { random, view, deviceArea, oracle } = this;
    if (this.packed) {
      const entry = this.base + 16 * (random.oneIn(2) ? this.nextUsed.at : oracle.nextUsed.at);
      view.setUint16(entry + 14, view.getUint16(entry + 14, true) ^ [AVAIL, USED, AVAIL | USED][random.below(3)], true);
      return;
    }
    const steps = [1, -1, this.size, -this.size, 0x8000, random.u32()];
    const idx = random.oneIn(2) ? this.usedIdx : oracle.published;
    view.setUint16(deviceArea + 2, (idx + steps[random.below(steps.length)]) & 0xffff, true);
  }

  /** Change an entry that may be visible already, or not yet. */
  private rewriteEntry(): void {
    const { random, view } = this;
    const at = random.below(this.size);
    if (this.packed) {
      const flags = random.oneIn(2) ? this.usedFlags | (random.u32() & 0x7f7f) : random.u32() & 0xffff;
      view.setUint32(this.base + 16 * at + 8, random.u32(), true);
      view.setUint16(this.base + 16 * at + 12, this.anyId() & 0xffff, true);
      view.setUint16(this.base + 16 * at + 14, flags, true);
    } else {
      view.setUint32(this.deviceArea + 4 + 8 * at, this.anyId(), true);
      view.setUint32(this.deviceArea + 8 + 8 * at, random.u32(), true);
    }
  }

  private scribble(from: number, to: number): void {
    const { random } = this;
    this.view.setUint8(from + random.below(to - from), random.u32() & 0xff);
  }

  private writeUsed(id: number, length: number): void {
    const { view } = this;
    if (this.packed) {
      const entry = this.base + 16 * this.nextUsed.at;
      view.setUint32(entry + 8, length, true);
      view.setUint16(entry + 12, id & 0xffff, true);
      view.setUint16(entry + 14, this.usedFlags | (length > 0 ? WRITE : 0), true);
    } else {
      const entry = this.deviceArea + 4 + 8 * (this.usedIdx % this.size);
      view.setUint32(entry, id, true);
      view.setUint32(entry + 4, length, true);
    }
  }

  private get usedFlags(): number {
    return this.nextUsed.wrap ? AVAIL | USED : 0;
  }
}
