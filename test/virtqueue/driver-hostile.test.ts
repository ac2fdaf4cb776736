/** A device that lies, on both formats: each impossible value breaks the queue for good, and nothing else. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { VirtioError } from "../../src/errors.js";
import { AVAIL, RawRing, type RawOptions, USED, WRITE } from "./raw-ring.js";

interface Lie {
  readonly what: string;
  readonly options: Partial<RawOptions>;
  /** What the device writes; three chains of two descriptors are published, as slots `slots`. */
  readonly tell: (ring: RawRing, slots: readonly number[]) => void;
  /** Chains that come back before the lie is found. */
  readonly good?: number;
  readonly message: RegExp;
}

const WRAP_1 = AVAIL | USED;

const SPLIT: readonly Lie[] = [
  {
    what: "used.idx runs ahead of everything published",
    options: {},
    tell: (ring) => {
      ring.usedIdx = 4;
    },
    message: /used\.idx 4, expected at most 3 more than 0/,
  },
  {
    what: "used.idx goes back",
    options: {},
    tell: (ring) => {
      ring.usedIdx = 0xffff;
    },
    message: /used\.idx 65535/,
  },
  {
    what: "used.idx jumps by half of its range",
    options: {},
    tell: (ring) => {
      ring.usedIdx = 0x8000;
    },
    message: /used\.idx 32768/,
  },
  {
    what: "used.idx counts a chain that is committed but not published",
    options: {},
    tell: (ring, slots) => {
      ring.add(1, 0);
      slots.forEach((slot, i) => {
        ring.setUsed(i, slot, 0);
      });
      ring.setUsed(3, 6, 0);
      ring.usedIdx = 4;
    },
    message: /used\.idx 4, expected at most 3/,
  },
  {
    what: "id of a chain that is committed but not published",
    options: {},
    tell: (ring) => {
      ring.setUsed(0, ring.add(1, 0), 0);
      ring.usedIdx = 1;
    },
    message: /used\.ring id 6, expected .* published/,
  },
  {
    what: "id out of range",
    options: {},
    tell: (ring) => {
      ring.setUsed(0, 8, 0);
      ring.usedIdx = 1;
    },
    message: /used\.ring id 8,/,
  },
  {
    what: "id that is one in flight in its lower 16 bits only",
    options: {},
    tell: (ring, slots) => {
      ring.setUsed(0, 0x10000 + slots[0], 0);
      ring.usedIdx = 1;
    },
    message: /used\.ring id 65536,/,
  },
  {
    what: "id of all ones",
    options: {},
    tell: (ring) => {
      ring.setUsed(0, 0xffff_ffff, 0);
      ring.usedIdx = 1;
    },
    message: /used\.ring id 4294967295,/,
  },
  {
    what: "id of a descriptor that is free",
    options: {},
    tell: (ring) => {
      ring.setUsed(0, 7, 0);
      ring.usedIdx = 1;
    },
    message: /used\.ring id 7,/,
  },
  {
    what: "id of a descriptor in the middle of a chain",
    options: {},
    tell: (ring, slots) => {
      ring.setUsed(0, slots[0] + 1, 0);
      ring.usedIdx = 1;
    },
    message: /used\.ring id 1,/,
  },
  {
    what: "the same id twice",
    options: {},
    tell: (ring, slots) => {
      ring.setUsed(0, slots[1], 0);
      ring.setUsed(1, slots[1], 0);
      ring.usedIdx = 2;
    },
    good: 1,
    message: /used\.ring id 2,/,
  },
  {
    what: "IN_ORDER: a batch that ends at a chain behind used.idx",
    options: { inOrder: true },
    tell: (ring, slots) => {
      ring.setUsed(0, slots[2], 0);
      ring.usedIdx = 2;
    },
    message: /used\.idx 2, expected 3 more than 0/,
  },
  {
    what: "IN_ORDER: id out of range",
    options: { inOrder: true },
    tell: (ring) => {
      ring.setUsed(0, 0x1_0000, 0);
      ring.usedIdx = 3;
    },
    message: /used\.ring id 65536,/,
  },
  {
    what: "IN_ORDER: id of a free descriptor",
    options: { inOrder: true },
    tell: (ring) => {
      ring.setUsed(0, 6, 0);
      ring.usedIdx = 1;
    },
    message: /used\.ring id 6,/,
  },
  {
    what: "IN_ORDER: the same id twice",
    options: { inOrder: true },
    tell: (ring, slots) => {
      ring.setUsed(0, slots[0], 0);
      ring.setUsed(1, slots[0], 0);
      ring.usedIdx = 2;
    },
    good: 1,
    message: /used\.ring id 0,/,
  },
  {
    what: "IN_ORDER: used.idx beyond what was published",
    options: { inOrder: true },
    tell: (ring, slots) => {
      ring.setUsed(0, slots[2], 0);
      ring.usedIdx = 5;
    },
    message: /used\.idx 5, expected at most 3/,
  },
];

