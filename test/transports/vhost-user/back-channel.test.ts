/** The channel on which the back-end asks. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { closeFd, EventFd, FdWatcher, receiveMessage, sendMessage } from "../../../src/sys/index.js";
import { ALL_PROTOCOL, message, type PeerOptions, REPLY_ACK, u64 } from "../scripted-peer.js";
import { held, open, virtioError } from "../support.js";

const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString("hex");

describe("back-channel", () => {
  const CONFIG_CHANGE = 2;

  /** The peer's end of the back-channel. */
  async function openBackChannel(t: Parameters<typeof open>[0], options: PeerOptions = {}) {
    const { peer, device } = await open(t, options);
    const fd = peer.last("SET_BACKEND_REQ_FD").fds[0] ?? -1;
    const ask = (bytes: Uint8Array, fds: readonly number[] = []) => sendMessage(fd, bytes, fds);
    /** Wait for `length` bytes. */
    const answer = (length: number) =>
      new Promise<string>((resolve) => {
        const parts: Buffer[] = [];
        const watcher = new FdWatcher(fd, { drain: false }, () => {
          const chunk = Buffer.alloc(4096);
          const count = receiveMessage(fd, chunk, []);
          if (count > 0) parts.push(chunk.subarray(0, count));
          const all = Buffer.concat(parts);
          if (count > 0 && all.length < length) return;
          watcher.close();
          resolve(all.toString("hex"));
        });
      });
    return { peer, device, fd, ask, answer };
  }
  const reply = (request: number, status: bigint) => hex(message(request, 5, u64(status)));

  test("VHU-FE-39 a config change is told, and answered when asked to", async (t) => {
    const { device, ask, answer } = await openBackChannel(t);
    let changes = 0;
    const changed = new Promise<void>((resolve) => {
      device.onConfigChange = () => {
        changes++;
        if (changes === 2) resolve();
      };
    });
    ask(message(CONFIG_CHANGE, 9));
    assert.equal(await answer(20), reply(CONFIG_CHANGE, 0n));
    ask(message(CONFIG_CHANGE, 1));
    await changed;
    ask(message(CONFIG_CHANGE, 9));
    assert.equal(await answer(20), reply(CONFIG_CHANGE, 0n), "the unasked one had no answer");
  });

  test("VHU-FE-38 VHU-FE-40 VHU-FE-41 everything else is refused where an answer is due, its descriptors closed", async (t) => {
    const { device, ask, answer } = await openBackChannel(t);
    device.onConfigChange = () => assert.fail("no config change");
    const event = EventFd.create();
    t.after(() => event.close());
    const before = held().descriptors;
    const requests = [
      [1, 32],
      [3, 24],
      [4, 8],
      [5, 8],
      [6, 16],
      [7, 16],
      [8, 16],
      [9, 40],
      [10, 40],
      [77, 0],
      [CONFIG_CHANGE, 8],
    ] as const;
    let expected = "";
    for (const [request, size] of requests) {
      ask(message(request, 9, new Uint8Array(size)), request === 3 || request === 9 ? [event.fd] : []);
      expected += reply(request, 1n);
    }
    // Unasked: only SHARED_OBJECT_LOOKUP has a reply of its own.
    for (const [request, size] of requests) {
      if (request !== CONFIG_CHANGE) ask(message(request, 1, new Uint8Array(size)));
    }
    expected += reply(8, 1n);
    assert.equal(await answer(expected.length / 2), expected);
    assert.equal(held().descriptors, before);
  });

  test("VHU-FE-38 without REPLY_ACK nothing but a lookup is answered", async (t) => {
    const { ask, answer } = await openBackChannel(t, { protocolFeatures: ALL_PROTOCOL & ~REPLY_ACK });
    ask(message(CONFIG_CHANGE, 9));
    ask(message(6, 9, new Uint8Array(16)));
    ask(message(8, 1, new Uint8Array(16)));
    assert.equal(await answer(20), reply(8, 1n));
  });

  test("it is served while the front-end itself waits for a reply", async (t) => {
    let withheld: Uint8Array | undefined;
    const { peer, device, ask, answer } = await openBackChannel(t, {
      misbehave({ name }, right) {
        if (name !== "GET_CONFIG") return undefined;
        withheld = right;
        return {};
      },
    });
    const reading = device.readConfig(0, 8);
    await peer.received("GET_CONFIG");
    ask(message(CONFIG_CHANGE, 9));
    assert.equal(await answer(20), reply(CONFIG_CHANGE, 0n));
    peer.send(withheld ?? new Uint8Array(0));
    assert.equal((await reading).length, 8);
  });

  test("what is no request ends the connection", async (t) => {
    for (const [name, bytes] of [
      ["a reply", message(CONFIG_CHANGE, 5)],
      ["version 2", message(CONFIG_CHANGE, 2)],
      ["too long", message(CONFIG_CHANGE, 1, new Uint8Array(0), 5000)],
    ] as const) {
      const { peer, device, ask } = await openBackChannel(t);
      const lost = new Promise<Error>((resolve) => {
        device.onLost = resolve;
      });
      ask(bytes);
      assert.ok(virtioError("ERR_VIRTIO_PROTOCOL")(await lost), name);
      await peer.until(() => !peer.connected);
    }
  });

  test("a back-end that leaves its answers unread is cut off, in bounded memory", async (t) => {
    const { device, ask } = await openBackChannel(t);
    const lost = new Promise<Error>((resolve) => {
      device.onLost = resolve;
    });
    const flood = () => {
      try {
        for (let i = 0; i < 64; i++) ask(message(CONFIG_CHANGE, 9));
        setImmediate(flood);
      } catch {
        // the front-end has hung up
      }
    };
    flood();
    assert.ok(virtioError("ERR_VIRTIO_PROTOCOL", "unread")(await lost));
  });

  test("closing it alone does no harm", async (t) => {
    const { peer, device, fd } = await openBackChannel(t);
    closeFd(peer.take(fd));
    assert.equal((await device.readConfig(0, 8)).length, 8);
  });
});
