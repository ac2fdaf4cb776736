/** Messages through a socket that is full: sent in parts, in order, their descriptors once. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { closeFd, EventFd, FdWatcher, receiveMessage, sendMessage, socketPair } from "../../../src/sys/index.js";
import { VhostUser } from "../../../src/transports/index.js";
import { MessageSocket } from "../../../src/transports/vhost-user/socket.js";
import { ScriptedPeer } from "../scripted-peer.js";
import { held, live } from "../support.js";

const SILENT = {
  begin: () => assert.fail("nothing was sent here"),
  descriptors: () => assert.fail("nothing was sent here"),
  header: () => assert.fail("nothing was sent here"),
  message: () => assert.fail("nothing was sent here"),
  doing: () => "testing",
};

/** Fill the socket until it takes no more; the number of bytes. */
function fill(fd: number): number {
  const junk = Buffer.alloc(1 << 16, 0xee);
  let total = 0;
  for (let size = junk.length; size > 0; size >>= 1) {
    for (let count = 0; count >= 0; ) {
      count = sendMessage(fd, junk.subarray(0, size), []);
      if (count > 0) total += count;
    }
  }
  return total;
}

/** Read exactly `length` bytes, as they come, with the descriptors among them and where they came. */
function read(fd: number, length: number): Promise<{ bytes: Buffer; fds: { at: number; fd: number }[] }> {
  return new Promise((resolve) => {
    const parts: Buffer[] = [];
    const fds: { at: number; fd: number }[] = [];
    let at = 0;
    const watcher = new FdWatcher(fd, { drain: false }, () => {
      const chunk = Buffer.alloc(Math.min(length - at, 100_000));
      const passed: number[] = [];
      const count = receiveMessage(fd, chunk, passed);
      if (count <= 0) return;
      for (const each of passed) fds.push({ at, fd: each });
      parts.push(chunk.subarray(0, count));
      at += count;
      if (at < length) return;
      watcher.close();
      resolve({ bytes: Buffer.concat(parts), fds });
    });
  });
}

describe("a full socket", () => {
  test("VHU-FE-02 a message sent in parts carries its descriptor with the first byte only", async () => {
    const before = held();
    const [ours, theirs] = socketPair();
    const events = [EventFd.create(), EventFd.create()];
    const socket = new MessageSocket(ours, "the test", { ...SILENT, broken: (error) => assert.fail(error) });
    const idle = held();
    const messages = events.map((_, i) => Buffer.alloc(700_000, i + 1));
    for (const [i, bytes] of messages.entries()) socket.send(bytes, [events[i]?.fd ?? -1]);
    assert.equal(socket.unsent, 2);
    const { bytes, fds } = await read(theirs, 1_400_000);
    assert.ok(bytes.equals(Buffer.concat(messages)));
    assert.equal(fds.length, 2);
    assert.equal(fds[0]?.at, 0);
    // The kernel ends a read behind a message with descriptors, but may begin it before one.
    assert.ok((fds[1]?.at ?? 0) <= 700_000 && (fds[1]?.at ?? 0) > 600_000);
    assert.equal(socket.unsent, 0);
    for (const [i, { fd }] of fds.entries()) {
      const passed = EventFd.fromFd(fd);
      assert.equal(passed.drain(), false);
      events[i]?.signal();
      assert.equal(passed.drain(), true);
      passed.close();
    }
    // A socket that is watched for room without need would wake the event loop for ever.
    assert.deepEqual(held(), idle);
    socket.close();
    closeFd(theirs);
    for (const event of events) event.close();
    assert.deepEqual(held(), before);
  });

  test("VHU-FE-02 a whole life goes on when the back-end begins to read late", async (t) => {
    const before = held();
    const [ours, theirs] = socketPair();
    const junk = fill(ours);
    const peer = new ScriptedPeer({ paused: true }, theirs);
    t.after(() => peer.close());
    const life = VhostUser.connect({ fd: ours }).then((device) => live(device).finally(() => device.close()));
    await read(theirs, junk);
    peer.resume();
    await life;
    await peer.until(() => !peer.connected);
    assert.deepEqual(peer.violations, []);
    assert.equal(peer.names.at(-1), "REM_MEM_REG");
    peer.close();
    assert.deepEqual(held(), before);
  });

  test("VHU-FE-03 a message that cannot be sent wholly closes the connection", async () => {
    const before = held();
    const [ours, theirs] = socketPair();
    const broken = new Promise<Error>((resolve) => {
      const socket = new MessageSocket(ours, "the test", { ...SILENT, broken: resolve });
      socket.send(Buffer.alloc(1_000_000));
      assert.equal(socket.unsent, 1);
    });
    closeFd(theirs);
    assert.match((await broken).message, /connection to the test broke while testing/);
    assert.deepEqual(held(), before);
  });

  test("giving up while it is full leaves nothing", async () => {
    const before = held();
    const [ours, theirs] = socketPair();
    fill(ours);
    const abort = new AbortController();
    const connecting = VhostUser.connect({ fd: ours }, { signal: abort.signal });
    abort.abort("enough");
    await assert.rejects(connecting, (error) => error === "enough");
    closeFd(theirs);
    assert.deepEqual(held(), before);
  });
});
