/** A connection that breaks while queues run, and is made again: what is said then, to whom, for how long. */

import assert from "node:assert/strict";
import { rmSync } from "node:fs";
import { setImmediate as turn } from "node:timers/promises";
import { describe, test, type TestContext } from "node:test";
import type { VirtioError } from "../../../src/errors.js";
import { type Recovery, type ReturnedDevice, VhostUser, type VhostUserOptions } from "../../../src/transports/index.js";
import { Backoff, reconnectPolicy } from "../../../src/transports/vhost-user/reconnect.js";
import { VirtioFeature } from "../../../src/virtqueue/features.js";
import { BIT_30, CONFIG, type Deed, INFLIGHT, MEM_SLOTS, MQ, REPLY_ACK, ScriptedPeer } from "../scripted-peer.js";
import { type PeerOptions, VERSION_1 } from "../scripted-peer.js";
import { held, place, virtioError } from "../support.js";

/** A driver that goes on where it is told to, and remembers what it was told. */
class Driver implements Recovery {
  completed = 0;
  /** Attempts to reconnect that began. */
  attempts = 0;
  /** What came back, each time. */
  readonly returned: ReturnedDevice[] = [];
  /** Where the queues go on. */
  bases: (number | undefined)[] = [undefined];
  /** Attempts that each outage took. */
  readonly outages: number[] = [];
  readonly broken: VirtioError[] = [];
  willing = true;
  whenBack: (() => void) | undefined = undefined;

  disconnected(error: VirtioError): boolean {
    this.broken.push(error);
    return this.willing;
  }

  reconnecting(): void {
    this.attempts++;
  }

  async restart(device: ReturnedDevice): Promise<readonly (number | undefined)[]> {
    this.returned.push(device);
    return this.bases;
  }

  reconnected(attempts: number): void {
    this.outages.push(attempts);
    this.whenBack?.();
  }

  /** Resolves when the device is back. */
  back(): Promise<void> {
    return new Promise((resolve) => {
      this.whenBack = resolve;
    });
  }
}

/** Quick, so that the tests are; none depends on how quick. */
const QUICK = { minDelay: 1, maxDelay: 5, timeout: 20_000 };
/** No attempt within any test. */
const SLOW = { minDelay: 60_000, maxDelay: 60_000, timeout: 120_000 };

interface Options extends PeerOptions {
  readonly wanted?: bigint;
  readonly connect?: VhostUserOptions;
}

/** A device with one running queue and a driver that takes part. */
async function openWithDriver(t: TestContext, { wanted = 0n, connect = {}, ...options }: Options = {}) {
  const peer = new ScriptedPeer(options);
  const device = await VhostUser.connect(peer.path, { reconnect: QUICK, ...connect });
  t.after(async () => {
    await device.close();
    peer.close();
  });
  const accepted = await device.negotiate(wanted);
  const region = await device.mapMemory(1);
  const setup = place(region, 0, 8, (accepted & VirtioFeature.RING_PACKED) !== 0n);
  const [queue] = await device.startQueues([setup]);
  const driver = new Driver();
  device.recovery = driver;
  const lost: Error[] = [];
  device.onLost = (error) => lost.push(error);
  return { peer, device, driver, region, setup, queue, lost };
}

/** Let the back-end hang up, and wait until the device has another connection. */
async function outage({ peer, driver }: { readonly peer: ScriptedPeer; readonly driver: Driver }): Promise<void> {
  const back = driver.back();
  peer.hangUp();
  await back;
}

/** Let the back-end hang up, and wait until the driver has heard of it. */
async function begin({ peer, driver }: { readonly peer: ScriptedPeer; readonly driver: Driver }): Promise<void> {
  peer.hangUp();
  while (driver.broken.length === 0) await turn();
}

/** Wait until the device has ended, and return why. */
function ended(device: VhostUser): Promise<Error> {
  return new Promise((resolve) => {
    device.onLost = resolve;
  });
}

