/** Drivers that lie: every lie breaks the queue with one error, for good, and touches nothing outside. */

import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import { DescriptorChain, DeviceMemory, DeviceVirtqueue, VirtioFeature } from "../../src/virtqueue/index.js";
import {
  areasOf,
  type DriverPlace,
  INDIRECT,
  NEXT,
  PackedDriver,
  placeRing,
  SplitDriver,
  WRITE,
} from "./device-driver.js";

const { INDIRECT_DESC, RING_PACKED } = VirtioFeature;
const DATA = 0x1000n;
const SIZE = 4;
const BROKEN = { name: "VirtioError", code: "ERR_VIRTIO_QUEUE_BROKEN" } as const;

function deviceOn(place: DriverPlace, features: bigint) {
  const memory = new DeviceMemory();
  memory.add(place.address, place.buffer);
  memory.add(DATA, new ArrayBuffer(0x1000));
  return new DeviceVirtqueue({ queueSize: place.size, features, memory, ...areasOf(place) });
}

/** What the driver does to its ring of 4; the chain begins at descriptor 0. */
interface Lie<D> {
  readonly name: string;
  readonly message: RegExp;
  readonly features?: bigint;
  /** The ring's position to begin with; only where it matters. */
  readonly tell: (driver: D, tables: { offset: number; address: bigint }) => void;
}

/** Addresses that no region holds, with the length that makes them so. */
const OUTSIDE = [
  ["one byte before the region", 0xfffn, 1],
  ["over the end of the region", 0x1fffn, 2],
  ["address 0", 0n, 16],
  ["the end of the address space", 0xffff_ffff_ffff_ffffn, 1],
  ["a sum that overflows 64 bits", 0xffff_ffff_ffff_fff0n, 0x2000],
  ["a sum that overflows 32 bits into the region", 0xffff_f000n, 0x2000],
  ["the region's lower half with another upper half", 0x1_0000_1000n, 16],
  ["the longest length", 0x1000n, 0xffff_ffff],
] as const;

/** `descriptors` of split chains: address, length, flags, next. */
function split(...descriptors: readonly (readonly [bigint, number, number, number])[]) {
  return (driver: SplitDriver): void => {
    for (const [i, [address, length, flags, next]] of descriptors.entries())
      driver.descriptor(i, address, length, flags, next);
    driver.view.setUint16(driver.place.driver + 2, 1, true);
  };
}

function splitTable(...entries: readonly (readonly [bigint, number, number, number])[]) {
  return (driver: SplitDriver, { offset, address }: { offset: number; address: bigint }): void => {
    for (const [i, [at, length, flags, next]] of entries.entries()) {
      driver.view.setBigUint64(offset + 16 * i, at, true);
      driver.view.setUint32(offset + 16 * i + 8, length, true);
      driver.view.setUint16(offset + 16 * i + 12, flags, true);
      driver.view.setUint16(offset + 16 * i + 14, next, true);
    }
    split([address, 16 * entries.length, INDIRECT, 0])(driver);
  };
}

