/** Random runs of the device's half of both rings against an independent driver. */

import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import { DescriptorChain, DeviceMemory, DeviceVirtqueue, VirtioFeature } from "../../src/virtqueue/index.js";
import { areasOf, type Element, PackedDriver, placeRing, SplitDriver, type Used } from "./device-driver.js";

const RUNS = 400;
const OPERATIONS = 250;

/** Two regions that touch in neither address space, both away from the ring. */
const REGIONS = [
  { address: 0xffff_f000n, bytes: 0x3000 }, // crosses 4 GiB
  { address: 0xffff_ffff_ffff_0000n, bytes: 0x1_0000 }, // ends with the address space
];

interface Plan {
  readonly packed: boolean;
  readonly size: number;
  readonly eventIdx: boolean;
  readonly indirect: boolean;
  readonly inOrder: boolean;
  readonly start: number;
  readonly seeds: readonly number[];
}

const plan: fc.Arbitrary<Plan> = fc
  .record({ packed: fc.boolean(), eventIdx: fc.boolean(), indirect: fc.boolean(), inOrder: fc.boolean() })
  .chain((flags) =>
    fc.record({
      packed: fc.constant(flags.packed),
      eventIdx: fc.constant(flags.eventIdx),
      indirect: fc.constant(flags.indirect),
      inOrder: fc.constant(flags.inOrder),
      size: flags.packed ? fc.integer({ min: 1, max: 33 }) : fc.constantFrom(1, 2, 4, 8, 16, 32),
      start: fc.constantFrom(0, 65530),
      seeds: fc.array(fc.nat({ max: 0x7fff_fffe }), { minLength: OPERATIONS, maxLength: OPERATIONS }),
    }),
  );

/** Numbers from one seed. */
function stream(seed: number): (limit: number) => number {
  let state = seed * 2 + 1;
  return (limit) => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return Math.floor((state / 2 ** 32) * limit);
  };
}

/** Elements of one chain, readable ones first, inside the regions. */
function elementsOf(pick: (limit: number) => number, max: number): Element[] {
  const count = 1 + pick(Math.min(max, 6));
  const readable = pick(count + 1);
  return Array.from({ length: count }, (_, i) => {
    const region = REGIONS[pick(REGIONS.length)];
    const length = 1 + pick(600);
    return { address: region.address + BigInt(pick(region.bytes - length + 1)), length, writable: i >= readable };
  });
}

/** A ring whose chains have `elements` elements each, and what happens on it. */
const uniform = fc.record({
  packed: fc.boolean(),
  size: fc.constantFrom(4, 8, 16, 32),
  elements: fc.integer({ min: 1, max: 4 }),
  steps: fc.array(fc.record({ add: fc.nat({ max: 8 }), take: fc.nat({ max: 8 }), give: fc.nat({ max: 8 }) }), {
    minLength: 1,
    maxLength: 40,
  }),
});

describe("device's half of the rings, at random", () => {
  it("tells how many chains of one size wait, as far as it is asked", () => {
    fc.assert(
      fc.property(uniform, ({ packed, size, elements, steps }) => {
        const place = placeRing(size);
        const memory = new DeviceMemory();
        memory.add(place.address, place.buffer);
        const driver = packed ? new PackedDriver(place) : new SplitDriver(place);
        const features = packed ? VirtioFeature.RING_PACKED : 0n;
        const device = new DeviceVirtqueue({ queueSize: size, features, memory, ...areasOf(place) });
        const chain = new DescriptorChain(size);
        const one = Array.from({ length: elements }, () => ({ address: place.address, length: 1, writable: false }));
        const held: number[] = [];
        let waiting = 0;
        let isKnown = !packed;
        assert.equal(device.backlog(size), 0);
        for (const { add, take, give } of steps) {
          for (let n = add; n > 0 && driver.add(one) >= 0; n--) waiting++;
          driver.publish();
          for (let n = take; n > 0 && device.pop(chain); n--) {
            held.push(chain.id);
            waiting--;
            isKnown = true;
          }
          // A packed ring learns how many descriptors a chain has when it takes the first.
          for (const limit of isKnown ? [0, 1, 2, 3, size, size + 1] : [0, 1]) {
            assert.equal(device.backlog(limit), Math.min(limit, waiting), `limit ${limit}`);
          }
          for (const id of held.splice(0, give)) device.push(id, packed ? elements : 1, 0);
          device.publish();
          driver.collect();
        }
      }),
      { numRuns: RUNS },
    );
  });

  it("hands over what the driver wrote, and gives back what it was told, in every mode", () => {
    fc.assert(fc.property(plan, run), { numRuns: RUNS });
  });
});

