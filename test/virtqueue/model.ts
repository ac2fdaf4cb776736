/** A driver's ring, a device's ring and a simple model of both, moved step by step by property tests. */

import assert from "node:assert/strict";
import { VirtioError } from "../../src/errors.js";
import { VirtioFeature, Virtqueue, VirtqueueLayout, type VirtqueueOptions } from "../../src/virtqueue/index.js";
import { DescriptorChain, DeviceMemory, DeviceVirtqueue } from "../../src/virtqueue/index.js";

/** Address of the first byte of the shared memory; the upper half is not 0, so that mixing halves up shows. */
const BASE = 0x5_4000_0000;
const DATA_BYTES = 65536;
const REQUEST = { size: 32, align: 16 };
const FRAME = { headerLength: 16, trailerOffset: 16, trailerLength: 1 };

export interface PairOptions {
  readonly queueSize: number;
  readonly packed: boolean;
  readonly eventIdx: boolean;
  readonly inOrder: boolean;
  /** Entries of the indirect tables; 0 for none. */
  readonly tableEntries: number;
}

interface Element {
  readonly offset: number;
  readonly length: number;
  readonly writable: boolean;
}

interface Chain {
  readonly slot: number;
  readonly elements: readonly Element[];
  /** Ring descriptors. */
  readonly ringCount: number;
  /** What the device said it wrote; unknown until it completed the chain. */
  written: number;
}

interface Held {
  readonly chain: Chain;
  readonly id: number;
  readonly ringCount: number;
}

/** One driver and one device on the same memory, and what should be where. */
export class Pair {
  driver: Virtqueue;
  device: DeviceVirtqueue;
  readonly buffer: ArrayBuffer;
  readonly layout: VirtqueueLayout;
  /** How many operations were really carried out. */
  steps = 0;

  private readonly options: PairOptions;
  private readonly driverOptions: VirtqueueOptions;
  private readonly dataOffset: number;
  private readonly popped: DescriptorChain;
  /** Committed, not yet published. */
  private readonly committed: Chain[] = [];
  /** Published, not yet popped by the device, in order. */
  private readonly available: Chain[] = [];
  /** Popped by the device, oldest first. */
  private readonly held: Held[] = [];
  /** Given back by the device, not yet visible. */
  private readonly pushed: Chain[] = [];
  /** Visible to the driver, in the order in which it must find them. */
  private readonly used: Chain[] = [];
  private readonly slots = new Set<number>();
  private freeDescriptors: number;
  /** The device found nothing and waits: the next publish must notify. */
  private deviceSleeps = false;
  /** The driver found nothing and waits: the next used chain must notify. */
  private driverSleeps = false;
  /** What may be used before the sleeping driver is woken. */
  private unnoticed = 0;
  private deviceSilenced = false;
  private driverSilenced = false;

  constructor(options: PairOptions) {
    this.options = options;
    const { queueSize, packed, eventIdx, inOrder, tableEntries } = options;
    const features =
      VirtioFeature.VERSION_1 |
      (packed ? VirtioFeature.RING_PACKED : 0n) |
      (eventIdx ? VirtioFeature.EVENT_IDX : 0n) |
      (inOrder ? VirtioFeature.IN_ORDER : 0n) |
      (tableEntries > 0 ? VirtioFeature.INDIRECT_DESC : 0n);
    this.layout = new VirtqueueLayout({ queueSize, features, request: REQUEST });
    const tables = this.layout.endOffset;
    this.dataOffset = tables + queueSize * tableEntries * 16;
    this.buffer = new ArrayBuffer(this.dataOffset + DATA_BYTES);
    new Uint8Array(this.buffer).fill(0xff); // a driver must zero what it needs zeroed
    this.driverOptions = {
      ...{ layout: this.layout, buffer: this.buffer, iova: BASE, features, frame: FRAME },
      ...(tableEntries > 0 && { indirect: { offset: tables, iova: BASE + tables, entries: tableEntries } }),
    };
    this.driver = new Virtqueue(this.driverOptions);
    this.device = this.newDevice();
    this.popped = new DescriptorChain(queueSize);
    this.freeDescriptors = queueSize;
  }

