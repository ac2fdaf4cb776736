/** The driver's half of a split virtqueue (virtio 1.3, 2.7). */

import {
  AVAIL_RING_OFFSET,
  DESC_SIZE,
  USED_ELEM_SIZE,
  USED_RING_OFFSET,
  VIRTQ_AVAIL_F_NO_INTERRUPT,
  VIRTQ_DESC_F_INDIRECT,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
  VIRTQ_USED_F_NO_NOTIFY,
} from "./defs.js";
import {
  brokenRing,
  ChainBuilder,
  clampU32,
  DESC_WORDS,
  FRAME_ELEMENTS,
  type RingOptions,
  type SegmentList,
  SHAPE_FRAME_DIRECT,
  SHAPE_FRAME_INDIRECT,
  SHAPE_NONE,
  SlotMemory,
  writeDescriptor,
} from "./ring.js";

const IDX = 1; // virtq_avail.idx and virtq_used.idx, in 16-bit units
const RING16 = AVAIL_RING_OFFSET / 2;
const RING32 = USED_RING_OFFSET / 4;
const ELEM_WORDS = USED_ELEM_SIZE / 4;

/**
 * All bookkeeping is in private memory. From the shared memory only `used.flags`, `used.idx`,
 * `used.ring` and `avail_event` are read; descriptors and the available ring are written, never read.
 *
 * Free descriptors form a private list, taken and returned at the front as whole chains. A freed chain
 * therefore keeps its inner links, and a framed request that takes it again finds header and trailer
 * already written (`shape`). With IN_ORDER descriptors are taken in table order instead (2.7.9).
 */
export class SplitRing {
  /** Bytes the device wrote into the chain returned last by {@link poll}, clamped to what it may write. */
  usedLength = 0;
  /** Chains committed and not yet returned. */
  inFlight = 0;
  /** Free ring descriptors. */
  numFree: number;

  private readonly size: number;
  private readonly mask: number;
  private readonly eventIdx: boolean;
  private readonly inOrder: boolean;
  private readonly desc: Int32Array;
  private readonly avail: Uint16Array;
  private readonly used16: Uint16Array;
  private readonly used32: Uint32Array;
  private readonly usedEventAt: number;
  private readonly availEventAt: number;

  private readonly slots: SlotMemory;
  /** With tables: free descriptors from which on framed requests use the ring itself. */
  private readonly directReserve: number;

  /** Link of each descriptor in the free list, and from then on in its chain. */
  private readonly next: Uint16Array;
  /** Last ring descriptor of the chain that begins here. */
  private readonly last: Uint16Array;
  /** Ring descriptors of the chain that begins here; 0 when none is in flight. */
  private readonly ringCount: Uint16Array;
  /** Bytes the device may write into the chain that begins here. */
  private readonly writable: Uint32Array;
  /** What the descriptors of the chain that begins here still hold. */
  private readonly shape: Uint8Array;
  /** IN_ORDER: heads in the order made available, a ring of `size`. */
  private readonly order: Uint16Array;
  /** IN_ORDER: position in `order` of each head in flight. */
  private readonly orderAt: Uint16Array;

  private readonly builder = new ChainBuilder();
  private buildHead = 0;
  private buildCursor = 0;
  private freeHead = 0;
  private availIdx = 0;
  private published = 0;
  private lastUsed = 0;
  private usedLimit = 0;
  /** IN_ORDER: chains of the batch that the last used entry closed and that are still to be returned. */
  private batch = 0;
  private batchLength = 0;

  constructor(options: RingOptions) {
    const { layout, buffer, offset, resume } = options;
    const n = layout.queueSize;
    this.size = n;
    this.mask = n - 1;
    this.numFree = n;
    this.eventIdx = options.eventIdx;
    this.inOrder = options.inOrder;

    if (resume === undefined) new Uint8Array(buffer, offset, layout.deviceAreaEnd).fill(0);
    else this.goOnAt(resume);
    this.desc = new Int32Array(buffer, offset, n * DESC_WORDS);
    this.avail = new Uint16Array(buffer, offset + layout.driverAreaOffset, RING16 + n + 1);
    this.usedEventAt = RING16 + n;
    const usedBytes = layout.deviceAreaEnd - layout.deviceAreaOffset;
    this.used16 = new Uint16Array(buffer, offset + layout.deviceAreaOffset, usedBytes / 2);
    this.used32 = new Uint32Array(buffer, offset + layout.deviceAreaOffset, usedBytes / 4);
    this.availEventAt = (USED_RING_OFFSET + USED_ELEM_SIZE * n) / 2;

    this.slots = new SlotMemory(options);
    this.directReserve = Math.max(FRAME_ELEMENTS - 1, n >> 1);

    this.next = Uint16Array.from({ length: n }, (_, i) => (i + 1) & this.mask);
    this.last = new Uint16Array(n);
    this.ringCount = new Uint16Array(n);
    this.writable = new Uint32Array(n);
    this.shape = new Uint8Array(n);
    this.order = new Uint16Array(this.inOrder ? n : 0);
    this.orderAt = new Uint16Array(this.inOrder ? n : 0);
  }

