/** A device that writes to its memory for as long as it can reach it, while it is closed: what it may not reach, and when. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { BlockDevice } from "../../src/devices/blk/index.js";
import { VirtioError } from "../../src/errors.js";
import type { MemoryRegion } from "../../src/memory/index.js";
import { BlkFeature, encodeBlkConfig } from "../../src/protocol/blk.js";
import { mapShared, unmapShared } from "../../src/sys/index.js";
import { type FakeBlkRequest, FakePciFunction, FakeVhostVdpa, takeBlk } from "../../src/testing/index.js";
import { Pci, VhostUser, VhostVdpa, type VirtioTransport } from "../../src/transports/index.js";
import { turnUntil } from "../sys/helpers.js";
import { BASE } from "./pci/support.js";
import { ScriptedPeer } from "./scripted-peer.js";
import { held, place } from "./support.js";

const EFAULT = 14;
const ENODEV = 19;
const CONFIG = encodeBlkConfig({ capacity: 2048n });
const PATTERN = new Uint8Array(512).fill(0xaa);

/** A transport, and the regions that it was asked for. */
function regionsOf(transport: VirtioTransport): MemoryRegion[] {
  const regions: MemoryRegion[] = [];
  const map = transport.mapMemory.bind(transport);
  transport.mapMemory = async (size, options) => {
    const region = await map(size, options);
    regions.push(region);
    return region;
  };
  return regions;
}

/** Open a disk, leave a read unanswered, and close it. `requests` is what the device has of it. */
async function closeBusy(transport: VirtioTransport, requests: () => readonly FakeBlkRequest[]) {
  const disk = await BlockDevice.open(transport, { queueSize: 16 });
  const buffer = await disk.allocate(512);
  const { bytes } = buffer;
  const events: string[] = [];
  const reading = disk.read(buffer).then(
    () => assert.fail("it was never answered"),
    (error: unknown) => {
      events.push(`rejects, ${bytes.length} bytes`);
      return error;
    },
  );
  assert.ok(await turnUntil(() => requests().length === 1));
  const closing = disk.close({ timeout: 1 }).then(() => events.push("closed"));
  return { bytes, reading, closing, events };
}

describe("vhost-vdpa", () => {
  for (const [name, prepare] of [
    ["answers EFAULT to its reset", (kernel: FakeVhostVdpa) => kernel.failures.set("SET_STATUS", EFAULT)],
    [
      "is gone (ENODEV)",
      (kernel: FakeVhostVdpa) => {
        for (const call of ["SET_STATUS", "GET_STATUS", "IOTLB_INVALIDATE"]) kernel.failures.set(call, ENODEV);
      },
    ],
    ["does not end its reset", () => undefined],
  ] as const) {
    test(`a device that ${name}: its memory is taken before it is freed, and calls end only then`, async () => {
      const before = held();
      const taken: FakeBlkRequest[] = [];
      const kernel = new FakeVhostVdpa({
        ...{ config: CONFIG, maxQueueSize: 16 },
        onNotify: (queue) => void taken.push(...takeBlk(queue)),
      });
      const node = kernel.open();
      const steps: string[] = [];
      let isClosing = false;
      let regions: MemoryRegion[] = [];
      const mapped = (): boolean => regions.every(({ buffer }) => buffer.byteLength > 0);
      const transport = await VhostVdpa.open(
        {
          node: {
            ioctl(request, argument) {
              node.ioctl(request, argument);
              // The status that the driver reads is 0 only when this lets it.
              if (isClosing && name === "does not end its reset" && argument?.length === 1) argument[0] ||= 0x0f;
            },
            write(message) {
              steps.push(`IOTLB, mapped ${mapped()}`);
              node.write(message);
            },
            close() {
              steps.push(`close, mapped ${mapped()}`);
              // Up to the last moment it writes where it was told to.
              for (const { raw } of taken) if (kernel.mappings > 0) raw.write(PATTERN);
              node.close();
            },
          },
        },
        { timeout: 20 },
      );
      regions = regionsOf(transport);
      const { bytes, reading, closing, events } = await closeBusy(transport, () => taken);
      steps.length = 0;
      isClosing = true;
      prepare(kernel);
      await closing;
      assert.equal((await reading) instanceof VirtioError, true);
      const count = regions.length;
      assert.ok(count > 0);
      assert.deepEqual(steps, [...Array.from({ length: count }, () => "IOTLB, mapped true"), "close, mapped true"]);
      assert.deepEqual(
        regions.map(({ buffer }) => buffer.byteLength),
        regions.map(() => 0),
      );
      assert.equal(bytes.length, 0);
      assert.deepEqual(events, ["rejects, 0 bytes", "closed"]);
      assert.equal(kernel.mappings, 0);
      assert.deepEqual(held(), before);
    });
  }
});

