/** Figures of a running device: what was submitted, what came back, what failed, what is lent. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { BlkFeature } from "../../../src/protocol/blk.js";
import { backendFor } from "../../backend/support.js";
import { SlowStorage, until } from "../../backend/slow-storage.js";
import { openBlock } from "../../../src/index.js";
import { answerRead, failure, openFake, RINGS, turn } from "./support.js";

const ZERO = { submitted: 0, completed: 0, inFlight: 0, abandoned: 0, kicks: 0, wakeUps: 0, replayed: 0, errors: {} };

describe("stats()", () => {
  for (const [name, features] of Object.entries(RINGS)) {
    test(`${name}: counts what each queue was given and gave back`, async (t) => {
      const open = { queues: 2, queueSize: 8, mode: "poll" } as const;
      const bench = await openFake(t, {
        ...{ features: features | BlkFeature.MQ, config: { numQueues: 2 }, maxQueues: 2, open },
      });
      const { disk } = bench;
      assert.deepEqual(disk.stats(), {
        ...{ reconnects: 0, waiting: 0, lentBytes: 0, errors: {} },
        queues: [0, 1].map((index) => ({ index, size: 8, ...ZERO })),
      });
      const lent = await disk.allocate(8192);
      const calls = [disk.read(lent, { length: 512 }), disk.read(new Uint8Array(512)), disk.read(new Uint8Array(512))];
      const requests = await bench.take();
      const busy = disk.stats();
      assert.deepEqual(
        busy.queues.map(({ submitted, inFlight, completed }) => [submitted, inFlight, completed]),
        [
          [2, 2, 0],
          [1, 1, 0],
        ],
      );
      assert.equal(busy.lentBytes, 8192 + 2 * 4096);
      for (const { kicks } of busy.queues) assert.ok(kicks > 0);
      for (const request of requests) answerRead(request);
      disk.poll();
      await Promise.all(calls);
      const { lentBytes, queues } = disk.stats();
      assert.equal(lentBytes, 8192);
      assert.deepEqual(
        queues.map(({ submitted, inFlight, completed, abandoned, errors }) => {
          return [submitted, inFlight, completed, abandoned, errors];
        }),
        [
          [2, 0, 2, 0, {}],
          [1, 0, 1, 0, {}],
        ],
      );
    });
  }

  test("failures by code, of requests on lent memory and of others", async (t) => {
    const bench = await openFake(t, { features: BlkFeature.FLUSH });
    const { disk } = bench;
    const lent = await disk.allocate(512);
    const calls = [
      assert.rejects(disk.read(lent), failure("ERR_VIRTIO_IO")),
      assert.rejects(disk.read(new Uint8Array(512)), failure("ERR_VIRTIO_IO")),
      assert.rejects(disk.flush(), failure("ERR_VIRTIO_UNSUPPORTED")),
      assert.rejects(disk.write(await disk.allocate(512)), failure("ERR_VIRTIO_STATUS")),
    ];
    (await bench.take()).forEach((request, i) => request.answer({ status: [1, 1, 2, 77][i] }));
    await Promise.all(calls);
    const errors = { ERR_VIRTIO_IO: 2, ERR_VIRTIO_UNSUPPORTED: 1, ERR_VIRTIO_STATUS: 1 };
    const stats = disk.stats();
    assert.deepEqual(stats.errors, errors);
    assert.deepEqual(stats.queues[0].errors, errors);
    await assert.rejects(disk.read(lent, { position: 1 }), RangeError);
    assert.deepEqual(disk.stats().errors, errors, "a wrong argument is no failure of the device");
  });

  test("a loss counts each request in flight, and each call in the line; what is in flight is a leak then", async (t) => {
    const bench = await openFake(t, { open: { queueSize: 4 } });
    const { disk, transport } = bench;
    const gone = failure("ERR_VIRTIO_DISCONNECTED");
    const calls = Array.from({ length: 3 }, () => assert.rejects(disk.read(new Uint8Array(512)), gone));
    await bench.takeOne();
    transport.lose(new Error("EPIPE"));
    await Promise.all(calls);
    const { errors, waiting, queues } = disk.stats();
    assert.deepEqual([errors, waiting], [{ ERR_VIRTIO_DISCONNECTED: 3 }, 0]);
    const [{ inFlight, abandoned, errors: sent }] = queues;
    assert.deepEqual([inFlight, abandoned, sent], [1, 1, { ERR_VIRTIO_DISCONNECTED: 1 }]);
  });

  test("a request of several parts in flight counts each of them at a loss", async (t) => {
    const bench = await openFake(t, { features: BlkFeature.SIZE_MAX, config: { sizeMax: 512 } });
    const reading = assert.rejects(bench.disk.read(new Uint8Array(2048)), failure("ERR_VIRTIO_DISCONNECTED"));
    assert.equal((await bench.take()).length, 4);
    bench.transport.lose(new Error("EPIPE"));
    await reading;
    assert.deepEqual(bench.disk.stats().queues[0].errors, { ERR_VIRTIO_DISCONNECTED: 4 });
  });

  test("a queue that was taken counts as well", async (t) => {
    const bench = await openFake(t, { open: { mode: "poll" } });
    const queue = bench.disk.takeQueue();
    queue.submitRead(0, await bench.disk.allocate(512), 0, 512);
    queue.submitFlush();
    queue.kick();
    const [{ submitted, inFlight, kicks }] = bench.disk.stats().queues;
    assert.deepEqual([submitted, inFlight, kicks], [2, 2, 1]);
    for (const request of await bench.take()) request.answer();
    queue.poll();
    assert.equal(bench.disk.stats().queues[0].completed, 2);
  });

  test("the figures are those of one moment", async (t) => {
    const bench = await openFake(t);
    const before = bench.disk.stats();
    const reading = bench.disk.read(new Uint8Array(512));
    answerRead(await bench.takeOne());
    await reading;
    assert.equal(before.queues[0].submitted, 0);
    assert.equal(bench.disk.stats().queues[0].submitted, 1);
  });
});

describe("beside a real back-end", () => {
  for (const packed of [false, true]) {
    test(`a late answer of the storage is abandoned until it comes, ${packed ? "packed" : "split"}`, async (t) => {
      const storage = new SlowStorage();
      t.after(() => storage.release());
      const { backend } = backendFor(t, storage);
      await using disk = await openBlock(`vhost-user:${backend.path}`, { packed });
      const plain = new Uint8Array(512);
      const calling = assert.rejects(
        disk.read(plain, { timeout: 1 }),
        failure("ERR_VIRTIO_TIMEOUT", "stays lent to it until the device returns it"),
      );
      await until(() => storage.calls.length === 1);
      await calling;
      const [{ inFlight, abandoned, errors }] = disk.stats().queues;
      assert.deepEqual([inFlight, abandoned, errors], [1, 1, { ERR_VIRTIO_TIMEOUT: 1 }]);
      assert.equal(disk.stats().lentBytes, 4096);
      storage.finish("read");
      await until(() => disk.stats().queues[0].abandoned === 0);
      assert.equal(disk.stats().lentBytes, 0);
      const next = disk.read(plain, { timeout: 60_000 });
      await until(() => storage.calls.length === 1);
      storage.finish("read", new Error("worn out"));
      await assert.rejects(next, failure("ERR_VIRTIO_IO"));
      const { errors: all, queues } = disk.stats();
      assert.deepEqual(all, { ERR_VIRTIO_TIMEOUT: 1, ERR_VIRTIO_IO: 1 });
      assert.deepEqual([queues[0].submitted, queues[0].completed], [2, 2]);
      assert.ok(queues[0].kicks >= 1);
    });
  }

  test("an aborted write reaches the disk or not, and its memory comes back with its answer", async (t) => {
    const storage = new SlowStorage();
    t.after(() => storage.release());
    const { backend } = backendFor(t, storage);
    await using disk = await openBlock(`vhost-user:${backend.path}`);
    const buffer = await disk.allocate(512);
    const controller = new AbortController();
    const writing = assert.rejects(disk.write(buffer, { signal: controller.signal }), { name: "AbortError" });
    await until(() => storage.calls.length === 1);
    controller.abort();
    await writing;
    buffer.release();
    assert.equal(disk.stats().lentBytes, 4096);
    storage.finish("write");
    await until(() => disk.stats().lentBytes === 0);
    assert.equal(disk.pending, 0);
    await turn();
  });
});