  /** `idx` of the available ring; means nothing in a packed ring. */
  get availIdx(): number {
    return new DataView(this.buffer).getUint16(this.layout.driverAreaOffset + 2, true);
  }

  /** Add a chain element by element; `abandon` rewinds it instead of committing it. */
  add(readable: number, writable: number, seed: number, abandon: boolean): void {
    const { queueSize, tableEntries } = this.options;
    const count = Math.min(readable + writable, queueSize);
    if (count === 0) return;
    const elements = Array.from({ length: count }, (_, i) => this.element(seed + i, i >= readable));
    const ringCount = count > 1 && count <= tableEntries ? 1 : count;
    const slot = this.driver.begin(count);
    if (ringCount > this.freeDescriptors) {
      assert.equal(slot, -1, "begin() must refuse a chain for which there is no room");
      return;
    }
    assert.ok(slot >= 0 && slot < queueSize && !this.slots.has(slot), `slot ${slot} is not free`);
    this.steps++;
    const before = abandon ? this.driver.numFree : 0;
    for (const { offset, length, writable: isWritable } of elements) {
      const address = BASE + offset;
      this.driver.push(address >>> 0, Math.floor(address / 2 ** 32), length, isWritable);
    }
    if (abandon) {
      this.driver.rewind();
      assert.equal(this.driver.numFree, before, "rewind() must give everything back");
      return;
    }
    assert.equal(this.driver.commit(), slot);
    this.take({ slot, elements, ringCount, written: -1 });
  }

  /** Add a framed request with one data element. */
  addFramed(seed: number, writable: boolean): void {
    if (this.options.queueSize < 3) return;
    const data = this.element(seed, writable);
    const address = BASE + data.offset;
    const slot = this.driver.addFramed(address | 0, Math.floor(address / 2 ** 32), data.length, writable);
    // Split rings use a table only when half of the descriptors, or less than three, are left.
    const { queueSize, packed, tableEntries } = this.options;
    const indirect = tableEntries >= 3 && (packed || this.freeDescriptors <= Math.max(2, queueSize / 2));
    const ringCount = indirect ? 1 : 3;
    if (ringCount > this.freeDescriptors) {
      assert.equal(slot, -1, "addFramed() must refuse a request for which there is no room");
      return;
    }
    assert.ok(slot >= 0 && !this.slots.has(slot), `slot ${slot} is not free`);
    this.steps++;
    const request = this.driver.slotOffset(slot);
    const header = { offset: request, length: 16, writable: false };
    const trailer = { offset: request + 16, length: 1, writable: true };
    this.take({ slot, elements: [header, data, trailer], ringCount, written: -1 });
  }

  /** Add a framed request with `count` data elements; `given` of them before the first try is dropped. */
  addFramedList(count: number, seed: number, writable: boolean, given: number): void {
    const { queueSize, tableEntries } = this.options;
    const { driver } = this;
    if (count + 2 > queueSize) return;
    const data = Array.from({ length: count }, (_, i) => this.element(seed + i, writable));
    const add = ({ offset, length }: Element): void => {
      const address = BASE + offset;
      driver.segments.add(address | 0, Math.floor(address / 2 ** 32), length);
    };
    const ringCount = count + 2 <= tableEntries ? 1 : count + 2;
    if (given < count && driver.beginFramed(count, writable) >= 0) {
      for (const element of data.slice(0, given)) add(element);
      assert.throws(() => driver.commitFramed(), RangeError);
      assert.throws(() => driver.begin(1), RangeError);
      assert.throws(() => driver.push(0, 0, 1, false), RangeError);
      driver.rewind();
      assert.throws(() => driver.commitFramed(), RangeError);
    }
    const slot = driver.beginFramed(count, writable);
    if (ringCount > this.freeDescriptors) {
      assert.equal(slot, -1, "beginFramed() must refuse a request for which there is no room");
      return;
    }
    for (const element of data) add(element);
    assert.throws(() => driver.segments.add(0, 0, 1), RangeError);
    assert.equal(driver.commitFramed(), slot);
    assert.ok(slot >= 0 && !this.slots.has(slot), `slot ${slot} is not free`);
    this.steps++;
    const request = this.driver.slotOffset(slot);
    const header = { offset: request, length: 16, writable: false };
    const trailer = { offset: request + 16, length: 1, writable: true };
    this.take({ slot, elements: [header, ...data, trailer], ringCount, written: -1 });
  }

