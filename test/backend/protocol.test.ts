/** The vhost-user protocol of the embedded back-end (VHU-BE rows), by a front-end that can also lie. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, it } from "node:test";
import { type BlockStorage, RamStorage, VhostUserBackend } from "../../src/backend/index.js";
import {
  BlkFeature,
  BlkRequestType,
  configCodec,
  encodeVhostUserMessage,
  memoryTableCodec,
  singleRegionCodec,
  u64Codec,
  VHOST_USER_F_PROTOCOL_FEATURES,
  VhostUserProtocolFeature,
  VhostUserRequest,
  vringFdCodec,
  vringStateCodec,
} from "../../src/protocol/index.js";
import { closeFd, createMemfd, EventFd, mapShared, unmapShared } from "../../src/sys/index.js";
import { VirtioFeature } from "../../src/virtqueue/index.js";
import { ALL_PROTOCOL_FEATURES, MEMORY_BYTES, REGION, soon, turns } from "./front-end.js";
import { backendFor, folderFor, frontEndFor, mappings, openFds, pair, pattern, until } from "./support.js";

const { BACKEND_REQ, INFLIGHT_SHMFD, STATUS } = VhostUserProtocolFeature;
const { RING_PACKED, VERSION_1 } = VirtioFeature;
const WRITABLE = BlkFeature.FLUSH | BlkFeature.CONFIG_WCE;
const R = VhostUserRequest;
const NO_FD = vringFdCodec.encode({ index: 0, noFd: true });
const WITH_FD = vringFdCodec.encode({ index: 0, noFd: false });

describe("vhost-user back-end: messages", () => {
  it("VHU-BE-01 VHU-BE-02 VHU-BE-04 VHU-BE-14 answers before and after negotiation, with the id and flags 0x5", async (t) => {
    const { front } = pair(t, { queues: 5 });
    assert.notEqual((await front.askU64(R.GET_FEATURES)) & VHOST_USER_F_PROTOCOL_FEATURES, 0n);
    const offered = await front.askU64(R.GET_PROTOCOL_FEATURES);
    assert.equal(offered, ALL_PROTOCOL_FEATURES | STATUS | INFLIGHT_SHMFD | BACKEND_REQ);
    front.send(R.SET_PROTOCOL_FEATURES, u64Codec.encode(offered));
    assert.equal(await front.askU64(R.GET_QUEUE_NUM), 5n);
    assert.equal(await front.askU64(R.GET_MAX_MEM_SLOTS), 64n);
    assert.equal(await front.askU64(R.GET_STATUS), 0n);
    const state = vringStateCodec.encode({ index: 4, num: 0 });
    assert.deepEqual(await front.ask(R.GET_VRING_BASE, state), state);
  });

  it("does not offer INFLIGHT_SHMFD where it is told not to, and refuses it then", async (t) => {
    const { front } = pair(t, { inflight: false });
    const offered = await front.askU64(R.GET_PROTOCOL_FEATURES);
    assert.equal(offered, ALL_PROTOCOL_FEATURES | STATUS | BACKEND_REQ);
    front.send(R.SET_PROTOCOL_FEATURES, u64Codec.encode(offered | INFLIGHT_SHMFD));
    await front.hungUp();
  });

  it("does not offer INFLIGHT_SHMFD by itself where the disk ends with the process", async (t) => {
    const memory = new RamStorage(65536);
    const other: BlockStorage = { capacity: 65536, read: () => {}, write: () => {}, flush: () => {} };
    for (const [storage, expected] of [
      [memory, 0n],
      [other, INFLIGHT_SHMFD],
    ] as const) {
      const backend = VhostUserBackend.listen({ path: join(folderFor(t), "disk.sock"), storage });
      t.after(() => backend.close());
      const front = frontEndFor(t, backend);
      assert.equal((await front.askU64(R.GET_PROTOCOL_FEATURES)) & INFLIGHT_SHMFD, expected);
    }
  });

  it("VHU-BE-22 acknowledges what asks for it, and only that; a request with a reply is answered once", async (t) => {
    const { front } = pair(t);
    await front.handshake(0n);
    front.send(R.SET_VRING_NUM, vringStateCodec.encode({ index: 0, num: 8 }));
    await front.must(R.SET_VRING_NUM, vringStateCodec.encode({ index: 0, num: 16 }));
    front.send(R.GET_QUEUE_NUM, new Uint8Array(0), [], 0x9);
    assert.equal(u64Codec.decode(await front.reply(R.GET_QUEUE_NUM)), 1n);
    assert.ok(front.silent);
  });

  it("VHU-BE-17 ignores RESET_OWNER: rings go on", async (t) => {
    const { front } = pair(t);
    const ring = await front.start(0n);
    await front.must(R.RESET_OWNER);
    assert.equal((await ring.read(0n, 512)).status, 0);
    assert.ok(front.silent);
  });

  it("does not acknowledge without REPLY_ACK", async (t) => {
    const { front } = pair(t);
    front.send(R.SET_OWNER, new Uint8Array(0), [], 0x9);
    await front.askU64(R.GET_FEATURES);
    assert.ok(front.silent);
  });

  /** Messages after a handshake that are refused: an acknowledgement of 1, and everything is as before. */
  const refused: readonly (readonly [name: string, request: number, payload: Uint8Array, fds: number])[] = [
    ["a second owner", R.SET_OWNER, new Uint8Array(0), 0],
    ["an owner with a payload", R.SET_OWNER, new Uint8Array(4), 0],
    ["features of 4 bytes", R.SET_FEATURES, new Uint8Array(4), 0],
    ["features not offered", R.SET_FEATURES, u64Codec.encode(VERSION_1 | (1n << 63n)), 0],
    ["features with a descriptor", R.SET_FEATURES, u64Codec.encode(VERSION_1), 1],
    ["a ring that is not there", R.SET_VRING_NUM, vringStateCodec.encode({ index: 1, num: 8 }), 0],
    ["a ring number of 2^32-1", R.SET_VRING_ENABLE, vringStateCodec.encode({ index: 0xffff_ffff, num: 1 }), 0],
    ["a ring of size 0", R.SET_VRING_NUM, vringStateCodec.encode({ index: 0, num: 0 }), 0],
    ["a ring above 32768", R.SET_VRING_NUM, vringStateCodec.encode({ index: 0, num: 32769 }), 0],
    ["a ring state of 12 bytes", R.SET_VRING_BASE, new Uint8Array(12), 0],
    ["a ring address of 32 bytes", R.SET_VRING_ADDR, new Uint8Array(32), 0],
    ["enabling by 2", R.SET_VRING_ENABLE, vringStateCodec.encode({ index: 0, num: 2 }), 0],
    ["a kick before size and addresses", R.SET_VRING_KICK, WITH_FD, 1],
    ["a kick without a descriptor", R.SET_VRING_KICK, NO_FD, 0],
    ["a kick whose descriptor is missing", R.SET_VRING_KICK, WITH_FD, 0],
    ["a kick with two descriptors", R.SET_VRING_KICK, WITH_FD, 2],
    ["a call with a descriptor it denies", R.SET_VRING_CALL, NO_FD, 1],
    ["a call for a ring that is not there", R.SET_VRING_CALL, vringFdCodec.encode({ index: 9, noFd: false }), 1],
    ["a call with reserved bits", R.SET_VRING_CALL, u64Codec.encode(0x200), 1],
    ["VHU-BE-18 a region without a descriptor", R.ADD_MEM_REG, singleRegionCodec.encode(REGION), 0],
    ["VHU-BE-18 a region with two descriptors", R.ADD_MEM_REG, singleRegionCodec.encode(REGION), 2],
    ["VHU-BE-18 a table with fewer descriptors than regions", R.SET_MEM_TABLE, memoryTableCodec.encode([REGION]), 0],
    ["a table with more descriptors than regions", R.SET_MEM_TABLE, memoryTableCodec.encode([]), 1],
    ["a table of 9 regions", R.SET_MEM_TABLE, Uint8Array.from({ length: 8 + 9 * 32 }, (_, i) => (i === 0 ? 9 : 0)), 0],
    ["removing a region that is not there", R.REM_MEM_REG, singleRegionCodec.encode(REGION), 0],
    ["VHU-BE-23 a back-end channel without the feature", R.SET_BACKEND_REQ_FD, new Uint8Array(0), 1],
    ["VHU-BE-23 an MTU", R.NET_SET_MTU, u64Codec.encode(1500), 0],
    ["a log descriptor", R.SET_LOG_FD, new Uint8Array(0), 1],
    ["a status without the feature", R.SET_STATUS, u64Codec.encode(1), 0],
    ["the postcopy of a virtual machine", R.POSTCOPY_LISTEN, new Uint8Array(0), 0],
    ["a request that is not known", 99, new Uint8Array(16), 0],
    ["a request 0", 0, new Uint8Array(0), 0],
  ];
  for (const [name, request, payload, count] of refused) {
    it(`refuses ${name}, closes its descriptors and goes on`, async (t) => {
      const { front, errors, backend } = pair(t);
      await front.handshake(0n);
      const before = openFds();
      const fds = Array.from({ length: count }, () => EventFd.create());
      assert.equal(
        await front.ack(
          request,
          payload,
          fds.map(({ fd }) => fd),
        ),
        1n,
      );
      for (const fd of fds) fd.close();
      assert.equal(openFds(), before);
      assert.equal(errors.length, 1);
      assert.equal(backend.stats.errors, 1);
      assert.equal(await front.askU64(R.GET_QUEUE_NUM), 1n);
    });
  }

  /** Bytes that end the connection: nothing sensible can follow. */
  const fatal: readonly (readonly [name: string, bytes: Uint8Array])[] = [
    ["a message of version 2", encodeVhostUserMessage(R.GET_FEATURES, 0x2)],
    ["a message of version 0", encodeVhostUserMessage(R.GET_FEATURES, 0x0)],
    ["a reply", encodeVhostUserMessage(R.GET_FEATURES, 0x5)],
    ["unknown flags", encodeVhostUserMessage(R.GET_FEATURES, 0x11)],
    ["a payload above the limit", Uint8Array.of(1, 0, 0, 0, 1, 0, 0, 0, 1, 0x10, 0, 0)],
    ["a payload of 2^32-1", Uint8Array.of(1, 0, 0, 0, 1, 0, 0, 0, 255, 255, 255, 255)],
    ["a refused message that asks for no acknowledgement", encodeVhostUserMessage(99, 0x1)],
    [
      "VHU-BE-25 in-band notifications without the channel",
      encodeVhostUserMessage(R.SET_PROTOCOL_FEATURES, 0x9, u64Codec.encode(0x4008)),
    ],
    ["protocol features not offered", encodeVhostUserMessage(R.SET_PROTOCOL_FEATURES, 0x9, u64Codec.encode(1n << 21n))],
    [
      "a request whose own reply is impossible",
      encodeVhostUserMessage(R.GET_VRING_BASE, 0x9, vringStateCodec.encode({ index: 7, num: 0 })),
    ],
    ["an in-flight region without the feature", encodeVhostUserMessage(R.GET_INFLIGHT_FD, 0x9, new Uint8Array(24))],
    ["GET_FEATURES with a payload", encodeVhostUserMessage(R.GET_FEATURES, 0x1, new Uint8Array(8))],
  ];
  for (const [name, bytes] of fatal) {
    it(`VHU-BE-03 hangs up after ${name}, and serves the next client`, async (t) => {
      const { front, backend, errors } = pair(t);
      await front.handshake(0n);
      front.sendBytes(bytes);
      await front.hungUp();
      assert.equal(errors.length, 1);
      front.close();
      const next = frontEndFor(t, backend);
      assert.deepEqual((await (await next.start(WRITABLE)).read(0n, 512)).status, 0);
    });
  }

  it("needs the protocol feature that a request belongs to", async (t) => {
    const { backend } = backendFor(t);
    for (const request of [R.GET_QUEUE_NUM, R.GET_MAX_MEM_SLOTS, R.GET_STATUS, R.RESET_DEVICE]) {
      const front = frontEndFor(t, backend);
      await front.askU64(R.GET_FEATURES);
      front.send(request);
      await front.hungUp();
      front.close();
    }
  });

  it("reads messages that come byte by byte, and several at once", async (t) => {
    const { front } = pair(t);
    for (const byte of encodeVhostUserMessage(R.GET_FEATURES, 1)) {
      front.sendBytes(Uint8Array.of(byte));
      await turns(2);
    }
    await front.reply(R.GET_FEATURES);
    const one = encodeVhostUserMessage(R.GET_PROTOCOL_FEATURES, 1);
    const many = new Uint8Array(one.length * 100);
    for (let i = 0; i < 100; i++) many.set(one, i * one.length);
    front.sendBytes(many);
    for (let i = 0; i < 100; i++) await front.reply(R.GET_PROTOCOL_FEATURES);
  });

  for (let length = 1; length < 20; length++) {
    it(`is not disturbed by a client that hangs up after ${length} bytes of SET_FEATURES`, async (t) => {
      const { backend, errors } = backendFor(t);
      const before = openFds();
      const front = frontEndFor(t, backend);
      await front.askU64(R.GET_FEATURES);
      const fd = EventFd.create();
      front.sendBytes(encodeVhostUserMessage(R.SET_FEATURES, 1, new Uint8Array(8)).subarray(0, length), [fd.fd]);
      fd.close();
      front.close();
      await until(() => errors.length === 1);
      assert.match(errors[0].message, /hung up in the middle of/);
      await until(() => openFds() === before);
      await frontEndFor(t, backend).askU64(R.GET_FEATURES);
    });
  }

  it("hangs up when descriptors come in the middle of a message", async (t) => {
    const { backend } = backendFor(t);
    const bytes = encodeVhostUserMessage(R.SET_VRING_CALL, 1, WITH_FD);
    const before = openFds();
    for (const length of [1, 11, 12, 13]) {
      const front = frontEndFor(t, backend);
      front.sendBytes(bytes.subarray(0, length));
      await turns(20); // in one piece nobody could tell
      const fd = EventFd.create();
      front.sendBytes(bytes.subarray(length), [fd.fd]);
      fd.close();
      await front.hungUp();
      front.close();
      await until(() => openFds() === before);
    }
  });

  it("a client that does not take its replies harms nobody, and the back-end can close", async (t) => {
    const { backend, front } = pair(t);
    const one = encodeVhostUserMessage(R.GET_FEATURES, 1);
    const many = new Uint8Array(one.length * 1000);
    for (let i = 0; i < 1000; i++) many.set(one, i * one.length);
    // Send until neither side takes more: the replies fill one direction, the requests then the other.
    await assert.rejects(async () => {
      for (;;) {
        front.sendBytes(many);
        await turns(20);
      }
    });
    await soon(backend.close(), "the end of the back-end");
  });
});

