/** Every lie of the hostile device, told to an open block device: no request suffers from what is said of another. */

import assert from "node:assert/strict";
import { describe, type TestContext, test } from "node:test";
import type { CompletionMode } from "../../../src/devices/blk/index.js";
import { VirtioError } from "../../../src/errors.js";
import { HostileDevice, LIES, type Lie } from "../../../src/testing/index.js";
import { VirtioFeature } from "../../../src/virtqueue/index.js";
import { answerRead, failure, openFake, pattern, RINGS, turn } from "./support.js";

const MODES: readonly CompletionMode[] = ["event", "hybrid", "poll"];
const UNTOUCHED = 0xee;
const LENGTH = 1024;

/** Lies after which the honest half of the device finds nothing any more in what it rewrote itself. */
const RUINOUS = ["descriptors-rewritten", "next-cyclic", "avail-rewritten"];

/** Tell `lie` of the first of three reads; it goes to a lent buffer or to plain memory. */
async function tellOf(t: TestContext, lie: Lie, features: bigint, mode: CompletionMode, lent: boolean): Promise<void> {
  const bench = await openFake(t, { features, open: { mode, queueSize: 16 } });
  const { disk, transport } = bench;
  const isPacked = (features & VirtioFeature.RING_PACKED) !== 0n;
  let lost = 0;
  disk.on("lost", () => lost++);
  const victim = lent ? await disk.allocate(LENGTH) : new Uint8Array(LENGTH);
  const bytes = victim instanceof Uint8Array ? victim : victim.bytes;
  bytes.fill(UNTOUCHED);
  const others = [new Uint8Array(LENGTH).fill(UNTOUCHED), new Uint8Array(LENGTH).fill(UNTOUCHED)];
  const settled: (PromiseSettledResult<{ bytesRead: number }> | undefined)[] = [undefined, undefined, undefined];
  const calls = [victim, ...others].map(async (buffer, i) => {
    [settled[i]] = await Promise.allSettled([disk.read(buffer, { position: (i + 1) * LENGTH })]);
  });
  const requests = await bench.take();
  const data = pattern(LENGTH, requests[0].sector);
  const hostile = new HostileDevice(bench.queue.device, () => bench.queue.interrupt());
  const look = async (): Promise<void> => {
    if (mode === "poll") disk.poll();
    await turn();
    await turn();
  };

  if (lie.name === "id-unpublished") {
    // What the driver has written and not published is gone by the end of its turn; until then it cannot look.
    hostile.forge(hostile.size - 1, 0);
    bench.queue.interrupt();
  } else if (lie.outcome !== "fails" || lie.name === "status-unknown") {
    requests[0].raw.write(data);
    hostile.tell(lie.name)();
  } else {
    const rest = hostile.tell(lie.name);
    if (mode === "poll") disk.poll();
    else await calls[0];
    rest();
  }

  if (lie.outcome === "breaks") {
    const broken = failure("ERR_VIRTIO_QUEUE_BROKEN");
    if (mode === "poll") assert.throws(() => disk.poll(), broken);
    await Promise.all(calls);
    for (const [i, result] of settled.entries()) {
      // What came before the lie was found is as good as ever, or has no status.
      if (i === 0 && lie.name === "id-twice") assert.equal(result?.status, "fulfilled");
      else if (result?.status !== "rejected") assert.fail(`call ${i} succeeded`);
      else if (i === 0 && lie.name === "flood" && isPacked) assert.ok(failure("ERR_VIRTIO_STATUS")(result.reason));
      else assert.ok(broken(result.reason));
    }
    for (const other of others)
      assert.ok(
        other.every((byte) => byte === UNTOUCHED),
        "data that nobody delivered",
      );
    assert.equal(lost, 1);
    await assert.rejects(disk.read(new Uint8Array(512)), broken);
    await disk.close();
    assert.equal(transport.regionsMapped, transport.regionsClosed);
    return;
  }

  await look();
  if (lie.outcome === "nothing") {
    assert.deepEqual(settled, [undefined, undefined, undefined]);
    requests[0].answer({ data });
  }
  if (bench.queue.device.held.length > 0) for (const request of requests.slice(1)) answerRead(request);
  bench.queue.interrupt();
  if (mode === "poll") disk.poll();
  await Promise.all(calls);

  const first = settled[0];
  if (lie.outcome === "fails") {
    assert.ok(first?.status === "rejected" && failure("ERR_VIRTIO_STATUS")(first.reason));
    if (!lent)
      assert.ok(
        bytes.every((byte) => byte === UNTOUCHED),
        "data of a request that failed",
      );
  } else {
    assert.equal(first?.status, "fulfilled");
    const bytesRead = lie.outcome === "short" ? 0 : LENGTH;
    assert.equal(first.value.bytesRead, bytesRead);
    if (bytesRead > 0) assert.deepEqual(bytes, data);
    else if (!lent)
      assert.ok(
        bytes.every((byte) => byte === UNTOUCHED),
        "data beyond bytesRead",
      );
  }
  if (lie.name !== "batch-unwritten") {
    for (const [i, other] of others.entries()) {
      assert.equal(settled[i + 1]?.status, "fulfilled");
      assert.deepEqual(other, pattern(LENGTH, requests[i + 1].sector));
    }
  }
  assert.deepEqual([disk.pending, lost], [0, 0]);
  if (!RUINOUS.includes(lie.name)) {
    const again = disk.read(victim, { position: 0 });
    answerRead(await bench.takeOne());
    bench.queue.interrupt();
    if (mode === "poll") disk.poll();
    assert.equal((await again).bytesRead, LENGTH);
    assert.deepEqual(bytes, pattern(LENGTH, 0));
  }
}