  publish(): void {
    const notify = this.driver.publish();
    if (this.committed.length === 0) {
      assert.equal(notify, false, "nothing new, nothing to notify of");
      return;
    }
    this.steps++;
    if (this.deviceSleeps) assert.equal(notify, true, "lost wake-up of the device");
    // Without EVENT_IDX, and on packed rings always, a silenced device must not be disturbed.
    else if (this.deviceSilenced && (this.options.packed || !this.options.eventIdx)) assert.equal(notify, false);
    if (notify) this.deviceSleeps = false;
    this.available.push(...this.committed.splice(0));
  }

  devicePop(count: number): void {
    for (let i = 0; i < count; i++) {
      const found = this.device.pop(this.popped);
      assert.equal(found, this.available.length > 0, "the device must see exactly what was published");
      if (!found) return;
      this.steps++;
      this.deviceSleeps = false;
      const chain = this.available.shift() as Chain;
      const seen = Array.from({ length: this.popped.count }, (_, k) => ({
        offset: this.popped.offset[k],
        length: this.popped.length[k],
        writable: k >= this.popped.readableCount,
      }));
      assert.deepEqual(seen, chain.elements);
      this.held.push({ chain, id: this.popped.id, ringCount: this.popped.ringCount });
    }
  }

  /** The device gives a chain back: any of those it holds, or with IN_ORDER the `pick + 1` oldest at once. */
  deviceComplete(pick: number, excess: number): void {
    if (this.held.length === 0) return;
    this.steps++;
    const index = pick % this.held.length;
    const taken = this.options.inOrder ? this.held.splice(0, index + 1) : this.held.splice(index, 1);
    const last = taken[taken.length - 1];
    for (const { chain } of taken) chain.written = writableBytes(chain);
    // Now and then a device claims more than it can have written; lengths are clamped, not failed.
    const claimed = excess % 3 === 0 ? last.chain.written + excess : Math.min(excess, last.chain.written);
    last.chain.written = Math.min(claimed, last.chain.written);
    const ringCount = taken.reduce((sum, held) => sum + held.ringCount, 0);
    if (this.options.inOrder) this.device.pushBatch(last.id, taken.length, ringCount, claimed);
    else this.device.push(last.id, last.ringCount, claimed);
    this.pushed.push(...taken.map(({ chain }) => chain));
  }

  devicePublish(): void {
    const notify = this.device.publish();
    if (this.pushed.length === 0) return;
    this.steps++;
    const isDue = this.usedUnits([...this.used, ...this.pushed]) > this.unnoticed;
    if (this.driverSleeps) assert.equal(notify, isDue, isDue ? "lost wake-up of the driver" : "too early");
    else if (this.driverSilenced && (this.options.packed || !this.options.eventIdx)) assert.equal(notify, false);
    if (notify) this.driverSleeps = false;
    this.used.push(...this.pushed.splice(0));
  }

  driverPoll(count: number): void {
    for (let i = 0; i < count; i++) {
      assert.equal(this.driver.hasUsed(), this.used.length > 0);
      const slot = this.driver.poll();
      if (this.used.length === 0) {
        assert.equal(slot, -1);
        return;
      }
      this.steps++;
      this.driverSleeps = false;
      const chain = this.used.shift() as Chain;
      assert.equal(slot, chain.slot);
      assert.equal(this.driver.usedLength, chain.written);
      this.slots.delete(slot);
      this.freeDescriptors += chain.ringCount;
    }
    this.checkCounts();
  }

  /** Ask for a notification behind `unnoticed` used entries (split) or descriptors (packed). */
  driverEnable(unnoticed = 0): void {
    this.steps++;
    const { packed, eventIdx, inOrder } = this.options;
    const held = this.held.map(({ chain }) => chain);
    const known = this.usedUnits([...this.available, ...held, ...this.pushed, ...this.used]);
    this.unnoticed = eventIdx ? Math.min(unnoticed, known >> 1) : 0;
    const more = unnoticed === 0 ? this.driver.enableNotifications() : this.driver.enableNotifications(unnoticed);
    this.driverSilenced = false;
    const isBeyond = this.usedUnits(this.used) > this.unnoticed;
    // How far a batch of a packed ring reaches only poll() can tell.
    assert.equal(more, isBeyond || (packed && inOrder && this.used.length > 0));
    this.driverSleeps = !more;
  }