describe("vhost-user back-end: config space and status", () => {
  const get = (offset: number, length: number, flags = 0): Uint8Array =>
    configCodec.encode({ offset, flags, data: new Uint8Array(length) });

  it("VHU-BE-20 answers GET_CONFIG with as many bytes, and with none what it cannot answer", async (t) => {
    const { front } = pair(t);
    await front.handshake(0n);
    const whole = configCodec.decode(await front.ask(R.GET_CONFIG, get(0, 96))).data;
    assert.equal(whole.length, 96);
    const part = configCodec.decode(await front.ask(R.GET_CONFIG, get(20, 4, 1)));
    assert.deepEqual(part, { offset: 20, flags: 1, data: whole.subarray(20, 24) });
    for (const [offset, length] of [
      [0, 97],
      [96, 1],
      [0xffff_ffff, 1],
      [0, 0],
      [0, 256],
    ] as const) {
      assert.equal((await front.ask(R.GET_CONFIG, get(offset, length))).length, 0, `${length} bytes at ${offset}`);
    }
    front.send(R.GET_CONFIG, get(0, 60).subarray(0, 40));
    await front.hungUp();
  });

  it("VHU-BE-21 SET_CONFIG writes writeback and nothing else", async (t) => {
    const { front } = pair(t);
    await front.handshake(WRITABLE);
    const set = (offset: number, data: readonly number[], flags = 0): Promise<bigint> =>
      front.ack(R.SET_CONFIG, configCodec.encode({ offset, flags, data: Uint8Array.from(data) }));
    const before = await front.ask(R.GET_CONFIG, get(0, 96));
    const bad: readonly (readonly [number, readonly number[]])[] = [
      [0, [1, 0, 0, 0, 0, 0, 0, 0]],
      [32, [1, 1]],
      [31, [0, 0]],
      [33, [1]],
      [32, []],
      [32, [2]],
      [96, [0]],
      [0xffff_ffff, [0]],
    ];
    for (const [offset, data] of bad) assert.equal(await set(offset, data), 1n, `${data.length} bytes at ${offset}`);
    assert.equal(await set(32, [0], 2), 1n);
    assert.deepEqual(await front.ask(R.GET_CONFIG, get(0, 96)), before);
    assert.equal(await set(32, [0]), 0n);
    assert.equal(configCodec.decode(await front.ask(R.GET_CONFIG, get(32, 1))).data[0], 0);
  });

  it("SET_CONFIG needs CONFIG_WCE", async (t) => {
    const { front } = pair(t);
    await front.handshake(BlkFeature.FLUSH);
    assert.equal(
      await front.ack(R.SET_CONFIG, configCodec.encode({ offset: 32, flags: 0, data: Uint8Array.of(0) })),
      1n,
    );
  });

  it("BASIC-DEV-01 BASIC-DEV-08 BASIC-DEV-09 with STATUS nothing is processed before DRIVER_OK, nor after a reset, which reads as 0", async (t) => {
    const { front, backend } = pair(t);
    await front.handshake(WRITABLE, ALL_PROTOCOL_FEATURES | STATUS);
    await front.share();
    const ring = front.ring();
    await ring.start();
    await ring.enable(1);
    await front.must(R.SET_STATUS, u64Codec.encode(1 | 2 | 8));
    assert.equal(await front.askU64(R.GET_STATUS), 11n);
    const request = ring.request(BlkRequestType.IN, 0n, { into: 512 });
    ring.kick.signal();
    await turns(20);
    assert.equal(backend.stats.requests, 0);
    await front.must(R.SET_STATUS, u64Codec.encode(15));
    assert.equal(await ring.finished(request), 513);
    assert.equal(await front.ack(R.SET_STATUS, u64Codec.encode(256)), 1n);
    await front.must(R.SET_STATUS, u64Codec.encode(0));
    assert.equal(await front.askU64(R.GET_STATUS), 0n);
    ring.call.drain();
    const late = ring.request(BlkRequestType.IN, 0n, { into: 512 });
    const asked = front.bytes.slice();
    ring.kick.signal();
    await turns(20);
    assert.equal(backend.stats.requests, 1);
    assert.equal(late.status(), 0xff);
    assert.deepEqual(front.bytes, asked, "the memory of the queue was written to");
    assert.equal(ring.call.drain(), false, "it was notified");
  });

  it("BASIC-DEV-05 leaves FEATURES_OK clear when no features were agreed", async (t) => {
    const { front } = pair(t);
    front.send(R.SET_PROTOCOL_FEATURES, u64Codec.encode(STATUS | VhostUserProtocolFeature.REPLY_ACK));
    await front.must(R.SET_STATUS, u64Codec.encode(1 | 2 | 8));
    assert.equal(await front.askU64(R.GET_STATUS), 3n);
  });

  it("BASIC-DEV-02 tells a broken ring by NEEDS_RESET and by the error descriptor, until it is reset", async (t) => {
    const { front, errors } = pair(t);
    await front.handshake(0n, ALL_PROTOCOL_FEATURES | STATUS);
    await front.share();
    const ring = front.ring();
    const error = EventFd.create();
    t.after(() => error.close());
    await front.must(R.SET_VRING_ERR, WITH_FD, [error.fd]);
    await ring.start();
    await ring.enable(1);
    await front.must(R.SET_STATUS, u64Codec.encode(15));
    ring.driver.view.setUint16(ring.driver.place.driver + 2, 1000, true);
    ring.kick.signal();
    await until(() => errors.length === 1);
    assert.match(errors[0].message, /1000 chains at once/);
    assert.equal(error.drain(), true);
    assert.equal(await front.askU64(R.GET_STATUS), 15n | 64n);
    await front.must(R.RESET_DEVICE);
    assert.equal(await front.askU64(R.GET_STATUS), 0n);
  });
});

