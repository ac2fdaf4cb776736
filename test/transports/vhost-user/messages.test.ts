/** What a well-behaved back-end hears: every message, its gate, and the agreement on features. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import fc from "fast-check";
import { socketPair } from "../../../src/sys/index.js";
import { VhostUser } from "../../../src/transports/index.js";
import { VirtioFeature } from "../../../src/virtqueue/features.js";
import {
  ALL_PROTOCOL,
  BACKEND_REQ,
  BIT_30,
  CONFIG,
  MEM_SLOTS,
  MQ,
  REPLY_ACK,
  ScriptedPeer,
  VERSION_1,
} from "../scripted-peer.js";
import { live, open, openRunning, place, virtioError } from "../support.js";

const PACKED = VirtioFeature.RING_PACKED;

/** `SET_VRING_NUM 8/0` and the like: a message as a short line. */
function line({ name, flags, payload, fds }: { name: string; flags: number; payload: Buffer; fds: readonly number[] }) {
  const descriptors = fds.length === 0 ? "" : ` +${fds.length} fd`;
  return `${name}${flags === 9 ? " ack" : ""}${payload.length === 0 ? "" : ` ${payload.toString("hex")}`}${descriptors}`;
}

describe("messages", () => {
  test("VHU-FE-01 VHU-FE-11 VHU-FE-19 VHU-FE-21 every request of a life, byte for byte", async (t) => {
    const { peer, device } = await open(t);
    await live(device);
    await device.close();
    const area = "0000200000000000"; // the region's address, 2 MiB
    const region = `0000000000000000${area}0000200000000000${area}0000000000000000`;
    assert.deepEqual(peer.messages.map(line), [
      "SET_OWNER",
      "GET_FEATURES",
      "GET_PROTOCOL_FEATURES",
      "SET_PROTOCOL_FEATURES 2992000000000000",
      "GET_QUEUE_NUM",
      "GET_MAX_MEM_SLOTS",
      "SET_BACKEND_REQ_FD ack +1 fd",
      "SET_FEATURES ack 0000004001000000",
      `GET_CONFIG 000000000800000000000000${"00".repeat(8)}`,
      "SET_CONFIG ack 20000000010000000000000001",
      `ADD_MEM_REG ack ${region} +1 fd`,
      `GET_INFLIGHT_FD ${"00".repeat(16)}0200100000000000`,
      "SET_VRING_NUM ack 0000000008000000",
      "SET_VRING_BASE ack 0000000000000000",
      "SET_VRING_NUM ack 0100000010000000",
      "SET_VRING_BASE ack 0100000000000000",
      `SET_INFLIGHT_FD ack 0010000000000000${"00".repeat(8)}0200100000000000 +1 fd`,
      `SET_VRING_ADDR ack 0000000000000000${area}98002000000000008000200000000000${"00".repeat(8)}`,
      "SET_VRING_CALL ack 0000000000000000 +1 fd",
      "SET_VRING_ERR ack 0000000000000000 +1 fd",
      `SET_VRING_ADDR ack 0100000000000000001020000000000028112000000000000011200000000000${"00".repeat(8)}`,
      "SET_VRING_CALL ack 0100000000000000 +1 fd",
      "SET_VRING_ERR ack 0100000000000000 +1 fd",
      "SET_VRING_KICK ack 0000000000000000 +1 fd",
      "SET_VRING_ENABLE ack 0000000001000000",
      "SET_VRING_KICK ack 0100000000000000 +1 fd",
      "SET_VRING_ENABLE ack 0100000001000000",
      "SET_VRING_ENABLE 0000000000000000",
      "GET_VRING_BASE 0000000000000000",
      "SET_VRING_ENABLE 0100000000000000",
      "GET_VRING_BASE 0100000000000000",
      `REM_MEM_REG ack ${region}`,
    ]);
    assert.deepEqual(peer.violations, []);
  });

  test("VHU-FE-02 VHU-FE-05 VHU-FE-29 VHU-FE-31 a whole life with every set of protocol features, each message gated", async (t) => {
    const each = [MQ, REPLY_ACK, BACKEND_REQ, CONFIG, MEM_SLOTS];
    for (let set = 0; set < 1 << each.length; set++) {
      const offered = each.reduce((mask, feature, i) => ((set >> i) & 1 ? mask | feature : mask), 0n);
      await t.test(`0x${offered.toString(16)}`, async (u) => {
        const { peer, device } = await open(u, { protocolFeatures: offered });
        const has = (feature: bigint) => (offered & feature) !== 0n;
        assert.equal(device.maxQueues, has(MQ) ? 4 : 1);
        assert.equal(device.maxRegions, has(MEM_SLOTS) ? 32 : 8);
        assert.equal(device.hasConfig, has(CONFIG));
        await live(device);
        assert.deepEqual(peer.violations, []);
        const sent = new Set(peer.names);
        assert.equal(sent.has("GET_QUEUE_NUM"), has(MQ));
        assert.equal(sent.has("ADD_MEM_REG"), has(MEM_SLOTS));
        assert.equal(sent.has("SET_MEM_TABLE"), !has(MEM_SLOTS));
        assert.equal(sent.has("GET_CONFIG"), has(CONFIG));
        assert.equal(sent.has("SET_BACKEND_REQ_FD"), has(BACKEND_REQ) && has(CONFIG));
        assert.equal(
          peer.messages.some(({ flags }) => flags === 9),
          has(REPLY_ACK),
        );
        // Without acknowledgements: the first GET_FEATURES, and one as a barrier behind each change.
        assert.equal(peer.all("GET_FEATURES").length === 1, has(REPLY_ACK));
      });
    }
  });

  test("VHU-FE-04 VHU-FE-07 VHU-FE-23 without bit 30: no protocol features, no SET_VRING_ENABLE, and it starts", async (t) => {
    const { peer, device } = await openRunning(t, { features: VERSION_1 });
    assert.equal(device.protocolFeatures, 0n);
    await device.close();
    assert.deepEqual(peer.violations, []);
    assert.equal(peer.last("SET_FEATURES").payload.readBigUInt64LE(), VERSION_1);
    for (const never of ["GET_PROTOCOL_FEATURES", "SET_PROTOCOL_FEATURES", "SET_VRING_ENABLE", "GET_QUEUE_NUM"]) {
      assert.ok(!peer.names.includes(never), never);
    }
    assert.ok(peer.names.includes("GET_VRING_BASE"));
  });

  // The peer counts every message that is not among those of the first test as a breach.
  test("VHU-FE-14 VHU-FE-22 VHU-FE-24 VHU-FE-27 VHU-FE-28 VHU-FE-30 VHU-FE-32 VHU-FE-33 VHU-FE-34 VHU-FE-36 VHU-FE-37 of all protocol features only the implemented are accepted and used", async (t) => {
    const { peer, device } = await open(t, { protocolFeatures: 0xffff_ffff_ffff_ffffn });
    assert.equal(peer.last("SET_PROTOCOL_FEATURES").payload.readBigUInt64LE(), ALL_PROTOCOL);
    assert.equal(device.protocolFeatures, ALL_PROTOCOL);
    await live(device);
    assert.deepEqual(peer.violations, []);
  });

  test("VHU-FE-02 replies that come byte by byte are put together", async (t) => {
    const { peer, device } = await open(t, { fragmented: true });
    await live(device);
    assert.deepEqual(peer.violations, []);
    assert.equal(peer.names.at(-1), "REM_MEM_REG");
  });

  test("a whole life on a connected descriptor", async (t) => {
    const [ours, theirs] = socketPair();
    const peer = new ScriptedPeer({}, theirs);
    t.after(() => peer.close());
    const device = await VhostUser.connect({ fd: ours });
    assert.equal(device.address, `vhost-user:descriptor ${ours}`);
    await live(device);
    await device.close();
    await peer.until(() => !peer.connected);
    assert.deepEqual(peer.violations, []);
  });
});

