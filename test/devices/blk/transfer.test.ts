/** Reads and writes: which are refused, how they are cut, and where their data come from and go to. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import type { Memory } from "../../../src/devices/blk/index.js";
import { VirtioError } from "../../../src/errors.js";
import type { DeviceBuffer } from "../../../src/memory/index.js";
import { type BlkConfig, BlkFeature } from "../../../src/protocol/blk.js";
import { takeBlk } from "../../../src/testing/index.js";
import { VirtioFeature } from "../../../src/virtqueue/index.js";
import { type Bench, CheckedDisk, type FakeOptions, openFake, pattern, refused, turn } from "./support.js";

const CAPACITY = 2048 * 512;

/** Open a disk that answers at once and checks every request; with the features that `config` is about. */
async function openChecked(
  t: Parameters<typeof openFake>[0],
  config: Partial<BlkConfig> = {},
  options: FakeOptions = {},
): Promise<{ bench: Bench; checked: CheckedDisk }> {
  let { features = 0n } = options;
  if (config.sizeMax !== undefined) features |= BlkFeature.SIZE_MAX;
  if (config.segMax !== undefined) features |= BlkFeature.SEG_MAX;
  if (config.blkSize !== undefined) features |= BlkFeature.BLK_SIZE;
  const checked = new CheckedDisk({ capacity: 2048n, ...config }, options.open?.queueSize ?? 256);
  const onNotify: FakeOptions["onNotify"] = (queue) => {
    for (const request of takeBlk(queue)) checked.serve(request);
  };
  const bench = await openFake(t, { onNotify, ...options, config, features });
  return { bench, checked };
}

