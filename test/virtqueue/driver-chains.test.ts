/** What a driver writes into its rings: chains of every shape, descriptor by descriptor. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { DescriptorChain } from "../../src/virtqueue/index.js";
import { AVAIL, BASE, DATA, INDIRECT, NEXT, QUEUE_OFFSET, RawRing, USED, WRITE } from "./raw-ring.js";

const DATA_LO = DATA >>> 0;
const DATA_HI = Math.floor(DATA / 2 ** 32);

/** Add a chain whose elements have these lengths, at `DATA`, `DATA + 0x1000`, … */
function addLengths(ring: RawRing, readable: readonly number[], writable: readonly number[]): number {
  const lengths = [...readable, ...writable];
  const slot = ring.queue.begin(lengths.length);
  lengths.forEach((length, i) => {
    ring.queue.push(DATA_LO + 0x1000 * i, DATA_HI, length, i >= readable.length);
  });
  return ring.queue.commit() === slot ? slot : -2;
}

function addr(i: number): bigint {
  return BigInt(DATA) + BigInt(0x1000 * i);
}

describe("SPLIT-DRV-01 PACKED-DRV-01 SPLIT-DRV-17 a new queue", () => {
  for (const packed of [false, true]) {
    test(`${packed ? "packed" : "split"}: zeroed areas, aligned; nothing else is touched`, () => {
      const ring = new RawRing({ size: 8, packed });
      const { layout, bytes } = ring;
      const areas = bytes.subarray(QUEUE_OFFSET, QUEUE_OFFSET + layout.deviceAreaEnd);
      assert.ok(
        areas.every((byte) => byte === 0),
        "descriptors, driver area and device area",
      );
      assert.ok(bytes.subarray(0, QUEUE_OFFSET).every((byte) => byte === 0xff));
      assert.ok(bytes.subarray(QUEUE_OFFSET + layout.deviceAreaEnd).every((byte) => byte === 0xff));
      assert.equal((BASE + QUEUE_OFFSET) % 16, 0);
      assert.equal(layout.driverAreaOffset % (packed ? 4 : 2), 0);
      assert.equal(layout.deviceAreaOffset % 4, 0);
    });
  }
});

describe("one chain in a ring", () => {
  test("SPLIT-DRV-02 split: flags and links, readable elements first", () => {
    const ring = new RawRing({ size: 4 });
    assert.equal(addLengths(ring, [16, 100], [512]), 0);
    ring.queue.publish();
    assert.deepEqual(ring.descriptors.slice(0, 3), [
      { addr: addr(0), len: 16, flags: NEXT, tail: 1 },
      { addr: addr(1), len: 100, flags: NEXT, tail: 2 },
      { addr: addr(2), len: 512, flags: WRITE, tail: ring.desc(2).tail },
    ]);
    assert.equal(ring.availRing(0), 0);
    assert.equal(ring.availIdx, 1);
  });

  test("PACKED-DRV-07 PACKED-DRV-17 packed: flags of this round in all, id in the last", () => {
    const ring = new RawRing({ size: 4, packed: true });
    const id = addLengths(ring, [16, 100], [512]);
    ring.queue.publish();
    assert.deepEqual(ring.descriptors.slice(0, 3), [
      { addr: addr(0), len: 16, flags: AVAIL | NEXT, tail: id },
      { addr: addr(1), len: 100, flags: AVAIL | NEXT, tail: id },
      { addr: addr(2), len: 512, flags: AVAIL | WRITE, tail: id },
    ]);
  });

  test("PACKED-DRV-17 a single element has no NEXT", () => {
    for (const packed of [false, true]) {
      for (const writable of [false, true]) {
        const ring = new RawRing({ size: 4, packed });
        addLengths(ring, writable ? [] : [7], writable ? [7] : []);
        ring.queue.publish();
        assert.equal(ring.desc(0).flags, (packed ? AVAIL : 0) | (writable ? WRITE : 0));
      }
    }
  });

  test("PACKED-DRV-17 a chain across the end of the ring changes its polarity there", () => {
    const ring = new RawRing({ size: 5, packed: true });
    ring.advance(ring.device(), 3);
    addLengths(ring, [1, 2], [3, 4]); // positions 3, 4, 0, 1
    ring.queue.publish();
    const flags = [3, 4, 0, 1].map((i) => ring.desc(i).flags);
    assert.deepEqual(flags, [AVAIL | NEXT, AVAIL | NEXT, USED | NEXT | WRITE, USED | WRITE]);
  });

  test("PACKED-DRV-17 polarity changes back in the round after", () => {
    const ring = new RawRing({ size: 5, packed: true });
    ring.advance(ring.device(), 9);
    addLengths(ring, [1], [2, 3]); // positions 4, 0, 1 of the second round
    ring.queue.publish();
    const flags = [4, 0, 1].map((i) => ring.desc(i).flags);
    assert.deepEqual(flags, [USED | NEXT, AVAIL | NEXT | WRITE, AVAIL | WRITE]);
  });

  test("addresses take all 64 bits, halves signed or not", () => {
    for (const packed of [false, true]) {
      for (const [lo, hi] of [
        [0xffff_fff0, 0xffff_ffff],
        [-16, -1],
      ]) {
        const ring = new RawRing({ size: 2, packed });
        ring.queue.begin(1);
        ring.queue.push(lo, hi, 16, false);
        ring.queue.commit();
        ring.queue.publish();
        assert.equal(ring.desc(0).addr, 0xffff_ffff_ffff_fff0n);
      }
    }
  });
});

