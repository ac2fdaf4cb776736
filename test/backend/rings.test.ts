/** The back-end's memory and rings, asked by a front-end that sends raw messages. */

import assert from "node:assert/strict";
import { ftruncateSync, openSync, rmSync } from "node:fs";
import { describe, it } from "node:test";
import { type BlockStorage } from "../../src/backend/index.js";
import {
  BlkFeature,
  BlkRequestType,
  memoryTableCodec,
  singleRegionCodec,
  u64Codec,
  VHOST_USER_F_PROTOCOL_FEATURES,
  VhostUserRequest,
  vringFdCodec,
  vringStateCodec,
} from "../../src/protocol/index.js";
import { closeFd, createMemfd, EventFd, mapShared, unmapShared } from "../../src/sys/index.js";
import { VirtioFeature } from "../../src/virtqueue/index.js";
import { FrontEnd, GUEST, MEMORY_BYTES, REGION, turns, USER } from "./front-end.js";
import { backendFor, frontEndFor, mappings, openFds, pair, pattern, until } from "./support.js";

const { RING_PACKED, EVENT_IDX, INDIRECT_DESC } = VirtioFeature;
const WRITABLE = BlkFeature.FLUSH | BlkFeature.CONFIG_WCE;
const R = VhostUserRequest;
const NO_FD = vringFdCodec.encode({ index: 0, noFd: true });
const WITH_FD = vringFdCodec.encode({ index: 0, noFd: false });

