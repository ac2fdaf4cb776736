/** A block device whose back-end was replaced by another: what was in flight goes on, in order, once. */

import assert from "node:assert/strict";
import { describe, test, type TestContext } from "node:test";
import { BlockDevice, type ReconnectOutcome } from "../../../src/devices/blk/index.js";
import { BlkFeature, BlkRequestType, encodeBlkConfig } from "../../../src/protocol/blk.js";
import type { FakeBlkRequest } from "../../../src/testing/index.js";
import { VirtioFeature } from "../../../src/virtqueue/index.js";
import { ALL_REQUESTS, type Bench, failure, type FakeOptions, openFake, pattern, RINGS, turn } from "./support.js";

const { IN, OUT, FLUSH, DISCARD, WRITE_ZEROES, GET_ID } = BlkRequestType;

/** A config with everything that can be asked for. */
const CONFIG = {
  segMax: 4,
  discard: { maxSectors: 64, maxSegments: 1, alignment: 1 },
  writeZeroes: { maxSectors: 64, maxSegments: 1, mayUnmap: true },
  secureErase: { maxSectors: 64, maxSegments: 1, alignment: 1 },
} as const;

function openDisk(t: TestContext, options: FakeOptions = {}): Promise<Bench> {
  const features = (options.features ?? 0n) | ALL_REQUESTS | BlkFeature.SEG_MAX;
  return openFake(t, { ...options, features, config: { ...CONFIG, ...options.config } });
}

/** What a device is asked, for comparison. */
function wordsOf({ type, sector, data, room }: FakeBlkRequest): string {
  return `${type} @${sector} ${Buffer.from(data).toString("hex").slice(0, 64)} ${data.length} ${room}`;
}

/** Answer as a disk would whose sectors tell their numbers. */
function answer(request: FakeBlkRequest): void {
  if (request.type === GET_ID) request.answer({ data: new TextEncoder().encode("a disk".padEnd(20, "\0")) });
  else if (request.type === IN) request.answer({ data: pattern(request.room, request.sector) });
  else request.answer();
}

/** The outcomes of all reconnects. */
function outcomesOf({ disk }: Bench): ReconnectOutcome[] {
  const outcomes: ReconnectOutcome[] = [];
  disk.on("reconnect", (outcome) => outcomes.push(outcome));
  return outcomes;
}

/** One call of each kind; what they are to resolve to. */
async function callAll({ disk }: Bench): Promise<{ calls: Promise<unknown>[]; results: unknown[] }> {
  const lent = await Promise.all([disk.allocate(512), disk.allocate(1024), disk.allocate(512), disk.allocate(512)]);
  lent.forEach(({ bytes }, i) => bytes.set(pattern(bytes.length, 50 + i)));
  const into = new Uint8Array(1024);
  const calls: Promise<unknown>[] = [
    disk.read(lent[0], { position: 512 }).then(() => lent[0].bytes.slice()),
    disk.write(lent[1], { position: 1024 }).then(({ bytesWritten }) => bytesWritten),
    disk.write(pattern(1536, 60), { position: 4096 }).then(({ bytesWritten }) => bytesWritten),
    disk.read(into, { position: 8192 }).then(() => into),
    disk.writev([lent[2], lent[3]], { position: 16384 }).then(({ bytesWritten }) => bytesWritten),
    disk.flush(),
    disk.discard({ position: 0, length: 512 }),
    disk.writeZeroes({ position: 512, length: 512 }),
    disk.getId(),
  ];
  const results = [pattern(512, 1), 1024, 1536, pattern(1024, 16), 1024, undefined, undefined, undefined, "a disk"];
  return { calls, results };
}
const TYPES = [IN, OUT, OUT, IN, OUT, FLUSH, DISCARD, WRITE_ZEROES, GET_ID];

