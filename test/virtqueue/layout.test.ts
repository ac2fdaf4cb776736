/** Tests of the virtqueue layout: vectors of both formats, the bounds the specification sets, wrong arguments. */

import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { ERR_VIRTIO_ARGUMENT } from "../../src/errors.js";
import { VirtioFeature } from "../../src/virtqueue/features.js";
import {
  alignUp,
  isPowerOfTwo,
  type LayoutArea,
  VirtqueueLayout,
  type VirtqueueLayoutOptions,
} from "../../src/virtqueue/layout.js";

/** Queue size; driver area, device area, end of the areas; request offset and end for each of `requests`. */
type Row = readonly [n: number, driver: number, device: number, areasEnd: number, ...reqAndEnd: number[]];

const requests = [
  { size: 0, align: 1 },
  { size: 33, align: 1 },
  { size: 16, align: 8 },
  { size: 48, align: 16 },
] as const;

const split: readonly Row[] = [
  [1, 16, 28, 44, 44, 48, 44, 80, 48, 64, 48, 96],
  [2, 32, 44, 68, 68, 80, 68, 144, 72, 112, 80, 176],
  [4, 64, 80, 120, 120, 128, 120, 256, 120, 192, 128, 320],
  [8, 128, 152, 224, 224, 224, 224, 496, 224, 352, 224, 608],
  [64, 1024, 1160, 1680, 1680, 1680, 1680, 3792, 1680, 2704, 1680, 4752],
  [128, 2048, 2312, 3344, 3344, 3344, 3344, 7568, 3344, 5392, 3344, 9488],
  [256, 4096, 4616, 6672, 6672, 6672, 6672, 15120, 6672, 10768, 6672, 18960],
  [1024, 16384, 18440, 26640, 26640, 26640, 26640, 60432, 26640, 43024, 26640, 75792],
  [32768, 524288, 589832, 851984, 851984, 851984, 851984, 1933328, 851984, 1376272, 851984, 2424848],
];

const packed: readonly Row[] = [
  [1, 16, 20, 24, 24, 32, 24, 64, 24, 48, 32, 80],
  [2, 32, 36, 40, 40, 48, 40, 112, 40, 80, 48, 144],
  [4, 64, 68, 72, 72, 80, 72, 208, 72, 144, 80, 272],
  [8, 128, 132, 136, 136, 144, 136, 400, 136, 272, 144, 528],
  [64, 1024, 1028, 1032, 1032, 1040, 1032, 3152, 1032, 2064, 1040, 4112],
  [128, 2048, 2052, 2056, 2056, 2064, 2056, 6288, 2056, 4112, 2064, 8208],
  [256, 4096, 4100, 4104, 4104, 4112, 4104, 12560, 4104, 8208, 4112, 16400],
  [1024, 16384, 16388, 16392, 16392, 16400, 16392, 50192, 16392, 32784, 16400, 65552],
  [32768, 524288, 524292, 524296, 524296, 524304, 524296, 1605648, 524296, 1048592, 524304, 2097168],
  [3, 48, 52, 56, 56, 64, 56, 160, 56, 112, 64, 208],
  [5, 80, 84, 88, 88, 96, 88, 256, 88, 176, 96, 336],
  [100, 1600, 1604, 1608, 1608, 1616, 1608, 4912, 1608, 3216, 1616, 6416],
  [1000, 16000, 16004, 16008, 16008, 16016, 16008, 49008, 16008, 32016, 16016, 64016],
];

const splitMinima = [
  [1, 16, 8, 14],
  [2, 32, 10, 22],
  [4, 64, 14, 38],
  [8, 128, 22, 70],
  [64, 1024, 134, 518],
  [128, 2048, 262, 1030],
  [256, 4096, 518, 2054],
  [1024, 16384, 2054, 8198],
  [32768, 524288, 65542, 262150],
] as const;

