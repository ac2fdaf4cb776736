/** A block device over vhost-vdpa: everything that a disk must do, over a kernel and a disk that check every byte. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { BlockDevice } from "../../../src/devices/blk/index.js";
import { VirtioFeature } from "../../../src/virtqueue/index.js";
import { writeAndVerify, zeroAndVerify } from "../../support/block-suite.js";
import { held, virtioError } from "../support.js";
import { turnUntil } from "../../sys/helpers.js";
import { RINGS } from "../../devices/blk/support.js";
import { diskKernel, openDisk } from "./support.js";

const MODES = ["event", "hybrid", "poll"] as const;

describe("block device", () => {
  for (const [i, [name, features]] of Object.entries(RINGS).entries()) {
    const mode = MODES[i % MODES.length];
    test(`BASIC-DRV-32 ${name}, ${mode}, 2 queues: what is written is read back, on memory that was mapped`, async (t) => {
      const { kernel, checked } = diskKernel(features);
      const disk = await openDisk(t, kernel, { mode, queues: 2 });
      assert.equal(disk.info.format, (features & VirtioFeature.RING_PACKED) === 0n ? "split" : "packed");
      assert.deepEqual([disk.info.queues, disk.info.maxQueues, disk.info.queueSize], [2, 2, 64]);
      assert.ok(disk.info.features.includes("ACCESS_PLATFORM"));
      const model = await writeAndVerify(disk, 16, 20 + i);
      await zeroAndVerify(disk, model);
      assert.deepEqual(Buffer.compare(checked.bytes, model), 0);
      assert.deepEqual(checked.faults, []);
      await disk.close();
      assert.equal(kernel.mappings, 0);
    });
  }

  test("a queue is handed over: its kick and its completion are eventfds that another thread can use", async (t) => {
    const { kernel } = diskKernel();
    const disk = await openDisk(t, kernel, { queues: 2, mode: "event" });
    const other = await BlockDevice.adopt(await disk.handOver({ memory: 1 << 20 }));
    await other.write(new Uint8Array(4096).fill(9), { position: 4096 });
    const { buffer } = await disk.read(new Uint8Array(4096), { position: 4096 });
    assert.equal(buffer[4095], 9);
    assert.ok(kernel.log.includes("kick 1"));
    await other.close();
  });

  test("memory that is asked for later is mapped while queues run", async (t) => {
    const { kernel } = diskKernel();
    const disk = await openDisk(t, kernel, { queues: 1 });
    assert.equal(kernel.mappings, 1);
    const buffer = await disk.allocate(60 << 20);
    assert.equal(kernel.mappings, 2);
    buffer.bytes.fill(4);
    await disk.write(buffer, { length: 1 << 20 });
    buffer.release();
  });

  test("closed under load: every call ends, and nothing is left", async () => {
    const before = held();
    const { kernel } = diskKernel();
    const { VhostVdpa } = await import("../../../src/transports/index.js");
    const disk = await BlockDevice.open(await VhostVdpa.open({ node: kernel.open() }), { queues: 2 });
    const calls = Array.from({ length: 200 }, (_, i) => disk.read(new Uint8Array(65_536), { position: i * 512 }));
    const closing = disk.close();
    const ends = await Promise.allSettled(calls);
    await closing;
    for (const end of ends) {
      if (end.status === "rejected") virtioError("ERR_VIRTIO_CLOSED")(end.reason);
    }
    assert.equal(kernel.log.at(-1), "close");
    assert.deepEqual(held(), before);
  });

  test("BASIC-DRV-23 closed with requests that the device holds: it is reset before the memory goes", async (t) => {
    const { kernel } = diskKernel(0n, { onNotify: () => {} });
    const disk = await openDisk(t, kernel);
    const reading = assert.rejects(disk.read(new Uint8Array(512)), virtioError("ERR_VIRTIO_CLOSED"));
    assert.ok(await turnUntil(() => kernel.log.includes("kick 0")));
    t.mock.timers.enable({ apis: ["setTimeout"] });
    const closing = disk.close();
    t.mock.timers.tick(6000);
    await closing;
    t.mock.timers.reset();
    await reading;
    const end = kernel.log.slice(-4).map((line) => line.split(" ").slice(0, 2).join(" "));
    assert.deepEqual(end, ["SET_STATUS 0", "GET_STATUS", "IOTLB_INVALIDATE 0x200000", "close"]);
  });
});
