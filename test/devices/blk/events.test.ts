/** Events of a block device: when they come, in which order, and that listeners do no harm. */

import assert from "node:assert/strict";
import { describe, type TestContext, test } from "node:test";
import type { BlockDevice, OpenBlockOptions } from "../../../src/devices/blk/index.js";
import { type BlkConfig, BlkFeature } from "../../../src/protocol/blk.js";
import { runChild } from "../../sys/helpers.js";
import { ALL_REQUESTS, answerRead, type Bench, failure, type FakeOptions, openFake, refused, turn } from "./support.js";

const CAPACITY = 1 << 20;
const SEGMENTS = { maxSectors: 1024, maxSegments: 4 };
const CONFIG = {
  ...{ discard: { ...SEGMENTS, alignment: 1 }, writeZeroes: { ...SEGMENTS, mayUnmap: true } },
  secureErase: { ...SEGMENTS, alignment: 1 },
};

/** `sectors` as the first field of the config space. */
function sectors(count: number): Uint8Array {
  return new Uint8Array(BigUint64Array.of(BigInt(count)).buffer);
}

/** What a device tells of its config, in order. */
function listen(disk: BlockDevice): unknown[] {
  const heard: unknown[] = [];
  disk.on("config", ({ capacity }) => heard.push(["config", Number(capacity)]));
  disk.on("resize", (capacity, previous) => heard.push(["resize", capacity, previous]));
  return heard;
}

describe("config and resize", () => {
  test("BLK-DRV-08 config comes first, resize only with another size", async (t) => {
    const { disk, transport } = await openFake(t);
    const heard = listen(disk);
    transport.changeConfig(sectors(4096));
    await turn();
    assert.deepEqual(heard.splice(0), [
      ["config", 4096],
      ["resize", 2 * CAPACITY, CAPACITY],
    ]);
    transport.changeConfig(sectors(4096));
    await turn();
    assert.deepEqual(heard, [["config", 4096]]);
  });

  test("a listener finds the new size in force", async (t) => {
    const { disk, transport } = await openFake(t);
    const seen: unknown[] = [];
    disk.on("config", (config: BlkConfig) => seen.push(config === disk.config, disk.capacity));
    disk.on("resize", () => {
      seen.push(disk.read(new Uint8Array(512), { position: CAPACITY / 2 }).catch((error: unknown) => error));
    });
    transport.changeConfig(sectors(1024));
    await turn();
    assert.deepEqual(seen.slice(0, 2), [true, CAPACITY / 2]);
    assert.ok(refused("position")(await seen[2]));
  });

  test("refresh finds another size, setWriteback is no change of the device's", async (t) => {
    const { disk, transport } = await openFake(t, {
      features: BlkFeature.CONFIG_WCE | BlkFeature.FLUSH,
      config: { writeback: true },
    });
    const heard = listen(disk);
    await disk.setWriteback(false);
    await disk.refresh();
    assert.deepEqual(heard, []);
    transport.config.set(sectors(64));
    await disk.refresh();
    assert.deepEqual(heard, [
      ["config", 64],
      ["resize", 64 * 512, CAPACITY],
    ]);
  });

  test("the signal of opening has no say in what comes later", async (t) => {
    const controller = new AbortController();
    const { disk, transport } = await openFake(t, { open: { signal: controller.signal } });
    disk.on("lost", (error) => assert.fail(error.message));
    const heard = listen(disk);
    controller.abort();
    transport.changeConfig(sectors(64));
    await turn();
    assert.equal(heard.length, 2);
    assert.equal((await disk.refresh()).capacity, 64n);
  });
});