for (const [format, rows, features] of [
  ["split", split, VirtioFeature.VERSION_1],
  ["packed", packed, VirtioFeature.VERSION_1 | VirtioFeature.RING_PACKED],
] as const) {
  for (const [n, driver, device, areasEnd, ...reqAndEnd] of rows) {
    for (const [i, request] of requests.entries()) {
      test(`${format} layout of ${n} descriptors, requests of ${request.size} bytes aligned to ${request.align}`, () => {
        const layout = new VirtqueueLayout({ queueSize: n, features, request });
        assert.deepEqual(
          [layout.driverAreaOffset, layout.deviceAreaOffset, layout.deviceAreaEnd, layout.reqOffset, layout.endOffset],
          [driver, device, areasEnd, reqAndEnd[2 * i], reqAndEnd[2 * i + 1]],
        );
        assert.equal(layout.packed, format === "packed");
        assert.equal(layout.queueSize, n);
      });
    }
  }
}

for (const [n, descBytes, availBytes, usedBytes] of splitMinima) {
  test(`split layout of ${n} descriptors gives each area the bytes that virtio 1.3, 2.7 demands`, () => {
    const layout = new VirtqueueLayout({ queueSize: n });
    assert.equal(layout.driverAreaOffset, descBytes);
    assert.ok(layout.deviceAreaOffset - layout.driverAreaOffset >= availBytes);
    assert.ok(layout.deviceAreaEnd - layout.deviceAreaOffset >= usedBytes);
    const [desc, avail, used] = layout.areas.map(fieldBytes);
    assert.deepEqual([desc, avail, used], [descBytes, availBytes, usedBytes]);
  });
}

test("defaults: one split queue without request data", () => {
  const layout = new VirtqueueLayout({ queueSize: 8 });
  assert.equal(layout.numQueues, 1);
  assert.equal(layout.packed, false);
  assert.equal(layout.requestSize, 0);
  assert.equal(layout.requestAlign, 1);
  assert.equal(layout.totalSize, layout.endOffset);
});

test("features other than RING_PACKED do not change the layout", () => {
  const plain = new VirtqueueLayout({ queueSize: 8 });
  const { EVENT_IDX, INDIRECT_DESC, IN_ORDER, VERSION_1 } = VirtioFeature;
  assert.deepEqual(
    new VirtqueueLayout({ queueSize: 8, features: EVENT_IDX | INDIRECT_DESC | IN_ORDER | VERSION_1 }),
    plain,
  );
});

test("several queues lie one behind the other", () => {
  const layout = new VirtqueueLayout({ numQueues: 3, queueSize: 2, request: { size: 33 } });
  assert.equal(layout.numQueues, 3);
  assert.equal(layout.totalSize, 3 * 144);
});

const anyOptions = fc
  .record({
    packed: fc.boolean(),
    exponent: fc.integer({ min: 0, max: 15 }),
    odd: fc.integer({ min: 1, max: 32768 }),
    size: fc.integer({ min: 0, max: 100_000 }),
    align: fc.constantFrom(1, 2, 4, 8, 16),
    numQueues: fc.integer({ min: 1, max: 65536 }),
  })
  .map(({ packed: isPacked, exponent, odd, size, align, numQueues }) => ({
    numQueues,
    queueSize: isPacked ? odd : 2 ** exponent,
    features: isPacked ? VirtioFeature.RING_PACKED : 0n,
    request: { size, align },
  }));

test("SPLIT-DRV-01 PACKED-DRV-01 any layout: areas in order, aligned, within the queue, and their fields without gaps", () => {
  fc.assert(
    fc.property(anyOptions, (options) => {
      const layout = new VirtqueueLayout(options);
      assert.equal(layout.endOffset % 16, 0);
      assert.equal(layout.reqOffset % layout.requestAlign, 0);
      const { areas } = layout;
      assert.equal(areas.length, options.request.size === 0 ? 3 : 4);
      assert.equal(areas[1].offset, layout.driverAreaOffset);
      assert.equal(areas[2].offset, layout.deviceAreaOffset);
      if (areas.length === 4) assert.equal(areas[3].offset, layout.reqOffset);
      let end = 0;
      for (const area of areas) {
        assert.ok(area.offset >= end && area.offset - end < 16);
        for (let queue = 0; queue < layout.numQueues; queue += Math.ceil(layout.numQueues / 3)) {
          assert.equal((queue * layout.endOffset + area.offset) % area.align, 0);
        }
        let fieldEnd = area.offset;
        for (const field of area.fields) {
          assert.equal(field.offset, fieldEnd, field.name);
          assert.equal(field.offset % field.align, 0, field.name);
          const memberBytes = field.members.reduce((sum, member) => sum + member.size, 0);
          if (field.members.length > 0) assert.equal(memberBytes, field.elementSize);
          fieldEnd += field.elementSize * (field.count ?? 1);
        }
        end = area.offset + area.size;
        assert.ok(fieldEnd <= end && end - fieldEnd <= 4, area.name);
      }
      assert.ok(end <= layout.endOffset && layout.endOffset - end < 16);
    }),
  );
});

