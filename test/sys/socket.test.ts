/** Unix sockets: connecting, listening, and descriptors that travel, arrive short, or are cut off. */

import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { chmodSync, existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { constants, tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import test, { after } from "node:test";
import {
  acceptUnix,
  closeFd,
  connectUnix,
  createMemfd,
  EventFd,
  fileSize,
  listenUnix,
  MAX_MESSAGE_FDS,
  receiveMessage,
  sendMessage,
  socketPair,
} from "../../src/sys/index.js";
import { native } from "../../src/sys/native.js";
import { openFds, openFlags, SYS } from "./helpers.js";

const { errno } = constants;
const O_CLOEXEC = 0o2000000;
const O_NONBLOCK = 0o4000;

const folder = mkdtempSync(join(tmpdir(), "virtio-"));
after(() => rmSync(folder, { recursive: true }));

function bytes(text: string): Uint8Array {
  return new TextEncoder().encode(text);
}

test("bytes go both ways between client and server, and nothing waits", () => {
  const before = openFds();
  const path = join(folder, "both-ways");
  const server = listenUnix(path);
  assert.equal(acceptUnix(server), undefined);
  const near = connectUnix(path);
  const far = acceptUnix(server);
  assert.ok(far !== undefined);
  for (const fd of [server, near, far]) {
    assert.equal(openFlags(fd) & (O_NONBLOCK | O_CLOEXEC), O_NONBLOCK | O_CLOEXEC);
  }
  const into = new Uint8Array(16);
  assert.equal(receiveMessage(far, into, []), -1);
  assert.equal(sendMessage(near, bytes("question"), []), 8);
  assert.equal(receiveMessage(far, into, []), 8);
  assert.equal(sendMessage(far, bytes("answer"), []), 6);
  assert.equal(receiveMessage(near, into, []), 6);
  assert.deepEqual(into.subarray(0, 6), bytes("answer"));
  closeFd(far);
  assert.equal(receiveMessage(near, into, []), 0);
  assert.throws(() => sendMessage(near, bytes("too late"), []), { code: "ERR_VIRTIO_SYSCALL", errno: errno.EPIPE });
  closeFd(near);
  closeFd(server);
  assert.equal(openFds(), before);
});

test("a view in the middle of a buffer is sent and filled where it lies", () => {
  const [near, far] = socketPair();
  const whole = bytes("0123456789");
  assert.equal(sendMessage(near, whole.subarray(3, 7), []), 4);
  const into = new Uint8Array(10);
  assert.equal(receiveMessage(far, into.subarray(5, 10), []), 4);
  assert.equal(new TextDecoder().decode(into), "\0\0\0\0\x003456\0");
  closeFd(near);
  closeFd(far);
});

test("connecting says what is wrong, and leaves no descriptor behind", () => {
  const before = openFds();
  const refused = { name: "VirtioError", code: "ERR_VIRTIO_CONNECT", syscall: "connect" };
  const missing = join(folder, "missing");
  assert.throws(() => connectUnix(missing), {
    ...refused,
    errno: errno.ENOENT,
    message: `${missing}: ENOENT from connect; no such socket; start the back-end first, or check the path`,
  });
  const stale = join(folder, "stale");
  closeFd(listenUnix(stale));
  assert.throws(() => connectUnix(stale), { ...refused, errno: errno.ECONNREFUSED, message: /nobody listens/ });
  const file = join(folder, "file");
  writeFileSync(file, "");
  assert.throws(() => connectUnix(file), { ...refused, errno: errno.ECONNREFUSED });
  assert.throws(() => connectUnix(join(file, "x")), { ...refused, errno: errno.ENOTDIR });
  assert.equal(openFds(), before);
});

test("a full backlog is an error, not a wait", () => {
  const before = openFds();
  const path = join(folder, "busy");
  const server = listenUnix(path, 0);
  const clients: number[] = [];
  assert.throws(
    () => {
      while (clients.length < 100) clients.push(connectUnix(path));
    },
    { code: "ERR_VIRTIO_CONNECT", errno: errno.EAGAIN, message: /one at a time/ },
  );
  for (const fd of [...clients, server]) closeFd(fd);
  assert.equal(openFds(), before);
});

test("a socket that this user may not use is a matter of permission", () => {
  const path = join(folder, "forbidden");
  const server = listenUnix(path);
  chmodSync(folder, 0o755);
  chmodSync(path, 0o000);
  const root = process.geteuid?.() === 0;
  if (root) process.seteuid?.(65534);
  try {
    assert.throws(() => connectUnix(path), { code: "ERR_VIRTIO_PERMISSION", errno: errno.EACCES, message: /write/ });
  } finally {
    if (root) process.seteuid?.(0);
  }
  closeFd(server);
});

test("paths that no socket can have are refused", () => {
  const refused = { code: "ERR_VIRTIO_ARGUMENT" };
  for (const path of ["", "x".repeat(108), "ä".repeat(54), "a\0b"]) {
    assert.throws(() => connectUnix(path), { ...refused, name: "RangeError", message: /107 bytes/ });
    assert.throws(() => listenUnix(path), { ...refused, name: "RangeError" });
  }
  assert.throws(() => connectUnix(undefined as unknown as string), { ...refused, name: "TypeError" });
  assert.throws(() => listenUnix(join(folder, "backlog"), -1), refused);
});

test("the longest path works", () => {
  const path = join(folder, "x".repeat(107 - folder.length - 1));
  assert.equal(Buffer.byteLength(path), 107);
  const server = listenUnix(path);
  closeFd(connectUnix(path));
  closeFd(server);
});

test("listening replaces a dead socket, but never a live one nor a file", () => {
  const before = openFds();
  const path = join(folder, "listen");
  closeFd(listenUnix(path));
  const server = listenUnix(path);
  const refused = { code: "ERR_VIRTIO_SYSCALL", errno: errno.EADDRINUSE, message: /somebody listens/ };
  assert.throws(() => listenUnix(path), refused);
  closeFd(connectUnix(path));
  const file = join(folder, "precious");
  writeFileSync(file, "data");
  assert.throws(() => listenUnix(file), refused);
  assert.equal(readFileSync(file, "utf8"), "data");
  assert.throws(() => listenUnix(join(folder, "none", "x")), { errno: errno.ENOENT });
  assert.ok(existsSync(path));
  closeFd(server);
  assert.equal(openFds(), before);
});

test("descriptors arrive as new ones for the same files, close-on-exec, in order", () => {
  const before = openFds();
  const [near, far] = socketPair();
  const event = EventFd.create();
  const memory = createMemfd("passed", 4096);
  assert.equal(sendMessage(near, bytes("two"), [event.fd, memory]), 3);
  assert.equal(sendMessage(near, bytes("none"), []), 4);
  const fds = [-7];
  assert.equal(receiveMessage(far, new Uint8Array(3), fds), 3);
  assert.equal(receiveMessage(far, new Uint8Array(16), fds), 4);
  const [kept, passedEvent = -1, passedMemory = -1] = fds;
  assert.equal(fds.length, 3);
  assert.equal(kept, -7);
  assert.equal(openFlags(passedEvent) & O_CLOEXEC, O_CLOEXEC);
  assert.equal(openFlags(passedMemory) & O_CLOEXEC, O_CLOEXEC);
  EventFd.fromFd(passedEvent).signal();
  assert.equal(event.drain(), true);
  assert.equal(fileSize(passedMemory), 4096);
  for (const fd of [near, far, event.fd, memory, passedEvent, passedMemory]) closeFd(fd);
  assert.equal(openFds(), before);
});

test("descriptors come with the first byte, also when the bytes are read one by one", () => {
  const [near, far] = socketPair();
  sendMessage(near, bytes("abc"), [near]);
  const counts: number[] = [];
  for (let i = 0; i < 3; i++) {
    const fds: number[] = [];
    assert.equal(receiveMessage(far, new Uint8Array(1), fds), 1);
    counts.push(fds.length);
    for (const fd of fds) closeFd(fd);
  }
  assert.deepEqual(counts, [1, 0, 0]);
  closeFd(near);
  closeFd(far);
});

test("a full socket sends short and then not at all; what was sent arrives whole, with its descriptor once", () => {
  const [near, far] = socketPair();
  const block = new Uint8Array(1 << 20).map((_, index) => index % 251);
  let sent = sendMessage(near, block, [near]);
  assert.ok(sent > 0 && sent < block.length);
  for (let more = sent; more !== -1; sent += Math.max(0, more)) more = sendMessage(near, block.subarray(sent), []);
  const into = new Uint8Array(1 << 20);
  const fds: number[] = [];
  let received = 0;
  for (let more = 0; more !== -1; received += Math.max(0, more)) {
    more = receiveMessage(far, into.subarray(received), fds);
  }
  assert.equal(received, sent);
  assert.deepEqual(into.subarray(0, received), block.subarray(0, sent));
  assert.equal(fds.length, 1);
  for (const fd of [near, far, ...fds]) closeFd(fd);
});

test(`${MAX_MESSAGE_FDS} descriptors fit into a message, one more is refused before it is sent`, () => {
  const before = openFds();
  const [near, far] = socketPair();
  const many = Array.from({ length: MAX_MESSAGE_FDS }, () => near);
  assert.equal(sendMessage(near, bytes("x"), many), 1);
  const fds: number[] = [];
  assert.equal(receiveMessage(far, new Uint8Array(1), fds), 1);
  assert.equal(new Set(fds).size, MAX_MESSAGE_FDS);
  for (const fd of fds) closeFd(fd);
  assert.throws(() => sendMessage(near, bytes("x"), [...many, near]), { code: "ERR_VIRTIO_ARGUMENT" });
  assert.equal(receiveMessage(far, new Uint8Array(1), []), -1);
  closeFd(near);
  closeFd(far);
  assert.equal(openFds(), before);
});

test("a message with more descriptors than there is room for is an error, and all of them are closed", () => {
  const [near, far] = socketPair();
  const before = openFds();
  for (const count of [MAX_MESSAGE_FDS + 1, 100, 253]) {
    assert.equal(native().sendmsg(near, bytes("x"), new Int32Array(count).fill(near), count), 1);
    const fds: number[] = [];
    assert.throws(() => receiveMessage(far, new Uint8Array(8), fds), {
      code: "ERR_VIRTIO_PROTOCOL",
      syscall: "recvmsg",
      message: /cut off/,
    });
    assert.deepEqual(fds, []);
    assert.equal(openFds(), before);
  }
  // The connection itself is still good.
  sendMessage(near, bytes("y"), [near]);
  const fds: number[] = [];
  assert.equal(receiveMessage(far, new Uint8Array(8), fds), 1);
  for (const fd of [...fds, near, far]) closeFd(fd);
});

test("descriptors that this process has no room for are an error, and those that came are closed", () => {
  const code = `
    import { EventFd, closeFd, receiveMessage, sendMessage, socketPair } from ${JSON.stringify(SYS)};
    import { readdirSync } from "node:fs";
    const [near, far] = socketPair();
    sendMessage(near, new Uint8Array(1), new Array(20).fill(near));
    const before = readdirSync("/proc/self/fd").length;
    const events = [];
    try { for (;;) events.push(EventFd.create()); } catch {}
    for (let i = 0; i < 5; i++) events.pop().close();
    const fds = [];
    try { receiveMessage(far, new Uint8Array(1), fds); } catch (error) { console.log(error.code, fds.length); }
    const free = [];
    try { for (;;) free.push(EventFd.create()); } catch {}
    for (const event of [...events, ...free]) event.close();
    console.log(free.length, readdirSync("/proc/self/fd").length - before);
  `;
  const child = spawnSync(
    "sh",
    ["-c", 'ulimit -n 60 && exec "$0" --input-type=module -e "$1"', process.execPath, code],
    {
      encoding: "utf8",
      timeout: 30_000,
      killSignal: "SIGKILL",
    },
  );
  assert.equal(child.stdout, "ERR_VIRTIO_PROTOCOL 0\n5 0\n", child.stderr);
});

test("descriptors that are not open, and messages without bytes, are refused", () => {
  const [near, far] = socketPair();
  closeFd(far);
  const gone = { code: "ERR_VIRTIO_SYSCALL", errno: errno.EBADF };
  assert.throws(() => sendMessage(far, bytes("x"), []), gone);
  assert.throws(() => sendMessage(near, bytes("x"), [far]), gone);
  assert.throws(() => receiveMessage(far, new Uint8Array(1), []), gone);
  assert.throws(() => acceptUnix(far), gone);
  assert.throws(() => acceptUnix(near), { code: "ERR_VIRTIO_SYSCALL", errno: errno.EINVAL });
  const refused = { code: "ERR_VIRTIO_ARGUMENT" };
  assert.throws(() => sendMessage(near, new Uint8Array(0), []), refused);
  assert.throws(() => sendMessage(near, "x" as unknown as Uint8Array, []), refused);
  assert.throws(() => sendMessage(near, bytes("x"), [-1]), refused);
  assert.throws(() => receiveMessage(near, new Uint8Array(0), []), refused);
  assert.throws(() => receiveMessage(near, new Uint16Array(4) as unknown as Uint8Array, []), refused);
  closeFd(near);
});
