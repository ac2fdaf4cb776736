/** The three ways of learning of completions, on a ring whose device is in the same process. */

import assert from "node:assert/strict";
import { setImmediate as nextTurn } from "node:timers/promises";
import { describe, type TestContext, test } from "node:test";
import { type CompletionMode, CompletionWatch } from "../../src/devices/completion.js";
import { EventFd } from "../../src/sys/index.js";
import { FakeDevice } from "../../src/testing/index.js";
import { Virtqueue, VirtqueueLayout } from "../../src/virtqueue/index.js";

const IOVA = 0x10000;

/** A split queue without EVENT_IDX: avail.flags says whether the driver wants to be notified. */
class Bench {
  readonly queue: Virtqueue;
  readonly device: FakeDevice;
  readonly watch: CompletionWatch;
  readonly errors: Error[] = [];
  /** Slots in the order they were reaped. */
  readonly reaped: number[] = [];
  private readonly event = EventFd.create();
  private readonly availFlags: Uint16Array;

  constructor(t: TestContext, mode: CompletionMode) {
    const layout = new VirtqueueLayout({ queueSize: 8 });
    const buffer = new ArrayBuffer(4096);
    this.queue = new Virtqueue({ layout, buffer, iova: IOVA, features: 0n });
    this.device = new FakeDevice({ layout, buffer, iova: IOVA });
    this.availFlags = new Uint16Array(buffer, layout.driverAreaOffset, 1);
    const reap = (limit: number): number => {
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
    if (wanted && !mute) this.event.signal();
    return wanted;
  }

  /** Give the event loop turns until `condition` holds; the test's timeout bounds it. */
  async until(condition: () => boolean): Promise<void> {
    while (!condition()) await nextTurn();
  }
}

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
