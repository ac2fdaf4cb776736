/** A ring that another driver goes on with: from every position, with and without each feature, as if nothing had been. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { DescriptorChain, DeviceMemory, DeviceVirtqueue } from "../../src/virtqueue/index.js";
import { VirtioFeature, Virtqueue, VirtqueueLayout, type VirtqueueOptions } from "../../src/virtqueue/index.js";
import { Pair } from "./model.js";

const IOVA = 0x10000;

/** A split queue of 4, or a packed one, in memory of its own. */
function optionsOf(features: bigint, queueSize = 4): VirtqueueOptions & { readonly buffer: ArrayBuffer } {
  const layout = new VirtqueueLayout({ queueSize, features });
  return { layout, buffer: new ArrayBuffer(4096), iova: IOVA, features };
}

/** The device's half on the memory of a driver's. */
function deviceOf({ layout, buffer, features }: VirtqueueOptions): DeviceVirtqueue {
  const memory = new DeviceMemory();
  memory.add(BigInt(IOVA), buffer);
  return new DeviceVirtqueue({
    ...{ queueSize: layout.queueSize, features, memory },
    descriptorArea: { buffer, offset: 0 },
    driverArea: { buffer, offset: layout.driverAreaOffset },
    deviceArea: { buffer, offset: layout.deviceAreaOffset },
  });
}

/** Submit a chain of `count` elements; returns its slot. */
function submit(queue: Virtqueue, count: number): number {
  assert.ok(queue.begin(count) >= 0);
  for (let i = 0; i < count; i++) queue.push(IOVA + 2048 + 16 * i, 0, 16, false);
  const slot = queue.commit();
  queue.publish();
  return slot;
}

for (const packed of [false, true]) {
  for (const inOrder of [false, true]) {
    for (const eventIdx of [false, true]) {
      for (const tableEntries of [0, 3]) {
        const features = [
          packed && "packed",
          inOrder && "IN_ORDER",
          eventIdx && "EVENT_IDX",
          tableEntries && "indirect",
        ];
        test(`a new driver at every position: ${features.filter(Boolean).join(", ") || "split"}`, () => {
          // Split indices run through 65535 to 0; packed positions through both wrap counters, at chains of 1 to 4.
          const queueSize = packed ? 5 : 4;
          const rounds = packed ? 4 * 2 * queueSize * 5 : 66_000;
          const pair = new Pair({ queueSize, packed, eventIdx, inOrder, tableEntries });
          for (let i = 0; i < rounds; i++) {
            pair.add(1, packed ? Math.floor(i / (2 * queueSize)) % 4 : i % 3, i, false);
            if (i % 2 === 0) pair.driverEnable();
            else pair.driverDisable();
            if (i % 3 === 0) pair.deviceEnable();
            else if (i % 7 === 0) pair.deviceDisable();
            pair.resume();
          }
        });
      }
    }
  }
}

for (const packed of [false, true]) {
  test(`${packed ? "packed" : "split"} in order: a ring that begins anew forgets the rest of a batch`, () => {
    const options = optionsOf(VirtioFeature.IN_ORDER | (packed ? VirtioFeature.RING_PACKED : 0n));
    const queue = new Virtqueue(options);
    const device = deviceOf(options);
    const chain = new DescriptorChain(4);
    const slots = [submit(queue, 1), submit(queue, 1), submit(queue, 1)];
    while (device.pop(chain)) assert.ok(slots.includes(chain.id));
    device.pushBatch(slots[2], 3, 3, 0);
    device.publish();
    assert.equal(queue.poll(), slots[0]);
    queue.restart();
    assert.deepEqual([queue.poll(), queue.hasUsed(), queue.inFlight, queue.numFree], [-1, false, 0, 4]);
  });
}