function run({ packed, size, eventIdx, indirect, inOrder, start, seeds }: Plan): void {
  const place = placeRing(size);
  const memory = new DeviceMemory();
  memory.add(place.address, place.buffer);
  for (const { address, bytes } of REGIONS) memory.add(address, new ArrayBuffer(bytes));
  const split = packed ? undefined : new SplitDriver(place, start);
  const driver = split ?? new PackedDriver(place);
  const device = new DeviceVirtqueue({
    queueSize: size,
    features:
      (packed ? VirtioFeature.RING_PACKED : 0n) |
      (eventIdx ? VirtioFeature.EVENT_IDX : 0n) |
      (indirect ? VirtioFeature.INDIRECT_DESC : 0n),
    memory,
    ...areasOf(place),
    ...(split !== undefined && { base: start }),
  });
  const chain = new DescriptorChain(size);
  const waiting: { id: number; elements: Element[] }[] = [];
  const available: { id: number; elements: Element[] }[] = [];
  const held: { id: number; ringCount: number; writable: number }[] = [];
  const expected: Used[] = [];
  let unpublished: Used[] = [];

  for (const seed of seeds) {
    const pick = stream(seed);
    switch (pick(5)) {
      case 0: {
        for (let i = pick(4); i >= 0; i--) {
          const elements = elementsOf(pick, size);
          const table = indirect && pick(2) === 0 ? (packed ? elements.length : 1 + pick(elements.length)) : 0;
          const id = driver.add(elements, table);
          if (id >= 0) waiting.push({ id, elements });
        }
        break;
      }
      case 1:
        driver.publish();
        available.push(...waiting.splice(0));
        break;
      case 2:
        for (let i = pick(4); i >= 0; i--) {
          const next = available.shift();
          assert.equal(device.pop(chain), next !== undefined);
          if (next === undefined) break;
          checkChain(chain, memory, next.id, next.elements);
          held.push({ id: chain.id, ringCount: chain.ringCount, writable: chain.writableBytes });
        }
        break;
      case 3: {
        if (held.length === 0) break;
        if (inOrder) {
          const batch = held.splice(0, 1 + pick(held.length));
          const last = batch[batch.length - 1];
          const length = pick(last.writable + 1);
          device.pushBatch(
            last.id,
            batch.length,
            batch.reduce((sum, { ringCount }) => sum + ringCount, 0),
            length,
          );
          // Only the last of a batch is in the ring: the driver takes the others back by itself.
          for (const { id } of batch) unpublished.push({ id, length: id === last.id ? length : -1 });
        } else {
          const [one] = held.splice(pick(held.length), 1);
          const length = pick(one.writable + 1);
          device.push(one.id, one.ringCount, length);
          unpublished.push({ id: one.id, length });
        }
        break;
      }
      default:
        device.publish();
        expected.push(...unpublished);
        unpublished = [];
        if (inOrder) collectInOrder(driver, expected.splice(0));
        else assert.deepEqual(driver.collect(), expected.splice(0));
    }
  }
}

function checkChain(chain: DescriptorChain, memory: DeviceMemory, id: number, elements: readonly Element[]): void {
  assert.equal(chain.id, id);
  assert.equal(chain.count, elements.length);
  assert.equal(chain.readableCount, elements.filter(({ writable }) => !writable).length);
  const sum = (wanted: boolean): number =>
    elements.reduce((total, { length, writable }) => total + (writable === wanted ? length : 0), 0);
  assert.equal(chain.readableBytes, sum(false));
  assert.equal(chain.writableBytes, sum(true));
  elements.forEach(({ address, length }, i) => {
    assert.equal(chain.length[i], length);
    // The ring's own memory is region 0.
    const region = REGIONS[chain.region[i] - 1];
    assert.equal(region.address + BigInt(chain.offset[i]), address);
    assert.equal(memory.bytes[chain.region[i]].length, region.bytes);
  });
}

/** Take batches back: one entry in the ring stands for all chains up to it. */
function collectInOrder(driver: SplitDriver | PackedDriver, expected: readonly Used[]): void {
  const { place, view } = driver;
  if (driver instanceof SplitDriver) {
    assert.equal(view.getUint16(place.device + 2, true), (driver.lastUsed + expected.length) % 65536);
    let first = true;
    let batchHead: Used = { id: -1, length: -1 };
    for (const { id, length } of expected) {
      const at = place.device + 4 + 8 * (driver.lastUsed % place.size);
      if (first) batchHead = { id: view.getUint32(at, true), length: view.getUint32(at + 4, true) };
      driver.release(id);
      driver.lastUsed = (driver.lastUsed + 1) % 65536;
      first = length >= 0;
      if (first) assert.deepEqual(batchHead, { id, length });
    }
    return;
  }
  let at = driver.nextUsed;
  for (const { id, length } of expected) {
    driver.release(id);
    if (length < 0) continue;
    const entry = place.descriptors + 16 * at;
    assert.equal(view.getUint16(entry + 12, true), id);
    if (length > 0) assert.equal(view.getUint32(entry + 8, true), length);
    assert.equal((view.getUint16(entry + 14, true) & 2) !== 0, length > 0);
    at = driver.nextUsed;
  }
}
