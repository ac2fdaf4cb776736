/** Nothing stays open or mapped when a call fails: front-end and embedded back-end, from the socket to the disk. */

import assert from "node:assert/strict";
import { join } from "node:path";
import { after, describe, test } from "node:test";
import { BlockDevice } from "../../src/devices/blk/index.js";
import { VhostUser } from "../../src/transports/index.js";
import { VirtioFeature } from "../../src/virtqueue/index.js";
import { place } from "../transports/support.js";
import { numberCalls } from "./calls.js";
import { refuseEachCall } from "./each-call.js";
import { DISKS, TIMEOUT, withBackend, withDisk, workFolder } from "./embedded.js";

const MIB = 1 << 20;

numberCalls();
const folder = workFolder();
after(() => folder.remove());
const socket = join(folder.path, "disk.sock");
const errors: unknown[] = [];
const reported = (): unknown[] => errors.splice(0);

/** Refuse each call of what is done with a back-end on memory. */
function refuseEach(work: Parameters<typeof withBackend>[3]): Promise<number> {
  return refuseEachCall({ run: async () => withBackend(socket, DISKS.memory(), errors, work), reported });
}

describe("every call refused in turn leaves nothing behind:", () => {
  for (const packed of [false, true]) {
    test(`a ${packed ? "packed" : "split"} transport with memory and queues`, async () => {
      const calls = await refuseEach(async ({ path }) => {
        const device = await VhostUser.connect(path, { timeout: TIMEOUT });
        try {
          await device.negotiate(packed ? VirtioFeature.RING_PACKED : 0n);
          await device.readConfig(0, 8);
          const region = await device.mapMemory(1);
          const more = await device.mapMemory(1);
          await device.startQueues([place(region, 0, 8, packed), place(region, 1, 8, packed, 4096)]);
          await device.unmapMemory(more);
          await device.stopQueues();
          await device.startQueues([place(region, 1, 16, packed)]);
        } finally {
          await device.close();
        }
      });
      assert.ok(calls > 100, `${calls} calls`);
    });
  }

  for (const kind of ["memory", "file"] as const) {
    test(`a disk on ${kind}: reads, writes, discards`, async () => {
      const calls = await refuseEachCall({
        run: async () => {
          const storage = DISKS[kind](folder.image);
          await withBackend(socket, storage, errors, (backend) =>
            withDisk(backend, { mode: "event" }, async (disk) => {
              await disk.write(new Uint8Array(4096).fill(3), { position: 8192 });
              await disk.flush();
              const buffer = await disk.allocate(512);
              await disk.read(buffer, { position: 8192 });
              await disk.discard({ position: 0, length: 4096 });
              await disk.writeZeroes({ position: 4096, length: 4096 });
              buffer.release();
            }),
          );
        },
        reported,
      });
      assert.ok(calls > 100, `${calls} calls`);
    });
  }

  test("memory to lend that grows", async () => {
    await refuseEach((backend) =>
      withDisk(backend, {}, async (disk) => {
        const buffers = [await disk.allocate(40 * MIB), await disk.allocate(40 * MIB)];
        for (const buffer of buffers) buffer.release();
      }),
    );
  });

  test("queues handed over", async () => {
    await refuseEach((backend) =>
      withDisk(backend, { queues: 3 }, async (disk) => {
        const adopted = await BlockDevice.adopt(await disk.handOver({ queues: 2, memory: MIB }));
        try {
          await adopted.read(new Uint8Array(512));
        } finally {
          await adopted.close();
        }
      }),
    );
  });

  test("a disk whose back-end goes, and comes back", async () => {
    const reconnect = { minDelay: 1, maxDelay: 2, timeout: TIMEOUT };
    await refuseEach((first) =>
      withDisk(first, { reconnect }, async (disk) => {
        await disk.write(new Uint8Array(512));
        await first.close();
        await withBackend(socket, DISKS.memory(), errors, async () => {
          await disk.read(new Uint8Array(4096));
        });
      }),
    );
  });

  test("a disk that changes its size", async () => {
    await refuseEach((backend) =>
      withDisk(backend, {}, async (disk) => {
        await backend.resize(2 * MIB);
        await disk.refresh();
        await backend.resize(MIB);
      }),
    );
  });
});