const SPLIT_LIES: readonly Lie<SplitDriver>[] = [
  ...OUTSIDE.map(([name, address, length]) => ({
    name: `data at ${name}`,
    message: /outside the shared memory/,
    tell: split([address, length, 0, 0]),
  })),
  ...OUTSIDE.map(([name, address, length]) => ({
    name: `a table at ${name}`,
    message: /outside the shared memory|indirect table of/,
    features: INDIRECT_DESC,
    tell: split([address, Math.max(16, length - (length % 16)), INDIRECT, 0]),
  })),
  {
    name: "a head of the queue size",
    message: /descriptor 4 on a queue of 4/,
    tell: (driver) => {
      driver.view.setUint16(driver.place.driver + 4, 4, true);
      driver.view.setUint16(driver.place.driver + 2, 1, true);
    },
  },
  {
    name: "a head of 65535",
    message: /descriptor 65535/,
    tell: (driver) => {
      driver.view.setUint16(driver.place.driver + 4, 65535, true);
      driver.view.setUint16(driver.place.driver + 2, 1, true);
    },
  },
  {
    name: "an index that jumps over the queue size",
    message: /5 chains at once/,
    tell: (driver) => driver.view.setUint16(driver.place.driver + 2, 5, true),
  },
  {
    name: "an index that goes back",
    message: /65535 chains at once/,
    tell: (driver) => driver.view.setUint16(driver.place.driver + 2, 65535, true),
  },
  { name: "a descriptor that links to itself", message: /or a loop/, tell: split([DATA, 1, NEXT, 0]) },
  { name: "a loop of two", message: /or a loop/, tell: split([DATA, 1, NEXT, 1], [DATA, 1, NEXT, 0]) },
  { name: "a link of the queue size", message: /link to descriptor 4 of 4/, tell: split([DATA, 1, NEXT, 4]) },
  { name: "a link of 65535", message: /link to descriptor 65535/, tell: split([DATA, 1, NEXT, 65535]) },
  { name: "a length of 0", message: /length 0/, tell: split([DATA, 0, 0, 0]) },
  {
    name: "a readable element behind a writable one",
    message: /readable descriptor behind a writable/,
    tell: split([DATA, 1, NEXT | WRITE, 1], [DATA, 1, 0, 0]),
  },
  { name: "a table without the feature", message: /INDIRECT/, tell: split([DATA, 16, INDIRECT, 0]) },
  {
    name: "a table with NEXT",
    message: /INDIRECT/,
    features: INDIRECT_DESC,
    tell: split([DATA, 16, INDIRECT | NEXT, 1], [DATA, 1, 0, 0]),
  },
  { name: "an empty table", message: /table of 0 bytes/, features: INDIRECT_DESC, tell: split([DATA, 0, INDIRECT, 0]) },
  {
    name: "a table of 24 bytes",
    message: /table of 24/,
    features: INDIRECT_DESC,
    tell: split([DATA, 24, INDIRECT, 0]),
  },
  {
    name: "a table in a table",
    message: /INDIRECT/,
    features: INDIRECT_DESC,
    tell: splitTable([DATA, 16, INDIRECT, 0]),
  },
  { name: "a loop in a table", message: /or a loop/, features: INDIRECT_DESC, tell: splitTable([DATA, 1, NEXT, 0]) },
  {
    name: "a link out of a table",
    message: /link to descriptor 2 of 2/,
    features: INDIRECT_DESC,
    tell: splitTable([DATA, 1, NEXT, 2], [DATA, 1, 0, 0]),
  },
  {
    name: "a table with more elements than the queue",
    message: /more than 4 descriptors/,
    features: INDIRECT_DESC,
    tell: splitTable([DATA, 1, NEXT, 1], [DATA, 1, NEXT, 2], [DATA, 1, NEXT, 3], [DATA, 1, NEXT, 4], [DATA, 1, 0, 0]),
  },
  {
    name: "a table whose entry is outside the memory",
    message: /outside/,
    features: INDIRECT_DESC,
    tell: splitTable([0n, 1, 0, 0]),
  },
];

/** Entries of a packed ring: address, length, flags without AVAIL and USED; all made available. */
function packed(...entries: readonly (readonly [bigint, number, number])[]) {
  return (driver: PackedDriver): void => {
    for (const [i, [address, length, flags]] of [...entries.entries()].reverse()) {
      driver.descriptor(i, address, length, 1, flags | driver.available(true));
    }
  };
}

function packedTable(...entries: readonly (readonly [bigint, number, number])[]) {
  return (driver: PackedDriver, { offset, address }: { offset: number; address: bigint }): void => {
    for (const [i, [at, length, flags]] of entries.entries()) {
      driver.view.setBigUint64(offset + 16 * i, at, true);
      driver.view.setUint32(offset + 16 * i + 8, length, true);
      driver.view.setUint16(offset + 16 * i + 14, flags, true);
    }
    packed([address, 16 * entries.length, INDIRECT])(driver);
  };
}

