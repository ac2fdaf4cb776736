/** Bytes of a buffer lent to requests: what two may share, beside a model that looks at each byte. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import fc from "fast-check";
import { BufferPool, type DeviceBuffer, MemoryRegion } from "../../src/memory/index.js";

const MIB = 2 ** 20;
const busy = { name: "VirtioError", code: "ERR_VIRTIO_BUSY" };
const refused = { code: "ERR_VIRTIO_ARGUMENT" };

/** A buffer, and the pool it is of. */
function lend(length: number): { buffer: DeviceBuffer; pool: BufferPool } & Disposable {
  const region = MemoryRegion.create({ name: "lendings", size: 2 * MIB, iova: 2 * MIB });
  const pool = new BufferPool(() => Promise.reject(new Error("not to grow")));
  pool.addRegion(region);
  const buffer = pool.tryAllocate(length);
  assert.ok(buffer !== undefined);
  return { buffer, pool, [Symbol.dispose]: () => region.close() };
}

describe("bytes lent to the device", () => {
  test("two requests have disjoint bytes, or are both read by the device", () => {
    using held = lend(8192);
    const { buffer } = held;
    buffer.lend(0, 4096, true);
    for (const deviceWrites of [true, false]) {
      assert.throws(() => buffer.lend(0, 4096, deviceWrites), busy);
      assert.throws(() => buffer.lend(4095, 1, deviceWrites), busy);
      assert.throws(() => buffer.lend(0, 8192, deviceWrites), busy);
    }
    buffer.lend(4096, 4096, false);
    buffer.lend(4096, 4096, false);
    buffer.lend(5000, 100, false);
    assert.throws(() => buffer.lend(4096, 4096, true), busy);
    assert.throws(() => buffer.lend(5099, 1, true), busy);
    buffer.giveBack(4096, 4096);
    assert.throws(() => buffer.lend(5100, 10, true), busy, "the other one has them still");
    buffer.giveBack(4096, 4096);
    assert.throws(() => buffer.lend(4096, 4096, true), busy, "the small one is there still");
    assert.throws(() => buffer.lend(4990, 11, true), busy);
    buffer.lend(4096, 904, true);
    buffer.lend(5100, 3092, true);
    buffer.giveBack(5000, 100);
    buffer.lend(5000, 100, true);
    buffer.giveBack(0, 4096);
    buffer.lend(0, 4096, true);
  });

  test("a refusal names both ranges, what they are for, and what to do", () => {
    using held = lend(8192);
    const { buffer } = held;
    const message = (wanted: string, other: string): object => ({
      ...busy,
      message: `bytes ${wanted}: a request in flight has it ${other}; await that one first, or allocate another buffer`,
    });
    buffer.lend(0, 512, true);
    buffer.lend(4096, 512, false);
    assert.throws(
      () => buffer.lend(256, 512, false),
      message("256 to 767 of a device buffer cannot be lent for the device to read", "write bytes 0 to 511"),
    );
    assert.throws(
      () => buffer.lend(2048, 4096, true),
      message("2048 to 6143 of a device buffer cannot be lent for the device to write", "read bytes 4096 to 4607"),
    );
  });

  test("what is refused changes nothing, and a buffer comes back when the last of them has ended", () => {
    using held = lend(8192);
    const { buffer, pool } = held;
    buffer.lend(0, 100, true);
    buffer.lend(100, 100, true);
    assert.throws(() => buffer.lend(50, 100, false), busy);
    assert.throws(() => buffer.giveBack(50, 100), refused);
    buffer.release();
    buffer.giveBack(0, 100);
    assert.equal(pool.lent, 8192);
    buffer.giveBack(100, 100);
    assert.equal(pool.lent, 0);
  });

  test("only bytes of the buffer, and only what was lent", () => {
    using held = lend(100);
    const { buffer } = held;
    for (const [offset, length] of [
      [-1, 10],
      [0, 101],
      [100, 1],
      [0, 0],
      [10, -5],
      [Number.NaN, 1],
      [0, Number.NaN],
    ]) {
      assert.throws(() => buffer.lend(offset, length, true), refused);
    }
    assert.throws(() => buffer.giveBack(0, 100), refused);
    buffer.lend(0, 100, false);
    for (const [offset, length] of [
      [0, 99],
      [1, 99],
      [0, 0],
    ]) {
      assert.throws(() => buffer.giveBack(offset, length), refused);
    }
    buffer.giveBack(0, 100);
    assert.throws(() => buffer.giveBack(0, 100), refused);
    buffer.lend(0, 50, true);
    buffer.lend(50, 50, true);
    assert.throws(() => buffer.giveBack(0, 100), refused);
    buffer.giveBack(50, 50);
    assert.throws(() => buffer.giveBack(50, 50), refused);
  });

  test("any number of parts, in any order, again and again", () => {
    const PARTS = 512;
    const length = MIB / PARTS;
    for (const step of [1, 511, 37, 1]) {
      using held = lend(MIB);
      const { buffer } = held;
      for (let i = 0; i < PARTS; i++) buffer.lend(((i * step) % PARTS) * length, length, true);
      for (let i = 0; i < PARTS; i++) assert.throws(() => buffer.lend(i * length + (i % length), 1, false), busy);
      for (let i = 0; i < PARTS; i++) buffer.giveBack(((i * 5) % PARTS) * length, length);
      for (let i = 0; i < PARTS; i++) buffer.lend(((i * 37) % PARTS) * length, length, false);
      for (let i = 0; i < PARTS; i++) buffer.giveBack(i * length, length);
      buffer.lend(1, MIB - 2, true);
      assert.throws(() => buffer.lend(1, 1, false), busy);
      buffer.lend(0, 1, true);
      buffer.lend(MIB - 1, 1, true);
    }
  });
});

