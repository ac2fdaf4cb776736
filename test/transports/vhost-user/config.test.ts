/** Config space over vhost-user: one message, both forms of refusal, ranges. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { ALL_PROTOCOL, CONFIG, message } from "../scripted-peer.js";
import { open, virtioError } from "../support.js";

const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString("hex");

describe("config space", () => {
  test("VHU-FE-31 one GET_CONFIG, one reply, the bytes asked for", async (t) => {
    const { peer, device } = await open(t);
    const bytes = await device.readConfig(10, 50);
    assert.deepEqual(
      [...bytes],
      Array.from({ length: 50 }, (_, i) => 10 + i),
    );
    assert.equal(peer.all("GET_CONFIG").length, 1);
    assert.equal(peer.last("GET_CONFIG").flags, 1);
  });

  test("VHU-FE-25 both ways of refusing are an error that names the way out, and the connection goes on", async (t) => {
    const emptyConfig = Buffer.alloc(12);
    for (const refusal of [new Uint8Array(0), emptyConfig]) {
      const { device } = await open(t, {
        misbehave: ({ name, payload }) =>
          name === "GET_CONFIG" && payload.readUInt32LE(4) > 60 ? { bytes: message(24, 5, refusal) } : undefined,
      });
      await assert.rejects(device.readConfig(0, 96), virtioError("ERR_VIRTIO_CONFIG", "96 bytes of config space at 0"));
      await assert.rejects(device.readConfig(0, 96), virtioError("ERR_VIRTIO_CONFIG", "shorter"));
      assert.equal((await device.readConfig(0, 60)).length, 60);
    }
  });

  test("without CONFIG there is none, and no message", async (t) => {
    const { peer, device } = await open(t, { protocolFeatures: ALL_PROTOCOL & ~CONFIG });
    await device.negotiate(0n);
    assert.equal(device.hasConfig, false);
    await assert.rejects(device.readConfig(0, 8), virtioError("ERR_VIRTIO_CONFIG", "CONFIG"));
    await assert.rejects(device.writeConfig(0, Uint8Array.of(1)), virtioError("ERR_VIRTIO_CONFIG", "CONFIG"));
    assert.ok(!peer.names.includes("GET_CONFIG") && !peer.names.includes("SET_CONFIG"));
  });

  test("VHU-FE-26 writes carry flags 0 and the bytes", async (t) => {
    const { peer, device } = await open(t, { status: ({ name }) => (name === "SET_CONFIG" ? 7n : 0n) });
    await device.negotiate(0n);
    await assert.rejects(
      device.writeConfig(32, Uint8Array.of(0xaa, 0xbb)),
      virtioError("ERR_VIRTIO_REJECTED", "SET_CONFIG (status 7)"),
    );
    assert.equal(hex(peer.last("SET_CONFIG").payload), "200000000200000000000000aabb");
  });

  test("ranges outside 1 to 256 bytes are refused before anything is sent", async (t) => {
    const { peer, device } = await open(t);
    for (const [offset, length] of [
      [0, 0],
      [0, 257],
      [-1, 8],
      [0.5, 8],
      [2 ** 32 - 8, 8],
    ] as const) {
      await assert.rejects(device.readConfig(offset, length), RangeError);
    }
    await assert.rejects(device.writeConfig(0, new Uint8Array(0)), RangeError);
    await assert.rejects(device.writeConfig(0, [1] as unknown as Uint8Array), TypeError);
    assert.ok(!peer.names.includes("GET_CONFIG"));
    assert.equal((await device.readConfig(0, 60)).length, 60);
  });
});