describe("where a queue stands", () => {
  test("split: the index, which is that of SET_VRING_BASE", () => {
    const options = optionsOf(0n);
    const queue = new Virtqueue(options);
    const device = deviceOf(options);
    const chain = new DescriptorChain(4);
    assert.equal(queue.position, 0);
    for (let i = 1; i <= 6; i++) {
      submit(queue, 2);
      assert.equal(queue.position, undefined, "not while a chain is in flight");
      assert.ok(device.pop(chain));
      device.push(chain.id, chain.ringCount, 0);
      device.publish();
      queue.poll();
      assert.equal(queue.position, i);
      assert.equal(device.base, i);
    }
  });

  test("SPLIT-DRV-05 split in order: descriptors go on in table order, whoever drives the queue", () => {
    const options = optionsOf(VirtioFeature.IN_ORDER);
    const device = deviceOf(options);
    const chain = new DescriptorChain(4);
    let queue = new Virtqueue(options);
    const heads: number[] = [];
    for (const count of [3, 2, 1, 3, 4, 1]) {
      heads.push(submit(queue, count));
      assert.ok(device.pop(chain));
      device.push(chain.id, chain.ringCount, 0);
      device.publish();
      assert.equal(queue.poll(), heads.at(-1));
      queue = new Virtqueue({ ...options, resume: queue.position ?? assert.fail("it is not idle") });
    }
    assert.deepEqual(heads, [0, 3, 1, 2, 1, 1]);
  });

  test("packed: position and wrap counter, both halves alike", () => {
    const options = optionsOf(VirtioFeature.RING_PACKED, 3);
    const queue = new Virtqueue(options);
    const device = deviceOf(options);
    const chain = new DescriptorChain(3);
    const seen = [queue.position];
    for (let i = 0; i < 3; i++) {
      submit(queue, 2);
      assert.ok(device.pop(chain));
      device.push(chain.id, chain.ringCount, 0);
      device.publish();
      queue.poll();
      seen.push(queue.position);
      assert.equal(queue.position, device.base);
    }
    assert.deepEqual(seen, [0x8000_8000, 0x8002_8002, 0x0001_0001, 0x8000_8000]);
  });

  test("a resumed ring is not cleared, a new one is", () => {
    for (const features of [0n, VirtioFeature.RING_PACKED]) {
      const options = optionsOf(features);
      const bytes = new Uint8Array(options.buffer, 0, options.layout.deviceAreaEnd).fill(0x5a);
      void new Virtqueue({ ...options, resume: features === 0n ? 0x5a5a : 0x8000_8000 });
      assert.ok(bytes.every((byte) => byte === 0x5a));
      void new Virtqueue(options);
      assert.ok(bytes.every((byte) => byte === 0));
    }
  });

  test("used chains that the driver before has not taken break the queue, not the process", () => {
    const options = optionsOf(0n);
    const device = deviceOf(options);
    const chain = new DescriptorChain(4);
    submit(new Virtqueue(options), 1);
    assert.ok(device.pop(chain));
    device.push(chain.id, chain.ringCount, 0);
    device.publish();
    const resumed = new Virtqueue({ ...options, resume: 0 });
    assert.throws(() => resumed.poll(), { code: "ERR_VIRTIO_QUEUE_BROKEN" });
  });

  test("where no idle queue can stand is refused", () => {
    const { IN_ORDER, RING_PACKED } = VirtioFeature;
    const wrong: readonly [features: bigint, positions: readonly number[]][] = [
      [0n, [-1, 0.5, 2 ** 32, 0x1_0000, Number.NaN]],
      [IN_ORDER, [0x4_0000, 0xffff_0000]],
      [RING_PACKED, [0x8000, 0x8001_8000, 0x0001_8001, 0x8004_8004, 0x0004_0004]],
    ];
    for (const [features, positions] of wrong) {
      for (const resume of positions) {
        const options = { ...optionsOf(features), resume };
        assert.throws(() => new Virtqueue(options), { code: "ERR_VIRTIO_ARGUMENT" }, `${features} ${resume}`);
      }
    }
    const options = { ...optionsOf(0n), resume: "0" as unknown as number };
    assert.throws(() => new Virtqueue(options), { code: "ERR_VIRTIO_ARGUMENT" });
    assert.equal(new Virtqueue({ ...optionsOf(IN_ORDER), resume: 0x3_ffff }).position, 0x3_ffff);
    assert.equal(new Virtqueue({ ...optionsOf(RING_PACKED), resume: 0 }).position, 0);
    assert.equal(new Virtqueue({ ...optionsOf(RING_PACKED), resume: 0x8003_8003 }).position, 0x8003_8003);
  });
});