describe("another back-end in the place of one that hung up", () => {
  test("VHU-FE-35 VHU-FE-19 is brought to where that one was: same features, memory, region in flight, positions", async (t) => {
    const open = await openWithDriver(t);
    const { peer, driver } = open;
    const before = peer.messages.length;
    driver.bases = [5];
    await outage(open);
    const again = peer.messages.slice(before).map(({ name, payload, inodes }) => ({ name, payload, inodes }));
    const find = (name: string) => again.find((each) => each.name === name) ?? assert.fail(`no ${name}`);
    assert.deepEqual(
      again.map(({ name }) => name),
      [
        ...["SET_OWNER", "GET_FEATURES", "GET_PROTOCOL_FEATURES", "SET_PROTOCOL_FEATURES", "GET_QUEUE_NUM"],
        ...["GET_MAX_MEM_SLOTS", "SET_BACKEND_REQ_FD", "SET_FEATURES", "ADD_MEM_REG"],
        ...["SET_VRING_NUM", "SET_VRING_BASE", "SET_INFLIGHT_FD", "SET_VRING_ADDR", "SET_VRING_CALL", "SET_VRING_ERR"],
        ...["SET_VRING_KICK", "SET_VRING_ENABLE"],
      ],
    );
    for (const name of ["SET_PROTOCOL_FEATURES", "SET_FEATURES", "ADD_MEM_REG", "SET_VRING_ADDR", "SET_INFLIGHT_FD"]) {
      const first = peer.messages.find((each) => each.name === name) ?? assert.fail(name);
      assert.deepEqual([find(name).payload, find(name).inodes], [first.payload, first.inodes], name);
    }
    assert.equal(find("SET_VRING_BASE").payload.readUInt32LE(4), 5);
    assert.deepEqual(
      driver.returned.map(({ tracked }) => tracked),
      [true],
    );
    assert.equal(peer.all("GET_INFLIGHT_FD").length, 1);
    assert.deepEqual(peer.violations, []);
  });

  test("rings that begin anew get a new region in flight, and their first position", async (t) => {
    for (const [wanted, base] of [
      [0n, 0],
      [VirtioFeature.RING_PACKED, 0x8000_8000],
    ] as const) {
      const open = await openWithDriver(t, { features: VERSION_1 | BIT_30 | VirtioFeature.RING_PACKED, wanted });
      await outage(open);
      const [first, second] = open.peer.all("SET_INFLIGHT_FD");
      assert.notDeepEqual(second.inodes, first.inodes);
      assert.equal(open.peer.last("SET_VRING_BASE").payload.readUInt32LE(4), base);
      assert.deepEqual(open.peer.violations, []);
    }
  });

  test("without INFLIGHT_SHMFD the driver is told that nobody knows what is in flight", async (t) => {
    const open = await openWithDriver(t, { protocolFeatures: MQ | REPLY_ACK | CONFIG });
    await outage(open);
    assert.deepEqual(
      open.driver.returned.map(({ tracked }) => tracked),
      [false],
    );
    assert.equal(open.peer.all("SET_MEM_TABLE").length, 2);
    assert.ok(!open.peer.names.includes("SET_INFLIGHT_FD"));
    assert.deepEqual(open.peer.violations, []);
  });

  test("a back-end without a region after all, or with one that it does not hand over", async (t) => {
    const empty = (received: { name: string }, right: Buffer | undefined): Deed | undefined => {
      if (received.name !== "GET_INFLIGHT_FD" || right === undefined) return undefined;
      const none = Buffer.from(right);
      none.fill(0, 12, 20);
      return { bytes: none };
    };
    const open = await openWithDriver(t, { misbehave: empty });
    assert.ok(!open.peer.names.includes("SET_INFLIGHT_FD"));
    await outage(open);
    assert.deepEqual(
      open.driver.returned.map(({ tracked }) => tracked),
      [false],
    );
    const liar = new ScriptedPeer({
      misbehave: ({ name }, right) => (name === "GET_INFLIGHT_FD" && right ? { bytes: right } : undefined),
    });
    t.after(() => liar.close());
    const device = await VhostUser.connect(liar.path);
    t.after(() => device.close());
    await device.negotiate(0n);
    const region = await device.mapMemory(1);
    await assert.rejects(device.startQueues([place(region, 0, 8)]), virtioError("ERR_VIRTIO_PROTOCOL", "descriptor"));
  });

  test("who does not want to reconnect does not ask for a region in flight", async (t) => {
    const peer = new ScriptedPeer();
    t.after(() => peer.close());
    const device = await VhostUser.connect(peer.path, { reconnect: false });
    t.after(() => device.close());
    assert.equal(device.protocolFeatures & INFLIGHT, 0n);
    assert.equal(device.reconnects, false);
  });

  test("tells of changes of its config space as the one before did, and its config can be read and written", async (t) => {
    const open = await openWithDriver(t);
    const { peer, device, driver } = open;
    let seen: Uint8Array | undefined;
    driver.restart = async (returned) => {
      seen = await returned.readConfig(0, 8);
      await returned.writeConfig(32, Uint8Array.of(1));
      return [undefined];
    };
    await outage(open);
    assert.deepEqual(seen, Uint8Array.from([0, 1, 2, 3, 4, 5, 6, 7]));
    assert.ok(peer.names.includes("SET_CONFIG"));
    assert.deepEqual(await device.readConfig(8, 4), Uint8Array.from([8, 9, 10, 11]));
    assert.equal(peer.all("SET_BACKEND_REQ_FD").length, 2);
  });

  test("that hangs up again at any message is tried again, and leaves nothing behind", async (t) => {
    const steps = [
      ...[
        "SET_OWNER",
        "GET_FEATURES",
        "SET_PROTOCOL_FEATURES",
        "GET_MAX_MEM_SLOTS",
        "SET_BACKEND_REQ_FD",
        "SET_FEATURES",
      ],
      ...["ADD_MEM_REG", "SET_INFLIGHT_FD", "SET_VRING_CALL", "SET_VRING_KICK", "SET_VRING_ENABLE"],
    ];
    let at = steps.length;
    const before = held();
    const open = await openWithDriver(t, {
      misbehave: ({ name }) => {
        if (name !== steps[at]) return undefined;
        at++;
        return { close: true };
      },
    });
    open.driver.bases = [0];
    await outage(open);
    at = 0;
    open.driver.completed++; // else it would be the same outage still
    await outage(open);
    assert.equal(at, steps.length);
    assert.equal(open.driver.outages[1], steps.length + 1);
    assert.deepEqual(open.lost, []);
    assert.equal((await open.device.readConfig(0, 1)).length, 1);
    await open.device.close();
    open.peer.close();
    assert.deepEqual(held(), before);
  });
});

