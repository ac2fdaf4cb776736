/** The device's half of a packed virtqueue (virtio 1.3, 2.8). */

import { rangeError } from "../errors.js";
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
import { type DescriptorChain, lyingDriver, outsideMemory } from "./device-chain.js";
import type { DeviceMemory } from "./device-memory.js";
import { checkTableLength, copyTable, type DeviceRingOptions } from "./device-ring.js";

const DESC_WORDS = DESC_SIZE / 4;
const DESC_HALVES = DESC_SIZE / 2;
const TAIL = 3; // the 32-bit word of id (low half) and flags (high half)
const ID16 = 6; // pvirtq_desc.id and .flags, in 16-bit units
const FLAGS16 = 7;
const STATE_MASK = VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED;
const WRAP_BIT = 1 << 15;
const RING_EVENT_FLAGS_MASK = 3;

/**
 * Each descriptor field is read once, checked and copied; positions are private. The flags of the first used
 * entry of a batch are kept back until `publish`: one store makes the whole batch visible, because the driver
 * goes through the ring in order and stops at that entry.
 */
export class DevicePackedRing {
  private readonly size: number;
  private readonly eventIdx: boolean;
  private readonly indirect: boolean;
  private readonly memory: DeviceMemory;
  private readonly desc: Uint32Array;
  private readonly desc16: Uint16Array;
  private readonly driverEvent: Uint16Array;
  private readonly deviceEvent: Uint16Array;

  private nextAvail: number;
  /** AVAIL and USED of an available entry at `nextAvail`. */
  private availBits: number;
  private nextUsed: number;
  /** AVAIL and USED of a used entry at `nextUsed`. */
  private usedBits: number;
  /** Ring descriptors taken and not given back: never more than the ring has. */
  private outstanding: number;
  /** Ring descriptors of the chain popped last. */
  private lastCount = 1;
  /** Position of the used entry whose flags `publish` will write; -1 when there is none. */
  private heldAt = -1;
  private heldFlags = 0;
  /** Ring descriptors given back since the last decision on a notification. */
  private added = 0;

  constructor(options: DeviceRingOptions) {
    const { queueSize: n, descriptorArea, driverArea, deviceArea, base } = options;
    this.size = n;
    this.eventIdx = options.eventIdx;
    this.indirect = options.indirect;
    this.memory = options.memory;
    this.desc = new Uint32Array(descriptorArea.buffer, descriptorArea.offset, n * DESC_WORDS);
    this.desc16 = new Uint16Array(descriptorArea.buffer, descriptorArea.offset, n * DESC_HALVES);
    this.driverEvent = new Uint16Array(driverArea.buffer, driverArea.offset, 2);
    this.deviceEvent = new Uint16Array(deviceArea.buffer, deviceArea.offset, 2);

    this.nextAvail = base & (WRAP_BIT - 1);
    this.availBits = (base & WRAP_BIT) !== 0 ? VIRTQ_DESC_F_AVAIL : VIRTQ_DESC_F_USED;
    this.nextUsed = (base >>> 16) & (WRAP_BIT - 1);
    this.usedBits = base >>> 31 === 1 ? STATE_MASK : 0;
    // Descriptors between both positions are with the device still.
    const sameRound = (this.availBits === VIRTQ_DESC_F_AVAIL) === (this.usedBits === STATE_MASK);
    this.outstanding = this.nextAvail - this.nextUsed + (sameRound ? 0 : n);
    if (Math.max(this.nextAvail, this.nextUsed) >= n || this.outstanding < 0 || this.outstanding > n) {
      throw rangeError("base", `two positions of a packed queue of ${n}, at most one round apart`, base);
    }
  }

  /** Position as `SET_VRING_BASE` has it: both indices, each with its wrap counter. */
  get base(): number {
    const avail = this.nextAvail | (this.availBits === VIRTQ_DESC_F_AVAIL ? WRAP_BIT : 0);
    const used = this.nextUsed | (this.usedBits === 0 ? 0 : WRAP_BIT);
    return used * 0x1_0000 + avail;
  }