describe("vhost-user back-end: front-ends of other kinds", () => {
  it("VHU-BE-11 without protocol features rings are enabled by SET_FEATURES, and SET_MEM_TABLE shares the memory", async (t) => {
    const { front } = pair(t);
    front.features = VERSION_1;
    front.send(R.SET_OWNER);
    front.send(R.SET_FEATURES, u64Codec.encode(VERSION_1));
    front.send(R.SET_MEM_TABLE, memoryTableCodec.encode([REGION]), [front.memfd]);
    const ring = front.ring();
    front.send(R.SET_VRING_NUM, vringStateCodec.encode({ index: 0, num: 64 }));
    front.send(R.SET_VRING_BASE, vringStateCodec.encode({ index: 0, num: 0 }));
    front.send(R.SET_VRING_ADDR, ring.address());
    front.send(R.SET_VRING_CALL, WITH_FD, [ring.call.fd]);
    front.send(R.SET_VRING_KICK, WITH_FD, [ring.kick.fd]);
    assert.equal((await ring.read(0n, 512)).status, 0);
  });

  it("takes one client after another, with the same disk and a fresh device", async (t) => {
    const { backend } = backendFor(t);
    const before = { fds: openFds(), maps: mappings() };
    for (let i = 0; i < 20; i++) {
      const front = frontEndFor(t, backend);
      const ring = await front.start(i % 2 === 0 ? RING_PACKED : 0n);
      if (i > 0) assert.deepEqual((await ring.read(0n, 512)).data, pattern(512, i - 1));
      await ring.write(0n, pattern(512, i));
      // Some leave politely, some in the middle of a request.
      if (i % 3 === 0) await ring.stop();
      else ring.request(BlkRequestType.IN, 0n, { into: 512 });
      ring.kick.signal();
      front.close();
    }
    await until(() => mappings() <= before.maps + 1 && openFds() <= before.fds);
    assert.ok(backend.stats.connections >= 20);
  });

  it("lets a second client wait for its turn", async (t) => {
    const { backend, front } = pair(t);
    await front.askU64(R.GET_FEATURES);
    const second = frontEndFor(t, backend);
    second.send(R.GET_FEATURES);
    await turns(20);
    assert.ok(second.silent);
    front.close();
    await second.reply(R.GET_FEATURES);
  });

  it("a client that leaves with requests in flight leaves its memory mapped until they are finished", async (t) => {
    const finish: (() => void)[] = [];
    const seen: number[] = [];
    const slow: BlockStorage = {
      capacity: 1024 * 1024,
      read: (_offset, into) =>
        new Promise((resolve) => {
          finish.push(() => {
            seen.push(into.length); // 0 when its memory was unmapped
            resolve();
          });
        }),
      write: () => undefined,
      flush: () => undefined,
    };
    const { backend, front } = pair(t, { storage: slow });
    const ring = await front.start(0n);
    ring.request(BlkRequestType.IN, 0n, { into: 512 });
    ring.kick.signal();
    await until(() => finish.length === 1);
    front.close();
    await turns(50);
    const next = frontEndFor(t, backend);
    next.send(R.GET_FEATURES);
    await turns(50);
    assert.ok(next.silent);
    for (const resolve of finish) resolve();
    await next.reply(R.GET_FEATURES);
    assert.deepEqual(seen, [512]);
  });
});

