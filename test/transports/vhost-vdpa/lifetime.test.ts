/** Giving up, closing, one at a time, and what is left afterwards: nothing. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { FakeVhostVdpa } from "../../../src/testing/index.js";
import { VhostVdpa } from "../../../src/transports/index.js";
import { held, place, virtioError } from "../support.js";
import { live, open, openRunning } from "./support.js";

describe("AbortSignal", () => {
  test("already aborted: rejects with its reason, and the kernel is asked nothing", async (t) => {
    const { kernel, device, region } = await openRunning(t, { config: new Uint8Array(8), backendFeatures: 0x30n });
    const before = kernel.log.length;
    const reason = new Error("enough");
    const signal = AbortSignal.abort(reason);
    const calls = [
      device.negotiate(0n, { signal }),
      device.readConfig(0, 8, { signal }),
      device.writeConfig(0, Uint8Array.of(1), { signal }),
      device.mapMemory(1, { signal }),
      device.unmapMemory(region, { signal }),
      device.startQueues([], { signal }),
      device.suspend({ signal }),
      device.resume({ signal }),
    ];
    const results = await Promise.allSettled(calls);
    assert.deepEqual(
      results.map((result): unknown => (result.status === "rejected" ? result.reason : "fulfilled")),
      calls.map(() => reason),
    );
    assert.equal(kernel.log.length, before);
  });

  test("aborted while others come before it: it does not begin", async (t) => {
    const { kernel, device } = await open(t);
    const abort = new AbortController();
    const first = device.mapMemory(1);
    const second = device.mapMemory(1, { signal: abort.signal });
    abort.abort(new RangeError("enough"));
    await first;
    await assert.rejects(second, RangeError);
    assert.equal(kernel.mappings, 1);
  });
});

describe("close", () => {
  test("leaves no descriptor, no mapping, however often and wherever", async () => {
    await live(new FakeVhostVdpa({ config: new Uint8Array(60), maxQueues: 2, backendFeatures: 0x30n }));
    const before = held();
    const kernel = new FakeVhostVdpa({ config: new Uint8Array(60), maxQueues: 2, backendFeatures: 0x30n });
    for (let i = 0; i < 50; i++) await live(kernel);
    assert.deepEqual(held(), before);
    const device = await VhostVdpa.open({ node: kernel.open() });
    await device.mapMemory(1);
    await Promise.all([device.close(), device.close()]);
    await device.close();
    assert.equal(kernel.log.filter((line) => line === "close").length, 51);
    assert.deepEqual(held(), before);
  });

  test("every call afterwards says that it is closed", async (t) => {
    const { kernel, device, region } = await openRunning(t, { config: new Uint8Array(8), backendFeatures: 0x30n });
    await device.close();
    const before = kernel.log.length;
    const calls = [
      () => device.negotiate(0n),
      () => device.readConfig(0, 8),
      () => device.writeConfig(0, Uint8Array.of(1)),
      () => device.mapMemory(1),
      () => device.unmapMemory(region),
      () => device.startQueues([]),
      () => device.suspend(),
    ];
    for (const call of calls) await assert.rejects(call(), virtioError("ERR_VIRTIO_CLOSED", "a stand-in is closed"));
    assert.equal(kernel.log.length, before);
    assert.equal(region.buffer.byteLength, 0);
  });

  test("what was asked before it ends before it, what is asked after it does not begin", async (t) => {
    const { kernel, device } = await open(t);
    const mapping = device.mapMemory(1);
    const closing = device.close();
    await assert.rejects(device.mapMemory(1), virtioError("ERR_VIRTIO_CLOSED"));
    // The first one had not begun either: it waited for its turn, and then the device was closed.
    await mapping.then(
      () => undefined,
      (error: unknown) => virtioError("ERR_VIRTIO_CLOSED")(error),
    );
    await closing;
    assert.equal(kernel.mappings, 0);
  });

  test("tells onLost once, also one who listens later", async (t) => {
    const { device } = await open(t);
    const lost: Error[] = [];
    device.onLost = (error) => lost.push(error);
    await device.close();
    await new Promise(setImmediate);
    assert.equal(lost.length, 1);
    virtioError("ERR_VIRTIO_CLOSED")(lost[0]);
  });
});

describe("one at a time", () => {
  test("a device is free again when it was closed, and not before", async (t) => {
    const { kernel, device } = await openRunning(t);
    assert.throws(() => kernel.open(), { errno: 16, syscall: "open" });
    await device.close();
    const again = await VhostVdpa.open({ node: kernel.open() });
    t.after(() => again.close());
    await again.negotiate(0n);
    const region = await again.mapMemory(1);
    const [queue] = await again.startQueues([place(region, 0, 8)]);
    assert.equal(queue.index, 0);
  });

  test("a second owner of one descriptor is refused", async (t) => {
    const kernel = new FakeVhostVdpa();
    const node = kernel.open();
    const device = await VhostVdpa.open({ node });
    t.after(() => device.close());
    const shared = { ...node, close: () => {} };
    await assert.rejects(VhostVdpa.open({ node: shared }), virtioError("ERR_VIRTIO_BUSY", "EBUSY"));
  });
});
