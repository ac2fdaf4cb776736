/** Queues of a PCI device: how they are set up and notified, reset one by one, and stopped before their memory goes. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { FakePciFunction } from "../../../src/testing/index.js";
import { VirtioFeature } from "../../../src/virtqueue/features.js";
import { turn } from "../../sys/helpers.js";
import { held, place } from "../support.js";
import { attach, attachRunning, BASE, CONFIG, failure, start } from "./support.js";

const { NOTIFICATION_DATA, NOTIF_CONFIG_DATA, RING_PACKED, RING_RESET } = VirtioFeature;

/** Writes to the notification structure as [offset, width, value]. */
function notifications(fn: FakePciFunction): [number, number, number][] {
  return fn.log
    .filter(({ kind, target }) => kind === "write" && target === "notify")
    .map(({ offset, width, value }) => [offset, width, value]);
}

describe("setting up", () => {
  test("PCI-DRV-15 PCI-DRV-17 queue_enable comes last, once, and is never written 0", async (t) => {
    const { fn, device } = await attachRunning(t, { queueSizes: [256, 256] });
    await device.close();
    assert.deepEqual(fn.written("QUEUE_ENABLE"), [1, 1]);
    const names = fn.log
      .filter(({ kind, name }) => kind === "write" && /^QUEUE_(?!SELECT)/.test(name))
      .map(({ name }) => name);
    const first = names.indexOf("QUEUE_ENABLE");
    assert.ok(
      names.slice(first).every((name) => name === "QUEUE_ENABLE"),
      names.join(" "),
    );
    for (const name of ["QUEUE_SIZE", "QUEUE_MSIX_VECTOR", "QUEUE_DESC_LO", "QUEUE_DRIVER_HI", "QUEUE_DEVICE_HI"]) {
      assert.equal(names.slice(0, first).filter((each) => each === name).length, 2, name);
    }
  });

  test("PCI-DRV-14 a size that is no power of two is refused for split queues before anything is written", async (t) => {
    const { fn, device } = await attach(t);
    await device.negotiate(0n);
    const region = await device.mapMemory(1);
    const before = fn.log.length;
    for (const size of [100, 3, 0]) {
      await assert.rejects(device.startQueues([{ ...place(region, 0, 128), size }]), RangeError);
    }
    assert.equal(fn.log.length, before);
    await device.startQueues([place(region, 0, 128)]);
  });

  test("PCI-DRV-13 packed queues take any size but 0", async (t) => {
    const { fn, device } = await attach(t, { features: BASE | RING_PACKED });
    await device.negotiate(RING_PACKED);
    const region = await device.mapMemory(1);
    await assert.rejects(device.startQueues([{ ...place(region, 0, 8, true), size: 0 }]), RangeError);
    await device.startQueues([place(region, 0, 100, true)]);
    assert.deepEqual(fn.written("QUEUE_SIZE"), [100]);
  });

  test("the largest size is not written again; one above it is an argument error, and leaves all as it was", async (t) => {
    const { fn, device } = await attach(t, { queueSizes: [64, 16] });
    await device.negotiate(0n);
    const region = await device.mapMemory(1);
    await assert.rejects(device.startQueues([place(region, 0, 128)]), /at most 64/);
    await assert.rejects(device.startQueues([place(region, 0, 64), place(region, 1, 32, false, 8192)]), /at most 16/);
    assert.deepEqual(fn.written("DEVICE_STATUS"), [0, 1, 3, 11]);
    await device.startQueues([place(region, 0, 64)]);
    assert.deepEqual(fn.written("QUEUE_SIZE"), []);
    await assert.rejects(device.startQueues([place(region, 1, 16)]), failure("ERR_VIRTIO_STATUS", "run already"));
  });

  test("queues that the device does not have are refused", async (t) => {
    const { device } = await attach(t, { queueSizes: [64, 0, 64] });
    await device.negotiate(0n);
    const region = await device.mapMemory(1);
    await assert.rejects(device.startQueues([place(region, 3, 8)]), failure("ERR_VIRTIO_QUEUES", "3 queues"));
    await assert.rejects(device.startQueues([place(region, 1, 8)]), failure("ERR_VIRTIO_QUEUES", "size reads as 0"));
  });

  test("queues before negotiate, and areas outside of the memory, are refused", async (t) => {
    const { device } = await attach(t);
    const region = await device.mapMemory(1);
    await assert.rejects(device.startQueues([place(region, 0, 8)]), failure("ERR_VIRTIO_STATUS", "negotiate first"));
    await device.negotiate(0n);
    const outside = place(region, 0, 8, false, region.size);
    await assert.rejects(device.startQueues([outside]), RangeError);
  });

  test("BASIC-DRV-32 the IOMMU maps what the queues use, at addresses of its ranges, and nothing else", async (t) => {
    const { fn, device, region } = await attachRunning(t);
    assert.equal(fn.regionsMapped, 1);
    assert.ok(region.iova >= 0x5_4000_0000);
    assert.equal(fn.memory.find(region.iova % 2 ** 32, Math.floor(region.iova / 2 ** 32), region.size), 0);
    assert.equal(fn.memory.find(region.iova % 2 ** 32, Math.floor(region.iova / 2 ** 32), region.size + 1), -1);
    const more = await device.mapMemory(1);
    await device.unmapMemory(more);
    assert.equal(fn.regionsMapped, 1);
  });
});

