/** A driver's half of both rings for tests of the device's half: slow, by DataView, and sharing no code with src. */

/** One element of a chain. */
export interface Element {
  readonly address: bigint;
  readonly length: number;
  readonly writable: boolean;
}

/** A used entry as the driver finds it. */
export interface Used {
  readonly id: number;
  readonly length: number;
}

export const NEXT = 1;
export const WRITE = 2;
export const INDIRECT = 4;
const AVAIL = 0x80;
const USED = 0x8000;

/** Where everything lies in the one buffer; the tables of chain `i` at `tables + i * tableStride`. */
export interface DriverPlace {
  readonly buffer: ArrayBuffer;
  readonly size: number;
  /** Address of byte 0 of the buffer. */
  readonly address: bigint;
  readonly descriptors: number;
  readonly driver: number;
  readonly device: number;
  readonly tables: number;
}

/** Bytes between indirect tables. */
export function tableStride(size: number): number {
  return 16 * size + 16;
}

/** Lay a ring of `size` descriptors out, with gaps of guard bytes between the areas, from `base` on. */
export function placeRing(size: number, address = 0x7_0000_0000n, base = 64, shared?: ArrayBuffer): DriverPlace {
  const up = (value: number): number => Math.ceil(value / 64) * 64;
  const driver = up(base + 16 * size + 1);
  const device = up(driver + 6 + 2 * size + 1);
  const tables = up(device + 6 + 8 * size + 1);
  // Large rings have no room for tables.
  const buffer = shared ?? new ArrayBuffer(up(tables + (size > 64 ? 0 : tableStride(size) * size)) + 4096);
  return { buffer, size, address, descriptors: base, driver, device, tables };
}

/** The options of a DeviceVirtqueue for a ring placed so. */
export function areasOf(place: DriverPlace) {
  const { buffer, descriptors, driver, device } = place;
  return {
    descriptorArea: { buffer, offset: descriptors },
    driverArea: { buffer, offset: driver },
    deviceArea: { buffer, offset: device },
  };
}

/** Split ring. Chains are identified by their head. */
export class SplitDriver {
  readonly view: DataView;
  readonly place: DriverPlace;
  availIdx: number;
  lastUsed: number;
  readonly free: number[];
  readonly chains = new Map<number, number[]>();

  constructor(place: DriverPlace, start = 0) {
    this.place = place;
    this.view = new DataView(place.buffer);
    this.availIdx = start;
    this.lastUsed = start;
    this.view.setUint16(place.driver + 2, start, true);
    this.view.setUint16(place.device + 2, start, true);
    this.free = Array.from({ length: place.size }, (_, i) => i);
  }

  descriptor(index: number, address: bigint, length: number, flags: number, next = 0): void {
    writeSplit(this.view, this.place.descriptors + 16 * index, address, length, flags, next);
  }

  /** Write a chain; `indirect` counts the trailing elements that go into a table. Returns its head, or -1. */
  add(elements: readonly Element[], indirect = 0, order: readonly number[] = []): number {
    const direct = elements.length - indirect;
    const need = direct + (indirect > 0 ? 1 : 0);
    if (this.free.length < need) return -1;
    const taken = this.free.splice(0, need);
    for (let i = 0; i < need; i++) {
      const more = i + 1 < need ? NEXT : 0;
      if (i < direct) {
        const { address, length, writable } = elements[i];
        this.descriptor(taken[i], address, length, more | (writable ? WRITE : 0), taken[i + 1] ?? 0xffff);
      } else {
        const table = this.writeTable(taken[0], elements.slice(direct), order);
        // WRITE on the referring descriptor means nothing; sometimes it is there.
        this.descriptor(taken[i], table.address, table.length, INDIRECT | (indirect % 2 === 0 ? WRITE : 0), 0xffff);
      }
    }
    this.chains.set(taken[0], taken);
    this.view.setUint16(this.place.driver + 4 + 2 * (this.availIdx % this.place.size), taken[0], true);
    this.availIdx = (this.availIdx + 1) % 65536;
    return taken[0];
  }

  publish(): void {
    this.view.setUint16(this.place.driver + 2, this.availIdx, true);
  }

  /** With EVENT_IDX: ask for a notification at the next used entry. */
  arm(): void {
    this.view.setUint16(this.place.driver + 4 + 2 * this.place.size, this.lastUsed, true);
  }

  collect(): Used[] {
    const used: Used[] = [];
    const { device, size } = this.place;
    while (this.lastUsed !== this.view.getUint16(device + 2, true)) {
      const at = device + 4 + 8 * (this.lastUsed % size);
      const entry = { id: this.view.getUint32(at, true), length: this.view.getUint32(at + 4, true) };
      used.push(entry);
      this.release(entry.id);
      this.lastUsed = (this.lastUsed + 1) % 65536;
    }
    return used;
  }

  release(id: number): void {
    const taken = this.chains.get(id);
    if (taken === undefined) throw new Error(`used entry of ${id}, which is not in flight`);
    this.chains.delete(id);
    this.free.push(...taken);
  }

  private writeTable(slot: number, elements: readonly Element[], order: readonly number[]) {
    const { tables, size, address } = this.place;
    const at = tables + tableStride(size) * slot;
    // The first entry is where the table begins; the others may stand in any order.
    const places = elements.map((_, i) => (i === 0 ? 0 : (order[i - 1] ?? i)));
    elements.forEach((element, i) => {
      const more = i + 1 < elements.length;
      const flags = (more ? NEXT : 0) | (element.writable ? WRITE : 0);
      writeSplit(this.view, at + 16 * places[i], element.address, element.length, flags, more ? places[i + 1] : 0);
    });
    return { address: address + BigInt(at), length: 16 * elements.length };
  }
}