describe("BLK-DRV-08 a disk that shrinks", () => {
  const beyond = { position: CAPACITY / 2, length: 512 };
  const across = { position: CAPACITY / 2 - 512, length: 1024 };
  const calls: Readonly<Record<string, (disk: BlockDevice) => Promise<unknown>>> = {
    read: (disk) => disk.read(new Uint8Array(512), { position: beyond.position }),
    "read across the end": (disk) => disk.read(new Uint8Array(1024), { position: across.position }),
    write: (disk) => disk.write(new Uint8Array(512), { position: beyond.position }),
    "read of lent memory": async (disk) => disk.read(await disk.allocate(512), { position: beyond.position }),
    readv: (disk) => disk.readv([new Uint8Array(512), new Uint8Array(512)], { position: across.position }),
    writev: (disk) => disk.writev([new Uint8Array(512)], { position: beyond.position }),
    discard: (disk) => disk.discard([{ position: 0, length: 512 }, across]),
    writeZeroes: (disk) => disk.writeZeroes(beyond),
    secureErase: (disk) => disk.secureErase([across, { position: 0, length: 512 }]),
  };

  for (const [name, call] of Object.entries(calls)) {
    test(`${name} beyond the new end is refused in the line, before it is sent`, async (t) => {
      const bench = await openFake(t, { features: ALL_REQUESTS, config: CONFIG, open: { queueSize: 4 } });
      const { disk, transport } = bench;
      const first = disk.read(new Uint8Array(512), { position: CAPACITY - 512 });
      const waiting = assert.rejects(call(disk), refused("position"));
      const flush = disk.flush();
      const inside = disk.discard({ position: beyond.position - 512, length: 512 });
      const request = await bench.takeOne();
      assert.equal(disk.stats().waiting, 3);
      transport.changeConfig(sectors(1024));
      await waiting;
      await turn();
      assert.equal(disk.stats().waiting, 2, "those alone");
      answerRead(request);
      assert.equal((await first).bytesRead, 512, "what is in flight is the device's business");
      for (const type of [4, 11]) {
        const next = await bench.takeOne();
        assert.equal(next.type, type);
        next.answer();
      }
      await Promise.all([flush, inside]);
      assert.equal(disk.stats().lentBytes, name === "read of lent memory" ? 4096 : 0);
      await assert.rejects(call(disk), refused("position"));
      assert.deepEqual(await bench.take(), []);
    });
  }

  test("a transfer of which parts are in flight sends no more, and rejects at once", async (t) => {
    const bench = await openFake(t, {
      features: BlkFeature.SIZE_MAX,
      config: { sizeMax: 512 },
      open: { queueSize: 8 },
    });
    const { disk, transport } = bench;
    const writing = assert.rejects(
      disk.write(new Uint8Array(8192), { position: CAPACITY / 2 - 512 }),
      refused("position"),
    );
    const requests = await bench.take();
    transport.changeConfig(sectors(1024));
    await writing;
    assert.equal(disk.stats().queues[0].abandoned, requests.length);
    for (const request of requests) request.answer();
    assert.deepEqual(await bench.take(), []);
    assert.equal(disk.pending, 0);
  });

  test("when the line is empty afterwards, a close that waits goes on", async (t) => {
    const bench = await openFake(t, { open: { queueSize: 4 } });
    const { disk, transport } = bench;
    const first = disk.read(new Uint8Array(512));
    const second = assert.rejects(disk.read(new Uint8Array(512), { position: CAPACITY / 2 }), refused("position"));
    const request = await bench.takeOne();
    t.mock.timers.enable({ apis: ["setTimeout"] }); // time stands still: nothing may wait for it
    const closing = disk.close();
    transport.changeConfig(sectors(1024));
    await second;
    answerRead(request);
    await first;
    await closing;
  });
});

