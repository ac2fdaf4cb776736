/** The channels that tell of devices, queues and requests, and what NODE_DEBUG=virtio prints of them. */

import assert from "node:assert/strict";
import { subscribe, unsubscribe } from "node:diagnostics_channel";
import { readFileSync } from "node:fs";
import { describe, type TestContext, test } from "node:test";
import { fileURLToPath } from "node:url";
import { RamStorage, VhostUserBackend } from "../src/backend/index.js";
import { BlockDevice, type DiagnosticMessages, openBlock, VirtioError } from "../src/index.js";
import { BlkFeature } from "../src/protocol/blk.js";
import { backendFor, pattern, until } from "./backend/support.js";
import { SlowStorage } from "./backend/slow-storage.js";
import { failure, openFake } from "./devices/blk/support.js";
import { runChild } from "./sys/helpers.js";

const MIB = 1024 * 1024;
type Name = keyof DiagnosticMessages;

/** Messages of a channel from now to the end of the test, each checked to be a plain object. */
function listen<N extends Name>(t: TestContext, name: N): DiagnosticMessages[N][] {
  const heard: DiagnosticMessages[N][] = [];
  const hear = (message: unknown): void => {
    assert.ok(typeof message === "object" && message !== null);
    assert.equal(Object.getPrototypeOf(message), Object.prototype, name);
    heard.push(message as DiagnosticMessages[N]);
  };
  subscribe(name, hear);
  t.after(() => unsubscribe(name, hear));
  return heard;
}

/** All three channels of requests. */
function requests(t: TestContext) {
  return {
    start: listen(t, "virtio:request:start"),
    end: listen(t, "virtio:request:end"),
    error: listen(t, "virtio:request:error"),
  };
}

describe("virtio:request channels", () => {
  test("every call has a start and an end with the same id, in its words", async (t) => {
    const { backend } = backendFor(t, new RamStorage(MIB));
    await using disk = await openBlock(`vhost-user:${backend.path}`);
    const { start, end, error } = requests(t);
    const lent = await disk.allocate(4096);
    await disk.read(lent, { position: 8192 });
    await disk.write(lent, { position: 512, length: 1024 });
    await disk.read(new Uint8Array(512));
    await disk.readv([new Uint8Array(512), lent], { position: 1024 });
    await disk.writev([lent], { position: 4096 });
    await disk.flush();
    await disk.discard([
      { position: 4096, length: 512 },
      { position: 0, length: 1024 },
    ]);
    await disk.writeZeroes({ position: 512, length: 512 });
    await disk.getId();
    const { address } = disk;
    const expected = [
      ["read", 8192, 4096, 4096],
      ["write", 512, 1024, 1024],
      ["read", 0, 512, 512],
      ["readv", 1024, 4608, 4608],
      ["writev", 4096, 4096, 4096],
      ["flush", undefined, 0, 0],
      ["discard", 4096, 1536, 0],
      ["writeZeroes", 512, 512, 0],
      ["getId", undefined, 0, 0],
    ] as const;
    const first = start[0].id;
    assert.deepEqual(
      start,
      expected.map(([operation, position, length], i) => ({ id: first + i, address, operation, position, length })),
    );
    end.forEach(({ duration, transferred, ...rest }, i) => {
      assert.ok(duration > 0);
      assert.equal(transferred, expected[i][3]);
      assert.deepEqual(rest, start[i]);
    });
    assert.equal(end.length, expected.length);
    assert.deepEqual(error, []);
  });

  test("a call that fails has an error instead of an end: by the device, by time, by its signal", async (t) => {
    const storage = new SlowStorage();
    t.after(() => storage.release());
    const { backend } = backendFor(t, storage);
    await using disk = await openBlock(`vhost-user:${backend.path}`);
    const { start, end, error } = requests(t);
    const lent = await disk.allocate(512);
    const bad = assert.rejects(disk.read(lent), failure("ERR_VIRTIO_IO"));
    await until(() => storage.calls.length === 1);
    storage.finish("read", new Error("worn out"));
    await bad;
    await assert.rejects(disk.write(lent, { timeout: 1 }), failure("ERR_VIRTIO_TIMEOUT"));
    const reason = new Error("changed my mind");
    await assert.rejects(disk.flush({ signal: AbortSignal.abort(reason) }), (got) => got === reason);
    await assert.rejects(disk.read(lent, { position: 1 }), RangeError);
    assert.equal(start.length, 3, "a call with a wrong argument never began");
    assert.deepEqual(
      error.map((message) => [message.id, message.operation, message.duration >= 0]),
      start.map(({ id, operation }) => [id, operation, true]),
    );
    assert.deepEqual(
      error.map((message) => (message.error instanceof VirtioError ? message.error.code : message.error)),
      ["ERR_VIRTIO_IO", "ERR_VIRTIO_TIMEOUT", reason],
    );
    assert.deepEqual(end, []);
    await until(() => storage.calls.length === 1);
    storage.finish("write");
  });

  test("one subscriber of any of them is enough; without, a read of lent memory takes its fast way", async (t) => {
    const bench = await openFake(t);
    const lent = await bench.disk.allocate(512);
    for (const name of ["virtio:request:start", "virtio:request:end", "virtio:request:error"] as const) {
      const hear = (): void => {
        seen++;
      };
      let seen = 0;
      subscribe(name, hear);
      const status = name.endsWith("error") ? 1 : 0;
      const reading = bench.disk.read(lent).catch(() => undefined);
      (await bench.takeOne()).answer({ status, data: pattern(512) });
      await reading;
      unsubscribe(name, hear);
      assert.equal(seen, 1, name);
      const unheard = bench.disk.read(lent);
      (await bench.takeOne()).answer({ data: pattern(512) });
      await unheard;
      assert.equal(seen, 1);
    }
  });

  test("nobody's rejection is hidden by those who watch", () => {
    const INDEX = JSON.stringify(new URL("../src/index.js", import.meta.url).href);
    const { stdout } = runChild(`
      import { subscribe } from "node:diagnostics_channel";
      import { openBlock } from ${INDEX};
      const disk = await openBlock("ram:1M");
      subscribe("virtio:request:error", () => console.log("watched"));
      process.on("unhandledRejection", async (reason) => {
        console.log("unhandled", reason.message);
        await disk.close();
      });
      void disk.read(await disk.allocate(512), { signal: AbortSignal.abort(new Error("mine")) });
    `);
    assert.equal(stdout, "watched\nunhandled mine\n");
  });
});