describe("which transfers are refused", () => {
  const wrong: readonly [what: string, buffer: unknown, options: Record<string, unknown>, name: string][] = [
    ["BLK-DRV-13 length 511", new Uint8Array(511), {}, "length"],
    ["BLK-DRV-13 length 513", new Uint8Array(513), {}, "length"],
    ["length 0", new Uint8Array(0), {}, "length"],
    ["length 0 as option", new Uint8Array(512), { length: 0 }, "length"],
    ["an odd length as option", new Uint8Array(1024), { length: 700 }, "length"],
    ["a negative length", new Uint8Array(512), { length: -512 }, "length"],
    ["a length that is no number", new Uint8Array(512), { length: Number.NaN }, "length"],
    ["a length beyond the buffer", new Uint8Array(512), { length: 1024 }, "length"],
    ["a length that is a string", new Uint8Array(512), { length: "512" }, "length"],
    ["what is left of the buffer is odd", new Uint8Array(1024), { offset: 1 }, "length"],
    ["an offset beyond the buffer", new Uint8Array(512), { offset: 513 }, "offset"],
    ["a negative offset", new Uint8Array(512), { offset: -512, length: 512 }, "offset"],
    ["a fractional offset", new Uint8Array(1024), { offset: 0.5, length: 512 }, "offset"],
    ["an offset that is a string", new Uint8Array(1024), { offset: "0", length: 512 }, "offset"],
    ["a position within a sector", new Uint8Array(512), { position: 256 }, "position"],
    ["a negative position", new Uint8Array(512), { position: -512 }, "position"],
    ["a fractional position", new Uint8Array(512), { position: 0.5 }, "position"],
    ["a position that is a string", new Uint8Array(512), { position: "0" }, "position"],
    ["a position that is a bigint", new Uint8Array(512), { position: 0n }, "position"],
    ["BLK-DRV-09 one sector beyond the end", new Uint8Array(512), { position: CAPACITY }, "position"],
    ["BLK-DRV-09 across the end", new Uint8Array(1024), { position: CAPACITY - 512 }, "position"],
    ["BLK-DRV-09 more than the disk", new Uint8Array(CAPACITY + 512), {}, "position"],
    ["BLK-DRV-09 at 2^53 - 512", new Uint8Array(512), { position: 2 ** 53 - 512 }, "position"],
    ["BLK-DRV-09 at 2^53", new Uint8Array(512), { position: 2 ** 53 }, "position"],
    ["BLK-DRV-09 at 2^64 - 512", new Uint8Array(512), { position: 2 ** 64 - 512 }, "position"],
    ["BLK-DRV-09 at infinity", new Uint8Array(512), { position: Number.POSITIVE_INFINITY }, "position"],
    ["no buffer", undefined, {}, "buffer"],
    ["null", null, {}, "buffer"],
    ["an ArrayBuffer", new ArrayBuffer(512), {}, "buffer"],
    ["a string", "x".repeat(512), {}, "buffer"],
    ["an array", Array.from({ length: 512 }, () => 0), {}, "buffer"],
    ["a misspelled option", new Uint8Array(512), { Position: 4096 }, "options"],
    ["an option of another library", new Uint8Array(512), { offset: 0, sector: 8 }, "options"],
    ["a signal that is none", new Uint8Array(512), { signal: {} }, "signal"],
  ];
  for (const [what, buffer, options, name] of wrong) {
    test(`${what}: "${name}"`, async (t) => {
      const bench = await openFake(t);
      await assert.rejects(bench.disk.read(buffer as Memory, options), refused(name));
      await assert.rejects(bench.disk.write(buffer as Memory, options), refused(name));
      assert.deepEqual(await bench.take(), [], "the device heard nothing of it");
      assert.equal(bench.disk.pending, 0);
    });
  }

  const wrongVectors: readonly [what: string, buffers: unknown, options: Record<string, unknown>, name: string][] = [
    ["no array", new Uint8Array(512), {}, "buffers"],
    ["an empty array", [], {}, "buffers"],
    ["one that is no buffer", [new Uint8Array(512), 5], {}, "buffer"],
    ["one that is null", [null], {}, "buffer"],
    ["nothing but empty buffers", [new Uint8Array(0)], {}, "length"],
    ["an odd total", [new Uint8Array(500), new Uint8Array(500)], {}, "length"],
    ["beyond the end", [new Uint8Array(512), new Uint8Array(512)], { position: CAPACITY - 512 }, "position"],
    ["an option that readv does not have", [new Uint8Array(512)], { offset: 0 }, "options"],
    ["a signal that is none", [new Uint8Array(512)], { signal: 1 }, "signal"],
  ];
  for (const [what, buffers, options, name] of wrongVectors) {
    test(`readv and writev: ${what}: "${name}"`, async (t) => {
      const bench = await openFake(t);
      await assert.rejects(bench.disk.readv(buffers as Memory[], options), refused(name));
      await assert.rejects(bench.disk.writev(buffers as Memory[], options), refused(name));
      assert.deepEqual(await bench.take(), []);
    });
  }

  test("a lent buffer that was released", async (t) => {
    const bench = await openFake(t);
    const buffer = await bench.disk.allocate(512);
    buffer.release();
    await assert.rejects(bench.disk.read(buffer), refused("buffer"));
    await assert.rejects(bench.disk.write(buffer), refused("buffer"));
    await assert.rejects(bench.disk.readv([new Uint8Array(512), buffer]), refused("buffer"));
    assert.deepEqual(await bench.take(), []);
  });

  test("a buffer that another device lent: its address means something else here", async (t) => {
    const [bench, other] = [await openFake(t), await openFake(t)];
    const buffer = await other.disk.allocate(512);
    await assert.rejects(bench.disk.read(buffer), refused("buffer"));
    await assert.rejects(bench.disk.write(buffer), refused("buffer"));
    await assert.rejects(bench.disk.readv([new Uint8Array(512), buffer]), refused("buffer"));
    assert.deepEqual(await bench.take(), []);
    // One of memory that was added later is as good as one of the first.
    const large = await bench.disk.allocate(80 << 20);
    const reading = bench.disk.read(large, { length: 512 });
    (await bench.takeOne()).answer({ data: pattern(512) });
    assert.equal((await reading).bytesRead, 512);
  });

  test("with blocks of 4096 bytes, half a block", async (t) => {
    const { bench, checked } = await openChecked(t, { blkSize: 4096 });
    await assert.rejects(bench.disk.read(new Uint8Array(512)), refused("length"));
    await assert.rejects(bench.disk.read(new Uint8Array(4096), { position: 512 }), refused("position"));
    await assert.rejects(bench.disk.write(new Uint8Array(4608)), refused("length"));
    await bench.disk.write(pattern(4096), { position: 8192 });
    assert.deepEqual(checked.bytes.slice(8192, 12288), pattern(4096));
    assert.deepEqual(checked.faults, []);
  });
});

