/** The driver's half of a packed virtqueue (virtio 1.3, 2.8). */

import {
  DESC_SIZE,
  RING_EVENT_FLAGS_DESC,
  RING_EVENT_FLAGS_DISABLE,
  RING_EVENT_FLAGS_ENABLE,
  VIRTQ_DESC_F_AVAIL,
  VIRTQ_DESC_F_INDIRECT,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_USED,
  VIRTQ_DESC_F_WRITE,
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
  SHAPE_NONE,
  SlotMemory,
  writeDescriptor,
} from "./ring.js";

const DESC_HALVES = DESC_SIZE / 2;
const ID16 = 6; // pvirtq_desc.id and .flags, in 16-bit units
const FLAGS16 = 7;
const TAIL = 3; // the 32-bit word of id (low half) and flags (high half)
const USED_MASK = VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED;
const WRAP_BIT = 1 << 15;

// Without `| 0` the engine converts an argument of unknown type through a double before it stores it. And
// an imported binding is loaded and checked at each use, a constant of the module is folded into the machine code.
const WORDS = DESC_WORDS;
const FRAMED = FRAME_ELEMENTS;
const NONE = SHAPE_NONE;
const DESC_BYTES = DESC_SIZE;
const F_NEXT = VIRTQ_DESC_F_NEXT;
const F_NEXT_WRITE = VIRTQ_DESC_F_NEXT | VIRTQ_DESC_F_WRITE;
const F_AVAIL = VIRTQ_DESC_F_AVAIL;
const F_WRITE = VIRTQ_DESC_F_WRITE;
const F_INDIRECT = VIRTQ_DESC_F_INDIRECT;
const EVENT_DISABLE = RING_EVENT_FLAGS_DISABLE;
const EVENT_DESC = RING_EVENT_FLAGS_DESC;

// A private record of each buffer id: four words in one array, so that one base and one bound serve all of them.
// Records and descriptors alike are found by `<< 2`. Word 0: ring descriptors of the chain with this id; 0 when none
// is in flight.
const RECORD_WORDS = 4;
/** Bytes that the device may write into the chain with this id. */
const WRITABLE = 1;
/** What the indirect table of this id still holds of the frame. */
const SHAPE = 2;
/** The free id behind this one: a list used as a stack, or with IN_ORDER a circle of all ids. */
const NEXT_ID = 3;

/**
 * All bookkeeping is in private memory, by buffer id. From the shared memory only the flags, id and len of
 * the entry at the used position and the device's event suppression are read.
 *
 * The first entry of the first chain of a batch is kept back until `publish`: one store makes the whole
 * batch visible, because the device goes through the ring in order and stops at that entry.
 */
export class PackedRing {
  /** Bytes the device wrote into the chain returned last by {@link poll}, clamped to what it may write. */
  usedLength = 0;
  /** What broke the ring: from then on thrown by every call. */
  failure: Error | undefined = undefined;
  /** Chains committed and not yet returned. */
  inFlight = 0;
  /** Free ring descriptors. While there is one there is a free buffer id, too: a chain takes at least one. */
  numFree: number;
  /** Takes the data elements between {@link beginFramed} and {@link commitFramed}. */
  readonly segments: SegmentWriter;

  private readonly size: number;
  private readonly eventIdx: boolean;
  private readonly inOrder: boolean;
  /** Everything that the ring itself takes of the shared memory. */
  private readonly shared: Uint8Array;
  private readonly desc: Int32Array;
  private readonly desc16: Uint16Array;
  private readonly driverEvent: Uint16Array;
  private readonly deviceEvent: Uint32Array;

  private readonly slots: SlotMemory;

  private readonly records: Int32Array;
  /** What {@link epoch} was when the chain with this id was committed. */
  private readonly epochs: Int32Array;
  /** Moves on with each publish: a chain committed in the present epoch is not visible to the device yet. */
  private epoch = 0;
  private freeId = 0;
  /** Free descriptors down to which framed requests do not use tables. */
  private readonly directReserve: number;