describe("notifications", () => {
  test("BASIC-DRV-21 there is none before DRIVER_OK, not even of starting", async (t) => {
    const { fn, queues } = await attachRunning(t);
    assert.deepEqual(notifications(fn), []);
    queues[0].notify(0);
    assert.deepEqual(notifications(fn), [[0, 2, 0]]);
  });

  test("PCI-DRV-29 PCI-DRV-30 PCI-DRV-31 width and value, with and without the two features", async (t) => {
    const data = 0xc123_0001;
    const cases: [bigint, number, number][] = [
      [0n, 2, 1],
      [NOTIF_CONFIG_DATA, 2, 0x4a01],
      [NOTIFICATION_DATA, 4, 0xc123_0001],
      [NOTIFICATION_DATA | NOTIF_CONFIG_DATA, 4, 0xc123_4a01],
    ];
    for (const [features, width, value] of cases) {
      const { fn, queues } = await attachRunning(t, { features: BASE | features, queueSizes: [256, 256] });
      queues[1].notify(data);
      assert.deepEqual(notifications(fn), [[4, width, value]]);
      assert.deepEqual(fn.queues[1].notifications, [value]);
    }
  });

  test("the address of each queue is its queue_notify_off times the multiplier, in the page that holds it", async (t) => {
    const { fn, queues } = await attachRunning(t, {
      queueSizes: [16, 16, 16],
      ...{ notifyMultiplier: 0x800, notifyOffsets: [3, 1, 0], bars: { 4: 0x2_0000 } },
      capabilities: (all) => all.map((each) => (each.type === 2 ? { ...each, offset: 0x3002, length: 0x1802 } : each)),
    });
    for (const queue of queues) queue.notify(0);
    assert.deepEqual(notifications(fn), [
      [0x1800, 2, 0],
      [0x800, 2, 1],
      [0, 2, 2],
    ]);
    const pages = fn.opened.filter(({ offset }) => offset >= 0x3000).map(({ offset, length }) => [offset, length]);
    assert.deepEqual(pages, [
      [0x4000, 0x804],
      [0x3000, 0x1000],
    ]);
  });

  test("a multiplier of 0 is one register for all queues", async (t) => {
    const { fn, queues } = await attachRunning(t, { queueSizes: [16, 16], notifyMultiplier: 0 });
    for (const queue of queues) queue.notify(0);
    assert.deepEqual(notifications(fn), [
      [0, 2, 0],
      [0, 2, 1],
    ]);
  });

  test("an address outside of the structure, or misaligned, is refused before any queue is enabled", async (t) => {
    const cases = [
      { notifyOffsets: [1] },
      { notifyOffsets: [0xffff], notifyMultiplier: 0x8000_0000 },
      { notifyMultiplier: 1, notifyOffsets: [1] },
      // 4 bytes do not fit where 2 do.
      { features: BASE | NOTIFICATION_DATA, capabilities: shortNotify(2) },
      { features: BASE | NOTIFICATION_DATA, capabilities: shortNotify(8, 0x3002) },
    ];
    for (const options of cases) {
      const { fn, device } = await attach(t, options);
      await assert.rejects(start(device), failure("ERR_VIRTIO_CONFIG", "notifications of queue 0"));
      assert.deepEqual(fn.written("QUEUE_ENABLE"), []);
      assert.equal(fn.status & 128, 128);
    }
  });

  test("after close there is none", async (t) => {
    const { fn, device, queues } = await attachRunning(t);
    await device.close();
    assert.throws(() => queues[0].notify(0), failure("ERR_VIRTIO_CLOSED"));
    assert.deepEqual(notifications(fn), []);
  });
});