describe("a device that knows nothing of what is in flight", () => {
  for (const [name, features] of Object.entries(RINGS)) {
    test(`${name}: every kind of request is submitted again, as it was and in its order, and completes once`, async (t) => {
      const bench = await openDisk(t, { features });
      const outcomes = outcomesOf(bench);
      const { calls, results } = await callAll(bench);
      const first = await bench.take();
      assert.deepEqual(
        first.map(({ type }) => type),
        TYPES,
      );
      bench.transport.disconnect();
      await bench.transport.comeBack();
      const again = await bench.take();
      assert.deepEqual(again.map(wordsOf), first.map(wordsOf));
      assert.deepEqual(outcomes, [{ attempts: 1, replayed: 9, tracked: false, unflushed: 0 }]);
      // In another order than submitted, where the ring allows that.
      for (const request of (features & VirtioFeature.IN_ORDER) === 0n ? again.toReversed() : again) answer(request);
      assert.deepEqual(await Promise.all(calls), results);
      assert.equal(bench.disk.pending, 0);
      const [{ submitted, completed, replayed, inFlight }] = bench.disk.stats().queues;
      assert.deepEqual(
        { submitted, completed, replayed, inFlight },
        { submitted: 9, completed: 9, replayed: 9, inFlight: 0 },
      );
    });

    test(`${name}: what the dead one completed counts, even if nobody was told, and is not submitted again`, async (t) => {
      const inOrder = (features & VirtioFeature.IN_ORDER) !== 0n;
      const bench = await openDisk(t, { features, open: { mode: "poll" } });
      const { calls, results } = await callAll(bench);
      const held = await bench.take();
      // A, B, C are there and B is done: whoever goes on from the used index alone repeats B and loses A.
      const done = held.filter((_, i) => (inOrder ? i < 3 : i % 3 === 1));
      done.forEach(answer);
      bench.transport.disconnect();
      await bench.transport.comeBack();
      const again = await bench.take();
      assert.deepEqual(again.map(wordsOf), held.filter((request) => !done.includes(request)).map(wordsOf));
      again.forEach(answer);
      bench.disk.poll();
      assert.deepEqual(await Promise.all(calls), results);
    });
  }

  test("requests made while it is away are sent when it is back, behind those before, more than the ring holds", async (t) => {
    const bench = await openDisk(t, { open: { queueSize: 8 } });
    const before = [bench.disk.write(pattern(512), { position: 0 })];
    await bench.take();
    bench.transport.disconnect();
    const during = Array.from({ length: 40 }, (_, i) => bench.disk.write(pattern(512), { position: 512 * (i + 1) }));
    await turn();
    await bench.transport.comeBack();
    const sectors: number[] = [];
    for (let requests = await bench.take(); requests.length > 0; requests = await bench.take()) {
      for (const request of requests) {
        sectors.push(request.sector);
        request.answer();
      }
    }
    await Promise.all([...before, ...during]);
    assert.deepEqual(
      sectors,
      Array.from({ length: 41 }, (_, i) => i),
    );
  });

  for (const name of ["split with everything", "packed with everything"] as const) {
    test(`${name}: a ring that tables have filled to the last descriptor fits again`, async (t) => {
      const bench = await openDisk(t, { features: RINGS[name], open: { queueSize: 16 } });
      const write = (position: number) => bench.disk.write(pattern(512), { position: position * 512 });
      // The first ones lie in the ring itself; they complete, so that the ring fills with one descriptor each.
      const calls = Array.from({ length: 16 }, (_, i) => write(i));
      const done = await bench.take();
      for (const request of done) request.answer();
      await turn();
      calls.push(...Array.from({ length: 16 }, (_, i) => write(100 + i)));
      await turn();
      const full = await bench.take();
      bench.transport.disconnect();
      await bench.transport.comeBack();
      const again = await bench.take();
      assert.deepEqual(again.map(wordsOf), full.map(wordsOf));
      while (bench.disk.pending > 0) {
        for (const request of [...again.splice(0), ...(await bench.take())]) request.answer();
        await turn();
      }
      await Promise.all(calls);
    });
  }

  test("one that leaves again before its queues run, twice: still each request once, in order", async (t) => {
    for (const features of Object.values(RINGS)) {
      const bench = await openDisk(t, { features });
      const { calls, results } = await callAll(bench);
      const first = await bench.take();
      bench.transport.disconnect();
      await bench.transport.comeBack({ leaves: true });
      await bench.transport.comeBack({ leaves: true });
      await bench.transport.comeBack();
      const again = await bench.take();
      assert.deepEqual(again.map(wordsOf), first.map(wordsOf));
      again.forEach(answer);
      assert.deepEqual(await Promise.all(calls), results);
    }
  });

  test("what was submitted again stays before what came later, when the next one leaves too", async (t) => {
    const bench = await openDisk(t);
    const write = (sector: number) => bench.disk.write(pattern(512), { position: sector * 512 });
    const calls = [0, 1, 2].map(write);
    for (const more of [[3, 4], [5, 6, 7], []]) {
      bench.transport.disconnect();
      await bench.transport.comeBack();
      calls.push(...more.map(write));
    }
    const requests = await bench.take();
    assert.deepEqual(
      requests.map(({ sector }) => sector),
      [0, 1, 2, 3, 4, 5, 6, 7],
    );
    for (const request of requests) request.answer();
    await Promise.all(calls);
    const [{ submitted, completed, replayed }] = bench.disk.stats().queues;
    assert.deepEqual({ submitted, completed, replayed }, { submitted: 8, completed: 8, replayed: 3 + 5 + 8 });
  });

  test("what an aborted call had in flight ends there, and its memory comes back", async (t) => {
    const bench = await openDisk(t);
    const end = new AbortController();
    const aborted = bench.disk.write(pattern(512, 3), { position: 512, signal: end.signal });
    const kept = bench.disk.write(pattern(512, 4), { position: 1024 });
    await bench.take();
    end.abort(new Error("too late"));
    await assert.rejects(aborted, /too late/);
    assert.equal(bench.disk.stats().queues[0].abandoned, 1);
    assert.equal(bench.disk.stats().lentBytes, 8192);
    bench.transport.disconnect();
    await bench.transport.comeBack();
    const again = await bench.take();
    assert.deepEqual(
      again.map(({ sector }) => sector),
      [2],
    );
    const { queues, lentBytes } = bench.disk.stats();
    assert.deepEqual([queues[0].abandoned, queues[0].inFlight, lentBytes], [0, 1, 4096]);
    again.forEach(answer);
    await kept;
    assert.equal(bench.disk.stats().lentBytes, 0);
  });

  test("a queue that was taken: its owner hears where its requests went, and each completes once", async (t) => {
    for (const features of [RINGS.split, RINGS["packed in order"]]) {
      const bench = await openDisk(t, { features, open: { mode: "poll" } });
      const queue = bench.disk.takeQueue();
      const buffer = await bench.disk.allocate(16 * 512);
      const sectorOf = new Map<number, number>();
      const done: number[] = [];
      queue.onComplete = (slot, status) => {
        assert.equal(status, 0);
        done.push(sectorOf.get(slot) ?? assert.fail(`nothing is in slot ${slot}`));
        sectorOf.delete(slot);
      };
      queue.onReplay = (moves) => {
        const before = new Map(sectorOf);
        sectorOf.clear();
        for (const [slot, sector] of before) sectorOf.set(moves[slot], sector);
      };
      const submit = (sector: number) =>
        sectorOf.set(queue.submitRead(sector, buffer, (sector % 16) * 512, 512), sector);
      for (let sector = 0; sector < 5; sector++) submit(sector);
      queue.kick();
      const held = await bench.take();
      for (const request of held.slice(0, 2)) answer(request);
      bench.disk.poll();
      queue.poll();
      for (let sector = 5; sector < 9; sector++) submit(sector); // not even published
      bench.transport.disconnect();
      await bench.transport.comeBack();
      const again = await bench.take();
      assert.deepEqual(
        again.map(({ sector }) => sector),
        [2, 3, 4, 5, 6, 7, 8],
      );
      again.forEach(answer);
      queue.poll();
      assert.deepEqual(done, [0, 1, 2, 3, 4, 5, 6, 7, 8]);
      assert.equal(queue.inFlight, 0);
      buffer.release();
    }
  });

  test("a driver that polls asks it to be silent, too", async (t) => {
    for (const features of [RINGS.split, RINGS.packed]) {
      const bench = await openDisk(t, { features, open: { mode: "poll" } });
      const call = bench.disk.write(pattern(512));
      await bench.take();
      bench.transport.disconnect();
      await bench.transport.comeBack();
      const [{ raw }] = await bench.take();
      raw.write(Uint8Array.of(0), 0);
      bench.queue.device.complete(raw);
      assert.equal(bench.queue.device.publish(), false, "no notification is wanted");
      bench.disk.poll();
      await call;
    }
  });

  test("impossible things that the dead one left in the ring end the device", async (t) => {
    const bench = await openDisk(t, { features: RINGS.split, open: { mode: "poll" } });
    const call = bench.disk.write(pattern(512), { position: 0 });
    const [request] = await bench.take();
    bench.queue.device.forge(7, 1);
    bench.queue.publish();
    bench.transport.disconnect();
    await assert.rejects(bench.transport.comeBack(), failure("ERR_VIRTIO_QUEUE_BROKEN"));
    await assert.rejects(call, failure("ERR_VIRTIO_DISCONNECTED"));
    assert.equal(request.sector, 0);
  });
});