describe("features", () => {
  test("BASIC-DRV-05 BASIC-DRV-07 BASIC-DRV-08 BASIC-DRV-10 BASIC-DRV-37 BASIC-DRV-38 BASIC-DRV-40 accepted: wanted, offered, and carried here", async () => {
    const carried = 0xfffc_000d_30ff_ffffn; // 0-23, 28, 29, 32, 34, 35, 50-63
    const u64s = fc.bigInt({ min: 0n, max: 0xffff_ffff_ffff_ffffn });
    await fc.assert(
      fc.asyncProperty(u64s, u64s, async (some, wanted) => {
        const offered = some | VERSION_1;
        const peer = new ScriptedPeer({ features: offered });
        const device = await VhostUser.connect(peer.path);
        try {
          const accepted = await device.negotiate(wanted);
          assert.equal(accepted, (wanted | VERSION_1) & offered & carried);
          assert.equal(device.features, accepted);
          const bit30 = offered & BIT_30;
          assert.equal(peer.last("SET_FEATURES").payload.readBigUInt64LE(), accepted | bit30);
          assert.equal(device.offeredFeatures, offered & ~(BIT_30 | (1n << 26n)));
        } finally {
          await device.close();
          peer.close();
        }
      }),
      { numRuns: 60, examples: [[0xffff_ffff_ffff_ffffn, 0xffff_ffff_ffff_ffffn]] },
    );
  });

  test("BASIC-DRV-30 VERSION_1 is accepted unasked, and a device without it is refused by name", async (t) => {
    const modern = await open(t);
    assert.equal(await modern.device.negotiate(0n), VERSION_1);

    const legacy = await open(t, { features: BIT_30 | 0x40n });
    await assert.rejects(legacy.device.negotiate(0x40n), virtioError("ERR_VIRTIO_FEATURES", "0x40 without VERSION_1"));
    assert.ok(!legacy.peer.names.includes("SET_FEATURES"));
    assert.equal(legacy.device.features, 0n);
  });

  test("BASIC-DRV-18 BASIC-DRV-20 features are set once, also when the first time failed", async (t) => {
    const { peer, device } = await open(t);
    await device.negotiate(0n);
    await assert.rejects(device.negotiate(PACKED), virtioError("ERR_VIRTIO_STATUS"));

    const refusing = await open(t, { status: ({ name }) => (name === "SET_FEATURES" ? 1n : 0n) });
    await assert.rejects(refusing.device.negotiate(0n), virtioError("ERR_VIRTIO_REJECTED", "SET_FEATURES"));
    await assert.rejects(refusing.device.negotiate(0n), virtioError("ERR_VIRTIO_STATUS"));
    await assert.rejects(refusing.device.startQueues([]), virtioError("ERR_VIRTIO_STATUS"));
    assert.equal(refusing.device.features, 0n);
    assert.equal(peer.all("SET_FEATURES").length, 1);
    assert.equal(refusing.peer.all("SET_FEATURES").length, 1);
  });

  test("BASIC-DRV-16 BASIC-DRV-17 config may be read but not written before the negotiation; queues do not start", async (t) => {
    const { peer, device } = await open(t);
    assert.equal((await device.readConfig(4, 2)).length, 2);
    await assert.rejects(device.writeConfig(0, Uint8Array.of(1)), virtioError("ERR_VIRTIO_STATUS", "negotiate"));
    const region = await device.mapMemory(1);
    await assert.rejects(device.startQueues([place(region, 0, 8)]), virtioError("ERR_VIRTIO_STATUS", "negotiate"));
    assert.deepEqual(
      peer.names.filter((name) => name === "SET_CONFIG" || name.startsWith("SET_VRING")),
      [],
    );
  });

  test("wrong sets are refused", async (t) => {
    const { device } = await open(t);
    await assert.rejects(device.negotiate(1 as unknown as bigint), TypeError);
    await assert.rejects(device.negotiate(-1n), RangeError);
    await assert.rejects(device.negotiate(1n << 64n), RangeError);
    assert.equal(await device.negotiate(0n), VERSION_1);
  });
});
