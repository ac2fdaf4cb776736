/** Front-ends and drivers that mean harm: each gets an error or nothing, and the next one is served. */

import assert from "node:assert/strict";
import { describe, it, type TestContext } from "node:test";
import { RamStorage, type VhostUserBackend } from "../../src/backend/index.js";
import {
  BlkFeature,
  BlkRequestType,
  encodeVhostUserMessage,
  inflightCodec,
  singleRegionCodec,
  VHOST_USER_F_PROTOCOL_FEATURES,
  VhostUserProtocolFeature,
  VhostUserRequest as R,
} from "../../src/protocol/index.js";
import { EventFd } from "../../src/sys/index.js";
import { VirtioFeature } from "../../src/virtqueue/index.js";
import { ALL_PROTOCOL_FEATURES, FrontEnd, GUEST, MEMORY_BYTES, REGION, turns } from "./front-end.js";
import { backendFor, frontEndFor, mappings, openFds, pair, pattern, until } from "./support.js";

const { BACKEND_REQ, INFLIGHT_SHMFD, STATUS } = VhostUserProtocolFeature;
const PROTOCOL = ALL_PROTOCOL_FEATURES | BACKEND_REQ | INFLIGHT_SHMFD | STATUS;
const FORMATS = [
  ["split", VirtioFeature.INDIRECT_DESC | VirtioFeature.EVENT_IDX],
  ["packed", VirtioFeature.RING_PACKED | VirtioFeature.INDIRECT_DESC],
] as const;

async function servesTheNext(t: TestContext, backend: VhostUserBackend): Promise<void> {
  const next = frontEndFor(t, backend);
  assert.equal((await (await next.start(0n)).read(0n, 512)).status, 0);
  next.close();
}

describe("hostile front-ends", () => {
  it("VHU-BE-03 no message of any kind, size or number of descriptors does harm", async (t) => {
    const { backend } = backendFor(t);
    const before = { fds: openFds(), maps: mappings() };
    const fd = EventFd.create();
    let front = new FrontEnd(backend.path);
    await front.handshake(0n, PROTOCOL);
    const sizes = [0, 1, 4, 7, 8, 9, 12, 16, 20, 23, 24, 25, 32, 39, 40, 41, 72, 4096];
    for (let request = 0; request <= 46; request++) {
      for (const [i, size] of sizes.entries()) {
        const payload = new Uint8Array(size).fill(i % 3 === 0 ? 0xff : i % 3 === 1 ? 0 : 1);
        const fds = Array.from({ length: (request + i) % 3 }, () => fd.fd);
        // An answer to it or none, an end or none: it may not be silent to the question behind it.
        try {
          front.send(request, payload, fds, 0x9);
          front.send(R.GET_FEATURES);
        } catch {
          // hung up in between
        }
        if (await isOver(front)) {
          front.close();
          front = new FrontEnd(backend.path);
          await front.handshake(0n, PROTOCOL);
        }
      }
    }
    front.close();
    fd.close();
    await servesTheNext(t, backend);
    await until(() => openFds() <= before.fds && mappings() <= before.maps + 1);
  });

  for (const [name, bytes] of [
    ["ADD_MEM_REG", encodeVhostUserMessage(R.ADD_MEM_REG, 9, singleRegionCodec.encode(REGION))],
    [
      "SET_INFLIGHT_FD",
      encodeVhostUserMessage(
        R.SET_INFLIGHT_FD,
        9,
        inflightCodec.encode({ mmapSize: 4096, mmapOffset: 0, numQueues: 1, queueSize: 8 }),
      ),
    ],
  ] as const) {
    it(`${name} cut at every byte leaves nothing behind`, async (t) => {
      const { backend, errors } = backendFor(t);
      const before = { fds: openFds(), maps: mappings() };
      for (let length = 1; length < bytes.length; length++) {
        const front = new FrontEnd(backend.path);
        await front.handshake(0n, PROTOCOL);
        front.sendBytes(bytes.subarray(0, length), [front.memfd]);
        front.close();
        await until(() => errors.length === length);
      }
      await until(() => openFds() <= before.fds && mappings() <= before.maps);
      await servesTheNext(t, backend);
    });
  }

  /** Regions beside one of the whole memory, whose both addresses are taken. */
  const MIB = 1024 * 1024;
  const far = 1n << 45n;
  const regions: readonly (readonly [name: string, change: Partial<Record<keyof typeof REGION, number | bigint>>])[] = [
    ["overlaps by its first page", { guestAddress: GUEST + BigInt(MEMORY_BYTES) - 4096n, userAddress: far }],
    ["overlaps by its last page", { guestAddress: GUEST - BigInt(MIB) + 4096n, userAddress: far }],
    ["lies inside", { guestAddress: GUEST + 4096n, userAddress: far }],
    ["overlaps in user space only", { guestAddress: far }],
    ["is empty", { guestAddress: far, userAddress: far, size: 0 }],
    ["ends behind its file", { guestAddress: far, userAddress: far, mmapOffset: MEMORY_BYTES - MIB + 4096 }],
    ["begins in the middle of a page", { guestAddress: far, userAddress: far, mmapOffset: 100 }],
    [
      "has an offset and size whose sum is 2^64",
      { guestAddress: far, userAddress: far, mmapOffset: (1n << 64n) - BigInt(MIB) },
    ],
    ["has a size of 2^64 - 1", { guestAddress: far, userAddress: far, size: (1n << 64n) - 1n }],
    ["ends behind the address space", { guestAddress: (1n << 64n) - 4096n, userAddress: far }],
    ["ends behind the user address space", { guestAddress: far, userAddress: (1n << 64n) - 4096n }],
  ];
  for (const [name, change] of regions) {
    it(`a region that ${name} is refused, and the memory stays as it was`, async (t) => {
      const { front } = pair(t);
      const ring = await front.start(0n);
      const before = { fds: openFds(), maps: mappings() };
      const payload = singleRegionCodec.encode({ ...REGION, size: MIB, ...change });
      assert.equal(await front.ack(R.ADD_MEM_REG, payload, [front.memfd]), 1n);
      assert.deepEqual({ fds: openFds(), maps: mappings() }, before);
      assert.equal((await ring.read(0n, 512)).status, 0);
    });
  }
});