test("the fields and their offsets are those of the specification's structs", () => {
  const names = (layout: VirtqueueLayout): string[] =>
    layout.areas.flatMap((area) =>
      area.fields.map((f) => `${f.offset} ${f.type} ${f.name}${f.count === undefined ? "" : `[${f.count}]`}`),
    );
  assert.deepEqual(names(new VirtqueueLayout({ queueSize: 8, request: { size: 33 } })), [
    "0 struct virtq_desc desc[8]",
    "128 le16 avail.flags",
    "130 le16 avail.idx",
    "132 le16 avail.ring[8]",
    "148 le16 avail.used_event",
    "152 le16 used.flags",
    "154 le16 used.idx",
    "156 struct virtq_used_elem used.ring[8]",
    "220 le16 used.avail_event",
    "224 u8[33] request[8]",
  ]);
  assert.deepEqual(names(new VirtqueueLayout({ queueSize: 3, features: VirtioFeature.RING_PACKED })), [
    "0 struct pvirtq_desc desc[3]",
    "48 le16 driver_event.desc",
    "50 le16 driver_event.flags",
    "52 le16 device_event.desc",
    "54 le16 device_event.flags",
  ]);
});

const PACKED = VirtioFeature.RING_PACKED;
const wrongValues: readonly (readonly [string, VirtqueueLayoutOptions, string])[] = [
  ["split queue of 0", { queueSize: 0 }, '"queueSize" expected a whole number from 1 to 32768, got 0'],
  ["split queue of 3", { queueSize: 3 }, '"queueSize" expected a power of two on a split virtqueue, got 3'],
  ["split queue of 32767", { queueSize: 32767 }, '"queueSize" expected a power of two on a split virtqueue, got 32767'],
  ["split queue of 65536", { queueSize: 65536 }, '"queueSize" expected a whole number from 1 to 32768, got 65536'],
  ["negative queue size", { queueSize: -8 }, '"queueSize" expected a whole number from 1 to 32768, got -8'],
  ["broken queue size", { queueSize: 1.5 }, '"queueSize" expected a whole number from 1 to 32768, got 1.5'],
  ["NaN queue size", { queueSize: Number.NaN }, '"queueSize" expected a whole number from 1 to 32768, got NaN'],
  [
    "packed queue of 0",
    { queueSize: 0, features: PACKED },
    '"queueSize" expected a whole number from 1 to 32768, got 0',
  ],
  [
    "packed queue of 32769",
    { queueSize: 32769, features: PACKED },
    '"queueSize" expected a whole number from 1 to 32768, got 32769',
  ],
  ["0 queues", { queueSize: 8, numQueues: 0 }, '"numQueues" expected a whole number from 1 to 65536, got 0'],
  [
    "65537 queues",
    { queueSize: 8, numQueues: 65537 },
    '"numQueues" expected a whole number from 1 to 65536, got 65537',
  ],
  ["2.5 queues", { queueSize: 8, numQueues: 2.5 }, '"numQueues" expected a whole number from 1 to 65536, got 2.5'],
  [
    "negative request size",
    { queueSize: 8, request: { size: -1 } },
    `"request.size" expected a whole number from 0 to ${Number.MAX_SAFE_INTEGER}, got -1`,
  ],
  [
    "request size that no memory holds",
    { queueSize: 8, request: { size: Number.MAX_SAFE_INTEGER } },
    `"request.size" expected a layout of at most 2^53 bytes in all, got ${Number.MAX_SAFE_INTEGER}`,
  ],
  [
    "request size that only one queue holds",
    { queueSize: 1, numQueues: 65536, request: { size: 2 ** 40 } },
    `"request.size" expected a layout of at most 2^53 bytes in all, got ${2 ** 40}`,
  ],
  [
    "alignment 0",
    { queueSize: 8, request: { size: 1, align: 0 } },
    '"request.align" expected a whole number from 1 to 16, got 0',
  ],
  ["alignment 3", { queueSize: 8, request: { size: 1, align: 3 } }, '"request.align" expected a power of two, got 3'],
  [
    "alignment 32",
    { queueSize: 8, request: { size: 1, align: 32 } },
    '"request.align" expected a whole number from 1 to 16, got 32',
  ],
];
for (const [what, options, message] of wrongValues) {
  test(`refused: ${what}`, () => {
    assert.throws(() => new VirtqueueLayout(options), { name: "RangeError", code: ERR_VIRTIO_ARGUMENT, message });
  });
}

