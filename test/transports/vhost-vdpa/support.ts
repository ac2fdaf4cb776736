/** What the tests of vhost-vdpa share: a fake kernel with a disk behind it, whole lives of a device. */

import type { TestContext } from "node:test";
import { BlockDevice, type OpenBlockOptions } from "../../../src/devices/blk/index.js";
import { type BlkConfig, BlkFeature, encodeBlkConfig } from "../../../src/protocol/blk.js";
import { FakeVhostVdpa, type FakeVhostVdpaOptions, takeBlk } from "../../../src/testing/index.js";
import { VhostVdpa } from "../../../src/transports/index.js";
import { VirtioFeature } from "../../../src/virtqueue/index.js";
import { CheckedDisk } from "../../devices/blk/support.js";
import { place } from "../support.js";

/** Features that every device here offers. */
export const MODERN = VirtioFeature.VERSION_1 | VirtioFeature.ACCESS_PLATFORM;

/** A device that is closed after the test. */
export async function open(t: TestContext, options: FakeVhostVdpaOptions = {}) {
  const kernel = new FakeVhostVdpa(options);
  const device = await VhostVdpa.open({ node: kernel.open() });
  t.after(() => device.close());
  return { kernel, device };
}

/** A device with one running queue. */
export async function openRunning(t: TestContext, options: FakeVhostVdpaOptions = {}) {
  const { kernel, device } = await open(t, options);
  await device.negotiate(0n);
  const region = await device.mapMemory(1);
  const [queue] = await device.startQueues([place(region, 0, 8)]);
  return { kernel, device, region, queue };
}

/** Everything that a driver does with a device, in the order of a device's life; what must be closed is. */
export async function live(kernel: FakeVhostVdpa, queues = 2, features = 0n): Promise<void> {
  const device = await VhostVdpa.open({ node: kernel.open() });
  try {
    const accepted = await device.negotiate(features);
    const packed = (accepted & VirtioFeature.RING_PACKED) !== 0n;
    await device.readConfig(0, 8);
    await device.writeConfig(32, Uint8Array.of(1));
    const region = await device.mapMemory(1);
    const extra = await device.mapMemory(3 << 20);
    await device.startQueues(
      Array.from({ length: queues }, (_, index) => place(region, index, 8 << index, packed, 4096 * index)),
    );
    await device.suspend();
    await device.resume();
    await device.unmapMemory(extra);
  } finally {
    await device.close();
  }
}

/** A kernel with a disk of 16 MiB behind two queues, which checks what it is asked. */
export function diskKernel(
  features = 0n,
  options: FakeVhostVdpaOptions = {},
): { kernel: FakeVhostVdpa; checked: CheckedDisk } {
  const limits = { maxSectors: 4096, maxSegments: 4, alignment: 1 };
  const config: BlkConfig = {
    ...{ capacity: 32_768n, segMax: 32, sizeMax: 65_536, numQueues: 2 },
    ...{ discard: limits, writeZeroes: { maxSectors: 4096, maxSegments: 4, mayUnmap: true } },
  };
  const checked = new CheckedDisk(config, 64);
  const { SEG_MAX, SIZE_MAX, MQ, FLUSH, DISCARD, WRITE_ZEROES } = BlkFeature;
  const kernel = new FakeVhostVdpa({
    features: MODERN | features | SEG_MAX | SIZE_MAX | MQ | FLUSH | DISCARD | WRITE_ZEROES,
    ...{ config: encodeBlkConfig(config), maxQueues: 2, maxQueueSize: 64 },
    onNotify: (queue) => {
      for (const request of takeBlk(queue)) checked.serve(request);
    },
    ...options,
  });
  return { kernel, checked };
}

/** Open a disk on a kernel; it is closed after the test. */
export async function openDisk(
  t: TestContext,
  kernel: FakeVhostVdpa,
  options: OpenBlockOptions = {},
): Promise<BlockDevice> {
  const disk = await BlockDevice.open(await VhostVdpa.open({ node: kernel.open() }), options);
  t.after(() => disk.close());
  return disk;
}
