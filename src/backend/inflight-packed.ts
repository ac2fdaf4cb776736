/** What a back-end keeps in the region of requests in flight about a packed ring (`QueueRegionPacked`). */

import { DESC_SIZE, VIRTQ_DESC_F_AVAIL, VIRTQ_DESC_F_USED } from "../virtqueue/defs.js";
import { type DescriptorChain, lyingDriver } from "../virtqueue/device-chain.js";
import type { RingArea } from "../virtqueue/device-ring.js";
import type { DeviceVirtqueue } from "../virtqueue/device.js";
import { INFLIGHT_UNUSED, INFLIGHT_VERSION, type InflightRecord, type InflightViews, lyingRegion } from "./inflight.js";

/**
 * `QueueRegionPacked` in 16-bit units: features (64 bits), version, desc_num, free_head, old_free_head, used_idx,
 * old_used_idx; then as bytes used_wrap_counter, old_used_wrap_counter, 7 of padding; desc[] at 32.
 */
const VERSION = 4;
const DESC_NUM = 5;
const FREE_HEAD = 6;
const OLD_FREE_HEAD = 7;
const USED_IDX = 8;
const OLD_USED_IDX = 9;
/** Both free heads, in 32-bit units. */
const FREE_HEADS = 3;
const USED_WRAP = 20;
const OLD_USED_WRAP = 21;

/**
 * `DescStatePacked` of entry `i`, 32 bytes: inflight (8 bits) at 0, next, last, num (16 each) at 2, 4, 6, counter (64)
 * at 8, id, flags (16 each) at 16, len (32) at 20, addr (64) at 24.
 */
const inflightAt = (i: number): number => 32 + 32 * i;
const entryAt = (i: number): number => 8 + 8 * i;
const nextAt = (i: number): number => 16 + 16 * i + 1;
const numAt = (i: number): number => 16 + 16 * i + 3;
const counterAt = (i: number): number => 8 + 8 * i + 2;
const tailAt = (i: number): number => 8 + 8 * i + 4;

const DESC_WORDS = DESC_SIZE / 4;
const TAIL = 3; // the 32-bit word of id (low half) and flags (high half)
const FLAGS16 = 7; // pvirtq_desc.flags, in 16-bit units
const STATE_MASK = VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED;
const WRAP_BIT = 1 << 15;
/** What stands for a buffer id that is not in flight. */
const NOBODY = 0xffff;

/** A request that is to be carried out again. */
interface Again {
  readonly id: number;
  readonly descriptors: Uint32Array;
  readonly lo: number;
  readonly hi: number;
}

/**
 * Used entries overwrite descriptors of requests that are still in flight, so the region has copies of descriptors: a
 * list of entries for each request, the others in a free list. What another back-end relies on is stored in the order of
 * the specification. A request is in flight from the store of `old_free_head` behind its copy on. It is done from the
 * store of the first used flags on, which the ring makes between `publishing` and `published`: until the `old_` fields
 * follow, `used_idx` differs from `old_used_idx`, and the flags there tell whether the batch came to be.
 */
export class PackedInflightRecord implements InflightRecord {
  readonly base: number;

  private readonly bytes: Uint8Array;
  private readonly halves: Uint16Array;
  private readonly words: Uint32Array;
  private readonly desc: Uint32Array;
  private readonly size: number;
  /** The descriptor that the next fetched chain begins at. */
  private position: number;
  /** Links of the free list and of the lists of requests; the number of entries ends the free list. */
  private readonly next: Uint16Array;
  private readonly last: Uint16Array;
  private freeHead = 0;
  /** The entry of each buffer id in flight. */
  private readonly slots = new Uint16Array(NOBODY + 1).fill(NOBODY);
  /** Entries that are given back with the next publication. */
  private readonly batch: Uint16Array;
  private batched = 0;
  private used = 0;
  private usedWrap = 0;
  private counterLo = 0;
  private counterHi = 0;
  private again: readonly Again[] = [];
  waiting = 0;

  /**
   * @param size descriptors of the ring.
   * @param room descriptors that the region has room for.
   * @param area the descriptor area of the ring.
   * @param base what `SET_VRING_BASE` said; counts when the region is not in use.
   * @throws VirtioError ERR_VIRTIO_PROTOCOL when the region cannot belong to this ring.
   */
  constructor(views: InflightViews, size: number, room: number, area: RingArea, base: number) {
    const { bytes, halves, words } = views;
    this.bytes = bytes;
    this.halves = halves;
    this.words = words;
    this.desc = new Uint32Array(area.buffer, area.offset, size * DESC_WORDS);
    this.size = size;
    this.next = new Uint16Array(room);
    this.last = new Uint16Array(room);
    this.batch = new Uint16Array(room);
    const version = halves[VERSION];
    if (version === INFLIGHT_UNUSED) {
      this.begin(room, base);
      this.base = base;
    } else {
      if (version !== INFLIGHT_VERSION) throw lyingRegion(`version ${version}, expected ${INFLIGHT_VERSION}`);
      if (halves[DESC_NUM] !== room) throw lyingRegion(`${halves[DESC_NUM]} entries, expected ${room}`);
      const desc16 = new Uint16Array(area.buffer, area.offset, size * 8);
      this.commit(desc16);
      this.find(room);
      this.base = this.restore(desc16);
    }
    this.position = this.base & (WRAP_BIT - 1);
  }

