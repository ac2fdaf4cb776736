/** virtio-blk requests on the embedded back-end (BLK-DEV rows), over a real connection and both ring formats. */

import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { type BlockStorage, RamStorage } from "../../src/backend/index.js";
import { BlkFeature, BlkRequestType, VhostUserRequest } from "../../src/protocol/index.js";
import { VirtioFeature } from "../../src/virtqueue/index.js";
import type { Request } from "./front-end.js";
import { GUEST } from "./front-end.js";
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

const FORMATS = [
  ["split", INDIRECT_DESC | EVENT_IDX],
  ["split, plain", 0n],
  ["packed", RING_PACKED | INDIRECT_DESC | EVENT_IDX],
  ["packed, plain", RING_PACKED],
] as const;

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
