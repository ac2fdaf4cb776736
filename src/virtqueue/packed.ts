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
  type RingOptions,
  type SegmentList,
  SHAPE_FRAME_INDIRECT,
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
  /** Chains committed and not yet returned. */
  inFlight = 0;
  /** Free ring descriptors. */
  numFree: number;

  private readonly size: number;
  private readonly eventIdx: boolean;
  private readonly inOrder: boolean;
  private readonly desc: Int32Array;
  private readonly desc16: Uint16Array;
  private readonly driverEvent: Uint16Array;
  private readonly deviceEvent: Uint32Array;

  private readonly slots: SlotMemory;

  /** Free buffer ids: a stack, or with IN_ORDER a ring of ids taken from the front. */
  private readonly ids: Uint16Array;
  private numIds: number;
  private idsFront = 0;
  /** Ring descriptors of the chain with this id; 0 when none is in flight. */
  private readonly ringCount: Uint16Array;
  /** Bytes the device may write into the chain with this id. */
  private readonly writable: Uint32Array;
  /** What the indirect table of this id still holds. */
  private readonly shape: Uint8Array;

  private readonly builder = new ChainBuilder();
  private buildId = 0;
  private buildCursor = 0;
  private buildBits = VIRTQ_DESC_F_AVAIL;
  private buildTail = 0;
  private buildHeadTail = 0;

  private nextAvail = 0;
  private availWrap = 1;
  /** AVAIL and USED of an available entry at `nextAvail`. */
  private availBits = VIRTQ_DESC_F_AVAIL;
  private nextUsed = 0;
  private usedWrap = 1;
  /** AVAIL and USED of a used entry at `nextUsed`. */
  private usedBits = USED_MASK;
  /** Word index of the tail kept back for `publish`; -1 when nothing is committed. */
  private heldAt = -1;
  private heldTail = 0;
  /** Ring descriptors committed since the last decision on a notification. */
  private added = 0;
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

    if (resume === undefined) new Uint8Array(buffer, offset, layout.deviceAreaEnd).fill(0);
    else this.goOnAt(resume);
    this.desc = new Int32Array(buffer, offset, n * DESC_WORDS);
    this.desc16 = new Uint16Array(buffer, offset, n * DESC_HALVES);
    this.driverEvent = new Uint16Array(buffer, offset + layout.driverAreaOffset, 2);
    this.deviceEvent = new Uint32Array(buffer, offset + layout.deviceAreaOffset, 1);

    this.slots = new SlotMemory(options);

    // A stack hands out 0 first; with IN_ORDER the ids run in the order of the buffers.
    this.ids = Uint16Array.from({ length: n }, (_, i) => (this.inOrder ? i : n - 1 - i));
    this.numIds = n;
    this.ringCount = new Uint16Array(n);
    this.writable = new Uint32Array(n);
    this.shape = new Uint8Array(n);
  }

  /** Start a chain; see `Virtqueue.begin`. */
  begin(count: number): number {
    const indirect = count > 1 && count <= this.slots.tableEntries;
    if (this.numFree < (indirect ? 1 : count) || this.numIds === 0) return -1;
    this.builder.start(count, indirect);
    this.buildId = this.nextId();
    this.buildCursor = this.nextAvail;
    this.buildBits = this.availBits;
    if (indirect) this.shape[this.buildId] = SHAPE_NONE;
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
    const at = this.buildCursor * DESC_WORDS;
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
    builder.finish(id === this.nextId());
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
        if (i > 0) this.desc[cursor * DESC_WORDS + TAIL] = unavailable << 16;
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
    const { slots } = this;
    if (!slots.frameFits) return this.addFramedDirect(lo, hi, length, isWritable);
    if (this.numFree === 0 || this.numIds === 0) return -1;
    const id = this.nextId();
    if (this.shape[id] !== SHAPE_FRAME_INDIRECT) this.prepareIndirect(id);
    const tail = isWritable ? VIRTQ_DESC_F_WRITE << 16 : 0;
    writeDescriptor(slots.table, slots.entryAt(id, 1), lo, hi, length, tail);
    this.takeIndirect(id, FRAME_ELEMENTS, isWritable ? length + slots.trailerLength : slots.trailerLength);
    return id;
  }

  /** Add header, any number of data elements and trailer as one chain; see `Virtqueue.addFramedList`. */
  addFramedList(list: SegmentList, isWritable: boolean): number {
    const { slots } = this;
    const { count } = list;
    const elements = count + 2;
    const indirect = elements <= slots.tableEntries;
    if (this.numFree < (indirect ? 1 : elements) || this.numIds === 0) return -1;
    const id = this.nextId();
    const write = isWritable ? VIRTQ_DESC_F_WRITE : 0;
    const writable = clampU32(isWritable ? list.bytes + slots.trailerLength : slots.trailerLength);
    if (indirect) {
      slots.writeFrame(id, count + 1, 0, VIRTQ_DESC_F_WRITE << 16);
      for (let i = 0, at = slots.entryAt(id, 1); i < count; i++, at += DESC_WORDS) {
        writeDescriptor(slots.table, at, list.lo[i], list.hi[i], list.length[i], write << 16);
      }
      this.shape[id] = SHAPE_NONE;
      this.takeIndirect(id, elements, writable);
      return id;
    }
    const { desc } = this;
    let cursor = this.nextAvail;
    let bits = this.availBits;
    const headTail = id | ((VIRTQ_DESC_F_NEXT | bits) << 16);
    desc[cursor * DESC_WORDS] = slots.headerAddress(id);
    desc[cursor * DESC_WORDS + 1] = slots.requestHi;
    desc[cursor * DESC_WORDS + 2] = slots.headerLength;
    for (let i = 0; i <= count; i++) {
      if (++cursor === this.size) {
        cursor = 0;
        bits ^= USED_MASK;
      }
      const at = cursor * DESC_WORDS;
      if (i < count) {
        const tail = id | ((VIRTQ_DESC_F_NEXT | write | bits) << 16);
        writeDescriptor(desc, at, list.lo[i], list.hi[i], list.length[i], tail);
      } else {
        const tail = id | ((VIRTQ_DESC_F_WRITE | bits) << 16);
        writeDescriptor(desc, at, slots.trailerAddress(id), slots.requestHi, slots.trailerLength, tail);
      }
    }
    this.take(id, headTail, elements, writable);
    return id;
  }

  /** Make committed chains visible to the device; see `Virtqueue.publish`. */
  publish(): boolean {
    if (this.heldAt < 0) return false;
    // MO-5 release: every other entry, and addr, len and id of this one, before its flags. The device
    // loads the flags with acquire before it reads them (MO-11). One 32-bit store holds id and flags.
    Atomics.store(this.desc, this.heldAt, this.heldTail);
    this.heldAt = -1;
    const added = this.added;
    this.added = 0;
    // MO-6 full: flags before the load of the device's event suppression, both calls sequentially
    // consistent. The device stores its event suppression, then loads the flags again (MO-14). One 32-bit
    // load takes desc and flags together (MO-8 on the device's side).
    const event = Atomics.load(this.deviceEvent, 0);
    const flags = (event >>> 16) & 3;
    if (flags === RING_EVENT_FLAGS_DISABLE) return false;
    // DESC without EVENT_IDX and the reserved value 3 are the device's fault; a notification never hurts.
    if (flags !== RING_EVENT_FLAGS_DESC || !this.eventIdx) return true;
    let off = event & (WRAP_BIT - 1);
    if (((event >>> 15) & 1) !== this.availWrap) off -= this.size;
    return ((this.nextAvail - off - 1) & 0xffff) < added;
  }

  /** Take back one used chain; see `Virtqueue.poll`. */
  poll(): number {
    if (this.batch > 0) return this.pollBatch();
    const at = this.nextUsed * DESC_HALVES;
    // A plain peek guards the atomic load; a stale value only means looking again later.
    if ((this.desc16[at + FLAGS16] & USED_MASK) !== this.usedBits || this.inFlight === 0) return -1;
    // MO-7 acquire: flags before id, len, data and status. The device stores flags last (MO-12).
    const flags = Atomics.load(this.desc16, at + FLAGS16);
    if ((flags & USED_MASK) !== this.usedBits) return -1;
    const id = this.desc16[at + ID16];
    if (id >= this.size || this.ringCount[id] === 0) throw brokenRing("id", id, "the id of a buffer in flight");
    // len counts only when the device says that it wrote (2.8.5).
    const length = (flags & VIRTQ_DESC_F_WRITE) === 0 ? 0 : this.desc[this.nextUsed * DESC_WORDS + 2] >>> 0;
    if (this.inOrder) {
      this.startBatch(id, length);
      return this.pollBatch();
    }
    this.giveBack(id, length);
    this.ids[this.numIds++] = id;
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

  /** Ask for a notification at the next used chain; see `Virtqueue.enableNotifications`. */
  enableNotifications(): boolean {
    if (this.eventIdx) {
      // MO-8 release: desc before flags, so that the device never meets DESC with an old position.
      Atomics.store(this.driverEvent, 0, this.nextUsed | (this.usedWrap << 15));
      Atomics.store(this.driverEvent, 1, RING_EVENT_FLAGS_DESC);
    } else {
      Atomics.store(this.driverEvent, 1, RING_EVENT_FLAGS_ENABLE);
    }
    // MO-9 full: event suppression before the flags at the used position. The device stores those flags,
    // then loads our event suppression (MO-13).
    return this.hasUsed();
  }

  /** Position part of a notification: the next entry not yet available, wrap counter in bit 15 (2.9). */
  get notificationOffset(): number {
    if (this.heldAt < 0) return this.nextAvail | (this.availWrap << 15);
    // Committed chains are not available before publish: the position is that of the first of them.
    const wrap = ((this.heldTail >>> 16) & VIRTQ_DESC_F_AVAIL) === 0 ? 0 : WRAP_BIT;
    return ((this.heldAt - TAIL) / DESC_WORDS) | wrap;
  }

  /** Where an idle ring stands, both halves alike: the value of SET_VRING_BASE. */
  get position(): number {
    const half = this.nextUsed | (this.usedWrap << 15);
    return half + half * 0x10000;
  }

  private goOnAt(position: number): void {
    const half = position & 0xffff;
    this.nextAvail = half & (WRAP_BIT - 1);
    this.nextUsed = this.nextAvail;
    this.availWrap = half >>> 15;
    this.usedWrap = this.availWrap;
    this.availBits = this.availWrap === 1 ? VIRTQ_DESC_F_AVAIL : VIRTQ_DESC_F_USED;
    this.usedBits = this.usedWrap === 1 ? USED_MASK : 0;
  }

  private addFramedDirect(lo: number, hi: number, length: number, isWritable: boolean): number {
    if (this.numFree < FRAME_ELEMENTS || this.numIds === 0) return -1;
    const id = this.nextId();
    const { desc, slots } = this;
    let cursor = this.nextAvail;
    let bits = this.availBits;

    const headTail = id | ((VIRTQ_DESC_F_NEXT | bits) << 16);
    desc[cursor * DESC_WORDS] = slots.headerAddress(id);
    desc[cursor * DESC_WORDS + 1] = slots.requestHi;
    desc[cursor * DESC_WORDS + 2] = slots.headerLength;
    if (++cursor === this.size) {
      cursor = 0;
      bits ^= USED_MASK;
    }
    const dataFlags = isWritable ? VIRTQ_DESC_F_NEXT | VIRTQ_DESC_F_WRITE : VIRTQ_DESC_F_NEXT;
    writeDescriptor(desc, cursor * DESC_WORDS, lo, hi, length, id | ((dataFlags | bits) << 16));
    if (++cursor === this.size) {
      cursor = 0;
      bits ^= USED_MASK;
    }
    const trailerLo = slots.trailerAddress(id);
    const trailerTail = id | ((VIRTQ_DESC_F_WRITE | bits) << 16);
    writeDescriptor(desc, cursor * DESC_WORDS, trailerLo, slots.requestHi, slots.trailerLength, trailerTail);
    this.take(id, headTail, FRAME_ELEMENTS, isWritable ? length + slots.trailerLength : slots.trailerLength);
    return id;
  }

  private nextId(): number {
    return this.inOrder ? this.ids[this.idsFront] : this.ids[this.numIds - 1];
  }

  private takeIndirect(id: number, count: number, writable: number): void {
    const at = this.nextAvail * DESC_WORDS;
    this.desc[at] = this.slots.tableAddress(id);
    this.desc[at + 1] = this.slots.tableHi;
    this.desc[at + 2] = count * DESC_SIZE;
    this.take(id, id | ((VIRTQ_DESC_F_INDIRECT | this.availBits) << 16), 1, writable);
  }

  /** Account for a chain whose entries are written, all but the tail of the first. */
  private take(id: number, headTail: number, count: number, writable: number): void {
    const at = this.nextAvail * DESC_WORDS + TAIL;
    if (this.heldAt < 0) {
      this.heldAt = at;
      this.heldTail = headTail;
    } else {
      this.desc[at] = headTail;
    }
    this.numIds--;
    if (this.inOrder && ++this.idsFront === this.size) this.idsFront = 0;
    this.ringCount[id] = count;
    this.writable[id] = writable;
    this.numFree -= count;
    this.added += count;
    this.inFlight++;
    this.nextAvail += count;
    if (this.nextAvail >= this.size) {
      this.nextAvail -= this.size;
      this.availWrap ^= 1;
      this.availBits ^= USED_MASK;
    }
  }

  private giveBack(id: number, length: number): void {
    const count = this.ringCount[id];
    const writable = this.writable[id];
    this.usedLength = length > writable ? writable : length;
    this.ringCount[id] = 0;
    this.numFree += count;
    this.inFlight--;
    this.nextUsed += count;
    if (this.nextUsed >= this.size) {
      this.nextUsed -= this.size;
      this.usedWrap ^= 1;
      this.usedBits ^= USED_MASK;
    }
  }

  /** IN_ORDER (2.8.9): one used entry may close a batch, from the oldest chain through the one it names. */
  private startBatch(id: number, length: number): void {
    const oldest = (this.idsFront + this.numIds) % this.size;
    const count = ((id - oldest + this.size) % this.size) + 1;
    if (count > this.inFlight) throw brokenRing("id", id, "the id of a buffer in flight");
    this.batch = count;
    this.batchLength = length;
  }

  private pollBatch(): number {
    const id = (this.idsFront + this.numIds) % this.size;
    this.batch--;
    // Only the last chain of a batch has a length; the others were processed wholly.
    this.giveBack(id, this.batch > 0 ? this.writable[id] : this.batchLength);
    this.numIds++;
    return id;
  }

  private prepareIndirect(id: number): void {
    this.slots.writeFrame(id, 2, 0, VIRTQ_DESC_F_WRITE << 16);
    this.shape[id] = SHAPE_FRAME_INDIRECT;
  }
}
