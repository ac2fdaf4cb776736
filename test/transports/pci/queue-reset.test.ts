/** A single queue that is reset and begins anew, with requests in flight: what the driver waits for and sets up again. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import type { MemoryRegion } from "../../../src/memory/index.js";
import type { FakePciFunction } from "../../../src/testing/index.js";
import { VirtioFeature, Virtqueue, VirtqueueLayout } from "../../../src/virtqueue/index.js";
import { turn } from "../../sys/helpers.js";
import { place } from "../support.js";
import { attachRunning, BASE } from "./support.js";

const { RING_PACKED, RING_RESET } = VirtioFeature;
/** Where the requests of these tests point; nothing is there, and the device does not look. */
const DATA = 0x5_4010_0000;

/** The driver's half of the queue that `place` put at `offset` of a region. */
function driverOf(region: MemoryRegion, size: number, features: bigint, offset = 0): Virtqueue {
  const layout = new VirtqueueLayout({ queueSize: size, features });
  return new Virtqueue({ layout, buffer: region.buffer, offset, iova: region.iova + offset, features });
}

/** Make a request of one element available. */
function request(queue: Virtqueue): number {
  const slot = queue.begin(1);
  queue.push(DATA % 2 ** 32, Math.floor(DATA / 2 ** 32), 16, false);
  queue.commit();
  queue.publish();
  return slot;
}

/** Names of the registers of one queue written since `from`, in order. */
function registersWritten(fn: FakePciFunction, from: number): string[] {
  const writes = fn.log.slice(from).filter(({ kind, target }) => kind === "write" && target === "common");
  return writes.map(({ name }) => name).filter((name) => /^QUEUE_(?!SELECT|RESET)/.test(name));
}

for (const [format, features] of [
  ["split", 0n],
  ["packed", RING_PACKED],
] as const) {
  const packed = features !== 0n;
  const options = { features: BASE | RING_RESET | features };

  describe(`a ${format} queue that is reset`, () => {
    test("VQ-DRV-01 while queue_reset reads 1 the reset is pending, and nothing is believed to be over", async (t) => {
      const { fn, device, region } = await attachRunning(t, options, {
        features,
        prepare: (each) => (each.queueResetReads = 5),
      });
      const queue = driverOf(region, 8, features);
      request(queue);
      assert.equal(fn.queues[0].take().length, 1);
      let isOver = false;
      const seen: unknown[] = [];
      fn.onAccess = ({ kind, name }) => {
        if (kind === "read" && name === "QUEUE_RESET")
          seen.push([isOver, region.buffer.byteLength > 0, fn.queues.length]);
      };
      const resetting = device.resetQueue(0).then(() => (isOver = true));
      await assert.rejects(device.enableQueue(place(region, 0, 8, packed, 65_536)), /was not reset/);
      await resetting;
      // The last read is the one that finds it done; until then the queue is the device's.
      assert.deepEqual(
        seen,
        Array.from({ length: 6 }, () => [false, true, 1]),
      );
      assert.deepEqual(fn.queues, []);
    });

    test("VQ-DRV-02 it is configured as at first, register by register, and begins at the beginning", async (t) => {
      const { fn, device, region, queues } = await attachRunning(t, options, { features });
      const first = registersWritten(fn, 0);
      const queue = driverOf(region, 8, features);
      // Beyond the end of the ring, where a wrap counter or an index that is not 0 would show; one stays in flight.
      for (let i = 0; i < 11; i++) {
        assert.ok(request(queue) >= 0);
        if (i === 10) break;
        fn.queues[0].complete(...fn.queues[0].take());
        assert.ok(queue.poll() >= 0);
      }
      await device.resetQueue(0);

      const from = fn.log.length;
      const setup = place(region, 0, 32, packed, 65_536);
      const again = driverOf(region, 32, features, 65_536);
      assert.equal(await device.enableQueue(setup), queues[0]);
      assert.deepEqual(registersWritten(fn, from), first);
      assert.deepEqual(fn.queues[0].setup, setup);
      for (let i = 0; i < 40; i++) {
        const slot = request(again);
        queues[0].notify(0);
        await turn();
        const taken = fn.queues[0].take();
        assert.equal(taken.length, 1, `request ${i} of the new queue`);
        fn.queues[0].complete(...taken);
        assert.equal(again.poll(), slot);
        assert.ok(queues[0].completion.drain(), "its vector is connected again");
      }
    });
  });
}