  private readonly builder = new ChainBuilder();
  private buildId = 0;
  private buildCursor = 0;
  private buildBits = VIRTQ_DESC_F_AVAIL;
  private buildTail = 0;
  private buildHeadTail = 0;

  private nextAvail = 0;
  /** AVAIL and USED of an available entry at `nextAvail`: AVAIL is the driver's wrap counter. */
  private availBits = VIRTQ_DESC_F_AVAIL;
  private nextUsed = 0;
  /** AVAIL and USED of a used entry at `nextUsed`: both are the wrap counter of the used position. */
  private usedBits = USED_MASK;
  /** Word index of the tail kept back for `publish`; -1 when nothing is committed. */
  private heldAt = -1;
  private heldTail = 0;
  /** IN_ORDER: chains of the batch that the last used entry closed and that are still to be returned. */
  private batch = 0;
  private batchLength = 0;

  constructor(options: RingOptions) {
    const { layout, buffer, offset, resume } = options;
    const n = layout.queueSize;
    this.size = n;
    this.numFree = n;
    this.eventIdx = options.eventIdx;
    this.inOrder = options.inOrder;

    this.shared = new Uint8Array(buffer, offset, layout.deviceAreaEnd);
    this.desc = new Int32Array(buffer, offset, n * WORDS);
    this.desc16 = new Uint16Array(buffer, offset, n * DESC_HALVES);
    this.driverEvent = new Uint16Array(buffer, offset + layout.driverAreaOffset, 2);
    this.deviceEvent = new Uint32Array(buffer, offset + layout.deviceAreaOffset, 1);

    this.slots = new SlotMemory(options);

    this.segments = new SegmentWriter(n);
    this.directReserve = this.slots.frameFits ? 0 : n;

    this.records = new Int32Array(n * RECORD_WORDS);
    this.epochs = new Int32Array(n);
    this.freeAll();
    if (resume === undefined) this.shared.fill(0);
    else this.goOnAt(resume);
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
    this.heldAt = -1;
    this.inFlight = 0;
    this.numFree = this.size;
    this.freeId = 0;
    this.freeAll();
    this.shared.fill(0);
    this.goOnAt(WRAP_BIT);
  }

  /** Start a chain; see `Virtqueue.begin`. */
  begin(count: number): number {
    const indirect = count > 1 && count <= this.slots.tableEntries;
    if (this.numFree < (indirect ? 1 : count)) return -1;
    this.builder.start(count, indirect);
    this.buildId = this.freeId;
    this.buildCursor = this.nextAvail;
    this.buildBits = this.availBits;
    if (indirect) this.records[(this.buildId << 2) + SHAPE] = NONE;
    return this.buildId;
  }

  /** Add an element to the chain under construction. */
  push(lo: number, hi: number, length: number, isWritable: boolean): void {
    const builder = this.builder;
    builder.add(length, isWritable);
    const write = isWritable ? VIRTQ_DESC_F_WRITE : 0;
    if (builder.indirect) {
      // Order in a table is positional: neither NEXT nor id (2.8.8).
      writeDescriptor(
        this.slots.table,
        this.slots.entryAt(this.buildId, builder.count - 1),
        lo,
        hi,
        length,
        write << 16,
      );
      return;
    }
    const at = this.buildCursor << 2;
    const tail = this.buildId | ((VIRTQ_DESC_F_NEXT | write | this.buildBits) << 16);
    this.desc[at] = lo;
    this.desc[at + 1] = hi;
    this.desc[at + 2] = length;
    // The first entry's flags are what publishes the chain: they wait for commit and publish.
    if (builder.count === 1) this.buildHeadTail = tail;
    else this.desc[at + TAIL] = tail;
    this.buildTail = at + TAIL;
    if (++this.buildCursor === this.size) {
      this.buildCursor = 0;
      this.buildBits ^= USED_MASK;
    }
  }

