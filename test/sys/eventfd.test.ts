/** Event descriptors: signal, drain, ownership, and a peer that shares the descriptor's flags. */

import assert from "node:assert/strict";
import { writeSync } from "node:fs";
import { constants } from "node:os";
import test from "node:test";
import { closeFd, EventFd } from "../../src/sys/index.js";
import { NATIVE, openFds, openFlags, runChild, SYS } from "./helpers.js";

const O_CLOEXEC = 0o2000000;
const O_NONBLOCK = 0o4000;

test("signals add up, and drain takes them all", () => {
  const event = EventFd.create();
  assert.equal(event.drain(), false);
  event.signal();
  event.signal();
  assert.equal(event.drain(), true);
  assert.equal(event.drain(), false);
  event.close();
});

test("an event descriptor is non-blocking and does not survive exec", () => {
  const event = EventFd.create();
  assert.equal(openFlags(event.fd) & (O_NONBLOCK | O_CLOEXEC), O_NONBLOCK | O_CLOEXEC);
  event.close();
});

test("a counter that a peer has filled takes signals without waiting or failing", () => {
  const event = EventFd.create();
  writeSync(event.fd, new BigUint64Array([2n ** 64n - 2n]));
  event.signal();
  assert.equal(event.drain(), true);
  assert.equal(event.drain(), false);
  event.close();
});

test("drain does not wait although the peer cleared O_NONBLOCK", () => {
  const child = runChild(`
    import { EventFd } from ${JSON.stringify(SYS)};
    import { native } from ${JSON.stringify(NATIVE)};
    const F_SETFL = 4, O_RDWR = 2;
    const event = EventFd.create();
    if (native().fcntl(event.fd, F_SETFL, O_RDWR) !== 0) throw new Error("fcntl");
    event.signal();
    console.log(event.drain(), event.drain());
  `);
  assert.equal(child.signal, null);
  assert.equal(child.stdout, "true false\n", child.stderr);
});

test("fromFd takes the descriptor over; close is idempotent and gives it back", () => {
  const before = openFds();
  const made = EventFd.create();
  const taken = EventFd.fromFd(made.fd);
  made.signal();
  assert.equal(taken.drain(), true);
  taken.close();
  taken.close();
  assert.equal(openFds(), before);
  assert.equal(taken.fd, -1);
});

test("use after close, a descriptor that is not open, and one that never was are refused", () => {
  const event = EventFd.create();
  const fd = event.fd;
  event.close();
  assert.throws(() => event.signal(), { code: "ERR_VIRTIO_CLOSED" });
  assert.throws(() => event.drain(), { code: "ERR_VIRTIO_CLOSED" });
  const stale = EventFd.fromFd(fd);
  const refused = { code: "ERR_VIRTIO_SYSCALL", errno: constants.errno.EBADF };
  assert.throws(() => stale.signal(), { ...refused, syscall: "write" });
  assert.throws(() => stale.drain(), { ...refused, syscall: "read" });
  assert.throws(() => stale.close(), { ...refused, syscall: "close" });
  for (const wrong of [-1, 1.5, 2 ** 31, "3"]) {
    assert.throws(() => EventFd.fromFd(wrong as number), { code: "ERR_VIRTIO_ARGUMENT" });
  }
});

test("running out of descriptors says what to raise", () => {
  const child = runChild(`
    import { EventFd } from ${JSON.stringify(SYS)};
    const open = [];
    try {
      for (;;) open.push(EventFd.create());
    } catch (error) {
      for (const event of open) event.close();
      console.log(error.code, error.syscall, error.message);
    }
  `);
  assert.match(child.stdout, /^ERR_VIRTIO_SYSCALL eventfd .*EMFILE.*ulimit -n/, child.stderr);
});

test("closing a descriptor twice is an error", () => {
  const event = EventFd.create();
  closeFd(event.fd);
  assert.throws(() => closeFd(event.fd), { errno: constants.errno.EBADF, syscall: "close" });
});
