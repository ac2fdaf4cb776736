/** Jobs one after the other, and waits that end once. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { Serial, Waits } from "../../src/transports/wait.js";

describe("Serial", () => {
  test("jobs run in order, each when the one before has ended, also when that failed", async () => {
    const serial = new Serial();
    const events: string[] = [];
    const job = (name: string, fails: boolean) => async () => {
      events.push(`${name} begins`);
      await new Promise((resolve) => setImmediate(resolve));
      events.push(`${name} ends`);
      if (fails) throw new Error(name);
    };
    const results = await Promise.allSettled([
      serial.run(job("a", true)),
      serial.run(job("b", false)),
      serial.run(job("c", true)),
    ]);
    assert.deepEqual(
      results.map(({ status }) => status),
      ["rejected", "fulfilled", "rejected"],
    );
    assert.deepEqual(events, ["a begins", "a ends", "b begins", "b ends", "c begins", "c ends"]);
  });
});

describe("Waits", () => {
  test("a wait ends once, and says whether its value will be seen", async () => {
    const waits = new Waits(10_000, () => "a test");
    const first = waits.begin<number>();
    assert.equal(first.over, false);
    assert.equal(first.resolve(1), true);
    assert.equal(first.over, true);
    assert.equal(first.resolve(2), false);
    first.reject(new Error("late"));
    waits.endAll(new Error("later"));
    assert.equal(await first.promise, 1);

    const second = waits.begin<number>();
    waits.endAll(new RangeError("all"));
    assert.equal(second.resolve(1), false);
    await assert.rejects(second.promise, RangeError);
  });
});