  /** End the chain under construction; see `Virtqueue.commit`. */
  commit(): number {
    const builder = this.builder;
    const id = this.buildId;
    builder.finish(id === this.freeId);
    const count = builder.count;
    const noNext = ~(VIRTQ_DESC_F_NEXT << 16);
    if (builder.indirect) {
      this.takeIndirect(id, count, clampU32(builder.writable));
    } else {
      if (count === 1) this.buildHeadTail &= noNext;
      else this.desc[this.buildTail] &= noNext;
      this.take(id, this.buildHeadTail, count, clampU32(builder.writable));
    }
    return id;
  }

  /**
   * Drop the chain under construction. Entries behind the first already look available; a shorter chain
   * that comes next would lead the device into them, so they are marked as not available in this round.
   */
  rewind(): void {
    const builder = this.builder;
    if (builder.limit !== 0 && !builder.indirect) {
      let cursor = this.nextAvail;
      let bits = this.availBits;
      for (let i = 0; i < builder.count; i++) {
        // Not available in this round: AVAIL and USED both the opposite of AVAIL's value for "available".
        const unavailable = (bits & VIRTQ_DESC_F_AVAIL) === 0 ? USED_MASK : 0;
        if (i > 0) this.desc[(cursor << 2) + TAIL] = unavailable << 16;
        if (++cursor === this.size) {
          cursor = 0;
          bits ^= USED_MASK;
        }
      }
    }
    builder.discard();
  }

  /** Add header, one data element and trailer as one chain; see `Virtqueue.addFramed`. */
  addFramed(lo: number, hi: number, length: number, isWritable: boolean): number {
    if (this.failure !== undefined) throw this.failure;
    // Without tables, or without room.
    if (this.numFree <= this.directReserve) return this.addFramedDirect(lo, hi, length, isWritable);
    const { slots } = this;
    const id = this.freeId;
    if (this.records[(id << 2) + SHAPE] !== FRAMED - 1) this.prepareIndirect(id, FRAMED - 1, FRAMED - 1);
    const { table } = slots;
    const at = slots.entryAt(id, 1);
    table[at] = lo | 0;
    table[at + 1] = hi | 0;
    table[at + 2] = length | 0;
    table[at + 3] = isWritable ? F_WRITE << 16 : 0;
    this.takeIndirect(id, FRAMED, isWritable ? length + slots.trailerLength : slots.trailerLength);
    return id;
  }

  /** Start a framed request of `count` data elements; see `Virtqueue.beginFramed`. */
  beginFramed(count: number, isWritable: boolean): number {
    const { builder, slots } = this;
    const indirect = count + 2 <= slots.tableEntries;
    if (this.numFree < (indirect ? 1 : count + 2)) return -1;
    const id = this.freeId;
    builder.startFramed(indirect, isWritable);
    this.buildId = id;
    if (indirect) {
      const shape = listShape(count, isWritable);
      if (this.records[(id << 2) + SHAPE] !== shape) {
        this.prepareIndirect(id, count + 1, shape);
        slots.writeTails(id, count, isWritable ? F_WRITE << 16 : 0, 0);
      }
      this.segments.start(slots.table, slots.entryAt(id, 1), count);
    } else {
      this.segments.start(this.segments.staging, 0, count);
    }
    return id;
  }

  /** End the framed request; see `Virtqueue.commitFramed`. */
  commitFramed(): number {
    const { builder, segments, slots, desc, size } = this;
    const id = this.buildId;
    const { count } = segments;
    builder.finishFramed(id === this.freeId, segments);
    const writable = builder.isWritable ? clampU32(segments.bytes + slots.trailerLength) : slots.trailerLength;
    if (builder.indirect) {
      this.takeIndirect(id, count + 2, writable);
      return id;
    }
    let cursor = this.nextAvail;
    let bits = this.availBits;
    const headTail = this.writeHeader(id, cursor << 2, bits);
    const { staging } = segments;
    const flags = builder.isWritable ? F_NEXT_WRITE : F_NEXT;
    for (let from = 0; from < count << 2; from += WORDS) {
      if (++cursor === size) {
        cursor = 0;
        bits ^= USED_MASK;
      }
      const at = cursor << 2;
      desc[at] = staging[from];
      desc[at + 1] = staging[from + 1];
      desc[at + 2] = staging[from + 2];
      desc[at + 3] = id | ((flags | bits) << 16);
    }
    this.writeTrailer(id, cursor + 1, bits);
    this.take(id, headTail, count + 2, writable);
    return id;
  }

