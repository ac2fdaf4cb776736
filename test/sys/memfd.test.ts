/** Memory files: size, seals, flags, huge pages, and what is refused. */

import assert from "node:assert/strict";
import { closeSync, ftruncateSync, openSync, readFileSync } from "node:fs";
import { constants } from "node:os";
import test from "node:test";
import { closeFd, createMemfd, fileSize, MemfdSeal, mapShared, memfdSeals, unmapShared } from "../../src/sys/index.js";
import { native } from "../../src/sys/native.js";
import { openFds, openFlags } from "./helpers.js";

const O_CLOEXEC = 0o2000000;

test("a memory file has its size, is sealed against any other, and does not survive exec", () => {
  const fd = createMemfd("sealed", 12345);
  assert.equal(fileSize(fd), 12345);
  const wanted = MemfdSeal.SHRINK | MemfdSeal.GROW | MemfdSeal.SEAL;
  assert.equal(memfdSeals(fd) & wanted, wanted);
  assert.throws(() => ftruncateSync(fd, 4096), { code: "EPERM" });
  assert.throws(() => ftruncateSync(fd, 1 << 20), { code: "EPERM" });
  assert.equal(fileSize(fd), 12345);
  assert.equal(openFlags(fd) & O_CLOEXEC, O_CLOEXEC);
  closeFd(fd);
  closeFd(createMemfd("x".repeat(249), 4096));
});

test("no seal can be added later, so a peer cannot make the memory read-only under us", () => {
  const fd = createMemfd("final", 4096);
  const F_ADD_SEALS = 1033;
  const F_SEAL_WRITE = 0x8;
  assert.equal(native().fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE), -constants.errno.EPERM);
  closeFd(fd);
});

test("a file without seals has none, and a closed descriptor is an error", () => {
  const fd = openSync("/proc/self/exe", "r");
  assert.equal(memfdSeals(fd), 0);
  closeSync(fd);
  const expected = { name: "VirtioError", code: "ERR_VIRTIO_SYSCALL", errno: constants.errno.EBADF };
  assert.throws(() => memfdSeals(fd), { ...expected, syscall: "fcntl" });
  assert.throws(() => fileSize(fd), { ...expected, syscall: "fstat" });
});

test("wrong names, sizes and options are refused, and leave no descriptor behind", () => {
  const before = openFds();
  const refused = { code: "ERR_VIRTIO_ARGUMENT" };
  assert.throws(() => createMemfd(7 as unknown as string, 4096), refused);
  for (const size of [0, -1, 1.5, Number.NaN, 2 ** 53]) assert.throws(() => createMemfd("size", size), refused);
  assert.throws(() => createMemfd("pages", 4096, { hugepages: "2M" } as object), /option "hugePages"/);
  assert.throws(() => createMemfd("pages", 4096, { hugePages: "4K" as "2M" }), refused);
  assert.throws(() => createMemfd("pages", 4096, { hugePages: "2M" }), /multiple of 2097152/);
  assert.throws(() => createMemfd("x".repeat(250), 4096), {
    code: "ERR_VIRTIO_SYSCALL",
    errno: constants.errno.ENAMETOOLONG,
    syscall: "memfd_create",
  });
  assert.equal(openFds(), before);
});

test("huge pages are used when the system has some, and otherwise said to be missing", () => {
  const before = openFds();
  const length = 2 ** 21;
  const fd = createMemfd("huge", length, { hugePages: "2M" });
  const free = /HugePages_Free:\s*(\d+)/.exec(readFileSync("/proc/meminfo", "utf8"))?.[1];
  if (Number(free) > 0) {
    // The mapping is a whole huge page though fewer bytes are asked for; unmapping less would be refused.
    const buffer = mapShared(fd, 4096);
    new Uint8Array(buffer)[4095] = 7;
    unmapShared(buffer);
  } else {
    assert.throws(() => mapShared(fd, length), { errno: constants.errno.ENOMEM, message: /huge pages/ });
  }
  closeFd(fd);
  assert.equal(openFds(), before);
});
