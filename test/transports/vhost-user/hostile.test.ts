/** Back-ends that hang up, fall silent or answer wrongly, at every message of a device's life. */

import assert from "node:assert/strict";
import { describe, type TestContext, test } from "node:test";
import type { VirtioErrorCode } from "../../../src/errors.js";
import { EventFd } from "../../../src/sys/index.js";
import { VhostUser } from "../../../src/transports/index.js";
import { type Deed, message, type PeerOptions, type Received, ScriptedPeer, u64 } from "../scripted-peer.js";
import { held, live, open, openRunning, virtioError } from "../support.js";

/** Every message whose reply is waited for, in the order of a device's life. */
const AWAITED = [
  "GET_FEATURES",
  "GET_PROTOCOL_FEATURES",
  "GET_QUEUE_NUM",
  "GET_MAX_MEM_SLOTS",
  "SET_BACKEND_REQ_FD",
  "SET_FEATURES",
  "GET_CONFIG",
  "SET_CONFIG",
  "ADD_MEM_REG",
  "SET_VRING_NUM",
  "SET_VRING_BASE",
  "SET_VRING_ADDR",
  "SET_VRING_CALL",
  "SET_VRING_ERR",
  "SET_VRING_KICK",
  "SET_VRING_ENABLE",
  "GET_VRING_BASE",
  "REM_MEM_REG",
];

interface Misdeed {
  readonly what: string;
  readonly code: VirtioErrorCode;
  readonly words: string;
  /** How it answers instead of `right`. */
  readonly deed: (received: Received, right: Buffer) => Deed;
  /** Messages at which this is no misdeed. */
  readonly except?: readonly string[];
}

const PROTOCOL = "ERR_VIRTIO_PROTOCOL";
const DISCONNECTED = "ERR_VIRTIO_DISCONNECTED";
const withFlags =
  (flags: number) =>
  ({ request }: Received, right: Buffer) => ({
    bytes: message(request, flags, right.subarray(12)),
  });

const MISDEEDS: readonly Misdeed[] = [
  { what: "hangs up instead of answering", code: DISCONNECTED, words: "awaited", deed: () => ({ close: true }) },
  ...[1, 11, 12, 13].map(
    (count): Misdeed => ({
      what: `hangs up after ${count} bytes of the reply`,
      code: DISCONNECTED,
      words: "in the middle of a message",
      deed: (_, right) => ({ bytes: right.subarray(0, count), close: true }),
    }),
  ),
  {
    what: "answers another request",
    code: PROTOCOL,
    words: "was answered by RESET_OWNER",
    deed: (_, right) => ({ bytes: message(4, 5, right.subarray(12)) }),
  },
  {
    what: "answers no request that exists",
    code: PROTOCOL,
    words: "was answered by request 4294967295",
    deed: (_, right) => ({ bytes: message(0xffff_ffff, 5, right.subarray(12)) }),
  },
  { what: "leaves out the reply flag", code: PROTOCOL, words: "flags 0x1", deed: withFlags(1) },
  { what: "keeps need_reply", code: PROTOCOL, words: "flags 0xd", deed: withFlags(13) },
  { what: "has version 2", code: PROTOCOL, words: "flags 0x6", deed: withFlags(6) },
  { what: "sets a reserved flag", code: PROTOCOL, words: "flags 0x80000005", deed: withFlags(0x8000_0005) },
  {
    what: "sends one byte too few",
    code: PROTOCOL,
    words: "bytes, not",
    deed: ({ request }, right) => ({ bytes: message(request, 5, right.subarray(12, -1)) }),
  },
  {
    what: "sends one byte too many, and counts it",
    code: PROTOCOL,
    words: "bytes, not",
    deed: ({ request }, right) => ({
      bytes: message(request, 5, Buffer.concat([right.subarray(12), Buffer.alloc(1)])),
    }),
  },
  {
    what: "announces 4 GiB",
    code: PROTOCOL,
    words: "4294967295 payload bytes",
    deed: ({ request }) => ({ bytes: message(request, 5, Buffer.alloc(0), 0xffff_ffff) }),
  },
  {
    what: "sends no payload",
    code: PROTOCOL,
    words: "0 bytes, not",
    deed: ({ request }) => ({ bytes: message(request, 5) }),
    except: ["GET_CONFIG"], // there it means: refused
  },
];