describe("publishing order", () => {
  test("PACKED-DRV-10 the head of a chain becomes available last of all", () => {
    const ring = new RawRing({ size: 8, packed: true });
    const unavailable = (): void => assert.notEqual(ring.desc(0).flags & (AVAIL | USED), AVAIL);
    ring.queue.begin(3);
    unavailable();
    for (let i = 0; i < 3; i++) {
      ring.queue.push(DATA_LO, DATA_HI, 16, i === 2);
      unavailable();
    }
    ring.queue.commit();
    unavailable();
    addLengths(ring, [1], [2]); // a second chain behind it
    unavailable();
    assert.ok(ring.addFramed() >= 0);
    unavailable();
    ring.queue.publish();
    const bits = ring.descriptors.map(({ flags }) => flags & (AVAIL | USED));
    assert.deepEqual(
      bits,
      Array.from({ length: 8 }, () => AVAIL),
    );
  });

  test("PACKED-DRV-10 the same in the second round, with what the device left there", () => {
    for (const tables of [0, 3]) {
      const ring = new RawRing({ size: 4, packed: true, tables });
      ring.advance(ring.device(), 5);
      const before = ring.desc(1).flags & (AVAIL | USED);
      assert.notEqual(before, USED, "what is left from the first round is not available in the second");
      assert.ok(ring.addFramed() >= 0);
      assert.notEqual(ring.desc(1).flags & (AVAIL | USED), USED);
      ring.queue.publish();
      assert.equal(ring.desc(1).flags & (AVAIL | USED), USED);
    }
  });

  test("a device that looks at any time sees whole chains or none", () => {
    for (const packed of [false, true]) {
      const ring = new RawRing({ size: 8, packed });
      const device = ring.device();
      for (let round = 0; round < 50; round++) {
        const slot = ring.queue.begin(3);
        const address = ring.own(slot);
        for (let i = 0; i < 3; i++) {
          assert.deepEqual(device.take(), []);
          ring.queue.push(address >>> 0, Math.floor(address / 2 ** 32), 16, i === 2);
        }
        ring.queue.commit();
        assert.deepEqual(device.take(), []);
        ring.add(1, 1);
        assert.deepEqual(device.take(), []);
        ring.queue.publish();
        const taken = device.take();
        assert.deepEqual(
          taken.map(({ readableLengths, writableLengths }) => [readableLengths.length, writableLengths.length]),
          [
            [2, 1],
            [1, 1],
          ],
        );
        for (const request of taken) device.complete(request);
        device.publish();
        assert.ok(ring.queue.poll() >= 0 && ring.queue.poll() >= 0);
      }
    }
  });
});