describe("vhost-user back-end: memory", () => {
  const region = (change: Partial<Record<keyof typeof REGION, number | bigint>>): Uint8Array =>
    singleRegionCodec.encode({ ...REGION, ...change });

  const bad: readonly (readonly [name: string, payload: Uint8Array])[] = [
    ["no size", region({ size: 0 })],
    ["a size beyond the file", region({ size: MEMORY_BYTES + 4096 })],
    ["an offset that takes it beyond the file", region({ mmapOffset: 4096 })],
    ["an offset inside a page", region({ mmapOffset: 512, size: 4096 })],
    ["a size of 2^64-1", region({ size: 0xffff_ffff_ffff_ffffn })],
    ["an offset of 2^64-4096", region({ mmapOffset: 0xffff_ffff_ffff_f000n })],
    ["guest addresses that wrap around", region({ guestAddress: 0xffff_ffff_ffff_f000n })],
    ["user addresses that wrap around", region({ userAddress: 0xffff_ffff_ffff_f000n })],
  ];
  for (const [name, payload] of bad) {
    it(`refuses a region with ${name}, and keeps no mapping of it`, async (t) => {
      const { front } = pair(t);
      await front.handshake(0n);
      const before = { fds: openFds(), maps: mappings() };
      assert.equal(await front.ack(R.ADD_MEM_REG, payload, [front.memfd]), 1n);
      assert.equal(
        await front.ack(R.SET_MEM_TABLE, memoryTableCodec.encode([singleRegionCodec.decode(payload)]), [front.memfd]),
        1n,
      );
      assert.deepEqual({ fds: openFds(), maps: mappings() }, before);
    });
  }

  it("refuses regions that overlap in either address space, and what is no memory", async (t) => {
    const { front } = pair(t);
    await front.handshake(0n);
    const before = mappings();
    await front.must(R.ADD_MEM_REG, region({ size: 8192 }), [front.memfd]);
    const far = 0x100_0000;
    const overlaps = [
      region({ size: 4096, guestAddress: GUEST + 4096n, userAddress: USER + BigInt(far) }),
      region({ size: 4096, guestAddress: GUEST + BigInt(far), userAddress: USER + 4096n }),
    ];
    for (const payload of overlaps) assert.equal(await front.ack(R.ADD_MEM_REG, payload, [front.memfd]), 1n);
    // Nothing of a refused region stays: at another user address it can be added.
    const again = region({ size: 4096, guestAddress: GUEST + BigInt(far), userAddress: USER + BigInt(far) });
    await front.must(R.ADD_MEM_REG, again, [front.memfd]);
    await front.must(R.REM_MEM_REG, again);
    const event = EventFd.create();
    assert.equal(
      await front.ack(R.ADD_MEM_REG, region({ size: 4096, guestAddress: 0, userAddress: 0 }), [event.fd]),
      1n,
    );
    event.close();
    const table = memoryTableCodec.encode([REGION, { ...REGION, guestAddress: GUEST + 4096n, userAddress: 0 }]);
    assert.equal(await front.ack(R.SET_MEM_TABLE, table, [front.memfd, front.memfd]), 1n);
    assert.equal(mappings(), before + 1);
    await front.must(R.REM_MEM_REG, region({ size: 8192 }));
    assert.equal(mappings(), before);
  });

  it("takes 64 regions and no more", async (t) => {
    const { front } = pair(t);
    await front.handshake(0n);
    const nth = (i: number): Uint8Array =>
      region({
        size: 4096,
        mmapOffset: i * 4096,
        guestAddress: GUEST + BigInt(i * 8192),
        userAddress: USER + BigInt(i * 8192),
      });
    for (let i = 0; i < 64; i++) await front.must(R.ADD_MEM_REG, nth(i), [front.memfd]);
    assert.equal(await front.ack(R.ADD_MEM_REG, nth(64), [front.memfd]), 1n);
  });

  it("VHU-BE-19 removes a region by addresses and size; one descriptor may come along and is closed", async (t) => {
    const { front } = pair(t);
    await front.handshake(0n);
    const before = { fds: openFds(), maps: mappings() };
    await front.share();
    assert.equal(await front.ack(R.REM_MEM_REG, region({ size: 4096 })), 1n);
    assert.equal(await front.ack(R.REM_MEM_REG, region({ guestAddress: 0 })), 1n);
    assert.equal(await front.ack(R.REM_MEM_REG, region({ userAddress: 0 })), 1n);
    assert.equal(await front.ack(R.REM_MEM_REG, region({}), [front.memfd, front.memfd]), 1n);
    await front.must(R.REM_MEM_REG, region({}), [front.memfd]);
    assert.deepEqual({ fds: openFds(), maps: mappings() }, before);
  });

  it("does not remove the memory of a started ring", async (t) => {
    const { front } = pair(t);
    const ring = await front.start(0n);
    assert.equal(await front.ack(R.REM_MEM_REG, region({})), 1n);
    assert.equal((await ring.read(0n, 512)).status, 0);
    await ring.stop();
    await front.must(R.REM_MEM_REG, region({}));
  });

  it("breaks the ring of a driver that uses memory it has not shared, or shares no more", async (t) => {
    const { front, errors } = pair(t);
    await front.handshake(0n);
    // The rings' memory is one region, the data another, which goes away.
    const half = MEMORY_BYTES / 2;
    const data = region({
      size: half,
      mmapOffset: half,
      guestAddress: GUEST + BigInt(half),
      userAddress: USER + BigInt(half),
    });
    await front.must(R.ADD_MEM_REG, region({ size: half }), [front.memfd]);
    await front.must(R.ADD_MEM_REG, data, [front.memfd]);
    const ring = front.ring();
    await ring.start();
    await ring.enable(1);
    assert.equal((await ring.read(0n, 512)).status, 0);
    await front.must(R.REM_MEM_REG, data);
    ring.request(BlkRequestType.IN, 0n, { into: 512 });
    ring.kick.signal();
    await until(() => errors.length === 1);
    assert.match(errors[0].message, /outside the shared memory/);
  });

  it("exchanges the whole table under running rings, and refuses one without them", async (t) => {
    const { front, backend } = pair(t);
    const ring = await front.start(RING_PACKED);
    await ring.write(0n, pattern(512));
    const before = mappings();
    const elsewhere = { ...REGION, guestAddress: 0n };
    await front.must(R.SET_MEM_TABLE, memoryTableCodec.encode([REGION]), [front.memfd]);
    assert.deepEqual((await ring.read(0n, 512)).data, pattern(512));
    const twice = [REGION, { ...elsewhere, userAddress: 0n }];
    await front.must(R.SET_MEM_TABLE, memoryTableCodec.encode(twice), [front.memfd, front.memfd]);
    assert.deepEqual((await ring.read(0n, 512)).data, pattern(512));
    assert.equal(await front.ack(R.SET_MEM_TABLE, memoryTableCodec.encode([]), []), 1n);
    for (const userAddress of [0x1000n, USER - 8n]) {
      const moved = memoryTableCodec.encode([{ ...REGION, userAddress }]);
      assert.equal(await front.ack(R.SET_MEM_TABLE, moved, [front.memfd]), 1n);
    }
    assert.deepEqual((await ring.read(0n, 512)).data, pattern(512));
    assert.equal(mappings(), before + 1);
    assert.equal(backend.stats.errors, 3);
  });

  it("breaks a ring whose used index is impossible in the memory that replaces the old", async (t) => {
    const { front, errors } = pair(t);
    const ring = await front.start(0n);
    const memfd = createMemfd("test-other", MEMORY_BYTES);
    const other = mapShared(memfd, MEMORY_BYTES);
    new DataView(other).setUint16(ring.driver.place.device + 2, 1000, true);
    await front.must(R.SET_MEM_TABLE, memoryTableCodec.encode([REGION]), [memfd]);
    unmapShared(other);
    closeFd(memfd);
    await until(() => errors.length === 1);
    assert.match(errors[0].message, /used index of 1000/);
    ring.request(BlkRequestType.IN, 0n, { into: 512 });
    ring.kick.signal();
    await turns(20);
    assert.equal(await ring.stop(), 0);
  });

  for (const sealedMemory of [false, true]) {
    it(`${sealedMemory ? "refuses" : "takes"} memory that can shrink ${sealedMemory ? "when told so" : "by default"}`, async (t) => {
      const { backend, errors } = backendFor(t, undefined, { sealedMemory });
      const sealed = frontEndFor(t, backend);
      assert.equal((await (await sealed.start(0n)).read(0n, 512)).status, 0);
      sealed.close();
      // A file of tmpfs has no seals.
      const path = `/dev/shm/virtio-test-${process.pid}.mem`;
      const memfd = openSync(path, "w+");
      rmSync(path);
      ftruncateSync(memfd, MEMORY_BYTES);
      const front = new FrontEnd(backend.path, memfd);
      t.after(() => front.close());
      await front.handshake(0n);
      assert.equal(await front.ack(R.ADD_MEM_REG, region({}), [memfd]), sealedMemory ? 1n : 0n);
      assert.equal(errors.length, sealedMemory ? 1 : 0);
      if (sealedMemory) assert.match(errors[0].message, /shrunk/);
    });
  }

  it("descriptors of memory are not needed after they were mapped", async (t) => {
    const { front } = pair(t);
    await front.handshake(0n);
    const before = openFds();
    await front.share();
    assert.equal(openFds(), before);
  });
});