/** Run a whole life; the device, if there was one, is closed in any case. */
async function liveAndClose(path: string): Promise<void> {
  const device = await VhostUser.connect(path);
  try {
    await live(device);
  } finally {
    await device.close();
  }
}

/** A whole life beside a peer that misbehaves at the first message called `name`. */
function peerFor(t: TestContext, name: string, deed: (received: Received, right: Buffer) => Deed): ScriptedPeer {
  let done = false;
  const peer = new ScriptedPeer({
    misbehave(received, right) {
      if (done || received.name !== name || right === undefined) return undefined;
      done = true;
      return deed(received, right);
    },
  });
  t.after(() => peer.close());
  return peer;
}

/** Check that `work` leaves no descriptor and no mapping behind. */
async function withoutLeak(work: () => Promise<void>): Promise<void> {
  const before = held();
  await work();
  assert.deepEqual(held(), before);
}

for (const { what, code, words, deed, except = [] } of MISDEEDS) {
  describe(`VHU-FE-03 a back-end that ${what}`, () => {
    for (const name of AWAITED.filter((each) => !except.includes(each))) {
      test(`at ${name}`, (t) =>
        withoutLeak(async () => {
          const peer = peerFor(t, name, deed);
          await assert.rejects(liveAndClose(peer.path), virtioError(code, words));
          await peer.until(() => !peer.connected);
          assert.ok(peer.names.includes(name));
          peer.close();
        }));
    }
  });
}

describe("VHU-FE-03 a back-end that sends descriptors with a reply", () => {
  for (const name of AWAITED) {
    test(`at ${name}`, (t) =>
      withoutLeak(async () => {
        const event = EventFd.create();
        const peer = peerFor(t, name, (_, right) => ({ bytes: right, fds: [event.fd, event.fd] }));
        await assert.rejects(liveAndClose(peer.path), virtioError(PROTOCOL, "2 descriptors that nobody asked for"));
        await peer.until(() => !peer.connected);
        peer.close();
        event.close();
      }));
  }
});

describe("VHU-FE-03 a back-end that sends more than the reply", () => {
  for (const name of AWAITED) {
    test(`at ${name}`, (t) =>
      withoutLeak(async () => {
        for (const extra of [Buffer.alloc(1), message(1, 5, u64(0n)), Buffer.alloc(4000, 0xff)]) {
          const peer = peerFor(t, name, (_, right) => ({ bytes: Buffer.concat([right, extra]) }));
          await assert.rejects(async () => {
            const device = await VhostUser.connect(peer.path);
            const lost = new Promise<never>((_, reject) => {
              device.onLost = reject;
            });
            // A right reply still counts; what follows it ends the connection, here or there.
            await Promise.all([live(device), lost]).finally(() => device.close());
          }, virtioError(PROTOCOL));
          await peer.until(() => !peer.connected);
          peer.close();
        }
      }));
  }
});

/** One round of the event loop. */
function turn(): Promise<"turn"> {
  return new Promise((resolve) => setImmediate(resolve, "turn"));
}

