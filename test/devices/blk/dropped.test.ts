/** Devices that are dropped without close: told, and closed all the same; but not while anybody needs them. */

import assert from "node:assert/strict";
import { subscribe, unsubscribe } from "node:diagnostics_channel";
import { setImmediate as nextTurn } from "node:timers/promises";
import { describe, type TestContext, test } from "node:test";
import { BlockDevice } from "../../../src/devices/blk/index.js";
import type { FakeTransport } from "../../../src/testing/index.js";
import { takeBlk } from "../../../src/testing/index.js";
import { collectGarbage } from "../../sys/helpers.js";
import { answerRead, makeTransport } from "./support.js";

/** Warnings about dropped devices, from now to the end of the test. */
function warnings(t: TestContext): Error[] {
  const heard: Error[] = [];
  const hear = (warning: Error): void => {
    if ("code" in warning && warning.code === "WARN_VIRTIO_DROPPED") heard.push(warning);
  };
  process.on("warning", hear);
  t.after(() => process.off("warning", hear));
  return heard;
}

/** Collect until `isDone`; what is never collected runs into the time limit of the test. */
async function collectUntil(isDone: () => boolean): Promise<void> {
  while (!isDone()) {
    collectGarbage();
    await nextTurn();
  }
}

/** Collect as often as is enough elsewhere. */
async function collectInVain(): Promise<void> {
  for (let i = 0; i < 20; i++) {
    collectGarbage();
    await nextTurn();
  }
}

const isClosed = ({ regionsMapped, regionsClosed }: FakeTransport): boolean => regionsMapped === regionsClosed;

describe("a device that is dropped without close", { timeout: 30_000 }, () => {
  for (const mode of ["event", "hybrid", "poll"] as const) {
    test(`is reported and closed, mode ${mode}, whatever it was told to look at and who listens`, async (t) => {
      const heard = warnings(t);
      const closed: unknown[] = [];
      const hear = (message: unknown): unknown => closed.push(message);
      subscribe("virtio:device:close", hear);
      t.after(() => unsubscribe("virtio:device:close", hear));
      const transport = makeTransport({ onNotify: (queue) => takeBlk(queue).forEach(answerRead) });
      await (async () => {
        const disk = await BlockDevice.open(transport, { mode, configPoll: 1 });
        disk.on("lost", () => assert.fail(`nobody lost ${disk.address}`));
        disk.on("resize", () => disk.stats());
        const reading = disk.read(new Uint8Array(512));
        await nextTurn();
        if (mode === "poll") disk.poll();
        await reading;
      })();
      await collectUntil(() => isClosed(transport));
      assert.equal(transport.steps.at(-1), "close");
      await nextTurn();
      assert.deepEqual(closed, [{ address: "fake:", dropped: true }]);
      assert.equal(heard.length, 1);
      assert.match(heard[0].message, /^fake: was dropped without close\(\)/);
    });
  }

  test("finishes what is in flight first", async (t) => {
    const heard = warnings(t);
    const transport = makeTransport();
    const reading = await (async () => {
      const disk = await BlockDevice.open(transport);
      return [disk.read(new Uint8Array(512))];
    })();
    await nextTurn();
    const [request] = takeBlk(transport.queues[0]);
    await collectInVain();
    assert.ok(!isClosed(transport));
    answerRead(request);
    assert.equal((await reading[0]).bytesRead, 512);
    await collectUntil(() => isClosed(transport));
    await nextTurn();
    assert.equal(heard.length, 1);
  });

  test("lives on while somebody has a queue or a buffer of it", async (t) => {
    const heard = warnings(t);
    const transport = makeTransport();
    const parts = await (async () => {
      const disk = await BlockDevice.open(transport, { mode: "poll" });
      return { buffer: await disk.allocate(512), queue: disk.takeQueue() };
    })();
    await collectInVain();
    assert.ok(!isClosed(transport));
    assert.ok(parts.queue.submitRead(0, parts.buffer, 0, 512) >= 0);
    parts.queue.kick();
    answerRead(takeBlk(transport.queues[0])[0]);
    assert.equal(parts.queue.poll(), 1);
    assert.deepEqual(heard, []);
    await transport.close();
  });

  test("closed devices are no matter", async (t) => {
    const heard = warnings(t);
    await (async () => {
      const disk = await BlockDevice.open(makeTransport());
      await disk.close();
    })();
    await collectInVain();
    assert.deepEqual(heard, []);
  });
});
