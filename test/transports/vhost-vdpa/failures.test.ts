/** Every call to the kernel refused in turn, at every step: a clear error, and nothing left behind. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { BlockDevice } from "../../../src/devices/blk/index.js";
import { VirtioError } from "../../../src/errors.js";
import { FakeVhostVdpa } from "../../../src/testing/index.js";
import { VhostVdpa } from "../../../src/transports/index.js";
import { VirtioFeature } from "../../../src/virtqueue/index.js";
import { collectGarbage } from "../../sys/helpers.js";
import { held, place } from "../support.js";
import { diskKernel, live, MODERN } from "./support.js";

const EIO = 5;
const EPERM = 1;

/** Calls whose refusal nobody needs to hear of: the device is being closed, which does what they were to do. */
const PART_OF_CLOSING = 3;

/** The errno and the system call of what `work` fails with; undefined when it does not. */
async function failureOf(
  work: () => Promise<unknown>,
): Promise<{ errno: number | undefined; syscall: string | undefined } | undefined> {
  try {
    await work();
    return undefined;
  } catch (error) {
    assert.ok(error instanceof VirtioError, String(error));
    return { errno: error.errno, syscall: error.syscall };
  }
}

/** How the kernel is called by a line of the log. */
function syscallOf(line: string): string {
  if (line.startsWith("IOTLB")) return "write";
  return line.startsWith("close") ? "close" : "ioctl";
}

/** Refuse call after call of what `work` does, until all were refused once. */
async function refuseEach(
  errno: number,
  makeKernel: () => FakeVhostVdpa,
  work: (kernel: FakeVhostVdpa) => Promise<unknown>,
): Promise<void> {
  const whole = makeKernel();
  await work(whole);
  const calls = whole.calls;
  assert.ok(calls > 20, `${calls} calls`);
  collectGarbage();
  const before = held();
  for (let n = 0; n < calls; n++) {
    const kernel = makeKernel();
    kernel.failures.set(n, errno);
    const failure = await failureOf(() => work(kernel));
    const line = kernel.log.filter((said) => !said.startsWith("kick"))[n];
    const isClosing = n >= calls - 1 - PART_OF_CLOSING && n < calls - 1;
    const what = `call ${n}, ${line}`;
    assert.match(line, / -> E/, what);
    if (isClosing) assert.equal(failure, undefined, what);
    else assert.deepEqual(failure, { errno, syscall: syscallOf(line) }, what);
    assert.deepEqual(held(), before, what);
    assert.equal(kernel.mappings, 0, what);
    kernel.failures.clear();
    await work(kernel);
  }
  assert.deepEqual(held(), before);
}

for (const [name, errno] of [
  ["EIO", EIO],
  ["EPERM", EPERM],
] as const) {
  for (const [format, features] of [
    ["split", 0n],
    ["packed", VirtioFeature.RING_PACKED],
  ] as const) {
    test(`${format}: ${name} to each call of a device's life in turn`, async () => {
      await refuseEach(
        errno,
        () =>
          new FakeVhostVdpa({
            features: MODERN | VirtioFeature.RING_PACKED,
            ...{ backendFeatures: 0x32n, config: new Uint8Array(60), maxQueues: 2 },
          }),
        (kernel) => live(kernel, 2, features),
      );
    });
  }

  test(`a block device: ${name} to each call of its life in turn`, async () => {
    await refuseEach(
      errno,
      () => diskKernel().kernel,
      async (kernel) => {
        const disk = await BlockDevice.open(await VhostVdpa.open({ node: kernel.open() }), {
          queues: 2,
          queueSize: 16,
        });
        try {
          await disk.write(new Uint8Array(4096).fill(3), { position: 512 });
        } finally {
          await disk.close();
        }
      },
    );
  });
}

describe("errors say what was refused, and what to try", () => {
  const cases = [
    ["SET_OWNER", 16, "ERR_VIRTIO_BUSY", /^a stand-in has an owner: EBUSY from ioctl/],
    [
      "SET_OWNER",
      25,
      "ERR_VIRTIO_CONNECT",
      /a stand-in is not a vhost-vdpa device \(it does not know VHOST_SET_OWNER\)/,
    ],
    ["GET_DEVICE_ID", 25, "ERR_VIRTIO_CONNECT", /it does not know VHOST_VDPA_GET_DEVICE_ID/],
    [
      "GET_FEATURES",
      1,
      "ERR_VIRTIO_PERMISSION",
      /^VHOST_GET_FEATURES on a stand-in: EPERM from ioctl; .*another process/,
    ],
    ["SET_STATUS", 110, "ERR_VIRTIO_SYSCALL", /VHOST_VDPA_SET_STATUS .*ETIMEDOUT from ioctl; .*did not answer/],
  ] as const;
  for (const [name, errno, code, words] of cases) {
    test(`${name} and errno ${errno}`, async () => {
      const kernel = new FakeVhostVdpa();
      kernel.failures.set(name, errno);
      await assert.rejects(VhostVdpa.open({ node: kernel.open() }), {
        name: "VirtioError",
        code,
        errno,
        message: words,
      });
    });
  }

  test("memory that the kernel does not take: the address is free again, and so is the memory", async () => {
    for (const [errno, words] of [
      [14, /^mapping 2097152 bytes at 0x200000 for a stand-in: EFAULT from write; .*ulimit -l/],
      [22, /EINVAL from write/],
    ] as const) {
      const kernel = new FakeVhostVdpa();
      await using device = await VhostVdpa.open({ node: kernel.open() });
      kernel.failures.set("IOTLB_UPDATE", errno);
      await assert.rejects(device.mapMemory(1), {
        code: "ERR_VIRTIO_SYSCALL",
        errno,
        syscall: "write",
        message: words,
      });
      kernel.failures.clear();
      assert.equal((await device.mapMemory(1)).iova, 2 ** 21);
    }
  });

  test("memory that the kernel does not take back stays, and can be withdrawn again", async () => {
    const kernel = new FakeVhostVdpa();
    await using device = await VhostVdpa.open({ node: kernel.open() });
    const region = await device.mapMemory(1);
    kernel.failures.set("IOTLB_INVALIDATE", EIO);
    await assert.rejects(device.unmapMemory(region), { errno: EIO, message: /^unmapping 2097152 bytes at 0x200000/ });
    assert.equal(region.buffer.byteLength, 2 ** 21);
    kernel.failures.clear();
    await device.unmapMemory(region);
    assert.equal(region.buffer.byteLength, 0);
    await assert.rejects(device.unmapMemory(region), { name: "RangeError" });
  });

  test("a queue that is refused half-way: FAILED, eventfds closed, nothing runs, the device can be closed", async () => {
    const before = held();
    const kernel = new FakeVhostVdpa({ maxQueues: 2 });
    const device = await VhostVdpa.open({ node: kernel.open() });
    await device.negotiate(0n);
    const region = await device.mapMemory(1);
    const inside = held().descriptors;
    kernel.failures.set("SET_VRING_KICK", 24);
    const setups = [place(region, 0, 8), place(region, 1, 8, false, 4096)];
    await assert.rejects(device.startQueues(setups), { code: "ERR_VIRTIO_SYSCALL", errno: 24 });
    // The kernel has kept the completion event that it was given.
    assert.equal(held().descriptors, inside + 1);
    assert.equal(kernel.status, 0x8b);
    assert.deepEqual(kernel.queues, []);
    kernel.failures.clear();
    await assert.rejects(device.startQueues(setups), { code: "ERR_VIRTIO_STATUS" });
    await device.close();
    assert.deepEqual(held(), before);
  });
});
