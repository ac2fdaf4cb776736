/** Random histories of the driver's half of a ring beside a device that lies, checked step by step against a model. */

import { VirtioError } from "../../src/errors.js";
import { VirtioFeature, Virtqueue, VirtqueueLayout, type VirtqueueOptions } from "../../src/virtqueue/index.js";
import { Liar } from "./liar.js";
import { Oracle } from "./oracle.js";
import { Random } from "./random.js";

/** Address of the first byte of the memory; the upper half is not 0. */
const BASE = 0x5_4000_0000;
/** Bytes of somebody else before and behind everything that the ring needs. */
const GUARD = 64;
const REQUEST = { size: 32, align: 16 };
const FRAME = { headerLength: 16, trailerOffset: 16, trailerLength: 1 };
/** Steps of one history at most: a new one begins with other features. */
const EPISODE_STEPS = 3000;
const SPLIT_SIZES = [1, 2, 4, 8, 16, 64];
const PACKED_SIZES = [1, 2, 3, 4, 5, 7, 8, 13, 16, 50];
/** One step in so many is a lie; 0 for none. */
const LIE_RATES = [0, 1000, 200, 50, 10, 3];

/** What a run has seen. */
export interface FuzzCounts {
  steps: number;
  histories: number;
  /** Histories that ended with a broken queue. */
  broken: number;
  /** Chains that came back. */
  returned: number;
  lies: number;
}

/** A driver did something else than it must. */
export class FuzzFailure extends Error {
  /** The seed that shows it again. */
  readonly seed: number;

  constructor(seed: number, packed: boolean, step: number, cause: unknown) {
    const format = packed ? "packed" : "split";
    super(`step ${step}: ${cause instanceof Error ? (cause.stack ?? cause.message) : String(cause)}
show it again: npm run fuzz -- --format ${format} --seed ${seed} --steps 1`);
    this.seed = seed;
  }
}

function check(isRight: boolean, what: string): void {
  if (!isRight) throw new Error(what);
}

/** One history, wholly determined by its seed. */
class History {
  readonly liar: Liar;
  private readonly random: Random;
  private readonly packed: boolean;
  private readonly size: number;
  private readonly tableEntries: number;
  private readonly options: VirtqueueOptions;
  private readonly oracle: Oracle;
  private readonly memory: Buffer;
  /** What must stand in the memory where the driver has no business. */
  private readonly shadow: Buffer;
  /** Areas that only the device or somebody else may change, as pairs of offsets. */
  private readonly foreign: readonly (readonly [number, number])[];
  private queue: Virtqueue;
  private readonly lieRate: number;
  private readonly counts: FuzzCounts;

  constructor(seed: number, packed: boolean, counts: FuzzCounts) {
    const random = new Random(seed);
    this.random = random;
    this.counts = counts;
    this.packed = packed;
    const sizes = packed ? PACKED_SIZES : SPLIT_SIZES;
    this.size = sizes[random.below(sizes.length)];
    const eventIdx = random.oneIn(2);
    const inOrder = random.oneIn(3);
    this.tableEntries = Math.min(this.size, random.oneIn(2) ? 0 : 1 + random.below(8));
    this.lieRate = LIE_RATES[random.below(LIE_RATES.length)];
    const features =
      VirtioFeature.VERSION_1 |
      (packed ? VirtioFeature.RING_PACKED : 0n) |
      (eventIdx ? VirtioFeature.EVENT_IDX : 0n) |
      (inOrder ? VirtioFeature.IN_ORDER : 0n) |
      (this.tableEntries > 0 ? VirtioFeature.INDIRECT_DESC : 0n);
    const layout = new VirtqueueLayout({ queueSize: this.size, features, request: REQUEST });
    const tables = GUARD + layout.endOffset;
    const end = tables + this.size * this.tableEntries * 16;
    const buffer = new ArrayBuffer(end + GUARD);
    this.memory = Buffer.from(buffer);
    for (let i = 0; i < this.memory.length; i++) this.memory[i] = random.u32() & 0xff;
    this.options = {
      ...{ layout, buffer, offset: GUARD, iova: BASE + GUARD, features, frame: FRAME },
      ...(this.tableEntries > 0 && { indirect: { offset: tables, iova: BASE + tables, entries: this.tableEntries } }),
    };
    this.queue = new Virtqueue(this.options);
    this.shadow = Buffer.from(this.memory);
    this.foreign = [
      [0, GUARD],
      [GUARD + layout.deviceAreaOffset, GUARD + layout.deviceAreaEnd],
      [GUARD + layout.reqOffset, GUARD + layout.endOffset],
      [end, end + GUARD],
    ];
    const view = new DataView(buffer);
    this.oracle = new Oracle(layout, view, GUARD, eventIdx, inOrder);
    this.liar = new Liar(this.oracle, random, layout, view, { base: GUARD, end, inOrder });
  }