for (const [format, features] of [
  ["split", INDIRECT_DESC | EVENT_IDX],
  ["packed", RING_PACKED | EVENT_IDX],
] as const) {
  describe(`vhost-user back-end: a ${format} ring`, () => {
    it("VHU-BE-05 VHU-BE-06 starts stopped and disabled; enabled before it starts, it runs when it starts", async (t) => {
      const { front, backend } = pair(t);
      await front.handshake(features);
      await front.share();
      const ring = front.ring();
      const request = ring.request(BlkRequestType.IN, 0n, { into: 512 });
      ring.kick.signal();
      await ring.enable(1);
      await turns(20);
      assert.equal(backend.stats.requests, 0);
      await ring.start();
      assert.equal(await ring.finished(request), 513);
    });

    it("VHU-BE-07 VHU-BE-08 started and disabled: no side effects; requests wait until it is enabled", async (t) => {
      const { front, backend } = pair(t);
      await front.handshake(features | WRITABLE);
      await front.share();
      const ring = front.ring();
      await ring.start();
      const request = ring.request(BlkRequestType.OUT, 0n, { out: pattern(512) });
      ring.kick.signal();
      await turns(20);
      assert.deepEqual([backend.stats.requests, request.status(), ring.isFinished(request)], [0, 0xff, false]);
      await ring.enable(1);
      assert.equal(await ring.finished(request), 1);
      assert.equal(request.status(), 0);
      await ring.enable(0);
      ring.request(BlkRequestType.IN, 0n, { into: 512 });
      ring.kick.signal();
      await turns(20);
      assert.equal(backend.stats.requests, 1);
    });

    it("VHU-BE-10 processes what was queued before the start without any kick", async (t) => {
      const { front } = pair(t);
      await front.handshake(features);
      await front.share();
      const ring = front.ring();
      const requests = [0n, 1n, 2n].map((sector) => ring.request(BlkRequestType.IN, sector, { into: 512 }));
      await ring.start();
      await ring.enable(1);
      for (const request of requests) assert.equal(await ring.finished(request), 513);
    });

    it("VHU-BE-09 VHU-BE-15 stops at GET_VRING_BASE with the right base, and goes on from it", async (t) => {
      const { front, backend } = pair(t);
      const ring = await front.start(features, 8);
      await ring.write(0n, pattern(512));
      for (let i = 0; i < 5; i++) await ring.read(0n, 512);
      const base = await ring.stop();
      // Six chains of three descriptors, in one of eight: packed positions are descriptors.
      assert.equal(base, format === "split" ? 6 : 0x8000_8000 + 0x0002_0002);
      const request = ring.request(BlkRequestType.IN, 0n, { into: 512 });
      ring.kick.signal();
      await turns(20);
      assert.equal(ring.isFinished(request), false);
      assert.equal(await ring.stop(), base); // a stopped ring knows its base, too
      await ring.start(base);
      assert.equal(await ring.finished(request), 513);
      assert.deepEqual(request.data(), pattern(512));
      assert.equal(backend.stats.errors, 0);
    });

    it("VHU-BE-15 GET_VRING_BASE waits for the requests in flight", async (t) => {
      const finish: (() => void)[] = [];
      const slow: BlockStorage = {
        capacity: 1024 * 1024,
        read: () => new Promise((resolve) => finish.push(resolve)),
        write: () => undefined,
        flush: () => undefined,
      };
      const { front } = pair(t, { storage: slow });
      const ring = await front.start(features);
      const request = ring.request(BlkRequestType.IN, 0n, { into: 512 });
      ring.kick.signal();
      await until(() => finish.length === 1);
      const stopped = ring.stop();
      await turns(20);
      ring.request(BlkRequestType.IN, 0n, { into: 512 }); // comes too late
      ring.kick.signal();
      await turns(20);
      assert.ok(front.silent);
      assert.equal(ring.isFinished(request), false);
      for (const resolve of finish) resolve();
      assert.equal(await stopped, format === "split" ? 1 : 0x8003_8003);
      assert.equal(ring.isFinished(request), true);
    });

    it("VHU-BE-12 the call descriptor is exchanged under load, and no completion goes unheard", async (t) => {
      const { front } = pair(t);
      const ring = await front.start(features, 256);
      for (let round = 0; round < 20; round++) {
        const requests = Array.from({ length: 8 }, (_, i) => ring.request(BlkRequestType.IN, BigInt(i), { into: 512 }));
        ring.kick.signal();
        const old = ring.call;
        ring.call = EventFd.create();
        front.send(R.SET_VRING_CALL, WITH_FD, [ring.call.fd]);
        for (const request of requests) assert.equal(await ring.finished(request), 513);
        old.close();
      }
    });

    it("VHU-BE-12 the kick descriptor is exchanged while it runs", async (t) => {
      const { front } = pair(t);
      const ring = await front.start(features);
      const kick = EventFd.create();
      t.after(() => kick.close());
      await front.must(R.SET_VRING_KICK, WITH_FD, [kick.fd]);
      await turns(2000); // it sleeps by now
      const request = ring.request(BlkRequestType.IN, 0n, { into: 512 });
      kick.signal();
      assert.equal(await ring.finished(request), 513);
    });

    it("VHU-BE-13 stopped: nothing is written, nobody notified, and messages are still answered", async (t) => {
      const { front } = pair(t);
      const ring = await front.start(features);
      await ring.read(0n, 512);
      await ring.stop();
      ring.call.drain();
      ring.request(BlkRequestType.IN, 0n, { into: 512 });
      const before = front.bytes.slice();
      for (let i = 0; i < 5; i++) {
        ring.kick.signal();
        await turns(10);
      }
      assert.deepEqual(front.bytes, before);
      assert.equal(ring.call.drain(), false);
      assert.ok(front.silent);
      assert.equal(await front.askU64(R.GET_QUEUE_NUM), 1n);
    });

    it("VHU-BE-33 VQ-DEV-02 VQ-DEV-03 RESET_DEVICE stops and forgets; a new configuration takes effect", async (t) => {
      const { front, backend } = pair(t);
      const ring = await front.start(features);
      await ring.write(0n, pattern(512));
      await front.must(R.RESET_DEVICE);
      ring.request(BlkRequestType.IN, 0n, { into: 512 });
      ring.kick.signal();
      await turns(20);
      assert.equal(backend.stats.requests, 1);
      assert.equal(await front.ack(R.SET_VRING_KICK, WITH_FD, [ring.kick.fd]), 1n); // it has no size any more
      ring.close();
      front.bytes.fill(0);
      await front.must(R.SET_FEATURES, u64Codec.encode(front.features | VHOST_USER_F_PROTOCOL_FEATURES));
      const again = front.ring(0, 16);
      await again.start();
      await again.enable(1);
      assert.deepEqual((await again.read(0n, 512)).data, pattern(512));
    });

    it("refuses to change a started ring, and rings that do not lie in the memory", async (t) => {
      const { front } = pair(t);
      const ring = await front.start(features);
      assert.equal(await front.ack(R.SET_VRING_NUM, vringStateCodec.encode({ index: 0, num: 8 })), 1n);
      assert.equal(await front.ack(R.SET_VRING_BASE, vringStateCodec.encode({ index: 0, num: 8 })), 1n);
      assert.equal(await front.ack(R.SET_VRING_ADDR, ring.address()), 1n);
      const other = u64Codec.encode((front.features ^ EVENT_IDX) | VHOST_USER_F_PROTOCOL_FEATURES);
      assert.equal(await front.ack(R.SET_FEATURES, other), 1n);
      await front.must(R.SET_FEATURES, u64Codec.encode(front.features | VHOST_USER_F_PROTOCOL_FEATURES));
      assert.equal((await ring.read(0n, 512)).status, 0);
      await ring.stop();
      const bad = [
        ring.address({ desc: 8n }),
        ring.address({ avail: 1n }),
        ring.address({ used: 2n }),
        ring.address({ desc: BigInt(MEMORY_BYTES) }),
        ring.address({ avail: -USER }),
        ring.address({ used: BigInt(MEMORY_BYTES) }),
      ];
      const before = openFds();
      for (const payload of bad) {
        await front.must(R.SET_VRING_ADDR, payload);
        assert.equal(await front.ack(R.SET_VRING_KICK, WITH_FD, [ring.kick.fd]), 1n);
      }
      assert.equal(await front.ack(R.SET_VRING_ADDR, ring.address({ flags: 1 })), 1n);
      assert.equal(openFds(), before);
    });

    it("refuses notification descriptors that are no eventfds", async (t) => {
      const { front } = pair(t);
      const ring = await front.start(features);
      const before = openFds();
      for (const request of [R.SET_VRING_KICK, R.SET_VRING_CALL, R.SET_VRING_ERR]) {
        assert.equal(await front.ack(request, WITH_FD, [front.memfd]), 1n);
      }
      assert.equal(openFds(), before);
      assert.equal((await ring.read(0n, 512)).status, 0);
    });

    it("works for a driver that only polls, without a call descriptor", async (t) => {
      const { front } = pair(t);
      const ring = await front.start(features);
      await front.must(R.SET_VRING_CALL, NO_FD);
      const request = ring.request(BlkRequestType.IN, 0n, { into: 512 });
      ring.kick.signal();
      await until(() => ring.isFinished(request));
      assert.equal(request.status(), 0);
    });

    it("SPLIT-DEV-17 is not disturbed by kicks for nothing", async (t) => {
      const { front, backend } = pair(t);
      const ring = await front.start(features);
      for (let i = 0; i < 50; i++) {
        ring.kick.signal();
        await turns(i % 3);
      }
      assert.equal((await ring.read(0n, 512)).status, 0);
      assert.equal(backend.stats.requests, 1);
    });

    it("serves several queues, each on its own, with sizes of their own", async (t) => {
      const { front } = pair(t, { queues: 4 });
      await front.handshake(features | BlkFeature.MQ);
      await front.share();
      const rings = [8, 64, 16, 32].map((size, i) => front.ring(i, size));
      for (const ring of rings) {
        await ring.start();
        await ring.enable(1);
      }
      await Promise.all(rings.map((ring, i) => ring.write(BigInt(i * 100), pattern(1024, i))));
      for (const ring of rings) {
        for (let i = 0; i < 4; i++) assert.deepEqual((await ring.read(BigInt(i * 100), 1024)).data, pattern(1024, i));
      }
      // One is stopped, the others go on.
      await rings[2].stop();
      assert.equal((await rings[3].read(0n, 512)).status, 0);
    });
  });
}