const PACKED: readonly Lie[] = [
  {
    what: "id of a buffer that is committed but not published",
    options: {},
    tell: (ring) => ring.setPacked(0, ring.add(1, 0), 0, WRAP_1),
    message: /id 3, expected .* published/,
  },
  {
    what: "IN_ORDER: id of a buffer that is committed but not published",
    options: { inOrder: true },
    tell: (ring) => ring.setPacked(0, ring.add(1, 0), 0, WRAP_1),
    message: /id 3, expected .* published/,
  },
  {
    what: "id out of range",
    options: {},
    tell: (ring) => ring.setPacked(0, 8, 0, WRAP_1),
    message: /id 8,/,
  },
  {
    what: "id of all ones",
    options: {},
    tell: (ring) => ring.setPacked(0, 0xffff, 0, WRAP_1 | WRITE),
    message: /id 65535,/,
  },
  {
    what: "id of no buffer in flight",
    options: {},
    tell: (ring) => ring.setPacked(0, 7, 0, WRAP_1),
    message: /id 7,/,
  },
  {
    what: "the same id twice",
    options: {},
    tell: (ring, slots) => {
      ring.setPacked(0, slots[1], 0, WRAP_1);
      ring.setPacked(2, slots[1], 0, WRAP_1);
    },
    good: 1,
    message: /id 1,/,
  },
  {
    what: "IN_ORDER: id out of range",
    options: { inOrder: true },
    tell: (ring) => ring.setPacked(0, 8, 0, WRAP_1),
    message: /id 8,/,
  },
  {
    what: "IN_ORDER: id of no buffer in flight",
    options: { inOrder: true },
    tell: (ring) => ring.setPacked(0, 3, 0, WRAP_1),
    message: /id 3,/,
  },
  {
    what: "IN_ORDER: the same id twice",
    options: { inOrder: true },
    tell: (ring, slots) => {
      ring.setPacked(0, slots[0], 0, WRAP_1);
      ring.setPacked(2, slots[0], 0, WRAP_1);
    },
    good: 1,
    message: /id 0,/,
  },
];

for (const packed of [false, true]) {
  describe(`a lying device on a ${packed ? "packed" : "split"} ring breaks the queue, once and for good`, () => {
    for (const eventIdx of [false, true]) {
      for (const { what, options, tell, good = 0, message } of packed ? PACKED : SPLIT) {
        test(`${what}${eventIdx ? ", EVENT_IDX" : ""}`, () => {
          const ring = new RawRing({ size: 8, packed, eventIdx, ...options });
          const slots = [ring.add(1, 1), ring.add(1, 1), ring.add(1, 1)];
          ring.queue.publish();
          tell(ring, slots);
          for (let i = 0; i < good; i++) assert.ok(ring.queue.poll() >= 0);
          const { inFlight, numFree, usedLength } = ring.queue;
          const before = ring.bytes.slice();

          let broken: unknown;
          assert.throws(
            () => ring.queue.poll(),
            (error) => {
              broken = error;
              return (
                error instanceof VirtioError && error.code === "ERR_VIRTIO_QUEUE_BROKEN" && message.test(error.message)
              );
            },
          );
          const same = (error: unknown): boolean => error === broken;
          const { queue } = ring;
          for (let i = 0; i < 2; i++) {
            assert.throws(() => queue.poll(), same);
            assert.throws(() => queue.begin(1), same);
            assert.throws(() => ring.addFramed(), same);
            assert.throws(() => queue.publish(), same);
            assert.throws(() => queue.hasUsed(), same);
            assert.throws(() => queue.enableNotifications(), same);
            queue.disableNotifications();
          }
          assert.deepEqual([queue.inFlight, queue.numFree, queue.usedLength], [inFlight, numFree, usedLength]);
          assert.deepEqual(ring.bytes, before, "nothing is written any more");
        });
      }
    }
  });
}