  /** One step; false when the queue is broken, as it must be. */
  step(): boolean {
    const { random } = this;
    if (this.lieRate > 0 && random.oneIn(this.lieRate)) {
      this.liar.lie();
      this.takeShadow();
      return true;
    }
    switch (random.below(12)) {
      case 0:
      case 1:
      case 2:
        this.liar.answer();
        this.takeShadow();
        return true;
      case 3:
        if (random.oneIn(2)) this.liar.tell();
        else this.liar.suppress();
        this.takeShadow();
        return true;
      case 4:
        this.add();
        break;
      case 5:
        this.addFramed();
        break;
      case 6:
        this.addFramedList();
        break;
      case 7:
        check(this.queue.publish() === this.oracle.publish(), "publish() returned the wrong need to notify");
        break;
      case 8:
      case 9:
      case 10:
        for (let rest = random.below(4); rest >= 0; rest--) if (!this.poll()) return false;
        break;
      default:
        this.control();
    }
    this.checkAll();
    return true;
  }

  /** Add a chain element by element, or begin one and drop it. */
  private add(): void {
    const { random, queue, oracle } = this;
    const count = 1 + random.below(Math.min(this.size, 6));
    const readable = random.below(count + 1);
    const ringCount = count > 1 && count <= this.tableEntries ? 1 : count;
    const slot = queue.begin(count);
    if (this.isRefused(slot, ringCount)) return;
    let writable = 0;
    for (let i = 0; i < count; i++) {
      const length = this.anyLength(count);
      queue.push(random.u32(), random.u32(), length, i >= readable);
      if (i >= readable) writable += length;
    }
    if (random.oneIn(8)) {
      queue.rewind();
      return;
    }
    check(queue.commit() === slot, "commit() returned another slot than begin()");
    oracle.commit(slot, ringCount, writable);
  }

  private addFramed(): void {
    const { random, tableEntries } = this;
    if (this.size < 3) return;
    const isWritable = random.oneIn(2);
    const length = this.anyLength(3);
    const slot = this.queue.addFramed(random.u32() | 0, random.u32(), length, isWritable);
    const { freeDescriptors } = this.oracle;
    // Split rings use a table only when half of the descriptors, or less than three, are left.
    const isIndirect = tableEntries >= 3 && (this.packed || freeDescriptors <= Math.max(2, this.size / 2));
    const ringCount = isIndirect ? 1 : 3;
    if (this.isRefused(slot, ringCount)) return;
    this.oracle.commit(slot, ringCount, isWritable ? length + 1 : 1);
  }

  private addFramedList(): void {
    const { random, queue } = this;
    if (this.size < 3) return;
    const count = random.below(Math.min(this.size - 2, 6) + 1);
    const isWritable = random.oneIn(2);
    const ringCount = count + 2 <= this.tableEntries ? 1 : count + 2;
    const slot = queue.beginFramed(count, isWritable);
    if (this.isRefused(slot, ringCount)) return;
    let bytes = 0;
    for (let i = 0; i < count; i++) {
      const length = this.anyLength(count + 2);
      queue.segments.add(random.u32() | 0, random.u32(), length);
      bytes += length;
      if (random.oneIn(30)) {
        queue.rewind();
        return;
      }
    }
    check(queue.commitFramed() === slot, "commitFramed() returned another slot than beginFramed()");
    this.oracle.commit(slot, ringCount, isWritable ? bytes + 1 : 1);
  }

  /** Whether there was no room, which is so exactly when the descriptors do not suffice. */
  private isRefused(slot: number, ringCount: number): boolean {
    const { freeDescriptors, chains } = this.oracle;
    if (ringCount > freeDescriptors) {
      check(slot === -1, `slot ${slot} although ${ringCount} descriptors are not free`);
      return true;
    }
    check(slot >= 0 && slot < this.size && chains[slot] === undefined, `slot ${slot} is not free`);
    return false;
  }

  /** Any length that keeps `count` elements within the 2^32 bytes of a chain. */
  private anyLength(count: number): number {
    const most = Math.floor(2 ** 32 / count) - 32;
    return this.random.oneIn(10) ? 1 + (this.random.u32() % most) : 1 + this.random.below(4096);
  }

