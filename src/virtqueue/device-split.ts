/** The device's half of a split virtqueue (virtio 1.3, 2.7). */

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
import { type DescriptorChain, lyingDriver, outsideMemory } from "./device-chain.js";
import type { DeviceMemory } from "./device-memory.js";
import { checkTableLength, copyTable, type DeviceRingOptions } from "./device-ring.js";

const DESC_WORDS = DESC_SIZE / 4;
const IDX = 1; // virtq_avail.idx and virtq_used.idx, in 16-bit units
const RING16 = AVAIL_RING_OFFSET / 2;
const RING32 = USED_RING_OFFSET / 4;
const ELEM_WORDS = USED_ELEM_SIZE / 4;

/**
 * Each descriptor field is read once, checked and copied; positions are private. Of the shared memory the
 * device writes the used ring and `avail_event`, nothing else.
 */
export class DeviceSplitRing {
  private readonly size: number;
  private readonly mask: number;
  private readonly eventIdx: boolean;
  private readonly indirect: boolean;
  private readonly memory: DeviceMemory;
  private readonly desc: Uint32Array;
  private readonly avail: Uint16Array;
  private readonly used16: Uint16Array;
  private readonly used32: Uint32Array;
  private readonly usedEventAt: number;
  private readonly availEventAt: number;

  private lastAvail: number;
  private availLimit: number;
  private usedIdx: number;
  private signalled: number;
  /** Chains taken and not given back: never more than the ring has descriptors. */
  private outstanding: number;

  constructor(options: DeviceRingOptions) {
    const { queueSize: n, descriptorArea, driverArea, deviceArea } = options;
    this.size = n;
    this.mask = n - 1;
    this.eventIdx = options.eventIdx;
    this.indirect = options.indirect;
    this.memory = options.memory;
    this.desc = new Uint32Array(descriptorArea.buffer, descriptorArea.offset, n * DESC_WORDS);
    this.avail = new Uint16Array(driverArea.buffer, driverArea.offset, RING16 + n + 1);
    this.usedEventAt = RING16 + n;
    this.used32 = new Uint32Array(deviceArea.buffer, deviceArea.offset, RING32 + ELEM_WORDS * n);
    this.used16 = new Uint16Array(deviceArea.buffer, deviceArea.offset, 2 * (RING32 + ELEM_WORDS * n) + 1);
    this.availEventAt = 2 * (RING32 + ELEM_WORDS * n);

    this.lastAvail = options.base & 0xffff;
    this.availLimit = this.lastAvail;
    // The base tells only the available index; the used index is what the driver knows of it.
    this.usedIdx = Atomics.load(this.used16, IDX);
    this.signalled = this.usedIdx;
    this.outstanding = (this.lastAvail - this.usedIdx) & 0xffff;
    if (this.outstanding > n) {
      throw lyingDriver(`a used index of ${this.usedIdx} with a base of ${this.lastAvail} on a queue of ${n}`);
    }
  }

  /** Position as `SET_VRING_BASE` has it: the next available index. */
  get base(): number {
    return this.lastAvail;
  }

  /** Take the next available chain; see `DeviceVirtqueue.pop`. */
  pop(chain: DescriptorChain): boolean {
    const last = this.lastAvail;
    // A plain peek guards the atomic load; a stale value only means looking again later.
    if (last === this.availLimit && (this.avail[IDX] === last || !this.loadAvailIdx())) return false;
    const head = this.avail[RING16 + (last & this.mask)];
    if (head >= this.size) throw lyingDriver(`descriptor ${head} on a queue of ${this.size}`);
    this.walk(chain, head);
    chain.id = head;
    this.lastAvail = (last + 1) & 0xffff;
    this.outstanding++;
    return true;
  }

  /** Take the chain at `head` again; see `DeviceVirtqueue.refetch`. */
  refetch(chain: DescriptorChain, head: number): void {
    if (head >= this.size) throw lyingDriver(`descriptor ${head} on a queue of ${this.size}`);
    this.walk(chain, head);
  }

  /** How many chains seem to be available; see `DeviceVirtqueue.backlog`. */
  backlog(limit: number): number {
    let pending = (this.availLimit - this.lastAvail) & 0xffff;
    if (pending < limit) pending = (this.avail[IDX] - this.lastAvail) & 0xffff;
    return Math.min(pending, limit);
  }

