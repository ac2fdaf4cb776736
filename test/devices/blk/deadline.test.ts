/** Calls that may take so long and no longer: by a time limit, by a signal, or until the device is closed. */

import assert from "node:assert/strict";
import { getEventListeners, once } from "node:events";
import { describe, type TestContext, test } from "node:test";
import { bounded, lateError } from "../../../src/devices/blk/deadline.js";
import { BlockDevice } from "../../../src/devices/blk/index.js";
import { BlkFeature } from "../../../src/protocol/blk.js";
import type { FakeTransport } from "../../../src/testing/index.js";
import { ALL_REQUESTS, answerRead, type Bench, failure, openFake, pattern, refused, turn } from "./support.js";

const LIMIT = 50;
const late = failure("ERR_VIRTIO_TIMEOUT", "within 50 ms");
const RANGE = { position: 512, length: 512 };
const SEGMENTS = { maxSectors: 1024, maxSegments: 4 };
const CONFIG = {
  ...{ discard: { ...SEGMENTS, alignment: 1 }, writeZeroes: { ...SEGMENTS, mayUnmap: true } },
  ...{ secureErase: { ...SEGMENTS, alignment: 1 }, writeback: true },
};

type Bounds = { readonly timeout?: number; readonly signal?: AbortSignal };

/** Every call that is a request of the device. */
const REQUESTS: Readonly<Record<string, (disk: BlockDevice, bounds: Bounds) => Promise<unknown>>> = {
  "read of 512 bytes at 512": (disk, bounds) => disk.read(new Uint8Array(512), { position: 512, ...bounds }),
  "write of 1024 bytes at 0": (disk, bounds) => disk.write(new Uint8Array(1024), bounds),
  "readv of 1024 bytes at 512": (disk, bounds) =>
    disk.readv([new Uint8Array(512), new Uint8Array(512)], { position: 512, ...bounds }),
  "writev of 512 bytes at 0": (disk, bounds) => disk.writev([new Uint8Array(512)], bounds),
  flush: (disk, bounds) => disk.flush(bounds),
  "discard of 512 bytes at 512": (disk, bounds) => disk.discard(RANGE, bounds),
  "writeZeroes of 1024 bytes at 512": (disk, bounds) => disk.writeZeroes([RANGE, RANGE], { unmap: true, ...bounds }),
  "secureErase of 512 bytes at 512": (disk, bounds) => disk.secureErase(RANGE, bounds),
  getId: (disk, bounds) => disk.getId(bounds),
  getLifetime: (disk, bounds) => disk.getLifetime(bounds),
};

/** Every call that only talks to the transport. */
const TALKS: Readonly<Record<string, (disk: BlockDevice, bounds: Bounds) => Promise<unknown>>> = {
  setWriteback: (disk, bounds) => disk.setWriteback(true, bounds),
  refresh: (disk, bounds) => disk.refresh(bounds),
  "allocate of 134217728 bytes": (disk, bounds) => disk.allocate(128 << 20, bounds),
};

function open(t: TestContext): Promise<Bench> {
  return openFake(t, { features: ALL_REQUESTS | BlkFeature.CONFIG_WCE, config: CONFIG });
}

/** Hold back what the transport is asked for, until the function returned is called. */
function hold(transport: FakeTransport): () => void {
  let release = (): void => {};
  const gate = new Promise<void>((resolve) => {
    release = resolve;
  });
  const readConfig = transport.readConfig.bind(transport);
  const writeConfig = transport.writeConfig.bind(transport);
  const mapMemory = transport.mapMemory.bind(transport);
  transport.readConfig = async (...args) => gate.then(() => readConfig(...args));
  transport.writeConfig = async (...args) => gate.then(() => writeConfig(...args));
  transport.mapMemory = async (...args) => gate.then(() => mapMemory(...args));
  return release;
}

/** Timers that run. */
function timers(): number {
  return process.getActiveResourcesInfo().filter((name) => name === "Timeout").length;
}