test("BLK-DRV-09 the last sector and the whole disk are inside", async (t) => {
  const { bench, checked } = await openChecked(t);
  const last = await bench.disk.read(new Uint8Array(512), { position: CAPACITY - 512 });
  assert.deepEqual(last.buffer, checked.bytes.slice(-512));
  const whole = await bench.disk.read(new Uint8Array(CAPACITY));
  assert.deepEqual(whole.buffer, checked.bytes);
  assert.deepEqual(checked.faults, []);
});

test("a Buffer, a view into the middle of memory, and an offset in it", async (t) => {
  const { bench, checked } = await openChecked(t);
  const memory = new Uint8Array(4096).fill(0x55);
  const view = memory.subarray(100, 1636);
  await bench.disk.read(view, { position: 2048, offset: 300, length: 1024 });
  assert.deepEqual(memory.slice(400, 1424), checked.bytes.slice(2048, 3072));
  assert.ok([...memory.subarray(0, 400), ...memory.subarray(1424)].every((byte) => byte === 0x55));
  await bench.disk.write(Buffer.alloc(512, "ab"), { position: 512 });
  assert.equal(Buffer.from(checked.bytes.subarray(512, 1024)).toString(), "ab".repeat(256));
});

describe("BLK-DRV-31 transfers are cut into what the device takes", () => {
  const KIB = 1024;
  const cases: readonly [
    config: Partial<BlkConfig>,
    open: FakeOptions["open"],
    requests: number,
    perRequest: number[],
  ][] = [
    // 64 KiB of lent memory: how many requests, and the elements of the first.
    [{}, {}, 1, [64 * KIB]],
    [{ segMax: 0 }, {}, 1, [64 * KIB]],
    [{ segMax: 8 }, {}, 1, [64 * KIB]],
    [{ sizeMax: 0, segMax: 8 }, {}, 1, [64 * KIB]],
    [{ sizeMax: 16 * KIB }, {}, 4, [16 * KIB]],
    [{ sizeMax: 16 * KIB, segMax: 4 }, {}, 1, Array.from({ length: 4 }, () => 16 * KIB)],
    [{ sizeMax: 16 * KIB, segMax: 3 }, {}, 2, Array.from({ length: 3 }, () => 16 * KIB)],
    [{ sizeMax: 4096, segMax: 100 }, { queueSize: 8 }, 3, Array.from({ length: 6 }, () => 4096)],
    [{ sizeMax: 1000, segMax: 2 }, {}, 64, [512, 512]],
    [{ sizeMax: 100, segMax: 6 }, {}, 128, [100, 100, 100, 100, 100, 12]],
    [{ sizeMax: 512, segMax: 1 }, { queueSize: 4 }, 128, [512]],
  ];
  for (const indirect of [false, true]) {
    for (const packed of [false, true]) {
      for (const [config, open, requests, elements] of cases) {
        const ring = `${packed ? "packed" : "split"}${indirect ? ", indirect" : ""}`;
        test(`${ring} ${JSON.stringify(config)} ${JSON.stringify(open)}: ${requests} requests`, async (t) => {
          const features = (indirect ? VirtioFeature.INDIRECT_DESC : 0n) | (packed ? VirtioFeature.RING_PACKED : 0n);
          const { bench, checked } = await openChecked(t, config, { features, ...(open && { open }) });
          const { disk } = bench;
          const lent = await disk.allocate(64 * KIB);
          const seen: number[][] = [];
          const serve = checked.serve.bind(checked);
          checked.serve = (request) => {
            seen.push([...request.raw.readableLengths.slice(1), ...request.raw.writableLengths.slice(0, -1)]);
            serve(request);
          };
          const data = pattern(64 * KIB, 3);
          lent.bytes.set(data);
          assert.equal((await disk.write(lent, { position: 4096 })).bytesWritten, 64 * KIB);
          assert.equal(seen.length, requests);
          assert.deepEqual(seen[0], elements);
          assert.deepEqual(checked.bytes.slice(4096, 4096 + 64 * KIB), data);
          lent.bytes.fill(0);
          assert.equal((await disk.read(lent, { position: 4096 })).bytesRead, 64 * KIB);
          assert.deepEqual(lent.bytes, data);
          // The same from memory of the caller's own, which is copied.
          const plain = pattern(64 * KIB, 5);
          await disk.write(plain, { position: 4096 });
          assert.deepEqual(checked.bytes.slice(4096, 4096 + 64 * KIB), plain);
          assert.deepEqual((await disk.read(new Uint8Array(64 * KIB), { position: 4096 })).buffer, plain);
          assert.deepEqual(checked.faults, []);
          assert.equal(disk.pending, 0);
        });
      }
    }
  }

  test("requests of 2 MiB at most, and copies of 1 MiB, when the device names no limit", async (t) => {
    const capacity = 65536n;
    const { bench, checked } = await openChecked(t, { capacity, segMax: 64 });
    const sizes: number[] = [];
    const serve = checked.serve.bind(checked);
    checked.serve = (request) => {
      sizes.push(request.data.length);
      serve(request);
    };
    const lent = await bench.disk.allocate(5 << 20);
    lent.bytes.set(pattern(4096, 1), 4 << 20);
    await bench.disk.write(lent);
    assert.deepEqual(sizes.splice(0), [2 << 20, 2 << 20, 1 << 20]);
    assert.deepEqual(checked.bytes.slice(4 << 20, (4 << 20) + 4096), pattern(4096, 1));
    await bench.disk.write(new Uint8Array((2 << 20) + 512));
    assert.deepEqual(sizes, [1 << 20, 1 << 20, 512]);
    assert.deepEqual(checked.faults, []);
  });
});