const PACKED_LIES: readonly Lie<PackedDriver>[] = [
  ...OUTSIDE.map(([name, address, length]) => ({
    name: `data at ${name}`,
    message: /outside the shared memory/,
    tell: packed([address, length, 0]),
  })),
  ...OUTSIDE.slice(0, 4).map(([name, address]) => ({
    name: `a table at ${name}`,
    message: /outside the shared memory/,
    features: INDIRECT_DESC,
    tell: packed([address, 64, INDIRECT]),
  })),
  {
    name: "a list longer than the ring",
    message: /more than the 4 descriptors/,
    tell: packed([DATA, 1, NEXT], [DATA, 1, NEXT], [DATA, 1, NEXT], [DATA, 1, NEXT]),
  },
  {
    name: "a list that goes on in a descriptor not available",
    message: /not available/,
    tell: packed([DATA, 1, NEXT]),
  },
  { name: "a length of 0", message: /length 0/, tell: packed([DATA, 0, 0]) },
  {
    name: "a readable element behind a writable one",
    message: /readable descriptor behind a writable/,
    tell: packed([DATA, 1, NEXT | WRITE], [DATA, 1, 0]),
  },
  { name: "a table without the feature", message: /INDIRECT/, tell: packed([DATA, 16, INDIRECT]) },
  {
    name: "a table with NEXT",
    message: /INDIRECT/,
    features: INDIRECT_DESC,
    tell: packed([DATA, 16, INDIRECT | NEXT], [DATA, 1, 0]),
  },
  {
    name: "a table inside a NEXT list",
    message: /INDIRECT/,
    features: INDIRECT_DESC,
    tell: packed([DATA, 1, NEXT], [DATA, 16, INDIRECT]),
  },
  { name: "an empty table", message: /table of 0 bytes/, features: INDIRECT_DESC, tell: packed([DATA, 0, INDIRECT]) },
  { name: "a table of 24 bytes", message: /table of 24/, features: INDIRECT_DESC, tell: packed([DATA, 24, INDIRECT]) },
  {
    name: "a table in a table",
    message: /inside a table/,
    features: INDIRECT_DESC,
    tell: packedTable([DATA, 16, INDIRECT]),
  },
  {
    name: "a table with more entries than the queue",
    message: /table of 5 entries/,
    features: INDIRECT_DESC,
    tell: packedTable([DATA, 1, 0], [DATA, 1, 0], [DATA, 1, 0], [DATA, 1, 0], [DATA, 1, 0]),
  },
  {
    name: "a readable entry behind a writable one in a table",
    message: /readable descriptor behind a writable/,
    features: INDIRECT_DESC,
    tell: packedTable([DATA, 1, WRITE], [DATA, 1, 0]),
  },
];

for (const [format, lies, make] of [
  ["split", SPLIT_LIES, (place: DriverPlace) => new SplitDriver(place)],
  ["packed", PACKED_LIES, (place: DriverPlace) => new PackedDriver(place)],
] as const) {
  describe(`a lying driver of a ${format} ring`, () => {
    for (const { name, message, features = 0n, tell } of lies as readonly Lie<SplitDriver | PackedDriver>[]) {
      it(`is caught: ${name}`, () => {
        const place = placeRing(SIZE);
        const device = deviceOn(place, features | (format === "packed" ? RING_PACKED : 0n));
        tell(make(place), { offset: place.tables, address: place.address + BigInt(place.tables) });
        const before = new Uint8Array(place.buffer).slice();
        const chain = new DescriptorChain(SIZE);
        assert.throws(() => device.pop(chain), { ...BROKEN, message });
        assert.deepEqual(new Uint8Array(place.buffer), before);
        // The queue stays broken, whatever the ring says now.
        new Uint8Array(place.buffer).fill(0);
        assert.throws(() => device.pop(chain), { ...BROKEN, message });
      });
    }
  });
}