describe("a back-end that falls silent", () => {
  for (const name of AWAITED) {
    test(`at ${name}`, (t) =>
      withoutLeak(async () => {
        t.mock.timers.enable({ apis: ["setTimeout"] });
        let silent = false;
        const peer = new ScriptedPeer({
          misbehave(received) {
            silent ||= received.name === name;
            return silent ? {} : undefined;
          },
        });
        t.after(() => peer.close());
        const life = liveAndClose(peer.path);
        const outcome = assert.rejects(life, virtioError("ERR_VIRTIO_TIMEOUT", `the reply to ${name}`));
        await peer.received(name);
        // Let the front-end read the replies to what it sent before.
        await turn();
        await turn();
        t.mock.timers.tick(9_999);
        t.mock.timers.tick(1);
        // Giving up an operation is one wait, closing the silent connection another.
        const closed = outcome.then(() => "closed" as const);
        while ((await Promise.race([closed, turn()])) === "turn") t.mock.timers.tick(10_000);
        await peer.until(() => !peer.connected);
        peer.close();
      }));
  }
});

describe("replies whose content is wrong", () => {
  const cases: readonly [string, string, (right: Buffer) => Buffer][] = [
    ["GET_QUEUE_NUM", "0 queues", () => message(17, 5, u64(0n))],
    ["GET_MAX_MEM_SLOTS", "0 memory slots", () => message(36, 5, u64(0n))],
    ["GET_CONFIG", "offset 0 was answered for offset 256", (right) => (right.writeUInt32LE(256, 12), right)],
    ["GET_CONFIG", "config message of 8 bytes has 20 bytes, got 12", (right) => message(24, 5, right.subarray(12, 24))],
    ["GET_CONFIG", "config message of 7 bytes", (right) => (right.writeUInt32LE(7, 16), right)],
    ["GET_VRING_BASE", "queue 0 was answered for 7", (right) => (right.writeUInt32LE(7, 12), right)],
  ];
  for (const [name, words, wrong] of cases) {
    test(`VHU-FE-25 ${name}: ${words}`, (t) =>
      withoutLeak(async () => {
        const peer = peerFor(t, name, (_, right) => ({ bytes: wrong(right) }));
        await assert.rejects(liveAndClose(peer.path), virtioError(PROTOCOL, words));
        await peer.until(() => !peer.connected);
        peer.close();
      }));
  }

  test("more queues and slots than there can be are cut, not believed", async (t) => {
    const { device } = await open(t, { queues: 0xffff_ffff_ffff_ffffn, slots: 0xffff_ffff_ffff_ffffn });
    assert.equal(device.maxQueues, 256);
    assert.equal(device.maxRegions, 65535);
  });
});

describe("refusals", () => {
  const refusable = AWAITED.filter((name) => !name.startsWith("GET_"));
  for (const name of refusable) {
    test(`VHU-FE-31 a status that is not 0 names ${name}, and the connection is usable afterwards`, (t) =>
      withoutLeak(async () => {
        const peer = new ScriptedPeer({ status: (received) => (received.name === name ? 1n << 63n : 0n) });
        t.after(() => peer.close());
        const words = `${name} (status ${1n << 63n})`;
        if (name === "SET_BACKEND_REQ_FD") {
          await assert.rejects(VhostUser.connect(peer.path), virtioError("ERR_VIRTIO_REJECTED", words));
        } else {
          const device = await VhostUser.connect(peer.path);
          await assert.rejects(live(device), virtioError("ERR_VIRTIO_REJECTED", words));
          assert.equal((await device.readConfig(0, 4)).length, 4);
          await device.close();
        }
        await peer.until(() => !peer.connected);
        peer.close();
      }));
  }
});