test("any sequence of lending and giving back is decided as byte by byte", () => {
  const LENGTH = 96;
  const range = fc.tuple(fc.integer({ min: 0, max: LENGTH - 1 }), fc.integer({ min: 1, max: LENGTH }));
  // Few different ones, so that the same come again, and neighbours do; or any.
  const part = fc.tuple(fc.integer({ min: 0, max: 23 }), fc.constantFrom(1, 1, 1, 2)).map(([i, n]) => [i * 4, n * 4]);
  const step = fc.record({
    isLending: fc.boolean(),
    range: fc.oneof(part, part, range),
    deviceWrites: fc.boolean(),
    pick: fc.nat(),
  });
  fc.assert(
    fc.property(fc.array(step, { maxLength: 300 }), (steps) => {
      using held = lend(LENGTH);
      const { buffer, pool } = held;
      let lent: { offset: number; length: number; deviceWrites: boolean }[] = [];
      const giveBack = ({ offset, length }: { offset: number; length: number }): void => {
        buffer.giveBack(offset, length);
      };
      for (const { isLending, range: chosen, deviceWrites, pick } of steps) {
        if (!isLending && lent.length > 0) {
          giveBack(lent.splice(pick % lent.length, 1)[0]);
          continue;
        }
        const [offset] = chosen;
        const length = Math.min(chosen[1], LENGTH - offset);
        const mine = Array.from({ length }, (_, i) => offset + i);
        const isTaken = lent.some(
          (other) =>
            (deviceWrites || other.deviceWrites) &&
            mine.some((byte) => byte >= other.offset && byte < other.offset + other.length),
        );
        if (isTaken) assert.throws(() => buffer.lend(offset, length, deviceWrites), busy);
        else {
          buffer.lend(offset, length, deviceWrites);
          lent.push({ offset, length, deviceWrites });
        }
        if (!lent.some((other) => other.offset === offset && other.length === length)) {
          assert.throws(() => buffer.giveBack(offset, length), refused);
        }
      }
      for (const each of lent) giveBack(each);
      lent = [];
      buffer.lend(0, LENGTH, true);
      buffer.release();
      assert.equal(pool.lent, 4096);
      buffer.giveBack(0, LENGTH);
      assert.equal(pool.lent, 0);
    }),
    { numRuns: 400 },
  );
});