/** Packed ring. Chains are identified by an id of the driver's choice. */
export class PackedDriver {
  readonly view: DataView;
  readonly place: DriverPlace;
  next = 0;
  wrap = true;
  nextUsed = 0;
  usedWrap = true;
  free: number;
  readonly ids: number[];
  readonly chains = new Map<number, number>();
  /** The table that belongs to an id: chains come back in any order, so positions in the ring do not name them. */
  private readonly tables: ReadonlyMap<number, number>;
  /** Flags of the first entry of each unpublished chain, written by publish. */
  private readonly pending: { at: number; flags: number }[] = [];

  constructor(place: DriverPlace) {
    this.place = place;
    this.view = new DataView(place.buffer);
    this.free = place.size;
    // Any 16-bit number may be an id.
    this.ids = Array.from({ length: place.size }, (_, i) => (i * 7919 + 13) % 65536);
    this.tables = new Map(this.ids.map((id, i) => [id, i]));
  }

  /** Write entry `index`; its flags last. */
  descriptor(index: number, address: bigint, length: number, id: number, flags: number): void {
    const at = this.place.descriptors + 16 * index;
    this.view.setBigUint64(at, address, true);
    this.view.setUint32(at + 8, length, true);
    this.view.setUint16(at + 12, id, true);
    this.view.setUint16(at + 14, flags, true);
  }

  /** AVAIL and USED of an available entry. */
  available(wrap: boolean): number {
    return wrap ? AVAIL : USED;
  }

  /** Write a chain; all of it goes into a table when `indirect` is not 0. Returns its id, or -1. */
  add(elements: readonly Element[], indirect = 0): number {
    const need = indirect > 0 ? 1 : elements.length;
    if (this.free < need || this.ids.length === 0) return -1;
    const id = this.ids.shift() ?? 0;
    for (let i = 0; i < need; i++) {
      const { address, length, writable } = elements[i];
      let flags = this.available(this.wrap) | (i + 1 < need ? NEXT : 0) | (writable ? WRITE : 0);
      let target = { address, length };
      if (indirect > 0) {
        flags = (flags & ~WRITE) | INDIRECT;
        target = this.writeTable(this.tables.get(id) ?? 0, elements);
      }
      const at = this.place.descriptors + 16 * this.next;
      // Only the last entry's id counts.
      this.descriptor(
        this.next,
        target.address,
        target.length,
        i + 1 < need ? 0xdead : id,
        i === 0 ? this.old(at) : flags,
      );
      if (i === 0) this.pending.push({ at: at + 14, flags });
      if (++this.next === this.place.size) {
        this.next = 0;
        this.wrap = !this.wrap;
      }
    }
    this.free -= need;
    this.chains.set(id, need);
    return id;
  }

  /** Make all chains available, the last one first: the device must not look behind an unavailable one. */
  publish(): void {
    for (const { at, flags } of this.pending.splice(0).reverse()) this.view.setUint16(at, flags, true);
  }

  collect(): Used[] {
    const used: Used[] = [];
    for (;;) {
      const at = this.place.descriptors + 16 * this.nextUsed;
      const flags = this.view.getUint16(at + 14, true);
      if (this.chains.size === 0 || (flags & (AVAIL | USED)) !== (this.usedWrap ? AVAIL | USED : 0)) return used;
      const id = this.view.getUint16(at + 12, true);
      used.push({ id, length: (flags & WRITE) === 0 ? 0 : this.view.getUint32(at + 8, true) });
      this.release(id);
    }
  }

  /** Take back the chain `id`, whose used entry is at the used position. */
  release(id: number): void {
    const count = this.chains.get(id);
    if (count === undefined) throw new Error(`used entry of ${id}, which is not in flight`);
    this.chains.delete(id);
    this.ids.push(id);
    this.skip(count);
  }

  /** Move the used position on. */
  skip(count: number): void {
    this.free += count;
    this.nextUsed += count;
    if (this.nextUsed >= this.place.size) {
      this.nextUsed -= this.place.size;
      this.usedWrap = !this.usedWrap;
    }
  }

  private old(at: number): number {
    return this.view.getUint16(at + 14, true);
  }

  private writeTable(slot: number, elements: readonly Element[]) {
    const { tables, size, address } = this.place;
    const at = tables + tableStride(size) * slot;
    elements.forEach((element, i) => {
      const entry = at + 16 * i;
      this.view.setBigUint64(entry, element.address, true);
      this.view.setUint32(entry + 8, element.length, true);
      // Neither id nor the other flags mean anything in a table.
      this.view.setUint16(entry + 12, 0xbeef, true);
      this.view.setUint16(entry + 14, (element.writable ? WRITE : 0) | AVAIL | NEXT, true);
    });
    return { address: address + BigInt(at), length: 16 * elements.length };
  }
}

function writeSplit(view: DataView, at: number, address: bigint, length: number, flags: number, next: number): void {
  view.setBigUint64(at, address, true);
  view.setUint32(at + 8, length, true);
  view.setUint16(at + 12, flags, true);
  view.setUint16(at + 14, next, true);
}