  /** Start a chain; see `Virtqueue.begin`. */
  begin(count: number): number {
    const indirect = count > 1 && count <= this.slots.tableEntries;
    if (this.numFree < (indirect ? 1 : count)) return -1;
    this.builder.start(count, indirect);
    this.buildHead = this.freeHead;
    this.buildCursor = this.freeHead;
    if (indirect) this.shape[this.freeHead] = SHAPE_NONE;
    return this.freeHead;
  }

  /** Add an element to the chain under construction. */
  push(lo: number, hi: number, length: number, isWritable: boolean): void {
    const builder = this.builder;
    builder.add(length, isWritable);
    const flags = VIRTQ_DESC_F_NEXT | (isWritable ? VIRTQ_DESC_F_WRITE : 0);
    if (builder.indirect) {
      const at = this.slots.entryAt(this.buildHead, builder.count - 1);
      writeDescriptor(this.slots.table, at, lo, hi, length, flags | (builder.count << 16));
      return;
    }
    const d = this.buildCursor;
    writeDescriptor(this.desc, d * DESC_WORDS, lo, hi, length, flags | (this.next[d] << 16));
    this.shape[d] = SHAPE_NONE;
    this.last[this.buildHead] = d;
    this.buildCursor = this.next[d];
  }

  /** End the chain under construction; see `Virtqueue.commit`. */
  commit(): number {
    const builder = this.builder;
    const head = this.buildHead;
    builder.finish(head === this.freeHead);
    const count = builder.count;
    if (builder.indirect) {
      // The last entry of a table has no NEXT; nothing of it is visible yet.
      this.slots.table[this.slots.entryAt(head, count) - 1] &= VIRTQ_DESC_F_WRITE;
      this.writeIndirect(head, count);
      this.take(head, head, 1, clampU32(builder.writable));
    } else {
      this.desc[this.last[head] * DESC_WORDS + 3] &= VIRTQ_DESC_F_WRITE;
      this.take(head, this.last[head], count, clampU32(builder.writable));
    }
    return head;
  }

  /** Drop the chain under construction: the free list was not touched, so there is nothing to undo. */
  rewind(): void {
    this.builder.discard();
  }

  /** Add header, one data element and trailer as one chain; see `Virtqueue.addFramed`. */
  addFramed(lo: number, hi: number, length: number, isWritable: boolean): number {
    const head = this.freeHead;
    const { slots } = this;
    const flags = isWritable ? VIRTQ_DESC_F_NEXT | VIRTQ_DESC_F_WRITE : VIRTQ_DESC_F_NEXT;
    const writable = isWritable ? length + slots.trailerLength : slots.trailerLength;
    // Three descriptors in the ring cost the device less than a table that it has to fetch. Tables, which
    // take one, keep the second half of the ring good for as many requests as it has descriptors.
    if (slots.frameFits && this.numFree <= this.directReserve) {
      if (this.numFree === 0) return -1;
      if (this.shape[head] !== SHAPE_FRAME_INDIRECT) this.prepareIndirect(head);
      writeDescriptor(slots.table, slots.entryAt(head, 1), lo, hi, length, flags | (2 << 16));
      this.take(head, head, 1, writable);
      return head;
    }
    if (this.numFree < FRAME_ELEMENTS) return -1;
    const data = this.next[head];
    const trailer = this.next[data];
    if (this.shape[head] !== SHAPE_FRAME_DIRECT) this.prepareDirect(head, data, trailer);
    writeDescriptor(this.desc, data * DESC_WORDS, lo, hi, length, flags | (trailer << 16));
    this.take(head, trailer, FRAME_ELEMENTS, writable);
    return head;
  }