describe("rewinding a chain that is half built", () => {
  for (const packed of [false, true]) {
    for (const tables of [0, 4]) {
      test(`${packed ? "packed" : "split"}, ${tables === 0 ? "direct" : "indirect"}: the device never sees any of it`, () => {
        const ring = new RawRing({ size: packed ? 5 : 4, packed, tables });
        const device = ring.device();
        for (let round = 0; round < 23; round++) {
          const { inFlight, numFree } = ring.queue;
          for (let count = 1; count <= 4; count++) {
            for (let pushed = 0; pushed <= count; pushed++) {
              ring.queue.begin(count);
              for (let i = 0; i < pushed; i++) ring.queue.push(DATA_LO, DATA_HI, 16, false);
              ring.queue.rewind();
              assert.equal(ring.queue.publish(), false);
              assert.deepEqual(device.take(), []);
            }
          }
          assert.deepEqual([ring.queue.inFlight, ring.queue.numFree], [inFlight, numFree]);
          // Whatever was written for it must not be taken for the rest of a shorter chain.
          ring.add(0, 1);
          ring.queue.publish();
          const taken = device.take();
          assert.equal(taken.length, 1);
          assert.equal(taken[0].ringCount, 1);
          device.complete(taken[0]);
          device.publish();
          assert.ok(ring.queue.poll() >= 0);
        }
      });
    }
  }

  test("packed: no entry behind the position looks available", () => {
    const ring = new RawRing({ size: 4, packed: true });
    const device = ring.device();
    for (let round = 0; round < 9; round++) {
      ring.queue.begin(4);
      for (let i = 0; i < 4; i++) ring.queue.push(DATA_LO, DATA_HI, 16, false);
      ring.queue.rewind();
      for (let i = 0; i < 4; i++) {
        const position = (round + i) % 4;
        const bits = Math.floor((round + i) / 4) % 2 === 0 ? AVAIL : USED;
        assert.notEqual(ring.desc(position).flags & (AVAIL | USED), bits, `position ${position} in round ${round}`);
      }
      ring.advance(device, 1);
    }
  });

  test("a chain that was refused half way, too", () => {
    for (const packed of [false, true]) {
      const ring = new RawRing({ size: 4, packed });
      const device = ring.device();
      ring.queue.begin(3);
      ring.queue.push(DATA_LO, DATA_HI, 16, true);
      assert.throws(() => ring.queue.push(DATA_LO, DATA_HI, 16, false), RangeError);
      ring.queue.rewind();
      ring.add(1, 1);
      ring.queue.publish();
      assert.equal(device.take().length, 1);
    }
  });
});

describe("SPLIT-DRV-04 a chain holds at most 2^32 bytes", () => {
  for (const packed of [false, true]) {
    for (const tables of [0, 4]) {
      test(`${packed ? "packed" : "split"}, ${tables === 0 ? "direct" : "indirect"}`, () => {
        const ring = new RawRing({ size: 4, packed, tables });
        ring.queue.begin(3);
        ring.queue.push(0, 0, 0xffff_ffff, false);
        assert.throws(() => ring.queue.push(0, 0, 2, true), RangeError);
        ring.queue.push(0, 0, 1, true);
        assert.throws(() => ring.queue.push(0, 0, 1, true), /at most 2\^32 bytes in all, got 4294967297/);
        ring.queue.commit();
        ring.queue.publish();
        const entries = tables === 0 ? ring.descriptors : ring.table(0, 2);
        assert.deepEqual([entries[0].len, entries[1].len], [0xffff_ffff, 1]);
      });
    }
  }
});

describe("SPLIT-DRV-08 PACKED-DRV-05 PACKED-DRV-06 PACKED-DRV-13 a chain is never longer than the queue", () => {
  for (const packed of [false, true]) {
    for (const tables of [0, 4]) {
      test(`${packed ? "packed" : "split"}, tables of ${tables}`, () => {
        const ring = new RawRing({ size: 4, packed, tables });
        assert.equal(ring.queue.maxElements, 4);
        assert.throws(() => ring.queue.begin(5), /"count" expected 1 to 4, got 5/);
        const slot = ring.queue.begin(4);
        const address = ring.own(slot);
        for (let i = 0; i < 4; i++) ring.queue.push(address >>> 0, Math.floor(address / 2 ** 32), 1, i === 3);
        assert.throws(() => ring.queue.push(0, 0, 1, true), RangeError, "not one more than announced");
        ring.queue.commit();
        ring.queue.publish();
        const [request] = ring.device().take();
        assert.equal(request.readableLengths.length + request.writableLengths.length, 4);
        assert.equal(request.ringCount, tables === 0 ? 4 : 1);
      });
    }
  }

  test("tables longer than the queue are refused", () => {
    for (const packed of [false, true]) {
      assert.throws(() => new RawRing({ size: 4, packed, tables: 5 }), /"indirect.entries"/);
    }
  });
});