describe("PCI", () => {
  const failing: readonly [name: string, refused: (name: string, target: string) => boolean][] = [
    ["does not end its reset", () => false],
    ["does not take a status, nor end its reset", (name) => name === "DEVICE_STATUS"],
    ["cannot be kept from memory by its command register", (_name, target) => target === "config"],
    ["keeps what the IOMMU maps", (name) => name === "unmapDma"],
    ["refuses everything", () => true],
  ];
  for (const [name, refuses] of failing) {
    test(`a function that ${name}: it is closed before memory is freed, and calls end only then`, async () => {
      const before = held();
      const fn = new FakePciFunction({ config: CONFIG, features: BASE | BlkFeature.FLUSH });
      const transport = await Pci.attach(fn, { timeout: 20 });
      const regions = regionsOf(transport);
      const taken: FakeBlkRequest[] = [];
      const { bytes, reading, closing, events } = await closeBusy(transport, () => {
        taken.push(...takeBlk(fn.queues[0]));
        return taken;
      });
      const steps: string[] = [];
      fn.resetReads = Number.POSITIVE_INFINITY;
      fn.onAccess = (access) => {
        const isMapped = regions.every(({ buffer }) => buffer.byteLength > 0);
        if (access.name === "close" || access.name === "unmapDma") steps.push(`${access.name}, mapped ${isMapped}`);
        if (access.name !== "close" && refuses(access.name, access.target)) {
          throw new VirtioError("ERR_VIRTIO_SYSCALL", "injected", { errno: 5, syscall: "ioctl" });
        }
      };
      await closing.catch(() => undefined);
      assert.ok((await reading) instanceof VirtioError);
      assert.deepEqual(steps, [...regions.map(() => "unmapDma, mapped true"), "close, mapped true"]);
      assert.ok(regions.length > 0 && regions.every(({ buffer }) => buffer.byteLength === 0));
      assert.equal(bytes.length, 0);
      assert.equal(events[0], "rejects, 0 bytes");
      assert.deepEqual(held(), before);
    });
  }
});

describe("vhost-user", () => {
  for (const silent of ["GET_VRING_BASE", "REM_MEM_REG"]) {
    test(`a back-end that is silent at ${silent} has a mapping of its own, and nothing of ours`, async () => {
      const before = held();
      const peer = new ScriptedPeer({ misbehave: ({ name }) => (name === silent ? {} : undefined) });
      const device = await VhostUser.connect(peer.path, { timeout: 200 });
      await device.negotiate(0n);
      const region = await device.mapMemory(1);
      await device.startQueues([place(region, 0, 8)]);
      const bytes = new Uint8Array(region.buffer);
      const theirs = mapShared(region.fd, region.size);
      new Uint8Array(theirs).fill(1);
      assert.equal(bytes[region.size - 1], 1, "the same memory");
      const closing = device.close();
      await peer.received(silent);
      assert.equal(bytes.length, region.size, "not freed while it may answer");
      await closing;
      assert.equal(bytes.length, 0);
      // What it goes on writing are pages that nobody but itself has.
      new Uint8Array(theirs).fill(2);
      assert.deepEqual(held().mappings, before.mappings + 1);
      unmapShared(theirs);
      peer.close();
      assert.deepEqual(held(), before);
    });
  }
});