describe("what a broken ring must not be taken for", () => {
  test("packed: a used entry while nothing is in flight is not one", () => {
    for (const flags of [WRAP_1, WRAP_1 | WRITE, AVAIL, USED, 0]) {
      const ring = new RawRing({ size: 4, packed: true });
      ring.setPacked(0, 0, 5, flags);
      assert.equal(ring.queue.hasUsed(), false);
      assert.equal(ring.queue.poll(), -1);
    }
  });

  test("packed: flags of the other round are not used, whatever else is set", () => {
    const ring = new RawRing({ size: 4, packed: true });
    const id = ring.add(0, 1);
    ring.queue.publish();
    for (const flags of [0, WRITE, AVAIL, USED, AVAIL | 0x7f, USED | 0x7f7f, 0x7f7f & ~AVAIL]) {
      ring.setPacked(0, id, 5, flags);
      assert.equal(ring.queue.hasUsed(), false);
      assert.equal(ring.queue.poll(), -1);
    }
    // Reserved bits, NEXT and INDIRECT of a used entry mean nothing.
    ring.setPacked(0, id, 5, 0xffff);
    assert.equal(ring.queue.poll(), id);
    assert.equal(ring.queue.usedLength, 5);
  });

  test("packed: a device that takes its used flags back after they were seen changes nothing", () => {
    const ring = new RawRing({ size: 4, packed: true });
    const first = ring.add(0, 1);
    const second = ring.add(0, 1);
    ring.queue.publish();
    ring.setPacked(0, first, 5, WRAP_1 | WRITE);
    assert.equal(ring.queue.poll(), first);
    ring.setPacked(0, first, 5, AVAIL);
    assert.equal(ring.queue.poll(), -1);
    ring.setPacked(1, second, 5, WRAP_1 | WRITE);
    assert.equal(ring.queue.poll(), second);
  });

  test("packed: len counts also where a device leaves WRITE out, as QEMU does", () => {
    const ring = new RawRing({ size: 4, packed: true });
    const id = ring.add(1, 1);
    ring.queue.publish();
    ring.setPacked(0, id, 16, WRAP_1);
    assert.deepEqual([ring.queue.poll(), ring.queue.usedLength], [id, 16]);
  });
});

