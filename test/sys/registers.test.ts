/** Registers of a mapping: widths, byte order, bounds, and what happens after unmapping. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";
import {
  addressOf,
  closeFd,
  createMemfd,
  mapShared,
  registerRead,
  type RegisterWidth,
  registerWrite,
  unmapShared,
} from "../../src/sys/index.js";

const WIDTHS: readonly RegisterWidth[] = [1, 2, 4];
const refused = { name: "RangeError", code: "ERR_VIRTIO_ARGUMENT" };

function mapped(name: string): ArrayBuffer {
  const fd = createMemfd(name, 8192);
  const buffer = mapShared(fd, 8192);
  closeFd(fd);
  return buffer;
}

test("a register is read little-endian at its width, without the sign of its highest bit", () => {
  const buffer = mapped("registers");
  const bytes = new Uint8Array(buffer, 4096);
  bytes.set([0x88, 0x99, 0xaa, 0xff, 0x11], 8);
  assert.equal(registerRead(bytes, 8, 1), 0x88);
  assert.equal(registerRead(bytes, 9, 1), 0x99);
  assert.equal(registerRead(bytes, 8, 2), 0x9988);
  assert.equal(registerRead(bytes, 10, 2), 0xffaa);
  assert.equal(registerRead(bytes, 8, 4), 0xffaa9988);
  unmapShared(buffer);
});

test("writing a register touches its bytes only, and its lowest bits count", () => {
  const buffer = mapped("registers");
  const bytes = new Uint8Array(buffer, 4096);
  for (const [width, expected] of [
    [1, [0xee, 0xee, 0xee, 0xee, 0x04, 0xee, 0xee, 0xee, 0xee]],
    [2, [0xee, 0xee, 0xee, 0xee, 0x04, 0x03, 0xee, 0xee, 0xee]],
    [4, [0xee, 0xee, 0xee, 0xee, 0x04, 0x03, 0x02, 0xf1, 0xee]],
  ] as const) {
    bytes.fill(0xee, 0, 16);
    registerWrite(bytes, 4, width, 0xf1020304);
    assert.deepEqual([...bytes.subarray(0, 9)], expected, `width ${width}`);
    assert.equal(registerRead(bytes, 4, width), 0xf1020304 % 2 ** (8 * width));
    registerWrite(bytes, 4, width, 0xf1020304 | 0); // a number below 0: the same bits
    assert.equal(registerRead(bytes, 4, width), 0xf1020304 % 2 ** (8 * width));
  }
  unmapShared(buffer);
});

test("PCI-DRV-04 the last register of a view is reached, and none beyond, before or across its width", () => {
  const buffer = mapped("registers");
  const bytes = new Uint8Array(buffer, 4096, 64).fill(0xee);
  for (const width of WIDTHS) {
    registerWrite(bytes, 64 - width, width, 0x01020304);
    assert.equal(registerRead(bytes, 64 - width, width), 0x01020304 % 2 ** (8 * width));
    for (const offset of [64, 64 - width + 1, -width, -1, 2 ** 31, 2 ** 52, 2 ** 53, -(2 ** 53)]) {
      assert.throws(() => registerRead(bytes, offset, width), refused, `${width} at ${offset}`);
      assert.throws(() => registerWrite(bytes, offset, width, 0), refused, `${width} at ${offset}`);
    }
    for (let offset = 1; offset < width; offset++) {
      assert.throws(() => registerRead(bytes, offset, width), { ...refused, message: /multiple/ });
      assert.throws(() => registerWrite(bytes, offset, width, 0), { ...refused, message: /multiple/ });
    }
  }
  // What counts is where the register lies in memory, not where in the view.
  const shifted = new Uint8Array(buffer, 4098, 8);
  assert.equal(registerRead(shifted, 2, 4), 0xeeeeeeee);
  assert.throws(() => registerRead(shifted, 0, 4), { ...refused, message: /multiple of 4/ });
  assert.deepEqual([...bytes.subarray(0, 60)], new Array(60).fill(0xee));
  unmapShared(buffer);
});

test("a width that there is not, and what is no bytes, is refused", () => {
  const buffer = mapped("registers");
  const bytes = new Uint8Array(buffer);
  for (const width of [0, 3, 8, -1, 2 ** 32, "4"] as RegisterWidth[]) {
    assert.throws(() => registerRead(bytes, 0, width), { ...refused, message: /"width"/ });
    assert.throws(() => registerWrite(bytes, 0, width, 0), { ...refused, message: /"width"/ });
  }
  for (const view of [new Uint16Array(buffer), new DataView(buffer), buffer, undefined]) {
    const wrong = view as unknown as Uint8Array;
    assert.throws(() => registerRead(wrong, 0, 1), { name: "TypeError", code: "ERR_VIRTIO_ARGUMENT" });
    assert.throws(() => registerWrite(wrong, 0, 1, 0), { name: "TypeError", code: "ERR_VIRTIO_ARGUMENT" });
  }
  unmapShared(buffer);
});

test("registers that were unmapped are refused, not touched", () => {
  const buffer = mapped("registers");
  const bytes = new Uint8Array(buffer);
  unmapShared(buffer);
  for (const width of WIDTHS) {
    assert.throws(() => registerRead(bytes, 0, width), refused);
    assert.throws(() => registerWrite(bytes, 0, width, 0), refused);
  }
});

test("the address of a mapping is where /proc/self/maps shows it", () => {
  const buffer = mapped("address");
  const line = readFileSync("/proc/self/maps", "utf8")
    .split("\n")
    .find((text) => text.includes("/memfd:address "));
  assert.equal(addressOf(buffer), Number.parseInt(line?.split("-")[0] ?? "", 16));
  unmapShared(buffer);
});

test("what is not mapped has no address", () => {
  const buffer = mapped("address");
  unmapShared(buffer);
  const wrong = { name: "TypeError", code: "ERR_VIRTIO_ARGUMENT" };
  assert.throws(() => addressOf(buffer), wrong);
  assert.throws(() => addressOf(new ArrayBuffer(0)), wrong);
  assert.throws(() => addressOf(new Uint8Array(8) as unknown as ArrayBuffer), wrong);
});
