/** Memory regions over vhost-user: one by one and as a table, limits, refusals. */

import assert from "node:assert/strict";
import { fstatSync } from "node:fs";
import { describe, test } from "node:test";
import { ALL_PROTOCOL, REPLY_ACK } from "../scripted-peer.js";
import { open, openRunning, virtioError } from "../support.js";

const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString("hex");

describe("memory", () => {
  test("VHU-FE-12 VHU-FE-16 VHU-FE-17 regions one by one, disjoint, each with its memfd; withdrawn without", async (t) => {
    const { peer, device } = await open(t);
    const regions = [await device.mapMemory(1), await device.mapMemory(5_000_000), await device.mapMemory(2 ** 21)];
    assert.deepEqual(
      regions.map(({ size }) => size),
      [2 ** 21, 3 * 2 ** 21, 2 ** 21],
    );
    const added = peer.all("ADD_MEM_REG");
    assert.deepEqual(
      added.map(({ inodes }) => inodes[0]),
      regions.map(({ fd }) => fstatSync(fd).ino),
    );
    let end = 0n;
    for (const [i, region] of regions.entries()) {
      const payload = added[i]?.payload ?? Buffer.alloc(40);
      const guest = payload.readBigUInt64LE(8);
      assert.equal(guest, BigInt(region.iova));
      assert.equal(payload.readBigUInt64LE(16), BigInt(region.size));
      assert.equal(payload.readBigUInt64LE(24), guest, "user address");
      assert.equal(guest % 0x20_0000n, 0n);
      assert.ok(guest >= end, "no overlap");
      end = guest + BigInt(region.size);
    }
    const [, middle] = regions;
    assert.ok(middle !== undefined);
    await device.unmapMemory(middle);
    assert.deepEqual(hex(peer.last("REM_MEM_REG").payload), hex(added[1]?.payload ?? new Uint8Array(0)));
    assert.equal(middle.buffer.byteLength, 0);
    assert.deepEqual(peer.violations, []);
  });

  test("VHU-FE-13 addresses are used again only after the back-end has let go of them", async (t) => {
    let withheld: Uint8Array | undefined;
    const { peer, device } = await open(t, {
      misbehave({ name }, right) {
        if (name !== "REM_MEM_REG" || withheld !== undefined) return undefined;
        withheld = right;
        return {};
      },
    });
    const first = await device.mapMemory(1);
    const { iova } = first;
    const unmapping = device.unmapMemory(first);
    await peer.received("REM_MEM_REG");
    const mapping = device.mapMemory(1);
    assert.ok(withheld !== undefined);
    assert.equal(peer.all("ADD_MEM_REG").length, 1, "waits for the removal");
    assert.notEqual(first.fd, -1, "mapped until the removal is confirmed");
    peer.send(withheld);
    await unmapping;
    assert.equal((await mapping).iova, iova);
    assert.deepEqual(peer.names.slice(-2), ["REM_MEM_REG", "ADD_MEM_REG"]);
  });

  test("VHU-FE-15 without CONFIGURE_MEM_SLOTS the whole table is sent, descriptors in the order of the regions", async (t) => {
    const { peer, device } = await open(t, { protocolFeatures: REPLY_ACK });
    const regions = [];
    for (let i = 0; i < 8; i++) regions.push(await device.mapMemory(1));
    const table = peer.last("SET_MEM_TABLE");
    assert.equal(table.payload.length, 8 + 8 * 32);
    assert.deepEqual(
      table.inodes,
      regions.map(({ fd }) => fstatSync(fd).ino),
    );
    assert.deepEqual(
      regions.map((_, i) => table.payload.readBigUInt64LE(8 + 32 * i)),
      regions.map(({ iova }) => BigInt(iova)),
    );
    await assert.rejects(device.mapMemory(1), virtioError("ERR_VIRTIO_MEMORY", "8 memory regions"));
    assert.equal(peer.all("SET_MEM_TABLE").length, 8, "a ninth is not sent");

    const [, second] = regions;
    assert.ok(second !== undefined);
    await device.unmapMemory(second);
    assert.equal(peer.last("SET_MEM_TABLE").payload.readUInt32LE(0), 7);
    await device.mapMemory(1);
    assert.equal(peer.last("SET_MEM_TABLE").payload.readUInt32LE(0), 8);
    assert.deepEqual(peer.violations, []);
  });

  test("VHU-FE-18 the number of slots is respected", async (t) => {
    const { peer, device } = await open(t, { slots: 2n });
    assert.equal(device.maxRegions, 2);
    const first = await device.mapMemory(1);
    await device.mapMemory(1);
    await assert.rejects(device.mapMemory(1), virtioError("ERR_VIRTIO_MEMORY", "2 memory regions"));
    assert.equal(peer.all("ADD_MEM_REG").length, 2);
    await device.unmapMemory(first);
    assert.equal((await device.mapMemory(1)).iova, 2 ** 21);
  });

  test("a refused region is freed, its addresses too, and the next one works", async (t) => {
    let status = 1n;
    for (const protocolFeatures of [ALL_PROTOCOL, REPLY_ACK]) {
      status = 1n;
      const { device } = await open(t, {
        protocolFeatures,
        status: ({ name }) => (name.includes("_MEM_") ? status : 0n),
      });
      await assert.rejects(device.mapMemory(1), virtioError("ERR_VIRTIO_REJECTED", "status 1"));
      status = 0n;
      const region = await device.mapMemory(1);
      assert.equal(region.iova, 2 ** 21);
      status = 1n;
      await assert.rejects(device.unmapMemory(region), virtioError("ERR_VIRTIO_REJECTED"));
      assert.equal(region.buffer.byteLength, 2 ** 21, "stays as it is");
      status = 0n;
      await device.unmapMemory(region);
      assert.equal(region.buffer.byteLength, 0);
    }
  });

  test("a table is not changed under running queues; single regions are", async (t) => {
    const table = await openRunning(t, { protocolFeatures: REPLY_ACK });
    await assert.rejects(table.device.mapMemory(1), virtioError("ERR_VIRTIO_MEMORY", "before the queues start"));
    await assert.rejects(table.device.unmapMemory(table.region), virtioError("ERR_VIRTIO_MEMORY"));
    await table.device.stopQueues();
    await table.device.mapMemory(1);
    assert.equal(table.peer.last("SET_MEM_TABLE").payload.readUInt32LE(0), 2);

    const slots = await openRunning(t);
    await slots.device.unmapMemory(await slots.device.mapMemory(1));
    assert.equal(slots.peer.names.at(-1), "REM_MEM_REG");
  });

  test("foreign memory and wrong sizes are refused", async (t) => {
    const { device } = await open(t);
    const other = await open(t);
    await assert.rejects(device.unmapMemory(await other.device.mapMemory(1)), RangeError);
    const region = await device.mapMemory(1);
    await device.unmapMemory(region);
    await assert.rejects(device.unmapMemory(region), RangeError, "twice");
    for (const size of [0, -1, 1.5]) await assert.rejects(device.mapMemory(size), RangeError);
    await assert.rejects(device.mapMemory(2 ** 50), virtioError("ERR_VIRTIO_MEMORY"));
  });
});
