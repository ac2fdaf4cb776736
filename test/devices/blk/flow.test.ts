/** Many requests at once: room, order, modes, queues; and how they end when somebody gives up. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { VirtioError } from "../../../src/errors.js";
import { BlkFeature } from "../../../src/protocol/blk.js";
import { type FakeBlkRequest, takeBlk } from "../../../src/testing/index.js";
import { VirtioFeature } from "../../../src/virtqueue/index.js";
import { type Bench, failure, openFake, pattern, refused, RINGS, turn } from "./support.js";

const gone = () => new VirtioError("ERR_VIRTIO_DISCONNECTED", "the device is gone");

/** Answer a read with data that tell its sector. */
function answerRead(request: FakeBlkRequest): void {
  request.answer({ data: pattern(request.room, request.sector) });
}

/** Take and answer until nothing comes any more; returns the sectors in the order of submission. */
async function serveAll(bench: Bench): Promise<number[]> {
  const sectors: number[] = [];
  for (let requests = await bench.take(); requests.length > 0; requests = await bench.take()) {
    for (const request of requests) {
      sectors.push(request.sector);
      answerRead(request);
    }
  }
  return sectors;
}

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
      const lent = await disk.allocate(512);
      const calls: Promise<unknown>[] = [];
      const read = (i: number, isLent: boolean): void => {
        calls.push(disk.read(isLent ? lent : new Uint8Array(512), { position: i * 512 }));
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
    for (const memory of [await bench.disk.allocate(512), new Uint8Array(512)]) {
      const calls = Array.from({ length: 6 }, (_, i) => bench.disk.read(memory, { position: i * 512 }));
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

describe("closing", () => {
  test("a closed device refuses every call with the same code", async (t) => {
    const { disk, transport } = await openFake(t, { features: BlkFeature.FLUSH | BlkFeature.DISCARD });
    const buffer = await disk.allocate(512);
    await disk.close();
    const closed = failure("ERR_VIRTIO_CLOSED", "open it again");
    await assert.rejects(disk.read(new Uint8Array(512)), closed);
    await assert.rejects(disk.write(buffer), closed);
    await assert.rejects(disk.readv([new Uint8Array(512)]), closed);
    await assert.rejects(disk.flush(), closed);
    await assert.rejects(disk.discard({ position: 0, length: 512 }), closed);
    await assert.rejects(disk.getId(), closed);
    await assert.rejects(disk.allocate(512), closed);
    await assert.rejects(disk.refresh(), closed);
    assert.throws(() => disk.takeQueue(), closed);
    assert.throws(() => disk.poll(), closed);
    disk.mode = "poll";
    disk.mode = "event";
    buffer.release();
    assert.equal(disk.capacity, 1 << 20);
    assert.equal(disk.info.queues, 1);
    assert.equal(transport.regionsMapped, transport.regionsClosed);
  });

  for (const [name, features] of Object.entries(RINGS)) {
    test(`${name}: twice, at once and later`, async (t) => {
      const { disk, transport } = await openFake(t, { features });
      await Promise.all([disk.close(), disk.close()]);
      await disk.close();
      await disk[Symbol.asyncDispose]();
      assert.equal(transport.steps.filter((step) => step === "close").length, 1);
      assert.equal(transport.regionsClosed, 1);
    });
  }

  test("BASIC-DRV-23 with requests in flight: they complete first, then the device is stopped", async (t) => {
    for (const mode of ["event", "poll"] as const) {
      const bench = await openFake(t, { open: { mode, queueSize: 4 } });
      const { disk, transport } = bench;
      const calls = Array.from({ length: 5 }, (_, i) => disk.read(new Uint8Array(512), { position: i * 512 }));
      const closing = disk.close();
      await assert.rejects(disk.read(new Uint8Array(512)), failure("ERR_VIRTIO_CLOSED"));
      assert.deepEqual(await serveAll(bench), [0, 1, 2, 3, 4]);
      for (const { bytesRead } of await Promise.all(calls)) assert.equal(bytesRead, 512);
      await closing;
      assert.equal(transport.steps.at(-1), "close");
      assert.equal(transport.regionsClosed, 1);
    }
  });

  test("BASIC-DRV-23 a device that hangs: after five seconds it is stopped, only then the calls reject", async (t) => {
    const bench = await openFake(t);
    const { disk, transport } = bench;
    t.mock.timers.enable({ apis: ["setTimeout"] });
    let rejectedAt: string | undefined;
    const reading = disk.read(new Uint8Array(512)).then(
      () => assert.fail("it was never answered"),
      (error: unknown) => {
        rejectedAt = transport.steps.at(-1);
        return error;
      },
    );
    await bench.takeOne();
    const closing = disk.close();
    t.mock.timers.tick(4999);
    await turn();
    assert.notEqual(transport.steps.at(-1), "close");
    assert.equal(rejectedAt, undefined);
    t.mock.timers.tick(1);
    await closing;
    const error = await reading;
    assert.ok(failure("ERR_VIRTIO_CLOSED")(error));
    assert.equal(rejectedAt, "close");
    assert.equal(transport.regionsClosed, 1);
  });

  test("a device that is lost while it is drained ends the wait at once", async (t) => {
    const bench = await openFake(t);
    const { disk, transport } = bench;
    let told = 0;
    disk.onLost = () => told++;
    t.mock.timers.enable({ apis: ["setTimeout"] }); // time stands still: nothing may wait for it
    const error = gone();
    const reading = assert.rejects(disk.read(new Uint8Array(512)), (got) => got === error);
    await bench.takeOne();
    const closing = disk.close();
    transport.lose(error);
    await closing;
    await reading;
    assert.equal(told, 0, "whoever closes need not be told that it is gone");
    assert.equal(transport.regionsClosed, 1);
  });

  test("closing is not a loss", async (t) => {
    const { disk } = await openFake(t);
    disk.onLost = () => assert.fail("onLost");
    disk.onConfigChange = () => assert.fail("onConfigChange");
    await disk.close();
    await turn();
  });

  test("a config change while closing is of no interest", async (t) => {
    const bench = await openFake(t);
    bench.disk.onLost = () => assert.fail("onLost");
    const reading = bench.disk.read(new Uint8Array(512));
    const request = await bench.takeOne();
    const closing = bench.disk.close();
    bench.transport.changeConfig(Uint8Array.of(1, 0, 0, 0, 0, 0, 0, 0));
    await turn();
    answerRead(request);
    assert.equal((await reading).bytesRead, 512);
    await closing;
  });
});

describe("BASIC-DRV-04 a device that is lost", () => {
  for (const [name, features] of Object.entries(RINGS)) {
    test(`${name}: every call in flight, waiting, or made later rejects with one and the same error`, async (t) => {
      const bench = await openFake(t, { features: features | BlkFeature.FLUSH, open: { queueSize: 4 } });
      const { disk, transport } = bench;
      const losses: unknown[] = [];
      disk.onLost = (error) => losses.push(error);
      const error = gone();
      const same = (got: unknown): boolean => got === error;
      const lent = await disk.allocate(512);
      const calls = [
        disk.read(lent),
        disk.read(new Uint8Array(512)),
        disk.writev([new Uint8Array(512), lent]),
        disk.flush(),
        disk.getId(),
        disk.read(lent, { signal: new AbortController().signal }),
      ].map((call) => assert.rejects(call, same));
      const taken = await bench.take();
      assert.ok(taken.length > 0 && taken.length < calls.length);
      transport.lose(error);
      await Promise.all(calls);
      assert.equal(disk.pending, 0);
      await assert.rejects(disk.read(new Uint8Array(512)), same);
      await assert.rejects(disk.write(lent), same);
      await assert.rejects(disk.flush(), same);
      await assert.rejects(disk.allocate(512), same);
      assert.throws(() => disk.poll(), same);
      await turn();
      assert.deepEqual(losses, [error]);
      await disk.close();
      assert.deepEqual(losses, [error]);
      assert.equal(transport.regionsClosed, 1);
    });
  }

  test("an error that is none of ours is the cause of one that is", async (t) => {
    const bench = await openFake(t);
    const cause = new Error("EPIPE");
    bench.transport.lose(cause);
    await turn();
    await assert.rejects(bench.disk.getId(), (error) => {
      return failure("ERR_VIRTIO_DISCONNECTED", "fake: is lost")(error) && (error as Error).cause === cause;
    });
  });
});

describe("a queue that breaks ends the device", () => {
  for (const [name, features] of Object.entries(RINGS)) {
    for (const mode of ["event", "poll"] as const) {
      test(`${name}, ${mode}: what came before is delivered, the rest rejects with ERR_VIRTIO_QUEUE_BROKEN`, async (t) => {
        const bench = await openFake(t, { features, open: { mode } });
        const { disk, queue } = bench;
        const losses: unknown[] = [];
        disk.onLost = (error) => losses.push(error);
        const good = disk.read(new Uint8Array(512));
        const errors: unknown[] = [];
        const bad = [disk.read(new Uint8Array(512)), disk.read(await disk.allocate(512))].map((call) =>
          call.then(
            () => assert.fail("the device lied"),
            (error: unknown) => errors.push(error),
          ),
        );
        const [request] = await bench.take();
        request.raw.write(pattern(512)).write(Uint8Array.of(0), 512);
        queue.device.complete(request.raw);
        queue.device.forge(0xffff, 513);
        queue.publish();
        if (mode === "poll") assert.throws(() => disk.poll(), failure("ERR_VIRTIO_QUEUE_BROKEN", "65535"));
        assert.equal((await good).bytesRead, 512);
        await Promise.all(bad);
        assert.ok(failure("ERR_VIRTIO_QUEUE_BROKEN")(errors[0]));
        assert.equal(errors[1], errors[0]);
        await assert.rejects(disk.read(new Uint8Array(512)), (error) => error === errors[0]);
        await assert.rejects(disk.allocate(512), (error) => error === errors[0]);
        assert.deepEqual(losses, [errors[0]], "the owner is told");
        await disk.close();
        assert.equal(bench.transport.regionsClosed, 1);
      });
    }
  }
});

describe("BLK-DRV-08 a config space that changes", () => {
  test("the new capacity counts at once, for the device and its queues", async (t) => {
    const bench = await openFake(t, {
      features: BlkFeature.MQ,
      config: { numQueues: 2 },
      maxQueues: 2,
      open: { queues: 2 },
    });
    const { disk, transport } = bench;
    const seen: number[] = [];
    disk.onConfigChange = (capacity) => seen.push(capacity);
    await assert.rejects(disk.read(new Uint8Array(512), { position: 1 << 20 }), refused("position"));
    transport.changeConfig(Uint8Array.of(1, 8, 0, 0, 0, 0, 0, 0)); // 2049 sectors
    await turn();
    assert.deepEqual(seen, [(1 << 20) + 512]);
    assert.equal(disk.capacity, (1 << 20) + 512);
    for (let i = 0; i < 2; i++) {
      const reading = disk.read(await disk.allocate(512), { position: 1 << 20 });
      answerRead(await bench.takeOne());
      assert.equal((await reading).bytesRead, 512);
    }
    transport.changeConfig(Uint8Array.of(8, 0));
    await turn();
    await assert.rejects(disk.read(new Uint8Array(512), { position: 4096 }), refused("position"));
  });

  test("one that makes no sense loses the device", async (t) => {
    const bench = await openFake(t);
    const losses: VirtioError[] = [];
    bench.disk.onLost = (error) => losses.push(error);
    bench.transport.changeConfig(new Uint8Array(8).fill(0xff));
    await turn();
    assert.deepEqual(
      losses.map(({ code }) => code),
      ["ERR_VIRTIO_CONFIG"],
    );
    await assert.rejects(bench.disk.getId(), (error) => error === losses[0]);
  });

  test("refresh asks for it", async (t) => {
    const bench = await openFake(t, { features: BlkFeature.WRITE_ZEROES });
    bench.transport.config[56] = 1;
    const { writeZeroes } = await bench.disk.refresh();
    assert.equal(writeZeroes?.mayUnmap, true);
    assert.equal(bench.disk.config.writeZeroes?.mayUnmap, true);
  });
});
