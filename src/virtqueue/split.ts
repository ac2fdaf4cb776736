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
  listShape,
  type RingOptions,
  SegmentWriter,
  SHAPE_DIRECT,
  SHAPE_NONE,
  SlotMemory,
  writeDescriptor,
} from "./ring.js";

const IDX = 1; // virtq_avail.idx and virtq_used.idx, in 16-bit units
const RING16 = AVAIL_RING_OFFSET / 2;
const RING32 = USED_RING_OFFSET / 4;
const ELEM_WORDS = USED_ELEM_SIZE / 4;

// Without `| 0` the engine converts an argument of unknown type through a double before it stores it. And
// an imported binding is loaded and checked at each use, a constant of the module is folded into the machine code:
// worth a third of the cost of a request.
const WORDS = DESC_WORDS;
const FRAMED = FRAME_ELEMENTS;
const NONE = SHAPE_NONE;
const DIRECT = SHAPE_DIRECT;
const F_NEXT = VIRTQ_DESC_F_NEXT;
const F_NEXT_WRITE = VIRTQ_DESC_F_NEXT | VIRTQ_DESC_F_WRITE;
const NO_NOTIFY = VIRTQ_USED_F_NO_NOTIFY;

// A private record of each descriptor: four words in one array, so that one base and one bound serve all of them.
// Records and descriptors alike are found by `<< 2`. Word 0: link in the free list, and from then on in the chain.
const RECORD_WORDS = 4;
/** Of the chain that begins here: its last ring descriptor, and in the upper half how many; 0 when not in flight. */
const EXTENT = 1;
/** Bytes that the device may write into the chain that begins here. */
const WRITABLE = 2;
/** What the descriptors of the chain that begins here still hold of the frame. */
const SHAPE = 3;

/**
 * All bookkeeping is in private memory. From the shared memory only `used.flags`, `used.idx`,
 * `used.ring` and `avail_event` are read; descriptors and the available ring are written, never read.
 *
 * Free descriptors form a private list, taken and returned at the front as whole chains. A freed chain
 * therefore keeps its inner links, and a framed request that takes it again finds header and trailer
 * already written (`SHAPE`). With IN_ORDER descriptors are taken in table order instead (2.7.9).
 */
export class SplitRing {
  /** Bytes the device wrote into the chain returned last by {@link poll}, clamped to what it may write. */
  usedLength = 0;
  /** Free ring descriptors. */
  numFree: number;
  /** Takes the data elements between {@link beginFramed} and {@link commitFramed}. */
  readonly segments: SegmentWriter;

  private readonly size: number;
  private readonly mask: number;
  private readonly eventIdx: boolean;
  private readonly inOrder: boolean;
  /** Everything that the ring itself takes of the shared memory. */
  private readonly shared: Uint8Array;
  private readonly desc: Int32Array;
  private readonly avail: Uint16Array;
  private readonly used16: Uint16Array;
  private readonly used32: Uint32Array;
  private readonly usedEventAt: number;
  private readonly availEventAt: number;

  private readonly slots: SlotMemory;
  /** Free descriptors down to which framed requests do not use the ring itself. */
  private readonly directReserve: number;

  private readonly records: Int32Array;
  /** What `published` was when the chain with this head was committed: while it still is so, look closer. */
  private readonly epochs: Uint16Array;
  /** IN_ORDER: heads in the order made available, a ring of `size`. */
  private readonly order: Uint16Array;
  /** IN_ORDER: position in `order` of each head in flight. */
  private readonly orderAt: Uint16Array;

  private readonly builder = new ChainBuilder();
  private buildHead = 0;
  private buildCursor = 0;
  private buildLast = 0;
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

    this.shared = new Uint8Array(buffer, offset, layout.deviceAreaEnd);
    this.desc = new Int32Array(buffer, offset, n * WORDS);
    this.avail = new Uint16Array(buffer, offset + layout.driverAreaOffset, RING16 + n + 1);
    this.usedEventAt = RING16 + n;
    const usedBytes = layout.deviceAreaEnd - layout.deviceAreaOffset;
    this.used16 = new Uint16Array(buffer, offset + layout.deviceAreaOffset, usedBytes / 2);
    this.used32 = new Uint32Array(buffer, offset + layout.deviceAreaOffset, usedBytes / 4);
    this.availEventAt = (USED_RING_OFFSET + USED_ELEM_SIZE * n) / 2;

