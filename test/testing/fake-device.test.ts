/** The scriptable device of virtio-driver/testing, against the driver's half of both rings. */

import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { FakeDevice, linearMemory } from "../../src/testing/index.js";
import { VirtioFeature, Virtqueue, VirtqueueLayout } from "../../src/virtqueue/index.js";

const IOVA = 0x40_0000;
const DATA = 0x1000;

for (const [format, features, queueSize] of [
  ["split", 0n, 8],
  ["packed", VirtioFeature.RING_PACKED, 6],
] as const) {
  describe(`FakeDevice on a ${format} ring`, () => {
    const make = (more = 0n) => {
      const layout = new VirtqueueLayout({ queueSize, features: features | more });
      const buffer = new ArrayBuffer(8192);
      const queue = new Virtqueue({ layout, buffer, offset: 64, iova: IOVA + 64, features: features | more });
      const device = new FakeDevice({ layout, buffer, offset: 64, iova: IOVA + 64, features: features | more });
      const bytes = new Uint8Array(buffer);
      const submit = (): number => {
        queue.begin(2);
        queue.push(IOVA + DATA, 0, 4, false);
        queue.push(IOVA + DATA + 16, 0, 8, true);
        return queue.commit();
      };
      return { queue, device, bytes, submit };
    };

    it("takes requests, shows them, and writes into them", () => {
      const { queue, device, bytes, submit } = make();
      bytes.set([1, 2, 3, 4], DATA);
      const slot = submit();
      assert.deepEqual(device.take(), []); // not published
      queue.publish();
      const [request] = device.take();
      assert.equal(request.id, slot);
      assert.deepEqual([...request.read()], [1, 2, 3, 4]);
      assert.deepEqual([request.readableLengths, request.writableLengths], [[4], [8]]);
      request.write(Uint8Array.of(7, 8, 9), 2);
      assert.deepEqual([...bytes.subarray(DATA + 16, DATA + 24)], [0, 0, 7, 8, 9, 0, 0, 0]);
      assert.equal(request.written, 5);
      assert.throws(() => request.write(new Uint8Array(4), 5), { name: "RangeError" });
      assert.throws(() => request.write(new Uint8Array(1), 9), { name: "RangeError" });
      assert.deepEqual(device.held, [request]);
      device.complete(request);
      assert.equal(queue.poll(), -1);
      assert.equal(device.publish(), true);
      assert.deepEqual([queue.poll(), queue.usedLength, device.notifications], [slot, 5, 1]);
      assert.throws(() => device.complete(request), { name: "RangeError" });
    });

    it("holds requests back and completes them in any order", () => {
      const { queue, device, submit } = make();
      const slots = [submit(), submit(), submit()];
      queue.publish();
      assert.equal(device.take(2).length, 2);
      assert.equal(device.take().length, 1);
      for (const i of [2, 0]) device.complete(device.held[i], i);
      device.publish();
      assert.deepEqual([queue.poll(), queue.poll(), queue.poll()], [slots[2], slots[0], -1]);
      assert.deepEqual(
        device.held.map(({ id }) => id),
        [slots[1]],
      );
    });

    it("completes a batch by one entry, as IN_ORDER allows", () => {
      const { queue, device, submit } = make(VirtioFeature.IN_ORDER);
      for (let round = 0; round < 5; round++) {
        const slots = [submit(), submit(), submit()];
        queue.publish();
        device.take();
        assert.throws(() => device.completeBatch(4), { name: "RangeError" });
        device.completeBatch(2, 3);
        device.publish();
        assert.equal(queue.poll(), slots[0]);
        assert.deepEqual([queue.poll(), queue.usedLength], [slots[1], 3]);
        assert.equal(queue.poll(), -1);
        device.completeBatch(1);
        device.publish();
        assert.equal(queue.poll(), slots[2]);
      }
    });

    it("tells the driver when to notify, and asks whether it has to", () => {
      const { queue, device, submit } = make();
      device.disableNotifications();
      submit();
      assert.equal(queue.publish(), false);
      assert.equal(device.enableNotifications(), true);
      device.take();
      assert.equal(device.enableNotifications(), false);
      submit();
      assert.equal(queue.publish(), true);
      device.take();
      queue.disableNotifications();
      device.complete(device.held[0]);
      assert.equal(device.publish(), false);
      assert.equal(device.notifications, 0);
    });

    it("forges used entries that a driver must refuse", () => {
      const { queue, device, submit } = make();
      submit();
      queue.publish();
      device.forge(queueSize - 1, 0);
      device.publish();
      assert.throws(() => queue.poll(), { code: "ERR_VIRTIO_QUEUE_BROKEN" });
    });

    it("checks what the driver wrote", () => {
      const { queue, device } = make();
      queue.begin(1);
      queue.push(IOVA + 8192, 0, 1, true);
      queue.commit();
      queue.publish();
      assert.throws(() => device.take(), { code: "ERR_VIRTIO_QUEUE_BROKEN", message: /outside the shared memory/ });
    });
  });
}

describe("linearMemory and options", () => {
  it("refuses what cannot be", () => {
    assert.throws(() => linearMemory(new ArrayBuffer(0)), { name: "RangeError" });
    assert.throws(() => linearMemory(new ArrayBuffer(8), -1), { name: "RangeError" });
    const layout = new VirtqueueLayout({ queueSize: 4 });
    const buffer = new ArrayBuffer(4096);
    assert.throws(() => new FakeDevice({ layout, buffer, iovA: 0 } as never), { name: "TypeError", message: /"iova"/ });
    assert.throws(() => new FakeDevice({ layout, buffer: new ArrayBuffer(64) }), { name: "RangeError" });
  });

  it("takes a memory of one's own, and a base", () => {
    const layout = new VirtqueueLayout({ queueSize: 4, features: VirtioFeature.RING_PACKED });
    const memory = linearMemory(new ArrayBuffer(4096), 0x1000);
    const device = new FakeDevice({ layout, buffer: new ArrayBuffer(4096), memory, base: 0x8003_8003 });
    assert.equal(device.memory, memory);
    assert.equal(device.queue.base, 0x8003_8003);
  });
});
