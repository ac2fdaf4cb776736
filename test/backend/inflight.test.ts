/** INFLIGHT_SHMFD of the embedded back-end: its messages, regions that lie, and back-ends that are killed. */

import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, it, type TestContext } from "node:test";
import { fileURLToPath } from "node:url";
import {
  BlkFeature,
  BlkRequestType,
  inflightCodec,
  type InflightPayload,
  vringStateCodec,
  VhostUserProtocolFeature,
  VhostUserRequest as R,
} from "../../src/protocol/index.js";
import { closeFd, fileSize, mapShared, MemfdSeal, memfdSeals, unmapShared } from "../../src/sys/index.js";
import { VirtioFeature } from "../../src/virtqueue/index.js";
import { ALL_PROTOCOL_FEATURES, FrontEnd, type Ring, soon, turns } from "./front-end.js";
import { folderFor, frontEndFor, openFds, pair, pattern, until } from "./support.js";

const PROTOCOL = ALL_PROTOCOL_FEATURES | VhostUserProtocolFeature.INFLIGHT_SHMFD;
const FORMATS = [
  ["split", VirtioFeature.INDIRECT_DESC | VirtioFeature.EVENT_IDX],
  ["packed", VirtioFeature.RING_PACKED | VirtioFeature.EVENT_IDX],
] as const;
const SIZE = 128;

/** Ask for a region; the descriptor is closed after the test. */
async function region(
  t: TestContext,
  front: FrontEnd,
  shape = { numQueues: 1, queueSize: SIZE },
): Promise<{ fd: number; description: InflightPayload }> {
  const { payload, fd } = await front.askFd(
    R.GET_INFLIGHT_FD,
    inflightCodec.encode({ mmapSize: 0, mmapOffset: 0, ...shape }),
  );
  t.after(() => closeFd(fd));
  return { fd, description: inflightCodec.decode(payload) };
}

async function startTracked(t: TestContext, front: FrontEnd, features: bigint) {
  await front.handshake(features | BlkFeature.FLUSH, PROTOCOL);
  await front.share();
  const { fd, description } = await region(t, front);
  await front.must(R.SET_INFLIGHT_FD, inflightCodec.encode(description), [fd]);
  const ring = front.ring(0, SIZE);
  await ring.start();
  await ring.enable(1);
  return { ring, fd, description };
}

