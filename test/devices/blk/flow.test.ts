/** Many requests at once: room, order, modes, queues, and giving a call up. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { BlkFeature } from "../../../src/protocol/blk.js";
import { takeBlk } from "../../../src/testing/index.js";
import { VirtioFeature } from "../../../src/virtqueue/index.js";
import { answerRead, failure, openFake, pattern, RINGS, serveAll, turn } from "./support.js";

for (const [name, features] of Object.entries(RINGS)) {
  describe(`a ring that is full, ${name}`, () => {
    for (const memory of ["lent", "plain", "both"] as const) {
      test(`more calls than it holds, memory ${memory}: all complete, submitted in order`, async (t) => {
        const bench = await openFake(t, { features, open: { queueSize: 8 } });
        const { disk } = bench;
        const COUNT = 100;
        const calls: Promise<number>[] = [];
        const settled: number[] = [];
        for (let i = 0; i < COUNT; i++) {
          const isLent = memory === "lent" || (memory === "both" && i % 3 === 0);
          const buffer = isLent ? await disk.allocate(512) : new Uint8Array(512);
          calls.push(
            disk.read(buffer, { position: i * 512 }).then(({ bytesRead }) => {
              settled.push(i);
              const bytes = buffer instanceof Uint8Array ? buffer : buffer.bytes;
              assert.deepEqual(bytes, pattern(512, i));
              return bytesRead;
            }),
          );
        }
        assert.equal(disk.pending, COUNT);
        const sectors = await serveAll(bench);
        assert.deepEqual(
          sectors,
          Array.from({ length: COUNT }, (_, i) => i),
        );
        assert.deepEqual(
          await Promise.all(calls),
          Array.from({ length: COUNT }, () => 512),
        );
        // A call on lent memory takes fewer steps from completion to promise: only equals keep their order.
        if (memory !== "both") assert.deepEqual(settled, sectors);
        assert.equal(disk.pending, 0);
      });
    }

    test("what waits comes before what is called later, whatever its memory", async (t) => {
      const bench = await openFake(t, { features, open: { queueSize: 4 } });
      const { disk } = bench;
      const lent = await disk.allocate(24 * 512);
      const calls: Promise<unknown>[] = [];
      const read = (i: number, isLent: boolean): void => {
        const position = i * 512;
        calls.push(
          isLent
            ? disk.read(lent, { position, offset: position, length: 512 })
            : disk.read(new Uint8Array(512), { position }),
        );
      };
      for (let i = 0; i < 8; i++) read(i, i % 2 === 1);
      const order: number[] = [];
      for (let next = 8; order.length < 24; ) {
        const [request, ...others] = await bench.take();
        order.push(request.sector);
        answerRead(request);
        for (const other of others) {
          order.push(other.sector);
          answerRead(other);
        }
        for (let k = 0; k < 2 && next < 24; k++, next++) read(next, next % 2 === 0);
      }
      assert.deepEqual(
        order,
        Array.from({ length: 24 }, (_, i) => i),
      );
      await Promise.all(calls);
    });

    test("answers in any order reach the right calls", async (t) => {
      if ((features & VirtioFeature.IN_ORDER) !== 0n) return;
      const bench = await openFake(t, { features, open: { queueSize: 32 } });
      const { disk } = bench;
      for (let round = 0; round < 5; round++) {
        const calls = Array.from({ length: 10 }, async (_, i) => {
          const buffer = i % 2 === 0 ? await disk.allocate(512) : new Uint8Array(512);
          const sector = round * 10 + i;
          await disk.read(buffer, { position: sector * 512 });
          assert.deepEqual(buffer instanceof Uint8Array ? buffer : buffer.bytes, pattern(512, sector));
        });
        await turn();
        const requests = await bench.take();
        assert.equal(requests.length, 10);
        for (let i = 0; i < 10; i++) answerRead(requests[(i * 7 + round) % 10]);
        await Promise.all(calls);
      }
    });
  });
}

describe("notifications", () => {
  test("all calls of one turn are published and kicked once", async (t) => {
    const bench = await openFake(t);
    const calls = Array.from({ length: 20 }, (_, i) => bench.disk.read(new Uint8Array(512), { position: i * 512 }));
    assert.deepEqual(bench.queue.notifications, []);
    await turn();
    assert.equal(bench.queue.notifications.length, 1);
    await serveAll(bench);
    await Promise.all(calls);
  });

  test("on lent memory the first call and each sixteenth behind it are kicked at once, the rest with the turn", async (t) => {
    const bench = await openFake(t);
    const buffer = await bench.disk.allocate(40 * 512);
    const calls: Promise<unknown>[] = [];
    const kicks: number[] = [];
    for (let i = 0; i < 40; i++) {
      const before = bench.queue.notifications.length;
      calls.push(bench.disk.read(buffer, { position: i * 512, offset: i * 512, length: 512 }));
      if (bench.queue.notifications.length > before) kicks.push(i);
    }
    assert.deepEqual(kicks, [0, 16, 32]);
    await turn();
    assert.equal(bench.queue.notifications.length, 4);
    await serveAll(bench);
    await Promise.all(calls);
  });

  test("SPLIT-DRV-19 a device that polls is not disturbed", async (t) => {
    for (const features of [RINGS.split, RINGS.packed]) {
      const bench = await openFake(t, { features });
      bench.queue.device.disableNotifications();
      const reading = bench.disk.read(new Uint8Array(512));
      answerRead(await bench.takeOne());
      await reading;
      assert.deepEqual(bench.queue.notifications, []);
    }
  });

  test("SPLIT-DRV-14 a completion event without completions does nothing", async (t) => {
    for (const features of Object.values(RINGS)) {
      const bench = await openFake(t, { features });
      const reading = bench.disk.read(new Uint8Array(512));
      const request = await bench.takeOne();
      for (let i = 0; i < 3; i++) {
        bench.queue.interrupt();
        await turn();
      }
      assert.equal(bench.disk.pending, 1);
      answerRead(request);
      assert.equal((await reading).bytesRead, 512);
      bench.queue.interrupt();
      await turn();
      assert.equal(bench.disk.pending, 0);
    }
  });
});

describe("the two modes", () => {
  for (const [name, features] of Object.entries(RINGS)) {
    test(`${name}: in mode "poll" nothing completes but by poll, which then tells how many`, async (t) => {
      const bench = await openFake(t, { features, open: { mode: "poll" } });
      const { disk } = bench;
      assert.equal(disk.mode, "poll");
      let done = 0;
      const calls = Array.from({ length: 5 }, (_, i) =>
        disk.read(new Uint8Array(512), { position: i * 512 }).then(() => done++),
      );
      const requests = await bench.take();
      for (const request of requests) answerRead(request);
      bench.queue.interrupt();
      await turn();
      assert.equal(done, 0);
      assert.equal(disk.poll(), 5);
      assert.equal(disk.poll(), 0);
      await Promise.all(calls);
      assert.equal(done, 5);
    });

    test(`${name}: in mode "poll" the device is asked for silence, in mode "event" for an event`, async (t) => {
      const bench = await openFake(t, { features });
      const { disk, queue } = bench;
      const complete = async (): Promise<number> => {
        const before = queue.device.notifications;
        const reading = disk.read(new Uint8Array(512));
        answerRead(await bench.takeOne());
        if (disk.mode === "poll") disk.poll();
        await reading;
        return queue.device.notifications - before;
      };
      assert.equal(await complete(), 1);
      disk.mode = "poll";
      // With EVENT_IDX on a split ring the last position asked for may still fire once.
      await complete();
      assert.equal(await complete(), 0);
      disk.mode = "event";
      assert.equal(await complete(), 1);
      assert.equal(await complete(), 1);
    });
  }

  test('completions that came in mode "poll" are found when the mode becomes "event"', async (t) => {
    for (const features of Object.values(RINGS)) {
      const bench = await openFake(t, { features, open: { mode: "poll" } });
      const reading = bench.disk.read(new Uint8Array(512));
      answerRead(await bench.takeOne());
      bench.disk.mode = "event";
      assert.equal((await reading).bytesRead, 512);
    }
  });

  test("poll submits what waits, so that a loop of polls alone comes to an end", async (t) => {
    const bench = await openFake(t, { open: { mode: "poll", queueSize: 4 } });
    const { disk, queue } = bench;
    const calls = Array.from({ length: 10 }, (_, i) => disk.write(new Uint8Array(512), { position: i * 512 }));
    await turn();
    // From here on no turn of the event loop: the device and the driver in one synchronous loop.
    let completed = 0;
    for (let i = 0; i < 100 && completed < 10; i++) {
      for (const request of takeBlk(queue)) request.answer();
      completed += disk.poll();
    }
    assert.equal(completed, 10);
    await Promise.all(calls);
  });
});

describe("several queues", () => {
  const MQ = { features: BlkFeature.MQ, config: { numQueues: 3 }, maxQueues: 3, open: { queues: 3, queueSize: 8 } };

  test("requests are spread over all of them, and come back from all", async (t) => {
    const bench = await openFake(t, MQ);
    for (const memory of [await bench.disk.allocate(3072), new Uint8Array(3072)]) {
      const calls = Array.from({ length: 6 }, (_, i) =>
        bench.disk.read(memory, { position: i * 512, offset: i * 512, length: 512 }),
      );
      await turn();
      const perQueue = bench.transport.queues.map((queue) => takeBlk(queue));
      assert.deepEqual(
        perQueue.map((requests) => requests.length),
        [2, 2, 2],
      );
      for (const requests of perQueue.reverse()) for (const request of requests) answerRead(request);
      await Promise.all(calls);
    }
  });

  test("one queue that is stuck does not hold up the others", async (t) => {
    const bench = await openFake(t, MQ);
    const calls = Array.from({ length: 30 }, (_, i) => bench.disk.read(new Uint8Array(512), { position: i * 512 }));
    await turn();
    const [stuck, ...others] = bench.transport.queues;
    const kept = takeBlk(stuck);
    let answered = 0;
    for (let found = -1; found !== 0; ) {
      found = 0;
      for (const request of others.flatMap((queue) => takeBlk(queue))) {
        answerRead(request);
        found++;
      }
      answered += found;
      await turn();
    }
    assert.equal(answered + kept.length, 30);
    for (const request of kept) answerRead(request);
    await Promise.all(calls);
  });

  test("takeQueue: the last one first, the device's own calls go to the others", async (t) => {
    const bench = await openFake(t, MQ);
    const { disk } = bench;
    assert.equal(disk.takeQueue().index, 2);
    assert.equal(disk.takeQueue().index, 1);
    const calls = Array.from({ length: 4 }, (_, i) => disk.read(new Uint8Array(512), { position: i * 512 }));
    await turn();
    const counts = bench.transport.queues.map((queue) => {
      const requests = takeBlk(queue);
      for (const request of requests) answerRead(request);
      return requests.length;
    });
    // The ring of 8 takes two requests of three descriptors; the others wait.
    assert.deepEqual(counts, [2, 0, 0]);
    await serveAll(bench);
    await Promise.all(calls);
    assert.equal(disk.takeQueue().index, 0);
    assert.throws(() => disk.takeQueue(), failure("ERR_VIRTIO_QUEUES", "open the device with more queues"));
    const none = failure("ERR_VIRTIO_QUEUES", "every queue was taken");
    await assert.rejects(disk.read(new Uint8Array(512)), none);
    await assert.rejects(disk.read(await disk.allocate(512)), none);
    await assert.rejects(disk.getId(), none);
    assert.equal(disk.pending, 0);
    assert.equal(disk.info.queues, 3);
  });

  test("takeQueue with calls pending is refused", async (t) => {
    const bench = await openFake(t, MQ);
    const reading = bench.disk.read(new Uint8Array(512));
    assert.throws(() => bench.disk.takeQueue(), failure("ERR_VIRTIO_QUEUES", "1 calls are pending"));
    await serveAll(bench);
    await reading;
    bench.disk.takeQueue();
  });
});

describe("giving up a call by its signal", () => {
  test("aborted before: rejects with the reason, nothing is submitted", async (t) => {
    const bench = await openFake(t, { features: BlkFeature.FLUSH });
    const reason = new Error("changed my mind");
    const signal = AbortSignal.abort(reason);
    const same = (error: unknown): boolean => error === reason;
    const { disk } = bench;
    await assert.rejects(disk.read(new Uint8Array(512), { signal }), same);
    await assert.rejects(disk.write(await disk.allocate(512), { signal }), same);
    await assert.rejects(disk.readv([new Uint8Array(512)], { signal }), same);
    await assert.rejects(disk.writev([new Uint8Array(512)], { signal }), same);
    await assert.rejects(disk.flush({ signal }), same);
    assert.deepEqual(await bench.take(), []);
    assert.equal(disk.pending, 0);
  });

  test("aborted after submission: rejects at once, the buffer stays lent, late data go nowhere", async (t) => {
    const bench = await openFake(t);
    const { disk } = bench;
    const plain = new Uint8Array(512);
    const lent = await disk.allocate(512);
    const controller = new AbortController();
    const calls = [plain, lent].map((buffer) =>
      assert.rejects(disk.read(buffer, { signal: controller.signal }), (error) => error === controller.signal.reason),
    );
    const requests = await bench.take();
    assert.equal(requests.length, 2);
    controller.abort();
    await Promise.all(calls);
    assert.equal(disk.pending, 2, "the device has them still");
    lent.release();
    const next = await disk.allocate(512);
    assert.notEqual(next.iovaLo, lent.iovaLo);
    for (const request of requests) answerRead(request);
    await turn();
    assert.deepEqual(plain, new Uint8Array(512));
    assert.equal(disk.pending, 0);
    assert.equal((await disk.allocate(512)).iovaLo, lent.iovaLo);
  });

  test("aborted half way: no further requests, and the slots are good again", async (t) => {
    const bench = await openFake(t, {
      features: BlkFeature.SIZE_MAX,
      config: { sizeMax: 512 },
      open: { queueSize: 8 },
    });
    const { disk } = bench;
    const controller = new AbortController();
    const reading = assert.rejects(disk.read(new Uint8Array(8192), { signal: controller.signal }), /aborted/);
    const behind = disk.read(new Uint8Array(512), { position: 4096 });
    const first = await bench.take();
    assert.equal(first.length, 2);
    controller.abort();
    await reading;
    for (const request of first) answerRead(request);
    const [next, ...rest] = await bench.take();
    assert.deepEqual(rest, []);
    assert.equal(next.sector, 8, "the call behind it, not the rest of what was given up");
    answerRead(next);
    await behind;
    assert.equal(disk.pending, 0);
  });

  test("aborted while it waits for room: never submitted", async (t) => {
    const bench = await openFake(t, { open: { queueSize: 4 } });
    const controller = new AbortController();
    const { disk } = bench;
    const first = disk.read(new Uint8Array(512));
    const second = assert.rejects(disk.read(new Uint8Array(512), { position: 512, signal: controller.signal }));
    const third = disk.read(new Uint8Array(512), { position: 1024 });
    await turn();
    controller.abort();
    await second;
    assert.deepEqual(await serveAll(bench), [0, 2]);
    await Promise.all([first, third]);
    assert.equal(disk.pending, 0);
  });

  test("aborted after the end: nothing happens, and no listener is left", async (t) => {
    const bench = await openFake(t);
    const controller = new AbortController();
    const { signal } = controller;
    let listeners = 0;
    const add = signal.addEventListener.bind(signal);
    const remove = signal.removeEventListener.bind(signal);
    signal.addEventListener = (...args: Parameters<typeof add>) => {
      listeners++;
      add(...args);
    };
    signal.removeEventListener = (...args: Parameters<typeof remove>) => {
      listeners--;
      remove(...args);
    };
    const reading = bench.disk.read(new Uint8Array(512), { signal });
    answerRead(await bench.takeOne());
    await reading;
    assert.equal(listeners, 0);
    controller.abort();
  });
});