describe("virtio:device and virtio:queue channels", () => {
  test("open, config, resize, close of a disk on a back-end", async (t) => {
    const opened = listen(t, "virtio:device:open");
    const changed = listen(t, "virtio:device:config");
    const resized = listen(t, "virtio:device:resize");
    const closed = listen(t, "virtio:device:close");
    const { backend } = backendFor(t, new RamStorage(MIB));
    const disk = await openBlock(`vhost-user:${backend.path}`, { queueSize: 64, mode: "event", readOnly: true });
    const { address } = disk;
    assert.equal(opened.length, 1);
    const { regions, offered, features, ...rest } = opened[0];
    assert.deepEqual(rest, {
      ...{ address, adopted: false, capacity: MIB, blockSize: 512, readOnly: true, format: "packed", queues: 1 },
      ...{ queueSize: 64, mode: "event" },
    });
    assert.deepEqual([offered, features], [disk.info.offered, disk.info.features]);
    assert.ok(regions.length === 1 && regions[0].size >= 64 * MIB && regions[0].iova > 0);
    await backend.resize(2 * MIB);
    await until(() => resized.length === 1);
    assert.deepEqual(changed, [{ address, config: disk.config }]);
    assert.deepEqual(resized, [{ address, capacity: 2 * MIB, previous: MIB }]);
    assert.deepEqual(closed, []);
    await disk.close();
    assert.deepEqual(closed, [{ address, dropped: false }]);
  });

  test("lost: a back-end that ends", async (t) => {
    const lost = listen(t, "virtio:device:lost");
    const { backend } = backendFor(t, new RamStorage(MIB));
    await using disk = await openBlock(`vhost-user:${backend.path}`, { reconnect: false });
    await backend.close();
    await until(() => lost.length === 1);
    assert.equal(lost[0].address, disk.address);
    await assert.rejects(disk.getId(), (error) => error === lost[0].error);
  });

  test("broken: a device that lies on one of its queues, asleep and polled", async (t) => {
    const broken = listen(t, "virtio:queue:broken");
    const lost = listen(t, "virtio:device:lost");
    for (const mode of ["event", "poll"] as const) {
      const open = { queues: 2, mode };
      const bench = await openFake(t, { features: BlkFeature.MQ, config: { numQueues: 2 }, maxQueues: 2, open });
      const calls = [1, 2].map(() => assert.rejects(bench.disk.getId(), failure("ERR_VIRTIO_QUEUE_BROKEN")));
      await bench.take();
      bench.transport.queues[1].device.forge(0xffff, 1);
      bench.transport.queues[1].publish();
      if (mode === "poll") assert.throws(() => bench.disk.poll(), failure("ERR_VIRTIO_QUEUE_BROKEN"));
      await Promise.all(calls);
      const message = broken.pop();
      assert.deepEqual({ ...message, error: undefined }, { address: "fake:", queue: 1, error: undefined });
      assert.equal(message?.error, lost.pop()?.error);
      assert.deepEqual(broken, []);
    }
  });

  test("open and close of a device that another thread opened, and lost when that one closes it", async (t) => {
    const opened = listen(t, "virtio:device:open");
    const closed = listen(t, "virtio:device:close");
    const lost = listen(t, "virtio:device:lost");
    await using disk = await openBlock("ram:1M", { queues: 2 });
    const adopted = await BlockDevice.adopt(await disk.handOver());
    assert.deepEqual(
      opened.map((message) => [message.adopted, message.queues, message.capacity]),
      [
        [false, 2, MIB],
        [true, 1, MIB],
      ],
    );
    await disk.close();
    await adopted.close();
    assert.equal(closed.length, 2);
    assert.deepEqual(
      lost.map(({ error }) => error.code),
      ["ERR_VIRTIO_CLOSED"],
    );
  });

  test("subscribers that throw harm no device", () => {
    const INDEX = JSON.stringify(new URL("../src/index.js", import.meta.url).href);
    const { stdout } = runChild(`
      import { subscribe } from "node:diagnostics_channel";
      import { openBlock } from ${INDEX};
      process.on("uncaughtException", (error) => console.log(error.message));
      for (const name of ["virtio:device:open", "virtio:request:start", "virtio:request:end", "virtio:device:close"]) {
        subscribe(name, () => { throw new Error(name); });
      }
      const disk = await openBlock("ram:1M");
      console.log((await disk.read(new Uint8Array(512))).bytesRead);
      await disk.close();
    `);
    assert.deepEqual(stdout.trim().split("\n").sort(), [
      "512",
      "virtio:device:close",
      "virtio:device:open",
      "virtio:request:end",
      "virtio:request:start",
    ]);
  });

  for (const tracked of [false, true]) {
    test(`disconnect, reconnecting, replay, reconnect: a back-end that comes back, ${tracked ? "tracked" : "untracked"}`, async (t) => {
      const gone = listen(t, "virtio:device:disconnect");
      const attempts = listen(t, "virtio:device:reconnecting");
      const replays = listen(t, "virtio:queue:replay");
      const back = listen(t, "virtio:device:reconnect");
      const lost = listen(t, "virtio:device:lost");
      const { backend } = backendFor(t, new RamStorage(MIB), { inflight: tracked });
      const { path } = backend;
      await using disk = await openBlock(`vhost-user:${path}`, { reconnect: { minDelay: 1, maxDelay: 1 } });
      const { address } = disk;
      await backend.close();
      await until(() => gone.length === 1);
      assert.deepEqual([gone[0].address, gone[0].error.code], [address, "ERR_VIRTIO_DISCONNECTED"]);
      const reading = disk.read(new Uint8Array(512));
      const late = assert.rejects(disk.read(new Uint8Array(512), { timeout: 1 }), failure("ERR_VIRTIO_TIMEOUT"));
      await late;
      assert.equal(disk.stats().queues[0].abandoned, 1);
      const other = VhostUserBackend.listen({ path, storage: new RamStorage(MIB), inflight: tracked });
      t.after(() => other.close());
      assert.equal((await reading).bytesRead, 512);
      await until(() => back.length === 1);
      assert.ok(attempts.length > 0);
      attempts.forEach((message, i) => {
        assert.deepEqual({ ...message, delay: 0 }, { address, attempt: i + 1, delay: 0 });
        assert.ok(message.delay >= 0 && message.delay <= 1);
      });
      // The one whose call has ended is the back-end's to carry out when it knows of it; the driver lets go of it.
      const replayed = tracked ? 2 : 1;
      assert.deepEqual(replays, [{ address, queue: 0, replayed, tracked }]);
      const made = { attempts: attempts.length, replayed, tracked, unflushed: 0 };
      assert.deepEqual(back, [{ address, ...made }]);
      assert.deepEqual(lost, []);
      await until(() => disk.stats().queues[0].inFlight === 0);
      const { reconnects, lentBytes, queues } = disk.stats();
      assert.deepEqual([reconnects, lentBytes, queues[0].abandoned], [1, 0, 0]);
      assert.equal(queues[0].replayed, tracked ? 0 : 1);
    });
  }
});