for (const [name, features] of Object.entries(RINGS)) {
  describe(`a block device that lies, ${name}`, () => {
    const format = (features & VirtioFeature.RING_PACKED) === 0n ? "split" : "packed";
    const hasOrder = (features & VirtioFeature.IN_ORDER) !== 0n;
    for (const lie of LIES) {
      if ((lie.format ?? format) !== format || (lie.inOrder === true && !hasOrder)) continue;
      test(`${lie.name}: ${lie.what}`, async (t) => {
        for (const mode of MODES) for (const lent of [true, false]) await tellOf(t, lie, features, mode, lent);
      });
    }

    test("used entries before anything was asked", async (t) => {
      const bench = await openFake(t, { features });
      new HostileDevice(bench.queue.device).forge(0, 1);
      bench.queue.interrupt();
      await turn();
      const read = bench.disk.read(new Uint8Array(512));
      if (format === "split") {
        await assert.rejects(read, failure("ERR_VIRTIO_QUEUE_BROKEN"));
      } else {
        answerRead(await bench.takeOne());
        assert.equal((await read).bytesRead, 512);
      }
    });
  });
}

test("a storm of notifications keeps nobody else from running", async (t) => {
  for (const mode of ["event", "hybrid"] as const) {
    const bench = await openFake(t, { open: { mode } });
    const read = bench.disk.read(new Uint8Array(512));
    const request = await bench.takeOne();
    for (let i = 0; i < 200; i++) {
      bench.queue.interrupt();
      await turn();
    }
    answerRead(request);
    assert.equal((await read).bytesRead, 512);
  }
});

test("a device that answers as fast as it is asked keeps nobody else from running", async (t) => {
  const bench = await openFake(t, { open: { mode: "event" } });
  const queue = bench.disk.takeQueue();
  const buffer = await bench.disk.allocate(512);
  let completed = 0;
  queue.onComplete = () => {
    completed++;
    queue.submitRead(0, buffer, 0, 512);
    queue.kick();
    for (const request of bench.queue.take()) {
      request.write(new Uint8Array(513));
      bench.queue.complete(request);
    }
  };
  queue.submitRead(0, buffer, 0, 512);
  queue.kick();
  for (const request of bench.queue.take()) bench.queue.complete(request.write(new Uint8Array(513)));
  for (let i = 0; i < 5; i++) await turn();
  assert.ok(completed > queue.queueSize, `${completed} completions`);
  queue.fail(new VirtioError("ERR_VIRTIO_CLOSED", "the test is over"));
});