describe("a driver that changes its ring under the device", () => {
  it("cannot change a chain that was popped", () => {
    for (const features of [0n, RING_PACKED, INDIRECT_DESC, INDIRECT_DESC | RING_PACKED]) {
      const place = placeRing(SIZE);
      const device = deviceOn(place, features);
      const driver = (features & RING_PACKED) === 0n ? new SplitDriver(place) : new PackedDriver(place);
      driver.add([{ address: DATA, length: 16, writable: true }], (features & INDIRECT_DESC) === 0n ? 0 : 1);
      driver.publish();
      const chain = new DescriptorChain(SIZE);
      assert.equal(device.pop(chain), true);
      new Uint8Array(place.buffer).fill(0xff);
      assert.deepEqual([chain.count, chain.region[0], chain.offset[0], chain.length[0]], [1, 1, 0, 16]);
    }
  });

  it("cannot have more chains taken than the queue has descriptors", () => {
    const place = placeRing(SIZE);
    const device = deviceOn(place, 0n);
    const chain = new DescriptorChain(SIZE);
    const driver = new SplitDriver(place);
    for (let i = 0; i < SIZE; i++) driver.add([{ address: DATA, length: 1, writable: false }]);
    driver.publish();
    for (let i = 0; i < SIZE; i++) assert.equal(device.pop(chain), true);
    driver.view.setUint16(place.driver + 2, SIZE + 1, true); // none was given back
    assert.throws(() => device.pop(chain), BROKEN);
  });

  it("cannot have a packed descriptor taken twice", () => {
    const place = placeRing(SIZE);
    const device = deviceOn(place, RING_PACKED);
    const chain = new DescriptorChain(SIZE);
    const driver = new PackedDriver(place);
    for (let i = 0; i < SIZE; i++) driver.descriptor(i, DATA, 1, i, 0x80);
    for (let i = 0; i < SIZE; i++) assert.equal(device.pop(chain), true);
    for (let i = 0; i < SIZE; i++) driver.descriptor(i, DATA, 1, i, 0x8000); // the next round, too early
    assert.equal(device.pop(chain), false);
    assert.equal(device.enableNotifications(), false);
    device.push(0, 1, 1);
    assert.equal(device.pop(chain), true);
    assert.equal(device.pop(chain), false);
  });
});

describe("a ring of noise", () => {
  it("never makes the device throw anything else, loop, or leave its memory", () => {
    const noise = fc.record({
      packed: fc.boolean(),
      indirect: fc.boolean(),
      bytes: fc.uint8Array({ minLength: 256, maxLength: 256 }),
      near: fc.array(fc.tuple(fc.nat({ max: 63 }), fc.constantFrom(DATA, DATA + 0xff0n, 0x7_0000_0040n)), {
        maxLength: 8,
      }),
      rounds: fc.array(fc.tuple(fc.nat({ max: 255 }), fc.nat({ max: 255 })), { maxLength: 24 }),
    });
    let popped = 0;
    let broke = 0;
    fc.assert(
      fc.property(noise, ({ packed: isPacked, indirect, bytes, near, rounds }) => {
        const place = placeRing(SIZE);
        const ring = new Uint8Array(place.buffer);
        const device = deviceOn(place, (isPacked ? RING_PACKED : 0n) | (indirect ? INDIRECT_DESC : 0n));
        const view = new DataView(place.buffer);
        ring.set(bytes, place.descriptors);
        ring.set(bytes.subarray(0, 64), place.driver);
        // Addresses that lie inside, short lengths and flags that are often sensible let some chains through.
        for (const [i, address] of near) {
          view.setBigUint64(place.descriptors + 16 * (i % SIZE), address, true);
          view.setUint32(place.descriptors + 16 * (i % SIZE) + 8, ((i >> 2) + 1) * 16, true);
          const flags = (isPacked ? 0x80 : 0) | (i & 7);
          view.setUint16(place.descriptors + 16 * (i % SIZE) + (isPacked ? 14 : 12), flags, true);
        }
        for (const [slot, [i]] of near.slice(0, SIZE).entries())
          view.setUint16(place.driver + 4 + 2 * slot, i % 5, true);
        view.setUint16(place.driver + 2, near.length % 6, true);
        const chain = new DescriptorChain(SIZE);
        const held: { id: number; ringCount: number }[] = [];
        try {
          for (const [at, value] of rounds) {
            if (value < 64) ring[place.descriptors + at] = value;
            if (device.pop(chain)) {
              popped++;
              held.push({ id: chain.id, ringCount: chain.ringCount });
              assert.ok(chain.count >= 1 && chain.count <= SIZE);
              for (let i = 0; i < chain.count; i++) {
                assert.ok(
                  chain.offset[i] + chain.length[i] <= (chain.region[i] === 0 ? place.buffer.byteLength : 0x1000),
                );
              }
            }
            const one = held.pop();
            if (one !== undefined && value % 2 === 0) device.push(one.id, one.ringCount, 1);
            else if (one !== undefined) held.push(one);
            device.publish();
          }
        } catch (error) {
          broke++;
          assert.equal((error as { code?: string }).code, "ERR_VIRTIO_QUEUE_BROKEN");
        }
      }),
      { numRuns: 5000 },
    );
    assert.ok(popped > 200 && broke > 200, `noise that tests nothing: ${popped} chains, ${broke} broken queues`);
  });
});