describe("NODE_DEBUG=virtio", () => {
  const INDEX = JSON.stringify(new URL("../src/index.js", import.meta.url).href);
  const DIAGNOSTICS = JSON.stringify(new URL("../src/diagnostics.js", import.meta.url).href);
  const BACKEND = JSON.stringify(new URL("../src/backend/index.js", import.meta.url).href);
  const debug = { env: { ...process.env, NODE_DEBUG: "virtio" } };

  test("prints what was agreed on, changes of the size, and the end", () => {
    const program = `
      import { once } from "node:events";
      import { mkdtempSync } from "node:fs";
      import { openBlock } from ${INDEX};
      import { RamStorage, VhostUserBackend } from ${BACKEND};
      const path = mkdtempSync("/tmp/virtio-debug-") + "/disk.sock";
      const backend = VhostUserBackend.listen({ path, storage: new RamStorage(1048576) });
      const disk = await openBlock("vhost-user:" + path, { packed: false, queueSize: 32 });
      await disk.read(new Uint8Array(512));
      const resized = once(disk, "resize");
      await backend.resize(2097152);
      await resized;
      await disk.close();
      await backend.close();
    `;
    const { stderr } = runChild(program, debug);
    const lines = stderr
      .trim()
      .split("\n")
      .map((line) => line.replace(/^VIRTIO \d+: vhost-user:\S+ /, ""));
    assert.deepEqual(lines.slice(0, 1).concat(lines.slice(2, 3)), [
      "is open: 1048576 bytes, blocks of 512",
      "queues: 1 split, 32 descriptors each, mode hybrid",
    ]);
    assert.match(lines[1], /^features: .*VERSION_1.*; offered, not accepted: .*RING_PACKED/);
    assert.match(lines[3], /^memory: \d+ bytes at 0x[0-9a-f]+$/);
    assert.deepEqual(lines.slice(4), [
      "changed its config space",
      "has 2097152 bytes now, 1048576 before",
      "is closed",
    ]);
    assert.equal(runChild(program).stderr, "", "and nothing without it");
  });

  test("prints outages and losses", () => {
    const { stderr } = runChild(
      `
      import { publish } from ${DIAGNOSTICS};
      import { VirtioError } from ${INDEX};
      const address = "fake:";
      const error = new VirtioError("ERR_VIRTIO_DISCONNECTED", "gone");
      publish("virtio:device:disconnect", { address, error });
      publish("virtio:device:reconnecting", { address, attempt: 1, delay: 12 });
      publish("virtio:queue:replay", { address, queue: 3, replayed: 5, tracked: true });
      publish("virtio:queue:replay", { address, queue: 4, replayed: 2, tracked: false });
      publish("virtio:device:reconnect", { address, attempts: 1, replayed: 7, tracked: true, unflushed: 2 });
      publish("virtio:queue:broken", { address, queue: 3, error });
      publish("virtio:device:lost", { address, error });
      publish("virtio:device:close", { address, dropped: true });
    `,
      debug,
    );
    assert.deepEqual(
      stderr
        .trim()
        .replaceAll(/^VIRTIO \d+: fake: /gm, "")
        .split("\n"),
      [
        "is disconnected: ERR_VIRTIO_DISCONNECTED: gone",
        "attempt 1 to reconnect begins in 12 ms",
        "queue 3: 5 requests in flight are submitted again by the back-end",
        "queue 4: 2 requests in flight are submitted again by the driver",
        "is connected again after 1 attempts: 7 requests submitted again, 2 changes unflushed",
        "queue 3 is broken: gone",
        "is lost: ERR_VIRTIO_DISCONNECTED: gone",
        "is closed, after it was dropped",
      ],
    );
  });
});

test("the guide lists every channel with its fields", () => {
  const root = new URL("../../", import.meta.url);
  const source = readFileSync(fileURLToPath(new URL("src/diagnostics.ts", root)), "utf8");
  const guide = readFileSync(fileURLToPath(new URL("docs/guide.md", root)), "utf8");
  const names = new Set([...source.matchAll(/"(virtio:[a-z]+:[a-z]+)"/g)].map(([, name]) => name));
  assert.equal(names.size, 13);
  for (const name of names) assert.ok(new RegExp(`^\\| \`${name}\` +\\| \\S`, "m").test(guide), name);
});