    this.slots = new SlotMemory(options);
    this.segments = new SegmentWriter(n);
    // Three descriptors in the ring cost the device less than a table that it has to fetch. Tables, which take
    // one, keep the second half of the ring good for as many requests as it has descriptors.
    this.directReserve = this.slots.frameFits ? Math.max(FRAMED - 1, n >> 1) : FRAMED - 1;

    this.records = new Int32Array(n * RECORD_WORDS);
    this.epochs = new Uint16Array(n);
    this.order = new Uint16Array(this.inOrder ? n : 0);
    this.orderAt = new Uint16Array(this.inOrder ? n : 0);
    this.freeAll();
    if (resume === undefined) this.shared.fill(0);
    else this.goOnAt(resume);
  }

  /** What broke the ring: from then on thrown by every call. */
  failure: Error | undefined = undefined;
  /** Chains committed and not yet returned. */
  get inFlight(): number {
    return (this.availIdx - this.lastUsed) & 0xffff;
  }

  /** Break the ring; the first error stays. */
  fail(error: Error): Error {
    this.failure ??= error;
    return error;
  }

  /** Clear the ring and forget every chain; see `Virtqueue.restart`. */
  restart(): void {
    this.builder.discard();
    this.batch = 0;
    this.numFree = this.size;
    this.freeAll();
    this.shared.fill(0);
    this.goOnAt(0);
  }

  /** Start a chain; see `Virtqueue.begin`. */
  begin(count: number): number {
    const indirect = count > 1 && count <= this.slots.tableEntries;
    if (this.numFree < (indirect ? 1 : count)) return -1;
    this.builder.start(count, indirect);
    this.buildHead = this.freeHead;
    this.buildCursor = this.freeHead;
    if (indirect) this.records[(this.freeHead << 2) + SHAPE] = NONE;
    return this.freeHead;
  }

  /** Add an element to the chain under construction. */
  push(lo: number, hi: number, length: number, isWritable: boolean): void {
    const { builder, records } = this;
    builder.add(length, isWritable);
    const flags = isWritable ? F_NEXT_WRITE : F_NEXT;
    if (builder.indirect) {
      const at = this.slots.entryAt(this.buildHead, builder.count - 1);
      writeDescriptor(this.slots.table, at, lo, hi, length, flags | (builder.count << 16));
      return;
    }
    const d = this.buildCursor;
    const next = records[d << 2];
    writeDescriptor(this.desc, d << 2, lo, hi, length, flags | (next << 16));
    records[(d << 2) + SHAPE] = NONE;
    this.buildLast = d;
    this.buildCursor = next;
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
      this.desc[(this.buildLast << 2) + 3] &= VIRTQ_DESC_F_WRITE;
      this.take(head, this.buildLast, count, clampU32(builder.writable));
    }
    return head;
  }

  /** Drop the chain under construction: the free list was not touched, so there is nothing to undo. */
  rewind(): void {
    this.builder.discard();
  }

  /** Add header, one data element and trailer as one chain; see `Virtqueue.addFramed`. */
  addFramed(lo: number, hi: number, length: number, isWritable: boolean): number {
    if (this.failure !== undefined) throw this.failure;
    if (this.numFree <= this.directReserve) return this.addFramedIndirect(lo, hi, length, isWritable);
    const { records, desc } = this;
    const head = this.freeHead;
    const data = records[head << 2];
    const trailer = records[data << 2];
    if (records[(head << 2) + SHAPE] !== DIRECT) this.prepareDirect(head, data, trailer);
    const at = data << 2;
    desc[at] = lo | 0;
    desc[at + 1] = hi | 0;
    desc[at + 2] = length | 0;
    desc[at + 3] = (isWritable ? F_NEXT_WRITE : F_NEXT) | (trailer << 16);
    this.take(head, trailer, FRAMED, isWritable ? length + this.slots.trailerLength : this.slots.trailerLength);
    return head;
  }

  /** Start a framed request of `count` data elements; see `Virtqueue.beginFramed`. */
  beginFramed(count: number, isWritable: boolean): number {
    const { builder, slots } = this;
    const indirect = count + 2 <= slots.tableEntries;
    if (this.numFree < (indirect ? 1 : count + 2)) return -1;
    const head = this.freeHead;
    builder.startFramed(indirect, isWritable);
    this.buildHead = head;
    if (indirect) {
      const shape = listShape(count, isWritable);
      if (this.records[(head << 2) + SHAPE] !== shape) {
        this.prepareIndirect(head, count + 1, shape);
        slots.writeTails(head, count, (isWritable ? F_NEXT_WRITE : F_NEXT) | (2 << 16), 1 << 16);
      }
      this.segments.start(slots.table, slots.entryAt(head, 1), count);
    } else {
      this.segments.start(this.segments.staging, 0, count);
    }
    return head;
  }

  /** End the framed request; see `Virtqueue.commitFramed`. */
  commitFramed(): number {
    const { builder, segments, slots, records, desc } = this;
    const head = this.buildHead;
    const { count } = segments;
    builder.finishFramed(head === this.freeHead, segments);
    const writable = builder.isWritable ? clampU32(segments.bytes + slots.trailerLength) : slots.trailerLength;
    if (builder.indirect) {
      this.take(head, head, 1, writable);
      return head;
    }
    const { staging } = segments;
    const flags = builder.isWritable ? F_NEXT_WRITE : F_NEXT;
    let last = records[head << 2];
    for (let from = 0; from < count << 2; from += WORDS) {
      const at = last << 2;
      records[(last << 2) + SHAPE] = NONE;
      last = records[last << 2];
      desc[at] = staging[from];
      desc[at + 1] = staging[from + 1];
      desc[at + 2] = staging[from + 2];
      desc[at + 3] = flags | (last << 16);
    }
    this.prepareDirect(head, records[head << 2], last);
    records[(head << 2) + SHAPE] = NONE;
    this.take(head, last, count + 2, writable);
    return head;
  }

  /** Make committed chains visible to the device; see `Virtqueue.publish`. */
  publish(): boolean {
    if (this.failure !== undefined) throw this.failure;
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
    return (Atomics.load(this.used16, 0) & NO_NOTIFY) === 0;
  }

  /** Take back one used chain; see `Virtqueue.poll`. */
  poll(): number {
    if (this.failure !== undefined) throw this.failure;
    const last = this.lastUsed;
    // A plain peek guards the atomic load; a stale value only means looking again later.
    if (last === this.usedLimit && (this.used16[IDX] === last || !this.loadUsedIdx())) return -1;
    if (this.inOrder) return this.pollInOrder();
    const { records, used32 } = this;
    const at = RING32 + ELEM_WORDS * (last & this.mask);
    const id = used32[at];
    if (id >= this.size) throw this.fail(badId(id));
    const record = id << 2;
    const extent = records[record + EXTENT];
    if (extent === 0 || (this.epochs[id] === this.published && this.isUnpublished(id))) throw this.fail(badId(id));
    const length = used32[at + 1];
    const writable = records[record + WRITABLE] >>> 0;
    this.usedLength = length > writable ? writable : length;
    this.lastUsed = (last + 1) & 0xffff;
    this.numFree += extent >>> 16;
    records[record + EXTENT] = 0;
    records[(extent & 0xffff) << 2] = this.freeHead;
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

  /** Ask for a notification; see `Virtqueue.enableNotifications`. */
  enableNotifications(unnoticed: number): boolean {
    let ahead = 0;
    if (this.eventIdx) {
      // used_event is the index behind which the device notifies.
      ahead = Math.min(unnoticed, ((this.published - this.lastUsed) & 0xffff) >> 1);
      Atomics.store(this.avail, this.usedEventAt, (this.lastUsed + ahead) & 0xffff);
    } else {
      Atomics.store(this.avail, 0, 0);
    }
    // MO-4 full: used_event or avail.flags before used.idx. The device stores used.idx, then loads
    // used_event or avail.flags (MO-13).
    return ((Atomics.load(this.used16, IDX) - this.lastUsed) & 0xffff) > ahead;
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

  /** Where the next used chain is taken: the value of SET_VRING_BASE. */
  get usedPosition(): number {
    return this.lastUsed;
  }

  /** Put all descriptors into the free list, in the order of the table. */
  private freeAll(): void {
    this.records.fill(0);
    for (let d = 0; d < this.size; d++) this.records[d << 2] = (d + 1) & this.mask;
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
    const { records } = this;
    const record = head << 2;
    this.freeHead = records[last << 2];
    this.numFree -= count;
    records[record + EXTENT] = last | (count << 16);
    records[record + WRITABLE] = writable | 0;
    this.epochs[head] = this.published;
    const idx = this.availIdx;
    const at = idx & this.mask;
    if (this.inOrder) {
      this.order[at] = head;
      this.orderAt[head] = at;
    }
    this.avail[RING16 + at] = head;
    this.availIdx = (idx + 1) & 0xffff;
  }

  /**
   * Whether the chain with this head was committed after the last publish, or 65536 chains before. The available ring
   * tells; a device that wrote into it, too, is told to be lying or believed, and either harms only itself.
   */
  private isUnpublished(head: number): boolean {
    for (let idx = this.published; idx !== this.availIdx; idx = (idx + 1) & 0xffff) {
      if (this.avail[RING16 + (idx & this.mask)] === head) return true;
    }
    return false;
  }

  /** Load used.idx once for the whole batch. */
  private loadUsedIdx(): boolean {
    // MO-3 acquire: used.idx before used.ring, data and status. The device stores it last (MO-12).
    const idx = Atomics.load(this.used16, IDX);
    const fresh = (idx - this.lastUsed) & 0xffff;
    const visible = (this.published - this.lastUsed) & 0xffff;
    if (fresh > visible) throw this.fail(brokenRing("used.idx", idx, `at most ${visible} more than ${this.lastUsed}`));
    this.usedLimit = idx;
    return fresh !== 0;
  }

  /** IN_ORDER (2.7.9): one used entry may close a batch, from the oldest chain through the one it names. */
  private pollInOrder(): number {
    const { records } = this;
    const oldest = this.lastUsed & this.mask;
    if (this.batch === 0) {
      const at = RING32 + ELEM_WORDS * oldest;
      const id = this.used32[at];
      if (id >= this.size || records[(id << 2) + EXTENT] === 0) throw this.fail(badId(id));
      const count = ((this.orderAt[id] - oldest) & this.mask) + 1;
      const fresh = (this.usedLimit - this.lastUsed) & 0xffff;
      if (count > fresh) throw this.fail(brokenRing("used.idx", this.usedLimit, `${count} more than ${this.lastUsed}`));
      this.batch = count;
      this.batchLength = this.used32[at + 1];
    }
    const id = this.order[oldest];
    const writable = records[(id << 2) + WRITABLE] >>> 0;
    this.batch--;
    // Only the last chain of a batch has a length; the others were processed wholly.
    this.usedLength = this.batch > 0 || this.batchLength > writable ? writable : this.batchLength;
    this.lastUsed = (this.lastUsed + 1) & 0xffff;
    this.numFree += records[(id << 2) + EXTENT] >>> 16;
    records[(id << 2) + EXTENT] = 0;
    return id;
  }

  private addFramedIndirect(lo: number, hi: number, length: number, isWritable: boolean): number {
    const { slots } = this;
    if (!slots.frameFits || this.numFree === 0) return -1;
    const head = this.freeHead;
    if (this.records[(head << 2) + SHAPE] !== FRAMED - 1) this.prepareIndirect(head, FRAMED - 1, FRAMED - 1);
    const { table } = slots;
    const at = slots.entryAt(head, 1);
    table[at] = lo | 0;
    table[at + 1] = hi | 0;
    table[at + 2] = length | 0;
    table[at + 3] = (isWritable ? F_NEXT_WRITE : F_NEXT) | (2 << 16);
    this.take(head, head, 1, isWritable ? length + slots.trailerLength : slots.trailerLength);
    return head;
  }

  private prepareDirect(head: number, data: number, trailer: number): void {
    const { desc, slots, records } = this;
    const headerTail = VIRTQ_DESC_F_NEXT | (data << 16);
    const headerLo = slots.headerAddress(head);
    const trailerLo = slots.trailerAddress(head);
    writeDescriptor(desc, head << 2, headerLo, slots.requestHi, slots.headerLength, headerTail);
    writeDescriptor(desc, trailer << 2, trailerLo, slots.requestHi, slots.trailerLength, VIRTQ_DESC_F_WRITE);
    // In order, descriptors are taken wherever the table stands, so that no chain finds its frame again.
    records[(head << 2) + SHAPE] = this.inOrder ? NONE : DIRECT;
    records[(data << 2) + SHAPE] = NONE;
    records[(trailer << 2) + SHAPE] = NONE;
  }

  private prepareIndirect(head: number, trailerEntry: number, shape: number): void {
    this.slots.writeFrame(head, trailerEntry, VIRTQ_DESC_F_NEXT | (1 << 16), VIRTQ_DESC_F_WRITE);
    this.writeIndirect(head, trailerEntry + 1);
    this.records[(head << 2) + SHAPE] = shape;
  }

  private writeIndirect(head: number, count: number): void {
    const lo = this.slots.tableAddress(head);
    writeDescriptor(this.desc, head << 2, lo, this.slots.tableHi, count * DESC_SIZE, VIRTQ_DESC_F_INDIRECT);
  }
}

function badId(id: number): Error {
  return brokenRing("used.ring id", id, "the head of a published chain in flight");
}
