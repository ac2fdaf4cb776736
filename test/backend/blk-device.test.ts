/** The virtio-blk device of the embedded back-end: features, config space, cache modes, and what shares its disk. */

import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { type BlockStorage, RamStorage } from "../../src/backend/index.js";
import {
  BlkFeature,
  BlkRequestType,
  blkConfigSize,
  configCodec,
  decodeBlkConfig,
  u64Codec,
  VHOST_USER_F_PROTOCOL_FEATURES,
  VhostUserRequest,
} from "../../src/protocol/index.js";
import { VirtioFeature } from "../../src/virtqueue/index.js";
import type { FrontEnd, Request, Ring } from "./front-end.js";
import { ALL_PROTOCOL_FEATURES, GUEST, turns } from "./front-end.js";
import { SlowStorage, until } from "./slow-storage.js";
import { backendFor, frontEndFor, pattern } from "./support.js";

const { EVENT_IDX, INDIRECT_DESC, RING_PACKED } = VirtioFeature;
const { CONFIG_WCE, DISCARD, FLUSH, RO, SECURE_ERASE, WRITE_ZEROES } = BlkFeature;
const OK = 0;
const IOERR = 1;
const UNSUPP = 2;
const SECTORS = 2048n; // 1 MiB
const SLOW = FLUSH | CONFIG_WCE | DISCARD | WRITE_ZEROES;
const ALL = SLOW | SECURE_ERASE;

async function config(front: FrontEnd): Promise<Uint8Array> {
  const request = configCodec.encode({ offset: 0, flags: 0, data: new Uint8Array(96) });
  return configCodec.decode(await front.ask(VhostUserRequest.GET_CONFIG, request)).data;
}

async function setWriteback(front: FrontEnd, value: number): Promise<bigint> {
  const data = Uint8Array.of(value);
  return front.ack(VhostUserRequest.SET_CONFIG, configCodec.encode({ offset: 32, flags: 0, data }));
}

