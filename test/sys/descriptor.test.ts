/** Requests to devices. */

import assert from "node:assert/strict";
import { constants, endianness } from "node:os";
import test from "node:test";
import { closeFd, createMemfd, duplicateFd, fileSize, ioctl, sendMessage, socketPair } from "../../src/sys/index.js";
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