/** A signal, and how many listen to it. */
function counted(): { controller: AbortController; listeners: () => number } {
  const controller = new AbortController();
  return { controller, listeners: () => getEventListeners(controller.signal, "abort").length };
}

describe("a call that takes too long", () => {
  for (const [name, call] of Object.entries(REQUESTS)) {
    test(`${name}: rejects at once, and the device's late answer harms nobody`, async (t) => {
      const bench = await open(t);
      const { disk } = bench;
      t.mock.timers.enable({ apis: ["setTimeout"] });
      const calling = call(disk, { timeout: LIMIT });
      const rejected = assert.rejects(calling, (error) => {
        return late(error) && failure("ERR_VIRTIO_TIMEOUT", `${name} of fake: did not end`)(error);
      });
      const [request] = await bench.take();
      t.mock.timers.tick(LIMIT - 1);
      await turn();
      assert.equal(disk.stats().queues[0].abandoned, 0);
      t.mock.timers.tick(1);
      await rejected;
      await assert.rejects(calling, failure("ERR_VIRTIO_TIMEOUT", "stays lent to it until the device returns it"));
      const held = disk.stats();
      assert.deepEqual([held.queues[0].inFlight, held.queues[0].abandoned], [1, 1]);
      assert.deepEqual(held.queues[0].errors, { ERR_VIRTIO_TIMEOUT: 1 });
      assert.equal(held.lentBytes > 0, name !== "flush");
      request.answer({ data: new Uint8Array(request.room).fill(1) });
      await turn();
      const after = disk.stats();
      assert.deepEqual([after.queues[0].inFlight, after.queues[0].abandoned, after.lentBytes], [0, 0, 0]);
      assert.equal(disk.pending, 0);
    });

    test(`${name}: in time, nothing is left of the limit and the signal`, async (t) => {
      const bench = await open(t);
      const before = timers();
      const { controller, listeners } = counted();
      const calling = call(bench.disk, { timeout: 2 ** 31 - 1, signal: controller.signal });
      assert.deepEqual([timers() - before, listeners()], [1, 1]);
      const [request] = await bench.take();
      request.answer({ data: new Uint8Array(request.room) });
      await calling;
      assert.deepEqual([timers() - before, listeners()], [0, 0]);
    });

    test(`${name}: aborted, rejects with the reason and is not counted as an error`, async (t) => {
      const bench = await open(t);
      const before = timers();
      const { controller, listeners } = counted();
      const rejected = assert.rejects(
        call(bench.disk, { timeout: 2 ** 31 - 1, signal: controller.signal }),
        (error) => error === controller.signal.reason,
      );
      const [request] = await bench.take();
      controller.abort();
      await rejected;
      assert.deepEqual([timers() - before, listeners()], [0, 0]);
      const { abandoned, errors } = bench.disk.stats().queues[0];
      assert.deepEqual([abandoned, errors], [1, {}]);
      request.answer({ data: new Uint8Array(request.room) });
      await turn();
      assert.equal(bench.disk.stats().queues[0].abandoned, 0);
    });
  }

  for (const [name, call] of Object.entries(TALKS)) {
    test(`${name}: rejects at once, and what it began ends by itself`, async (t) => {
      const { disk, transport } = await open(t);
      const release = hold(transport);
      t.mock.timers.enable({ apis: ["setTimeout"] });
      const calling = assert.rejects(call(disk, { timeout: LIMIT }), (error) => {
        return late(error) && failure("ERR_VIRTIO_TIMEOUT", `${name} of fake: did not end`)(error);
      });
      await turn();
      t.mock.timers.tick(LIMIT);
      await calling;
      release();
      await turn();
      assert.equal(disk.stats().lentBytes, 0, "memory that comes too late goes back");
      await call(disk, { timeout: LIMIT });
    });

    test(`${name}: aborted, before and meanwhile`, async (t) => {
      const { disk, transport } = await open(t);
      const before = timers();
      const { controller, listeners } = counted();
      const { signal } = controller;
      const same = (error: unknown): boolean => error === signal.reason;
      const release = hold(transport);
      const calling = assert.rejects(call(disk, { timeout: 2 ** 31 - 1, signal }), same);
      await turn();
      controller.abort();
      await calling;
      assert.deepEqual([timers() - before, listeners()], [0, 0]);
      release();
      await turn();
      const steps = transport.log.length;
      await assert.rejects(call(disk, { signal }), same);
      assert.equal(transport.log.length, steps, "nothing is begun for a signal that has aborted");
    });
  }

  test("on lent memory: it stays lent, and its data are what the device writes late", async (t) => {
    const bench = await open(t);
    const { disk } = bench;
    const buffer = await disk.allocate(512);
    t.mock.timers.enable({ apis: ["setTimeout"] });
    const rejected = assert.rejects(disk.read(buffer, { timeout: LIMIT }), late);
    const request = await bench.takeOne();
    t.mock.timers.tick(LIMIT);
    await rejected;
    buffer.release();
    assert.equal(disk.stats().lentBytes, 4096);
    assert.notEqual((await disk.allocate(512)).iovaLo, buffer.iovaLo);
    answerRead(request);
    await turn();
    assert.equal((await disk.allocate(512)).iovaLo, buffer.iovaLo);
  });

  test("in the line: nothing was sent, and it leaves the line", async (t) => {
    const bench = await openFake(t, { open: { queueSize: 4 } });
    const { disk } = bench;
    t.mock.timers.enable({ apis: ["setTimeout"] });
    const first = disk.read(new Uint8Array(512));
    const calls = Array.from({ length: 3 }, () => {
      return assert.rejects(
        disk.read(new Uint8Array(512), { timeout: LIMIT }),
        failure("ERR_VIRTIO_TIMEOUT", "nothing of it is with the device"),
      );
    });
    const last = disk.read(new Uint8Array(512), { position: 512 });
    const request = await bench.takeOne();
    assert.equal(disk.stats().waiting, 4);
    t.mock.timers.tick(LIMIT);
    await Promise.all(calls);
    await turn();
    const { waiting, errors, queues } = disk.stats();
    assert.deepEqual([waiting, errors, queues[0].errors], [1, { ERR_VIRTIO_TIMEOUT: 3 }, {}]);
    answerRead(request);
    await first;
    answerRead(await bench.takeOne());
    assert.deepEqual((await last).buffer, pattern(512, 1));
  });

  test("half way: the parts in flight come back, no more are sent, each is counted", async (t) => {
    const bench = await openFake(t, {
      features: BlkFeature.SIZE_MAX,
      config: { sizeMax: 512 },
      open: { queueSize: 8 },
    });
    const { disk } = bench;
    t.mock.timers.enable({ apis: ["setTimeout"] });
    const rejected = assert.rejects(disk.read(new Uint8Array(8192), { timeout: LIMIT }), late);
    const requests = await bench.take();
    assert.ok(requests.length > 1 && requests.length < 16);
    t.mock.timers.tick(LIMIT);
    await rejected;
    const { abandoned, errors } = disk.stats().queues[0];
    assert.deepEqual([abandoned, errors], [requests.length, { ERR_VIRTIO_TIMEOUT: requests.length }]);
    for (const request of requests) answerRead(request);
    assert.deepEqual(await bench.take(), []);
    assert.equal(disk.pending, 0);
  });

  test("the limit is one of the call, not of the device: what comes later goes its way", async (t) => {
    const bench = await open(t);
    t.mock.timers.enable({ apis: ["setTimeout"] });
    const rejected = assert.rejects(bench.disk.getId({ timeout: 1 }), failure("ERR_VIRTIO_TIMEOUT"));
    const request = await bench.takeOne();
    t.mock.timers.tick(1);
    await rejected;
    const reading = bench.disk.read(new Uint8Array(512), { timeout: 1 });
    answerRead(await bench.takeOne());
    assert.equal((await reading).bytesRead, 512);
    request.answer({ data: new Uint8Array(20) });
  });

  for (const [name, call] of Object.entries({ ...REQUESTS, ...TALKS })) {
    test(`${name}: wrong bounds are refused, and nothing is sent`, async (t) => {
      const bench = await open(t);
      const steps = bench.transport.log.length;
      for (const timeout of [0, -1, 1.5, 2 ** 31, Number.NaN, Number.POSITIVE_INFINITY]) {
        await assert.rejects(call(bench.disk, { timeout }), refused("timeout"));
      }
      await assert.rejects(call(bench.disk, { timeout: "5" } as unknown as Bounds), refused("timeout"));
      await assert.rejects(call(bench.disk, { signal: {} } as unknown as Bounds), refused("signal"));
      await assert.rejects(call(bench.disk, { timeOut: 5 } as Bounds), refused("options"));
      assert.deepEqual(await bench.take(), []);
      assert.equal(bench.transport.log.length, steps);
    });
  }
});

