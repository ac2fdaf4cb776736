/** Every lie of the hostile device, told to the driver's half of both rings. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { VirtioError } from "../../src/errors.js";
import { HostileDevice, LIES } from "../../src/testing/index.js";
import { RawRing } from "../virtqueue/raw-ring.js";

const KINDS = [
  { packed: false },
  { packed: false, eventIdx: true, tables: 4 },
  { packed: false, inOrder: true },
  { packed: true },
  { packed: true, eventIdx: true, tables: 4 },
  { packed: true, inOrder: true },
] as const;

const isBroken = (error: unknown): boolean => error instanceof VirtioError && error.code === "ERR_VIRTIO_QUEUE_BROKEN";

/** Three chains of one readable and two writable elements of 16 bytes, in flight and held. */
function inFlight(kind: (typeof KINDS)[number], before: number) {
  const ring = new RawRing({ size: 16, ...kind });
  const device = ring.device();
  ring.advance(device, before);
  const slots = [ring.add(1, 2), ring.add(1, 2), ring.add(1, 2)];
  ring.queue.publish();
  device.take();
  let notified = 0;
  const hostile = new HostileDevice(device, () => notified++);
  return { ring, device, slots, hostile, notified: () => notified };
}

for (const kind of KINDS) {
  const name = Object.entries(kind)
    .filter(([, value]) => value !== false)
    .map(([key]) => key);
  describe(`a hostile device on a ring: ${["split", ...name].slice(kind.packed ? 1 : 0).join(", ")}`, () => {
    for (const before of [0, 14, 16 * 3 + 5]) {
      const { hostile } = inFlight(kind, 0);
      for (const { name: lie, what, outcome } of hostile.lies) {
        test(`${lie}, ${what}, after ${before} requests: ${outcome}`, () => {
          const { ring, device, slots, hostile: liar, notified } = inFlight(kind, before);
          const { queue } = ring;
          const guard = ring.bytes.slice(0, 64);
          const held = [...device.held];
          if (lie === "id-unpublished") ring.add(1, 2);
          const rest = liar.tell(lie);
          assert.ok(notified() > 0);

          const returned: { slot: number; length: number }[] = [];
          const drain = (): void => {
            for (let slot = queue.poll(); slot >= 0; slot = queue.poll()) {
              assert.ok(slots.includes(slot), `slot ${slot} was never given out`);
              assert.ok(!returned.some((each) => each.slot === slot), `slot ${slot} came back twice`);
              assert.ok(queue.usedLength <= 32, `${queue.usedLength} bytes were not there to be written`);
              returned.push({ slot, length: queue.usedLength });
            }
          };
          if (outcome === "breaks") {
            assert.throws(drain, isBroken);
            assert.throws(() => queue.poll(), isBroken);
            assert.throws(() => queue.begin(1), isBroken);
            assert.throws(() => queue.publish(), isBroken);
            return;
          }
          drain();
          rest();
          if (outcome === "nothing") {
            assert.deepEqual(returned, []);
          } else {
            assert.equal(returned[0]?.slot, slots[0]);
            if (outcome === "short") assert.ok(returned[0].length <= 1);
            else assert.equal(returned[0].length, 32);
          }
          // The others do not suffer, nor what comes later.
          for (const request of held) {
            if (device.held.includes(request)) device.complete(request.write(new Uint8Array(32)));
          }
          device.publish();
          drain();
          assert.deepEqual(new Set(returned.map(({ slot }) => slot)), new Set(slots));
          assert.deepEqual([queue.inFlight, queue.numFree, queue.poll()], [0, 16, -1]);
          assert.ok(ring.add(2, 2) >= 0);
          queue.publish();
          assert.deepEqual(ring.bytes.slice(0, 64), guard, "memory in front of the ring");
        });
      }
    }

    test("used entries before anything was made available", () => {
      for (const length of [0, 1, 0xffff_ffff]) {
        const ring = new RawRing({ size: 16, ...kind });
        new HostileDevice(ring.device()).forge(0, length);
        if (kind.packed) assert.equal(ring.queue.poll(), -1);
        else assert.throws(() => ring.queue.poll(), isBroken);
      }
    });

    test("id-unpublished: a chain that is committed and not published", () => {
      const { ring, hostile } = inFlight(kind, 5);
      const slot = ring.add(1, 2);
      hostile.forge(slot, 0);
      if (!kind.packed) assert.equal(hostile.nextHead, slot);
      assert.throws(() => ring.queue.poll(), isBroken);
    });
  });
}

test("what cannot be told is refused", () => {
  const { hostile } = inFlight({ packed: false }, 0);
  assert.throws(() => hostile.tell("wrap-flipped"), { name: "RangeError" });
  assert.throws(() => hostile.tell("out-of-order"), { name: "RangeError" });
  assert.throws(() => new HostileDevice(new RawRing({ size: 4 }).device()).tell("silence"), { name: "RangeError" });
  assert.equal(new Set(LIES.map(({ name }) => name)).size, LIES.length);
});
