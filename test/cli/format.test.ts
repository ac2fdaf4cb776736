/** Tests of how the command shows numbers, tables and latencies. */

import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { drawLatencies } from "../../src/cli/bench-drawing.js";
import { formatBytes, formatCount, formatNs } from "../../src/cli/format.js";
import { LatencyHistogram } from "../../src/cli/histogram.js";
import { columns } from "../../src/cli/table.js";

test("bytes in the unit that fits", () => {
  const shown: readonly (readonly [number, string])[] = [
    [0, "0 bytes"],
    [1, "1 byte"],
    [1023, "1023 bytes"],
    [1024, "1 KiB"],
    [1536, "1.5 KiB"],
    [64 << 20, "64 MiB"],
    [2 ** 40, "1 TiB"],
    [3 * 2 ** 50, "3 PiB"],
    [2 ** 62, "4096 PiB"],
  ];
  for (const [bytes, text] of shown) assert.equal(formatBytes(bytes), text);
});

test("counts and times with three digits that matter", () => {
  const counts: readonly (readonly [number, string])[] = [
    [0, "0"],
    [999.4, "999"],
    [1000, "1.00k"],
    [12_345, "12.3k"],
    [987_654, "988k"],
    [1_234_567, "1.23M"],
    [12_345_678_901, "12346M"],
  ];
  for (const [count, text] of counts) assert.equal(formatCount(count), text);
  const times: readonly (readonly [number, string])[] = [
    [0, "0 ns"],
    [999, "999 ns"],
    [1000, "1.00 µs"],
    [12_345, "12.3 µs"],
    [4_560_000, "4.56 ms"],
    [1.5e9, "1.50 s"],
    [123e9, "123 s"],
  ];
  for (const [ns, text] of times) assert.equal(formatNs(ns), text);
});

test("columns are as wide as their widest cell, colours aside", () => {
  const rows = [
    ["a", "10", "x"],
    ["\x1b[1mlonger\x1b[22m", "5", ""],
    ["b", "", "last"],
  ];
  assert.deepEqual(columns("lrl", rows), ["a       10  x", "\x1b[1mlonger\x1b[22m   5", "b           last"]);
  assert.deepEqual(columns("ll", []), []);
});

test("a histogram of nothing is all zeroes", () => {
  const empty = new LatencyHistogram();
  assert.deepEqual([empty.count, empty.mean, empty.min, empty.max, empty.percentile(0.5)], [0, 0, 0, 0, 0]);
});

test("percentiles are at most 1/64 too long, never too short; count, mean, min and max are exact", () => {
  const durations = fc.array(fc.oneof(fc.nat(300), fc.nat(1e6), fc.nat(2 ** 31 - 1)), { minLength: 1, maxLength: 300 });
  fc.assert(
    fc.property(durations, fc.double({ min: 0, max: 1, noNaN: true }), (values, p) => {
      const histogram = new LatencyHistogram();
      for (const value of values) histogram.record(value);
      const sorted = values.toSorted((a, b) => a - b);
      const exact = sorted[Math.max(0, Math.ceil(p * values.length) - 1)];
      const got = histogram.percentile(p);
      assert.ok(got >= exact && got <= exact + exact / 64, `${got} for ${exact}`);
      assert.equal(histogram.count, values.length);
      assert.equal(histogram.min, sorted[0]);
      assert.equal(histogram.max, sorted.at(-1));
      assert.ok(Math.abs(histogram.mean - values.reduce((sum, v) => sum + v, 0) / values.length) < 1e-3);
    }),
  );
});

