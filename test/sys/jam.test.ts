/** Guards over eventfds that a peer may fill: what they notice, what they leave alone, and what is left of them. */

import assert from "node:assert/strict";
import { once } from "node:events";
import { writeSync } from "node:fs";
import { constants } from "node:os";
import test from "node:test";
import { Worker } from "node:worker_threads";
import { EventFd, JamGuard } from "../../src/sys/index.js";
import { openFds, NATIVE, runChild, SYS, turn } from "./helpers.js";

const FULL = new BigUint64Array([2n ** 64n - 2n]);

/** A promise, and what it resolves by. */
function signalled(): { told: Promise<void>; tell: () => void } {
  let tell = (): void => {};
  const told = new Promise<void>((resolve) => {
    tell = resolve;
  });
  return { told, tell };
}

test("a counter that is full is emptied and told, each time; others are left as they are", async () => {
  const before = openFds();
  const [full, busy] = [EventFd.create(), EventFd.create()];
  let { told, tell } = signalled();
  const guard = new JamGuard(() => tell());
  guard.add(busy);
  guard.add(full);
  for (let i = 0; i < 2; i++) {
    busy.signal();
    writeSync(full.fd, FULL);
    // The guard does not keep the process alive, nor does anything else here.
    const alive = setInterval(() => {}, 60_000);
    await told;
    clearInterval(alive);
    ({ told, tell } = signalled());
    assert.equal(full.drain(), false, "emptied");
    assert.equal(busy.drain(), true, "left alone");
  }
  guard.remove(full);
  guard.remove(full);
  guard.close();
  guard.close();
  full.close();
  busy.close();
  await turn();
  assert.equal(openFds(), before);
});

test("whoever waits is let go", () => {
  const child = runChild(`
    import { writeSync } from "node:fs";
    import { EventFd, JamGuard } from ${JSON.stringify(SYS)};
    import { native } from ${JSON.stringify(NATIVE)};
    const F_SETFL = 4, O_RDWR = 2;
    const event = EventFd.create();
    const guard = new JamGuard(() => {
      console.log("told", event.drain());
      guard.close();
      clearInterval(alive);
    });
    guard.add(event);
    const alive = setInterval(() => {}, 1000);
    if (native().fcntl(event.fd, F_SETFL, O_RDWR) !== 0) throw new Error("fcntl");
    writeSync(event.fd, new BigUint64Array([2n ** 64n - 2n]));
    event.signal();
    console.log("signalled");
  `);
  assert.equal(child.signal, null, "it waits for ever");
  assert.equal(child.stdout, "signalled\ntold true\n", child.stderr);
});

test("the guard of a thread that is terminated leaves no watch behind", async () => {
  const code = `
    const { parentPort, workerData } = require("node:worker_threads");
    import(${JSON.stringify(SYS)}).then(({ EventFd, JamGuard }) => {
      const guard = new JamGuard(() => {});
      for (let i = 0; i < 10; i++) guard.add(EventFd.fromFd(workerData));
      globalThis.kept = guard;
      parentPort.postMessage("made");
      setInterval(() => {}, 1000);
    });`;
  const event = EventFd.create();
  const round = async (): Promise<void> => {
    const worker = new Worker(code, { eval: true, workerData: event.fd });
    await once(worker, "message");
    await worker.terminate();
  };
  await round();
  const before = openFds();
  for (let i = 0; i < 3; i++) await round();
  // What the addon held is gone; the descriptor that the guard made in JavaScript is not, as with all of that thread.
  assert.equal(openFds(), before + 3);
  event.close();
});

test("what cannot be guarded is refused, and leaves nothing", () => {
  const before = openFds();
  const closed = EventFd.create();
  closed.close();
  const guard = new JamGuard(() => {});
  assert.throws(() => guard.add(closed), { errno: constants.errno.EBADF, syscall: "dup" });
  guard.close();
  assert.equal(openFds(), before);
});
