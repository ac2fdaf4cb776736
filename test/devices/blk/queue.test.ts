/** VirtioBlkQueue, the allocation-free way: what it takes, what it refuses, and how it is listened to. */

import assert from "node:assert/strict";
import { once } from "node:events";
import { describe, test } from "node:test";
import { type DataSegment, VirtioBlkQueue } from "../../../src/devices/blk/index.js";
import { VirtioError } from "../../../src/errors.js";
import type { DeviceBuffer } from "../../../src/memory/index.js";
import { BlkFeature, BlkRequestType } from "../../../src/protocol/blk.js";
import { type FakeBlkRequest, takeBlk } from "../../../src/testing/index.js";
import { VirtioFeature } from "../../../src/virtqueue/index.js";
import { type Bench, failure, type FakeOptions, openFake, pattern, refused, RINGS, turn } from "./support.js";

interface Done {
  readonly slot: number;
  readonly status: number;
  readonly written: number;
}

async function openQueue(
  t: Parameters<typeof openFake>[0],
  options: FakeOptions = {},
): Promise<{ bench: Bench; queue: VirtioBlkQueue; done: Done[]; take: () => FakeBlkRequest[] }> {
  const bench = await openFake(t, { ...options, open: { mode: "poll", ...options.open } });
  const queue = bench.disk.takeQueue();
  const done: Done[] = [];
  queue.onComplete = (slot, status, written) => done.push({ slot, status, written });
  return { bench, queue, done, take: () => takeBlk(bench.queue) };
}

for (const [name, features] of Object.entries(RINGS)) {
  describe(`a queue by hand, ${name}`, () => {
    test("requests of all kinds in one kick; slots, status bytes and lengths come back", async (t) => {
      const { bench, queue, done, take } = await openQueue(t, { features: features | BlkFeature.FLUSH });
      const buffer = await bench.disk.allocate(8192);
      const slots = [
        queue.submitRead(3, buffer, 512, 1024),
        queue.submitWrite(5, buffer, 4096, 512),
        queue.submitFlush(),
        queue.submitChain(BlkRequestType.GET_ID, 0, [{ buffer, offset: 8000, length: 20 }], true),
      ];
      assert.equal(new Set(slots).size, 4);
      assert.equal(queue.inFlight, 4);
      assert.deepEqual(take(), [], "nothing is visible before the kick");
      queue.kick();
      assert.equal(bench.queue.notifications.length, 1);
      queue.kick();
      assert.equal(bench.queue.notifications.length, 1, "nothing new, no kick");
      const requests = take();
      assert.deepEqual(
        requests.map(({ type, sector, room, data }) => [type, sector, room, data.length]),
        [
          [0, 3, 1024, 0],
          [1, 5, 0, 512],
          [4, 0, 0, 0],
          [8, 0, 20, 0],
        ],
      );
      assert.deepEqual(
        slots.map((slot) => queue.requestType(slot)),
        [0, 1, 4, 8],
      );
      assert.equal(queue.hasCompleted(), false);
      requests[0].answer({ data: pattern(1024) });
      requests[1].answer({ status: 1 });
      requests[2].answer({ status: "unwritten" });
      requests[3].answer({ status: 7, data: pattern(20, 2) });
      assert.equal(queue.hasCompleted(), true);
      assert.equal(queue.poll(), 4);
      assert.deepEqual(done, [
        { slot: slots[0], status: 0, written: 1025 },
        { slot: slots[1], status: 1, written: 1 },
        { slot: slots[2], status: 255, written: 0 },
        { slot: slots[3], status: 7, written: 21 },
      ]);
      assert.deepEqual(buffer.bytes.slice(512, 1536), pattern(1024));
      assert.equal(queue.poll(), 0);
      assert.equal(queue.inFlight, 0);
    });

    test("a full ring answers -1, and takes more once some are reaped", async (t) => {
      const { bench, queue, done, take } = await openQueue(t, { features, open: { queueSize: 8 } });
      const buffer = await bench.disk.allocate(1024);
      const more = [{ buffer: await bench.disk.allocate(512), offset: 0, length: 512 }];
      const held: FakeBlkRequest[] = [];
      let submitted = 0;
      for (let round = 0; round < 20; round++) {
        while (queue.submitWrite(submitted % 2048, buffer, 0, 512) >= 0) submitted++;
        assert.equal(queue.submitChain(BlkRequestType.IN, 0, more, true), -1);
        assert.equal(queue.submitRead(0, buffer, 512, 512), -1);
        buffer.lend(512, 512, true); // what found no room has lent nothing
        buffer.giveBack(512, 512);
        queue.kick();
        held.push(...take());
        for (const request of held.splice(0, 1 + (round % 3))) request.answer();
        const before = done.length;
        assert.equal(queue.poll(1), 1, "poll(1) reaps one");
        queue.poll();
        assert.ok(done.length > before);
      }
      assert.equal(done.length, submitted - queue.inFlight);
      bench.transport.lose(new VirtioError("ERR_VIRTIO_DISCONNECTED", "the end"));
    });

    test("a callback may submit the next request", async (t) => {
      const { bench, queue, take } = await openQueue(t, { features, open: { queueSize: 4 } });
      const buffer = await bench.disk.allocate(512);
      const sectors: number[] = [];
      let next = 0;
      const submit = (): void => {
        if (next < 50) assert.ok(queue.submitRead(next++, buffer, 0, 512) >= 0);
      };
      queue.onComplete = submit;
      submit();
      for (let i = 0; i < 60; i++) {
        queue.kick();
        for (const request of take()) {
          sectors.push(request.sector);
          request.answer({ data: pattern(512) });
        }
        queue.poll();
      }
      assert.deepEqual(
        sectors,
        Array.from({ length: 50 }, (_, i) => i),
      );
    });

    test("BASIC-DRV-32 every address of a request lies in memory of the device, in its own slot", async (t) => {
      const { bench, queue, take } = await openQueue(t, { features, open: { queueSize: 64 } });
      const buffer = await bench.disk.allocate(65 * 512);
      // The fake device reads all headers through its memory map: sectors prove whose header it is.
      const sectors = new Map<number, number>();
      for (let sector = 0; ; sector++) {
        const slot = queue.submitRead(sector, buffer, sector * 512, 512);
        if (slot < 0) break;
        sectors.set(slot, sector);
      }
      queue.kick();
      const requests = take();
      assert.equal(requests.length, sectors.size);
      requests.forEach((request, i) => {
        assert.equal(request.sector, i);
      });
      for (const request of requests) request.answer({ data: pattern(512) });
      assert.equal(queue.poll(), requests.length);
    });
  });
}

