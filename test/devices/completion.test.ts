/** The three ways of learning of completions, on a ring whose device is in the same process. */

import assert from "node:assert/strict";
import { setImmediate as nextTurn } from "node:timers/promises";
import { describe, type TestContext, test } from "node:test";
import { type CompletionMode, CompletionWatch } from "../../src/devices/completion.js";
import { EventFd } from "../../src/sys/index.js";
import { FakeDevice } from "../../src/testing/index.js";
import { VirtioFeature, Virtqueue, VirtqueueLayout } from "../../src/virtqueue/index.js";

const IOVA = 0x10000;

/** A split queue; without EVENT_IDX avail.flags says whether the driver wants to be notified. */
class Bench {
  readonly queue: Virtqueue;
  readonly device: FakeDevice;
  readonly watch: CompletionWatch;
  readonly errors: Error[] = [];
  /** Called before each look. */
  onLook: () => void = () => {};
  /** Slots in the order they were reaped. */
  readonly reaped: number[] = [];
  private readonly event = EventFd.create();
  private readonly availFlags: Uint16Array;

  constructor(t: TestContext, mode: CompletionMode, { queueSize = 8, features = 0n } = {}) {
    const layout = new VirtqueueLayout({ queueSize, features });
    const buffer = new ArrayBuffer(4096);
    this.queue = new Virtqueue({ layout, buffer, iova: IOVA, features });
    this.device = new FakeDevice({ layout, buffer, iova: IOVA, features });
    this.availFlags = new Uint16Array(buffer, layout.driverAreaOffset, 1);
    const reap = (limit: number): number => {
      this.onLook();
      let count = 0;
      for (; count < limit; count++) {
        const slot = this.queue.poll();
        if (slot < 0) break;
        this.reaped.push(slot);
      }
      return count;
    };
    this.watch = new CompletionWatch(this.queue, reap, (error) => this.errors.push(error));
    this.watch.start(this.event, mode);
    t.after(() => {
      this.watch.stop();
      this.event.close();
    });
  }

  get wantsNotification(): boolean {
    return Atomics.load(this.availFlags, 0) === 0;
  }

  submit(): number {
    this.queue.begin(1);
    this.queue.push(IOVA + 2048, 0, 16, true);
    const slot = this.queue.commit();
    this.queue.publish();
    this.watch.kicked();
    return slot;
  }

  /** The device answers everything; it signals only when asked to, unless `mute`. */
  answer(mute = false): boolean {
    for (const request of this.device.take()) this.device.complete(request.write(new Uint8Array(16)));
    const wanted = this.device.publish();
    if (wanted && !mute) this.signal();
    return wanted;
  }

  /** What the device does when its notification is wanted. */
  signal(): void {
    this.event.signal();
  }

  /** Give the event loop turns until `condition` holds; the test's timeout bounds it. */
  async until(condition: () => boolean): Promise<void> {
    while (!condition()) await nextTurn();
  }
}