  /** Take the next available chain; see `DeviceVirtqueue.pop`. */
  pop(chain: DescriptorChain): boolean {
    let at = this.nextAvail;
    let bits = this.availBits;
    // A plain peek guards the atomic load; a stale value only means looking again later.
    if ((this.desc16[at * DESC_HALVES + FLAGS16] & STATE_MASK) !== bits) return false;
    // With all descriptors taken, an honest driver cannot have made another available.
    const room = this.size - this.outstanding;
    if (room === 0) return false;
    // MO-11 acquire: flags before the rest of the chain and data. The driver stores the flags last (MO-5).
    let flags = Atomics.load(this.desc16, at * DESC_HALVES + FLAGS16);
    if ((flags & STATE_MASK) !== bits) return false;
    chain.clear();
    let ringCount = 0;
    for (;;) {
      const word = at * DESC_WORDS;
      this.add(chain, this.desc, word, flags, ringCount === 0);
      ringCount++;
      if (++at === this.size) {
        at = 0;
        bits ^= STATE_MASK;
      }
      if ((flags & VIRTQ_DESC_F_NEXT) === 0) {
        // The id of a chain is that of its last descriptor (2.8.6).
        chain.id = this.desc16[word * 2 + ID16];
        break;
      }
      if (ringCount === room) throw lyingDriver(`a chain of more than the ${room} descriptors that are free`);
      flags = this.desc[at * DESC_WORDS + TAIL] >>> 16;
      if ((flags & STATE_MASK) !== bits) throw lyingDriver("a chain that goes on in a descriptor not available");
    }
    chain.ringCount = ringCount;
    this.lastCount = ringCount;
    this.nextAvail = at;
    this.availBits = bits;
    this.outstanding += ringCount;
    return true;
  }

  /** Take a chain again, from a copy of its ring descriptors; see `DeviceVirtqueue.refetch`. */
  refetch(chain: DescriptorChain, copy: Uint32Array): void {
    chain.clear();
    const count = copy.length / DESC_WORDS;
    for (let i = 0; i < count; i++) {
      if (chain.count > this.size) throw lyingDriver(`a chain of more than ${this.size} descriptors`);
      this.add(chain, copy, i * DESC_WORDS, copy[i * DESC_WORDS + TAIL] >>> 16, i === 0);
    }
    chain.ringCount = count;
  }

  /** Add the elements of one descriptor of the ring. */
  private add(chain: DescriptorChain, words: Uint32Array, at: number, flags: number, first: boolean): void {
    const lo = words[at];
    const hi = words[at + 1];
    const length = words[at + 2];
    if ((flags & VIRTQ_DESC_F_INDIRECT) !== 0) {
      if (!first || !this.indirect || (flags & VIRTQ_DESC_F_NEXT) !== 0) {
        throw lyingDriver("an INDIRECT descriptor inside a NEXT chain or without the feature");
      }
      this.walkTable(chain, lo, hi, length);
    } else {
      chain.add(this.memory, lo, hi, length, (flags & VIRTQ_DESC_F_WRITE) !== 0);
    }
  }

  /** How many chains seem to be available; see `DeviceVirtqueue.backlog`. */
  backlog(limit: number): number {
    // Descriptors become available in the order of the ring: the last available one is found by halving.
    let from = 0;
    let to = Math.min(limit, Math.floor((this.size - this.outstanding) / this.lastCount));
    for (let chains = to; from < to; chains = (from + to + 1) >> 1) {
      if (this.seemsAvailable((chains - 1) * this.lastCount)) from = chains;
      else to = chains - 1;
    }
    return from;
  }

  private seemsAvailable(ahead: number): boolean {
    const at = this.nextAvail + ahead;
    const bits = at < this.size ? this.availBits : this.availBits ^ STATE_MASK;
    const flags = this.desc16[(at < this.size ? at : at - this.size) * DESC_HALVES + FLAGS16];
    return (flags & STATE_MASK) === bits;
  }

