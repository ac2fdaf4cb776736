/** Requests in flight that want the same bytes of one lent buffer: only to be read by the device, or refused. */

import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { describe, test } from "node:test";
import { openBlock } from "../../../src/address.js";
import { BlkFeature, BlkRequestType } from "../../../src/protocol/blk.js";
import { takeBlk } from "../../../src/testing/index.js";
import { type Bench, failure, openFake, pattern, RINGS, turn } from "./support.js";

const busy = failure("ERR_VIRTIO_BUSY");

/** Answer everything that the driver has submitted or will as long as it goes on. */
async function serveAll(bench: Bench): Promise<void> {
  for (let requests = await bench.take(); requests.length > 0; requests = await bench.take()) {
    for (const request of requests) request.answer({ data: pattern(request.room, request.sector) });
  }
}

describe("on a real back-end", () => {
  for (const packed of [false, true]) {
    const format = packed ? "packed" : "split";

    test(`${format}: a call on bytes that another has is refused, and both are told; afterwards it is taken`, async () => {
      await using disk = await openBlock("ram:1M", { packed });
      const buffer = await disk.allocate(8192);
      const data = randomBytes(8192);
      buffer.bytes.set(data);
      // All in one turn: nothing completes in between, however fast the device is.
      const writing = disk.write(buffer, { length: 4096 });
      const refused = assert.rejects(
        disk.read(buffer, { position: 8192, offset: 512, length: 1024 }),
        failure(
          "ERR_VIRTIO_BUSY",
          /^bytes 512 to 1535 .* to write: .* read bytes 0 to 4095; await that one first, or allocate another buffer$/,
        ),
      );
      const reading = disk.read(buffer, { position: 16384, offset: 4096, length: 4096 });
      const more = [disk.write(buffer, { offset: 7680, length: 512 }), disk.write(buffer)];
      assert.equal(disk.pending, 2);
      await refused;
      for (const call of more) await assert.rejects(call, busy);
      await Promise.all([writing, reading]);
      assert.deepEqual(buffer.bytes.subarray(4096), new Uint8Array(4096));
      await disk.read(buffer);
      assert.deepEqual(Buffer.from(buffer.bytes.subarray(0, 4096)), data.subarray(0, 4096));
    });

    test(`${format}: 128 requests on disjoint parts of one buffer, again and again`, async () => {
      await using disk = await openBlock("ram:1M", { packed, queueSize: 256 });
      const PARTS = 128;
      const data = randomBytes(1 << 20);
      await disk.write(data);
      const buffer = await disk.allocate(PARTS * 512);
      let done = 0;
      const loop = async (part: number): Promise<void> => {
        for (let round = 0; round < 16; round++) {
          const place = { position: ((part * 16 + round * 77) % 2048) * 512, offset: part * 512, length: 512 };
          await disk.read(buffer, place);
          const got = Buffer.from(buffer.bytes.subarray(place.offset, place.offset + 512));
          assert.deepEqual(got, data.subarray(place.position, place.position + 512));
          done++;
        }
      };
      await Promise.all(Array.from({ length: PARTS }, (_, part) => loop(part)));
      assert.equal(done, PARTS * 16);
    });

    test(`${format}: many writes of the same data are harmless, and keep the device from writing over them`, async () => {
      await using disk = await openBlock("ram:1M", { packed });
      const buffer = await disk.allocate(4096);
      const data = randomBytes(4096);
      buffer.bytes.set(data);
      const writes = Array.from({ length: 64 }, (_, i) =>
        disk.write(buffer, { position: i * 4096, offset: (i % 3) * 512, length: 4096 - (i % 3) * 512 }),
      );
      const refused = assert.rejects(disk.read(buffer, { offset: 2048, length: 512 }), busy);
      await Promise.all([...writes, refused]);
      for (let i = 0; i < 64; i++) {
        const start = (i % 3) * 512;
        const { buffer: got } = await disk.read(new Uint8Array(4096 - start), { position: i * 4096 });
        assert.deepEqual(Buffer.from(got), data.subarray(start));
      }
      await disk.read(buffer);
    });

    test(`${format}: across queues, taken ones among them`, async () => {
      await using disk = await openBlock("ram:1M", { packed, queues: 3, mode: "event" });
      const queue = disk.takeQueue();
      queue.mode = "poll";
      const buffer = await disk.allocate(4096);
      assert.ok(queue.submitRead(0, buffer, 0, 512) >= 0);
      await assert.rejects(disk.read(buffer), busy);
      await assert.rejects(disk.readv([await disk.allocate(512), buffer]), busy);
      const reading = disk.read(buffer, { offset: 512, length: 512 });
      assert.throws(() => queue.submitRead(0, buffer, 512, 512), busy);
      const other = disk.write(buffer, { offset: 512, length: 3584 });
      await assert.rejects(other, busy, "by the other queue");
      await reading;
      queue.kick();
      while (queue.inFlight > 0) queue.poll();
      await disk.read(buffer);
    });
  }

  test("pieces of one read that overlap are refused, those of a write are not", async () => {
    await using disk = await openBlock("ram:1M");
    const [one, other] = [await disk.allocate(512), await disk.allocate(512)];
    one.bytes.fill(1);
    other.bytes.fill(2);
    await assert.rejects(disk.readv([one, other, one]), busy);
    await assert.rejects(disk.readv([one, new Uint8Array(512), one]), busy);
    assert.equal(disk.pending, 0);
    await disk.writev([one, other, one]);
    await disk.writev([one, new Uint8Array(512).fill(3), one], { position: 1536 });
    await disk.readv([one, other]);
    const { buffer } = await disk.read(new Uint8Array(3072));
    assert.deepEqual(
      [0, 512, 1024, 1536, 2048, 2560].map((at) => buffer[at]),
      [1, 2, 1, 1, 3, 1],
    );
  });
});

