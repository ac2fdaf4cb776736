/** virtio-blk requests on the embedded back-end (BLK-DEV rows), over a real connection and both ring formats. */

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
import type { FrontEnd, Request } from "./front-end.js";
import { GUEST, turns } from "./front-end.js";
import { backendFor, frontEndFor, pattern } from "./support.js";

const { EVENT_IDX, INDIRECT_DESC, RING_PACKED } = VirtioFeature;
const { CONFIG_WCE, DISCARD, FLUSH, RO, SECURE_ERASE, WRITE_ZEROES } = BlkFeature;
const OK = 0;
const IOERR = 1;
const UNSUPP = 2;
const SECTORS = 2048n; // 1 MiB
const SLOW = FLUSH | CONFIG_WCE | DISCARD | WRITE_ZEROES;
const ALL = SLOW | SECURE_ERASE;

const FORMATS = [
  ["split", INDIRECT_DESC | EVENT_IDX],
  ["split, plain", 0n],
  ["packed", RING_PACKED | INDIRECT_DESC | EVENT_IDX],
  ["packed, plain", RING_PACKED],
] as const;

/** A storage in plain memory whose answers the test gives, one by one. */
class SlowStorage implements BlockStorage {
  readonly capacity = 1024 * 1024;
  readonly calls: { name: string; offset: number; finish: (error?: Error) => void }[] = [];
  private readonly bytes = new Uint8Array(this.capacity);

  read(offset: number, into: Uint8Array): Promise<void> {
    return this.later("read", offset, () => into.set(this.bytes.subarray(offset, offset + into.length)));
  }
  write(offset: number, from: Uint8Array): Promise<void> {
    return this.later("write", offset, () => this.bytes.set(from, offset));
  }
  flush(): Promise<void> {
    return this.later("flush", 0, () => undefined);
  }
  discard(offset: number): Promise<void> {
    return this.later("discard", offset, () => undefined);
  }
  writeZeroes(offset: number, length: number): Promise<void> {
    return this.later("writeZeroes", offset, () => this.bytes.fill(0, offset, offset + length));
  }

  /** Finish the oldest call of this name. */
  finish(name: string, error?: Error): void {
    const at = this.calls.findIndex((call) => call.name === name);
    assert.ok(at >= 0, `no ${name} is waiting`);
    this.calls.splice(at, 1)[0].finish(error);
  }

  /** Finish everything, now and from now on, so that the back-end can close. */
  release(): void {
    for (const { finish } of this.calls.splice(0)) finish();
    this.later = (_name, _offset, work) => Promise.resolve(work());
  }

  private later(name: string, offset: number, work: () => void): Promise<void> {
    return new Promise((resolve, reject) => {
      const finish = (error?: Error): void => {
        if (error !== undefined) return reject(error);
        work();
        resolve();
      };
      this.calls.push({ name, offset, finish });
    });
  }
}

async function config(front: FrontEnd): Promise<Uint8Array> {
  const request = configCodec.encode({ offset: 0, flags: 0, data: new Uint8Array(96) });
  return configCodec.decode(await front.ask(VhostUserRequest.GET_CONFIG, request)).data;
}

async function setWriteback(front: FrontEnd, value: number): Promise<bigint> {
  const data = Uint8Array.of(value);
  return front.ack(VhostUserRequest.SET_CONFIG, configCodec.encode({ offset: 32, flags: 0, data }));
}