describe("mode event with many requests in flight", { timeout: 20_000 }, () => {
  const many = { queueSize: 64, features: VirtioFeature.EVENT_IDX };

  test("a device that uses a few at a time comes to notify late, and what it leaves is found all the same", async (t) => {
    const bench = new Bench(t, "event", many);
    for (let i = 0; i < 48; i++) bench.submit();
    const requests = bench.device.take();
    let used = 0;
    let unnoticed = 0;
    while (used < 48) {
      bench.device.complete(requests[used++].write(new Uint8Array(16)));
      bench.device.complete(requests[used++].write(new Uint8Array(16)));
      if (bench.device.publish()) bench.signal();
      else unnoticed++;
      if (unnoticed === 0) await bench.until(() => bench.reaped.length === used);
    }
    assert.ok(unnoticed > 0, "each pair was notified of");
    await bench.until(() => bench.reaped.length === 48);
    assert.deepEqual(bench.errors, []);
  });

  test("what is submitted later moves the notification, too", async (t) => {
    const bench = new Bench(t, "event", many);
    for (let i = 0; i < 40; i++) bench.submit();
    // A notification for 1 of 40 is too early: from now on one more may pass.
    const requests = bench.device.take();
    bench.device.complete(requests[0].write(new Uint8Array(16)));
    assert.equal(bench.device.publish(), true);
    bench.signal();
    await bench.until(() => bench.reaped.length === 1);
    bench.submit();
    bench.device.complete(requests[1].write(new Uint8Array(16)));
    assert.equal(bench.device.publish(), false, "one may pass");
    bench.device.complete(requests[2].write(new Uint8Array(16)));
    assert.equal(bench.device.publish(), true);
    bench.signal();
    await bench.until(() => bench.reaped.length === 3);
  });

  test("what may pass is found even when the device does nothing more, and the next is notified of at once", async (t) => {
    const bench = new Bench(t, "event", many);
    for (let i = 0; i < 40; i++) bench.submit();
    const requests = bench.device.take();
    let used = 0;
    const use = (): boolean => {
      bench.device.complete(requests[used++].write(new Uint8Array(16)));
      return bench.device.publish();
    };
    while (use()) {
      bench.signal();
      await bench.until(() => bench.reaped.length === used);
      bench.submit();
    }
    await bench.until(() => bench.reaped.length === used);
    assert.equal(use(), true);
  });

  test("few requests are notified of at once", async (t) => {
    const bench = new Bench(t, "event", many);
    for (let i = 0; i < 31; i++) bench.submit();
    const requests = bench.device.take();
    for (const [i, request] of requests.entries()) {
      bench.device.complete(request.write(new Uint8Array(16)));
      assert.equal(bench.device.publish(), true, `request ${i}`);
      bench.signal();
      await bench.until(() => bench.reaped.length === i + 1);
    }
  });
});

test("mode hybrid: a queue that looks behind another one gives way after a few looks", {
  timeout: 20_000,
}, async (t) => {
  const benches = [new Bench(t, "hybrid"), new Bench(t, "hybrid"), new Bench(t, "hybrid")];
  let phase = 0;
  let ended = false;
  const tick = (): void => {
    phase++;
    if (!ended) setImmediate(tick);
  };
  setImmediate(tick);
  // Looks of one queue in one phase of the event loop, and who looked before.
  const run = { owner: -1, before: -1, phase: -1, looks: 0 };
  let most = 0;
  for (const [i, bench] of benches.entries()) {
    bench.onLook = () => {
      if (run.owner !== i || run.phase !== phase) Object.assign(run, { owner: i, before: run.owner, phase, looks: 0 });
      run.looks++;
      if (run.before !== i) most = Math.max(most, run.looks);
    };
  }
  for (let round = 1; round <= 20; round++) {
    for (const bench of benches) bench.submit();
    await nextTurn();
    await nextTurn();
    for (const bench of benches) {
      bench.answer();
      await bench.until(() => bench.reaped.length === round);
    }
  }
  ended = true;
  // 32, and as many again when something completes just as it goes to sleep.
  assert.ok(most > 0 && most <= 64, `${most} looks`);
});