describe("a device that knows what is in flight", () => {
  for (const [name, features] of Object.entries(RINGS)) {
    test(`${name}: the ring stays as it is; nothing is submitted twice`, async (t) => {
      const bench = await openDisk(t, { features });
      const outcomes = outcomesOf(bench);
      const { calls, results } = await callAll(bench);
      const held = await bench.take();
      bench.transport.disconnect();
      const during = bench.disk.write(pattern(512), { position: 0 });
      await turn();
      await bench.transport.comeBack({ tracked: true });
      const later = await bench.take();
      assert.deepEqual(
        later.map(({ type, sector }) => [type, sector]),
        [[OUT, 0]],
      );
      [...held, ...later].forEach(answer);
      assert.deepEqual(await Promise.all(calls), results);
      await during;
      assert.deepEqual(outcomes, [{ attempts: 1, replayed: 10, tracked: true, unflushed: 0 }]);
    });
  }
});

describe("flush and the death of a device", () => {
  test("changes that completed and that no flush covers are told, others are not", async (t) => {
    const bench = await openDisk(t);
    const outcomes = outcomesOf(bench);
    const { disk } = bench;
    const write = async (sector: number) => {
      const call = bench.disk.write(pattern(512), { position: sector * 512 });
      (await bench.takeOne()).answer();
      await call;
    };
    await write(1);
    await write(2);
    const flushed = bench.disk.flush();
    const flush = await bench.takeOne();
    await write(3); // completes before the flush does, which covers what had completed when it was submitted
    flush.answer();
    await flushed;
    bench.transport.disconnect();
    await bench.transport.comeBack();
    assert.equal(outcomes[0].unflushed, 1);
    const last = bench.disk.flush();
    (await bench.takeOne()).answer();
    await last;
    bench.transport.disconnect();
    await bench.transport.comeBack();
    assert.equal(outcomes[1].unflushed, 0);
    const range = { position: 0, length: 512 };
    const calls = [
      ...[disk.writev([pattern(512), pattern(512)]), disk.discard(range), disk.writeZeroes(range)],
      ...[disk.secureErase(range), disk.read(pattern(512)), disk.getId()],
    ];
    (await bench.take()).forEach(answer);
    await Promise.all(calls);
    bench.transport.disconnect();
    await bench.transport.comeBack();
    assert.equal(outcomes[2].unflushed, 4);
  });

  test("a flush in flight is sent to the new device, behind the writes before it, and resolves only then", async (t) => {
    const bench = await openDisk(t);
    let isFlushed = false;
    const write = bench.disk.write(pattern(512), { position: 512 });
    const flush = (async () => {
      await bench.disk.flush();
      isFlushed = true;
    })();
    await bench.take();
    bench.transport.disconnect();
    await bench.transport.comeBack();
    const again = await bench.take();
    assert.deepEqual(
      again.map(({ type }) => type),
      [OUT, FLUSH],
    );
    again[0].answer();
    await write;
    await turn();
    assert.equal(isFlushed, false);
    again[1].answer();
    await flush;
  });

  test("where every completed write is stable nothing is unflushed: without FLUSH, or with the cache off", async (t) => {
    for (const options of [
      { features: 0n, config: {} },
      { features: BlkFeature.FLUSH | BlkFeature.CONFIG_WCE, config: { writeback: false } },
    ]) {
      const bench = await openFake(t, options);
      const outcomes = outcomesOf(bench);
      const call = bench.disk.write(pattern(512), { position: 0 });
      (await bench.takeOne()).answer();
      await call;
      bench.transport.disconnect();
      await bench.transport.comeBack();
      assert.equal(outcomes[0].unflushed, 0);
    }
  });
});