describe("segments", () => {
  test("cut at size_max, over several buffers, in order", async (t) => {
    const { bench, queue, take } = await openQueue(t, {
      features: BlkFeature.SEG_MAX | BlkFeature.SIZE_MAX,
      config: { segMax: 6, sizeMax: 1024 },
    });
    const [first, second] = [await bench.disk.allocate(4096), await bench.disk.allocate(4096)];
    first.bytes.set(pattern(4096, 1));
    second.bytes.set(pattern(4096, 2));
    const segments = [
      { buffer: second, offset: 10, length: 2058 },
      { buffer: first, offset: 0, length: 1014 },
      { buffer: second, offset: 4095, length: 1 },
      { buffer: first, offset: 4000, length: 1 },
    ];
    assert.throws(() => queue.submitChain(BlkRequestType.OUT, 0, segments, false), refused("length"), "3074 bytes");
    segments.splice(2, 2, { buffer: first, offset: 100, length: 1024 });
    assert.ok(queue.submitChain(BlkRequestType.OUT, 0, segments, false) >= 0);
    queue.kick();
    const [request] = take();
    assert.deepEqual(request.raw.readableLengths, [16, 1024, 1024, 10, 1014, 1024]);
    const expected = [second.bytes.slice(10, 2068), first.bytes.slice(0, 1014), first.bytes.slice(100, 1124)];
    assert.deepEqual(request.data, Uint8Array.from(Buffer.concat(expected)));
    request.answer();
    queue.poll();
  });

  test("a long read on one buffer is cut as well", async (t) => {
    const { bench, queue, take } = await openQueue(t, {
      features: BlkFeature.SEG_MAX | BlkFeature.SIZE_MAX,
      config: { segMax: 4, sizeMax: 1024 },
    });
    const buffer = await bench.disk.allocate(8192);
    assert.ok(queue.submitRead(0, buffer, 100, 4096) >= 0);
    assert.throws(() => queue.submitRead(0, buffer, 100, 4608), refused("segments"));
    queue.kick();
    const [request] = take();
    assert.deepEqual(request.raw.writableLengths, [1024, 1024, 1024, 1024, 1]);
    request.answer({ data: pattern(4096) });
    queue.poll();
    assert.deepEqual(buffer.bytes.slice(100, 4196), pattern(4096));
  });

  test("an array of segments may be used again at once", async (t) => {
    const { bench, queue, done, take } = await openQueue(t, { features: BlkFeature.SEG_MAX, config: { segMax: 2 } });
    const buffers = [await bench.disk.allocate(512), await bench.disk.allocate(512), await bench.disk.allocate(512)];
    const segments: { buffer: DeviceBuffer; offset: number; length: number }[] = [];
    for (const buffer of buffers) {
      segments[0] = { buffer, offset: 0, length: 512 };
      assert.ok(queue.submitChain(BlkRequestType.IN, 0, segments, true) >= 0);
    }
    segments.length = 0;
    queue.kick();
    for (const buffer of buffers) buffer.release();
    for (const request of take()) request.answer({ data: pattern(512) });
    assert.equal(queue.poll(), 3);
    assert.equal(done.length, 3);
    const again = await bench.disk.allocate(512);
    assert.equal(again.iovaLo, buffers[0].iovaLo, "all were given back");
  });
});