  refetch(queue: DeviceVirtqueue, chain: DescriptorChain): void {
    const { id, descriptors } = this.again[this.again.length - this.waiting--];
    queue.refetch(chain, id, descriptors);
  }

  fetched(chain: DescriptorChain): void {
    const { words, desc, next, size } = this;
    const { id, ringCount } = chain;
    if (this.slots[id] !== NOBODY) throw lyingDriver(`buffer id ${id} twice`);
    const head = this.freeHead;
    let free = head;
    let slot = head;
    let position = this.position;
    for (let i = 0; i < ringCount; i++) {
      slot = free;
      const from = position * DESC_WORDS;
      const to = tailAt(slot);
      // What the driver changes meanwhile is checked when it is read again.
      words[to] = desc[from + TAIL];
      words[to + 1] = desc[from + 2];
      words[to + 2] = desc[from];
      words[to + 3] = desc[from + 1];
      free = next[slot];
      if (++position === size) position = 0;
    }
    // In words, which takes half as many stores as field by field: an entry counts from the last one on.
    const entry = entryAt(head);
    words[entry] = 1 | (next[head] << 16); // inflight, next
    words[entry + 1] = slot | (ringCount << 16); // last, num
    words[entry + 2] = this.counterLo;
    words[entry + 3] = this.counterHi;
    this.count(this.counterLo, this.counterHi);
    this.position = position;
    this.freeHead = free;
    this.last[head] = slot;
    this.slots[id] = head;
    words[FREE_HEADS] = free | (free << 16); // free_head, old_free_head
  }

  done(id: number): void {
    const head = this.slots[id];
    this.slots[id] = NOBODY;
    // The batch becomes one list at once, whose end is linked to the free list when it is published: so little has to be
    // stored right before the ring's store, which waits for all stores before it. Nobody follows the link of a request's
    // last entry while that is in flight.
    const { batched } = this;
    if (batched > 0) this.link(this.last[head], this.batch[batched - 1]);
    this.batch[batched] = head;
    this.batched = batched + 1;
  }

  publishing(base: number): void {
    const { halves, batched } = this;
    if (batched > 0) {
      this.link(this.last[this.batch[0]], this.freeHead);
      this.freeHead = this.batch[batched - 1];
      halves[FREE_HEAD] = this.freeHead;
    }
    this.used = (base >>> 16) & (WRAP_BIT - 1);
    this.usedWrap = base >>> 31;
    halves[USED_IDX] = this.used;
    this.bytes[USED_WRAP] = this.usedWrap;
  }

  published(): void {
    for (let i = 0; i < this.batched; i++) this.bytes[inflightAt(this.batch[i])] = 0;
    this.halves[OLD_FREE_HEAD] = this.freeHead;
    // The counter before the index: with the new index and the old counter, a descriptor of the round before could
    // look as if the batch had not been published.
    this.bytes[OLD_USED_WRAP] = this.usedWrap;
    this.halves[OLD_USED_IDX] = this.used;
    this.batched = 0;
  }

  settle(): void {
    if (this.waiting === 0) this.halves[VERSION] = INFLIGHT_UNUSED;
  }

  private link(entry: number, next: number): void {
    this.halves[nextAt(entry)] = next;
    this.next[entry] = next;
  }

  /** Lay a new region out. */
  private begin(room: number, base: number): void {
    const { bytes, halves } = this;
    for (let i = 0; i < room; i++) {
      this.next[i] = i + 1;
      halves[nextAt(i)] = i + 1;
      bytes[inflightAt(i)] = 0;
    }
    halves[DESC_NUM] = room;
    halves[FREE_HEAD] = 0;
    halves[OLD_FREE_HEAD] = 0;
    halves[USED_IDX] = (base >>> 16) & (WRAP_BIT - 1);
    halves[OLD_USED_IDX] = halves[USED_IDX];
    bytes[USED_WRAP] = base >>> 31;
    bytes[OLD_USED_WRAP] = base >>> 31;
    halves[VERSION] = INFLIGHT_VERSION;
  }