describe("calls", () => {
  test("a refused call reaches the device in no part, nor takes memory, also when a later piece is refused", async (t) => {
    const bench = await openFake(t);
    const { disk } = bench;
    const [free, also, taken] = await Promise.all([1, 2, 3].map(() => disk.allocate(512)));
    const reading = disk.read(taken);
    const request = await bench.takeOne();
    await assert.rejects(disk.readv([free, also, taken]), busy);
    await assert.rejects(disk.readv([free, new Uint8Array(512), taken]), busy);
    assert.deepEqual(await bench.take(), []);
    const reads = [disk.read(free), disk.read(also)];
    request.answer({ data: pattern(512) });
    await serveAll(bench);
    await Promise.all([reading, ...reads]);
    free.release();
    assert.equal((await disk.allocate(512)).iovaLo, free.iovaLo, "nobody holds it any more");
  });

  test("what waits for room has its memory, and so has all of a call that is cut into requests", async (t) => {
    const bench = await openFake(t, {
      features: BlkFeature.SIZE_MAX,
      config: { sizeMax: 512 },
      open: { queueSize: 4 },
    });
    const { disk } = bench;
    const buffer = await disk.allocate(8192);
    const cut = disk.read(buffer, { length: 4096 });
    const waits = disk.read(buffer, { offset: 4096, length: 512 });
    for (const offset of [0, 3584, 4096]) await assert.rejects(disk.read(buffer, { offset, length: 512 }), busy);
    const free = disk.read(buffer, { offset: 4608, length: 512 });
    await serveAll(bench);
    await Promise.all([cut, waits, free]);
    const again = disk.read(buffer);
    await serveAll(bench);
    await again;
  });

  test("an aborted call keeps its bytes until the device has returned the last request", async (t) => {
    const bench = await openFake(t, {
      features: BlkFeature.SEG_MAX | BlkFeature.SIZE_MAX,
      config: { sizeMax: 512, segMax: 1 },
      open: { queueSize: 8 },
    });
    const { disk } = bench;
    for (const memory of ["lent", "copied"] as const) {
      const buffer = await disk.allocate(4096);
      const controller = new AbortController();
      const { signal } = controller;
      const call =
        memory === "lent" ? disk.read(buffer, { signal }) : disk.readv([buffer, new Uint8Array(512)], { signal });
      const ended = assert.rejects(call, (error) => error === signal.reason);
      const requests = await bench.take();
      assert.ok(requests.length >= 2);
      controller.abort();
      await ended;
      for (const request of requests) {
        await assert.rejects(disk.write(buffer, { offset: 3584, length: 512 }), busy, memory);
        request.answer({ data: pattern(512) });
        await turn();
      }
      const writing = disk.write(buffer, { offset: 3584, length: 512 });
      await serveAll(bench);
      await writing;
    }
  });

  test("a call that failed has given its bytes back", async (t) => {
    const bench = await openFake(t);
    const buffer = await bench.disk.allocate(512);
    for (const call of [() => bench.disk.read(buffer), () => bench.disk.readv([buffer])]) {
      const failed = assert.rejects(call(), failure("ERR_VIRTIO_IO"));
      (await bench.takeOne()).answer({ status: 1 });
      await failed;
    }
    const reading = bench.disk.read(buffer);
    await serveAll(bench);
    await reading;
  });
});

