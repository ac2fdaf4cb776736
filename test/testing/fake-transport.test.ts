/** FakeTransport itself: it refuses what the interface forbids, records what was done, and can fail at will. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { VirtioError } from "../../src/errors.js";
import { FakeTransport, type FakeTransportOptions, takeBlk } from "../../src/testing/index.js";
import { VirtioFeature, Virtqueue, VirtqueueLayout } from "../../src/virtqueue/index.js";
import { turnUntil } from "../sys/helpers.js";

const CODE = (code: string) => (error: unknown) => error instanceof VirtioError && error.code === code;

/** A transport with one queue of 8 descriptors running, and the driver's half of it. */
async function started(options: FakeTransportOptions = {}) {
  const transport = new FakeTransport(options);
  const features = await transport.negotiate(VirtioFeature.VERSION_1 | VirtioFeature.EVENT_IDX);
  const region = await transport.mapMemory(65536);
  const layout = new VirtqueueLayout({ queueSize: 8, features });
  const setup = {
    index: 0,
    size: 8,
    descriptorArea: region.iova,
    driverArea: region.iova + layout.driverAreaOffset,
    deviceArea: region.iova + layout.deviceAreaOffset,
  };
  const [notifier] = await transport.startQueues([setup]);
  const queue = new Virtqueue({ layout, buffer: region.buffer, iova: region.iova, features });
  const submit = (length: number): void => {
    queue.begin(1);
    queue.push((region.iova + 4096) >>> 0, Math.floor(region.iova / 2 ** 32), length, true);
    queue.commit();
    if (queue.publish()) notifier.notify(queue.notificationData);
  };
  return { transport, region, setup, notifier, queue, submit };
}

test("every step is recorded in order, with what it was given", async () => {
  const { transport, region, setup, submit } = await started({ config: new Uint8Array(40) });
  await transport.readConfig(8, 4);
  await transport.writeConfig(32, Uint8Array.of(1));
  submit(16);
  const extra = await transport.mapMemory(1);
  await transport.unmapMemory(extra);
  await transport.close();
  const { VERSION_1, EVENT_IDX } = VirtioFeature;
  assert.deepEqual(transport.log, [
    { step: "negotiate", wanted: VERSION_1 | EVENT_IDX, accepted: VERSION_1 },
    { step: "mapMemory", size: 65536, iova: region.iova },
    { step: "startQueues", queues: [setup] },
    { step: "readConfig", offset: 8, length: 4 },
    { step: "writeConfig", offset: 32, bytes: Uint8Array.of(1) },
    { step: "notify", index: 0, data: 0x10000 },
    { step: "mapMemory", size: 1, iova: extra.iova },
    { step: "unmapMemory", iova: extra.iova },
    { step: "close" },
  ]);
  assert.deepEqual(transport.queues[0].notifications, [0x10000]);
  assert.deepEqual([transport.regionsMapped, transport.regionsClosed], [2, 2]);
  assert.equal(transport.config[32], 1);
  assert.equal(region.buffer.byteLength, 0);
});

test("the device's script runs in a microtask, and again when more came while it was at work", async () => {
  let calls = 0;
  let again: (() => void) | undefined;
  const seen: number[] = [];
  const { transport, submit, queue } = await started({
    features: VirtioFeature.VERSION_1 | VirtioFeature.EVENT_IDX,
    onNotify: (fake) => {
      calls++;
      for (const request of fake.take()) {
        seen.push(request.writableLengths[0]);
        request.write(Uint8Array.of(seen.length));
        fake.complete(request);
      }
      again?.();
      again = undefined;
    },
  });
  again = () => submit(2);
  submit(1);
  assert.equal(calls, 0);
  await Promise.resolve();
  assert.deepEqual(seen, [1, 2]);
  submit(3);
  await Promise.resolve();
  assert.deepEqual(seen, [1, 2, 3], "it is notified again although EVENT_IDX is in force");
  assert.equal(queue.poll(), 0);
  assert.equal(queue.usedLength, 1);
  await transport.close();
});

test("the kick descriptor notifies as well: from other threads", async () => {
  let calls = 0;
  const { transport, notifier } = await started({ onNotify: () => calls++ });
  notifier.kick?.signal();
  assert.ok(await turnUntil(() => calls === 1));
  assert.deepEqual(transport.steps.at(-1), "kick");
  await transport.close();
  assert.equal(notifier.kick?.fd, -1);
});

test("a script that takes nothing is not called for ever", async () => {
  let calls = 0;
  const { transport, submit } = await started({ onNotify: () => calls++ });
  submit(1);
  await Promise.resolve();
  assert.equal(calls, 1);
  await transport.close();
});

test("after close no script runs and nothing is taken", async () => {
  const { transport, submit } = await started({ onNotify: () => assert.fail("the device is gone") });
  submit(1);
  await transport.close();
  await Promise.resolve();
  assert.deepEqual(transport.queues[0].take(), []);
  assert.deepEqual(takeBlk(transport.queues[0]), []);
});