describe("scatter and gather", () => {
  /** Lengths of pieces, whether each is lent, and the limits; all pieces together are whole sectors. */
  const cases: readonly [
    what: string,
    config: Partial<BlkConfig>,
    pieces: readonly [length: number, isLent: boolean][],
  ][] = [
    [
      "lent, whole sectors",
      { segMax: 8 },
      [
        [512, true],
        [1024, true],
        [512, true],
      ],
    ],
    [
      "lent, odd lengths",
      { segMax: 8 },
      [
        [1, true],
        [510, true],
        [1, true],
        [512, true],
      ],
    ],
    [
      "plain, odd lengths",
      { segMax: 8 },
      [
        [100, false],
        [412, false],
        [3, false],
        [509, false],
      ],
    ],
    [
      "lent and plain",
      { segMax: 8 },
      [
        [700, true],
        [300, false],
        [24, true],
        [512, false],
      ],
    ],
    [
      "lent, more than seg_max",
      { segMax: 2 },
      [
        [512, true],
        [512, true],
        [512, true],
        [512, true],
      ],
    ],
    [
      "lent, seg_max absent",
      {},
      [
        [512, true],
        [512, true],
      ],
    ],
    [
      "lent, seg_max 0",
      { segMax: 0 },
      [
        [512, true],
        [512, true],
      ],
    ],
    [
      "lent, as many as seg_max",
      { segMax: 3 },
      [
        [512, true],
        [100, true],
        [412, true],
      ],
    ],
    [
      "lent, cut by size_max to more than seg_max",
      { segMax: 3, sizeMax: 1024 },
      [
        [2048, true],
        [2048, true],
      ],
    ],
    [
      "lent, cut by size_max to seg_max",
      { segMax: 4, sizeMax: 1024 },
      [
        [2048, true],
        [2048, true],
      ],
    ],
    [
      "empty ones between",
      { segMax: 3 },
      [
        [0, true],
        [512, true],
        [0, false],
        [512, true],
        [0, true],
      ],
    ],
    ["a single one", { segMax: 3 }, [[1024, true]]],
    [
      "very many",
      { segMax: 30 },
      Array.from({ length: 512 }, (_, i) => [5 + (i % 2) * 6, i % 3 > 0] as [number, boolean]),
    ],
  ];
  for (const [what, config, pieces] of cases) {
    for (const queueSize of [8, 64]) {
      test(`${what}, a queue of ${queueSize}`, async (t) => {
        const { bench, checked } = await openChecked(t, config, { open: { queueSize } });
        const { disk } = bench;
        const total = pieces.reduce((sum, [length]) => sum + length, 0);
        assert.equal(total % 512, 0);
        const data = pattern(total, 4);
        const make = async (fill: boolean): Promise<Memory[]> => {
          let at = 0;
          const made: Memory[] = [];
          for (const [length, isLent] of pieces) {
            const memory = isLent && length > 0 ? await disk.allocate(length) : new Uint8Array(length);
            if (fill) bytesOf(memory).set(data.subarray(at, at + length));
            at += length;
            made.push(memory);
          }
          return made;
        };
        const out = await make(true);
        const written = await disk.writev(out, { position: 1024 });
        assert.deepEqual(written, { bytesWritten: total, buffers: out });
        assert.deepEqual(checked.bytes.slice(1024, 1024 + total), data);
        const into = await make(false);
        const read = await disk.readv(into, { position: 1024 });
        assert.deepEqual(read, { bytesRead: total, buffers: into });
        assert.deepEqual(Buffer.concat(into.map(bytesOf)), Buffer.from(data));
        assert.deepEqual(checked.faults, []);
      });
    }
  }

  test("lent pieces that fit into one request are not copied", async (t) => {
    const bench = await openFake(t, { features: BlkFeature.SEG_MAX, config: { segMax: 4 } });
    const pieces = [await bench.disk.allocate(512), await bench.disk.allocate(100), await bench.disk.allocate(412)];
    const writing = bench.disk.writev(pieces);
    const request = await bench.takeOne();
    assert.deepEqual(request.raw.readableLengths, [16, 512, 100, 412]);
    request.answer();
    await writing;
  });

  test("the same lent buffer several times", async (t) => {
    const { bench, checked } = await openChecked(t, { segMax: 4 });
    const buffer = await bench.disk.allocate(512);
    buffer.bytes.set(pattern(512, 6));
    await bench.disk.writev([buffer, buffer, buffer]);
    assert.deepEqual(checked.bytes.slice(1024, 1536), pattern(512, 6));
    buffer.release();
    assert.equal((await bench.disk.allocate(512)).iovaLo, buffer.iovaLo, "nobody holds it any more");
  });
});