for (const [name, features] of Object.entries(RINGS)) {
  test(`a queue by hand, ${name}: what is refused leaves no trace in the ring`, async (t) => {
    const bench = await openFake(t, {
      features: features | BlkFeature.SEG_MAX,
      config: { segMax: 4 },
      open: { mode: "poll", queueSize: 16 },
    });
    const queue = bench.disk.takeQueue();
    const [first, second] = [await bench.disk.allocate(4096), await bench.disk.allocate(4096)];
    const piece = (buffer: typeof first, offset: number, length = 512) => ({ buffer, offset, length });
    assert.ok(queue.submitRead(0, first, 0, 512) >= 0);
    assert.throws(() => queue.submitRead(0, first, 511, 512), busy);
    assert.throws(() => queue.submitWrite(0, first, 0, 4096), busy);
    const third = [piece(second, 0), piece(first, 512), piece(first, 0)];
    assert.throws(() => queue.submitChain(BlkRequestType.IN, 0, third, true), busy);
    assert.throws(() => queue.submitChain(BlkRequestType.OUT, 0, third, false), busy);
    const same = [piece(second, 0), piece(second, 256)];
    assert.throws(() => queue.submitChain(BlkRequestType.IN, 0, same, true), busy);
    assert.equal(queue.inFlight, 1);
    const pieces = [piece(second, 0), piece(first, 512), piece(second, 1024)];
    assert.ok(queue.submitChain(BlkRequestType.IN, 0, pieces, true) >= 0, "the refused ones have given back");
    pieces.pop(); // whose it is from now on does not matter
    assert.throws(() => queue.submitWrite(0, second, 1024, 512), busy);
    assert.ok(queue.submitChain(BlkRequestType.OUT, 0, [piece(second, 2048), piece(second, 2048)], false) >= 0);
    assert.equal(queue.submitFlush() >= 0, true);
    queue.kick();
    const requests = takeBlk(bench.queue);
    assert.deepEqual(
      requests.map(({ type, room, data }) => [type, room, data.length]),
      [
        [BlkRequestType.IN, 512, 0],
        [BlkRequestType.IN, 1536, 0],
        [BlkRequestType.OUT, 0, 1024],
        [BlkRequestType.FLUSH, 0, 0],
      ],
    );
    for (const request of requests) request.answer({ data: pattern(request.room) });
    queue.onComplete = () => {
      queue.onComplete = () => {};
      assert.ok(queue.submitRead(0, first, 0, 512) >= 0, "its own bytes are free by then");
    };
    assert.equal(queue.poll(4), 4);
    for (const buffer of [first, second]) buffer.release();
    const other = await bench.disk.allocate(4096);
    assert.equal(other.iovaLo, second.iovaLo, "all of the second is back; the first has been lent again");
    queue.kick();
    for (const request of takeBlk(bench.queue)) request.answer({ data: pattern(512) });
    assert.equal(queue.poll(), 1);
    assert.equal((await bench.disk.allocate(4096)).iovaLo, first.iovaLo);
  });

  test(`a queue by hand, ${name}: what the caller has lent himself stays lent until he says so`, async (t) => {
    const bench = await openFake(t, { features, open: { mode: "poll", queueSize: 4 } });
    const queue = bench.disk.takeQueue();
    const buffer = await bench.disk.allocate(512);
    const pieces = [{ buffer, offset: 0, length: 512 }];
    const serve = (): void => {
      queue.kick();
      for (const request of takeBlk(bench.queue)) request.answer({ data: pattern(request.room) });
      assert.equal(queue.poll(), 1);
    };
    for (let i = 0; i < 5; i++) {
      assert.ok(queue.submitChain(BlkRequestType.IN, 0, pieces, true) >= 0);
      serve();
      buffer.lend(0, 512, true);
      assert.throws(() => queue.submitChain(BlkRequestType.IN, 0, pieces, true), busy);
      assert.ok(queue.submitLent(BlkRequestType.IN, 0, pieces, true) >= 0);
      serve();
      assert.throws(() => queue.submitRead(0, buffer, 0, 512), busy);
      buffer.giveBack(0, 512);
    }
  });
}
