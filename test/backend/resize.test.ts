/** The size of a disk changes while it is in use, and the driver hears of it. */

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { statSync, truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, it, type TestContext } from "node:test";
import { fileURLToPath } from "node:url";
import { type BlockStorage, FileStorage, RamStorage } from "../../src/backend/index.js";
import { BlockDevice, openBlock, VhostUser } from "../../src/index.js";
import {
  BlkRequestType,
  configCodec,
  encodeVhostUserMessage,
  u64Codec,
  VhostUserBackendRequest,
  VhostUserProtocolFeature,
  VhostUserRequest as R,
} from "../../src/protocol/index.js";
import { closeFd, receiveMessage, sendMessage, socketPair } from "../../src/sys/index.js";
import { ALL_PROTOCOL_FEATURES, type FrontEnd, soon, turns } from "./front-end.js";
import { backendFor, folderFor, frontEndFor, openFds, pair, pattern, until } from "./support.js";

const MIB = 1024 * 1024;
const { BACKEND_REQ, REPLY_ACK, STATUS } = VhostUserProtocolFeature;
const CHANGE = VhostUserBackendRequest.CONFIG_CHANGE_MSG;

function imageFor(t: TestContext, bytes = MIB): string {
  const path = join(folderFor(t), "disk.img");
  writeFileSync(path, new Uint8Array(bytes));
  return path;
}

/** A ring, and the front-end's end of the channel. */
async function listening(t: TestContext, front: FrontEnd, protocol = ALL_PROTOCOL_FEATURES | BACKEND_REQ) {
  const [ours, theirs] = socketPair();
  t.after(() => closeFd(ours));
  await front.handshake(0n, protocol);
  if ((protocol & REPLY_ACK) !== 0n) await front.must(R.SET_BACKEND_REQ_FD, new Uint8Array(0), [theirs]);
  else front.send(R.SET_BACKEND_REQ_FD, new Uint8Array(0), [theirs]);
  closeFd(theirs);
  await front.share();
  const ring = front.ring();
  await ring.start();
  await ring.enable(1);
  return { ring, channel: ours };
}

/** What came by the channel so far. */
function heard(channel: number): Uint8Array {
  const bytes = new Uint8Array(256);
  const fds: number[] = [];
  const count = receiveMessage(channel, bytes, fds);
  assert.deepEqual(fds, []);
  return bytes.subarray(0, Math.max(0, count));
}

function answer(channel: number, value: number): void {
  const bytes = encodeVhostUserMessage(CHANGE, 5, u64Codec.encode(value));
  assert.equal(sendMessage(channel, bytes, []), bytes.length);
}

async function capacity(front: FrontEnd): Promise<bigint> {
  const reply = await front.ask(R.GET_CONFIG, configCodec.encode({ offset: 0, flags: 0, data: new Uint8Array(8) }));
  return new DataView(configCodec.decode(reply).data.slice().buffer).getBigUint64(0, true) * 512n;
}