  driverDisable(): void {
    this.steps++;
    this.driver.disableNotifications();
    this.driverSleeps = false;
    this.driverSilenced = true;
  }

  deviceEnable(): void {
    this.steps++;
    const more = this.device.enableNotifications();
    this.deviceSilenced = false;
    assert.equal(more, this.available.length > 0);
    this.deviceSleeps = !more;
  }

  deviceDisable(): void {
    this.steps++;
    this.device.disableNotifications();
    this.deviceSleeps = false;
    this.deviceSilenced = true;
  }

  /** Let everything come back: nothing may be lost, nothing may be left. */
  drain(): void {
    this.publish();
    this.devicePop(Number.POSITIVE_INFINITY);
    while (this.held.length > 0) this.deviceComplete(0, 1);
    this.devicePublish();
    this.driverPoll(Number.POSITIVE_INFINITY);
    assert.equal(this.slots.size, 0);
    this.checkCounts();
  }

  /** Drain, and go on with another driver on the same memory. The device notices nothing. */
  resume(): void {
    this.drain();
    const before = this.driver;
    this.driver = new Virtqueue({ ...this.driverOptions, resume: before.position ?? assert.fail("it is not idle") });
    assert.equal(this.driver.position, before.position);
    before.fail(new VirtioError("ERR_VIRTIO_CLOSED", "another driver goes on with this queue"));
    this.checkCounts();
    this.steps++;
  }

  /** The device dies, leaves nonsense behind, and the ring begins anew with another one; what was in flight is forgotten. */
  restart(): void {
    // As packed flags: available in the first round.
    new Uint16Array(this.buffer, 0, this.dataOffset / 2).fill(0x5a85);
    this.driver.restart();
    this.device = this.newDevice();
    for (const list of [this.committed, this.available, this.held, this.pushed, this.used]) list.length = 0;
    this.slots.clear();
    this.freeDescriptors = this.options.queueSize;
    this.deviceSleeps = false;
    this.driverSleeps = false;
    this.deviceSilenced = false;
    this.driverSilenced = false;
    assert.equal(this.driver.usedPosition, this.options.packed ? 0x8000_8000 : 0);
    this.checkCounts();
    this.steps++;
  }

  private newDevice(): DeviceVirtqueue {
    const { buffer, layout } = this;
    const memory = new DeviceMemory();
    memory.add(BigInt(BASE), buffer);
    return new DeviceVirtqueue({
      ...{ queueSize: layout.queueSize, features: this.driverOptions.features, memory },
      descriptorArea: { buffer, offset: 0 },
      driverArea: { buffer, offset: layout.driverAreaOffset },
      deviceArea: { buffer, offset: layout.deviceAreaOffset },
    });
  }

  /** What the used position moves by for these chains: entries of the used ring, or descriptors. */
  private usedUnits(chains: readonly Chain[]): number {
    return this.options.packed ? chains.reduce((sum, { ringCount }) => sum + ringCount, 0) : chains.length;
  }

  private checkCounts(): void {
    assert.equal(this.driver.inFlight, this.slots.size);
    assert.equal(this.driver.numFree, this.freeDescriptors);
    assert.equal(this.driver.position === undefined, this.slots.size > 0);
  }

  private take(chain: Chain): void {
    this.slots.add(chain.slot);
    this.freeDescriptors -= chain.ringCount;
    this.committed.push(chain);
    this.checkCounts();
  }

  private element(seed: number, writable: boolean): Element {
    const length = 1 + ((seed * 7919) % 4096);
    return { offset: this.dataOffset + ((seed * 104729) % (DATA_BYTES - length)), length, writable };
  }
}

function writableBytes(chain: Chain): number {
  return chain.elements.reduce((sum, { length, writable }) => (writable ? sum + length : sum), 0);
}
