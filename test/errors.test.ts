/** Tests of the error class, the checks of arguments, and the page that explains each code. */

import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import {
  checkInteger,
  checkOptions,
  ERR_VIRTIO_ARGUMENT,
  rangeError,
  typeError,
  VirtioError,
  type VirtioErrorCode,
} from "../src/errors.js";
import { ROOT } from "./doc-examples.js";

const codes = [...readFileSync(join(ROOT, "src/errors.ts"), "utf8").matchAll(/^ {2}\| "(ERR_VIRTIO_\w+)"/gm)].map(
  (match) => match[1],
);

test("docs/errors.md has a paragraph for each code, in order, and for no other", () => {
  const page = readFileSync(join(ROOT, "docs/errors.md"), "utf8");
  const sections = [...page.matchAll(/^## (\w+)\n\n(.*)/gm)];
  assert.ok(codes.length >= 20);
  assert.deepEqual(
    sections.map((section) => section[1]),
    [...codes, ERR_VIRTIO_ARGUMENT].sort(),
  );
  for (const [, code, first] of sections) assert.ok(first.length > 40, code);
});

test("each code is used somewhere in src", () => {
  const sources = readdirSync(join(ROOT, "src"), { recursive: true, encoding: "utf8" })
    .filter((name) => name.endsWith(".ts") && name !== "errors.ts" && !name.startsWith("cli"))
    .map((name) => readFileSync(join(ROOT, "src", name), "utf8"))
    .join("\n");
  assert.deepEqual(
    codes.filter((code) => !sources.includes(`"${code}"`)),
    [],
  );
});

test("VirtioError carries code, errno, syscall and cause", () => {
  const cause = new Error("below");
  const error = new VirtioError("ERR_VIRTIO_CONNECT", "nobody listens", { errno: 111, syscall: "connect", cause });
  assert.ok(error instanceof Error);
  assert.deepEqual(
    [error.name, error.code, error.message, error.errno, error.syscall, error.cause],
    ["VirtioError", "ERR_VIRTIO_CONNECT", "nobody listens", 111, "connect", cause],
  );
  const plain = new VirtioError("ERR_VIRTIO_CLOSED", "closed");
  assert.deepEqual([plain.errno, plain.syscall, "cause" in plain], [undefined, undefined, false]);
});

test("a wrong argument shows its value in the message, whatever it is", () => {
  const shown: readonly (readonly [unknown, string])[] = [
    ["8", '"8"'],
    [8, "8"],
    [8n, "8n"],
    [true, "true"],
    [undefined, "undefined"],
    [null, "null"],
    [{}, "Object"],
    [[], "Array"],
    [new Uint8Array(1), "Uint8Array"],
    [() => 1, "Function"],
    [Symbol("s"), "Symbol"],
  ];
  for (const [value, text] of shown) {
    assert.equal(typeError("x", "a thing", value).message, `"x" expected a thing, got ${text}`);
  }
  const error = rangeError("x", "more", 1);
  assert.deepEqual(
    [error.name, "code" in error && error.code, error.message],
    ["RangeError", ERR_VIRTIO_ARGUMENT, '"x" expected more, got 1'],
  );
});

test("checkInteger returns what it accepts", () => {
  assert.equal(checkInteger("n", 3, 3, 5), 3);
  assert.equal(checkInteger("n", 5, 3, 5), 5);
  assert.equal(checkInteger("n", Number.MAX_SAFE_INTEGER, 0), Number.MAX_SAFE_INTEGER);
  for (const value of [2, 6, 3.5, Number.NaN, Number.POSITIVE_INFINITY, -3]) {
    assert.throws(() => checkInteger("n", value, 3, 5), { name: "RangeError", code: ERR_VIRTIO_ARGUMENT });
  }
  for (const value of ["3", 3n, null, undefined, [3]]) {
    assert.throws(() => checkInteger("n", value, 3, 5), { name: "TypeError", code: ERR_VIRTIO_ARGUMENT });
  }
});

test("checkOptions names the option that was probably meant", () => {
  checkOptions("open", {}, ["readOnly"]);
  checkOptions("open", { readOnly: true }, ["readOnly"]);
  assert.throws(() => checkOptions("open", { readonly: true }, ["readOnly", "queues"]), {
    name: "TypeError",
    message: '"open" expected option "readOnly", got "readonly"',
  });
  assert.throws(() => checkOptions("open", { speed: 1 }, ["readOnly", "queues"]), {
    name: "TypeError",
    message: '"open" expected options among readOnly, queues, got "speed"',
  });
});

test("codes are types: an unknown one does not compile", () => {
  // @ts-expect-error not a code
  const code: VirtioErrorCode = "ERR_VIRTIO_NONSENSE";
  assert.ok(!codes.includes(code));
});