  /** Write a used entry that stands for chains of `ringCount` descriptors; see `DeviceVirtqueue.push`. */
  push(id: number, ringCount: number, written: number): void {
    const at = this.nextUsed;
    const flags = written > 0 ? this.usedBits | VIRTQ_DESC_F_WRITE : this.usedBits;
    this.desc[at * DESC_WORDS + 2] = written;
    if (this.heldAt < 0) {
      this.heldAt = at;
      this.heldFlags = flags;
      this.desc16[at * DESC_HALVES + ID16] = id;
    } else {
      this.desc[at * DESC_WORDS + TAIL] = id | (flags << 16);
    }
    this.nextUsed = at + ringCount;
    if (this.nextUsed >= this.size) {
      this.nextUsed -= this.size;
      this.usedBits ^= STATE_MASK;
    }
    this.outstanding -= ringCount;
    this.added += ringCount;
  }

  /** Make used entries visible; see `DeviceVirtqueue.publish`. */
  publish(): boolean {
    if (this.heldAt < 0) return false;
    // MO-12 release: data, status, id, len and the later entries before the first flags. The driver loads the
    // flags with acquire before it reads them (MO-7).
    Atomics.store(this.desc16, this.heldAt * DESC_HALVES + FLAGS16, this.heldFlags);
    this.heldAt = -1;
    const added = this.added;
    this.added = 0;
    // MO-13 full: flags before the load of the driver's event structure, both calls sequentially consistent.
    // The driver stores the structure, then loads the flags of its next used entry again (MO-9).
    const flags = Atomics.load(this.driverEvent, 1) & RING_EVENT_FLAGS_MASK;
    if (flags === RING_EVENT_FLAGS_DISABLE) return false;
    if (flags !== RING_EVENT_FLAGS_DESC || !this.eventIdx) return true;
    // The driver stores `desc` before flags (MO-8): read in the opposite order, both belong together.
    const position = this.driverEvent[0];
    let event = position & (WRAP_BIT - 1);
    if ((position & WRAP_BIT) !== (this.usedBits & WRAP_BIT)) event -= this.size;
    const old = this.nextUsed - added;
    return ((this.nextUsed - event - 1) & 0xffff) < ((this.nextUsed - old) & 0xffff);
  }

  /** Ask the driver not to notify. */
  disableNotifications(): void {
    this.deviceEvent[1] = RING_EVENT_FLAGS_DISABLE;
  }

  /** Ask the driver to notify at the next chain; see `DeviceVirtqueue.enableNotifications`. */
  enableNotifications(): boolean {
    // MO-14 full: the event structure before the load of flags at the next position. The driver stores the
    // flags, then loads the structure (MO-6): one of the two sides sees the other's store.
    if (this.eventIdx) {
      this.deviceEvent[0] = this.nextAvail | (this.availBits === VIRTQ_DESC_F_AVAIL ? WRAP_BIT : 0);
      Atomics.store(this.deviceEvent, 1, RING_EVENT_FLAGS_DESC);
    } else {
      Atomics.store(this.deviceEvent, 1, RING_EVENT_FLAGS_ENABLE);
    }
    const flags = Atomics.load(this.desc16, this.nextAvail * DESC_HALVES + FLAGS16);
    return this.outstanding < this.size && (flags & STATE_MASK) === this.availBits;
  }

  private walkTable(chain: DescriptorChain, lo: number, hi: number, length: number): void {
    const memory = this.memory;
    checkTableLength(length);
    const count = length / DESC_SIZE;
    if (count > this.size) throw lyingDriver(`an indirect table of ${count} entries on a queue of ${this.size}`);
    const region = memory.find(lo, hi, length);
    if (region < 0) throw outsideMemory("an indirect table", lo, hi, length);
    const offset = memory.offset(region, lo, hi);
    const aligned = (offset & 3) === 0;
    const words = aligned ? memory.words[region] : copyTable(memory, region, offset, length);
    let at = aligned ? (offset / 4) | 0 : 0;
    for (let i = 0; i < count; i++, at += DESC_WORDS) {
      const entryLo = words[at];
      const entryHi = words[at + 1];
      const entryLength = words[at + 2];
      const flags = words[at + TAIL] >>> 16;
      if ((flags & VIRTQ_DESC_F_INDIRECT) !== 0) throw lyingDriver("an INDIRECT descriptor inside a table");
      // Order in a table is positional; of the flags only WRITE means something (2.8.7).
      chain.add(memory, entryLo, entryHi, entryLength, (flags & VIRTQ_DESC_F_WRITE) !== 0);
    }
  }
}