  /** Take one chain back, or nothing, or find the queue broken: exactly as the model says. */
  private poll(): boolean {
    const { queue, oracle } = this;
    const hint = oracle.hasUsed();
    check(queue.hasUsed() === hint, `hasUsed() is not ${hint}`);
    const verdict = oracle.poll();
    if (verdict === "broken") {
      this.checkBroken();
      return false;
    }
    const slot = queue.poll();
    if (verdict === "nothing") {
      check(slot === -1, `poll() returned ${slot} where there is nothing`);
      return true;
    }
    const { chain, length } = verdict;
    check(slot === chain.slot, `poll() returned ${slot}, not ${chain.slot}`);
    check(queue.usedLength === length, `usedLength is ${queue.usedLength}, not ${length}`);
    this.liar.returned(chain);
    this.counts.returned++;
    return true;
  }

  /** From here on every call throws the same error, and nothing is written any more. */
  private checkBroken(): void {
    const { queue } = this;
    const before = Buffer.from(this.memory);
    const first = thrownBy(() => queue.poll());
    check(first instanceof VirtioError && first.code === "ERR_VIRTIO_QUEUE_BROKEN", `poll() threw ${String(first)}`);
    const calls = [
      () => queue.poll(),
      () => queue.begin(1),
      () => queue.addFramed(0, 0, 1, true),
      () => queue.publish(),
      () => queue.hasUsed(),
      () => queue.enableNotifications(),
    ];
    for (const call of calls) check(thrownBy(call) === first, `${String(call)} did not throw the same error`);
    queue.disableNotifications();
    check(this.memory.equals(before), "a broken queue wrote into the memory");
    this.counts.broken++;
    this.checkCounts();
  }

  private control(): void {
    const { random, queue, oracle } = this;
    switch (random.below(4)) {
      case 0:
        queue.disableNotifications();
        return;
      case 1: {
        const isSplit = !this.packed;
        const hint = isSplit ? undefined : oracle.hasUsed();
        const more = queue.enableNotifications();
        // On split rings it asks the memory alone, not what was loaded from there before.
        if (hint !== undefined) check(more === hint, `enableNotifications() is not ${hint}`);
        return;
      }
      case 2:
        queue.enableNotifications(random.below(2 * this.size));
        return;
      default: {
        const { position } = queue;
        check((position === undefined) === oracle.inFlight.length > 0, `position ${position}`);
        if (position === undefined) return;
        this.queue = new Virtqueue({ ...this.options, resume: position });
        oracle.resume();
        check(this.queue.position === position, "resumed elsewhere");
      }
    }
  }

  private takeShadow(): void {
    this.memory.copy(this.shadow);
  }

  private checkAll(): void {
    this.checkCounts();
    for (const [from, to] of this.foreign) {
      if (this.memory.compare(this.shadow, from, to, from, to) !== 0) throw new Error(`bytes ${from} to ${to} changed`);
    }
  }

  private checkCounts(): void {
    const { queue, oracle } = this;
    check(queue.inFlight === oracle.inFlight.length, `${queue.inFlight} in flight, not ${oracle.inFlight.length}`);
    check(queue.numFree === oracle.freeDescriptors, `${queue.numFree} free, not ${oracle.freeDescriptors}`);
  }
}

function thrownBy(call: () => unknown): unknown {
  try {
    call();
  } catch (error) {
    return error;
  }
  throw new Error(`${String(call)} threw nothing`);
}

/**
 * Run histories until `isDone` says so; it is asked between two of them.
 *
 * @param seed - of the first one; those behind it have the seeds that follow.
 * @throws FuzzFailure when a driver did something else than it must.
 */
export function fuzzRing(packed: boolean, seed: number, isDone: (counts: FuzzCounts) => boolean): FuzzCounts {
  const counts: FuzzCounts = { steps: 0, histories: 0, broken: 0, returned: 0, lies: 0 };
  for (let next = seed >>> 0; !isDone(counts); next = (next + 1) >>> 0) {
    let step = 0;
    try {
      const history = new History(next, packed, counts);
      while (step < EPISODE_STEPS && history.step()) step++;
      counts.lies += history.liar.lies;
    } catch (error) {
      throw new FuzzFailure(next, packed, step, error);
    }
    counts.steps += step;
    counts.histories++;
  }
  return counts;
}
