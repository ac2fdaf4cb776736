/** Wrong arguments to Virtqueue: each is refused, says why, and leaves the queue as it was. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { ERR_VIRTIO_ARGUMENT, VirtioError } from "../../src/errors.js";
import { VirtioFeature, Virtqueue, VirtqueueLayout, type VirtqueueOptions } from "../../src/virtqueue/index.js";
import { RawRing } from "./raw-ring.js";

function refused(words: string | RegExp): (error: unknown) => true {
  return (error) => {
    assert.ok(error instanceof RangeError || error instanceof TypeError, String(error));
    assert.equal("code" in error && error.code, ERR_VIRTIO_ARGUMENT);
    assert.match(error.message, words instanceof RegExp ? words : new RegExp(`^"${words}" expected `));
    return true;
  };
}

describe("making a Virtqueue", () => {
  const layout = new VirtqueueLayout({ queueSize: 4, request: { size: 32 } });
  const bareLayout = new VirtqueueLayout({ queueSize: 4 });
  const packedLayout = new VirtqueueLayout({ queueSize: 4, features: VirtioFeature.RING_PACKED });
  const good: VirtqueueOptions = { layout, buffer: new ArrayBuffer(1024), iova: 0x1000, features: 0n };
  const indirect = { offset: 512, iova: 0x8000, entries: 4 };
  const withTables = { features: VirtioFeature.INDIRECT_DESC };
  const frame = { headerLength: 16, trailerOffset: 16, trailerLength: 1 };

  const cases: readonly [name: string, options: Record<string, unknown>, words: string | RegExp][] = [
    ["a misspelled option", { Iova: 1 }, /"Virtqueue" expected option "iova", got "Iova"/],
    ["an unknown option", { colour: 1 }, /expected options among layout, .*got "colour"/],
    ["features that are a number", { features: 0 }, "features"],
    ["packed features, split layout", { features: VirtioFeature.RING_PACKED }, "layout"],
    ["split features, packed layout", { layout: packedLayout }, "layout"],
    ["a buffer that is none", { buffer: new Uint8Array(1024) }, "buffer"],
    ["a buffer that is too small", { buffer: new ArrayBuffer(layout.endOffset - 1) }, "buffer"],
    ["an offset that is not a multiple of 16", { offset: 8 }, "offset"],
    ["an offset beyond the buffer", { offset: 1024 }, "offset"],
    ["a negative offset", { offset: -16 }, "offset"],
    ["an offset that is a string", { offset: "16" }, "offset"],
    ["an address that is not a multiple of 16", { iova: 0x1008 }, "iova"],
    ["a negative address", { iova: -16 }, "iova"],
    ["an address that no number holds", { iova: 2 ** 53 }, "iova"],
    ["an address across 4 GiB", { iova: 2 ** 32 - 16 }, /do not cross a 4 GiB boundary/],
    ["an address that is a bigint", { iova: 16n }, "iova"],
    ["a negative index", { index: -1 }, "index"],
    ["an index beyond 65535", { index: 65536 }, "index"],
    ["a fractional index", { index: 0.5 }, "index"],
    ["tables without an entry", { ...withTables, indirect: { ...indirect, entries: 0 } }, "indirect.entries"],
    ["tables longer than the queue", { ...withTables, indirect: { ...indirect, entries: 5 } }, "indirect.entries"],
    ["tables beyond the buffer", { ...withTables, indirect: { ...indirect, offset: 784 } }, "indirect.offset"],
    ["tables that are not aligned", { ...withTables, indirect: { ...indirect, offset: 520 } }, "indirect.offset"],
    ["tables at an odd address", { ...withTables, indirect: { ...indirect, iova: 1 } }, "indirect.iova"],
    [
      "tables across 4 GiB",
      { ...withTables, indirect: { ...indirect, iova: 2 ** 32 - 16 } },
      /do not cross a 4 GiB boundary/,
    ],
    [
      "tables larger than the buffer",
      { ...withTables, layout: bareLayout, buffer: new ArrayBuffer(bareLayout.endOffset), indirect },
      "indirect.entries",
    ],
    ["a frame longer than a request", { frame: { ...frame, trailerLength: 17 } }, /frame\.trailerLength/],
    ["a trailer behind the request", { frame: { ...frame, trailerOffset: 32 } }, /frame\.trailerOffset/],
    ["a trailer inside the header", { frame: { ...frame, trailerOffset: 15 } }, /frame\.trailerOffset/],
    ["a header longer than the request", { frame: { ...frame, headerLength: 33 } }, /frame\.headerLength/],
    ["a frame without header", { frame: { ...frame, headerLength: 0 } }, /frame\.headerLength/],
    ["a frame without trailer", { frame: { ...frame, trailerLength: 0 } }, /frame\.trailerLength/],
  ];
  for (const [name, options, words] of cases) {
    test(name, () => {
      const changed: unknown = { ...good, ...options };
      assert.throws(() => new Virtqueue(changed as VirtqueueOptions), refused(words));
    });
  }

  test("the same without the mistake is taken", () => {
    const queue = new Virtqueue({ ...good, ...withTables, indirect, frame, index: 65535, iova: 2 ** 53 - 4096 });
    assert.equal(queue.maxElements, 4);
    assert.equal(queue.slotOffset(3), layout.reqOffset + 96);
  });

  test("tables are not used, and not checked, when INDIRECT_DESC was not negotiated", () => {
    const queue = new Virtqueue({ ...good, indirect: { offset: 1, iova: 1, entries: 99 } });
    assert.equal(queue.begin(2), 0);
  });
});

for (const packed of [false, true]) {
  for (const tables of [0, 4]) {
    describe(`building a chain, ${packed ? "packed" : "split"}, tables of ${tables}`, () => {
      /** Run `wrong` in the middle of a chain, and see that the chain and the queue are well afterwards. */
      const midway = (wrong: (ring: RawRing) => void): void => {
        const ring = new RawRing({ size: 4, packed, tables });
        const { queue } = ring;
        const device = ring.device();
        for (let round = 0; round < 9; round++) {
          const slot = queue.begin(3);
          const address = ring.own(slot);
          const push = (writable: boolean): void => {
            queue.push(address >>> 0, Math.floor(address / 2 ** 32), 16, writable);
          };
          push(false);
          wrong(ring);
          push(true);
          assert.equal(queue.commit(), slot);
          queue.publish();
          const [request, more] = device.take();
          assert.equal(more, undefined);
          assert.deepEqual([request.readableLengths, request.writableLengths], [[16], [16]]);
          device.complete(request);
          device.publish();
          assert.equal(queue.poll(), slot);
          assert.deepEqual([queue.inFlight, queue.numFree], [0, 4]);
        }
      };

      for (const length of [0, -1, 1.5, Number.NaN, 2 ** 32, Number.POSITIVE_INFINITY]) {
        test(`an element of ${length} bytes`, () => {
          midway(({ queue }) => assert.throws(() => queue.push(0, 0, length, false), refused("length")));
        });
      }

      test("a second begin", () => {
        midway(({ queue }) => assert.throws(() => queue.begin(1), refused("begin")));
      });

      test("a count of elements that cannot be", () => {
        const { queue } = new RawRing({ size: 4, packed, tables });
        for (const count of [0, -1, 5, 1.5, Number.NaN, Number.POSITIVE_INFINITY]) {
          assert.throws(() => queue.begin(count), refused("count"));
        }
        assert.equal(queue.numFree, 4);
      });

      test("more elements than announced", () => {
        const ring = new RawRing({ size: 4, packed, tables });
        ring.queue.begin(1);
        ring.queue.push(0, 0, 1, true);
        assert.throws(() => ring.queue.push(0, 0, 1, true), refused("elements"));
        ring.queue.commit();
        ring.queue.publish();
        assert.equal(ring.desc(0).flags & 1, 0);
      });

      test("commit of nothing: never begun, no element, committed or rewound already", () => {
        const ring = new RawRing({ size: 4, packed, tables });
        const { queue } = ring;
        const none = refused("elements");
        assert.throws(() => queue.commit(), none);
        queue.begin(2);
        assert.throws(() => queue.commit(), none);
        queue.rewind();
        ring.add(1, 1);
        assert.throws(() => queue.commit(), none);
        queue.begin(1);
        queue.push(0, 0, 1, true);
        queue.rewind();
        assert.throws(() => queue.commit(), none);
        assert.throws(() => queue.push(0, 0, 1, true), refused("elements"));
        assert.equal(queue.inFlight, 1);
      });

      test("rewind of nothing leaves chains in flight alone", () => {
        const ring = new RawRing({ size: 4, packed, tables });
        ring.queue.rewind();
        while (ring.add(1, 1) >= 0);
        ring.queue.publish();
        const before = ring.bytes.slice();
        ring.queue.rewind();
        assert.deepEqual(ring.bytes, before);
        assert.equal(ring.device().take().length, ring.queue.inFlight);
      });

      test("poll or addFramed while a chain is being built: commit refuses, rewind mends", () => {
        for (const meddle of ["poll", "addFramed"] as const) {
          const ring = new RawRing({ size: 8, packed, tables: Math.min(tables, 8) });
          const { queue } = ring;
          const device = ring.device();
          const early = ring.add(1, 1);
          queue.publish();
          const [request] = device.take();
          device.complete(request);
          device.publish();
          queue.begin(2);
          queue.push(0, 0, 1, false);
          if (meddle === "poll") assert.equal(queue.poll(), early);
          else assert.ok(ring.addFramed() >= 0);
          queue.push(0, 0, 1, true);
          assert.throws(() => queue.commit(), refused("commit"));
          queue.rewind();
          if (meddle === "addFramed") continue; // what it wrote is lost: it says that it checks nothing
          assert.equal(queue.numFree, 8);
          for (let i = 0; i < 20; i++) {
            const slot = ring.add(1, 1);
            queue.publish();
            const [next] = device.take();
            assert.equal(next.id, slot);
            device.complete(next);
            device.publish();
            assert.equal(queue.poll(), slot);
          }
        }
      });
    });
  }
}