describe("SPLIT-DRV-11 PACKED-DRV-02 PACKED-DRV-08 PACKED-DRV-09 BASIC-DRV-22 without room nothing is written", () => {
  for (const packed of [false, true]) {
    test(packed ? "packed" : "split", () => {
      const ring = new RawRing({ size: 4, packed });
      ring.add(1, 1);
      ring.add(0, 1);
      ring.queue.publish();
      const before = ring.bytes.slice();
      assert.equal(ring.queue.numFree, 1);
      assert.equal(ring.queue.begin(2), -1);
      assert.equal(ring.queue.begin(4), -1);
      assert.equal(ring.addFramed(), -1);
      assert.deepEqual(ring.bytes, before);
      assert.equal(ring.queue.publish(), false);
      assert.equal(ring.availIdx, packed ? ring.availIdx : 2);
      assert.ok(ring.add(1, 0) >= 0);
      assert.equal(ring.queue.begin(1), -1, "the ring is full");
      assert.equal(ring.queue.numFree, 0);
      ring.queue.publish();
      assert.equal(ring.device().take().length, 3, "full is not empty");
    });
  }
});

test("PACKED-DRV-03 BASIC-DRV-22 published descriptors do not change until they are used", () => {
  for (const packed of [false, true]) {
    for (const tables of [0, 3]) {
      const ring = new RawRing({ size: packed ? 13 : 16, packed, tables });
      const slots = [ring.add(1, 2), ring.addFramed(), ring.add(2, 0)];
      ring.queue.publish();
      const published = ring.layout.queueSize - ring.queue.numFree;
      const look = () => [ring.descriptors.slice(0, published), slots.map((slot) => ring.table(slot, tables))];
      const before = look();
      let more = 0;
      for (const fill of [() => ring.addFramed(), () => ring.add(1, 0)]) {
        while (fill() >= 0) {
          more++;
          assert.deepEqual(look(), before);
          ring.queue.publish();
          assert.deepEqual(look(), before);
        }
      }
      assert.ok(more >= 3);
      if (packed) continue; // the device writes its used entries over the first descriptors
      const device = ring.device();
      const held = device.take();
      assert.deepEqual(
        held.slice(0, 3).map(({ id }) => id),
        slots,
      );
      for (let i = 0; i < 40; i++) {
        const [last] = device.held.slice(-1);
        device.complete(last);
        device.publish();
        assert.equal(ring.queue.poll(), last.id);
        assert.ok(ring.add(1, 0) >= 0);
        ring.queue.publish();
        device.take();
        assert.deepEqual(look(), before);
      }
    }
  }
});

