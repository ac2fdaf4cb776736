/** Both ring formats against a device and a model: random operations in every combination of features. */

import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { Pair, type PairOptions } from "./model.js";

const RUNS = 400;
const OPERATIONS = 400;
/** Operations that each format must really see; far below what the numbers above give. */
const MIN_STEPS = 40_000;

type Operation = readonly [kind: number, a: number, b: number];

function apply(pair: Pair, [kind, a, b]: Operation): void {
  switch (kind) {
    case 0:
    case 1:
      return pair.add(a % 4, b % 4, a * 31 + b, false);
    case 2:
      return pair.addFramedList(a % 7, a * 17 + b, b % 2 === 0, (a + b) % 7);
    case 3:
    case 4:
      return pair.addFramed(a + b, b % 2 === 0);
    case 5:
      return pair.add(a % 6, b % 6, a, true);
    case 6:
    case 7:
      return pair.publish();
    case 8:
      return pair.devicePop(a % 5);
    case 9:
    case 10:
      for (let i = 0; i <= a % 3; i++) pair.deviceComplete(b, a);
      return;
    case 11:
      return pair.devicePublish();
    case 12:
      return pair.driverPoll(a % 6);
    case 13:
      return b % 2 === 0 ? pair.driverEnable(a % 3 === 0 ? a : 0) : pair.driverDisable();
    case 14:
      return b % 2 === 0 ? pair.deviceEnable() : pair.deviceDisable();
    case 15:
      return pair.drain();
    case 16:
      return pair.resume();
    default:
      return pair.restart();
  }
}

const operations = fc.array(fc.tuple(fc.nat(17), fc.nat(200), fc.nat(200)), {
  maxLength: OPERATIONS,
  size: "max",
});

function options(packed: boolean): fc.Arbitrary<PairOptions> {
  const sizes = packed ? [1, 2, 3, 4, 5, 7, 8, 13, 16, 100] : [1, 2, 4, 8, 16, 64];
  return fc
    .record({
      queueSize: fc.constantFrom(...sizes),
      packed: fc.constant(packed),
      eventIdx: fc.boolean(),
      inOrder: fc.boolean(),
      tableEntries: fc.constantFrom(0, 1, 2, 3, 8),
    })
    .map((choice) => ({ ...choice, tableEntries: Math.min(choice.tableEntries, choice.queueSize) }));
}

for (const packed of [false, true]) {
  const format = packed
    ? "PACKED-DRV-02 PACKED-DRV-03 PACKED-DRV-08 PACKED-DRV-09 PACKED-DRV-17 packed"
    : "SPLIT-DRV-11 SPLIT-DRV-22 split";
  test(`${format}: nothing is lost, invented or changed in random histories`, () => {
    let steps = 0;
    fc.assert(
      fc.property(options(packed), operations, (choice, list) => {
        const pair = new Pair(choice);
        let availIdx = pair.availIdx;
        for (const operation of list) {
          apply(pair, operation);
          // It only ever moves forward, by what fits into the ring.
          if (!packed && operation[0] !== 17)
            assert.ok(((pair.availIdx - availIdx) & 0xffff) <= 2 * choice.queueSize, "avail.idx went back");
          availIdx = pair.availIdx;
        }
        pair.drain();
        steps += pair.steps;
      }),
      { numRuns: RUNS },
    );
    assert.ok(steps >= MIN_STEPS, `${steps} operations were carried out, expected ${MIN_STEPS}`);
  });

  test(`${packed ? "packed" : "split"}: indices wrap around 65536 under full rings`, () => {
    for (const inOrder of [false, true]) {
      for (const tableEntries of [0, 3]) {
        const queueSize = packed ? 13 : 16;
        const pair = new Pair({ queueSize, packed, eventIdx: true, inOrder, tableEntries });
        const perRound = Math.floor(queueSize / (tableEntries === 0 ? 3 : 1));
        for (let done = 0; done < 70_000; done += perRound) {
          for (let i = 0; i <= perRound; i++) pair.addFramed(done + i, i % 2 === 0);
          pair.publish();
          pair.driverEnable();
          pair.devicePop(perRound);
          pair.deviceEnable();
          for (let i = 0; i < perRound; i++) pair.deviceComplete(inOrder ? 0 : i * 7, 1);
          pair.devicePublish();
          pair.driverPoll(perRound + 1);
        }
        pair.drain();
      }
    }
  });
}