describe("a back-end that cannot take the place", () => {
  const CASES: Readonly<Record<string, [PeerOptions, PeerOptions, string]>> = {
    "without a feature in use": [
      { features: VERSION_1 | BIT_30 | VirtioFeature.EVENT_IDX },
      { features: VERSION_1 | BIT_30 },
      "the features 0x20000000",
    ],
    "without a protocol feature in use": [
      {},
      { protocolFeatures: MQ | REPLY_ACK | MEM_SLOTS },
      "protocol features 0x1220",
    ],
    "without bit 30": [{}, { features: VERSION_1 }, "protocol features"],
    "without memory slots left": [{}, { slots: 0n }, "0 memory slots"],
  };
  for (const [what, [first, second, words]] of Object.entries(CASES)) {
    test(`${what} ends the device, with the reason`, async (t) => {
      const { peer, device, driver } = await openWithDriver(t, { ...first, wanted: VirtioFeature.EVENT_IDX });
      const over = ended(device);
      peer.reconfigure(second);
      peer.hangUp();
      const error = await over;
      virtioError("ERR_VIRTIO_DISCONNECTED", words)(error);
      assert.equal(driver.outages.length, 0);
      await assert.rejects(device.mapMemory(1), virtioError("ERR_VIRTIO_DISCONNECTED"));
    });
  }
});

