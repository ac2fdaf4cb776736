/**
 * What a driver may make of a ring, whatever stands in its memory: a model of both formats, written for clarity, that
 * reads the same memory as the driver and says exactly what each call has to return.
 */

import type { VirtqueueLayout } from "../../src/virtqueue/index.js";

const AVAIL = 0x80;
const USED = 0x8000;

/** A chain as the driver committed it. */
export interface Chain {
  readonly slot: number;
  /** Ring descriptors. */
  readonly ringCount: number;
  /** Bytes that the device may write, at most 2^32-1. */
  readonly writable: number;
  /** The device was told of it. */
  isPublished: boolean;
}

/** What `poll` has to do: return a slot and a length, return -1, or break the queue. */
export type Verdict = { readonly chain: Chain; readonly length: number } | "nothing" | "broken";

/** A place in a packed ring. */
interface Place {
  at: number;
  wrap: boolean;
}

export class Oracle {
  /** By slot: the chain that lives there. */
  readonly chains: (Chain | undefined)[];
  /** In the order they were committed. */
  readonly inFlight: Chain[] = [];
  freeDescriptors: number;
  /** Split: indices of everything committed, published and returned. */
  availIdx = 0;
  published = 0;
  lastUsed = 0;
  /** Packed: where the next chain and the next used entry belong. */
  readonly nextAvail: Place = { at: 0, wrap: true };
  readonly nextUsed: Place = { at: 0, wrap: true };
  /** Ring descriptors committed since the last publish. */
  heldDescriptors = 0;

  private readonly packed: boolean;
  private readonly inOrder: boolean;
  private readonly eventIdx: boolean;
  private readonly size: number;
  private readonly view: DataView;
  private readonly base: number;
  private readonly driverArea: number;
  private readonly deviceArea: number;
  /** Split: used.idx as it was loaded last; it is loaded again only when everything up to there was returned. */
  private usedLimit = 0;
  /** IN_ORDER: chains of a batch still to be returned, and the length of the last one. */
  private batch = 0;
  private batchLength = 0;

  constructor(layout: VirtqueueLayout, view: DataView, base: number, eventIdx: boolean, inOrder: boolean) {
    this.packed = layout.packed;
    this.size = layout.queueSize;
    this.eventIdx = eventIdx;
    this.inOrder = inOrder;
    this.view = view;
    this.base = base;
    this.driverArea = base + layout.driverAreaOffset;
    this.deviceArea = base + layout.deviceAreaOffset;
    this.freeDescriptors = this.size;
    this.chains = new Array<Chain | undefined>(this.size).fill(undefined);
  }

  /** The driver committed a chain. */
  commit(slot: number, ringCount: number, writable: number): void {
    const chain = { slot, ringCount, writable: Math.min(writable, 0xffff_ffff), isPublished: false };
    this.chains[slot] = chain;
    this.inFlight.push(chain);
    this.freeDescriptors -= ringCount;
    this.heldDescriptors += ringCount;
    this.availIdx = (this.availIdx + 1) & 0xffff;
    this.move(this.nextAvail, ringCount);
  }

  /** The driver published; returns whether it has to notify (2.7.10, 2.8.11: `vring_need_event`). */
  publish(): boolean {
    const added = this.heldDescriptors;
    const old = this.published;
    this.heldDescriptors = 0;
    this.published = this.availIdx;
    for (const chain of this.inFlight) chain.isPublished = true;
    if (added === 0) return false;
    const { view, deviceArea } = this;
    if (!this.packed) {
      if (!this.eventIdx) return (view.getUint16(deviceArea, true) & 1) === 0;
      const event = view.getUint16(deviceArea + 4 + 8 * this.size, true);
      return ((this.published - event - 1) & 0xffff) < ((this.published - old) & 0xffff);
    }
    const flags = view.getUint16(deviceArea + 2, true) & 3;
    if (flags === 1) return false;
    if (flags !== 2 || !this.eventIdx) return true;
    const position = view.getUint16(deviceArea, true);
    let event = position & 0x7fff;
    if (((position & 0x8000) !== 0) !== this.nextAvail.wrap) event -= this.size;
    return ((this.nextAvail.at - event - 1) & 0xffff) < added;
  }