function shortNotify(length: number, offset = 0x3000) {
  return (all: readonly { type: number; bar: number; offset: number; length: number }[]) =>
    all.map((each) => (each.type === 2 ? { ...each, length, offset } : each));
}

describe("queue reset", () => {
  const options = { features: BASE | RING_RESET, queueSizes: [256, 256] };

  test("PCI-DRV-18 a queue is reset when queue_reset reads 0, not before; then it starts anew, elsewhere", async (t) => {
    const { fn, device, region, queues } = await attachRunning(t, options, {
      prepare: (each) => (each.queueResetReads = 3),
    });
    await device.resetQueue(1);
    const reads = fn.log
      .filter(({ kind, name }) => kind === "read" && name === "QUEUE_RESET")
      .map(({ value }) => value);
    assert.deepEqual(reads, [1, 1, 1, 0]);
    assert.deepEqual(fn.written("QUEUE_RESET"), [1]);
    assert.deepEqual(
      fn.queues.map(({ index }) => index),
      [0],
    );
    assert.throws(() => queues[1].notify(0), failure("ERR_VIRTIO_CLOSED", "enableQueue"));
    queues[0].notify(0);
    await device.resetQueue(1); // nothing more to do
    assert.deepEqual(fn.written("QUEUE_RESET"), [1]);

    const setup = place(region, 1, 32, false, 65_536);
    assert.equal(await device.enableQueue(setup), queues[1]);
    assert.deepEqual(fn.queues[1].setup, setup);
    queues[1].notify(0);
    fn.queues[1].interrupt();
    assert.ok(queues[1].completion.drain(), "its vector is connected again");
    assert.deepEqual(fn.written("QUEUE_ENABLE"), [1, 1, 1]);
  });

  test("BASIC-DRV-23 its memory may be withdrawn when it is reset; before that is the driver's fault", async (t) => {
    const { device } = await attach(t, options);
    await device.negotiate(0n);
    const region = await device.mapMemory(1);
    const [queue] = await device.startQueues([place(region, 0, 8)]);
    await device.resetQueue(0);
    await device.unmapMemory(region);
    const other = await device.mapMemory(1);
    await device.enableQueue(place(other, 0, 8));
    queue.notify(0);
  });

  test("one that does not finish is an error in time, and can be waited for again", async (t) => {
    const { fn, device, region } = await attachRunning(t, options, {
      prepare: (each) => (each.queueResetReads = Number.POSITIVE_INFINITY),
    });
    await assert.rejects(device.resetQueue(0, { timeout: 5 }), failure("ERR_VIRTIO_TIMEOUT", "reset of queue 0"));
    await assert.rejects(device.enableQueue(place(region, 0, 8)), failure("ERR_VIRTIO_STATUS", "was not reset"));
    const controller = new AbortController();
    const waiting = device.resetQueue(0, { signal: controller.signal });
    controller.abort(new Error("enough"));
    await assert.rejects(waiting, /enough/);
    const again = device.resetQueue(0);
    await device.close();
    await assert.rejects(again, failure("ERR_VIRTIO_CLOSED"));
    assert.deepEqual(fn.written("QUEUE_RESET"), [1]);
  });

  test("it is refused without the feature, before the queues run, and for a queue that does not", async (t) => {
    const { device } = await attachRunning(t);
    await assert.rejects(device.resetQueue(0), failure("ERR_VIRTIO_UNSUPPORTED", "RING_RESET"));
    const other = await attach(t, options);
    await assert.rejects(other.device.resetQueue(0), failure("ERR_VIRTIO_STATUS", "startQueues first"));
    const { region } = await start(other.device);
    await assert.rejects(other.device.resetQueue(2), RangeError);
    await assert.rejects(
      other.device.enableQueue(place(region, 0, 8)),
      failure("ERR_VIRTIO_STATUS", "resetQueue first"),
    );
    await other.device.resetQueue(0);
    await assert.rejects(other.device.enableQueue(place(region, 0, 512)), /at most 256/);
    await assert.rejects(other.device.enableQueue({ ...place(region, 0, 8), size: 7 }), RangeError);
    await other.device.enableQueue(place(region, 0, 256));
  });

  test("a device that does not take the queue's vector again says so, and the queue stays reset", async (t) => {
    const { fn, device, region } = await attachRunning(t, options);
    await device.resetQueue(0);
    fn.takesVector = () => false;
    await assert.rejects(device.enableQueue(place(region, 0, 8)), failure("ERR_VIRTIO_REJECTED", "queue 0 again"));
    fn.takesVector = () => true;
    await device.enableQueue(place(region, 0, 8));
  });
});