describe("what came back", () => {
  test("a disk of another size: `config` and `resize`, before `reconnect`", async (t) => {
    const bench = await openDisk(t);
    const events: unknown[] = [];
    bench.disk.on("resize", (...sizes) => events.push(sizes));
    bench.disk.on("reconnect", () => events.push("reconnect"));
    bench.transport.disconnect();
    bench.transport.config.set(encodeBlkConfig({ capacity: 1024n }).subarray(0, 8));
    await bench.transport.comeBack();
    assert.deepEqual(events, [[1024 * 512, 2048 * 512], "reconnect"]);
    await assert.rejects(bench.disk.read(new Uint8Array(512), { position: 1024 * 512 }), RangeError);
  });

  test("the cache mode that was chosen is chosen again", async (t) => {
    const bench = await openFake(t, {
      features: BlkFeature.FLUSH | BlkFeature.CONFIG_WCE,
      config: { writeback: true },
    });
    assert.equal(await bench.disk.setWriteback(false), false);
    bench.transport.disconnect();
    bench.transport.config[32] = 1; // a new process begins with its default
    await bench.transport.comeBack();
    assert.equal(bench.transport.config[32], 0);
    assert.equal(bench.disk.config.writeback, false);
  });

  for (const [what, config] of Object.entries({
    "smaller requests": { segMax: 2 },
    "another block size": { segMax: 4, blkSize: 4096 },
  })) {
    test(`${what}: the device is lost, nothing is sent`, async (t) => {
      const features = BlkFeature.SEG_MAX | BlkFeature.BLK_SIZE;
      const bench = await openFake(t, { features, config: { segMax: 4, blkSize: 512 } });
      const lost: Error[] = [];
      bench.disk.on("lost", (error) => lost.push(error));
      const call = bench.disk.write(pattern(512), { position: 0 });
      await bench.take();
      bench.transport.disconnect();
      bench.transport.config.set(encodeBlkConfig({ capacity: 2048n, blkSize: 512, ...config }));
      await assert.rejects(bench.transport.comeBack(), failure("ERR_VIRTIO_CONFIG", "another disk"));
      await assert.rejects(call, failure("ERR_VIRTIO_DISCONNECTED"));
      assert.equal(lost.length, 1);
    });
  }

  test("fewer queues than are in use: the device is lost", async (t) => {
    const bench = await openFake(t, {
      ...{ features: BlkFeature.MQ, config: { numQueues: 2 }, maxQueues: 2, open: { queues: 2 } },
    });
    bench.transport.disconnect();
    bench.transport.config.set(encodeBlkConfig({ capacity: 2048n, numQueues: 1 }));
    await assert.rejects(bench.transport.comeBack(), failure("ERR_VIRTIO_CONFIG", "fewer queues"));
  });
});

