/** BufferPool: lending, release, growth shared by those who wait, and a model of what is lent. */

import assert from "node:assert/strict";
import test from "node:test";
import fc from "fast-check";
import { BufferPool, type DeviceBuffer, IovaSpace, MemoryRegion } from "../../src/memory/index.js";

const PAGE = 4096;
const MIB = 2 ** 20;
const GIB = 2 ** 30;
const refused = { code: "ERR_VIRTIO_ARGUMENT" };
const closed = { name: "VirtioError", code: "ERR_VIRTIO_CLOSED" };

/** Makes regions one behind the other, remembers them, and closes them. */
class Regions {
  readonly made: MemoryRegion[] = [];
  readonly asked: number[] = [];
  readonly #space = new IovaSpace();

  make(size: number): MemoryRegion {
    const region = MemoryRegion.create({ name: "pool", size, iova: this.#space.allocate(size, 2 * MIB) });
    this.made.push(region);
    return region;
  }

  readonly grow = (size: number): Promise<MemoryRegion> => {
    this.asked.push(size);
    return Promise.resolve(this.make(size));
  };

  [Symbol.dispose](): void {
    for (const region of this.made) region.close();
  }
}

function noGrowth(): Promise<MemoryRegion> {
  return Promise.reject(new Error("not to grow"));
}

function iovaOf(buffer: DeviceBuffer): number {
  return buffer.iovaHi * 2 ** 32 + buffer.iovaLo;
}

test("a buffer is memory of its region, where its address says", async () => {
  using regions = new Regions();
  const pool = new BufferPool(regions.grow);
  const first = await pool.allocate(100);
  const second = await pool.allocate(PAGE + 1);
  const [region] = regions.made;
  assert.ok(region !== undefined);
  assert.equal(first.region, region);
  assert.equal(first.length, 100);
  assert.equal(first.bytes.length, 100);
  assert.equal(iovaOf(first), region.iova);
  assert.equal(iovaOf(second), region.iova + PAGE);
  second.bytes[PAGE] = 77;
  assert.equal(new Uint8Array(region.buffer)[2 * PAGE], 77);
  assert.equal(pool.lent, 3 * PAGE);
  assert.equal(pool.lent + pool.free, region.size);
  first.release();
  assert.equal(pool.lent, 2 * PAGE);
  const third = await pool.allocate(PAGE);
  assert.equal(iovaOf(third), region.iova);
});

test("addresses above 4 GiB are split into halves, and no buffer crosses a multiple of 4 GiB", () => {
  using region = disposable(MemoryRegion.create({ name: "pool", size: 4 * MIB, iova: 12 * GIB - 2 * MIB }));
  const pool = new BufferPool(noGrowth);
  pool.addRegion(region);
  const below = pool.tryAllocate(MIB);
  const above = pool.tryAllocate(1.5 * MIB);
  assert.deepEqual([below?.iovaHi, below?.iovaLo], [2, 2 ** 32 - 2 * MIB]);
  assert.deepEqual([above?.iovaHi, above?.iovaLo], [3, 0]);
  above?.bytes.fill(9);
  assert.equal(new Uint8Array(region.buffer)[2 * MIB], 9);
  assert.equal(pool.tryAllocate(MIB + 1), undefined);
});

test("a buffer lies in one region, though regions are adjacent", () => {
  using regions = new Regions();
  const pool = new BufferPool(noGrowth);
  const one = regions.make(2 * MIB);
  const other = regions.make(2 * MIB);
  assert.equal(other.iova, one.iova + one.size);
  pool.addRegion(one);
  pool.addRegion(other);
  assert.equal(pool.tryAllocate(2 * MIB + 1), undefined);
  const half = pool.tryAllocate(MIB);
  const rest = pool.tryAllocate(1.5 * MIB);
  assert.equal(half?.region, one);
  assert.equal(rest?.region, other);
  assert.equal(rest === undefined ? -1 : iovaOf(rest), other.iova);
});

test("part of a region can be lent, in whole granules, and no part twice", () => {
  using regions = new Regions();
  const region = regions.make(2 * MIB);
  const pool = new BufferPool(noGrowth);
  pool.addRegion(region, 1, 3 * PAGE - 1);
  assert.equal(pool.free, PAGE);
  assert.throws(() => pool.addRegion(region), refused);
  assert.throws(() => pool.addRegion(region, PAGE, 2 * PAGE), refused);
  pool.addRegion(region, 2 * PAGE);
  pool.addRegion(region, 5, 9);
  assert.equal(pool.free, 2 * MIB - PAGE);
  const whole = pool.tryAllocate(2 * MIB - PAGE);
  assert.equal(whole === undefined ? -1 : iovaOf(whole), region.iova + PAGE);
  assert.throws(() => pool.addRegion(region, 0, region.size + 1), refused);
  assert.throws(() => pool.addRegion(region, 8, 4), refused);
});

test("a released buffer has no bytes, and cannot be released or lent to the device again", async () => {
  using regions = new Regions();
  const pool = new BufferPool(regions.grow);
  const buffer = await pool.allocate(10);
  assert.equal(buffer.released, false);
  buffer.release();
  assert.equal(buffer.released, true);
  assert.equal(buffer.bytes.length, 0);
  assert.throws(() => buffer.release(), closed);
  assert.throws(() => buffer.lend(0, 10, false), closed);
  assert.throws(() => buffer.giveBack(0, 10), refused);
  assert.equal(pool.lent, 0);
});

test("a buffer released in flight is lent again only when the last request has ended", async () => {
  using regions = new Regions();
  const pool = new BufferPool(regions.grow);
  const buffer = await pool.allocate(10);
  buffer.lend(0, 4, true);
  buffer.lend(4, 6, true);
  buffer.giveBack(0, 4);
  buffer.release();
  assert.equal(buffer.released, true);
  assert.equal(buffer.bytes.length, 0);
  assert.equal(pool.lent, PAGE);
  const other = await pool.allocate(10);
  assert.notEqual(iovaOf(other), iovaOf(buffer));
  other.release();
  assert.throws(() => buffer.giveBack(0, 4), refused);
  assert.equal(pool.lent, PAGE);
  buffer.giveBack(4, 6);
  assert.throws(() => buffer.giveBack(4, 6), refused);
  assert.equal(iovaOf(await pool.allocate(10)), iovaOf(buffer));
});

test("what the device has returned, and nobody released, stays lent by the pool", async () => {
  using regions = new Regions();
  const pool = new BufferPool(regions.grow);
  const buffer = await pool.allocate(10);
  buffer.lend(0, 10, true);
  buffer.giveBack(0, 10);
  assert.equal(pool.lent, PAGE);
  assert.equal(buffer.bytes.length, 10);
  buffer.release();
  assert.equal(pool.lent, 0);
});

test("all who wait share one growth", async () => {
  using regions = new Regions();
  let arrive: (() => void) | undefined;
  const pool = new BufferPool((size) => {
    regions.asked.push(size);
    return new Promise((resolve) => {
      arrive = () => resolve(regions.make(size));
    });
  });
  const waiting = [pool.allocate(PAGE), pool.allocate(MIB), pool.allocate(5)];
  assert.equal(pool.tryAllocate(1), undefined);
  assert.ok(arrive !== undefined);
  arrive();
  const buffers = await Promise.all(waiting);
  assert.equal(regions.asked.length, 1);
  const [region] = regions.made;
  assert.deepEqual(
    buffers.map((buffer) => iovaOf(buffer) - (region?.iova ?? 0)),
    [0, PAGE, PAGE + MIB],
  );
});

test("regions are few: the first is large, and each doubles what there is", async () => {
  using regions = new Regions();
  const pool = new BufferPool(regions.grow);
  for (let i = 0; i < 32; i++) await pool.allocate(16 * MIB);
  assert.deepEqual(regions.asked, [64 * MIB, 64 * MIB, 128 * MIB, 256 * MIB]);
  await pool.allocate(1.5 * GIB);
  assert.equal(regions.asked.at(-1), 1.5 * GIB);
  await pool.allocate(100 * MIB);
  assert.equal(regions.asked.at(-1), GIB);
});

test("who waits for a growth that is too small for him asks for another", async () => {
  using regions = new Regions();
  const pool = new BufferPool(regions.grow);
  const buffers = await Promise.all([pool.allocate(PAGE), pool.allocate(200 * MIB)]);
  assert.deepEqual(regions.asked, [64 * MIB, 200 * MIB]);
  assert.notEqual(buffers[0]?.region, buffers[1]?.region);
});

test("a growth that fails fails all who wait for it, and the next one is tried anew", async () => {
  using regions = new Regions();
  let attempts = 0;
  const pool = new BufferPool((size) =>
    attempts++ === 0 ? Promise.reject(new Error("no region")) : regions.grow(size),
  );
  const results = await Promise.allSettled([pool.allocate(1), pool.allocate(2)]);
  assert.deepEqual(
    results.map((result) => result.status === "rejected" && String(result.reason)),
    ["Error: no region", "Error: no region"],
  );
  assert.equal((await pool.allocate(3)).length, 3);
  assert.equal(attempts, 2);
});

test("a growth that throws at once, or gives too little, is an error", async () => {
  using regions = new Regions();
  const throwing = new BufferPool(() => {
    throw new Error("at once");
  });
  await assert.rejects(throwing.allocate(1), /at once/);
  const small = new BufferPool(() => Promise.resolve(regions.make(2 * MIB)));
  await assert.rejects(small.allocate(4 * MIB), { code: "ERR_VIRTIO_MEMORY", message: /2097152/ });
});

test("a closed pool lends nothing, also to those who wait; what is lent can be released", async () => {
  using regions = new Regions();
  let arrive: (() => void) | undefined;
  const pool = new BufferPool(
    (size) =>
      new Promise((resolve) => {
        arrive = () => resolve(regions.make(size));
      }),
  );
  pool.addRegion(regions.make(2 * MIB));
  const lent = await pool.allocate(PAGE);
  const waiting = pool.allocate(4 * MIB);
  assert.ok(arrive !== undefined);
  pool.close();
  pool.close();
  arrive();
  await assert.rejects(waiting, closed);
  await assert.rejects(pool.allocate(1), closed);
  assert.throws(() => pool.tryAllocate(1), closed);
  assert.throws(() => pool.addRegion(regions.make(2 * MIB)), closed);
  lent.release();
  assert.equal(pool.lent, 0);
});

test("a pool whose region was closed under it says so", () => {
  using regions = new Regions();
  const pool = new BufferPool(noGrowth);
  const region = regions.make(2 * MIB);
  pool.addRegion(region);
  region.close();
  assert.throws(() => pool.tryAllocate(1), { ...closed, message: /region/ });
  assert.equal(pool.lent, 0);
});

test("wrong lengths and callbacks are refused", async () => {
  const pool = new BufferPool(noGrowth);
  for (const length of [0, -1, 1.5, Number.NaN, "8"]) {
    await assert.rejects(pool.allocate(length as number), refused);
    assert.throws(() => pool.tryAllocate(length as number), refused);
  }
  assert.throws(() => new BufferPool(undefined as unknown as () => Promise<MemoryRegion>), refused);
});

test("any sequence of lending and releasing keeps buffers apart and loses nothing", async () => {
  interface Lent {
    buffer: DeviceBuffer;
    /** Lengths of what the device has, all from byte 0, to read. */
    device: number[];
    mark: number;
    /** Where the memory is, for looking at it when `bytes` is gone. */
    view: Uint8Array;
  }
  const step = fc.record({
    what: fc.constantFrom("allocate", "allocate", "tryAllocate", "release", "lend", "giveBack"),
    length: fc.oneof(fc.integer({ min: 1, max: 3 * PAGE }), fc.integer({ min: 1, max: 2 * MIB })),
    pick: fc.nat(),
  });
  await fc.assert(
    fc.asyncProperty(fc.array(step, { maxLength: 80 }), async (steps) => {
      using regions = new Regions();
      const pool = new BufferPool((size) => Promise.resolve(regions.make(Math.min(size, 2 * MIB))));
      const held: Lent[] = [];
      let mark = 0;
      const hold = (buffer: DeviceBuffer): void => {
        const view = buffer.bytes;
        mark = (mark % 255) + 1;
        view.fill(mark);
        held.push({ buffer, device: [], mark, view });
      };
      for (const { what, length, pick } of steps) {
        const index = pick % Math.max(1, held.length);
        const one = held[index];
        if (what === "allocate") hold(await pool.allocate(length));
        else if (what === "tryAllocate") {
          const buffer = pool.tryAllocate(length);
          if (buffer !== undefined) hold(buffer);
        } else if (one === undefined) continue;
        else if (what === "release") {
          if (one.buffer.released) assert.throws(() => one.buffer.release(), closed);
          else one.buffer.release();
        } else if (what === "lend" && !one.buffer.released) {
          const part = 1 + (length % one.buffer.length);
          one.buffer.lend(0, part, false);
          one.device.push(part);
        } else if (what === "giveBack") {
          const part = one.device.shift();
          if (part === undefined) assert.throws(() => one.buffer.giveBack(0, one.buffer.length), refused);
          else one.buffer.giveBack(0, part);
        }
        if (one !== undefined && one.buffer.released && one.device.length === 0) {
          assert.ok(one.view.every((byte) => byte === one.mark));
          held.splice(index, 1);
        }
        const lent = held.reduce((sum, each) => sum + Math.ceil(each.buffer.length / PAGE) * PAGE, 0);
        assert.equal(pool.lent, lent);
        assert.equal(pool.lent + pool.free, regions.made.length * 2 * MIB);
      }
      // Nobody wrote over another's memory, and all of it comes back in one piece.
      for (const each of held) {
        assert.ok(each.view.every((byte) => byte === each.mark));
        if (!each.buffer.released) each.buffer.release();
        for (const part of each.device) each.buffer.giveBack(0, part);
      }
      assert.equal(pool.lent, 0);
      for (const region of regions.made) assert.equal(pool.tryAllocate(2 * MIB)?.region, region);
      assert.equal(pool.tryAllocate(1), undefined);
    }),
    { numRuns: 150 },
  );
});

function disposable(region: MemoryRegion): MemoryRegion & Disposable {
  return Object.assign(region, { [Symbol.dispose]: () => region.close() });
}
