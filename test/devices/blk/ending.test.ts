/** How a device ends: closed, lost, broken, or with a config space that makes no sense any more. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { VirtioError } from "../../../src/errors.js";
import { BlkFeature } from "../../../src/protocol/blk.js";
import { answerRead, failure, openFake, pattern, refused, RINGS, serveAll, turn } from "./support.js";

const gone = () => new VirtioError("ERR_VIRTIO_DISCONNECTED", "the device is gone");

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
    disk.on("lost", () => told++);
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
    disk.on("lost", () => assert.fail("lost"));
    disk.on("config", () => assert.fail("config"));
    await disk.close();
    await turn();
  });

  test("a config change while closing is of no interest", async (t) => {
    const bench = await openFake(t);
    bench.disk.on("lost", () => assert.fail("lost"));
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
      disk.on("lost", (error) => losses.push(error));
      const error = gone();
      const same = (got: unknown): boolean => got === error;
      const lent = await disk.allocate(512);
      const [second, third] = [await disk.allocate(512), await disk.allocate(512)];
      const calls = [
        disk.read(lent),
        disk.read(new Uint8Array(512)),
        disk.writev([new Uint8Array(512), second]),
        disk.flush(),
        disk.getId(),
        disk.read(third, { signal: new AbortController().signal }),
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
        disk.on("lost", (error) => losses.push(error));
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
    disk.on("resize", (capacity) => seen.push(capacity));
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
    bench.disk.on("lost", (error) => losses.push(error));
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
