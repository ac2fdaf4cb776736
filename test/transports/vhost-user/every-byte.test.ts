/** Every byte of every reply: cut off behind it, and changed. */

import assert from "node:assert/strict";
import { describe, type TestContext, test } from "node:test";
import { VirtioError } from "../../../src/errors.js";
import { closeFd, createMemfd } from "../../../src/sys/index.js";
import { VhostUser } from "../../../src/transports/index.js";
import { type Deed, type Received, ScriptedPeer } from "../scripted-peer.js";
import { held, live } from "../support.js";

const AWAITED = [
  ...["GET_FEATURES", "GET_PROTOCOL_FEATURES", "GET_QUEUE_NUM", "GET_MAX_MEM_SLOTS", "SET_BACKEND_REQ_FD"],
  ...["SET_FEATURES", "GET_CONFIG", "SET_CONFIG", "ADD_MEM_REG", "SET_VRING_NUM", "SET_VRING_BASE", "SET_VRING_ADDR"],
  ...[
    "GET_INFLIGHT_FD",
    "SET_INFLIGHT_FD",
    "SET_VRING_CALL",
    "SET_VRING_ERR",
    "SET_VRING_KICK",
    "SET_VRING_ENABLE",
    "GET_VRING_BASE",
    "REM_MEM_REG",
  ],
];
/** What a peer that lies may make of a call; anything else, a TypeError above all, is a fault of ours. */
const CODES = ["PROTOCOL", "DISCONNECTED", "REJECTED", "FEATURES", "CONFIG", "QUEUES", "MEMORY", "STATUS", "TIMEOUT"];

/** A whole life beside a peer that misbehaves at the first message called `name`; returns how it ended. */
async function lifeWith(
  t: TestContext,
  name: string,
  deed: (right: Buffer) => Deed,
): Promise<{ readonly outcome: VirtioError | undefined; readonly replyLength: number }> {
  let replyLength = 0;
  // The one reply that a descriptor comes with.
  const fds = name === "GET_INFLIGHT_FD" ? [createMemfd("inflight of a test", 4096)] : [];
  const peer = new ScriptedPeer({
    misbehave({ name: which }: Received, right) {
      if (replyLength > 0 || which !== name || right === undefined) return undefined;
      replyLength = right.length;
      return { ...deed(right), fds };
    },
  });
  t.after(() => peer.close());
  let outcome: VirtioError | undefined;
  try {
    const device = await VhostUser.connect(peer.path, { timeout: 2000 });
    try {
      await live(device);
    } finally {
      await device.close();
    }
  } catch (error) {
    if (!(error instanceof VirtioError)) throw error;
    outcome = error;
  }
  await peer.until(() => !peer.connected);
  peer.close();
  fds.forEach(closeFd);
  return { outcome, replyLength };
}

describe("VHU-FE-03 every byte of the reply", () => {
  for (const name of AWAITED) {
    test(`to ${name}`, async (t) => {
      const before = held();
      const { replyLength } = await lifeWith(t, name, (right) => ({ bytes: right }));
      assert.ok(replyLength > 12);
      for (let count = 1; count < replyLength; count++) {
        const cut = await lifeWith(t, name, (right) => ({ bytes: right.subarray(0, count), close: true }));
        assert.equal(cut.outcome?.code, "ERR_VIRTIO_DISCONNECTED", `hangs up after ${count} bytes`);
      }
      for (let at = 0; at < replyLength; at++) {
        const changed = await lifeWith(t, name, (right) => {
          const bytes = Buffer.from(right);
          bytes[at] ^= 0xff;
          return { bytes };
        });
        const code = changed.outcome?.code.slice("ERR_VIRTIO_".length);
        // The header holds nothing that may be otherwise.
        if (at < 12) assert.equal(code, "PROTOCOL", `byte ${at} changed`);
        else if (code !== undefined) assert.ok(CODES.includes(code), `byte ${at} changed: ${changed.outcome?.message}`);
      }
      assert.deepEqual(held(), before);
    });
  }
});
