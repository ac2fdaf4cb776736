/** The pause between two looks of a polling driver. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { PollPacer } from "../../src/devices/pacer.js";

const LOOKS = 1000;

describe("the pause of a polling driver", () => {
  const shortest = new PollPacer().pause;

  test("grows while looks find few of many, up to a bound", () => {
    const pacer = new PollPacer();
    let before = 0;
    for (let i = 0; i < LOOKS; i++) {
      before = pacer.pause;
      pacer.adapt(1, 64);
      assert.ok(pacer.pause >= before);
    }
    assert.ok(pacer.pause > 10 * shortest);
    assert.equal(pacer.pause, before, "it does not grow without end");
  });

  test("shrinks while looks find most of what is in flight, down to the shortest", () => {
    const pacer = new PollPacer();
    for (let i = 0; i < LOOKS; i++) pacer.adapt(1, 64);
    const longest = pacer.pause;
    pacer.adapt(64, 64);
    assert.equal(pacer.pause, longest / 2);
    for (let i = 0; i < LOOKS; i++) pacer.adapt(64, 64);
    assert.equal(pacer.pause, shortest);
  });

  test("stays while looks find a good part", () => {
    const pacer = new PollPacer();
    for (let i = 0; i < 20; i++) pacer.adapt(1, 64);
    const { pause } = pacer;
    pacer.adapt(30, 64);
    assert.equal(pacer.pause, pause);
  });

  test("is the shortest when few are in flight", () => {
    const pacer = new PollPacer();
    for (let i = 0; i < LOOKS; i++) pacer.adapt(1, 64);
    pacer.adapt(1, 4);
    assert.equal(pacer.pause, shortest);
  });

  test("ends, and is as long the next time", () => {
    const pacer = new PollPacer();
    for (let i = 0; i < LOOKS; i++) pacer.adapt(1, 64);
    const { pause } = pacer;
    for (let i = 0; i < 3; i++) pacer.wait();
    assert.equal(pacer.pause, pause);
  });
});
