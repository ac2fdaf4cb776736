/** Tests of the size parser. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { ERR_VIRTIO_ARGUMENT } from "../src/errors.js";
import { parseSize } from "../src/size.js";

const accepted: readonly (readonly [string, number])[] = [
  ["0", 0],
  ["1", 1],
  ["512", 512],
  ["007", 7],
  ["4K", 4096],
  ["4k", 4096],
  ["4KiB", 4096],
  ["4kib", 4096],
  ["1M", 1 << 20],
  ["2G", 2 ** 31],
  ["1GiB", 2 ** 30],
  ["3T", 3 * 2 ** 40],
  ["9007199254740991", Number.MAX_SAFE_INTEGER],
  ["8191T", 8191 * 2 ** 40],
];
for (const [text, bytes] of accepted) {
  test(`parseSize("${text}") is ${bytes}`, () => {
    assert.equal(parseSize(text), bytes);
  });
}

const refused = ["", " ", "K", "-1", "+1", "1.5M", "1e3", "0x10", " 1", "1 K", "4KB", "4B", "1P", "4KiBs", "１"];
for (const text of [...refused, "9007199254740992", "8192T", "9".repeat(400)]) {
  test(`parseSize refuses ${JSON.stringify(text.slice(0, 20))}`, () => {
    assert.throws(() => parseSize(text, "--length"), {
      name: "RangeError",
      code: ERR_VIRTIO_ARGUMENT,
      message: `"--length" expected a size such as "512", "4K", "1M" or "2GiB", got ${JSON.stringify(text)}`,
    });
  });
}