describe("an outage", () => {
  test("ends by its time limit, after several attempts, and says what the last one met", async (t) => {
    const { peer, device, driver } = await openWithDriver(t, {
      connect: { reconnect: { minDelay: 1, maxDelay: 2, timeout: 30 } },
    });
    const over = ended(device);
    rmSync(peer.path);
    peer.hangUp();
    const error = await over;
    virtioError("ERR_VIRTIO_DISCONNECTED", /could not be made again \(\d+ attempts; the last: .*ENOENT/)(error);
    assert.ok(driver.attempts > 1, `${driver.attempts} attempts`);
  });

  test("a driver that cannot go on, one that takes no part, and one without a running queue lose it at once", async (t) => {
    for (const change of ["unwilling", "absent", "stopped"]) {
      const { peer, device, driver } = await openWithDriver(t);
      if (change === "unwilling") driver.willing = false;
      if (change === "absent") device.recovery = undefined;
      if (change === "stopped") await device.stopQueues();
      const over = ended(device);
      peer.hangUp();
      virtioError("ERR_VIRTIO_DISCONNECTED", "closed it")(await over);
      assert.equal(driver.attempts, 0);
      assert.equal(peer.connections, 1);
    }
  });

  test("who breaks the protocol is not asked again", async (t) => {
    const { peer, device, driver } = await openWithDriver(t);
    const over = ended(device);
    peer.send(Buffer.from("what nobody asked for"));
    virtioError("ERR_VIRTIO_PROTOCOL")(await over);
    assert.equal(driver.attempts, 0);
  });

  test("what is asked for meanwhile is done when it is over: config, memory", async (t) => {
    const open = await openWithDriver(t);
    const { peer, device } = open;
    const back = open.driver.back();
    await begin(open);
    const asked = [device.readConfig(0, 4), device.writeConfig(32, Uint8Array.of(0)), device.mapMemory(1)] as const;
    const [bytes, , region] = await Promise.all(asked);
    await back;
    assert.equal(bytes.length, 4);
    assert.ok(region.size > 0);
    assert.equal(peer.all("ADD_MEM_REG").length, 3);
    assert.deepEqual(peer.violations, []);
  });

  test("what was on its way when it began is asked again", async (t) => {
    let silent = false;
    const { peer, device } = await openWithDriver(t, { misbehave: () => (silent ? {} : undefined) });
    silent = true;
    const config = device.readConfig(0, 4);
    const memory = device.mapMemory(1);
    await peer.until(() => peer.all("GET_CONFIG").length === 1 && peer.all("ADD_MEM_REG").length === 2);
    silent = false;
    peer.hangUp();
    assert.equal((await config).length, 4);
    assert.ok((await memory).size > 0);
    assert.deepEqual(peer.violations, []);
  });

  test("a wait keeps its own bounds meanwhile", async (t) => {
    const open = await openWithDriver(t, { connect: { reconnect: SLOW } });
    const { device } = open;
    await begin(open);
    await assert.rejects(
      device.readConfig(0, 4, { timeout: 5 }),
      virtioError("ERR_VIRTIO_TIMEOUT", "another connection to the back-end"),
    );
    const reason = new Error("no longer needed");
    await assert.rejects(device.mapMemory(1, { signal: AbortSignal.abort(reason) }), reason);
  });

  test("close ends it: between two attempts, and in the midst of one that hears nothing", async (t) => {
    for (const step of ["pause", "silence"]) {
      let silent = false;
      const { peer, device, driver, lost } = await openWithDriver(t, {
        connect: { reconnect: step === "pause" ? SLOW : QUICK },
        misbehave: () => (silent ? {} : undefined),
      });
      silent = true;
      await begin({ peer, driver });
      if (step === "silence") await peer.until(() => peer.connections === 2 && peer.names.at(-1) === "GET_FEATURES");
      const waiting = device.readConfig(0, 4);
      const refused = assert.rejects(waiting, virtioError("ERR_VIRTIO_CLOSED"));
      await device.close();
      await refused;
      assert.equal(driver.outages.length, 0);
      assert.ok(lost.every((error) => virtioError("ERR_VIRTIO_CLOSED")(error)));
    }
  });

  test("a back-end that lives for a moment and completes nothing does not make it begin anew", () => {
    const backoff = new Backoff({ minDelay: 10, maxDelay: 1e9, timeout: Number.POSITIVE_INFINITY });
    backoff.lost(7);
    for (let i = 0; i < 3; i++) backoff.next();
    backoff.returned();
    backoff.lost(7);
    assert.equal(backoff.attempts, 3, "nothing was completed since");
    backoff.returned();
    backoff.lost(8);
    assert.equal(backoff.attempts, 0, "something was");
  });

  test("delays double up to the limit, each with its part of chance", () => {
    const seen: number[][] = Array.from({ length: 8 }, () => []);
    for (let round = 0; round < 200; round++) {
      const backoff = new Backoff({ minDelay: 10, maxDelay: 200, timeout: Number.POSITIVE_INFINITY });
      backoff.lost(0);
      for (const list of seen) list.push(backoff.next() ?? assert.fail("it gave up"));
    }
    for (const [i, list] of seen.entries()) {
      const full = Math.min(200, 10 * 2 ** i);
      assert.ok(
        list.every((delay) => delay > full / 2 && delay <= full),
        `attempt ${i + 1}: ${list.join(" ")}`,
      );
      assert.ok(new Set(list).size > 100, "they differ");
    }
  });

  test("wrong bounds are refused", async () => {
    for (const wrong of [
      { minDelay: 0 },
      { minDelay: 5, maxDelay: 4 },
      { timeout: -1 },
      { timeout: Number.NaN },
      { tries: 3 },
    ]) {
      assert.throws(() => reconnectPolicy(wrong), { code: "ERR_VIRTIO_ARGUMENT" }, JSON.stringify(wrong));
    }
    assert.throws(() => reconnectPolicy("yes" as unknown as boolean), { code: "ERR_VIRTIO_ARGUMENT" });
    assert.deepEqual(reconnectPolicy({ minDelay: 2000 }), { minDelay: 2000, maxDelay: 2000, timeout: 30_000 });
    await assert.rejects(VhostUser.connect({ fd: 0 }, { reconnect: true }), { code: "ERR_VIRTIO_ARGUMENT" });
  });
});

describe("a driver that polls and gives the event loop no turn", () => {
  test("hears of the end by looking, in the same turn; later looks are quiet while there are turns", async (t) => {
    const { peer, queue, driver } = await openWithDriver(t, { connect: { reconnect: SLOW } });
    assert.equal(queue.look?.(), undefined);
    peer.hangUp();
    virtioError("ERR_VIRTIO_DISCONNECTED", "closed it")(queue.look?.());
    assert.equal(driver.broken.length, 1);
    virtioError("ERR_VIRTIO_DISCONNECTED")(queue.look?.()); // still no turn
    await turn();
    await turn();
    assert.equal(queue.look?.(), undefined, "there was a turn");
    virtioError("ERR_VIRTIO_DISCONNECTED")(queue.look?.()); // and none since
  });

  test("also where the first loss is the end", async (t) => {
    const { peer, queue } = await openWithDriver(t, { connect: { reconnect: false } });
    peer.hangUp();
    virtioError("ERR_VIRTIO_DISCONNECTED")(queue.look?.());
  });
});