  /** Make committed chains visible to the device; see `Virtqueue.publish`. */
  publish(): boolean {
    if (this.failure !== undefined) throw this.failure;
    const held = this.heldAt;
    if (held < 0) return false;
    // MO-5 release: every other entry, and addr, len and id of this one, before its flags. The device
    // loads the flags with acquire before it reads them (MO-11). One 32-bit store holds id and flags.
    Atomics.store(this.desc, held, this.heldTail);
    const added = this.numHeld;
    this.heldAt = -1;
    this.epoch = (this.epoch + 1) | 0;
    // MO-6 full: flags before the load of the device's event suppression, both calls sequentially
    // consistent. The device stores its event suppression, then loads the flags again (MO-14). One 32-bit
    // load takes desc and flags together (MO-8 on the device's side).
    const event = Atomics.load(this.deviceEvent, 0);
    const flags = (event >>> 16) & 3;
    if (flags === EVENT_DISABLE) return false;
    // DESC without EVENT_IDX and the reserved value 3 are the device's fault; a notification never hurts.
    if (flags !== EVENT_DESC || !this.eventIdx) return true;
    const next = this.nextAvail;
    let off = event & (WRAP_BIT - 1);
    if ((event & WRAP_BIT) !== (this.availBits & F_AVAIL) << 8) off -= this.size;
    return ((next - off - 1) & 0xffff) < added;
  }

  /** Take back one used chain; see `Virtqueue.poll`. */
  poll(): number {
    if (this.failure !== undefined) throw this.failure;
    const { records, inOrder } = this;
    let id = 0;
    let length = 0;
    if (this.batch === 0) {
      const { desc16 } = this;
      const at = this.nextUsed * DESC_HALVES;
      // A plain peek guards the atomic load; a stale value only means looking again later.
      if ((desc16[at + FLAGS16] & USED_MASK) !== this.usedBits || this.inFlight === 0) return -1;
      // MO-7 acquire: flags before id, len, data and status. The device stores flags last (MO-12).
      const flags = Atomics.load(desc16, at + FLAGS16);
      if ((flags & USED_MASK) !== this.usedBits) return -1;
      id = desc16[at + ID16];
      if (id >= this.size || records[id << 2] === 0 || (this.heldAt >= 0 && this.epochs[id] === this.epoch)) {
        throw this.fail(badId(id));
      }
      // By 2.8.5 len counts only where WRITE is set. QEMU never sets it and means len all the same, as Linux takes it.
      length = this.desc[(this.nextUsed << 2) + 2] >>> 0;
      if (inOrder) this.startBatch(id, length);
    }
    if (inOrder) {
      id = this.oldestId;
      length = this.nextLength(id);
    }
    const record = id << 2;
    const count = records[record];
    const writable = records[record + WRITABLE] >>> 0;
    this.usedLength = length > writable ? writable : length;
    records[record] = 0;
    this.numFree += count;
    this.inFlight--;
    const after = this.nextUsed + count;
    if (after >= this.size) {
      this.nextUsed = after - this.size;
      this.usedBits ^= USED_MASK;
    } else {
      this.nextUsed = after;
    }
    if (!inOrder) {
      records[record + NEXT_ID] = this.freeId;
      this.freeId = id;
    }
    return id;
  }

  /** Whether `poll` would return a chain; asks the shared memory. */
  hasUsed(): boolean {
    if (this.batch > 0) return true;
    const flags = Atomics.load(this.desc16, this.nextUsed * DESC_HALVES + FLAGS16);
    return (flags & USED_MASK) === this.usedBits && this.inFlight > 0;
  }

  /** Ask the device to be silent; see `Virtqueue.disableNotifications`. */
  disableNotifications(): void {
    Atomics.store(this.driverEvent, 1, RING_EVENT_FLAGS_DISABLE);
  }