  /** Finish what was published last, or take back what was about to be. */
  private commit(desc16: Uint16Array): void {
    const { bytes, halves, size } = this;
    const before = { used: halves[OLD_USED_IDX], wrap: bytes[OLD_USED_WRAP], free: halves[OLD_FREE_HEAD] };
    const after = { used: halves[USED_IDX], wrap: bytes[USED_WRAP], free: halves[FREE_HEAD] };
    if (Math.max(before.used, after.used) >= size || Math.max(before.wrap, after.wrap) > 1) {
      throw lyingRegion(`used positions of ${before.used} and ${after.used} on a queue of ${size}`);
    }
    let state = before;
    if (before.used !== after.used || before.wrap !== after.wrap) {
      const available = before.wrap === 1 ? VIRTQ_DESC_F_AVAIL : VIRTQ_DESC_F_USED;
      // The driver may have taken the used entry, and made others available there, in the round behind it.
      if ((desc16[before.used * 8 + FLAGS16] & STATE_MASK) !== available) state = after;
    }
    this.used = state.used;
    this.usedWrap = state.wrap;
    this.freeHead = state.free;
    halves[OLD_FREE_HEAD] = state.free;
    halves[FREE_HEAD] = state.free;
    bytes[USED_WRAP] = state.wrap;
    bytes[OLD_USED_WRAP] = state.wrap;
    halves[USED_IDX] = state.used;
    halves[OLD_USED_IDX] = state.used;
  }

  /** Read the free list and the requests in flight; each entry belongs to exactly one of them. */
  private find(room: number): void {
    const { bytes, halves, words, next } = this;
    const known = new Uint8Array(room);
    for (let i = 0; i < room; i++) next[i] = halves[nextAt(i)];
    for (let slot = this.freeHead; slot !== room; slot = next[slot]) {
      if (slot > room || known[slot] !== 0) throw lyingRegion(`a free list with the entry ${slot} of ${room}`);
      known[slot] = 1;
      bytes[inflightAt(slot)] = 0;
    }
    const found: Again[] = [];
    for (let head = 0; head < room; head++) {
      if (known[head] !== 0 || bytes[inflightAt(head)] !== 1) continue;
      const count = halves[numAt(head)];
      if (count === 0 || count > this.size) throw lyingRegion(`a request of ${count} descriptors`);
      const descriptors = new Uint32Array(count * DESC_WORDS);
      let slot = head;
      for (let i = 0; i < count; i++) {
        if (i > 0) slot = next[slot];
        if (slot >= room || known[slot] !== 0) throw lyingRegion(`a request with the entry ${slot} of ${room}`);
        known[slot] = 1;
        const from = tailAt(slot);
        descriptors.set([words[from + 2], words[from + 3], words[from + 1], words[from]], i * DESC_WORDS);
      }
      const id = descriptors[(count - 1) * DESC_WORDS + TAIL] & 0xffff;
      if (this.slots[id] !== NOBODY) throw lyingRegion(`buffer id ${id} twice`);
      this.slots[id] = head;
      this.last[head] = slot;
      const lo = words[counterAt(head)];
      const hi = words[counterAt(head) + 1];
      found.push({ id, descriptors, lo, hi });
    }
    if (known.includes(0)) throw lyingRegion("entries that are neither free nor in flight");
    found.sort((a, b) => a.hi - b.hi || a.lo - b.lo);
    const youngest = found.at(-1);
    if (youngest !== undefined) this.count(youngest.lo, youngest.hi);
    this.again = found;
    this.waiting = found.length;
  }

  /**
   * Used entries of a batch that was not published may stand in the ring already, all but the first. They would come to
   * light when another batch ends right before them: make them what they were, available.
   *
   * @returns the position of the ring.
   */
  private restore(desc16: Uint16Array): number {
    const { size } = this;
    let at = this.used;
    let wrap = this.usedWrap;
    const total = this.again.reduce((sum, { descriptors }) => sum + descriptors.length / DESC_WORDS, 0);
    if (total > size) throw lyingRegion(`${total} descriptors in flight on a queue of ${size}`);
    for (let i = 0; i < total; i++) {
      const flags = desc16[at * 8 + FLAGS16];
      if ((flags & STATE_MASK) === (wrap === 1 ? STATE_MASK : 0)) {
        const available = wrap === 1 ? VIRTQ_DESC_F_AVAIL : VIRTQ_DESC_F_USED;
        desc16[at * 8 + FLAGS16] = (flags & ~STATE_MASK) | available;
      }
      if (++at === size) {
        at = 0;
        wrap ^= 1;
      }
    }
    return (this.usedWrap * WRAP_BIT + this.used) * 0x1_0000 + wrap * WRAP_BIT + at;
  }

  /** The counter behind one of these halves; 2^64 is never reached, but a front-end may say so. */
  private count(lo: number, hi: number): void {
    this.counterLo = (lo + 1) | 0;
    this.counterHi = this.counterLo === 0 ? (hi + 1) | 0 : hi;
  }
}