for (const [format, features] of FORMATS) {
  describe(`hostile drivers on a ${format} ring`, () => {
    it("SPLIT-DEV-03 PACKED-DEV-04 what is writable is not read: neither header nor data nor segments", async (t) => {
      const storage = new RamStorage(1024 * 1024);
      storage.write(0, pattern(4096));
      const { front } = pair(t, { storage });
      const ring = await front.start(features | BlkFeature.DISCARD | BlkFeature.WRITE_ZEROES);
      const types = [
        BlkRequestType.OUT,
        BlkRequestType.DISCARD,
        BlkRequestType.WRITE_ZEROES,
        BlkRequestType.SECURE_ERASE,
      ];
      for (const type of types) await ring.run(type, 0n, { into: 512 });
      // A chain that the device may only write: a whole request of zeroes would be a read.
      const at = ring.room(1024);
      front.bytes.fill(0, at, at + 1024);
      const id = ring.driver.add([{ address: GUEST + BigInt(at), length: 1024, writable: true }]);
      ring.driver.publish();
      ring.kick.signal();
      await ring.finished({ id, status: () => 0, data: () => new Uint8Array(0) });
      assert.deepEqual(
        [...front.bytes.subarray(at, at + 1023)],
        Array.from({ length: 1023 }, () => 0),
      );
      assert.equal(front.bytes[at + 1023], 1);
      const kept = new Uint8Array(4096);
      storage.read(0, kept);
      assert.deepEqual(kept, pattern(4096));
    });

    for (const area of ["descriptors", "driver", "device"] as const) {
      for (const [what, offset] of [
        ["the data", 0],
        ["the status", 512],
      ] as const) {
        it(`${what} of a read lie in its own ${area} area: harm for that driver only`, async (t) => {
          const { backend, front } = pair(t);
          const ring = await front.start(features, 16);
          const header = ring.room(16);
          front.bytes.fill(0, header, header + 16);
          const place = ring.driver.place[area];
          const room = ring.room(513);
          const target = (at: number): bigint => GUEST + BigInt(what === "the data" ? place : at);
          ring.driver.add([
            { address: GUEST + BigInt(header), length: 16, writable: false },
            { address: target(room), length: 512, writable: true },
            { address: offset === 0 ? GUEST + BigInt(room) : GUEST + BigInt(place), length: 1, writable: true },
          ]);
          ring.driver.publish();
          ring.kick.signal();
          await until(() => backend.stats.requests > 0);
          for (let i = 0; i < 5; i++) {
            ring.kick.signal();
            await turns(5);
          }
          front.close();
          await servesTheNext(t, backend);
        });
      }
    }

    it("segments of the largest numbers are refused and change nothing", async (t) => {
      const storage = new RamStorage(1024 * 1024);
      storage.write(0, pattern(4096));
      const { front } = pair(t, { storage });
      const ring = await front.start(features | BlkFeature.DISCARD | BlkFeature.WRITE_ZEROES | BlkFeature.SECURE_ERASE);
      for (const type of [BlkRequestType.DISCARD, BlkRequestType.WRITE_ZEROES, BlkRequestType.SECURE_ERASE]) {
        for (const sector of [0n, 1n, 2047n, 2048n, (1n << 53n) - 1n, 1n << 55n, (1n << 64n) - 1n]) {
          for (const sectors of [0xffff_ffff, 0x8000_0000, 2 ** 23, 2049]) {
            assert.equal((await ring.segments(type, [sector, sectors, 0])).status, 1);
            ring.rewind();
          }
        }
      }
      const kept = new Uint8Array(4096);
      storage.read(0, kept);
      assert.deepEqual(kept, pattern(4096));
    });
  });
}

describe("what is offered", () => {
  it("BASIC-DEV-04 BASIC-DEV-06 is what is implemented, and nothing without its prerequisite", async (t) => {
    const { INDIRECT_DESC, EVENT_IDX, RING_PACKED, VERSION_1 } = VirtioFeature;
    const { FLUSH, CONFIG_WCE, MQ, SEG_MAX, BLK_SIZE, DISCARD, WRITE_ZEROES, SECURE_ERASE } = BlkFeature;
    const { front } = pair(t);
    const offered = await front.askU64(R.GET_FEATURES);
    const ring = INDIRECT_DESC | EVENT_IDX | RING_PACKED | VERSION_1;
    const blk = FLUSH | CONFIG_WCE | MQ | SEG_MAX | BLK_SIZE | DISCARD | WRITE_ZEROES | SECURE_ERASE;
    assert.equal(offered, ring | blk | VHOST_USER_F_PROTOCOL_FEATURES);
  });
});

/** Whether the back-end hung up; otherwise everything it sent is read, up to the answer to GET_FEATURES. */
async function isOver(front: FrontEnd): Promise<boolean> {
  try {
    for (;;) if ((await front.anyReply()) === R.GET_FEATURES) return false;
  } catch {
    return true;
  }
}