  /** Write a used entry that stands for `chains` chains; see `DeviceVirtqueue.push`. */
  push(id: number, chains: number, written: number): void {
    const idx = this.usedIdx;
    const at = RING32 + ELEM_WORDS * (idx & this.mask);
    this.used32[at] = id;
    this.used32[at + 1] = written;
    this.usedIdx = (idx + chains) & 0xffff;
    this.outstanding -= chains;
  }

  /** Make used entries visible; see `DeviceVirtqueue.publish`. */
  publish(): boolean {
    const idx = this.usedIdx;
    const old = this.signalled;
    if (idx === old) return false;
    this.signalled = idx;
    // MO-12 release: data, status and used.ring before used.idx. The driver loads used.idx with acquire
    // before it reads them (MO-3).
    Atomics.store(this.used16, IDX, idx);
    // MO-13 full: used.idx before the load of used_event or avail.flags, both calls sequentially consistent.
    // The driver stores used_event or avail.flags, then loads used.idx again (MO-4).
    if (this.eventIdx) {
      const event = Atomics.load(this.avail, this.usedEventAt);
      return ((idx - event - 1) & 0xffff) < ((idx - old) & 0xffff);
    }
    return (Atomics.load(this.avail, 0) & VIRTQ_AVAIL_F_NO_INTERRUPT) === 0;
  }

  /** Ask the driver not to notify; with EVENT_IDX by leaving `avail_event` behind. */
  disableNotifications(): void {
    if (!this.eventIdx) this.used16[0] = VIRTQ_USED_F_NO_NOTIFY;
  }

  /** Ask the driver to notify at the next chain; see `DeviceVirtqueue.enableNotifications`. */
  enableNotifications(): boolean {
    // MO-14 full: avail_event or used.flags before the load of avail.idx. The driver stores avail.idx, then
    // loads avail_event or used.flags (MO-2): one of the two sides sees the other's store.
    if (this.eventIdx) Atomics.store(this.used16, this.availEventAt, this.lastAvail);
    else Atomics.store(this.used16, 0, 0);
    return Atomics.load(this.avail, IDX) !== this.lastAvail;
  }

  private loadAvailIdx(): boolean {
    // MO-11 acquire: avail.idx before avail.ring, descriptors and data. The driver stores them first (MO-1).
    const idx = Atomics.load(this.avail, IDX);
    const pending = (idx - this.lastAvail) & 0xffff;
    if (pending > this.size - this.outstanding) {
      throw lyingDriver(
        `${pending} chains at once (avail.idx ${this.lastAvail} to ${idx}) with ${this.outstanding} in flight ` +
          `on a queue of ${this.size}`,
      );
    }
    this.availLimit = idx;
    return pending > 0;
  }

  private walk(chain: DescriptorChain, head: number): void {
    const memory = this.memory;
    chain.clear();
    let words = this.desc;
    let start = 0;
    let limit = this.size;
    let at = head * DESC_WORDS;
    let inTable = false;
    for (;;) {
      const lo = words[at];
      const hi = words[at + 1];
      const length = words[at + 2];
      const flagsNext = words[at + 3];
      if (!inTable) chain.ringCount++;
      if ((flagsNext & VIRTQ_DESC_F_INDIRECT) !== 0) {
        if (inTable || !this.indirect || (flagsNext & VIRTQ_DESC_F_NEXT) !== 0) {
          throw lyingDriver("an INDIRECT descriptor with NEXT, inside a table, or without the feature");
        }
        checkTableLength(length);
        const region = memory.find(lo, hi, length);
        if (region < 0) throw outsideMemory("an indirect table", lo, hi, length);
        const offset = memory.offset(region, lo, hi);
        const aligned = (offset & 3) === 0;
        words = aligned ? memory.words[region] : copyTable(memory, region, offset, length);
        start = aligned ? (offset / 4) | 0 : 0;
        limit = length / DESC_SIZE;
        at = start;
        inTable = true;
        continue;
      }
      if (chain.count === this.size) throw lyingDriver(`a chain of more than ${this.size} descriptors, or a loop`);
      chain.add(memory, lo, hi, length, (flagsNext & VIRTQ_DESC_F_WRITE) !== 0);
      if ((flagsNext & VIRTQ_DESC_F_NEXT) === 0) return;
      const next = flagsNext >>> 16;
      if (next >= limit) throw lyingDriver(`a link to descriptor ${next} of ${limit}`);
      at = start + next * DESC_WORDS;
    }
  }
}
