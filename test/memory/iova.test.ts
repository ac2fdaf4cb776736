/** IovaSpace: where addresses lie, what is refused, and a model of what is free. */

import assert from "node:assert/strict";
import test from "node:test";
import fc from "fast-check";
import { type IovaRange, IovaSpace } from "../../src/memory/index.js";

const PAGE = 4096;
const MIB = 2 ** 20;
const GIB = 2 ** 30;
const refused = { code: "ERR_VIRTIO_ARGUMENT" };
const full = { name: "VirtioError", code: "ERR_VIRTIO_MEMORY" };

test("the default space starts at 2 MiB and counts in pages", () => {
  const space = new IovaSpace();
  assert.equal(space.allocate(1), 2 * MIB);
  assert.equal(space.allocate(PAGE + 1), 2 * MIB + PAGE);
  assert.equal(space.allocated, 3 * PAGE);
  assert.equal(space.allocate(5, 2 * MIB), 4 * MIB);
  space.free(2 * MIB);
  assert.equal(space.allocated, 3 * PAGE);
  assert.equal(space.allocate(PAGE), 2 * MIB);
  assert.throws(() => space.allocate(2 ** 46), full);
});

test("address 0 is never handed out, though the range has it", () => {
  const space = new IovaSpace({ ranges: [{ start: 0, end: 2 * PAGE - 1 }] });
  assert.equal(space.allocate(PAGE), PAGE);
  assert.throws(() => space.allocate(PAGE), full);
  assert.throws(() => new IovaSpace({ ranges: [{ start: 0, end: PAGE - 1 }] }).allocate(1), full);
});

test("ends are inclusive, and only whole pages count", () => {
  const exact = new IovaSpace({ ranges: [{ start: PAGE, end: 2 * PAGE - 1 }] });
  assert.equal(exact.allocate(PAGE), PAGE);
  const short = new IovaSpace({ ranges: [{ start: PAGE, end: 2 * PAGE - 2 }] });
  assert.throws(() => short.allocate(1), full);
  const late = new IovaSpace({ ranges: [{ start: PAGE + 1, end: 3 * PAGE - 1 }] });
  assert.equal(late.allocate(1), 2 * PAGE);
});

test("the highest addresses that a number holds can be used", () => {
  const space = new IovaSpace({ ranges: [{ start: 2 ** 53 - 2 * PAGE, end: 2 ** 53 - 1 }] });
  assert.equal(space.allocate(PAGE), 2 ** 53 - 2 * PAGE);
  assert.equal(space.allocate(PAGE), 2 ** 53 - PAGE);
  assert.throws(() => space.allocate(PAGE), full);
});

test("up to 4 GiB nothing crosses a multiple of 4 GiB; what is larger has to", () => {
  const space = new IovaSpace();
  assert.equal(space.allocate(GIB), 2 * MIB);
  assert.equal(space.allocate(3 * GIB), 4 * GIB);
  assert.equal(space.allocate(GIB), GIB + 2 * MIB);
  assert.equal(space.allocate(4 * GIB), 8 * GIB);
  assert.equal(space.allocate(4 * GIB), 12 * GIB);
  assert.equal(space.allocate(5 * GIB, 2 * MIB), 16 * GIB);
  assert.equal(space.allocate(3 * GIB), 21 * GIB);
});

test("adjacent ranges are one, in any order", () => {
  const space = new IovaSpace({
    ranges: [
      { start: 4 * PAGE, end: 8 * PAGE - 1 },
      { start: 12 * PAGE, end: 16 * PAGE - 1 },
      { start: 8 * PAGE, end: 12 * PAGE - 1 },
    ],
  });
  assert.equal(space.allocate(12 * PAGE), 4 * PAGE);
});