describe("a disk that changes its size", () => {
  for (const kind of ["memory", "file"] as const) {
    it(`BLK-DEV-15 of ${kind}: the driver sees the new capacity, uses what is new, and loses what is cut off`, async (t) => {
      const storage = kind === "memory" ? new RamStorage(MIB) : FileStorage.open(imageFor(t));
      const { backend, errors } = backendFor(t, storage);
      await using disk = await openBlock(`vhost-user:${backend.path}`);
      const seen: number[] = [];
      disk.on("resize", (bytes) => seen.push(bytes));
      await disk.write(pattern(4096), { position: MIB - 4096 });

      await backend.resize(2 * MIB);
      await until(() => seen.length === 1);
      assert.deepEqual([seen, disk.capacity], [[2 * MIB], 2 * MIB]);
      await disk.write(pattern(4096, 2), { position: 2 * MIB - 4096 });
      const { buffer } = await disk.read(new Uint8Array(4096), { position: 2 * MIB - 4096 });
      assert.deepEqual(buffer, pattern(4096, 2));

      await backend.resize(MIB);
      await until(() => seen.length === 2);
      assert.equal(disk.capacity, MIB);
      await assert.rejects(disk.read(new Uint8Array(4096), { position: MIB }), RangeError);
      await backend.resize(2 * MIB);
      await until(() => seen.length === 3);
      const again = await disk.read(new Uint8Array(4096), { position: 2 * MIB - 4096 });
      assert.deepEqual(again.buffer, new Uint8Array(4096));
      assert.deepEqual((await disk.read(new Uint8Array(4096), { position: MIB - 4096 })).buffer, pattern(4096));
      assert.deepEqual(errors, []);
    });
  }

  for (const packed of [false, true]) {
    it(`BLK-DRV-08 the driver sends nothing that waits beyond a shrunken end, ${packed ? "packed" : "split"}`, async (t) => {
      const storage = new RamStorage(MIB);
      const { backend, errors } = backendFor(t, storage);
      // Polled: what completes leaves the ring when this test says so, and not before the driver has the news.
      const options = { packed, queueSize: 4, mode: "poll", indirect: false } as const;
      await using disk = await openBlock(`vhost-user:${backend.path}`, options);
      const first = disk.read(new Uint8Array(512), { position: MIB - 512 });
      const late = [
        disk.read(new Uint8Array(512), { position: MIB - 512 }),
        disk.write(await disk.allocate(512), { position: MIB / 2 }),
        disk.discard({ position: MIB / 2 - 512, length: 1024 }),
        disk.writeZeroes({ position: MIB / 2, length: 512 }),
      ].map((call) => assert.rejects(call, RangeError));
      const last = disk.flush();
      await until(() => backend.stats.requests === 1);
      const resized = once(disk, "resize");
      await backend.resize(MIB / 2);
      assert.deepEqual(await soon(resized, "the change"), [MIB / 2, MIB]);
      await soon(Promise.all(late), "the refusals");
      let ended = false;
      const rest = Promise.all([first, last]).finally(() => {
        ended = true;
      });
      await until(() => {
        disk.poll();
        return ended;
      });
      await rest;
      assert.equal(backend.stats.requests, 2, "the first and the flush");
      assert.deepEqual([errors, disk.stats().errors], [[], {}]);
    });
  }

  it("a driver that may not be told finds out by looking", async (t) => {
    const storage = new RamStorage(MIB);
    const { backend } = backendFor(t, storage);
    await using transport = await VhostUser.connect(backend.path);
    await using disk = await BlockDevice.open(transport, { configPoll: 1 });
    transport.onConfigChange = undefined; // deaf, as to a back-end without a channel
    const resized = once(disk, "resize");
    await backend.resize(2 * MIB);
    assert.deepEqual(await soon(resized, "the look"), [2 * MIB, MIB]);
  });

  it("requests beyond a shrunken end fail, those in flight are finished first, and messages wait", async (t) => {
    let finish = (): void => undefined;
    const storage = {
      capacity: MIB,
      read: () =>
        new Promise<void>((resolve) => {
          finish = resolve;
        }),
      write: () => undefined,
      flush: () => undefined,
      resize(bytes = MIB) {
        this.capacity = bytes;
      },
    };
    const { front, backend } = pair(t, { storage });
    const ring = await front.start(0n);
    const last = BigInt(MIB / 512 - 1);
    const request = ring.request(BlkRequestType.IN, last, { into: 512 });
    ring.kick.signal();
    await until(() => backend.stats.requests === 1);
    const resized = backend.resize(MIB / 2);
    const late = ring.request(BlkRequestType.IN, last, { into: 512 });
    ring.kick.signal();
    front.send(R.GET_FEATURES);
    await turns(20);
    assert.ok(front.silent);
    assert.deepEqual([storage.capacity, backend.stats.requests], [MIB, 1]);
    finish();
    await resized;
    await front.reply(R.GET_FEATURES);
    assert.equal(await ring.finished(request), 513);
    await ring.finished(late);
    assert.deepEqual([request.status(), late.status()], [0, 1]);
    assert.equal(await capacity(front), BigInt(MIB / 2));
  });

  it("VHU-BE-26 tells by one message that asks for an answer, and changes meanwhile by one more", async (t) => {
    const { front, backend, errors } = pair(t);
    const { channel } = await listening(t, front);
    await backend.resize(2 * MIB);
    assert.deepEqual(heard(channel), encodeVhostUserMessage(CHANGE, 9));
    await backend.resize(3 * MIB);
    await backend.resize(4 * MIB);
    assert.equal(heard(channel).length, 0);
    answer(channel, 0);
    let next = heard(channel);
    await until(() => (next = next.length > 0 ? next : heard(channel)).length > 0);
    assert.deepEqual(next, encodeVhostUserMessage(CHANGE, 9));
    answer(channel, 1);
    await until(() => errors.length === 1);
    assert.match(errors[0].message, /answered with 1/);
    await backend.resize(MIB);
    assert.deepEqual(heard(channel), encodeVhostUserMessage(CHANGE, 9));
  });

  it("VHU-BE-26 sends nothing without the channel, or without a ring that runs: then when one starts", async (t) => {
    const { front, backend } = pair(t);
    const { ring, channel } = await listening(t, front);
    await ring.stop();
    await backend.resize(2 * MIB);
    assert.equal(heard(channel).length, 0);
    await ring.start(0);
    assert.deepEqual(heard(channel), encodeVhostUserMessage(CHANGE, 9));
    front.close();
    await backend.resize(MIB);
    const other = frontEndFor(t, backend);
    await other.start(0n);
    await backend.resize(2 * MIB);
    assert.ok(other.silent);
    assert.equal(await capacity(other), BigInt(2 * MIB));
  });

  for (const [name, bytes] of [
    ["another message", encodeVhostUserMessage(3, 5, u64Codec.encode(0))],
    ["wrong flags", encodeVhostUserMessage(CHANGE, 1, u64Codec.encode(0))],
    ["a payload too long", encodeVhostUserMessage(CHANGE, 5, new Uint8Array(16))],
    ["nothing but its end", undefined],
  ] as const) {
    it(`gives a channel up that answers with ${name}, and goes on`, async (t) => {
      const { front, backend, errors } = pair(t);
      const before = openFds();
      const { ring, channel } = await listening(t, front);
      await backend.resize(2 * MIB);
      if (bytes === undefined) {
        const none = socketPair(); // keeps the number of descriptors the same
        t.after(() => none.forEach(closeFd));
        sendMessage(channel, encodeVhostUserMessage(CHANGE, 5, u64Codec.encode(0)).subarray(0, 5), [none[0]]);
      } else {
        sendMessage(channel, bytes, []);
      }
      await until(() => errors.length === 1);
      await backend.resize(3 * MIB);
      assert.equal(errors.length, 1);
      assert.equal((await ring.read(0n, 512)).status, 0);
      assert.ok(openFds() > before);
    });
  }

  it("refuses a channel that is no socket, none, or two", async (t) => {
    const { front } = pair(t);
    await front.handshake(0n, ALL_PROTOCOL_FEATURES | BACKEND_REQ);
    const before = openFds();
    assert.equal(await front.ack(R.SET_BACKEND_REQ_FD, new Uint8Array(0), [front.memfd]), 1n);
    assert.equal(await front.ack(R.SET_BACKEND_REQ_FD, new Uint8Array(0), []), 1n);
    assert.equal(await front.ack(R.SET_BACKEND_REQ_FD, new Uint8Array(0), [front.fd, front.fd]), 1n);
    assert.equal(openFds(), before);
  });

  it("BASIC-DEV-03 tells a driver that runs that its device needs a reset", async (t) => {
    const { front } = pair(t);
    const { ring, channel } = await listening(t, front, ALL_PROTOCOL_FEATURES | BACKEND_REQ | STATUS);
    await front.must(R.SET_STATUS, u64Codec.encode(15));
    ring.driver.view.setUint16(ring.driver.place.driver + 2, 1000, true);
    ring.kick.signal();
    let message = heard(channel);
    await until(() => (message = message.length > 0 ? message : heard(channel)).length > 0);
    assert.deepEqual(message, encodeVhostUserMessage(CHANGE, 9));
    assert.equal(await front.askU64(R.GET_STATUS), 15n | 64n);
  });

  it("refuses sizes that cannot be, and storages that cannot change theirs, and stays as it is", async (t) => {
    const { backend } = backendFor(t, new RamStorage(MIB), { blockSize: 4096 });
    for (const bytes of [0, -512, 513, MIB + 512, Number.NaN]) await assert.rejects(backend.resize(bytes), RangeError);
    await backend.resize();
    const fixed: BlockStorage = {
      capacity: MIB,
      read: () => undefined,
      write: () => undefined,
      flush: () => undefined,
    };
    const { backend: rigid } = backendFor(t, fixed);
    await assert.rejects(rigid.resize(2 * MIB), { code: "ERR_VIRTIO_UNSUPPORTED" });
    const path = imageFor(t);
    const { backend: reader, front } = pair(t, { storage: FileStorage.open(path, { readOnly: true }) });
    await assert.rejects(reader.resize(2 * MIB), { code: "ERR_VIRTIO_UNSUPPORTED" });
    truncateSync(path, MIB + 1);
    await assert.rejects(reader.resize(), { code: "ERR_VIRTIO_BACKEND" });
    await front.handshake(0n);
    assert.equal(await capacity(front), BigInt(MIB));
    truncateSync(path, 2 * MIB);
    await reader.resize();
    assert.equal(await capacity(front), BigInt(2 * MIB));
    await reader.close();
    await assert.rejects(reader.resize(), { code: "ERR_VIRTIO_CLOSED" });
  });

  it("virtio serve takes the size of its file over at SIGUSR2", async (t) => {
    const image = imageFor(t);
    const path = join(folderFor(t), "disk.sock");
    const program = fileURLToPath(new URL("../../src/cli/main.js", import.meta.url));
    const child = spawn(process.execPath, [program, "serve", `file:${image}`, "--socket", path], {
      stdio: ["ignore", "ignore", "pipe"],
    });
    t.after(() => child.kill("SIGKILL"));
    let text = "";
    child.stderr.setEncoding("utf8").on("data", (more: string) => {
      text += more;
    });
    const says = async (what: RegExp): Promise<void> => {
      while (!what.test(text)) await soon(once(child.stderr, "data"), String(what));
    };
    await says(/serving/);
    await using disk = await openBlock(`vhost-user:${path}`);
    const changed = once(disk, "resize");
    truncateSync(image, 3 * MIB);
    child.kill("SIGUSR2");
    assert.deepEqual(await soon(changed, "the change"), [3 * MIB, MIB]);
    await says(/the disk has 3 MiB now/);
    truncateSync(image, 3 * MIB + 1);
    child.kill("SIGUSR2");
    await says(/keeps its size/);
    assert.equal(statSync(image).size, 3 * MIB + 1);
  });
});
