/** Every type of request, byte by byte as the device sees it, and every way in which it can end. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { type BlkConfig, BlkFeature } from "../../../src/protocol/blk.js";
import { ALL_REQUESTS, failure, openFake, pattern, refused, RINGS, segmentsOf } from "./support.js";

const discard = { maxSectors: 16, maxSegments: 4, alignment: 1 };
const LIMITS: Partial<BlkConfig> = {
  discard,
  writeZeroes: { ...discard, mayUnmap: true },
  secureErase: { ...discard, maxSegments: 2 },
};

for (const [name, features] of Object.entries(RINGS)) {
  describe(`requests in a ring that is ${name}`, () => {
    test("IN: 16 bytes of header, the data, one byte of status", async (t) => {
      const bench = await openFake(t, { features });
      const reading = bench.disk.read(new Uint8Array(1024), { position: 0x1200 });
      const request = await bench.takeOne();
      assert.deepEqual(request.raw.read(), Uint8Array.of(0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0));
      assert.deepEqual([request.raw.readableLengths, request.raw.writableLengths], [[16], [1024, 1]]);
      const data = pattern(1024);
      request.answer({ data });
      const { buffer, bytesRead } = await reading;
      assert.equal(bytesRead, 1024);
      assert.deepEqual(buffer, data);
    });

    test("OUT: the data behind the header, the status alone to be written", async (t) => {
      const bench = await openFake(t, { features });
      const data = pattern(1536);
      const writing = bench.disk.write(data, { position: 512 });
      const request = await bench.takeOne();
      assert.deepEqual([request.type, request.reserved, request.sector], [1, 0, 1]);
      assert.deepEqual([request.raw.readableLengths, request.raw.writableLengths], [[16, 1536], [1]]);
      assert.deepEqual(request.data, data);
      request.answer();
      assert.deepEqual(await writing, { bytesWritten: 1536, buffer: data });
    });

    test("IN and OUT without a copy, anywhere in a lent buffer", async (t) => {
      const bench = await openFake(t, { features });
      const buffer = await bench.disk.allocate(8192);
      const data = pattern(512);
      const reading = bench.disk.read(buffer, { position: 1024, offset: 100, length: 512 });
      (await bench.takeOne()).answer({ data });
      assert.deepEqual(await reading, { bytesRead: 512, buffer });
      assert.deepEqual(buffer.bytes.slice(100, 612), data);
      buffer.bytes.set(data, 7);
      const writing = bench.disk.write(buffer, { position: 1024, offset: 7, length: 512 });
      const request = await bench.takeOne();
      assert.deepEqual(request.data, data);
      request.answer();
      assert.deepEqual(await writing, { bytesWritten: 512, buffer });
    });

    test("sectors above 2^32 arrive whole", async (t) => {
      const bench = await openFake(t, { features, config: { capacity: 2n ** 44n - 1n } });
      for (const sector of [2 ** 32 - 1, 2 ** 32, 2 ** 33 + 5, 2 ** 44 - 2]) {
        const buffer = await bench.disk.allocate(512);
        const calls = [
          bench.disk.read(buffer, { position: sector * 512 }),
          bench.disk.write(new Uint8Array(512), { position: sector * 512 }),
        ];
        const taken = await bench.take();
        assert.deepEqual(
          taken.map((request) => request.sector),
          [sector, sector],
        );
        for (const request of taken) request.answer();
        await Promise.all(calls);
      }
    });

    test("BLK-DRV-11 BLK-DRV-12 FLUSH: sector 0 and no data", async (t) => {
      const bench = await openFake(t, { features: features | BlkFeature.FLUSH });
      const flushing = bench.disk.flush();
      const request = await bench.takeOne();
      assert.deepEqual(request.raw.read(), Uint8Array.of(4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0));
      assert.deepEqual([request.raw.readableLengths, request.raw.writableLengths], [[16], [1]]);
      request.answer();
      await flushing;
    });

    test("BLK-DRV-15 GET_ID: 20 bytes", async (t) => {
      const bench = await openFake(t, { features });
      const asking = bench.disk.getId();
      const request = await bench.takeOne();
      assert.deepEqual([request.type, request.sector, request.reserved], [8, 0, 0]);
      assert.deepEqual([request.raw.readableLengths, request.raw.writableLengths], [[16], [20, 1]]);
      request.answer({ data: new TextEncoder().encode("virtio-disk-7".padEnd(20, "\0")) });
      assert.equal(await asking, "virtio-disk-7");
    });

    test("GET_LIFETIME: 6 bytes", async (t) => {
      const bench = await openFake(t, { features: features | BlkFeature.LIFETIME });
      const asking = bench.disk.getLifetime();
      const request = await bench.takeOne();
      assert.deepEqual([request.type, request.sector], [10, 0]);
      assert.deepEqual([request.raw.readableLengths, request.raw.writableLengths], [[16], [6, 1]]);
      request.answer({ data: Uint8Array.of(2, 0, 3, 0, 11, 0) });
      assert.deepEqual(await asking, { preEolInfo: 2, deviceLifetimeEstTypA: 3, deviceLifetimeEstTypB: 11 });
    });

    for (const [what, type, call, flags] of [
      ["BLK-DRV-20 DISCARD", 11, "discard", 0],
      ["WRITE_ZEROES", 13, "writeZeroes", 0],
      ["SECURE_ERASE", 14, "secureErase", 0],
    ] as const) {
      test(`BLK-DRV-14 ${what}: segments of 16 bytes`, async (t) => {
        const bench = await openFake(t, { features: features | ALL_REQUESTS, config: LIMITS });
        const calling = bench.disk[call]([
          { position: 512, length: 1024 },
          { position: 65536, length: 512 },
        ]);
        const request = await bench.takeOne();
        assert.deepEqual([request.type, request.sector, request.reserved], [type, 0, 0]);
        assert.deepEqual([request.raw.readableLengths, request.raw.writableLengths], [[16, 32], [1]]);
        assert.deepEqual(
          request.data,
          Uint8Array.of(
            ...[1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, flags, 0, 0, 0],
            ...[128, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, flags, 0, 0, 0],
          ),
        );
        request.answer();
        await calling;
      });
    }
  });
}

test("WRITE_ZEROES with unmap sets bit 0 of each segment; BLK-DRV-20 DISCARD never", async (t) => {
  const bench = await openFake(t, { features: ALL_REQUESTS, config: LIMITS });
  const ranges = [
    { position: 0, length: 512 },
    { position: 1024, length: 512 },
  ];
  const zeroing = bench.disk.writeZeroes(ranges, { unmap: true });
  const zeroes = await bench.takeOne();
  assert.deepEqual(
    segmentsOf(zeroes).map(({ flags }) => flags),
    [1, 1],
  );
  zeroes.answer();
  await zeroing;
  const discarding = bench.disk.discard(ranges);
  const discarded = await bench.takeOne();
  assert.deepEqual(
    segmentsOf(discarded).map(({ flags }) => flags),
    [0, 0],
  );
  discarded.answer();
  await discarding;
});

test("BLK-DRV-21 what a discarded range reads as is asked of the device, each time, and returned as it comes", async (t) => {
  const bench = await openFake(t, { features: ALL_REQUESTS, config: LIMITS });
  const range = { position: 1024, length: 1024 };
  const discarding = bench.disk.discard(range);
  (await bench.takeOne()).answer();
  await discarding;
  for (const seed of [1, 2, 0]) {
    const reading = bench.disk.read(new Uint8Array(1024).fill(0xaa), { position: range.position });
    const request = await bench.takeOne();
    assert.deepEqual([request.type, request.sector, request.room], [0, 2, 1024]);
    const data = seed === 0 ? new Uint8Array(1024) : pattern(1024, seed);
    request.answer({ data });
    const { bytesRead, buffer } = await reading;
    assert.equal(bytesRead, 1024);
    assert.deepEqual(buffer, data);
  }
});

describe("BLK-DRV-16 BLK-DRV-17 BLK-DRV-18 BLK-DRV-31 ranges are cut into what the device takes", () => {
  const counts = async (
    t: Parameters<typeof openFake>[0],
    limits: { maxSectors: number; maxSegments: number },
    lengths: readonly number[],
    more: Parameters<typeof openFake>[1] = {},
  ): Promise<number[][]> => {
    const results: number[][][] = [];
    for (const call of ["discard", "writeZeroes", "secureErase"] as const) {
      const bench = await openFake(t, {
        ...more,
        features: ALL_REQUESTS | (more.features ?? 0n),
        config: {
          capacity: 2n ** 40n,
          discard: { ...limits, alignment: 1 },
          writeZeroes: { ...limits, mayUnmap: false },
          secureErase: { ...limits, alignment: 1 },
          ...more.config,
        },
      });
      let position = 0;
      const ranges = lengths.map((sectors) => {
        const range = { position, length: sectors * 512 };
        position += sectors * 512 + 512;
        return range;
      });
      const calling = bench.disk[call](ranges);
      const seen: number[][] = [];
      const covered = new Map<number, number>();
      for (let requests = await bench.take(); requests.length > 0; requests = await bench.take()) {
        for (const request of requests) {
          const segments = segmentsOf(request);
          seen.push(segments.map(({ count }) => count));
          for (const { sector, count } of segments) covered.set(sector, count);
          request.answer();
        }
      }
      await calling;
      // Together they are the ranges, without hole or overlap.
      let expected = [...covered].sort(([a], [b]) => a - b);
      for (const { position: start, length } of ranges) {
        let at = start / 512;
        while (at < (start + length) / 512) {
          const [sector, count] = expected[0];
          assert.equal(sector, at);
          at += count;
          expected = expected.slice(1);
        }
        assert.equal(at, (start + length) / 512);
      }
      assert.deepEqual(expected, []);
      results.push(seen);
    }
    assert.deepEqual(results[0], results[1]);
    assert.deepEqual(results[0], results[2]);
    return results[0];
  };

  test("segments that are too long", async (t) => {
    assert.deepEqual(await counts(t, { maxSectors: 16, maxSegments: 8 }, [16, 17, 40]), [[16, 16, 1, 16, 16, 8]]);
  });
  test("too many segments", async (t) => {
    assert.deepEqual(await counts(t, { maxSectors: 16, maxSegments: 2 }, [1, 2, 3, 33]), [
      [1, 2],
      [3, 16],
      [16, 1],
    ]);
  });
  test("exactly as many as allowed", async (t) => {
    assert.deepEqual(await counts(t, { maxSectors: 5, maxSegments: 3 }, [5, 5, 5]), [[5, 5, 5]]);
  });
  test("limits of 0: one segment, of any length", async (t) => {
    assert.deepEqual(await counts(t, { maxSectors: 0, maxSegments: 0 }, [7, 100_000]), [[7], [100_000]]);
    const huge = 2 ** 32 + 8;
    assert.deepEqual(await counts(t, { maxSectors: 0, maxSegments: 0 }, [huge]), [[2 ** 32 - 1], [9]]);
  });
  test("limits beyond reason: 256 segments, 4 KiB", async (t) => {
    const lengths = Array.from({ length: 300 }, () => 1);
    const seen = await counts(t, { maxSectors: 2 ** 32 - 1, maxSegments: 2 ** 32 - 1 }, lengths);
    assert.deepEqual(
      seen.map((request) => request.length),
      [256, 44],
    );
  });
  test("segments are data: they keep to size_max and seg_max as well", async (t) => {
    const lengths = Array.from({ length: 100 }, () => 1);
    const seen = await counts(t, { maxSectors: 8, maxSegments: 64 }, lengths, {
      features: BlkFeature.SIZE_MAX | BlkFeature.SEG_MAX,
      config: { sizeMax: 512, segMax: 1 },
    });
    assert.deepEqual(
      seen.map((request) => request.length),
      [32, 32, 32, 4],
    );
  });
});

describe("ranges", () => {
  test("one range, an array of one, none", async (t) => {
    const bench = await openFake(t, { features: ALL_REQUESTS, config: LIMITS });
    const calls = [
      bench.disk.discard({ position: 0, length: 512 }),
      bench.disk.discard([{ position: 0, length: 512 }]),
      bench.disk.discard([]),
    ];
    const requests = await bench.take();
    assert.equal(requests.length, 2);
    assert.deepEqual(segmentsOf(requests[0]), segmentsOf(requests[1]));
    for (const request of requests) request.answer();
    await Promise.all(calls);
  });

  const wrong: readonly [unknown, string][] = [
    [undefined, "ranges"],
    [5, "ranges"],
    ["0:512", "ranges"],
    [[null], "ranges"],
    [{ position: 0 }, "length"],
    [{ length: 512 }, "position"],
    [{ offset: 0, length: 512 }, "range"],
    [{ position: 0, length: 0 }, "length"],
    [{ position: 0, length: 511 }, "length"],
    [{ position: 0, length: -512 }, "length"],
    [{ position: 1, length: 512 }, "position"],
    [{ position: -512, length: 512 }, "position"],
    [{ position: 2048 * 512, length: 512 }, "position"],
    [{ position: 2047 * 512, length: 1024 }, "position"],
    [{ position: Number.MAX_SAFE_INTEGER - 511, length: 512 }, "position"],
    [
      [
        { position: 0, length: 512 },
        { position: 0, length: 2049 * 512 },
      ],
      "position",
    ],
  ];
  for (const [ranges, name] of wrong) {
    test(`refused: ${JSON.stringify(ranges)}`, async (t) => {
      const bench = await openFake(t, { features: ALL_REQUESTS, config: LIMITS });
      for (const call of ["discard", "writeZeroes", "secureErase"] as const) {
        await assert.rejects(bench.disk[call](ranges as { position: number; length: number }), refused(name));
      }
      assert.deepEqual(await bench.take(), [], "not even a part of it was sent");
    });
  }

  test("BLK-DRV-22 when one of several requests fails the call fails, and no more are sent", async (t) => {
    const bench = await openFake(t, { features: ALL_REQUESTS, config: LIMITS, open: { queueSize: 4 } });
    const ranges = Array.from({ length: 40 }, (_, i) => ({ position: i * 1024, length: 512 }));
    const calling = assert.rejects(bench.disk.discard(ranges), failure("ERR_VIRTIO_IO", "DISCARD"));
    const [first, ...others] = await bench.take();
    assert.ok(others.length < 9);
    first.answer({ status: 1 });
    for (const request of others) request.answer();
    await calling;
    assert.deepEqual(await bench.take(), []);
    assert.equal(bench.disk.pending, 0);
  });
});

describe("what a device does not offer is not asked of it", () => {
  test("DISCARD, WRITE_ZEROES, SECURE_ERASE, LIFETIME, writeback", async (t) => {
    const bench = await openFake(t);
    const range = { position: 0, length: 512 };
    const unsupported = (what: string) => failure("ERR_VIRTIO_UNSUPPORTED", `does not offer ${what}`);
    await assert.rejects(bench.disk.discard(range), unsupported("DISCARD"));
    await assert.rejects(bench.disk.writeZeroes(range), unsupported("WRITE_ZEROES"));
    await assert.rejects(bench.disk.secureErase(range), unsupported("SECURE_ERASE"));
    await assert.rejects(bench.disk.getLifetime(), unsupported("GET_LIFETIME"));
    await assert.rejects(bench.disk.setWriteback(true), unsupported("the writeback field"));
    assert.deepEqual(await bench.take(), []);
    assert.ok(!bench.transport.steps.includes("writeConfig"));
  });

  test("BLK-DRV-01 flush without FLUSH resolves, and says in `info.cache` that nothing is known", async (t) => {
    const bench = await openFake(t);
    await bench.disk.flush();
    assert.deepEqual(await bench.take(), []);
    assert.equal(bench.disk.info.cache, "unknown");
  });

  test("BLK-DRV-01 FLUSH is accepted, and sent: whenever flush is called, also by one who opened it read-only", async (t) => {
    for (const readOnly of [false, true]) {
      const bench = await openFake(t, { features: BlkFeature.FLUSH, open: { readOnly } });
      assert.equal(bench.disk.features & BlkFeature.FLUSH, BlkFeature.FLUSH);
      const flushing = bench.disk.flush();
      const request = await bench.takeOne();
      assert.equal(request.type, 4);
      request.answer();
      await flushing;
    }
  });
});

describe("how a request ends", () => {
  const endings = [
    [1, "ERR_VIRTIO_IO", "IOERR"],
    [2, "ERR_VIRTIO_UNSUPPORTED", "UNSUPP"],
    [3, "ERR_VIRTIO_STATUS", "unknown status 3"],
    [7, "ERR_VIRTIO_STATUS", "unknown status 7"],
    [254, "ERR_VIRTIO_STATUS", "unknown status 254"],
    [255, "ERR_VIRTIO_STATUS", "without a status"],
    ["unwritten", "ERR_VIRTIO_STATUS", "without a status"],
  ] as const;
  for (const [status, code, words] of endings) {
    test(`status ${status}: ${code}, in every kind of call`, async (t) => {
      const bench = await openFake(t, { features: ALL_REQUESTS | RINGS["split with everything"], config: LIMITS });
      const { disk } = bench;
      const lent = await disk.allocate(512);
      const [second, third, fourth] = await Promise.all([1, 2, 3].map(() => disk.allocate(512)));
      const plain = new Uint8Array(512);
      const range = { position: 0, length: 512 };
      const calls: readonly [string, Promise<unknown>][] = [
        ["IN", disk.read(lent)],
        ["IN", disk.read(plain)],
        ["IN", disk.readv([plain, second])],
        ["OUT", disk.write(third)],
        ["OUT", disk.write(plain)],
        ["OUT", disk.writev([fourth, plain])],
        ["FLUSH", disk.flush()],
        ["GET_ID", disk.getId()],
        ["GET_LIFETIME", disk.getLifetime()],
        ["DISCARD", disk.discard(range)],
        ["WRITE_ZEROES", disk.writeZeroes(range)],
        ["SECURE_ERASE", disk.secureErase(range)],
      ];
      const checks = calls.map(([name, call]) =>
        assert.rejects(call, (error) => failure(code, words)(error) && failure(code, new RegExp(`^${name}:`))(error)),
      );
      const requests = await bench.take();
      assert.equal(requests.length, calls.length);
      for (const request of requests) request.answer({ status, data: new Uint8Array(request.room).fill(9) });
      await Promise.all(checks);
      assert.deepEqual(plain, new Uint8Array(512), "data of a failed read are not handed over");
      // The next request finds a device that is well.
      const reading = disk.read(lent);
      (await bench.takeOne()).answer({ data: pattern(512) });
      assert.equal((await reading).bytesRead, 512);
    });
  }

  test("a status left from an earlier request in the same slot does not count", async (t) => {
    const bench = await openFake(t, { open: { queueSize: 4 } });
    for (let i = 0; i < 6; i++) {
      const good = bench.disk.read(new Uint8Array(512));
      (await bench.takeOne()).answer({ data: pattern(512) });
      await good;
      const bad = assert.rejects(bench.disk.read(new Uint8Array(512)), failure("ERR_VIRTIO_STATUS"));
      (await bench.takeOne()).answer({ status: "unwritten", written: 513 });
      await bad;
    }
  });

  test("a wrong length alone is no failure: the status decides", async (t) => {
    const bench = await openFake(t, { features: BlkFeature.FLUSH });
    for (const written of [0, 1, 2, 100, 0xffff_ffff]) {
      const calls = [bench.disk.write(new Uint8Array(512)), bench.disk.flush()];
      for (const request of await bench.take()) request.answer({ written });
      await Promise.all(calls);
    }
  });
});

describe("SPLIT-DRV-15 SPLIT-DRV-16 a device that delivers less than was asked for", () => {
  for (const [written, expected] of [
    [0, 0],
    [1, 0],
    [2, 1],
    [512, 511],
    [1024, 1023],
    [1025, 1024],
    [0xffff_ffff, 1024],
  ]) {
    test(`${written} of 1025 bytes: ${expected} of data`, async (t) => {
      const bench = await openFake(t);
      const plain = new Uint8Array(1024).fill(0xaa);
      const parts = [new Uint8Array(300).fill(0xaa), new Uint8Array(724).fill(0xaa)];
      const calls = [bench.disk.read(plain), bench.disk.read(await bench.disk.allocate(1024)), bench.disk.readv(parts)];
      const data = pattern(1024);
      for (const request of await bench.take()) request.answer({ data, written });
      for (const { bytesRead } of await Promise.all(calls)) assert.equal(bytesRead, expected);
      const whole = Buffer.concat(parts);
      assert.deepEqual(plain.subarray(0, expected), data.subarray(0, expected));
      assert.deepEqual(whole.subarray(0, expected), Buffer.from(data.subarray(0, expected)));
      assert.ok(
        plain.subarray(expected).every((byte) => byte === 0xaa),
        "what is behind is not handed over",
      );
      assert.ok(whole.subarray(expected).every((byte) => byte === 0xaa));
    });
  }

  test("of a read in several requests only what has no gap before it counts", async (t) => {
    const bench = await openFake(t, { features: BlkFeature.SIZE_MAX, config: { sizeMax: 512 } });
    for (const buffer of [new Uint8Array(2048), await bench.disk.allocate(2048)]) {
      const reading = bench.disk.read(buffer);
      const requests = await bench.take();
      assert.equal(requests.length, 4);
      const written = [513, 101, 513, 51];
      for (const i of [1, 3, 2, 0]) requests[i].answer({ data: pattern(512, i), written: written[i] });
      assert.equal((await reading).bytesRead, 612);
    }
  });

  test("GET_ID and GET_LIFETIME", async (t) => {
    const bench = await openFake(t, { features: BlkFeature.LIFETIME });
    const calls = [bench.disk.getId(), bench.disk.getLifetime()] as const;
    const [id, lifetime] = await bench.take();
    id.answer({ data: new TextEncoder().encode("abcdefghijklmnopqrst"), written: 4 });
    lifetime.answer({ data: Uint8Array.of(1, 0, 2, 0, 3, 0), written: 3 });
    assert.equal(await calls[0], "abc");
    assert.deepEqual(await calls[1], { preEolInfo: 1, deviceLifetimeEstTypA: 0, deviceLifetimeEstTypB: 0 });
  });
});

describe("GET_ID", () => {
  for (const [bytes, expected] of [
    ["", ""],
    ["a", "a"],
    ["nineteen characters", "nineteen characters"],
    ["twenty characters ok", "twenty characters ok"],
    ["cut\0here", "cut"],
  ]) {
    test(JSON.stringify(bytes), async (t) => {
      const bench = await openFake(t);
      const asking = bench.disk.getId();
      (await bench.takeOne()).answer({ data: new TextEncoder().encode(bytes.padEnd(20, "\0")) });
      assert.equal(await asking, expected);
    });
  }
});

describe("BLK-DRV-19 switching the write cache", () => {
  const features = BlkFeature.FLUSH | BlkFeature.CONFIG_WCE;

  test("one byte at 32, and the mode read back", async (t) => {
    const bench = await openFake(t, { features, config: { writeback: true } });
    assert.equal(bench.disk.info.cache, "writeback");
    const before = bench.transport.log.length;
    assert.equal(await bench.disk.setWriteback(false), false);
    assert.deepEqual(bench.transport.log.slice(before), [
      { step: "writeConfig", offset: 32, bytes: Uint8Array.of(0) },
      { step: "readConfig", offset: 0, length: 33 },
    ]);
    assert.equal(bench.disk.info.cache, "writethrough");
    assert.equal(await bench.disk.setWriteback(true), true);
    assert.equal(bench.disk.config.writeback, true);
    // Off, writes before it are still volatile: flush asks the device all the same.
    await bench.disk.setWriteback(false);
    const flushing = bench.disk.flush();
    (await bench.takeOne()).answer();
    await flushing;
  });

  test("a device that does not follow is believed", async (t) => {
    const bench = await openFake(t, { features, config: { writeback: true } });
    bench.transport.writeConfig = () => Promise.resolve();
    assert.equal(await bench.disk.setWriteback(false), true);
  });

  test("wrong argument, and a device that refuses", async (t) => {
    const bench = await openFake(t, { features });
    await assert.rejects(bench.disk.setWriteback(1 as unknown as boolean), refused("enabled"));
    const error = new Error("refused");
    bench.transport.failures.set("writeConfig", error);
    await assert.rejects(bench.disk.setWriteback(true), (got) => got === error);
  });
});

describe("read-only disks", () => {
  const range = { position: 0, length: 512 };
  for (const [what, features, open] of [
    ["by the device", BlkFeature.RO, {}],
    ["by option", 0n, { readOnly: true }],
  ] as const) {
    test(`BLK-DRV-10 ${what}: all that changes the disk is refused, the rest works`, async (t) => {
      const bench = await openFake(t, { features: features | ALL_REQUESTS, config: LIMITS, open });
      const { disk } = bench;
      const check = failure("ERR_VIRTIO_READ_ONLY", "nothing was changed");
      await assert.rejects(disk.write(new Uint8Array(512)), check);
      await assert.rejects(disk.write(await disk.allocate(512)), check);
      await assert.rejects(disk.writev([new Uint8Array(512)]), check);
      await assert.rejects(disk.discard(range), check);
      await assert.rejects(disk.writeZeroes(range), check);
      await assert.rejects(disk.secureErase(range), check);
      assert.deepEqual(await bench.take(), []);
      const calls = [disk.read(new Uint8Array(512)), disk.flush(), disk.getId()];
      for (const request of await bench.take()) request.answer();
      await Promise.all(calls);
    });
  }
});

test("wrong options of flush and writeZeroes are refused", async (t) => {
  const bench = await openFake(t, { features: ALL_REQUESTS, config: LIMITS });
  const range = { position: 0, length: 512 };
  await assert.rejects(bench.disk.writeZeroes(range, { unMap: true } as { unmap?: boolean }), refused("options"));
  await assert.rejects(bench.disk.writeZeroes(range, { unmap: 1 } as unknown as { unmap: boolean }), refused("unmap"));
  await assert.rejects(bench.disk.flush({ timeOut: 5 } as { signal?: AbortSignal }), refused("options"));
  await assert.rejects(bench.disk.flush({ timeout: 0 }), refused("timeout"));
  await assert.rejects(bench.disk.flush({ signal: {} } as { signal: AbortSignal }), refused("signal"));
  assert.deepEqual(await bench.take(), []);
});