describe("an optional poll of the config", () => {
  const EVERY = 100;

  /** A device that is polled by a clock of the test, and never tells of changes. */
  async function openPolled(t: TestContext, options: FakeOptions = {}): Promise<Bench & { tick: () => Promise<void> }> {
    t.mock.timers.enable({ apis: ["setInterval"] });
    const open: OpenBlockOptions = { configPoll: EVERY, mode: "poll", ...options.open };
    const bench = await openFake(t, { ...options, open });
    const tick = async (): Promise<void> => {
      t.mock.timers.tick(EVERY);
      await turn();
      await turn();
    };
    return Object.assign(bench, { tick });
  }

  function warnings(t: TestContext): string[] {
    const heard: string[] = [];
    const hear = (warning: Error): void => {
      if ("code" in warning && warning.code === "WARN_VIRTIO_CONFIG_POLL") heard.push(warning.message);
    };
    process.on("warning", hear);
    t.after(() => process.off("warning", hear));
    return heard;
  }

  test("finds changes, of the size or another field, once each", async (t) => {
    const { disk, transport, tick } = await openPolled(t, { features: BlkFeature.BLK_SIZE, config: { blkSize: 512 } });
    const heard = listen(disk);
    await tick();
    assert.deepEqual(heard, []);
    transport.config.set(sectors(1024));
    await tick();
    await tick();
    assert.deepEqual(heard.splice(0), [
      ["config", 1024],
      ["resize", CAPACITY / 2, CAPACITY],
    ]);
    transport.config.set(Uint8Array.of(0, 4), 20); // blk_size
    await tick();
    await tick();
    assert.deepEqual(heard, [["config", 1024]]);
    assert.equal(disk.config.blkSize, 1024);
  });

  test("asks once at a time", async (t) => {
    const { transport, tick } = await openPolled(t);
    const readConfig = transport.readConfig.bind(transport);
    let release = (): void => {};
    const gate = new Promise<void>((resolve) => {
      release = resolve;
    });
    let asked = 0;
    transport.readConfig = async (...args) => {
      asked++;
      await gate;
      return readConfig(...args);
    };
    await tick();
    await tick();
    assert.equal(asked, 1);
    release();
    await turn();
    await tick();
    assert.equal(asked, 2);
  });

  test("a failure is a warning until one succeeds, and the device goes on", async (t) => {
    const heard = warnings(t);
    const { disk, transport, tick } = await openPolled(t);
    disk.on("lost", (error) => assert.fail(error.message));
    transport.failures.set("readConfig", new Error("no time now"));
    await tick();
    await tick();
    assert.equal(heard.length, 1);
    assert.match(heard[0], /config space of fake: cannot be read, and is tried again: Error: no time now/);
    transport.failures.clear();
    transport.config.set(sectors(1024));
    await tick();
    assert.equal(disk.capacity, CAPACITY / 2);
    transport.config.set(new Uint8Array(8).fill(0xff)); // a size that cannot be
    await tick();
    assert.equal(heard.length, 2);
    assert.match(heard[1], /ERR_VIRTIO_CONFIG|expected at most/);
    assert.equal(disk.capacity, CAPACITY / 2);
  });

  test("ends with the device, closed or lost, without a word", async (t) => {
    const heard = warnings(t);
    for (const end of ["close", "lose"] as const) {
      const { disk, transport, tick } = await openPolled(t);
      const error = new Error("gone");
      const readConfig = transport.readConfig.bind(transport);
      let asked = 0;
      let fail = (): void => {};
      transport.readConfig = async (...args) => {
        asked++;
        await new Promise<void>((resolve) => {
          fail = resolve;
        });
        return readConfig(...args);
      };
      await tick();
      if (end === "close") await disk.close();
      else transport.lose(error);
      fail();
      await tick();
      await tick();
      assert.equal(asked, 1);
      t.mock.timers.reset();
    }
    assert.deepEqual(heard, []);
  });

  test("needs a config space", async (t) => {
    await assert.rejects(
      openFake(t, { config: null, open: { capacity: CAPACITY, configPoll: EVERY } }),
      failure("ERR_VIRTIO_CONFIG", "configPoll"),
    );
    await assert.rejects(openFake(t, { open: { configPoll: 0 } }), refused("configPoll"));
  });
});

describe("a listener that throws", () => {
  const INDEX = new URL("../../../src/index.js", import.meta.url).href;
  const TESTING = new URL("../../../src/testing/index.js", import.meta.url).href;
  const PROTOCOL = new URL("../../../src/protocol/index.js", import.meta.url).href;

  test("is an uncaught exception; the device goes on, and tells the rest", () => {
    const { status, stdout, stderr } = runChild(`
      import { setImmediate as turn } from "node:timers/promises";
      import { BlockDevice } from ${JSON.stringify(INDEX)};
      import { FakeTransport, takeBlk } from ${JSON.stringify(TESTING)};
      import { encodeBlkConfig } from ${JSON.stringify(PROTOCOL)};
      process.on("uncaughtException", (error) => console.log("uncaught:", error.message));
      const transport = new FakeTransport({
        config: encodeBlkConfig({ capacity: 2048n }),
        onNotify: (queue) => takeBlk(queue).forEach((request) => request.answer({ data: new Uint8Array(request.room) })),
      });
      const disk = await BlockDevice.open(transport);
      disk.on("config", () => { throw new Error("mine of config"); });
      disk.on("resize", (capacity) => console.log("resize", capacity));
      transport.changeConfig(Uint8Array.of(16, 0));
      await turn();
      console.log((await disk.read(new Uint8Array(512))).bytesRead);
      disk.on("lost", () => { throw new Error("mine of lost"); });
      transport.lose(new Error("gone"));
      await turn();
      await disk.read(new Uint8Array(512)).catch((error) => console.log(error.code));
      await disk.close();
      console.log(transport.regionsMapped - transport.regionsClosed);
    `);
    assert.equal(
      stdout,
      "resize 8192\nuncaught: mine of config\n512\nuncaught: mine of lost\nERR_VIRTIO_DISCONNECTED\n0\n",
    );
    assert.deepEqual([status, stderr], [0, ""]);
  });
});
