/** No descriptor left at the wrong moment: what was begun is taken back, and a device that is closed is closed. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { BlockDevice } from "../../../src/devices/blk/index.js";
import { BlkFeature } from "../../../src/protocol/blk.js";
import { layerNative } from "../../support/native.js";
import { openFds, turnUntil } from "../../sys/helpers.js";
import { failure, makeTransport } from "./support.js";

const EMFILE = 24;

/** Watches that still succeed; then one fails. */
let watchesLeft = Number.POSITIVE_INFINITY;
layerNative((addon) => ({
  watch: (fd, drains, writable, callback) =>
    watchesLeft-- === 0 ? -EMFILE : addon.watch(fd, drains, writable, callback),
}));

function twoQueues() {
  return makeTransport({ features: BlkFeature.MQ, config: { numQueues: 2 }, maxQueues: 2 });
}

test("a queue that cannot be watched: those before it are watched no more", async () => {
  await (await BlockDevice.open(twoQueues(), { queues: 2 })).close();
  const before = openFds();
  const transport = twoQueues();
  watchesLeft = 3; // the fake device's own, one a queue, and the first queue's
  await assert.rejects(BlockDevice.open(transport, { queues: 2 }), failure("ERR_VIRTIO_SYSCALL", "EMFILE"));
  assert.equal(watchesLeft, -1);
  assert.equal(transport.steps.at(-1), "close");
  assert.equal(openFds(), before);
});

test("a queue that cannot be watched for what is pending at the end: the device is closed all the same", async () => {
  const before = openFds();
  watchesLeft = Number.POSITIVE_INFINITY;
  const transport = twoQueues();
  const disk = await BlockDevice.open(transport, { mode: "poll" });
  const reading = assert.rejects(disk.read(new Uint8Array(512)), failure("ERR_VIRTIO_CLOSED"));
  watchesLeft = 0;
  await assert.rejects(disk.close(), failure("ERR_VIRTIO_SYSCALL", "EMFILE"));
  await reading;
  assert.equal(transport.steps.at(-1), "close");
  assert.ok(await turnUntil(() => openFds() === before));
});
