/** How a ring is worked on: when answers are published, when it is looked at again, when it is left alone. */

import assert from "node:assert/strict";
import { describe, it } from "node:test";
import type { BlockStorage } from "../../src/backend/index.js";
import { BlkRequestType, VhostUserRequest, vringStateCodec } from "../../src/protocol/index.js";
import { VirtioFeature } from "../../src/virtqueue/index.js";
import type { Request, Ring } from "./front-end.js";
import { turns } from "./front-end.js";
import { pair, until } from "./support.js";

const { EVENT_IDX, INDIRECT_DESC, RING_PACKED } = VirtioFeature;

/** A storage of zeroes that tells when it is read. */
function watched(onRead: () => void | Promise<void>): BlockStorage {
  return { capacity: 1024 * 1024, read: onRead, write: () => undefined, flush: () => undefined };
}

/** Whether something is due in the next turn of the event loop: a back-end that polls always has something. */
function isPolling(): boolean {
  return process.getActiveResourcesInfo().includes("Immediate");
}

for (const [format, features] of [
  ["split", EVENT_IDX],
  ["split, tables", INDIRECT_DESC | EVENT_IDX],
  ["packed", RING_PACKED | EVENT_IDX],
  ["packed, tables", RING_PACKED | INDIRECT_DESC | EVENT_IDX],
] as const) {
  const indirect = (features & INDIRECT_DESC) !== 0n;

  /** Make `count` requests available at once, and wait for their answers. */
  const burst = async (ring: Ring, into: number, count: number, requests: Request[]): Promise<void> => {
    const made = Array.from({ length: count }, () => ring.request(BlkRequestType.IN, 0n, { into, indirect }));
    requests.splice(0, requests.length, ...made);
    ring.kick.signal();
    await until(() => made.every((request) => ring.isFinished(request)));
    for (const request of made) await ring.finished(request);
  };

  describe(`work on a ${format} ring`, () => {
    it("is published by halves of what the driver keeps in flight", async (t) => {
      const requests: Request[] = [];
      /** By request: how many of its burst the driver could see answered when it was carried out. */
      let seen: number[] = [];
      const storage = watched(() => void seen.push(requests.filter((request) => ring.isFinished(request)).length));
      const { front } = pair(t, { storage });
      const ring = await front.start(features, 256);
      const times = (count: number, value: number): number[] => Array.from({ length: count }, () => value);
      const rounds = async (count: number, size: number): Promise<number[]> => {
        for (let i = 0; i < count; i++) {
          seen = [];
          await burst(ring, 512, size, requests);
        }
        return seen;
      };
      // It takes some rounds until a depth that was reached once is forgotten.
      assert.deepEqual(await rounds(40, 8), [...times(4, 0), ...times(4, 4)]);
      assert.deepEqual(await rounds(40, 2), [0, 1]);
      assert.deepEqual(await rounds(40, 1), [0]);
      assert.deepEqual(await rounds(40, 5), [0, 0, 0, 3, 3]);
      // A depth that was not known comes in force at once; never are more than 16 held back.
      assert.deepEqual(await rounds(1, 40), [...times(3, 0), ...times(16, 3), ...times(16, 19), ...times(5, 35)]);
    });

    it("is published after 64 KiB of data", async (t) => {
      const requests: Request[] = [];
      const seen: number[] = [];
      const storage = watched(() => void seen.push(requests.filter((request) => ring.isFinished(request)).length));
      const { front } = pair(t, { storage });
      const ring = await front.start(features);
      await burst(ring, 65536, 4, requests);
      assert.deepEqual(seen, [0, 1, 2, 3]);
      seen.length = 0;
      await burst(ring, 16384, 12, requests);
      assert.deepEqual(seen, [0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8]);
    });

    it("is looked for again when a request that took its time is answered", async (t) => {
      const finish: (() => void)[] = [];
      t.after(() => finish.forEach((resolve) => resolve()));
      const storage = watched(() => new Promise((resolve) => finish.push(resolve)));
      const { front } = pair(t, { storage });
      const ring = await front.start(features);
      const first = ring.request(BlkRequestType.IN, 0n, { into: 512, indirect });
      ring.kick.signal();
      await until(() => finish.length === 1 && !isPolling());
      // Without a notification: the driver adds it while it goes through the answers.
      ring.request(BlkRequestType.IN, 0n, { into: 512, indirect });
      await turns(20);
      assert.equal(finish.length, 1);
      finish[0]();
      await until(() => finish.length === 2);
      assert.ok(ring.isFinished(first));
      finish[1]();
      await until(() => !isPolling());
    });

    it("ends, and takes no time, while the ring is disabled, though requests wait on it", async (t) => {
      const finish: (() => void)[] = [];
      t.after(() => finish.forEach((resolve) => resolve()));
      const batch = 16;
      const storage = watched(() => {
        // The last request of a batch: what is done here comes between this batch and the next.
        if (finish.length === batch - 1) {
          front.send(VhostUserRequest.SET_VRING_ENABLE, vringStateCodec.encode({ index: 0, num: 0 }));
          ring.request(BlkRequestType.IN, 0n, { into: 512, indirect });
        }
        return new Promise((resolve) => finish.push(resolve));
      });
      const { front, backend } = pair(t, { storage });
      const ring = await front.start(features, 256);
      for (let i = 0; i < batch; i++) ring.request(BlkRequestType.IN, 0n, { into: 512, indirect });
      ring.kick.signal();
      await until(() => finish.length === batch);
      await until(() => !isPolling());
      assert.equal(backend.stats.requests, batch);
      for (const resolve of finish) resolve();
      await until(() => !isPolling());
      assert.equal(backend.stats.requests, batch);
      await ring.enable(1);
      await until(() => finish.length === batch + 1);
      finish[batch]();
    });
  });
}