describe("the policy", () => {
  test("fail: every call rejects at once, pending and later ones, in every mode", async (t) => {
    for (const mode of ["hybrid", "event", "poll"] as const) {
      const bench = await openDisk(t, { open: { mode, reconnect: false } });
      const lost: Error[] = [];
      bench.disk.on("lost", (error) => lost.push(error));
      const calls = [bench.disk.write(pattern(512)), bench.disk.flush(), bench.disk.read(new Uint8Array(512))];
      await bench.take();
      bench.transport.disconnect();
      for (const call of calls) await assert.rejects(call, failure("ERR_VIRTIO_DISCONNECTED"));
      await assert.rejects(bench.disk.flush(), failure("ERR_VIRTIO_DISCONNECTED"));
      assert.equal(lost.length, 1);
    }
  });

  test("reconnect where that cannot be is refused", async () => {
    const { transport } = await openUnconnectable();
    await assert.rejects(
      BlockDevice.open(transport, { reconnect: true }),
      failure("ERR_VIRTIO_UNSUPPORTED", "cannot be reached again"),
    );
  });

  test("a device with queues in other threads does not wait for another", async (t) => {
    const bench = await openDisk(t, {
      features: BlkFeature.MQ,
      config: { numQueues: 2 },
      maxQueues: 2,
      open: { queues: 2 },
    });
    const port = await bench.disk.handOver({ queues: 1, memory: 4096 });
    const call = bench.disk.write(pattern(512));
    await bench.take();
    bench.transport.disconnect();
    await assert.rejects(call, failure("ERR_VIRTIO_DISCONNECTED"));
    port.close();
  });

  test("closing a device that is away: what is pending has its five seconds, or less, then rejects", async (t) => {
    const bench = await openDisk(t);
    const call = bench.disk.write(pattern(512));
    await bench.take();
    bench.transport.disconnect();
    const closed = bench.disk.close({ timeout: 1 });
    await assert.rejects(call, failure("ERR_VIRTIO_CLOSED"));
    await closed;
    assert.equal(bench.transport.regionsClosed, bench.transport.regionsMapped);
  });
});

/** A transport that cannot reach its device again. */
async function openUnconnectable() {
  const { FakeTransport } = await import("../../../src/testing/index.js");
  class Unconnectable extends FakeTransport {
    override readonly reconnects = false as true;
  }
  return { transport: new Unconnectable({ config: encodeBlkConfig({ capacity: 8n }) }) };
}