describe("what the interface forbids is refused", () => {
  test("a second negotiation, one without VERSION_1", async () => {
    const transport = new FakeTransport();
    await assert.rejects(transport.negotiate(VirtioFeature.RING_PACKED), CODE("ERR_VIRTIO_FEATURES"));
    assert.equal(transport.features, 0n);
    await transport.negotiate(VirtioFeature.VERSION_1);
    await assert.rejects(transport.negotiate(VirtioFeature.VERSION_1), CODE("ERR_VIRTIO_STATUS"));
  });

  test("writing the config space and starting queues before the negotiation", async () => {
    const transport = new FakeTransport({ config: new Uint8Array(8) });
    await assert.rejects(transport.writeConfig(0, Uint8Array.of(1)), CODE("ERR_VIRTIO_STATUS"));
    await assert.rejects(transport.startQueues([]), CODE("ERR_VIRTIO_STATUS"));
    assert.equal(transport.config[0], 0);
  });

  test("config space that is not there", async () => {
    const none = new FakeTransport();
    assert.equal(none.hasConfig, false);
    await assert.rejects(none.readConfig(0, 1), CODE("ERR_VIRTIO_CONFIG"));
    const short = new FakeTransport({ config: new Uint8Array(8) });
    assert.equal(short.hasConfig, true);
    await assert.rejects(short.readConfig(4, 5), CODE("ERR_VIRTIO_CONFIG"));
    assert.equal((await short.readConfig(4, 4)).length, 4);
  });

  test("queues that the device does not have, run already, or lie wrongly", async () => {
    const { transport, setup } = await started();
    await assert.rejects(transport.startQueues([setup]), CODE("ERR_VIRTIO_STATUS"));
    await transport.close();
    for (const [change, check] of [
      [{ index: 1 }, CODE("ERR_VIRTIO_QUEUES")],
      [{ size: 7 }, RangeError],
      [{ size: 16 }, RangeError],
      [{ driverArea: setup.driverArea + 16 }, RangeError],
      [{ descriptorArea: setup.descriptorArea + 2 ** 30 }, RangeError],
    ] as const) {
      const other = new FakeTransport({ maxQueueSize: 8 });
      await other.negotiate(VirtioFeature.VERSION_1);
      await other.mapMemory(65536);
      await assert.rejects(other.startQueues([{ ...setup, ...change }]), check);
      await other.close();
    }
  });

  test("more regions than there are, and foreign ones", async () => {
    const transport = new FakeTransport({ maxRegions: 1 });
    const region = await transport.mapMemory(1);
    await assert.rejects(transport.mapMemory(1), CODE("ERR_VIRTIO_MEMORY"));
    await transport.unmapMemory(region);
    await assert.rejects(transport.unmapMemory(region), RangeError);
    await transport.mapMemory(1);
    await transport.close();
    assert.equal(transport.regionsClosed, 2);
  });

  test("wrong options", () => {
    assert.throws(() => new FakeTransport({ feature: 1n } as FakeTransportOptions), TypeError);
    assert.throws(() => new FakeTransport({ features: 1 } as unknown as FakeTransportOptions), TypeError);
    assert.throws(() => new FakeTransport({ config: [1] } as unknown as FakeTransportOptions), TypeError);
    assert.throws(() => new FakeTransport({ onNotify: 1 } as unknown as FakeTransportOptions), TypeError);
    assert.throws(() => new FakeTransport({ maxQueues: 0 }), RangeError);
  });
});

describe("failing at will", () => {
  test("a step fails until the failure is taken out", async () => {
    const transport = new FakeTransport();
    const error = new Error("not now");
    transport.failures.set("negotiate", error);
    await assert.rejects(transport.negotiate(VirtioFeature.VERSION_1), (got) => got === error);
    transport.failures.delete("negotiate");
    assert.equal(await transport.negotiate(VirtioFeature.VERSION_1), VirtioFeature.VERSION_1);
  });

  test("a loss is told once, also to who comes late, and ends every step", async () => {
    const transport = new FakeTransport({ config: new Uint8Array(8) });
    const error = new Error("gone");
    const told: unknown[] = [];
    transport.lose(error);
    transport.lose(new Error("again"));
    transport.onLost = (got) => told.push(got);
    await Promise.resolve();
    assert.deepEqual(told, [error]);
    await assert.rejects(transport.readConfig(0, 8), (got) => got === error);
    await assert.rejects(transport.mapMemory(1), (got) => got === error);
    await transport.close();
    await Promise.resolve();
    assert.deepEqual(told, [error]);
  });

  test("close is told as a loss, like that of real transports", async () => {
    const transport = new FakeTransport();
    const told: Error[] = [];
    transport.onLost = (error) => told.push(error);
    await transport.close();
    await transport.close();
    await Promise.resolve();
    assert.equal(told.length, 1);
    assert.ok(CODE("ERR_VIRTIO_CLOSED")(told[0]));
  });

  test("a config change is said and seen", async () => {
    const transport = new FakeTransport({ config: new Uint8Array(8) });
    let changes = 0;
    transport.onConfigChange = () => changes++;
    transport.changeConfig(Uint8Array.of(7), 3);
    assert.equal(changes, 1);
    assert.deepEqual(await transport.readConfig(3, 1), Uint8Array.of(7));
  });

  test("an aborted signal", async () => {
    const transport = new FakeTransport();
    const reason = new Error("enough");
    const signal = AbortSignal.abort(reason);
    await assert.rejects(transport.mapMemory(1, { signal }), (error) => error === reason);
    assert.deepEqual(transport.log, []);
  });
});
