/** The poller: when it looks, when it sleeps, and that the event loop always has its turn. */

import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { type Pollable, Poller } from "../../src/backend/poller.js";
import { turns } from "./front-end.js";

/** Requests that a {@link FakeRing} takes at a time. */
const BATCH = 16;

/** A ring that does what it is told and keeps a log; `work` requests wait on it. */
class FakeRing implements Pollable {
  busy = false;
  work = 0;
  /** What the next `arm` finds. */
  missed = 0;
  readonly log: string[] = [];
  processed = 0;
  looks = 0;

  process(): number {
    this.looks++;
    const count = Math.min(BATCH, this.work);
    this.work -= count;
    this.processed += count;
    return count;
  }
  disarm(): void {
    this.log.push("disarm");
  }
  arm(): boolean {
    this.log.push("arm");
    this.work += this.missed;
    const found = this.missed > 0;
    this.missed = 0;
    return found;
  }
}

async function asleep(ring: FakeRing): Promise<void> {
  for (let i = 0; i < 100_000 && ring.log.at(-1) !== "arm"; i++) await turns(1);
  const { looks } = ring;
  await turns(10);
  assert.equal(ring.looks, looks, "it is looked at although it sleeps");
}

describe("the poller of a back-end", () => {
  it("suppresses notifications while it looks, and asks for them when it stops", async () => {
    const poller = new Poller();
    const ring = new FakeRing();
    ring.work = 3;
    poller.wake(ring);
    poller.wake(ring);
    assert.deepEqual(ring.log, ["disarm"]);
    await asleep(ring);
    assert.equal(ring.processed, 3);
    assert.deepEqual(ring.log, ["disarm", "arm"]);
    ring.work = 2;
    poller.wake(ring);
    await asleep(ring);
    assert.equal(ring.processed, 5);
    assert.deepEqual(ring.log, ["disarm", "arm", "disarm", "arm"]);
  });

  it("goes on when requests came while it asked for notifications", async () => {
    const poller = new Poller();
    const ring = new FakeRing();
    ring.missed = 4;
    poller.wake(ring);
    for (let i = 0; i < 100_000 && ring.processed < 4; i++) await turns(1);
    assert.equal(ring.processed, 4);
    await asleep(ring);
    assert.deepEqual(ring.log, ["disarm", "arm", "disarm", "arm"]);
  });

  it("gives the event loop its turn although the work never ends", async () => {
    const poller = new Poller();
    const ring = new FakeRing();
    ring.work = Number.POSITIVE_INFINITY;
    poller.wake(ring);
    let before = 0;
    for (let i = 0; i < 20; i++) {
      await turns(1);
      assert.ok(ring.processed > before);
      before = ring.processed;
    }
    poller.drop(ring);
    await turns(2);
    assert.equal(ring.processed, before);
  });

  it("looks at all rings in turn", async () => {
    const poller = new Poller();
    const rings = [new FakeRing(), new FakeRing(), new FakeRing()];
    for (const ring of rings) {
      ring.work = 10_000;
      poller.wake(ring);
    }
    await turns(3);
    const done = rings.map(({ processed }) => processed);
    assert.ok(Math.max(...done) - Math.min(...done) <= 16, `uneven: ${done.join(", ")}`);
    for (const ring of rings) poller.drop(ring);
  });

  it("looks once a turn while slow requests are worked on, so that their completions are heard", async () => {
    const poller = new Poller();
    const ring = new FakeRing();
    ring.busy = true;
    ring.work = Number.POSITIVE_INFINITY;
    poller.wake(ring);
    await turns(5);
    assert.ok(ring.looks >= 3 && ring.looks <= 6, `${ring.looks} looks in 5 turns`);
    poller.drop(ring);
    poller.drop(ring);
  });

  it("leaves the processor to other threads when nothing but their answers is left to come", async () => {
    const poller = new Poller();
    const ring = new FakeRing();
    ring.work = 5;
    ring.busy = true;
    poller.wake(ring);
    await turns(3);
    assert.deepEqual([ring.processed, ring.looks], [5, 2]);
    assert.deepEqual(ring.log, ["disarm", "arm"]);
    // What came while it asked for notifications is not left lying.
    ring.missed = 2;
    poller.wake(ring);
    await turns(4);
    assert.equal(ring.processed, 7);
    assert.deepEqual(ring.log.slice(2), ["disarm", "arm", "disarm", "arm"]);
  });

  it("looks after a notification as after any other sign of life", async () => {
    const poller = new Poller();
    const ring = new FakeRing();
    for (let i = 1; i <= 20; i++) {
      ring.work = 1;
      poller.notified(ring);
      poller.notified(ring);
      await asleep(ring);
      assert.equal(ring.processed, i);
    }
    assert.equal(ring.log.length, 40);
  });
});