  /** Ask for a notification; see `Virtqueue.enableNotifications`. */
  enableNotifications(unnoticed: number): boolean {
    let ahead = 0;
    if (this.eventIdx) {
      const known = this.size - this.numFree - (this.heldAt < 0 ? 0 : this.numHeld);
      ahead = Math.min(unnoticed, known >> 1);
      // MO-8 release: desc before flags, so that the device never meets DESC with an old position.
      Atomics.store(this.driverEvent, 0, this.usedPositionAhead(ahead));
      Atomics.store(this.driverEvent, 1, RING_EVENT_FLAGS_DESC);
    } else {
      Atomics.store(this.driverEvent, 1, RING_EVENT_FLAGS_ENABLE);
    }
    // MO-9 full: event suppression before the flags at the used position. The device stores those flags,
    // then loads our event suppression (MO-13).
    return ahead === 0 ? this.hasUsed() : this.hasUsedBeyond(ahead);
  }

  /** Position part of a notification: the next entry not yet available, wrap counter in bit 15 (2.9). */
  get notificationOffset(): number {
    if (this.heldAt < 0) return this.nextAvail | ((this.availBits & F_AVAIL) << 8);
    // Committed chains are not available before publish: the position is that of the first of them.
    return ((this.heldAt - TAIL) / WORDS) | (((this.heldTail >>> 16) & F_AVAIL) << 8);
  }

  /** Ring descriptors committed and not yet published; some are. */
  private get numHeld(): number {
    const count = this.nextAvail - (this.heldAt - TAIL) / WORDS;
    return count > 0 ? count : count + this.size;
  }

  /** Where the next used chain is taken, in both halves: the value of SET_VRING_BASE. */
  get usedPosition(): number {
    return this.usedOffset + this.usedOffset * 0x10000;
  }

  /** The used position, its wrap counter in bit 15. */
  private get usedOffset(): number {
    return this.nextUsed | ((this.usedBits & F_AVAIL) << 8);
  }

  /** The position `distance` descriptors behind the used one. */
  private usedPositionAhead(distance: number): number {
    const position = this.usedOffset + distance;
    return (position & (WRAP_BIT - 1)) < this.size ? position : (position - this.size) ^ WRAP_BIT;
  }

  /** Whether the device is more than `distance` descriptors ahead of the used position. */
  private hasUsedBeyond(distance: number): boolean {
    if (this.batch > 0) return true;
    let at = this.nextUsed;
    let bits = this.usedBits;
    for (let passed = 0; passed <= distance; ) {
      if ((Atomics.load(this.desc16, at * DESC_HALVES + FLAGS16) & USED_MASK) !== bits) return false;
      const id = this.desc16[at * DESC_HALVES + ID16];
      const count = id < this.size ? this.records[id << 2] : 0;
      // An impossible id is for poll() to refuse. IN_ORDER skips whole batches, which only poll() can tell.
      if (count === 0 || this.inOrder) return true;
      passed += count;
      at += count;
      if (at >= this.size) {
        at -= this.size;
        bits ^= USED_MASK;
      }
    }
    return true;
  }

  /** Put all buffer ids into the free list, in ascending order. */
  private freeAll(): void {
    this.records.fill(0);
    for (let id = 0; id < this.size; id++) this.records[(id << 2) + NEXT_ID] = id + 1 === this.size ? 0 : id + 1;
  }

  private goOnAt(position: number): void {
    this.nextAvail = position & (WRAP_BIT - 1);
    this.nextUsed = this.nextAvail;
    const wraps = (position & WRAP_BIT) !== 0;
    this.availBits = wraps ? VIRTQ_DESC_F_AVAIL : VIRTQ_DESC_F_USED;
    this.usedBits = wraps ? USED_MASK : 0;
  }