describe("lent buffers and their return", () => {
  /** Whether the memory of `buffer` can be lent again now: the pool hands out the lowest address first. */
  const isRecycled = async (bench: Bench, buffer: DeviceBuffer): Promise<boolean> => {
    const next = await bench.disk.allocate(buffer.length);
    const same = next.iovaLo === buffer.iovaLo && next.iovaHi === buffer.iovaHi;
    next.release();
    return same;
  };

  for (const segMax of [1, 4]) {
    test(`released while in flight, the memory is lent again only afterwards (seg_max ${segMax})`, async (t) => {
      const bench = await openFake(t, { features: BlkFeature.SEG_MAX, config: { segMax } });
      const { disk } = bench;
      for (const start of [
        (buffer: DeviceBuffer) => disk.read(buffer),
        (buffer: DeviceBuffer) => disk.readv([buffer]),
        (buffer: DeviceBuffer) => disk.read(buffer, { signal: new AbortController().signal }),
        (buffer: DeviceBuffer) => disk.writev([buffer, buffer]),
      ]) {
        const buffer = await disk.allocate(4096);
        const call = start(buffer);
        const requests = await bench.take();
        buffer.release();
        assert.equal(await isRecycled(bench, buffer), false);
        for (const request of requests) request.answer();
        await call;
        assert.equal(await isRecycled(bench, buffer), true);
      }
    });
  }

  test("released while its data are copied, the memory is nobody else's before the end", async (t) => {
    // A mixture of lent and plain memory is copied: the device never sees the buffer, the driver writes it.
    const bench = await openFake(t);
    const buffer = await bench.disk.allocate(512);
    const reading = bench.disk.readv([new Uint8Array(512), buffer]);
    const request = await bench.takeOne();
    buffer.release();
    assert.equal(await isRecycled(bench, buffer), false);
    request.answer({ data: pattern(1024) });
    await reading;
    assert.equal(await isRecycled(bench, buffer), true);
  });

  test("released before its request found room: that call is refused, the device goes on", async (t) => {
    const bench = await openFake(t, { open: { queueSize: 4 } });
    const { disk } = bench;
    const buffers = await Promise.all(Array.from({ length: 4 }, () => disk.allocate(512)));
    const [first, second, third, fourth] = buffers.map((buffer) => disk.read(buffer));
    const refusal = assert.rejects(second, refused("buffer"));
    await turn();
    buffers[1].release();
    for (let i = 0; i < 3; i++) {
      const request = await bench.takeOne();
      request.answer({ data: pattern(512, i) });
    }
    const results = await Promise.all([first, third, fourth]);
    await refusal;
    assert.deepEqual(
      results.map(({ buffer }) => [...buffer.bytes]),
      [0, 1, 2].map((i) => [...pattern(512, i)]),
    );
    assert.equal(disk.pending, 0);
    assert.equal(await isRecycled(bench, buffers[1]), true);
  });

  test("a disk that shrinks under calls that wait refuses those alone", async (t) => {
    const bench = await openFake(t, { open: { queueSize: 4 } });
    const { disk, transport } = bench;
    const plain = (): Uint8Array => new Uint8Array(512);
    const first = disk.read(plain());
    const beyond = assert.rejects(disk.read(plain(), { position: CAPACITY - 512 }), refused("position"));
    const last = disk.read(plain());
    await turn();
    transport.changeConfig(Uint8Array.of(16, 0, 0, 0, 0, 0, 0, 0));
    await turn();
    (await bench.takeOne()).answer({ data: pattern(512) });
    await first;
    await beyond;
    (await bench.takeOne()).answer({ data: pattern(512) });
    await last;
    assert.equal(disk.capacity, 16 * 512);
  });

  test("allocate: refused lengths, and no more memory", async (t) => {
    const bench = await openFake(t, { maxRegions: 1 });
    await assert.rejects(bench.disk.allocate(0), refused("length"));
    await assert.rejects(bench.disk.allocate(1.5), refused("length"));
    await assert.rejects(
      bench.disk.allocate(256 << 20),
      (error) => error instanceof VirtioError && error.code === "ERR_VIRTIO_MEMORY",
    );
    const buffer = await bench.disk.allocate(1);
    assert.equal(buffer.length, 1);
  });
});