describe("a back-end's life", () => {
  it("close finishes what is in flight, flushes, closes the storage, removes the socket; and twice is once", async (t) => {
    const log: string[] = [];
    const storage: BlockStorage = {
      capacity: 512,
      read: async () => {
        await turns(20);
        log.push("read");
      },
      write: () => undefined,
      flush: () => void log.push("flush"),
      close: () => void log.push("close"),
    };
    const { backend, front } = pair(t, { storage });
    const ring = await front.start(0n);
    const request = ring.request(BlkRequestType.IN, 0n, { into: 512 });
    ring.kick.signal();
    await until(() => backend.stats.requests === 1);
    await Promise.all([backend.close(), backend.close()]);
    assert.deepEqual(log, ["read", "flush", "close"]);
    assert.ok(ring.isFinished(request));
    assert.throws(() => readFileSync(backend.path), { code: "ENOENT" });
    await front.hungUp();
  });

  it("leaves no descriptor and no mapping, 200 times", async (t) => {
    const one = async (): Promise<void> => {
      const { backend } = backendFor(t, new RamStorage(65536));
      const front = frontEndFor(t, backend);
      const ring = await front.start(RING_PACKED);
      await ring.write(0n, pattern(512));
      front.close();
      await backend.close();
    };
    await one();
    const before = { fds: openFds(), maps: mappings() };
    for (let i = 0; i < 200; i++) await one();
    assert.deepEqual({ fds: openFds(), maps: mappings() }, before);
  });

  it("refuses wrong options, and a path where somebody listens", async (t) => {
    const { backend } = pair(t);
    const storage = new RamStorage(65536);
    t.after(() => storage.close());
    const path = `${backend.path}2`;
    const listen = (options: object) => () => VhostUserBackend.listen({ path, storage, ...options });
    assert.throws(listen({ queues: 0 }), { name: "RangeError" });
    assert.throws(listen({ queues: 257 }), { name: "RangeError" });
    assert.throws(listen({ blockSize: 100 }), { name: "RangeError" });
    assert.throws(listen({ blockSize: 1536 }), { name: "RangeError" });
    assert.throws(listen({ blockSize: 131072 }), { name: "RangeError" });
    const odd = { capacity: 1536, read: () => undefined, write: () => undefined, flush: () => undefined };
    assert.throws(listen({ storage: odd, blockSize: 1024 }), {
      name: "RangeError",
      message: /multiple of the block size/,
    });
    assert.throws(listen({ packed: 1 }), { name: "TypeError" });
    assert.throws(listen({ sealedMemory: "yes" }), { name: "TypeError" });
    assert.throws(listen({ inflight: 1 }), { name: "TypeError" });
    assert.throws(listen({ onError: 1 }), { name: "TypeError" });
    assert.throws(listen({ Packed: true }), { name: "TypeError", message: /"packed"/ });
    assert.throws(listen({ storage: { capacity: 511 } }), { name: "RangeError" });
    assert.throws(listen({ storage: { capacity: 512 } }), { name: "TypeError", message: /storage.read/ });
    assert.throws(listen({ storage: null }), { name: "TypeError" });
    assert.throws(listen({ path: "" }), { name: "RangeError" });
    assert.throws(listen({ path: backend.path }), { code: "ERR_VIRTIO_SYSCALL", message: /EADDRINUSE/ });
  });

  it("maps memory that the front-end unmapped already", async (t) => {
    const memfd = createMemfd("test-gone", MEMORY_BYTES);
    unmapShared(mapShared(memfd, MEMORY_BYTES));
    const { front } = pair(t);
    await front.handshake(0n);
    await front.must(R.ADD_MEM_REG, singleRegionCodec.encode(REGION), [memfd]);
    closeFd(memfd);
  });
});