test("wrong ranges, sizes, alignments and addresses are refused", () => {
  const wrong: unknown[] = [
    [{ start: 8, end: 4 }],
    [{ start: -1, end: 4 }],
    [{ start: 0, end: 2 ** 53 }],
    [{ start: 0.5, end: 4096 }],
    [
      { start: PAGE, end: 4 * PAGE - 1 },
      { start: 3 * PAGE, end: 8 * PAGE - 1 },
    ],
    [
      { start: PAGE, end: 4 * PAGE - 1 },
      { start: PAGE, end: 4 * PAGE - 1 },
    ],
    [
      { start: 2 * PAGE, end: 3 * PAGE - 1 },
      { start: PAGE, end: 8 * PAGE - 1 },
    ],
    { start: 0, end: 4096 },
  ];
  for (const ranges of wrong) {
    assert.throws(() => new IovaSpace({ ranges: ranges as IovaRange[] }), refused, JSON.stringify(ranges));
  }
  assert.throws(() => new IovaSpace({ range: [] } as object), refused);
  const space = new IovaSpace();
  for (const size of [0, -1, 1.5, 2 ** 53]) assert.throws(() => space.allocate(size), refused);
  for (const align of [0, 1, 2048, 4097, 3 * PAGE, 2 ** 53]) assert.throws(() => space.allocate(PAGE, align), refused);
  assert.throws(() => space.free(2 * MIB), refused);
  const iova = space.allocate(2 * PAGE);
  assert.throws(() => space.free(iova + PAGE), refused);
  assert.throws(() => space.free("x" as unknown as number), refused);
  space.free(iova);
  assert.throws(() => space.free(iova), refused);
  assert.equal(space.allocated, 0);
});

test("the error of a full space tells what is left", () => {
  const space = new IovaSpace({ ranges: [{ start: PAGE, end: 4 * PAGE - 1 }] });
  space.allocate(PAGE);
  assert.throws(() => space.allocate(3 * PAGE), { ...full, message: /no 12288 bytes .*4096 taken, 8192 free/ });
});

test("any sequence of allocations and frees agrees with a model that tries each page", () => {
  // Two ranges around a multiple of 4 GiB and one apart, so that joins, boundaries and gaps all occur.
  const ranges = [
    { start: 4 * GIB - 12 * PAGE, end: 4 * GIB + 10 * PAGE - 1 },
    { start: 8 * GIB, end: 8 * GIB + 9 * PAGE - 1 },
  ];
  const pages: number[] = [];
  for (const { start, end } of ranges) for (let at = start; at < end; at += PAGE) pages.push(at);
  const step = fc.oneof(
    {
      weight: 3,
      arbitrary: fc.record({ size: fc.integer({ min: 1, max: 6 * PAGE }), align: fc.constantFrom(1, 1, 2, 4) }),
    },
    { weight: 2, arbitrary: fc.record({ free: fc.nat() }) },
  );
  fc.assert(
    fc.property(fc.array(step, { maxLength: 60 }), (steps) => {
      const space = new IovaSpace({ ranges });
      const free = new Set(pages);
      const taken = new Map<number, number>();
      const fits = (at: number, count: number, align: number): boolean => {
        if (at % (align * PAGE) !== 0) return false;
        for (let i = 0; i < count; i++) if (!free.has(at + i * PAGE)) return false;
        return Math.floor(at / (4 * GIB)) === Math.floor((at + count * PAGE - 1) / (4 * GIB));
      };
      for (const each of steps) {
        if ("free" in each) {
          const [iova] = [...taken.keys()].slice(each.free % Math.max(1, taken.size));
          if (iova === undefined) continue;
          space.free(iova);
          for (let i = 0; i < (taken.get(iova) ?? 0); i++) free.add(iova + i * PAGE);
          taken.delete(iova);
        } else {
          const count = Math.ceil(each.size / PAGE);
          const expected = pages.find((at) => fits(at, count, each.align));
          if (expected === undefined) {
            assert.throws(() => space.allocate(each.size, each.align * PAGE), full);
            continue;
          }
          assert.equal(space.allocate(each.size, each.align * PAGE), expected);
          for (let i = 0; i < count; i++) free.delete(expected + i * PAGE);
          taken.set(expected, count);
        }
        assert.equal(space.allocated, (pages.length - free.size) * PAGE);
      }
      for (const iova of taken.keys()) space.free(iova);
      assert.equal(space.allocate(12 * PAGE), 4 * GIB - 12 * PAGE);
      assert.equal(space.allocate(10 * PAGE), 4 * GIB);
      assert.equal(space.allocate(9 * PAGE), 8 * GIB);
    }),
    { numRuns: 500 },
  );
});