describe("the virtio-blk device", () => {
  it("BLK-DEV-01 BLK-DEV-02 BLK-DEV-05 BLK-DEV-23 BASIC-DEV-11 offers FLUSH, CONFIG_WCE, VERSION_1; never ZONED, LIFETIME", async (t) => {
    const { backend } = backendFor(t);
    const offered = await frontEndFor(t, backend).askU64(VhostUserRequest.GET_FEATURES);
    const wanted = ALL | VirtioFeature.VERSION_1 | INDIRECT_DESC | EVENT_IDX | RING_PACKED | BlkFeature.MQ;
    assert.equal(offered & wanted, wanted);
    assert.equal(offered & (BlkFeature.ZONED | BlkFeature.LIFETIME | RO | VirtioFeature.IN_ORDER), 0n);
  });

  it("offers packed rings only when told, and DISCARD, WRITE_ZEROES, SECURE_ERASE only when the storage has them", async (t) => {
    const storage: BlockStorage = {
      capacity: 512,
      read: () => undefined,
      write: () => undefined,
      flush: () => undefined,
    };
    const { backend } = backendFor(t, storage, { packed: false });
    const front = frontEndFor(t, backend);
    const offered = await front.askU64(VhostUserRequest.GET_FEATURES);
    assert.equal(offered & (RING_PACKED | DISCARD | WRITE_ZEROES | SECURE_ERASE), 0n);
    const ring = await front.start();
    for (const type of [BlkRequestType.DISCARD, BlkRequestType.WRITE_ZEROES, BlkRequestType.SECURE_ERASE]) {
      assert.equal((await ring.segments(type, [0n, 1, 0])).status, UNSUPP);
    }
  });

  it("BLK-DEV-04 BLK-DEV-07 BLK-DEV-20 BASIC-DEV-10 has a config space with its limits and zero padding", async (t) => {
    const { backend } = backendFor(t, new RamStorage(1024 * 1024), { queues: 3, blockSize: 4096 });
    const front = frontEndFor(t, backend);
    await front.handshake(ALL | BlkFeature.BLK_SIZE);
    const bytes = await config(front);
    const features = ALL | BlkFeature.SEG_MAX | BlkFeature.BLK_SIZE | BlkFeature.MQ;
    assert.deepEqual(decodeBlkConfig(bytes, features), {
      capacity: SECTORS,
      segMax: 126,
      blkSize: 4096,
      writeback: true,
      numQueues: 3,
      discard: { maxSectors: 2 ** 19, maxSegments: 16, alignment: 8 },
      writeZeroes: { maxSectors: 2 ** 19, maxSegments: 16, mayUnmap: true },
      secureErase: { maxSectors: 2 ** 19, maxSegments: 16, alignment: 8 },
    });
    assert.equal(bytes[33], 0);
    assert.deepEqual([...bytes.subarray(57, 60)], [0, 0, 0]);
    assert.deepEqual(bytes.subarray(blkConfigSize(features)), new Uint8Array(24));
  });

  const modes = [
    ["FLUSH and CONFIG_WCE", FLUSH | CONFIG_WCE, 1],
    ["BLK-DEV-03 CONFIG_WCE without FLUSH", CONFIG_WCE, 0],
    ["FLUSH alone", FLUSH, 1],
    ["neither", 0n, 0],
  ] as const;
  for (const [name, features, writeback] of modes) {
    it(`BLK-DEV-21 with ${name} a write is finished ${writeback === 1 ? "before" : "after"} it is flushed`, async (t) => {
      const storage = new SlowStorage();
      t.after(() => storage.release());
      const { backend } = backendFor(t, storage);
      const front = frontEndFor(t, backend);
      const ring = await front.start(features);
      assert.equal((await config(front))[32], writeback);
      const request = ring.request(BlkRequestType.OUT, 0n, { out: pattern(512) });
      ring.kick.signal();
      await until(() => storage.calls.length === 1);
      storage.finish("write");
      if (writeback === 0) {
        await until(() => storage.calls.length === 1);
        await turns(5);
        assert.equal(ring.isFinished(request), false);
        storage.finish("flush");
      }
      assert.equal(await ring.finished(request), 1);
      assert.equal(request.status(), OK);
      assert.equal(storage.calls.length, 0);
    });
  }

  /** Whether a write on `ring` is answered only after a flush. */
  async function isStable(ring: Ring, storage: SlowStorage): Promise<boolean> {
    ring.rewind();
    const written = ring.write(0n, new Uint8Array(512));
    await until(() => storage.calls.length === 1);
    storage.finish("write");
    await turns(5);
    const flushes = storage.calls.length === 1;
    if (flushes) storage.finish("flush");
    assert.equal((await written).status, OK);
    return flushes;
  }

  it("BLK-DEV-21 a front-end that reads the mode before features are agreed, as QEMU does, may rely on it", async (t) => {
    const storage = new SlowStorage();
    t.after(() => storage.release());
    const front = frontEndFor(t, backendFor(t, storage).backend);
    front.send(VhostUserRequest.SET_PROTOCOL_FEATURES, u64Codec.encode(ALL_PROTOCOL_FEATURES));
    assert.equal((await config(front))[32], 1);
    const ring = await front.start(FLUSH | CONFIG_WCE);
    assert.equal(await isStable(ring, storage), false);
  });

  it("BLK-DEV-21 a front-end that was not told of the cache in this connection is served without, until it flushes or reads", async (t) => {
    const storage = new SlowStorage();
    t.after(() => storage.release());
    const { backend } = backendFor(t, storage);
    const front = frontEndFor(t, backend);
    const ring = await front.start(FLUSH | CONFIG_WCE);
    assert.equal(await isStable(ring, storage), true);
    const flush = ring.run(BlkRequestType.FLUSH, 0n);
    await until(() => storage.calls.length === 1);
    storage.finish("flush");
    assert.equal((await flush).status, OK);
    assert.equal(await isStable(ring, storage), false);
    assert.equal((await config(front))[32], 1);
    front.close();

    const other = await frontEndFor(t, backend).start(FLUSH | CONFIG_WCE);
    assert.equal(await isStable(other, storage), true);
    assert.equal((await config(other.front))[32], 1);
    assert.equal(await isStable(other, storage), false);
  });

  it("BLK-DEV-21 a guest that chose writethrough is served so after a reset, though its front-end does not repeat it", async (t) => {
    const storage = new SlowStorage();
    t.after(() => storage.release());
    const front = frontEndFor(t, backendFor(t, storage).backend);
    const ring = await front.start(FLUSH | CONFIG_WCE);
    assert.equal((await config(front))[32], 1);
    assert.equal(await setWriteback(front, 0), 0n);
    assert.equal(await isStable(ring, storage), true);
    await front.must(VhostUserRequest.RESET_DEVICE);
    await front.must(VhostUserRequest.SET_FEATURES, u64Codec.encode(front.features | VHOST_USER_F_PROTOCOL_FEATURES));
    const again = front.ring();
    await again.start();
    await again.enable(1);
    assert.equal(await isStable(again, storage), true);
    assert.equal((await config(front))[32], 1);
    assert.equal(await isStable(again, storage), false);
  });

  it("BLK-DEV-21 the driver switches the cache mode, and discards and zeroes are flushed as well", async (t) => {
    const storage = new SlowStorage();
    t.after(() => storage.release());
    const { backend } = backendFor(t, storage);
    const front = frontEndFor(t, backend);
    const ring = await front.start(SLOW);
    assert.equal(await setWriteback(front, 0), 0n);
    assert.equal((await config(front))[32], 0);
    for (const [type, name] of [
      [BlkRequestType.DISCARD, "discard"],
      [BlkRequestType.WRITE_ZEROES, "writeZeroes"],
    ] as const) {
      const pending = ring.segments(type, [0n, 1, 0]);
      await until(() => storage.calls.length === 1);
      storage.finish(name);
      await until(() => storage.calls.length === 1);
      storage.finish("flush");
      assert.equal((await pending).status, OK);
    }
    assert.equal(await setWriteback(front, 1), 0n);
    const pending = ring.write(0n, new Uint8Array(512));
    await until(() => storage.calls.length === 1);
    storage.finish("write");
    assert.equal((await pending).status, OK);
  });

  it("limits the segments of a large disk", async (t) => {
    const { backend } = backendFor(t, new RamStorage(2 ** 30));
    const ring = await frontEndFor(t, backend).start(ALL);
    for (const type of [BlkRequestType.DISCARD, BlkRequestType.WRITE_ZEROES, BlkRequestType.SECURE_ERASE]) {
      assert.equal((await ring.segments(type, [0n, 2 ** 19, 0])).status, OK);
      assert.equal((await ring.segments(type, [0n, 2 ** 19 + 1, 0])).status, IOERR);
    }
  });

  it("BLK-DEV-21 writethrough waits for the flush of a storage that is asked without views, too", async (t) => {
    const slow = new SlowStorage();
    t.after(() => slow.release());
    const log: string[] = [];
    const storage: BlockStorage = {
      capacity: slow.capacity,
      read: () => undefined,
      write: () => undefined,
      readInto: () => undefined,
      writeFrom: () => void log.push("writeFrom"),
      flush: () => slow.flush(),
    };
    const { backend } = backendFor(t, storage);
    const ring = await frontEndFor(t, backend).start(CONFIG_WCE);
    const request = ring.request(BlkRequestType.OUT, 0n, { out: pattern(512) });
    ring.kick.signal();
    await until(() => slow.calls.length === 1);
    assert.deepEqual(log, ["writeFrom"]);
    assert.equal(ring.isFinished(request), false);
    slow.finish("flush");
    assert.equal(await ring.finished(request), 1);
  });

  it("answers IOERR when a storage that is asked without views fails", async (t) => {
    const fail = (): never => {
      throw new Error("on purpose");
    };
    const storage: BlockStorage = {
      ...{ capacity: 1024 * 1024, read: fail, write: fail, flush: fail },
      ...{ readInto: fail, writeFrom: fail },
    };
    const { backend, errors } = backendFor(t, storage);
    const ring = await frontEndFor(t, backend).start(SLOW & FLUSH);
    assert.deepEqual(
      [(await ring.read(0n, 512)).status, (await ring.write(0n, new Uint8Array(512))).status],
      [IOERR, IOERR],
    );
    assert.equal((await ring.run(BlkRequestType.FLUSH, 0n)).status, IOERR);
    assert.equal(errors.length, 3);
    storage.flush = () => undefined; // for close
  });

  it("answers a request in several pieces when the last piece is done, and fails it when any failed", async (t) => {
    const storage = new SlowStorage();
    t.after(() => storage.release());
    const { backend } = backendFor(t, storage);
    const front = frontEndFor(t, backend);
    const ring = await front.start(SLOW);
    const scattered = (): Request => {
      const header = ring.room(16);
      front.bytes.fill(0, header, header + 16);
      const parts = [ring.room(1024), ring.room(1024), ring.room(1024)];
      const status = ring.room(1);
      front.bytes[status] = 0xff;
      const id = ring.driver.add([
        { address: GUEST + BigInt(header), length: 16, writable: false },
        ...parts.map((at) => ({ address: GUEST + BigInt(at), length: 512, writable: true })),
        { address: GUEST + BigInt(status), length: 1, writable: true },
      ]);
      ring.driver.publish();
      ring.kick.signal();
      return { id, status: () => front.bytes[status], data: () => new Uint8Array(0) };
    };
    for (const [order, failing] of [
      [[0, 1, 2], -1],
      [[2, 0, 1], -1],
      [[1, 2, 0], 1],
      [[0, 2, 1], 1],
    ] as const) {
      const request = scattered();
      await until(() => storage.calls.length === 3);
      const calls = storage.calls.splice(0);
      assert.deepEqual(
        calls.map(({ offset }) => offset),
        [0, 512, 1024],
      );
      for (const [i, which] of order.entries()) {
        calls[which].finish(which === failing ? new Error("on purpose") : undefined);
        await turns(3);
        if (i < 2) assert.equal(ring.isFinished(request), false, `answered after ${i + 1} of 3 pieces`);
      }
      assert.equal(await ring.finished(request), failing < 0 ? 1537 : 0);
      assert.equal(request.status(), failing < 0 ? OK : IOERR);
    }
    // One piece is with the storage when the next is refused at once.
    const read = storage.read.bind(storage);
    storage.read = (offset, into) => {
      if (offset > 0) throw new Error("on purpose");
      return read(offset, into);
    };
    const request = scattered();
    await until(() => storage.calls.length === 1);
    await turns(3);
    assert.equal(ring.isFinished(request), false);
    storage.finish("read");
    assert.equal(await ring.finished(request), 0);
    assert.equal(request.status(), IOERR);
  });

  it("carries the segments of a request out one after the other, and stops at one that fails", async (t) => {
    const storage = new SlowStorage();
    t.after(() => storage.release());
    const { backend } = backendFor(t, storage);
    const ring = await frontEndFor(t, backend).start(SLOW);
    assert.equal((await config(ring.front))[32], 1);
    for (const failing of [-1, 1]) {
      const pending = ring.segments(BlkRequestType.WRITE_ZEROES, [0n, 1, 0], [8n, 1, 1], [16n, 1, 0]);
      for (const i of [0, 1, 2]) {
        await until(() => storage.calls.length === 1);
        assert.equal(storage.calls[0].offset, i * 4096);
        storage.finish("writeZeroes", i === failing ? new Error("on purpose") : undefined);
        if (i === failing) break;
      }
      assert.equal((await pending).status, failing < 0 ? OK : IOERR);
    }
  });

  it("a memory disk in writethrough mode answers at once", async (t) => {
    const { backend } = backendFor(t);
    const ring = await frontEndFor(t, backend).start(0n);
    assert.equal((await ring.write(4n, pattern(512))).status, OK);
    assert.deepEqual((await ring.read(4n, 512)).data, pattern(512));
  });

  it("BASIC-DEV-05 BASIC-DEV-07 takes any subset of its features, and refuses others and sets without VERSION_1", async (t) => {
    const { backend } = backendFor(t);
    const front = frontEndFor(t, backend);
    await front.handshake(0n);
    const set = (features: bigint): Promise<bigint> =>
      front.ack(VhostUserRequest.SET_FEATURES, u64Codec.encode(features | VHOST_USER_F_PROTOCOL_FEATURES));
    const offered = await front.askU64(VhostUserRequest.GET_FEATURES);
    assert.equal(await set(offered), 0n);
    assert.equal(await set(VirtioFeature.VERSION_1), 0n);
    assert.equal(await set(VirtioFeature.VERSION_1 | BlkFeature.ZONED), 1n);
    assert.equal(await set(VirtioFeature.VERSION_1 | VirtioFeature.ACCESS_PLATFORM), 1n);
    assert.equal(await set(FLUSH), 1n);
    assert.equal(await set(offered), 0n);
  });
});
