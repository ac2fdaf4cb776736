/** Codecs of VFIO's structs, beside bytes that were laid out by hand from `<linux/vfio.h>`. */

import assert from "node:assert/strict";
import { endianness } from "node:os";
import test from "node:test";
import fc from "fast-check";
import {
  decodeVfioArgsz,
  decodeVfioDeviceInfo,
  decodeVfioDmaUnmap,
  decodeVfioGroupStatus,
  decodeVfioIrqInfo,
  decodeVfioRegionInfo,
  decodeVfioType1Info,
  encodeVfioDmaMap,
  encodeVfioDmaUnmap,
  encodeVfioIrqSet,
  encodeVfioQuery,
  VfioDmaFlag,
  VfioIrqSetFlag,
  VfioPciIrq,
  VfioRequest,
} from "../../src/protocol/vfio.js";
import { VirtioError } from "../../src/errors.js";

const LE = endianness() === "LE";
const wrong = { code: "ERR_VIRTIO_PROTOCOL", message: /^VFIO in this kernel answers what cannot be: / };

/** Lay out 32-bit words, and 64-bit ones from bigints. */
function words(...values: readonly (number | bigint)[]): Uint8Array {
  const view = new DataView(new ArrayBuffer(values.reduce<number>((n, v) => n + (typeof v === "bigint" ? 8 : 4), 0)));
  let at = 0;
  for (const value of values) {
    if (typeof value === "bigint") view.setBigUint64(at, value, LE);
    else view.setUint32(at, value, LE);
    at += typeof value === "bigint" ? 8 : 4;
  }
  return new Uint8Array(view.buffer);
}

/** `struct vfio_info_cap_header`. */
function header(id: number, next: number): number[] {
  const view = new DataView(new ArrayBuffer(4));
  view.setUint16(0, id, LE);
  view.setUint16(2, 1, LE);
  return [view.getUint32(0, LE), next];
}

test("requests have the numbers of the header", () => {
  assert.deepEqual(
    Object.values(VfioRequest),
    [100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111, 112, 113, 114].map((n) => (0x3b << 8) | n),
  );
});

test("a question says how much room there is, and about which of several things it is", () => {
  assert.deepEqual(encodeVfioQuery(8), words(8, 0));
  assert.deepEqual(encodeVfioQuery(16, 2), words(16, 0, 2, 0));
  assert.equal(decodeVfioArgsz(words(56, 0)), 56);
});

test("group status, device and interrupt info", () => {
  assert.equal(decodeVfioGroupStatus(words(8, 3)), 3);
  assert.deepEqual(decodeVfioDeviceInfo(words(20, 0x83, 9, 5, 0)), { flags: 0x83, numRegions: 9, numIrqs: 5 });
  assert.deepEqual(decodeVfioIrqInfo(words(16, 9, 2, 3)), { flags: 9, count: 3 });
  for (const decode of [decodeVfioGroupStatus, decodeVfioDeviceInfo, decodeVfioIrqInfo, decodeVfioDmaUnmap]) {
    assert.throws(() => decode(new Uint8Array(7)), wrong);
  }
});

test("a region without capabilities can be mapped whole", () => {
  const bytes = words(32, 7, 4, 0xffff, 0x4000n, 4n << 40n); // the offset of capabilities means nothing here
  assert.deepEqual(decodeVfioRegionInfo(bytes), { flags: 7, size: 0x4000, offset: 2 ** 42, mappable: undefined });
});

test("a region tells which parts can be mapped, behind other capabilities", () => {
  const bytes = words(
    ...[96, 0xf, 4, 32, 0x4000n, 4n << 40n],
    ...[...header(3, 48), 0, 0], // MSIX_MAPPABLE
    ...[...header(1, 0), 2, 0, 0n, 0x1000n, 0x2000n, 0x2000n],
  );
  assert.equal(bytes.length, 96);
  assert.deepEqual(decodeVfioRegionInfo(bytes).mappable, [
    { offset: 0, size: 0x1000 },
    { offset: 0x2000, size: 0x2000 },
  ]);
  const none = words(48, 0xf, 4, 32, 0x4000n, 4n << 40n, ...header(1, 0), 0, 0);
  assert.deepEqual(decodeVfioRegionInfo(none).mappable, []);
});

test("a region that cannot be is refused", () => {
  const region = (cap: number, rest: readonly (number | bigint)[], size = 0x4000n, offset = 0n) =>
    words(32, 0xf, 4, cap, size, offset, ...rest);
  const cases: readonly (readonly [string, Uint8Array])[] = [
    ["cut short", words(32, 7, 4, 0, 0x4000n, 0)],
    ["a size beyond numbers", region(0, [], 2n ** 53n)],
    ["an offset beyond numbers", region(0, [], 1n, 2n ** 64n - 1n)],
    ["an end beyond numbers", region(0, [], 2n ** 52n, 2n ** 52n)],
    ["a capability within the struct", region(16, header(1, 0))],
    ["a capability behind the end", region(40, header(1, 0))],
    ["a capability that is cut short", region(36, header(1, 0))],
    ["a capability far away", region(0xffff_fff8, header(1, 0))],
    ["a next that is within the struct", region(32, header(9, 8))],
    ["a next to itself", region(32, header(9, 32))],
    ["a next back", region(32, [...header(9, 40), ...header(9, 32)])],
    ["a list that is cut short", region(32, header(1, 0))],
    ["more areas than there is room for", region(32, [...header(1, 0), 2, 0, 0n, 0x1000n])],
    ["all areas that there can be", region(32, [...header(1, 0), 0xffff_ffff, 0, 0n, 0x1000n])],
    ["an area beyond the region", region(32, [...header(1, 0), 1, 0, 0x3000n, 0x1001n])],
    ["an area beyond numbers", region(32, [...header(1, 0), 1, 0, 2n ** 63n, 0n])],
  ];
  for (const [what, bytes] of cases) assert.throws(() => decodeVfioRegionInfo(bytes), wrong, what);
});

