/** Config space on vhost-vdpa: bounds, consistency without a generation counter, changes that the device tells of. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { BlkFeature, encodeBlkConfig } from "../../../src/protocol/blk.js";
import { VhostVdpaRequest } from "../../../src/protocol/index.js";
import { FakeVhostVdpa } from "../../../src/testing/index.js";
import { VhostVdpa } from "../../../src/transports/index.js";
import { turnUntil } from "../../sys/helpers.js";
import { virtioError } from "../support.js";
import { diskKernel, MODERN, open, openDisk, openRunning } from "./support.js";

const CONFIG = Uint8Array.from({ length: 60 }, (_, i) => i);

/** A device whose config space is what `next` says, read by read. */
async function changing(next: (reads: number) => number) {
  const node = new FakeVhostVdpa({ config: CONFIG }).open();
  let reads = 0;
  return VhostVdpa.open({
    node: {
      ...node,
      ioctl(request, argument) {
        node.ioctl(request, argument);
        if (request === VhostVdpaRequest.GET_CONFIG) argument?.fill(next(reads++), 8);
      },
    },
  });
}

describe("reading", () => {
  test("BASIC-DRV-15 gives any stretch of it, and nothing beyond its size is asked of the kernel", async (t) => {
    const { kernel, device } = await open(t, { config: CONFIG });
    assert.deepEqual([...(await device.readConfig(58, 2))], [58, 59]);
    assert.deepEqual(await device.readConfig(0, 60), CONFIG);
    const before = kernel.log.length;
    for (const [offset, length] of [
      [59, 2],
      [60, 1],
      [0, 61],
      [0xffff_0000, 1],
    ]) {
      await assert.rejects(device.readConfig(offset, length), virtioError("ERR_VIRTIO_CONFIG", "beyond the 60 bytes"));
    }
    await assert.rejects(device.readConfig(0, 0), { name: "RangeError" });
    await assert.rejects(device.readConfig(-1, 1), { name: "RangeError" });
    assert.equal(kernel.log.length, before);
  });

  test("BASIC-DRV-15 a device with a large config space, and one whose size nobody tells", async (t) => {
    const large = await open(t, { config: new Uint8Array(4096).fill(5) });
    assert.equal((await large.device.readConfig(0, 4096))[4095], 5);
    const untold = await open(t, { config: CONFIG, unknown: [VhostVdpaRequest.GET_CONFIG_SIZE] });
    assert.equal((await untold.device.readConfig(59, 1))[0], 59);
    await assert.rejects(untold.device.readConfig(60, 1), virtioError("ERR_VIRTIO_CONFIG", "refused 1 bytes"));
  });

  test("a size that the device does not have is the kernel's to refuse, and nothing of that size is allocated", async (t) => {
    const { device } = await open(t, { config: CONFIG, configSize: 0xffff_ffff });
    await assert.rejects(device.readConfig(0, 61), virtioError("ERR_VIRTIO_CONFIG", "refused 61 bytes"));
    await assert.rejects(device.readConfig(0, 2 ** 31), { name: "RangeError" });
  });

  test("a device without any says so", async (t) => {
    const { device } = await open(t);
    assert.equal(device.hasConfig, false);
    await assert.rejects(device.readConfig(0, 1), virtioError("ERR_VIRTIO_CONFIG", "beyond the 0 bytes"));
  });

  test("BASIC-DRV-12 more than 4 bytes are read until two reads agree", async (t) => {
    const device = await changing((reads) => Math.min(reads, 3));
    t.after(() => device.close());
    assert.deepEqual(
      [...(await device.readConfig(0, 8))],
      Array.from({ length: 8 }, () => 3),
    );
    const single = await changing((reads) => reads);
    t.after(() => single.close());
    assert.deepEqual([...(await single.readConfig(0, 4))], [0, 0, 0, 0]);
  });

  test("BASIC-DRV-12 one that changes all the time is given up", async (t) => {
    const device = await changing((reads) => reads & 0xff);
    t.after(() => device.close());
    await assert.rejects(device.readConfig(0, 8), virtioError("ERR_VIRTIO_CONFIG", "different in each of 16 reads"));
  });
});

describe("writing", () => {
  test("BASIC-DRV-17 only after the negotiation, and within its size", async (t) => {
    const { kernel, device } = await open(t, { config: CONFIG });
    await assert.rejects(device.writeConfig(32, Uint8Array.of(1)), virtioError("ERR_VIRTIO_STATUS", "not negotiated"));
    await device.negotiate(0n);
    await assert.rejects(device.writeConfig(60, Uint8Array.of(1)), virtioError("ERR_VIRTIO_CONFIG"));
    await device.writeConfig(32, Uint8Array.of(1, 2));
    assert.deepEqual([...kernel.config.subarray(31, 35)], [31, 1, 2, 34]);
    assert.equal(kernel.log.filter((line) => line.startsWith("SET_CONFIG ")).length, 1);
  });
});

describe("changes that the device tells of", () => {
  test("reach onConfigChange, and a block device has its new capacity", async (t) => {
    const { kernel } = diskKernel();
    const disk = await openDisk(t, kernel);
    const capacities: number[] = [];
    disk.on("resize", (capacity) => capacities.push(capacity));
    kernel.changeConfig(encodeBlkConfig({ capacity: 65_536n, numQueues: 2, segMax: 32, sizeMax: 65_536 }));
    assert.ok(await turnUntil(() => capacities.length > 0));
    assert.deepEqual(capacities, [65_536 * 512]);
  });

  test("BASIC-DRV-04 DEVICE_NEEDS_RESET ends the device: what is in flight rejects, onLost says why", async (t) => {
    const { kernel } = diskKernel(0n, { onNotify: () => {} });
    const disk = await openDisk(t, kernel);
    const lost: Error[] = [];
    disk.on("lost", (error) => lost.push(error));
    const reading = disk.read(new Uint8Array(512));
    const rejected = assert.rejects(reading, virtioError("ERR_VIRTIO_STATUS", "DEVICE_NEEDS_RESET"));
    assert.ok(await turnUntil(() => kernel.log.includes("kick 0")));
    kernel.breakDown();
    assert.ok(await turnUntil(() => lost.length > 0));
    await rejected;
    virtioError("ERR_VIRTIO_STATUS", "DEVICE_NEEDS_RESET")(lost[0]);
    await disk.close();
    assert.equal(kernel.log.at(-1), "close");
  });

  test("a status that cannot be read any more is told as the end, too", async (t) => {
    const { kernel, device } = await openRunning(t, { config: CONFIG, features: MODERN | BlkFeature.FLUSH });
    const lost: Error[] = [];
    device.onLost = (error) => lost.push(error);
    kernel.failures.set("GET_STATUS", 19);
    kernel.changeConfig(Uint8Array.of(1));
    assert.ok(await turnUntil(() => lost.length > 0));
    virtioError("ERR_VIRTIO_SYSCALL", "ENODEV")(lost[0]);
    await assert.rejects(device.readConfig(0, 1), virtioError("ERR_VIRTIO_SYSCALL", "ENODEV"));
    kernel.failures.clear();
  });
});