for (const [format, features] of FORMATS) {
  describe(`virtio-blk on a ${format} ring`, () => {
    it("reads what was written, with the lengths of a good device", async (t) => {
      const { backend } = backendFor(t);
      const ring = await frontEndFor(t, backend).start(features | ALL);
      const data = pattern(8192);
      assert.deepEqual(await ring.write(100n, data), { status: OK, length: 1, data: new Uint8Array(0) });
      assert.deepEqual(await ring.read(100n, 8192), { status: OK, length: 8193, data });
      assert.deepEqual(await ring.read(101n, 512), { status: OK, length: 513, data: data.subarray(512, 1024) });
      assert.equal((await ring.run(BlkRequestType.FLUSH, 0n)).status, OK);
      assert.deepEqual([backend.stats.requests, backend.stats.bytesWritten, backend.stats.bytesRead], [4, 8192, 8704]);
    });

    it("SPLIT-DEV-01 accepts any framing: header and data cut or joined at odd places", async (t) => {
      const { backend } = backendFor(t);
      const ring = await frontEndFor(t, backend).start(features | ALL);
      const framings = [
        [],
        [16, 1024],
        [1, 2, 13, 512, 512],
        [7, 500, 200],
        [1040],
        [20, 1, 1, 1],
        [16, 1, 1023],
        [15, 2],
      ];
      for (const [i, cuts] of framings.entries()) {
        const data = pattern(1024, i);
        assert.equal((await ring.write(BigInt(i * 2), data, { cuts })).status, OK, `write ${cuts.join()}`);
        // In a read the header is cut by the first sizes, the data and status by the rest.
        const answer = await ring.read(BigInt(i * 2), 1024, { cuts: [...[[16], [3, 13], [1, 1, 14]][i % 3], ...cuts] });
        assert.deepEqual(answer, { status: OK, length: 1025, data }, `read ${cuts.join()}`);
      }
    });

    it("SPLIT-DEV-01 accepts a header in pieces that lie anywhere, and data and status in one element", async (t) => {
      const { backend } = backendFor(t);
      const front = frontEndFor(t, backend);
      const ring = await front.start(features | ALL);
      const data = pattern(512);
      await ring.write(SECTORS - 1n, data);
      const header = new Uint8Array(16);
      new DataView(header.buffer).setBigUint64(8, SECTORS - 1n, true);
      const pieces = [header.subarray(0, 4), header.subarray(4, 9), header.subarray(9)].map((bytes) => {
        const at = ring.room(bytes.length + 64);
        front.bytes.fill(0x77, at, at + bytes.length + 64);
        front.bytes.set(bytes, at);
        return { address: GUEST + BigInt(at), length: bytes.length, writable: false };
      });
      const at = ring.room(513);
      const id = ring.driver.add([...pieces, { address: GUEST + BigInt(at), length: 513, writable: true }]);
      ring.driver.publish();
      ring.kick.signal();
      const request = { id, status: () => front.bytes[at + 512], data: () => front.bytes.slice(at, at + 512) };
      assert.equal(await ring.finished(request), 513);
      assert.equal(request.status(), OK);
      assert.deepEqual(request.data(), data);
    });

    it("accepts requests in tables, if negotiated; without that a table breaks the ring", async (t) => {
      const { backend, errors } = backendFor(t);
      const ring = await frontEndFor(t, backend).start(features | ALL);
      const data = pattern(4096);
      if ((features & INDIRECT_DESC) === 0n) {
        ring.request(BlkRequestType.IN, 0n, { into: 512, indirect: true });
        ring.kick.signal();
        await until(() => errors.length === 1);
        assert.match(errors[0].message, /INDIRECT/);
        return;
      }
      assert.equal((await ring.write(8n, data, { indirect: true, cuts: [16, 1, 2, 3] })).status, OK);
      assert.deepEqual((await ring.read(8n, 4096, { indirect: true, cuts: [5, 11, 4000] })).data, data);
    });

    it("answers requests beyond the capacity, and those that are not whole sectors, with IOERR", async (t) => {
      const { backend } = backendFor(t);
      const ring = await frontEndFor(t, backend).start(features | ALL);
      const cases = [
        [SECTORS, 512, IOERR],
        [SECTORS - 1n, 1024, IOERR],
        [SECTORS - 1n, 512, OK],
        [0xffff_ffff_ffff_ffffn, 512, IOERR],
        [0x80_0000_0000_0000n, 512, IOERR], // times 512 is 0 mod 2^64
        [1n << 32n, 512, IOERR],
        [0n, 511, IOERR],
        [0n, 513, IOERR],
        [SECTORS, 0, OK],
      ] as const;
      for (const [sector, length, status] of cases) {
        const read = await ring.read(sector, length);
        assert.equal(read.status, status, `read of ${length} at ${sector}`);
        if (status !== OK) assert.deepEqual(read.data, new Uint8Array(length).fill(0xee));
        if (status !== OK) assert.equal(read.length, 0);
        const write = await ring.write(sector, new Uint8Array(length).fill(1));
        assert.equal(write.status, status, `write of ${length} at ${sector}`);
        assert.equal(write.length, 1);
      }
      assert.deepEqual((await ring.read(0n, 512)).data, new Uint8Array(512));
    });

    it("BLK-DEV-24 answers unknown types with UNSUPP, zone requests among them, and goes on", async (t) => {
      const { backend } = backendFor(t);
      const ring = await frontEndFor(t, backend).start(features | ALL);
      const types = [2, 3, 5, 10, 12, 15, 16, 18, 20, 22, 24, 26, 27, 0x8000_0000, 0xffff_ffff];
      for (const type of types) assert.equal((await ring.run(type, 0n, { into: 64 })).status, UNSUPP, `type ${type}`);
      assert.equal((await ring.read(0n, 512)).status, OK);
    });

    it("answers what has no header with IOERR, and gives back what has no status", async (t) => {
      const { backend } = backendFor(t);
      const front = frontEndFor(t, backend);
      const ring = await front.start(features | ALL);
      const at = ring.room(64);
      const address = 0x10_0000_0000n + BigInt(at);
      front.bytes.fill(0xff, at, at + 64);
      const run = async (lengths: readonly [readable: number, writable: number]): Promise<number> => {
        const elements = [
          ...(lengths[0] > 0 ? [{ address, length: lengths[0], writable: false }] : []),
          ...(lengths[1] > 0 ? [{ address: address + 32n, length: lengths[1], writable: true }] : []),
        ];
        const id = ring.driver.add(elements);
        ring.driver.publish();
        ring.kick.signal();
        const request: Request = { id, status: () => 0, data: () => new Uint8Array(0) };
        return ring.finished(request);
      };
      assert.equal(await run([15, 1]), 1);
      assert.equal(front.bytes[at + 32], IOERR);
      assert.equal(await run([0, 4]), 0);
      assert.equal(front.bytes[at + 35], IOERR);
      assert.equal(await run([16, 0]), 0);
      assert.deepEqual(front.bytes.subarray(at, at + 16), new Uint8Array(16).fill(0xff)); // SPLIT-DEV-02, PACKED-DEV-03
      assert.equal((await ring.read(0n, 512)).status, OK);
    });

    it("answers GET_ID with 20 bytes, or as many as fit", async (t) => {
      const storage = Object.assign(new RamStorage(1024 * 1024), { id: "a name of more than twenty characters" });
      const { backend } = backendFor(t, storage);
      const ring = await frontEndFor(t, backend).start(features | ALL);
      const id = new TextEncoder().encode("a name of more than ");
      assert.deepEqual(await ring.run(BlkRequestType.GET_ID, 0n, { into: 20 }), { status: OK, length: 21, data: id });
      assert.deepEqual((await ring.run(BlkRequestType.GET_ID, 0n, { into: 6 })).data, id.subarray(0, 6));
      const long = await ring.run(BlkRequestType.GET_ID, 0n, { into: 24 });
      assert.deepEqual([long.status, long.length], [OK, 20]);
    });

    it("BLK-DEV-16 a read-only disk offers RO, and answers writes with IOERR and stays as it is", async (t) => {
      const reached: string[] = [];
      const ram = new RamStorage(1024 * 1024);
      ram.write(0, pattern(512));
      const storage: BlockStorage = {
        ...{ capacity: ram.capacity, readOnly: true, id: "read-only" },
        read: (offset, into) => ram.read(offset, into),
        write: () => void reached.push("write"),
        flush: () => undefined,
        discard: () => void reached.push("discard"),
        close: () => ram.close(),
      };
      const { backend } = backendFor(t, storage);
      const front = frontEndFor(t, backend);
      const offered = await front.askU64(VhostUserRequest.GET_FEATURES);
      assert.equal(offered & (RO | DISCARD | WRITE_ZEROES | SECURE_ERASE), RO);
      const ring = await front.start(features | FLUSH | RO);
      assert.equal((await ring.write(0n, new Uint8Array(512))).status, IOERR);
      assert.equal((await ring.segments(BlkRequestType.DISCARD, [0n, 1, 0])).status, UNSUPP);
      assert.deepEqual((await ring.read(0n, 512)).data, pattern(512));
      assert.deepEqual(reached, []);
    });

    it("BLK-DEV-17 BLK-DEV-18 unknown flags, and unmap where it does not belong, are UNSUPP", async (t) => {
      const { backend } = backendFor(t);
      const ring = await frontEndFor(t, backend).start(features | ALL);
      await ring.write(0n, pattern(1024));
      const cases = [
        [BlkRequestType.DISCARD, 1],
        [BlkRequestType.DISCARD, 0x20],
        [BlkRequestType.WRITE_ZEROES, 2],
        [BlkRequestType.WRITE_ZEROES, 0x20],
        [BlkRequestType.WRITE_ZEROES, 0x8000_0001],
        [BlkRequestType.SECURE_ERASE, 1],
        [BlkRequestType.SECURE_ERASE, 0x20],
      ] as const;
      for (const [type, flags] of cases) {
        assert.equal(
          (await ring.segments(type, [0n, 1, 0], [1n, 1, flags])).status,
          UNSUPP,
          `type ${type} flags ${flags}`,
        );
      }
      // Segments in front of the bad one were left alone, too.
      assert.deepEqual((await ring.read(0n, 1024)).data, pattern(1024));
    });

    it("BLK-DEV-19 reads zeroes after WRITE_ZEROES, with and without unmap, several segments", async (t) => {
      const { backend } = backendFor(t);
      const ring = await frontEndFor(t, backend).start(features | ALL);
      for (const unmap of [0, 1]) {
        const data = pattern(512 * 40);
        await ring.write(0n, data);
        const { status } = await ring.segments(
          BlkRequestType.WRITE_ZEROES,
          [1n, 3, unmap],
          [10n, 0, unmap],
          [20n, 17, unmap],
        );
        assert.equal(status, OK);
        data.fill(0, 512, 512 * 4).fill(0, 512 * 20, 512 * 37);
        assert.deepEqual((await ring.read(0n, data.length)).data, data);
      }
    });

    it("discards and erases several segments, and refuses those that leave the disk or are too many or long", async (t) => {
      const { backend } = backendFor(t);
      const ring = await frontEndFor(t, backend).start(features | ALL);
      await ring.write(0n, pattern(4096));
      for (const type of [BlkRequestType.DISCARD, BlkRequestType.WRITE_ZEROES, BlkRequestType.SECURE_ERASE]) {
        assert.equal((await ring.segments(type, [8n, 8, 0], [SECTORS - 1n, 1, 0])).status, OK);
        assert.equal((await ring.segments(type, [0n, 1, 0], [SECTORS - 1n, 2, 0])).status, IOERR);
        assert.equal((await ring.segments(type, [0n, 1, 0], [0xffff_ffff_ffff_ffffn, 1, 0])).status, IOERR);
        assert.equal((await ring.segments(type, [0n, 0xffff_ffff, 0])).status, IOERR);
        const many = Array.from({ length: 17 }, () => [0n, 1, 0] as const);
        assert.equal((await ring.segments(type, ...many)).status, IOERR);
        assert.equal((await ring.run(type, 0n, { out: new Uint8Array(24) })).status, IOERR);
        assert.equal((await ring.run(type, 0n)).status, IOERR);
      }
      assert.deepEqual((await ring.read(0n, 4096)).data, pattern(4096));
    });

    it("completes requests of a slow storage as they finish, not in their order", async (t) => {
      const storage = new SlowStorage();
      t.after(() => storage.release());
      const { backend } = backendFor(t, storage);
      const ring = await frontEndFor(t, backend).start(features | SLOW);
      const requests = [0n, 8n, 16n].map((sector) => ring.request(BlkRequestType.IN, sector, { into: 512 }));
      ring.kick.signal();
      await until(() => storage.calls.length === 3);
      for (const i of [2, 0, 1]) {
        const call = storage.calls.find(({ offset }) => offset === i * 4096);
        call?.finish();
        assert.equal(await ring.finished(requests[i]), 513);
        assert.equal(requests[i].status(), OK);
      }
    });

    it("answers IOERR when the storage fails, at once or later, and tells why", async (t) => {
      const storage = new SlowStorage();
      t.after(() => storage.release());
      const { backend, errors } = backendFor(t, storage);
      const ring = await frontEndFor(t, backend).start(features | SLOW);
      const pending = ring.read(0n, 512);
      await until(() => storage.calls.length === 1);
      storage.finish("read", new Error("the disk is on fire"));
      assert.deepEqual(await pending, { status: IOERR, length: 0, data: new Uint8Array(512).fill(0xee) });
      storage.write = () => {
        throw new Error("and so is the controller");
      };
      assert.equal((await ring.write(0n, new Uint8Array(512))).status, IOERR);
      assert.deepEqual(
        errors.map(({ message }) => message),
        ["the disk is on fire", "and so is the controller"],
      );
      assert.equal(backend.stats.errors, 2);
    });
  });
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

/** Wait, turn by turn, until `condition` holds. */
async function until(condition: () => boolean): Promise<void> {
  for (let i = 0; i < 10_000 && !condition(); i++) await turns(1);
  assert.ok(condition(), "it did not come to that");
}
