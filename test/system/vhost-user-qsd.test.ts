/** The vhost-user front-end beside qemu-storage-daemon: negotiation, config, memory, queues, and the end. */

import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { FdWatcher } from "../../src/sys/index.js";
import { VhostUser } from "../../src/transports/index.js";
import { VirtioFeature } from "../../src/virtqueue/features.js";
import { type Daemon, requirePeer, startStorageDaemon, TemporaryFolder } from "../support/peers.js";
import { ALL_PROTOCOL, INFLIGHT } from "../transports/scripted-peer.js";
import { held, place, virtioError } from "../transports/support.js";

const CAPACITY = 2 ** 30;
/** SIZE_MAX SEG_MAX BLK_SIZE FLUSH TOPOLOGY CONFIG_WCE MQ DISCARD WRITE_ZEROES. */
const BLK_FEATURES = 0x7e46n;
const VIRTIO_BLK_T_GET_ID = 8;

const skip = requirePeer("qemu-storage-daemon");

describe("qemu-storage-daemon", { skip }, () => {
  const folder = new TemporaryFolder();
  let daemon: Daemon;
  before(async () => {
    daemon = await startStorageDaemon(folder, {
      blockdev: `driver=null-co,size=${CAPACITY},read-zeroes=off`,
      queues: 2,
    });
  });
  after(async () => {
    await daemon?.stop();
    folder.close();
  });

  for (const time of ["once", "and again"]) {
    test(`a whole life, ${time}`, async () => {
      const atFirst = held();
      const device = await VhostUser.connect(daemon.path);
      const lost = new Promise<Error>((resolve) => {
        device.onLost = resolve;
      });
      assert.equal(device.maxQueues, 2);
      assert.equal(device.protocolFeatures, ALL_PROTOCOL & ~INFLIGHT); // which it does not offer
      const ring = VirtioFeature.INDIRECT_DESC | VirtioFeature.EVENT_IDX | VirtioFeature.VERSION_1;
      assert.equal(await device.negotiate(0xffff_ffff_ffff_ffffn), ring | BLK_FEATURES);

      const config = await device.readConfig(0, 60);
      assert.equal(new DataView(config.buffer).getBigUint64(0, true), BigInt(CAPACITY / 512));
      await assert.rejects(device.readConfig(0, 96), virtioError("ERR_VIRTIO_CONFIG", "96 bytes"));
      assert.deepEqual(await device.readConfig(0, 60), config);

      const regions = [await device.mapMemory(1), await device.mapMemory(8 * 2 ** 20)];
      const [memory, extra] = regions;
      assert.ok(memory !== undefined && extra !== undefined);
      await device.unmapMemory(extra);

      const setups = [place(memory, 0, 64), place(memory, 1, 256, false, 2 ** 16)];
      for (let start = 0; start < 2; start++) {
        new Uint8Array(memory.buffer).fill(0);
        const [queue] = await device.startQueues(setups);
        assert.ok(queue !== undefined);

        // One request by hand, GET_ID: header, 20 bytes of answer, status; the device writes 21 of them.
        const requestAt = 2 ** 20;
        const view = new DataView(memory.buffer);
        view.setUint32(requestAt, VIRTIO_BLK_T_GET_ID, true);
        view.setUint8(requestAt + 64, 0xff);
        const parts = [
          { at: requestAt, length: 16, flags: 1, next: 1 },
          { at: requestAt + 32, length: 20, flags: 3, next: 2 },
          { at: requestAt + 64, length: 1, flags: 2, next: 0 },
        ];
        for (const [i, { at, length, flags, next }] of parts.entries()) {
          view.setBigUint64(16 * i, BigInt(memory.iova + at), true);
          view.setUint32(16 * i + 8, length, true);
          view.setUint16(16 * i + 12, flags, true);
          view.setUint16(16 * i + 14, next, true);
        }
        const [setup] = setups;
        assert.ok(setup !== undefined);
        const usedIdx = setup.deviceArea - memory.iova + 2;
        const used = new Promise<void>((resolve) => {
          // The daemon signals once when it is given the descriptor: look whether anything is used.
          const watcher = new FdWatcher(queue.completion.fd, { drain: true }, () => {
            if (view.getUint16(usedIdx, true) === 0) return;
            watcher.close();
            resolve();
          });
        });
        Atomics.store(new Uint16Array(memory.buffer), (setup.driverArea - memory.iova + 2) / 2, 1);
        queue.notify(0);
        await used;
        assert.equal(view.getUint8(requestAt + 64), 0, "status");
        assert.equal(view.getUint32(usedIdx + 6, true), 21, "length");
        if (start === 0) await device.stopQueues();
      }

      await device.close();
      assert.ok(virtioError("ERR_VIRTIO_CLOSED")(await lost));
      assert.deepEqual(held(), atFirst);
    });
  }

  test("a second client is not served: the wait ends, and says why that may be", async () => {
    const first = await VhostUser.connect(daemon.path);
    await assert.rejects(
      VhostUser.connect(daemon.path, { timeout: 100 }),
      virtioError("ERR_VIRTIO_TIMEOUT", "one client"),
    );
    await first.close();
  });

  test("its death is noticed at once, and told once", async () => {
    const device = await VhostUser.connect(daemon.path);
    await device.negotiate(0n);
    const memory = await device.mapMemory(1);
    await device.startQueues([place(memory, 0, 8)]);
    const lost = new Promise<Error>((resolve) => {
      device.onLost = resolve;
    });
    process.kill(daemon.pid, "SIGKILL");
    assert.ok(virtioError("ERR_VIRTIO_DISCONNECTED")(await lost));
    await device.close();
  });
});