  /** Add header, any number of data elements and trailer as one chain; see `Virtqueue.addFramedList`. */
  addFramedList(list: SegmentList, isWritable: boolean): number {
    const head = this.freeHead;
    const { slots } = this;
    const { count } = list;
    const elements = count + 2;
    const flags = isWritable ? VIRTQ_DESC_F_NEXT | VIRTQ_DESC_F_WRITE : VIRTQ_DESC_F_NEXT;
    const writable = clampU32(isWritable ? list.bytes + slots.trailerLength : slots.trailerLength);
    if (elements <= slots.tableEntries) {
      if (this.numFree === 0) return -1;
      slots.writeFrame(head, count + 1, VIRTQ_DESC_F_NEXT | (1 << 16), VIRTQ_DESC_F_WRITE);
      for (let i = 0, at = slots.entryAt(head, 1); i < count; i++, at += DESC_WORDS) {
        writeDescriptor(slots.table, at, list.lo[i], list.hi[i], list.length[i], flags | ((i + 2) << 16));
      }
      this.writeIndirect(head, elements);
      this.shape[head] = SHAPE_NONE;
      this.take(head, head, 1, writable);
      return head;
    }
    if (this.numFree < elements) return -1;
    let last = this.next[head];
    for (let i = 0; i < count; i++) {
      const next = this.next[last];
      const at = last * DESC_WORDS;
      writeDescriptor(this.desc, at, list.lo[i], list.hi[i], list.length[i], flags | (next << 16));
      this.shape[last] = SHAPE_NONE;
      last = next;
    }
    this.prepareDirect(head, this.next[head], last);
    this.shape[head] = SHAPE_NONE;
    this.take(head, last, elements, writable);
    return head;
  }

  /** Make committed chains visible to the device; see `Virtqueue.publish`. */
  publish(): boolean {
    const idx = this.availIdx;
    const old = this.published;
    if (idx === old) return false;
    this.published = idx;
    // MO-1 release: descriptors and avail.ring before avail.idx. The device loads avail.idx with acquire
    // before it reads them (MO-11).
    Atomics.store(this.avail, IDX, idx);
    // MO-2 full: avail.idx before the load of used.flags or avail_event, both calls sequentially
    // consistent. The device stores avail_event or used.flags, then loads avail.idx again (MO-14): one of
    // the two sides sees the other's store.
    if (this.eventIdx) {
      const event = Atomics.load(this.used16, this.availEventAt);
      return ((idx - event - 1) & 0xffff) < ((idx - old) & 0xffff);
    }
    return (Atomics.load(this.used16, 0) & VIRTQ_USED_F_NO_NOTIFY) === 0;
  }

  /** Take back one used chain; see `Virtqueue.poll`. */
  poll(): number {
    const last = this.lastUsed;
    // A plain peek guards the atomic load; a stale value only means looking again later.
    if (last === this.usedLimit && (this.used16[IDX] === last || !this.loadUsedIdx())) return -1;
    if (this.inOrder) return this.pollInOrder();
    const at = RING32 + ELEM_WORDS * (last & this.mask);
    const id = this.used32[at];
    if (id >= this.size || this.ringCount[id] === 0) throw this.badId(id);
    const length = this.used32[at + 1];
    const writable = this.writable[id];
    this.usedLength = length > writable ? writable : length;
    this.lastUsed = (last + 1) & 0xffff;
    this.inFlight--;
    this.numFree += this.ringCount[id];
    this.ringCount[id] = 0;
    this.next[this.last[id]] = this.freeHead;
    this.freeHead = id;
    return id;
  }

  /** Whether `poll` would return a chain; asks the shared memory. */
  hasUsed(): boolean {
    return this.lastUsed !== this.usedLimit || Atomics.load(this.used16, IDX) !== this.lastUsed;
  }

  /** Ask the device to be silent; see `Virtqueue.disableNotifications`. */
  disableNotifications(): void {
    // With EVENT_IDX avail.flags must stay 0 (2.7.7.1): leaving used_event behind is all there is to do.
    if (!this.eventIdx) Atomics.store(this.avail, 0, VIRTQ_AVAIL_F_NO_INTERRUPT);
  }

  /** Ask for a notification at the next used chain; see `Virtqueue.enableNotifications`. */
  enableNotifications(): boolean {
    if (this.eventIdx) Atomics.store(this.avail, this.usedEventAt, this.lastUsed);
    else Atomics.store(this.avail, 0, 0);
    // MO-4 full: used_event or avail.flags before used.idx. The device stores used.idx, then loads
    // used_event or avail.flags (MO-13).
    return this.hasUsed();
  }

  /** Position part of a notification: `avail.idx`, whose bit 15 stands where packed rings have the wrap. */
  get notificationOffset(): number {
    return this.published;
  }