describe("what a queue refuses", () => {
  const wrong: readonly [what: string, sector: number, offset: number, length: number, name: string][] = [
    ["an odd length", 0, 0, 511, "length"],
    ["no length", 0, 0, 0, "length"],
    ["a negative length", 0, 0, -512, "length"],
    ["a length that is no number", 0, 0, Number.NaN, "length"],
    ["a negative sector", -1, 0, 512, "sector"],
    ["a fractional sector", 0.5, 0, 512, "sector"],
    ["a sector behind the disk", 2048, 0, 512, "sector"],
    ["across the end of the disk", 2047, 0, 1024, "sector"],
    ["a sector near 2^53", 2 ** 53 - 1, 0, 512, "sector"],
    ["a sector of 2^64", 2 ** 64, 0, 512, "sector"],
    ["an offset behind the buffer", 0, 4097, 512, "offset"],
    ["across the end of the buffer", 0, 4000, 512, "length"],
    ["a negative offset", 0, -512, 512, "offset"],
    ["a fractional offset", 0, 0.5, 512, "offset"],
  ];
  for (const [what, sector, offset, length, name] of wrong) {
    test(`BLK-DRV-09 BLK-DRV-13 ${what}`, async (t) => {
      const { bench, queue, take } = await openQueue(t);
      const buffer = await bench.disk.allocate(4096);
      const check = refused(name);
      assert.throws(() => queue.submitRead(sector, buffer, offset, length), check);
      assert.throws(() => queue.submitWrite(sector, buffer, offset, length), check);
      queue.kick();
      assert.deepEqual(take(), []);
      assert.equal(queue.inFlight, 0);
      buffer.release();
      assert.equal((await bench.disk.allocate(4096)).iovaLo, buffer.iovaLo, "it was not retained");
    });
  }

  test("a released buffer, no segments, too many of them", async (t) => {
    const { bench, queue } = await openQueue(t, { features: BlkFeature.SEG_MAX, config: { segMax: 2 } });
    const buffer = await bench.disk.allocate(4096);
    const segment: DataSegment = { buffer, offset: 0, length: 512 };
    assert.throws(() => queue.submitChain(BlkRequestType.IN, 0, [], true), refused("length"));
    assert.throws(
      () => queue.submitChain(BlkRequestType.IN, 0, [segment, segment, segment], true),
      refused("segments"),
    );
    buffer.release();
    assert.throws(() => queue.submitRead(0, buffer, 0, 512), refused("buffer"));
    assert.throws(() => queue.submitChain(BlkRequestType.IN, 0, [segment], true), refused("buffer"));
    assert.equal(queue.inFlight, 0);
  });

  test("a disk of no size says so", async (t) => {
    const { bench, queue } = await openQueue(t, { config: { capacity: 0n } });
    const buffer = await bench.disk.allocate(512);
    assert.throws(() => queue.submitRead(0, buffer, 0, 512), /nothing: the disk has 0 sectors/);
  });

  test("a queue of less than three descriptors", () => {
    const memory = { buffer: new ArrayBuffer(4096), offset: 0, iova: 0x10000 };
    const limits = { maxSegments: 1, maxSegmentBytes: 4096, maxRequestBytes: 4096 };
    for (const queueSize of [0, 1, 2]) {
      const options = { index: 0, queueSize, features: VirtioFeature.RING_PACKED, limits, capacity: 8, memory };
      assert.throws(() => new VirtioBlkQueue(options), refused("queueSize"));
    }
  });
});