  /** What `poll` has to return now; the model moves on accordingly. */
  poll(): Verdict {
    if (this.batch > 0) return this.returnOldest();
    const named = this.packed ? this.readPacked() : this.readSplit();
    if (named === "nothing" || named === "broken") return named;
    const { id, length } = named;
    const chain = id < this.size ? this.chains[id] : undefined;
    if (chain === undefined || (!chain.isPublished && this.isKnownUnpublished(chain))) return "broken";
    if (!this.inOrder) return this.take(chain, length);
    const count = this.inFlight.indexOf(chain) + 1;
    if (!this.packed && count > ((this.usedLimit - this.lastUsed) & 0xffff)) return "broken";
    this.batch = count;
    this.batchLength = length;
    return this.returnOldest();
  }

  /** What `hasUsed` has to return: a hint, without a look at ids. */
  hasUsed(): boolean {
    if (!this.packed) return this.lastUsed !== this.usedLimit || this.readUsedIdx() !== this.lastUsed;
    return this.batch > 0 || (this.inFlight.length > 0 && this.isUsed(this.flagsAt(this.nextUsed.at)));
  }

  /** Another driver goes on with the idle ring. */
  resume(): void {
    this.usedLimit = this.lastUsed;
  }

  /** Move a place on a packed ring. */
  move(place: Place, count: number): void {
    place.at += count;
    if (place.at < this.size) return;
    place.at -= this.size;
    place.wrap = !place.wrap;
  }

  /** A split ring is asked again what is unpublished: a device that rewrote it is believed. */
  private isKnownUnpublished({ slot }: Chain): boolean {
    if (this.packed) return true;
    for (let idx = this.published; idx !== this.availIdx; idx = (idx + 1) & 0xffff) {
      if (this.view.getUint16(this.driverArea + 4 + 2 * (idx % this.size), true) === slot) return true;
    }
    return false;
  }

  private readSplit(): { id: number; length: number } | "nothing" | "broken" {
    if (this.lastUsed === this.usedLimit) {
      const idx = this.readUsedIdx();
      if (idx === this.lastUsed) return "nothing";
      if (((idx - this.lastUsed) & 0xffff) > ((this.published - this.lastUsed) & 0xffff)) return "broken";
      this.usedLimit = idx;
    }
    const at = this.deviceArea + 4 + 8 * (this.lastUsed % this.size);
    return { id: this.view.getUint32(at, true), length: this.view.getUint32(at + 4, true) };
  }

  private readPacked(): { id: number; length: number } | "nothing" {
    const { at } = this.nextUsed;
    const flags = this.flagsAt(at);
    if (this.inFlight.length === 0 || !this.isUsed(flags)) return "nothing";
    const entry = this.base + 16 * at;
    // With or without WRITE: QEMU never sets it.
    return { id: this.view.getUint16(entry + 12, true), length: this.view.getUint32(entry + 8, true) };
  }

  private returnOldest(): Verdict {
    this.batch--;
    const [oldest] = this.inFlight;
    // Only the last of a batch has a length; the others were used wholly.
    return this.take(oldest, this.batch > 0 ? oldest.writable : this.batchLength);
  }

  private take(chain: Chain, length: number): Verdict {
    this.chains[chain.slot] = undefined;
    this.inFlight.splice(this.inFlight.indexOf(chain), 1);
    this.freeDescriptors += chain.ringCount;
    this.lastUsed = (this.lastUsed + 1) & 0xffff;
    this.move(this.nextUsed, chain.ringCount);
    return { chain, length: Math.min(length, chain.writable) };
  }

  private isUsed(flags: number): boolean {
    return (flags & (AVAIL | USED)) === (this.nextUsed.wrap ? AVAIL | USED : 0);
  }

  private flagsAt(at: number): number {
    return this.view.getUint16(this.base + 16 * at + 14, true);
  }

  private readUsedIdx(): number {
    return this.view.getUint16(this.deviceArea + 2, true);
  }
}
