/** The block driver over a PCI device, register by register: both ring formats, one and more queues, all kinds of interrupts. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { BlockDevice, type CompletionMode } from "../../../src/devices/blk/index.js";
import { type BlkConfig, BlkFeature, encodeBlkConfig } from "../../../src/protocol/index.js";
import { Pci } from "../../../src/transports/index.js";
import { FakePciFunction, type FakePciOptions, takeBlk } from "../../../src/testing/index.js";
import { VirtioFeature } from "../../../src/virtqueue/features.js";
import { CheckedDisk } from "../../devices/blk/support.js";
import { writeAndVerify } from "../../support/block-suite.js";
import { turnUntil } from "../../sys/helpers.js";
import { BASE, failure } from "./support.js";

const {
  EVENT_IDX,
  INDIRECT_DESC,
  IN_ORDER,
  NOTIFICATION_DATA,
  NOTIF_CONFIG_DATA,
  ORDER_PLATFORM,
  RING_PACKED,
  RING_RESET,
} = VirtioFeature;
const SECTORS = 4096n;
const QUEUE_SIZE = 64;

const RINGS: Readonly<Record<string, bigint>> = {
  split: 0n,
  "split with everything": EVENT_IDX | INDIRECT_DESC | NOTIFICATION_DATA | ORDER_PLATFORM,
  packed: RING_PACKED,
  "packed with everything":
    RING_PACKED | EVENT_IDX | INDIRECT_DESC | NOTIFICATION_DATA | NOTIF_CONFIG_DATA | RING_RESET | IN_ORDER,
};

/** A disk of 2 MiB behind a fake function. */
function makeDisk(queues: number, features: bigint, options: FakePciOptions = {}) {
  const config: BlkConfig = { capacity: SECTORS, numQueues: queues, segMax: 30 };
  const checked = new CheckedDisk(config, QUEUE_SIZE);
  const fn = new FakePciFunction({
    features: BASE | BlkFeature.MQ | BlkFeature.SEG_MAX | BlkFeature.FLUSH | features,
    config: encodeBlkConfig(config),
    queueSizes: Array.from({ length: queues }, () => QUEUE_SIZE),
    onNotify: (queue) => {
      for (const request of takeBlk(queue)) checked.serve(request);
    },
    ...options,
  });
  return { fn, checked };
}

describe("the whole disk, written and read back", () => {
  for (const [ring, features] of Object.entries(RINGS)) {
    for (const queues of [1, 2, 5]) {
      test(`${ring}, ${queues} queues, a vector for each`, async () => {
        const { fn, checked } = makeDisk(queues, features);
        const disk = await BlockDevice.open(await Pci.attach(fn), { queues });
        assert.equal(disk.info.format, (features & RING_PACKED) === 0n ? "split" : "packed");
        const model = await writeAndVerify(disk, 32, 7 * queues);
        await disk.close();
        assert.deepEqual(fn.violations, []);
        assert.deepEqual(checked.faults, []);
        assert.ok(Buffer.compare(checked.bytes, model) === 0);
      });
    }
  }

  for (const msixVectors of [0, 1, 2, 3, 2048]) {
    for (const mode of ["event", "hybrid", "poll"] satisfies CompletionMode[]) {
      test(`mode ${mode}, 4 queues, ${msixVectors === 0 ? "INTx" : `${msixVectors} vectors`}`, async () => {
        const { fn, checked } = makeDisk(4, EVENT_IDX | RING_PACKED, { msixVectors });
        const disk = await BlockDevice.open(await Pci.attach(fn), { queues: 4, mode });
        await writeAndVerify(disk, 16, msixVectors + 1);
        await disk.close();
        assert.deepEqual(fn.violations, []);
        assert.deepEqual(checked.faults, []);
      });
    }
  }
});

test("queues cannot be handed over to other threads: notifications are registers, not eventfds", async () => {
  const { fn } = makeDisk(2, 0n);
  await using disk = await BlockDevice.open(await Pci.attach(fn), { queues: 2 });
  await assert.rejects(disk.handOver(), failure("ERR_VIRTIO_UNSUPPORTED", "only where notifications are eventfds"));
  assert.equal((await disk.read(new Uint8Array(512))).bytesRead, 512);
});

test("a device of another type is refused, and given back", async () => {
  const { fn } = makeDisk(1, 0n, { deviceId: 0x1041 });
  await assert.rejects(BlockDevice.open(await Pci.attach(fn)), failure("ERR_VIRTIO_FEATURES", "type 1"));
  assert.ok(fn.closed);
});

test("more queues than there are is refused, and the device given back", async () => {
  const { fn } = makeDisk(2, 0n);
  await assert.rejects(BlockDevice.open(await Pci.attach(fn), { queues: 3 }), failure("ERR_VIRTIO_QUEUES"));
  assert.ok(fn.closed);
  assert.deepEqual(fn.violations, []);
});

test("a disk that grows arrives as an event with its new size, split between two registers", async () => {
  const { fn } = makeDisk(1, 0n);
  await using disk = await BlockDevice.open(await Pci.attach(fn));
  const sizes: number[] = [];
  disk.on("resize", (capacity) => sizes.push(capacity));
  fn.changeConfig(encodeBlkConfig({ capacity: 2n ** 33n + 1n, numQueues: 1, segMax: 30 }));
  assert.ok(await turnUntil(() => sizes.length === 1));
  assert.deepEqual(sizes, [(2 ** 33 + 1) * 512]);
  assert.equal(disk.capacity, (2 ** 33 + 1) * 512);
});

test("BASIC-DRV-04 requests in flight fail when the device needs a reset, or is pulled out", async () => {
  const ends: [string, (fn: FakePciFunction) => void][] = [
    ["ERR_VIRTIO_STATUS", (fn) => fn.breakDown()],
    ["ERR_VIRTIO_DISCONNECTED", (fn) => fn.requestRelease()],
  ];
  for (const [code, end] of ends) {
    const { fn } = makeDisk(1, 0n, { onNotify: () => undefined });
    const disk = await BlockDevice.open(await Pci.attach(fn));
    const reading = disk.read(new Uint8Array(512));
    const failing = assert.rejects(reading, { code });
    await new Promise(setImmediate);
    end(fn);
    await failing;
    await assert.rejects(disk.read(new Uint8Array(512)), { code });
    await disk.close();
    assert.ok(fn.closed);
    assert.deepEqual(fn.violations, []);
  }
});

test("BASIC-DRV-32 every address that the device is given lies in memory that the IOMMU maps", async () => {
  const { fn } = makeDisk(1, INDIRECT_DESC);
  await using disk = await BlockDevice.open(await Pci.attach(fn));
  // The rings of the model reach what `mapDma` mapped and nothing else, so any other address breaks the queue.
  await writeAndVerify(disk, 8, 3);
  assert.ok(fn.regionsMapped >= 1);
  assert.deepEqual(fn.violations, []);
});