describe("close", () => {
  test("BASIC-DRV-23 the device is reset before interrupts, bus mastering and memory go, in this order", async (t) => {
    const { fn, device } = await attachRunning(t, { config: CONFIG });
    await device.mapMemory(1);
    fn.resetReads = 2;
    const from = fn.log.length;
    await Promise.all([device.close(), device.close()]);
    const steps = fn.log.slice(from).map(({ kind, target, name, value }) => {
      if (target === "config") return `${kind} command ${value}`;
      return `${kind} ${name} ${name === "unmapDma" ? "" : value}`.trim();
    });
    assert.deepEqual(steps, [
      ...["write DEVICE_STATUS 0", "read DEVICE_STATUS 15", "read DEVICE_STATUS 15", "read DEVICE_STATUS 0"],
      ...["call setRelease 0", "call setMsix 0", "write command 2", "call unmapDma", "call unmapDma"],
      ...["write command 0", "call close 0"],
    ]);
    assert.ok(fn.opened.every(({ isOpen }) => !isOpen));
  });

  test("a device that does not finish its reset is closed all the same, in time", async () => {
    const fn = new FakePciFunction();
    const { Pci } = await import("../../../src/transports/index.js");
    const device = await Pci.attach(fn, { timeout: 10 });
    await start(device);
    fn.resetReads = Number.POSITIVE_INFINITY;
    await device.close();
    assert.ok(fn.closed);
    assert.equal(fn.regionsMapped, 0);
    assert.deepEqual(fn.violations, [], "it lost bus mastering before its memory");
  });

  test("every later call says that it is closed", async (t) => {
    const { device, region } = await attachRunning(t, { config: CONFIG, features: BASE | RING_RESET });
    await device.close();
    const calls = [
      () => device.negotiate(0n),
      () => device.readConfig(0, 1),
      () => device.writeConfig(0, CONFIG),
      () => device.mapMemory(1),
      () => device.unmapMemory(region),
      () => device.startQueues([]),
      () => device.resetQueue(0),
    ];
    for (const call of calls) await assert.rejects(call(), failure("ERR_VIRTIO_CLOSED"));
  });

  test("nothing is left: descriptors, mappings, stretches of BARs", async (t) => {
    const before = held();
    for (let i = 0; i < 5; i++) {
      const { device } = await attachRunning(t, { queueSizes: [16, 16, 16], msixVectors: i });
      await device.mapMemory(1);
      await device.close();
      await turn();
    }
    assert.deepEqual(held(), before);
  });
});