describe("indirect descriptors", () => {
  test("SPLIT-DRV-06 PACKED-DRV-11 without the feature INDIRECT is never set", () => {
    for (const packed of [false, true]) {
      const ring = new RawRing({ size: 8, packed });
      const device = ring.device();
      for (let i = 0; i < 50; i++) {
        assert.ok((i % 2 === 0 ? ring.add(2, 2) : ring.addFramed()) >= 0);
        ring.queue.publish();
        assert.ok(ring.descriptors.every(({ flags }) => (flags & INDIRECT) === 0));
        const [request] = device.take();
        device.complete(request);
        device.publish();
        ring.queue.poll();
      }
    }
  });

  test("SPLIT-DRV-07 SPLIT-DRV-09 SPLIT-DRV-10 split: one descriptor, and a table chained from 0 on", () => {
    for (const inOrder of [false, true]) {
      const ring = new RawRing({ size: 8, tables: 5, inOrder });
      const device = ring.device();
      for (let round = 0; round < 30; round++) {
        const slots = [ring.add(2, 3), ring.add(1, 1)];
        ring.queue.publish();
        for (const [i, count] of [5, 2].entries()) {
          const slot = slots[i];
          const { flags, len, addr: table } = ring.desc(slot);
          assert.equal(flags, INDIRECT, "neither NEXT nor WRITE beside it");
          assert.equal(len, 16 * count);
          assert.equal(table, BigInt(BASE + ring.tablesOffset + slot * 5 * 16));
          const entries = ring.table(slot, count);
          const readable = i === 0 ? 2 : 1;
          entries.forEach((entry, k) => {
            const isLast = k === count - 1;
            assert.equal(entry.flags, (isLast ? 0 : NEXT) | (k >= readable ? WRITE : 0));
            if (!isLast) assert.equal(entry.tail, k + 1);
          });
        }
        for (const request of device.take()) device.complete(request);
        device.publish();
        for (const slot of slots) assert.equal(ring.queue.poll(), slot);
      }
    }
  });

  test("PACKED-DRV-12 PACKED-DRV-14 packed: one descriptor without NEXT, and a table with WRITE alone", () => {
    for (const inOrder of [false, true]) {
      const ring = new RawRing({ size: 7, packed: true, tables: 5, inOrder });
      const device = ring.device();
      for (let round = 0; round < 30; round++) {
        const at = (2 * round) % 7;
        const slots = [ring.add(2, 3), ring.add(1, 1)];
        ring.queue.publish();
        for (const [i, count] of [5, 2].entries()) {
          const position = (at + i) % 7;
          const bits = Math.floor((2 * round + i) / 7) % 2 === 0 ? AVAIL : USED;
          const { flags, len, addr: table, tail } = ring.desc(position);
          assert.equal(flags, INDIRECT | bits);
          assert.equal(len, 16 * count);
          assert.equal(tail, slots[i]);
          assert.equal(table, BigInt(BASE + ring.tablesOffset + slots[i] * 5 * 16));
          const readable = i === 0 ? 2 : 1;
          ring.table(slots[i], count).forEach((entry, k) => {
            assert.equal(entry.flags, k >= readable ? WRITE : 0);
          });
        }
        for (const request of device.take()) device.complete(request);
        device.publish();
        for (const slot of slots) assert.equal(ring.queue.poll(), slot);
      }
    }
  });

  test("SPLIT-DRV-03 a framed request takes a table of three", () => {
    const ring = new RawRing({ size: 4, packed: true, tables: 4 });
    const slot = ring.addFramed();
    ring.queue.publish();
    assert.equal(ring.desc(0).len, 48);
    const request = BigInt(BASE + ring.queue.slotOffset(slot));
    const entries = ring.table(slot, 3);
    assert.deepEqual(
      entries.map(({ addr: at, len, flags }) => [at, len, flags]),
      [
        [request, 16, 0],
        [BigInt(BASE + QUEUE_OFFSET + ring.layout.reqOffset + 16), 16, WRITE],
        [request + 32n, 1, WRITE],
      ],
    );
  });

  test("a table that a chain of another shape used is written anew", () => {
    for (const packed of [false, true]) {
      for (const inOrder of [false, true]) {
        const ring = new RawRing({ size: 4, packed, inOrder, tables: 4 });
        const device = ring.device();
        const shapes: [readable: number, writable: number][] = [];
        for (let i = 0; i < 64; i++) {
          const kind = (i * 7) % 5;
          const expected: [number, number] = kind < 2 ? [kind === 0 ? 1 : 2, kind === 0 ? 2 : 1] : [kind - 1, 4 - kind];
          shapes.push(expected);
          assert.ok((kind < 2 ? ring.addFramed(kind === 0) : ring.add(...expected)) >= 0);
          ring.queue.publish();
          const [request] = device.take();
          assert.deepEqual([request.readableLengths.length, request.writableLengths.length], expected);
          if (kind < 2) assert.deepEqual(request.readableLengths[0], 16);
          device.complete(request);
          device.publish();
          assert.ok(ring.queue.poll() >= 0);
        }
        assert.equal(shapes.length, 64);
      }
    }
  });
});