describe("SPLIT-DRV-15 SPLIT-DRV-16 a length is clamped to what the device may write, never believed", () => {
  for (const packed of [false, true]) {
    for (const tables of [0, 4]) {
      for (const len of [0, 1, 32, 33, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff]) {
        test(`${packed ? "packed" : "split"}, tables of ${tables}: ${len} of 32`, () => {
          const ring = new RawRing({ size: 4, packed, tables });
          const slot = ring.add(1, 2);
          ring.queue.publish();
          if (packed) ring.setPacked(0, slot, len, WRAP_1 | WRITE);
          else {
            ring.setUsed(0, slot, len);
            ring.usedIdx = 1;
          }
          assert.equal(ring.queue.poll(), slot);
          assert.equal(ring.queue.usedLength, Math.min(len, 32));
        });
      }
    }
  }

  test("a chain that the device may only read has none", () => {
    for (const packed of [false, true]) {
      const ring = new RawRing({ size: 4, packed });
      const slot = ring.add(2, 0);
      ring.queue.publish();
      if (packed) ring.setPacked(0, slot, 99, WRAP_1 | WRITE);
      else {
        ring.setUsed(0, slot, 99);
        ring.usedIdx = 1;
      }
      assert.deepEqual([ring.queue.poll(), ring.queue.usedLength], [slot, 0]);
    }
  });

  test("framed: data and trailer, or the trailer alone", () => {
    for (const packed of [false, true]) {
      for (const tables of [0, 3]) {
        for (const writable of [false, true]) {
          const ring = new RawRing({ size: 4, packed, tables });
          const device = ring.device();
          const slot = ring.addFramed(writable);
          ring.queue.publish();
          const [request] = device.take();
          device.complete(request, 1000);
          device.publish();
          assert.deepEqual([ring.queue.poll(), ring.queue.usedLength], [slot, writable ? 17 : 1]);
        }
      }
    }
  });

  test("4 GiB and more of writable bytes are counted as 2^32-1", () => {
    for (const packed of [false, true]) {
      const ring = new RawRing({ size: 4, packed });
      ring.queue.begin(2);
      ring.queue.push(0, 1, 0xffff_ffff, true);
      ring.queue.push(0, 2, 1, true);
      const slot = ring.queue.commit();
      ring.queue.publish();
      if (packed) ring.setPacked(0, slot, 0xffff_ffff, WRAP_1 | WRITE);
      else {
        ring.setUsed(0, slot, 0xffff_ffff);
        ring.usedIdx = 1;
      }
      assert.deepEqual([ring.queue.poll(), ring.queue.usedLength], [slot, 0xffff_ffff]);
    }
  });
});

test("the driver never reads back what it wrote: descriptors and links may be garbage", () => {
  for (const packed of [false, true]) {
    for (const tables of [0, 3]) {
      for (const inOrder of [false, true]) {
        const ring = new RawRing({ size: 8, packed, tables, inOrder });
        let garbage = 1;
        for (let round = 0; round < 40; round++) {
          const slots = [ring.add(1, 1), ring.addFramed()];
          ring.queue.publish();
          const used = ring.layout.queueSize - ring.queue.numFree;
          // The device overwrites all that it can reach, then uses both chains by the book.
          for (let i = 0; i < ring.layout.driverAreaOffset + 4; i++) {
            ring.bytes[64 + i] = garbage = (garbage * 73 + 41) & 0xff;
          }
          if (packed) {
            const { position, wrap } = positionOf(ring);
            const counts = tables === 0 ? [2, 3] : [1, 1];
            const flags = (at: number): number => (at < 8 === (wrap === 1) ? WRAP_1 : 0) | WRITE;
            // Nothing else may look used.
            for (let i = 0; i < 8; i++) ring.setPacked(i, 0xffff, 0xffff_ffff, wrap === 1 ? USED : AVAIL);
            ring.setPacked(position, slots[0], 1, flags(position));
            const next = position + counts[0];
            ring.setPacked(next % 8, slots[1], 1, flags(next));
          } else {
            const idx = (2 * round) & 0xffff;
            ring.setUsed(idx % 8, slots[0], 1);
            ring.setUsed((idx + 1) % 8, slots[1], 1);
            ring.usedIdx = idx + 2;
          }
          assert.deepEqual([ring.queue.poll(), ring.queue.poll(), ring.queue.poll()], [...slots, -1]);
          assert.equal(ring.queue.numFree, 8);
          assert.ok(used >= 2);
        }
      }
    }
  }
});

/** Where a packed ring with nothing in flight before the last two chains finds its next used entry. */
function positionOf(ring: RawRing): { position: number; wrap: number } {
  const after = ring.queue.notificationData / 2 ** 16;
  const used = ring.layout.queueSize - ring.queue.numFree;
  const end = (after & 0x7fff) + ((after & 0x8000) !== 0 ? 8 : 16) - used;
  return { position: end % 8, wrap: Math.floor(end / 8) % 2 === 1 ? 1 : 0 };
}
