/** Requests to devices, and ranges of files. */

import assert from "node:assert/strict";
import { closeSync, fstatSync, mkdtempSync, openSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { constants, endianness, tmpdir } from "node:os";
import { join } from "node:path";
import test from "node:test";
import {
  closeFd,
  createMemfd,
  duplicateFd,
  fileSize,
  fallocate,
  ioctl,
  mapShared,
  socketPair,
  unmapShared,
  sendMessage,
} from "../../src/sys/index.js";
import { openFlags } from "./helpers.js";

const { errno } = constants;

test("a duplicate is the same open file, close-on-exec, and outlives the first descriptor", () => {
  const FD_CLOEXEC_FLAG = 0o2000000;
  const fd = createMemfd("duplicate", 4096);
  const copy = duplicateFd(fd);
  assert.notEqual(copy, fd);
  assert.equal(openFlags(copy) & FD_CLOEXEC_FLAG, FD_CLOEXEC_FLAG);
  closeFd(fd);
  assert.equal(fileSize(copy), 4096);
  closeFd(copy);
  assert.throws(() => duplicateFd(copy), { code: "ERR_VIRTIO_SYSCALL", errno: errno.EBADF, syscall: "fcntl" });
  assert.throws(() => duplicateFd(-1), { code: "ERR_VIRTIO_ARGUMENT" });
});

test("ioctl reads and writes the bytes it is given", () => {
  const FIONREAD = 0x541b;
  const [near, far] = socketPair();
  sendMessage(near, new Uint8Array(300), []);
  const answer = new Uint8Array(4);
  assert.equal(ioctl(far, FIONREAD, answer), 0);
  const view = new DataView(answer.buffer);
  assert.equal(view.getUint32(0, endianness() === "LE"), 300);
  closeFd(near);
  closeFd(far);
});

test("ioctl takes a number by value", () => {
  const FIOCLEX = 0x5451;
  const [near, far] = socketPair();
  assert.equal(ioctl(near, FIOCLEX), 0);
  assert.equal(ioctl(near, FIOCLEX, 0), 0);
  closeFd(near);
  closeFd(far);
});

test("ioctl refuses too few bytes for the request, and reports what the kernel refuses", () => {
  const fd = createMemfd("ioctl", 4096);
  const TUNGETIFF = 0x800454d2; // its number says that the kernel writes 4 bytes
  assert.throws(() => ioctl(fd, TUNGETIFF, new Uint8Array(3)), { code: "ERR_VIRTIO_ARGUMENT", message: /4 bytes/ });
  assert.throws(() => ioctl(fd, TUNGETIFF, new Uint8Array(4)), {
    code: "ERR_VIRTIO_SYSCALL",
    errno: errno.ENOTTY,
    syscall: "ioctl",
    message: /0x800454d2/,
  });
  const refused = { code: "ERR_VIRTIO_ARGUMENT" };
  assert.throws(() => ioctl(fd, -1), refused);
  assert.throws(() => ioctl(fd, 2 ** 32), refused);
  assert.throws(() => ioctl(fd, 1, -1), refused);
  assert.throws(() => ioctl(fd, 1, "x" as unknown as number), refused);
  closeFd(fd);
});

test("fallocate gives blocks back, zeroes, and allocates", () => {
  const folder = mkdtempSync(join(tmpdir(), "virtio-"));
  const path = join(folder, "disk");
  writeFileSync(path, new Uint8Array(1 << 20).fill(0xaa));
  const fd = openSync(path, "r+");
  const full = fstatSync(fd).blocks;
  fallocate(fd, "punchHole", 65536, 2 * 65536);
  const holed = fstatSync(fd).blocks;
  assert.ok(holed < full, `${holed} of ${full} blocks`);
  try {
    fallocate(fd, "zeroRange", 4 * 65536, 65536);
  } catch (error) {
    // tmpfs has no such operation; then nothing is zeroed, and the error says so.
    assert.ok(error instanceof Error && "errno" in error && error.errno === errno.EOPNOTSUPP);
    fallocate(fd, "punchHole", 4 * 65536, 65536);
  }
  const data = readFileSync(path);
  assert.equal(data.length, 1 << 20);
  for (let block = 0; block < 16; block++) {
    const expected = block === 1 || block === 2 || block === 4 ? 0 : 0xaa;
    assert.ok(
      data.subarray(block * 65536, (block + 1) * 65536).every((byte) => byte === expected),
      `block ${block}`,
    );
  }
  fallocate(fd, "allocate", 1 << 20, 4096);
  assert.equal(fstatSync(fd).size, (1 << 20) + 4096);
  closeSync(fd);
  rmSync(folder, { recursive: true });
});

test("fallocate punches holes into shared memory", () => {
  const fd = createMemfd("holes", 8192);
  const buffer = mapShared(fd, 8192);
  const bytes = new Uint8Array(buffer).fill(1);
  fallocate(fd, "punchHole", 4096, 4096);
  assert.equal(bytes[4095], 1);
  assert.equal(bytes[4096], 0);
  assert.throws(() => fallocate(fd, "allocate", 8192, 4096), { code: "ERR_VIRTIO_PERMISSION", errno: errno.EPERM });
  unmapShared(buffer);
  closeFd(fd);
});

test("fallocate refuses what cannot be", () => {
  const fd = createMemfd("refused", 4096);
  const refused = { code: "ERR_VIRTIO_ARGUMENT" };
  assert.throws(() => fallocate(fd, "punch" as "punchHole", 0, 1), refused);
  assert.throws(() => fallocate(fd, "toString" as "punchHole", 0, 1), refused);
  assert.throws(() => fallocate(fd, "punchHole", -1, 1), refused);
  assert.throws(() => fallocate(fd, "punchHole", 0, 0), refused);
  closeFd(fd);
  assert.throws(() => fallocate(fd, "punchHole", 0, 1), { errno: errno.EBADF, syscall: "fallocate" });
});