test("SPLIT-DRV-05 with IN_ORDER descriptors are taken in the order of the table", () => {
  const ring = new RawRing({ size: 8, inOrder: true });
  const device = ring.device();
  let expected = 0;
  for (let round = 0; round < 60; round++) {
    const shapes = [[1, 1] as const, [2, 1] as const];
    for (const [readable, writable] of shapes) {
      const head = round % 3 === 0 && readable === 2 ? ring.addFramed() : ring.add(readable, writable);
      assert.equal(head, expected);
      const count = readable + writable;
      for (let i = 0; i < count; i++) {
        const { flags, tail } = ring.desc((head + i) % 8);
        assert.equal((flags & NEXT) !== 0, i < count - 1);
        if ((flags & NEXT) !== 0) assert.equal(tail, (head + i + 1) % 8);
      }
      expected = (expected + count) % 8;
    }
    ring.queue.publish();
    device.take();
    device.completeBatch(2, 0);
    device.publish();
    assert.ok(ring.queue.poll() >= 0 && ring.queue.poll() >= 0);
  }
});

test("IN_ORDER: of a batch only the last length is known, the others count as whole", () => {
  for (const packed of [false, true]) {
    const ring = new RawRing({ size: 8, packed, inOrder: true });
    const device = ring.device();
    for (let round = 0; round < 40; round++) {
      const slots = [ring.add(1, 1), ring.add(0, 2), ring.add(1, 1)];
      ring.queue.publish();
      assert.equal(device.take().length, 3);
      device.completeBatch(3, 5);
      device.publish();
      const got = slots.map(() => [ring.queue.poll(), ring.queue.usedLength]);
      assert.deepEqual(got, [
        [slots[0], 16],
        [slots[1], 32],
        [slots[2], 5],
      ]);
      assert.equal(ring.queue.poll(), -1);
    }
  }
});

describe("queues of every size", () => {
  const sizes = [
    [false, 1],
    [false, 2],
    [false, 32768],
    [true, 1],
    [true, 2],
    [true, 3],
    [true, 1000],
    [true, 32767],
    [true, 32768],
  ] as const;
  for (const [packed, size] of sizes) {
    for (const inOrder of [false, true]) {
      test(`${packed ? "packed" : "split"} ${size}${inOrder ? ", IN_ORDER" : ""}: the longest chain, and as many chains as fit`, () => {
        const ring = new RawRing({ size, packed, inOrder, eventIdx: true });
        // Not FakeDevice.take: it keeps each chain in arrays as long as the queue.
        const device = ring.device().queue;
        const chain = new DescriptorChain(size);
        for (let round = 0; round < 3; round++) {
          const slot = ring.add(size - 1, 1);
          assert.ok(slot >= 0 && ring.queue.numFree === 0);
          assert.equal(ring.queue.begin(1), -1);
          ring.queue.publish();
          assert.equal(device.pop(chain), true);
          assert.deepEqual([chain.count, chain.ringCount], [size, size]);
          device.push(chain.id, size, 2);
          device.publish();
          assert.deepEqual([ring.queue.poll(), ring.queue.usedLength, ring.queue.poll()], [slot, 2, -1]);

          const slots = Array.from({ length: size }, () => ring.add(0, 1));
          assert.equal(new Set(slots).size, size);
          assert.ok(slots.every((each) => each >= 0 && each < size));
          assert.equal(ring.queue.begin(1), -1);
          ring.queue.publish();
          const ids: number[] = [];
          while (device.pop(chain)) ids.push(chain.id);
          assert.deepEqual(ids, slots, "full is not empty");
          if (inOrder) device.pushBatch(ids[size - 1], size, size, 1);
          else for (const id of ids.toReversed()) device.push(id, 1, 1);
          device.publish();
          const back = slots.map(() => ring.queue.poll());
          assert.deepEqual(back, inOrder ? slots : slots.toReversed());
          assert.equal(ring.queue.poll(), -1);
          assert.equal(ring.queue.numFree, size);
        }
      });
    }
  }
});