for (const [format, features] of FORMATS) {
  describe(`INFLIGHT_SHMFD on a ${format} ring`, () => {
    it("VHU-BE-27 makes a sealed region of zeroes with room for every queue", async (t) => {
      const { front } = pair(t, { queues: 3 });
      await front.handshake(features, PROTOCOL);
      const before = openFds();
      const { fd, description } = await region(t, front, { numQueues: 3, queueSize: 100 });
      assert.equal(openFds(), before + 1);
      const part = format === "split" ? 1664 : 3264; // 16 + 16 * 100 and 32 + 32 * 100, in multiples of 64
      assert.deepEqual(description, { mmapSize: BigInt(3 * part), mmapOffset: 0n, numQueues: 3, queueSize: 100 });
      assert.equal(fileSize(fd), 3 * part);
      assert.notEqual(memfdSeals(fd) & MemfdSeal.SHRINK, 0);
      const bytes = mapShared(fd, 3 * part);
      assert.ok(new Uint8Array(bytes).every((byte) => byte === 0));
      unmapShared(bytes);
    });

    for (const [numQueues, queueSize] of [
      [0, 8],
      [2, 8],
      [1, 0],
      [1, 32769],
    ] as const) {
      it(`hangs up on one who wants a region for ${numQueues} queues of ${queueSize}`, async (t) => {
        const { front, backend } = pair(t);
        await front.handshake(features, PROTOCOL);
        front.send(R.GET_INFLIGHT_FD, inflightCodec.encode({ mmapSize: 0, mmapOffset: 0, numQueues, queueSize }));
        await front.hungUp();
        front.close();
        assert.equal((await (await frontEndFor(t, backend).start(features)).read(0n, 512)).status, 0);
      });
    }

    it("refuses regions that are too small, for others, out of the file, or come too late or without a file", async (t) => {
      const { front } = pair(t);
      const { ring, fd, description } = await startTracked(t, front, features);
      const set = (change: Partial<InflightPayload>, fds = [fd]): Promise<bigint> =>
        front.ack(R.SET_INFLIGHT_FD, inflightCodec.encode({ ...description, ...change }), fds);
      assert.equal(await set({}), 1n, "a ring is started");
      await ring.stop();
      const before = openFds();
      assert.equal(await set({ mmapSize: description.mmapSize - 1n }), 1n);
      assert.equal(await set({ mmapOffset: 4096n }), 1n);
      assert.equal(await set({ mmapOffset: 1n }), 1n);
      assert.equal(await set({ mmapOffset: (1n << 64n) - 4096n }), 1n);
      assert.equal(await set({ numQueues: 2 }), 1n);
      assert.equal(await set({ queueSize: 0 }), 1n);
      assert.equal(await set({}, []), 1n);
      assert.equal(await set({}, [fd, fd]), 1n);
      assert.equal(await front.ack(R.SET_INFLIGHT_FD, new Uint8Array(20), [fd]), 1n);
      assert.equal(openFds(), before);
      assert.equal(await set({}), 0n);
    });

    it("goes on after a polite stop where the front-end says, also from the start", async (t) => {
      const { front } = pair(t);
      const { ring } = await startTracked(t, front, features);
      await ring.write(0n, pattern(512));
      await ring.stop();
      front.bytes.fill(0);
      const again = front.ring(0, SIZE);
      await again.start();
      assert.deepEqual((await again.read(0n, 512)).data, pattern(512));
    });

    it("a ring without a part in the region, or too large for it, does not start", async (t) => {
      const { front } = pair(t, { queues: 2 });
      await front.handshake(features, PROTOCOL);
      await front.share();
      const { fd, description } = await region(t, front, { numQueues: 1, queueSize: 16 });
      await front.must(R.SET_INFLIGHT_FD, inflightCodec.encode(description), [fd]);
      await assert.rejects(front.ring(1, 16).start(), /SET_VRING_KICK/);
      await assert.rejects(front.ring(0, 32).start(), /SET_VRING_KICK/);
      const ring = front.ring(0, 16);
      await ring.start();
      await ring.enable(1);
      assert.equal((await ring.read(0n, 512)).status, 0);
    });

    it("a region that lies stops the ring or is refused, whatever stands in it; the next client is served", async (t) => {
      const { front, backend } = pair(t);
      let seed = 7;
      const random = (limit: number): number => {
        seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
        return Math.floor((seed / 2 ** 32) * limit);
      };
      const { ring, fd, description } = await startTracked(t, front, features);
      await ring.write(0n, pattern(512));
      const bytes = new Uint8Array(mapShared(fd, Number(description.mmapSize)));
      const good = bytes.slice();
      await ring.stop();
      for (let round = 0; round < 200; round++) {
        bytes.set(good);
        bytes[8] = 1;
        for (let i = 0; i < 1 + random(6); i++) bytes[random(round % 2 === 0 ? 32 : bytes.length)] = random(256);
        if (round % 5 === 0) bytes.fill(random(256), random(bytes.length));
        await front.must(R.SET_INFLIGHT_FD, inflightCodec.encode(description), [fd]);
        await front.must(R.SET_VRING_CALL, Uint8Array.of(0, 1, 0, 0, 0, 0, 0, 0));
        await front.ack(R.SET_VRING_KICK, new Uint8Array(8), [ring.kick.fd]);
        await turns(3);
        await front.ask(R.GET_VRING_BASE, vringStateCodec.encode({ index: 0, num: 0 }));
      }
      unmapShared(bytes.buffer);
      front.close();
      assert.equal((await (await frontEndFor(t, backend).start(features)).read(0n, 512)).status, 0);
    });

    for (const [last, hold] of [
      [1, 0],
      [9, 3],
      [17, 0],
      [30, 2],
      [40, 5],
    ] as const) {
      it(`VHU-BE-27 killed at write ${last}${hold > 0 ? `, every ${hold}th unfinished` : ""}: another back-end ends what is in flight, each once`, async (t) => {
        const folder = folderFor(t);
        const image = join(folder, "disk.img");
        writeFileSync(image, new Uint8Array(64 * 1024));
        const first = await mortal(t, join(folder, "first.sock"), image, last, hold);
        const front = new FrontEnd(first.path);
        t.after(() => front.close());
        const { ring, fd, description } = await startTracked(t, front, features);
        // Each writes two blocks, and so over half of the one before. But requests in flight together have no order, and
        // an unfinished one is carried out again behind others that are finished: those keep apart.
        const stride = hold > 0 ? 2 : 1;
        const requests = Array.from({ length: 40 }, (_, i) =>
          ring.request(BlkRequestType.OUT, BigInt(i * stride), { out: pattern(1024, i), cuts: [16] }),
        );
        ring.kick.signal();
        assert.equal(await soon(first.ended, "the end of the back-end"), "SIGKILL");

        const second = await mortal(t, join(folder, "second.sock"), image, 0, 0);
        front.reconnect(second.path);
        await front.handshake(features | BlkFeature.FLUSH, PROTOCOL);
        await front.share();
        await front.must(R.SET_INFLIGHT_FD, inflightCodec.encode(description), [fd]);
        await ring.start();
        await ring.enable(1);
        await finishAll(ring, requests);
        const disk = readFileSync(image);
        for (let i = 0; i < 40; i++) {
          const at = i * stride * 512;
          assert.deepEqual(new Uint8Array(disk.subarray(at, at + 512)), pattern(1024, i).subarray(0, 512));
        }
        assert.deepEqual((await ring.read(0n, 512)).data, pattern(1024, 0).subarray(0, 512));
      });
    }
  });
}

/** Every request is answered, with success; the driver complains about one that is answered twice. */
async function finishAll(ring: Ring, requests: readonly { status: () => number; id: number }[]): Promise<void> {
  for (const request of requests) {
    await ring.finished({ ...request, data: () => new Uint8Array(0) });
    assert.equal(request.status(), 0);
  }
  await until(() => ring.driver.chains.size === 0);
}

/** A back-end in a process of its own, see mortal-back-end.ts. */
async function mortal(
  t: TestContext,
  path: string,
  image: string,
  last: number,
  hold: number,
): Promise<{ path: string; ended: Promise<string> }> {
  const program = fileURLToPath(new URL("./mortal-back-end.js", import.meta.url));
  const child: ChildProcess = spawn(process.execPath, [program, path, image, String(last), String(hold)], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  const ended = new Promise<string>((resolve) => {
    child.once("exit", (code, signal) => resolve(signal ?? String(code)));
  });
  t.after(async () => {
    child.kill("SIGKILL");
    await ended;
  });
  if (child.stdout === null) throw new Error("no output to read");
  await soon(once(child.stdout, "data"), "the start of the back-end");
  return { path, ended };
}