describe("close with a time limit", () => {
  test("BASIC-DRV-23 a device that hangs is stopped after it", async (t) => {
    const bench = await openFake(t);
    const { disk, transport } = bench;
    const reading = assert.rejects(disk.read(new Uint8Array(512)), failure("ERR_VIRTIO_CLOSED"));
    await bench.takeOne();
    t.mock.timers.enable({ apis: ["setTimeout"] });
    const closing = disk.close({ timeout: LIMIT });
    t.mock.timers.tick(LIMIT - 1);
    await turn();
    assert.notEqual(transport.steps.at(-1), "close");
    t.mock.timers.tick(1);
    await closing;
    await reading;
    assert.equal(transport.regionsClosed, 1);
  });

  test("BASIC-DRV-23 a thread that drives a queue of it has as long", async (t) => {
    const bench = await openFake(t, {
      ...{ features: BlkFeature.MQ, config: { numQueues: 2 }, maxQueues: 2, open: { queues: 2 } },
    });
    const adopted = await BlockDevice.adopt(await bench.disk.handOver());
    const told = once(adopted, "lost");
    let ended = false;
    const reading = (async () => {
      await assert.rejects(adopted.read(new Uint8Array(512)), failure("ERR_VIRTIO_CLOSED"));
      ended = true;
    })();
    while ((await bench.take()).length === 0);
    t.mock.timers.enable({ apis: ["setTimeout"] });
    const closing = bench.disk.close({ timeout: LIMIT });
    await told;
    t.mock.timers.tick(LIMIT - 1);
    await turn();
    assert.equal(ended, false);
    t.mock.timers.tick(1);
    await reading;
    await closing;
    assert.equal(bench.transport.regionsClosed, 1);
  });

  test("a wrong one is refused, and the device stays open", async (t) => {
    const { disk } = await openFake(t);
    await assert.rejects(disk.close({ timeout: -1 }), refused("timeout"));
    await assert.rejects(disk.close({ time: 1 } as { timeout?: number }), refused("options"));
    assert.equal((await disk.allocate(512)).length, 512);
    await disk.close({ timeout: 0 });
  });
});

test("a call that has its result is not given up any more, whoever aborts in the same turn", async () => {
  const controller = new AbortController();
  const { signal } = controller;
  const work = Promise.resolve("a buffer");
  const given: unknown[] = [];
  const call = bounded(
    work,
    { signal },
    () => lateError("work", undefined, ""),
    (error) => given.push(error),
  );
  const abort = work.then(() => controller.abort());
  assert.equal(await call, "a buffer");
  await abort;
  assert.deepEqual(given, []);
  assert.equal(getEventListeners(signal, "abort").length, 0);
});