describe("mode hybrid", { timeout: 20_000 }, () => {
  test("finds a completion without a notification while it looks", async (t) => {
    const bench = new Bench(t, "hybrid");
    const slot = bench.submit();
    assert.equal(bench.wantsNotification, false);
    assert.equal(bench.answer(true), false, "a driver that looks does not want to be notified");
    await bench.until(() => bench.reaped.length > 0);
    assert.deepEqual(bench.reaped, [slot]);
  });

  test("asks for a notification when nothing comes for a while, and wakes up by it", async (t) => {
    const bench = new Bench(t, "hybrid");
    const first = bench.submit();
    await bench.until(() => bench.wantsNotification);
    assert.equal(bench.answer(), true);
    await bench.until(() => bench.reaped.length > 0);
    assert.equal(bench.wantsNotification, false, "awake, it looks again");
    const second = bench.submit();
    bench.answer(true);
    await bench.until(() => bench.reaped.length > 1);
    assert.deepEqual(bench.reaped, [first, second]);
  });

  test("requests that follow while it sleeps are found by the same notification", async (t) => {
    const bench = new Bench(t, "hybrid");
    const slots = [bench.submit()];
    await bench.until(() => bench.wantsNotification);
    slots.push(bench.submit(), bench.submit());
    assert.equal(bench.wantsNotification, true);
    bench.answer();
    await bench.until(() => bench.reaped.length === 3);
    assert.deepEqual(bench.reaped, slots);
  });

  test("looks at nothing while nothing is in flight", async (t) => {
    const bench = new Bench(t, "hybrid");
    bench.submit();
    bench.answer(true);
    await bench.until(() => bench.reaped.length === 1);
    bench.watch.lookNow();
    await nextTurn();
    await nextTurn();
    assert.deepEqual(
      process.getActiveResourcesInfo().filter((name) => name === "Immediate"),
      [],
    );
  });

  test("lookNow reaps at once, and gives up on a silent device", async (t) => {
    const bench = new Bench(t, "hybrid");
    const slot = bench.submit();
    bench.watch.lookNow(); // nothing comes: it must return
    assert.deepEqual(bench.reaped, []);
    bench.answer(true);
    bench.watch.lookNow();
    assert.deepEqual(bench.reaped, [slot]);
  });

  test("lookNow at a queue that breaks: told once, and looked at no more", (t) => {
    const bench = new Bench(t, "hybrid");
    bench.submit();
    bench.device.take();
    bench.device.forge(100, 0);
    bench.device.publish();
    bench.watch.lookNow();
    bench.watch.lookNow();
    assert.equal(bench.errors.length, 1);
    assert.equal(bench.watch.mode, "poll");
  });

  test("the share of lookNow is renewed by a turn of the event loop only", async (t) => {
    const bench = new Bench(t, "hybrid");
    const slots: number[] = [];
    let rounds = 0;
    do {
      slots.push(bench.submit());
      bench.answer(true);
      bench.watch.lookNow();
      rounds++;
      assert.ok(rounds < 1_000_000, "lookNow never ran out");
    } while (bench.reaped.length === slots.length);
    await bench.until(() => bench.reaped.length === slots.length);
    slots.push(bench.submit());
    bench.answer(true);
    bench.watch.lookNow();
    assert.deepEqual(bench.reaped, slots);
  });
});

for (const mode of ["hybrid", "event"] as const) {
  test(`mode ${mode}: a queue that breaks is reported once and watched no more`, { timeout: 20_000 }, async (t) => {
    const bench = new Bench(t, mode);
    bench.submit();
    bench.device.take();
    bench.device.forge(7, 16);
    bench.device.publish();
    bench.watch.mode = mode; // looks anew, as after an event
    await bench.until(() => bench.errors.length > 0);
    assert.equal((bench.errors[0] as { code?: string }).code, "ERR_VIRTIO_QUEUE_BROKEN");
    await nextTurn();
    assert.equal(bench.errors.length, 1);
    assert.equal(bench.watch.mode, "poll");
  });
}

test("mode poll does nothing by itself", async (t) => {
  const bench = new Bench(t, "poll");
  bench.submit();
  bench.answer(true);
  bench.watch.lookNow();
  await nextTurn();
  await nextTurn();
  assert.deepEqual(bench.reaped, []);
  assert.equal(bench.wantsNotification, false);
});

test("a device that says there is more, and has nothing whenever one looks, keeps nobody else from running", async (t) => {
  const bench = new Bench(t, "event");
  bench.submit();
  // It takes its used index back between two looks of the driver.
  bench.queue.enableNotifications = () => true;
  let looks = 0;
  bench.onLook = () => {
    looks++;
    assert.ok(looks < 100_000, "one turn never ends");
  };
  bench.signal();
  await bench.until(() => looks > 0);
  await nextTurn();
  await nextTurn();
  assert.ok(looks > 2);
});