test("memory for copies runs out: calls wait for it, in order, and all complete", async (t) => {
  const bench = await openFake(t, { config: { capacity: 65536n }, open: { queueSize: 256 } });
  const { disk } = bench;
  const SIZE = 1 << 20;
  // 16 MiB of copies: the seventeenth waits although the ring has room.
  const calls = Array.from({ length: 20 }, (_, i) => disk.write(new Uint8Array(SIZE).fill(i), { position: i * SIZE }));
  const small = disk.write(new Uint8Array(512).fill(99), { position: 30 * SIZE });
  let held = await bench.take();
  assert.equal(held.length, 16);
  const order: number[] = [];
  while (held.length > 0) {
    const [request, ...rest] = held;
    order.push(request.data[0]);
    request.answer();
    await turn();
    held = [...rest, ...(await bench.take())];
  }
  assert.deepEqual(order, [...Array.from({ length: 20 }, (_, i) => i), 99]);
  await Promise.all([...calls, small]);
  assert.equal(disk.pending, 0);
});

test("memory for copies is not lost by trying in vain to submit", async (t) => {
  const bench = await openFake(t, { open: { queueSize: 4 } });
  // Room for one request: in every turn the next one is prepared and put back. 16 MiB hold 4096 small ones.
  const calls = Array.from({ length: 4100 }, () => bench.disk.write(new Uint8Array(512)));
  for (let i = 0; i < calls.length; i++) (await bench.takeOne()).answer();
  await Promise.all(calls);
  const writing = bench.disk.write(new Uint8Array(1 << 20));
  (await bench.takeOne()).answer();
  await writing;
});

function bytesOf(memory: Memory): Uint8Array {
  return memory instanceof Uint8Array ? memory : memory.bytes;
}