test("counts up to a bound have every duration that is 1/64 shorter, and none that is longer", () => {
  const durations = fc.array(fc.oneof(fc.nat(300), fc.nat(1e6), fc.nat(2 ** 31 - 1)), { maxLength: 300 });
  const bounds = fc.array(fc.nat(2 ** 31), { minLength: 1, maxLength: 20 });
  fc.assert(
    fc.property(durations, bounds, (values, unsorted) => {
      const histogram = new LatencyHistogram();
      for (const value of values) histogram.record(value);
      const sorted = unsorted.toSorted((a, b) => a - b);
      for (const [i, count] of histogram.upTo(sorted).entries()) {
        const most = values.filter((value) => value <= sorted[i]).length;
        const least = values.filter((value) => value + value / 64 < sorted[i]).length;
        assert.ok(count >= least && count <= most, `${count} up to ${sorted[i]}, expected ${least} to ${most}`);
      }
      const total = values.reduce((sum, value) => sum + value, 0);
      assert.deepEqual([histogram.total, histogram.upTo([2 ** 31])], [total, [values.length]]);
    }),
  );
});

test("counts since a sum are those recorded after it, and leave the sum alone", () => {
  const histogram = new LatencyHistogram();
  for (let i = 0; i < 100; i++) histogram.record(1000);
  const earlier = LatencyHistogram.sum([histogram]);
  for (let i = 0; i < 10; i++) histogram.record(50);
  const recent = histogram.since(earlier);
  assert.deepEqual([recent.count, recent.mean, recent.percentile(1)], [10, 50, 50]);
  assert.deepEqual([earlier.count, earlier.mean, histogram.count], [100, 1000, 110]);
});

test("a sum counts what its parts count", () => {
  const parts = fc.array(fc.array(fc.nat(1e9), { maxLength: 30 }), { maxLength: 4 });
  const recorded = (values: readonly number[]): LatencyHistogram => {
    const histogram = new LatencyHistogram();
    for (const value of values) histogram.record(value);
    return histogram;
  };
  fc.assert(
    fc.property(parts, (lists) => {
      assert.deepEqual(LatencyHistogram.sum(lists.map(recorded)), recorded(lists.flat()));
    }),
  );
});

test("bins hold every duration once, and begin and end with one that is not empty", () => {
  assert.deepEqual(new LatencyHistogram().bins(8), []);
  const durations = fc.array(fc.oneof(fc.nat(300), fc.nat(2 ** 31 - 1)), { minLength: 1, maxLength: 100 });
  fc.assert(
    fc.property(durations, fc.constantFrom(1, 8, 64), (values, perOctave) => {
      const histogram = new LatencyHistogram();
      for (const value of values) histogram.record(value);
      const bins = histogram.bins(perOctave);
      for (const [i, { from, to, count }] of bins.entries()) {
        assert.equal(count, values.filter((value) => from <= value && value <= to).length);
        if (i > 0) assert.equal(from, bins[i - 1].to + 1);
        if (from >= 64) assert.ok(to + 1 <= from * (1 + 1 / perOctave), `${from} to ${to}`);
      }
      assert.equal(
        bins.reduce((sum, { count }) => sum + count, 0),
        values.length,
      );
      assert.ok(bins[0].count > 0 && bins[bins.length - 1].count > 0);
    }),
  );
});

test("latencies are drawn with the longest bar for the most frequent, without what is rare at the ends", () => {
  const histogram = new LatencyHistogram();
  for (let i = 0; i < 1000; i++) histogram.record(1000);
  for (let i = 0; i < 500; i++) histogram.record(5000);
  histogram.record(1e9);
  assert.deepEqual(drawLatencies(histogram), [
    " 512 ns to  1.02 µs  66.6 %  ████████████████████████████████",
    "1.02 µs to  2.05 µs   0.0 %",
    "2.05 µs to  4.10 µs   0.0 %",
    "4.10 µs to  8.19 µs  33.3 %  ████████████████",
  ]);
});

test("durations of more than two seconds keep their mean and maximum", () => {
  const histogram = new LatencyHistogram();
  histogram.record(60e9);
  assert.deepEqual([histogram.mean, histogram.max], [60e9, 60e9]);
  assert.ok(histogram.percentile(0.5) >= 2 ** 31 - 1);
});
