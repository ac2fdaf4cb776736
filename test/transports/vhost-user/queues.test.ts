/** Queues over vhost-user: order of messages, first kick, refusals, restart, eventfds. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { EventFd, FdWatcher } from "../../../src/sys/index.js";
import { VirtioFeature } from "../../../src/virtqueue/features.js";
import { ALL_PROTOCOL, BIT_30, MQ, REPLY_ACK, VERSION_1 } from "../scripted-peer.js";
import { open, openRunning, place, virtioError } from "../support.js";

const PACKED = VirtioFeature.RING_PACKED;

describe("queues", () => {
  test("VHU-FE-06 no kick before every queue is confirmed to be enabled, then one", async (t) => {
    for (const protocolFeatures of [ALL_PROTOCOL, ALL_PROTOCOL & ~REPLY_ACK]) {
      const withAcks = (protocolFeatures & REPLY_ACK) !== 0n;
      const withheld: Uint8Array[] = [];
      let hold = false;
      const { peer, device } = await open(t, {
        protocolFeatures,
        misbehave({ name, payload }, right) {
          if (name === "SET_VRING_ENABLE" && payload[4] === 1) hold = true;
          if (!hold || right === undefined) return undefined;
          withheld.push(right);
          return {};
        },
      });
      await device.negotiate(0n);
      const region = await device.mapMemory(1);
      const starting = device.startQueues([place(region, 0, 8), place(region, 1, 8, false, 4096)]);
      await peer.until(() => withheld.length === (withAcks ? 3 : 1));
      const kicks = peer.all("SET_VRING_KICK").map(({ fds }) => EventFd.fromFd(fds[0] ?? -1));
      assert.equal(kicks.length, 2);
      for (const kick of kicks) assert.equal(kick.drain(), false, "kicked while it may be disabled");
      for (const right of withheld) peer.send(right);
      hold = false;
      await starting;
      for (const kick of kicks) assert.equal(kick.drain(), true, "kicked once it is enabled");
    }
  });

  test("VHU-FE-20 queues of different sizes; a packed ring starts at 0x80008000", async (t) => {
    const { peer, device } = await open(t, { features: VERSION_1 | BIT_30 | PACKED });
    assert.equal(await device.negotiate(PACKED), VERSION_1 | PACKED);
    const region = await device.mapMemory(2 ** 21);
    const sizes = [400, 3, 1, 32768];
    const setups = sizes.map((size, index) => place(region, index, size, true, index * 65536));
    const queues = await device.startQueues(setups);
    assert.deepEqual(
      queues.map(({ index }) => index),
      [0, 1, 2, 3],
    );
    assert.deepEqual(
      peer.all("SET_VRING_NUM").map(({ payload }) => [payload.readUInt32LE(0), payload.readUInt32LE(4)]),
      sizes.map((size, index) => [index, size]),
    );
    for (const { payload } of peer.all("SET_VRING_BASE")) assert.equal(payload.readUInt32LE(4), 0x8000_8000);
    for (const [i, { payload }] of peer.all("SET_VRING_ADDR").entries()) {
      assert.deepEqual(
        [8, 16, 24, 32].map((at) => Number(payload.readBigUInt64LE(at))),
        [setups[i]?.descriptorArea, setups[i]?.deviceArea, setups[i]?.driverArea, 0],
      );
    }
    assert.deepEqual(peer.violations, []);
  });

  test("notify raises the kick descriptor, the back-end's call raises completion", async (t) => {
    const { peer, queue } = await openRunning(t);
    const kick = EventFd.fromFd(peer.last("SET_VRING_KICK").fds[0] ?? -1);
    const call = EventFd.fromFd(peer.last("SET_VRING_CALL").fds[0] ?? -1);
    assert.equal(kick.drain(), true, "the first kick");
    queue.notify(0);
    assert.equal(kick.drain(), true);
    assert.equal(queue.completion.drain(), false);
    const completed = new Promise<void>((resolve) => {
      const watcher = new FdWatcher(queue.completion.fd, { drain: true }, () => {
        watcher.close();
        resolve();
      });
    });
    call.signal();
    await completed;
    assert.equal(kick.drain(), false);
  });

  test("VHU-FE-09 VHU-FE-10 more queues than there are reject, before anything is sent", async (t) => {
    const four = await open(t);
    await four.device.negotiate(0n);
    const region = await four.device.mapMemory(1);
    await assert.rejects(
      four.device.startQueues([0, 1, 2, 3, 4].map((i) => place(region, i, 8, false, 4096 * i))),
      virtioError("ERR_VIRTIO_QUEUES", "4 queues"),
    );
    const one = await open(t, { protocolFeatures: ALL_PROTOCOL & ~MQ });
    await one.device.negotiate(0n);
    const other = await one.device.mapMemory(1);
    await assert.rejects(one.device.startQueues([place(other, 1, 8)]), virtioError("ERR_VIRTIO_QUEUES", "1 queues"));
    for (const { peer } of [four, one]) assert.ok(!peer.names.some((name) => name.startsWith("SET_VRING")));
    assert.equal((await one.device.startQueues([place(other, 0, 8)])).length, 1);
  });

  test("wrong queues are refused before anything is sent", async (t) => {
    const { peer, device } = await open(t);
    await device.negotiate(0n);
    const region = await device.mapMemory(1);
    const good = place(region, 0, 8);
    const beyond = region.iova + region.size;
    const wrong = [
      [],
      [good, good],
      [{ ...good, index: -1 }],
      [{ ...good, size: 0 }],
      [{ ...good, size: 400 }],
      [{ ...good, size: 65536 }],
      [{ ...good, descriptorArea: good.descriptorArea + 8 }],
      [{ ...good, driverArea: good.driverArea + 1 }],
      [{ ...good, deviceArea: good.deviceArea + 2 }],
      [{ ...good, descriptorArea: 0 }],
      [{ ...good, descriptorArea: region.iova - 16 }],
      [{ ...good, descriptorArea: beyond - 7 * 16 }],
      [{ ...good, driverArea: beyond - 20 }],
      [{ ...good, deviceArea: beyond - 68 }],
    ];
    await assert.rejects(device.startQueues(undefined as unknown as []), TypeError);
    for (const setups of wrong) await assert.rejects(device.startQueues(setups), RangeError);
    assert.ok(!peer.names.some((name) => name.startsWith("SET_VRING")));
    const last = {
      ...good,
      descriptorArea: beyond - 8 * 16 - 96,
      driverArea: beyond - 22 - 74,
      deviceArea: beyond - 72,
    };
    await device.startQueues([last]);
    assert.equal(peer.last("SET_VRING_NUM").payload.readUInt32LE(4), 8);
  });

  test("a queue that is refused leaves nothing running, and may be started again", async (t) => {
    const refused = ["SET_VRING_NUM", "SET_VRING_ADDR", "SET_VRING_CALL", "SET_VRING_KICK", "SET_VRING_ENABLE"];
    for (const name of refused) {
      let status = 3n;
      const { peer, device } = await open(t, {
        status: (received) => (received.name === name && received.payload[0] === 1 ? status : 0n),
      });
      await device.negotiate(0n);
      const region = await device.mapMemory(1);
      const setups = [place(region, 0, 8), place(region, 1, 8, false, 4096)];
      await assert.rejects(device.startQueues(setups), virtioError("ERR_VIRTIO_REJECTED", `${name} (status 3)`));
      const started = peer.names.includes("SET_VRING_KICK");
      assert.equal(started, name === "SET_VRING_KICK" || name === "SET_VRING_ENABLE");
      assert.equal(peer.all("GET_VRING_BASE").length, started ? 2 : 0, "what was started is stopped");
      status = 0n;
      assert.equal((await device.startQueues(setups)).length, 2);
      assert.deepEqual(peer.violations, []);
    }
  });

  test("VHU-FE-08 a stopped queue is started again with new KICK, CALL and ERR, from its beginning", async (t) => {
    const { peer, device, setup, queue } = await openRunning(t);
    await assert.rejects(device.startQueues([setup]), virtioError("ERR_VIRTIO_STATUS", "stop"));
    await device.stopQueues();
    assert.deepEqual(peer.names.slice(-2), ["SET_VRING_ENABLE", "GET_VRING_BASE"]);
    assert.equal(queue.completion.fd, -1);
    const before = peer.messages.length;
    const [again] = await device.startQueues([setup]);
    assert.deepEqual(peer.names.slice(before), [
      "GET_INFLIGHT_FD",
      "SET_VRING_NUM",
      "SET_VRING_BASE",
      "SET_INFLIGHT_FD",
      "SET_VRING_ADDR",
      "SET_VRING_CALL",
      "SET_VRING_ERR",
      "SET_VRING_KICK",
      "SET_VRING_ENABLE",
    ]);
    assert.notEqual(again?.completion.fd, -1);
    await device.stopQueues();
    await device.stopQueues();
    assert.equal(peer.all("GET_VRING_BASE").length, 2, "nothing runs the third time");
  });

  test("VHU-FE-42 any counter value on the error descriptor tells that the queue is broken", async (t) => {
    const { peer, device } = await openRunning(t);
    const lost = new Promise<Error>((resolve) => {
      device.onLost = resolve;
    });
    const error = EventFd.fromFd(peer.last("SET_VRING_ERR").fds[0] ?? -1);
    for (let i = 0; i < 5; i++) error.signal();
    assert.ok(virtioError("ERR_VIRTIO_QUEUE_BROKEN", "queue 0")(await lost));
    await assert.rejects(device.readConfig(0, 8), virtioError("ERR_VIRTIO_QUEUE_BROKEN"));
  });
});