const wrongKinds: readonly (readonly [string, unknown, string])[] = [
  ["no options", undefined, '"options" expected an object, got undefined'],
  ["null", null, '"options" expected an object, got null'],
  ["a number for options", 8, '"options" expected an object, got 8'],
  ["no queue size", {}, '"queueSize" expected a number, got undefined'],
  ["a string as queue size", { queueSize: "8" }, '"queueSize" expected a number, got "8"'],
  ["features as a number", { queueSize: 8, features: 4 }, '"features" expected a bigint, got 4'],
  ["request as a number", { queueSize: 8, request: 33 }, '"request" expected an object, got 33'],
  ["request null", { queueSize: 8, request: null }, '"request" expected an object, got null'],
  ["request without size", { queueSize: 8, request: {} }, '"request.size" expected a number, got undefined'],
  [
    "an alignment as a bigint",
    { queueSize: 8, request: { size: 1, align: 8n } },
    '"request.align" expected a number, got 8n',
  ],
  ["a misspelled option", { queuesize: 8 }, '"VirtqueueLayout" expected option "queueSize", got "queuesize"'],
  [
    "an unknown option",
    { queueSize: 8, depth: 1 },
    '"VirtqueueLayout" expected options among numQueues, queueSize, features, request, got "depth"',
  ],
  [
    "an unknown request option",
    { queueSize: 8, request: { size: 1, alignment: 8 } },
    '"request" expected options among size, align, got "alignment"',
  ],
];
for (const [what, options, message] of wrongKinds) {
  test(`refused: ${what}`, () => {
    assert.throws(() => new VirtqueueLayout(options as VirtqueueLayoutOptions), {
      name: "TypeError",
      code: ERR_VIRTIO_ARGUMENT,
      message,
    });
  });
}

test("isPowerOfTwo is exact up to 2^53", () => {
  for (let exponent = 0; exponent < 53; exponent++) {
    const power = 2 ** exponent;
    assert.equal(isPowerOfTwo(power), true);
    assert.equal(isPowerOfTwo(power + 1), exponent === 0);
    assert.equal(isPowerOfTwo(-power), false);
  }
  for (const value of [0, 0.5, 1.5, 2 ** 53, Number.MAX_SAFE_INTEGER, Number.NaN, Number.POSITIVE_INFINITY]) {
    assert.equal(isPowerOfTwo(value), false, `${value}`);
  }
});

test("alignUp is exact up to 2^53", () => {
  fc.assert(
    fc.property(fc.maxSafeNat(), fc.integer({ min: 0, max: 21 }), (value, exponent) => {
      const align = 2n ** BigInt(exponent);
      const expected = ((BigInt(value) + align - 1n) / align) * align;
      assert.equal(BigInt(alignUp(value, Number(align))), expected);
    }),
  );
});

function fieldBytes(area: LayoutArea): number {
  return area.fields.reduce((sum, field) => sum + field.elementSize * (field.count ?? 1), 0);
}