describe("a taken queue in mode event", () => {
  test("completions come by events; switching back and forth loses none", async (t) => {
    for (const features of Object.values(RINGS)) {
      const { bench, queue, take } = await openQueue(t, { features });
      const buffer = await bench.disk.allocate(512);
      for (const mode of ["event", "poll", "event", "event", "poll"] as const) {
        queue.mode = mode;
        assert.equal(queue.mode, mode);
        const slot = queue.submitRead(0, buffer, 0, 512);
        queue.kick();
        const completed = new Promise<number>((resolve) => {
          queue.onComplete = resolve;
        });
        for (const request of take()) request.answer({ data: pattern(512) });
        if (mode === "poll") {
          await turn();
          assert.equal(queue.inFlight, 1);
          queue.poll();
        }
        assert.equal(await completed, slot);
      }
    }
  });

  test("more completions than one turn takes: all come, and others get their turn between", async (t) => {
    const { bench, queue, take } = await openQueue(t, { open: { queueSize: 4, mode: "event" } });
    const buffer = await bench.disk.allocate(512);
    let left = 200;
    let turns = 0;
    let inTurn = 0;
    let most = 0;
    const finished = new Promise<void>((resolve) => {
      // The device answers at once, inside the callback: without a bound this would never leave one turn.
      queue.onComplete = () => {
        most = Math.max(most, ++inTurn);
        if (--left === 0) resolve();
        else step();
      };
    });
    const step = (): void => {
      queue.submitRead(0, buffer, 0, 512);
      queue.kick();
      for (const request of take()) request.answer({ data: pattern(512) });
    };
    const count = (): void => {
      turns++;
      inTurn = 0;
      if (left > 0) setImmediate(count);
    };
    setImmediate(count);
    step();
    await finished;
    assert.ok(most <= 32, `${most} completions in one turn of a queue of 4`);
    assert.ok(turns >= 5, `${turns} turns`);
  });

  test("a callback that throws is an uncaught exception, and what completed behind it still arrives", async (t) => {
    const { bench, queue, take } = await openQueue(t, { open: { mode: "event" } });
    const buffer = await bench.disk.allocate(3 * 512);
    const slots = [0, 1, 2].map((sector) => queue.submitRead(sector, buffer, sector * 512, 512));
    const seen: number[] = [];
    const wrong = new Error("a wrong callback");
    const all = new Promise<void>((resolve) => {
      queue.onComplete = (slot) => {
        seen.push(slot);
        if (seen.length === 1) throw wrong;
        if (seen.length === 3) resolve();
      };
    });
    // The runner listens for uncaught exceptions too, and takes them for a failure: not this one.
    const listeners = process.listeners("uncaughtException");
    process.removeAllListeners("uncaughtException");
    const uncaught = once(process, "uncaughtException");
    try {
      queue.kick();
      for (const request of take()) request.answer({ data: pattern(512) });
      const [error] = (await uncaught) as [Error];
      assert.equal(error, wrong);
      await all;
    } finally {
      for (const listener of listeners) process.on("uncaughtException", listener);
    }
    assert.deepEqual(seen, slots);
  });

  test("a queue that breaks tells its owner once, and every later call", async (t) => {
    for (const features of Object.values(RINGS)) {
      const { bench, queue, take } = await openQueue(t, { features, open: { mode: "event" } });
      const buffer = await bench.disk.allocate(512);
      queue.submitRead(0, buffer, 0, 512);
      queue.kick();
      take();
      const errors: Error[] = [];
      const broke = new Promise<void>((resolve) => {
        queue.onError = (error) => {
          errors.push(error);
          resolve();
        };
      });
      bench.queue.device.forge(0xfff0, 1);
      bench.queue.publish();
      bench.queue.interrupt();
      await broke;
      assert.ok(failure("ERR_VIRTIO_QUEUE_BROKEN")(errors[0]));
      const same = (error: unknown): boolean => error === errors[0];
      assert.throws(() => queue.poll(), same);
      assert.throws(() => queue.submitRead(0, buffer, 0, 512), same);
      assert.throws(() => queue.submitFlush(), same);
      assert.throws(() => queue.kick(), same);
      bench.queue.interrupt();
      await turn();
      await bench.disk.close();
      assert.equal(errors.length, 1);
    }
  });

  test("closing the device, or losing it, ends a queue that was taken", async (t) => {
    for (const lost of [false, true]) {
      const { bench, queue } = await openQueue(t, { open: { mode: "event" } });
      const buffer = await bench.disk.allocate(512);
      const errors: Error[] = [];
      queue.onError = (error) => errors.push(error);
      queue.submitRead(0, buffer, 0, 512);
      const error = new VirtioError("ERR_VIRTIO_DISCONNECTED", "gone");
      if (lost) bench.transport.lose(error);
      else await bench.disk.close();
      await turn();
      assert.equal(errors.length, 1);
      assert.equal((errors[0] as VirtioError).code, lost ? "ERR_VIRTIO_DISCONNECTED" : "ERR_VIRTIO_CLOSED");
      const same = (got: unknown): boolean => got === errors[0];
      assert.throws(() => queue.poll(), same);
      assert.throws(() => queue.kick(), same);
      assert.throws(() => queue.hasCompleted(), same);
      assert.throws(() => queue.submitRead(0, buffer, 0, 512), same);
      queue.mode = "event";
      queue.mode = "poll";
      queue.stop();
    }
  });
});