test("fail breaks the queue with the given error; the first one stays", () => {
  for (const packed of [false, true]) {
    const ring = new RawRing({ size: 4, packed });
    ring.add(1, 1);
    const first = new VirtioError("ERR_VIRTIO_CLOSED", "first");
    ring.queue.fail(first);
    ring.queue.fail(new VirtioError("ERR_VIRTIO_CLOSED", "second"));
    const before = ring.bytes.slice();
    const same = (error: unknown): boolean => error === first;
    assert.throws(() => ring.queue.publish(), same);
    assert.throws(() => ring.queue.poll(), same);
    assert.throws(() => ring.queue.begin(1), same);
    ring.queue.disableNotifications();
    assert.deepEqual(ring.bytes, before);
  }
});

test("a queue that failed does not touch memory that is gone", () => {
  for (const packed of [false, true]) {
    for (const eventIdx of [false, true]) {
      const ring = new RawRing({ size: 4, packed, eventIdx });
      ring.add(1, 1);
      structuredClone(ring.buffer, { transfer: [ring.buffer] });
      const closed = new VirtioError("ERR_VIRTIO_CLOSED", "closed");
      ring.queue.fail(closed);
      ring.queue.disableNotifications();
      for (const call of ["publish", "poll", "hasUsed", "enableNotifications"] as const) {
        assert.throws(
          () => ring.queue[call](),
          (error) => error === closed,
        );
      }
    }
  }
});