describe("loss", () => {
  const lostBy = (device: VhostUser) =>
    new Promise<Error>((resolve) => {
      device.onLost = resolve;
    });

  test("a back-end that dies while nothing is awaited is noticed at once, and told once", async (t) => {
    const { peer, device } = await openRunning(t);
    let told = 0;
    const lost = new Promise<Error>((resolve) => {
      device.onLost = (error) => {
        told++;
        resolve(error);
      };
    });
    peer.hangUp();
    assert.ok(virtioError(DISCONNECTED, "while nothing was awaited")(await lost));
    await assert.rejects(device.mapMemory(1), virtioError(DISCONNECTED));
    await assert.rejects(device.stopQueues(), virtioError(DISCONNECTED));
    await device.close();
    await assert.rejects(device.mapMemory(1), virtioError("ERR_VIRTIO_CLOSED"));
    assert.equal(told, 1);
  });

  for (const [name, features] of [
    ["SET_BACKEND_REQ_FD", undefined],
    ["GET_FEATURES", 1n << 32n],
  ] as const) {
    test(`a back-end that hangs up right behind its last answer, to ${name}, is not connected to`, (t) =>
      withoutLeak(async () => {
        const peer = new ScriptedPeer({
          ...(features === undefined ? {} : { features }),
          misbehave: (received, right) =>
            received.name === name && right !== undefined ? { bytes: right, close: true } : undefined,
        });
        t.after(() => peer.close());
        await assert.rejects(VhostUser.connect(peer.path), virtioError(DISCONNECTED, "nothing was awaited"));
        peer.close();
      }));
  }

  test("who asks too late is told all the same", async (t) => {
    const { peer, device } = await open(t);
    const first = lostBy(device);
    device.onLost = undefined;
    peer.hangUp();
    await assert.rejects(device.readConfig(0, 8), virtioError(DISCONNECTED));
    assert.ok(virtioError(DISCONNECTED)(await lostBy(device)));
    device.onLost = () => assert.fail("told twice");
    assert.equal(await Promise.race([first, turn()]), "turn");
  });

  test("VHU-FE-03 one wrong reply rejects everything that is pending", async (t) => {
    const { peer, device } = await open(t, {
      misbehave: ({ name }) => (name === "GET_CONFIG" ? { bytes: message(3, 5, u64(0n)) } : undefined),
    });
    const lost = lostBy(device);
    const pending = [device.readConfig(0, 8), device.readConfig(8, 8), device.mapMemory(1), device.negotiate(0n)];
    for (const result of await Promise.allSettled(pending)) {
      assert.equal(result.status, "rejected");
      assert.ok(virtioError(PROTOCOL, "GET_CONFIG was answered by SET_OWNER")(result.reason));
    }
    assert.ok(virtioError(PROTOCOL)(await lost));
    await peer.until(() => !peer.connected);
  });

  test("a bad socket: each failure of connecting says what to try", async () => {
    await assert.rejects(VhostUser.connect("/nonexistent/socket"), virtioError("ERR_VIRTIO_CONNECT", "ENOENT"));
    const peer = new ScriptedPeer();
    const { path } = peer;
    await assert.rejects(VhostUser.connect(`${path}/x`), virtioError("ERR_VIRTIO_CONNECT", "ENOTDIR"));
    peer.close();
    await assert.rejects(VhostUser.connect(path), virtioError("ERR_VIRTIO_CONNECT", path));
    await assert.rejects(VhostUser.connect(""), RangeError);
    await assert.rejects(VhostUser.connect({ fd: 2 ** 30 }), virtioError("ERR_VIRTIO_SYSCALL", "EBADF"));
  });

  test("wrong targets and options are refused", async () => {
    const wrong = (target: unknown, options?: unknown) =>
      VhostUser.connect(target as string, options as PeerOptions & { timeout: number });
    for (const target of [undefined, null, 5, {}, { path: 5 }, { fd: "5" }, { path: "x", fd: 5 }]) {
      await assert.rejects(wrong(target), TypeError);
    }
    await assert.rejects(wrong({ fd: -1 }), RangeError);
    await assert.rejects(wrong("x", { Timeout: 5 }), /option "timeout"/);
    await assert.rejects(wrong("x", { signal: {} }), TypeError);
    await assert.rejects(wrong("x", null), TypeError);
    for (const timeout of [0, -1, 1.5, 2 ** 31, Number.NaN]) await assert.rejects(wrong("x", { timeout }), RangeError);
  });
});