  private addFramedDirect(lo: number, hi: number, length: number, isWritable: boolean): number {
    const { desc, slots } = this;
    if (slots.frameFits || this.numFree < FRAMED) return -1;
    const id = this.freeId;
    let cursor = this.nextAvail;
    let bits = this.availBits;
    const headTail = this.writeHeader(id, cursor << 2, bits);
    if (++cursor === this.size) {
      cursor = 0;
      bits ^= USED_MASK;
    }
    const at = cursor << 2;
    desc[at] = lo | 0;
    desc[at + 1] = hi | 0;
    desc[at + 2] = length | 0;
    desc[at + 3] = id | (((isWritable ? F_NEXT_WRITE : F_NEXT) | bits) << 16);
    this.writeTrailer(id, cursor + 1, bits);
    this.take(id, headTail, FRAMED, isWritable ? length + slots.trailerLength : slots.trailerLength);
    return id;
  }

  /** Write the header's entry at word `at`, all but its tail, which is returned. */
  private writeHeader(id: number, at: number, bits: number): number {
    const { desc, slots } = this;
    desc[at] = slots.headerAddress(id);
    desc[at + 1] = slots.requestHi;
    desc[at + 2] = slots.headerLength;
    return id | ((F_NEXT | bits) << 16);
  }

  /** Write the trailer's entry; `cursor` may be one past the end. */
  private writeTrailer(id: number, cursor: number, bits: number): void {
    const { desc, slots } = this;
    const wraps = cursor === this.size;
    const at = wraps ? 0 : cursor << 2;
    desc[at] = slots.trailerAddress(id);
    desc[at + 1] = slots.requestHi;
    desc[at + 2] = slots.trailerLength;
    desc[at + 3] = id | ((F_WRITE | (wraps ? bits ^ USED_MASK : bits)) << 16);
  }

  private takeIndirect(id: number, count: number, writable: number): void {
    const { desc, slots } = this;
    const at = this.nextAvail << 2;
    desc[at] = slots.tableAddress(id);
    desc[at + 1] = slots.tableHi;
    desc[at + 2] = count * DESC_BYTES;
    this.take(id, id | ((F_INDIRECT | this.availBits) << 16), 1, writable);
  }

  /** Account for a chain whose entries are written, all but the tail of the first. */
  private take(id: number, headTail: number, count: number, writable: number): void {
    const { records } = this;
    const next = this.nextAvail;
    if (this.heldAt < 0) {
      this.heldAt = (next << 2) + TAIL;
      this.heldTail = headTail;
    } else {
      this.desc[(next << 2) + TAIL] = headTail;
    }
    const record = id << 2;
    this.freeId = records[record + NEXT_ID];
    records[record] = count;
    records[record + WRITABLE] = writable | 0;
    this.epochs[id] = this.epoch;
    this.numFree -= count;
    this.inFlight++;
    const after = next + count;
    if (after >= this.size) {
      this.nextAvail = after - this.size;
      this.availBits ^= USED_MASK;
    } else {
      this.nextAvail = after;
    }
  }

  /** IN_ORDER (2.8.9): one used entry may close a batch, from the oldest chain through the one it names. */
  private startBatch(id: number, length: number): void {
    const count = ((id - this.oldestId + this.size) % this.size) + 1;
    if (count > this.inFlight) throw this.fail(badId(id));
    this.batch = count;
    this.batchLength = length;
  }

  /** IN_ORDER: bytes written into the next chain of the batch. Only the last has a length, the others were used wholly. */
  private nextLength(id: number): number {
    return --this.batch > 0 ? this.records[(id << 2) + WRITABLE] >>> 0 : this.batchLength;
  }

  /** IN_ORDER: ids are taken in a circle, so those in flight stand right before the next free one. */
  private get oldestId(): number {
    return (this.freeId - this.inFlight + this.size) % this.size;
  }

  private prepareIndirect(id: number, trailerEntry: number, shape: number): void {
    this.slots.writeFrame(id, trailerEntry, 0, VIRTQ_DESC_F_WRITE << 16);
    this.records[(id << 2) + SHAPE] = shape;
  }
}

function badId(id: number): Error {
  return brokenRing("id", id, "the id of a published buffer in flight");
}
