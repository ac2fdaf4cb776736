/** A short run of the fuzzer, with seeds that nobody has seen before: `npm run fuzz` runs as long as it is told. */

import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { fuzzRing } from "./ring-fuzzer.js";

/** Together about a second where nothing else runs. */
const RUNS = 20;
const STEPS = 50_000;

for (const packed of [false, true]) {
  const format = packed ? "packed" : "SPLIT-DRV-22 SPLIT-DRV-23 split";
  test(`${format}: random histories beside a device that lies`, (t) => {
    const totals = { steps: 0, broken: 0, returned: 0, lies: 0 };
    const report = fc.check(
      fc.property(fc.noShrink(fc.integer({ min: 0, max: 0xffff_ffff })), (seed) => {
        const counts = fuzzRing(packed, seed, ({ steps }) => steps >= STEPS);
        totals.steps += counts.steps;
        totals.broken += counts.broken;
        totals.returned += counts.returned;
        totals.lies += counts.lies;
      }),
      { numRuns: RUNS },
    );
    t.diagnostic(`${format}: seed ${report.seed}, ${JSON.stringify(totals)}`);
    if (report.failed) assert.fail(`fast-check seed ${report.seed}\n${fc.defaultReportMessage(report) ?? ""}`);
    // It must have seen all that it is there for.
    assert.ok(totals.steps >= RUNS * STEPS);
    for (const count of [totals.broken, totals.returned, totals.lies]) assert.ok(count > 100, JSON.stringify(totals));
  });
}