test("a type 1 IOMMU tells its pages, addresses and how many mappings are left", () => {
  const bytes = words(
    ...[88, 3, 0x4020_1000n, 24, 0],
    ...[...header(1, 72), 2, 0, 0n, 0xfedf_ffffn, 0xfef0_0000n, 2n ** 64n - 1n],
    ...[...header(3, 0), 65_535, 0],
  );
  assert.equal(bytes.length, 88);
  assert.deepEqual(decodeVfioType1Info(bytes), {
    pageSizes: 0x4020_1000n,
    iovaRanges: [
      { start: 0n, end: 0xfedf_ffffn },
      { start: 0xfef0_0000n, end: 2n ** 64n - 1n },
    ],
    dmaAvail: 65_535,
  });
  assert.deepEqual(decodeVfioType1Info(words(24, 0, 0x1000n, 0xff, 0)), {
    pageSizes: 0n,
    iovaRanges: undefined,
    dmaAvail: undefined,
  });
});

test("a type 1 IOMMU that cannot be is refused", () => {
  const info = (...rest: readonly (number | bigint)[]) => words(24, 3, 0x1000n, 24, 0, ...rest);
  const ranges = (...bounds: readonly bigint[]) => info(...header(1, 0), bounds.length / 2, 0, ...bounds);
  for (const bytes of [
    words(24, 3, 0x1000n, 24),
    info(...header(3, 0)),
    info(...header(1, 24)),
    ranges(1n, 0n),
    ranges(0n, 5n, 5n, 9n),
    ranges(9n, 10n, 0n, 5n),
    ranges(0n, 2n ** 64n - 1n, 0n, 1n),
  ]) {
    assert.throws(() => decodeVfioType1Info(bytes), wrong);
  }
});

test("whatever bytes there are, decoding ends, with an answer or with ERR_VIRTIO_PROTOCOL", () => {
  // Words that are often small make chains that lead somewhere.
  const word = fc.oneof(fc.integer({ min: 0, max: 96 }), fc.integer({ min: 0, max: 0xffff_ffff }));
  fc.assert(
    fc.property(fc.array(word, { maxLength: 24 }), (values) => {
      const bytes = words(...values);
      for (const decode of [decodeVfioRegionInfo, decodeVfioType1Info, decodeVfioDeviceInfo]) {
        try {
          decode(bytes);
        } catch (error) {
          assert.ok(error instanceof VirtioError && error.code === "ERR_VIRTIO_PROTOCOL", String(error));
        }
      }
    }),
    { numRuns: 2000 },
  );
});

test("interrupts are enabled by descriptors, all in one struct, and disabled by none", () => {
  const action = VfioIrqSetFlag.ACTION_TRIGGER;
  assert.deepEqual(
    encodeVfioIrqSet({ index: VfioPciIrq.MSIX, action, fds: [20, 21, 22] }),
    words(32, 0x24, 2, 0, 3, 20, 21, 22),
  );
  assert.deepEqual(encodeVfioIrqSet({ index: VfioPciIrq.MSIX, action }), words(20, 0x21, 2, 0, 0));
  assert.deepEqual(
    encodeVfioIrqSet({ index: VfioPciIrq.INTX, action: VfioIrqSetFlag.ACTION_UNMASK, count: 1 }),
    words(20, 0x11, 0, 0, 1),
  );
  assert.throws(() => encodeVfioIrqSet({ index: 2, action, fds: [-1] }), { code: "ERR_VIRTIO_ARGUMENT" });
});

test("memory is mapped by three addresses, and unmapped by two", () => {
  const flags = VfioDmaFlag.READ | VfioDmaFlag.WRITE;
  assert.deepEqual(
    encodeVfioDmaMap({ flags, vaddr: 0x7f00_1234_5000, iova: 2 ** 45, size: 2 ** 21 }),
    words(32, 3, 0x7f00_1234_5000n, 2n ** 45n, 2n ** 21n),
  );
  const unmap = encodeVfioDmaUnmap({ iova: 2 ** 45, size: 2 ** 21 });
  assert.deepEqual(unmap, words(24, 0, 2n ** 45n, 2n ** 21n));
  assert.equal(decodeVfioDmaUnmap(unmap), 2n ** 21n);
  assert.throws(() => encodeVfioDmaMap({ flags, vaddr: -1, iova: 0, size: 1 }), { code: "ERR_VIRTIO_ARGUMENT" });
});