  /**
   * Where an idle ring stands: in the lower half the index that a stopped device goes on from (SET_VRING_BASE),
   * in the upper half the next descriptor, which counts only with IN_ORDER: there they are taken in table order.
   */
  get position(): number {
    return this.lastUsed + (this.inOrder ? this.freeHead * 0x10000 : 0);
  }

  private goOnAt(position: number): void {
    const index = position & 0xffff;
    this.availIdx = index;
    this.published = index;
    this.lastUsed = index;
    this.usedLimit = index;
    this.freeHead = position >>> 16;
  }

  private take(head: number, last: number, count: number, writable: number): void {
    this.freeHead = this.next[last];
    this.numFree -= count;
    this.last[head] = last;
    this.ringCount[head] = count;
    this.writable[head] = writable;
    const at = this.availIdx & this.mask;
    if (this.inOrder) {
      this.order[at] = head;
      this.orderAt[head] = at;
    }
    this.avail[RING16 + at] = head;
    this.availIdx = (this.availIdx + 1) & 0xffff;
    this.inFlight++;
  }

  /** Load used.idx once for the whole batch. */
  private loadUsedIdx(): boolean {
    // MO-3 acquire: used.idx before used.ring, data and status. The device stores it last (MO-12).
    const idx = Atomics.load(this.used16, IDX);
    const fresh = (idx - this.lastUsed) & 0xffff;
    const visible = (this.published - this.lastUsed) & 0xffff;
    if (fresh > visible) throw brokenRing("used.idx", idx, `at most ${visible} more than ${this.lastUsed}`);
    this.usedLimit = idx;
    return fresh !== 0;
  }

  /** IN_ORDER (2.7.9): one used entry may close a batch, from the oldest chain through the one it names. */
  private pollInOrder(): number {
    const oldest = this.lastUsed & this.mask;
    if (this.batch === 0) {
      const at = RING32 + ELEM_WORDS * oldest;
      const id = this.used32[at];
      if (id >= this.size || this.ringCount[id] === 0) throw this.badId(id);
      const count = ((this.orderAt[id] - oldest) & this.mask) + 1;
      const fresh = (this.usedLimit - this.lastUsed) & 0xffff;
      if (count > fresh) throw brokenRing("used.idx", this.usedLimit, `${count} more than ${this.lastUsed}`);
      this.batch = count;
      this.batchLength = this.used32[at + 1];
    }
    const id = this.order[oldest];
    const writable = this.writable[id];
    this.batch--;
    // Only the last chain of a batch has a length; the others were processed wholly.
    this.usedLength = this.batch > 0 || this.batchLength > writable ? writable : this.batchLength;
    this.lastUsed = (this.lastUsed + 1) & 0xffff;
    this.inFlight--;
    this.numFree += this.ringCount[id];
    this.ringCount[id] = 0;
    return id;
  }

  private prepareDirect(head: number, data: number, trailer: number): void {
    const { desc, slots } = this;
    const headerTail = VIRTQ_DESC_F_NEXT | (data << 16);
    const headerLo = slots.headerAddress(head);
    const trailerLo = slots.trailerAddress(head);
    writeDescriptor(desc, head * DESC_WORDS, headerLo, slots.requestHi, slots.headerLength, headerTail);
    writeDescriptor(desc, trailer * DESC_WORDS, trailerLo, slots.requestHi, slots.trailerLength, VIRTQ_DESC_F_WRITE);
    // In order, descriptors are taken wherever the table stands, so that no chain finds its frame again.
    this.shape[head] = this.inOrder ? SHAPE_NONE : SHAPE_FRAME_DIRECT;
    this.shape[data] = SHAPE_NONE;
    this.shape[trailer] = SHAPE_NONE;
  }

  private prepareIndirect(head: number): void {
    this.slots.writeFrame(head, 2, VIRTQ_DESC_F_NEXT | (1 << 16), VIRTQ_DESC_F_WRITE);
    this.writeIndirect(head, FRAME_ELEMENTS);
    this.shape[head] = SHAPE_FRAME_INDIRECT;
  }

  private writeIndirect(head: number, count: number): void {
    const lo = this.slots.tableAddress(head);
    writeDescriptor(this.desc, head * DESC_WORDS, lo, this.slots.tableHi, count * DESC_SIZE, VIRTQ_DESC_F_INDIRECT);
  }

  private badId(id: number): Error {
    return brokenRing("used.ring id", id, "the head of a chain in flight");
  }
}
