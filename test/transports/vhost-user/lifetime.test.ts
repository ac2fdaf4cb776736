/** Giving up, closing, and what is left afterwards: nothing. */

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { describe, test } from "node:test";
import { VhostUser } from "../../../src/transports/index.js";
import { ALL_PROTOCOL, MEM_SLOTS, type PeerOptions, REPLY_ACK, ScriptedPeer, VERSION_1 } from "../scripted-peer.js";
import { held, live, open, openRunning, place, virtioError } from "../support.js";

/** Options of a peer that keeps its reply to the first message called `name` until `release`. */
function withholding(name: string): { options: PeerOptions; release: (peer: ScriptedPeer) => void } {
  let withheld: Buffer | undefined;
  return {
    options: {
      misbehave(received, right) {
        if (received.name !== name || withheld !== undefined) return undefined;
        withheld = right;
        return {};
      },
    },
    release: (peer) => peer.send(withheld ?? Buffer.alloc(0)),
  };
}

describe("AbortSignal", () => {
  const reason = new Error("enough");

  test("already aborted: rejects with its reason, and nothing is sent", async (t) => {
    const { peer, device } = await openRunning(t);
    const before = peer.messages.length;
    const signal = AbortSignal.abort(reason);
    const calls = [
      device.readConfig(0, 8, { signal }),
      device.writeConfig(0, Uint8Array.of(1), { signal }),
      device.mapMemory(1, { signal }),
      device.startQueues([], { signal }),
      device.stopQueues({ signal }),
      VhostUser.connect(peer.path, { signal }),
      VhostUser.connect("/nonexistent", { signal: AbortSignal.abort("any value") }),
    ];
    const results = await Promise.allSettled(calls);
    assert.deepEqual(
      results.map((result): unknown => (result.status === "rejected" ? result.reason : "fulfilled")),
      [...Array.from({ length: 6 }, () => reason), "any value"],
    );
    await device.readConfig(0, 1);
    assert.equal(peer.messages.length, before + 1);
    assert.equal(peer.connections, 1);
  });

  test("negotiate aborted before it began may be tried again", async (t) => {
    const { device } = await open(t);
    await assert.rejects(device.negotiate(0n, { signal: AbortSignal.abort(reason) }), reason);
    assert.equal(await device.negotiate(0n), VERSION_1);
  });

  test("aborted while connecting: the connection is closed", async (t) => {
    for (const name of ["GET_FEATURES", "GET_PROTOCOL_FEATURES", "GET_QUEUE_NUM", "SET_BACKEND_REQ_FD"]) {
      const before = held();
      const peer = new ScriptedPeer(withholding(name).options);
      t.after(() => peer.close());
      const abort = new AbortController();
      const connecting = assert.rejects(VhostUser.connect(peer.path, { signal: abort.signal }), reason);
      await peer.received(name);
      abort.abort(reason);
      await connecting;
      await peer.until(() => !peer.connected);
      peer.close();
      assert.deepEqual(held(), before, name);
    }
  });

  test("the reply to a later request does not pass for an abandoned one", async (t) => {
    const { peer, device } = await open(t, withholding("GET_CONFIG").options);
    const abort = new AbortController();
    const first = assert.rejects(device.readConfig(0, 4, { signal: abort.signal }), reason);
    await peer.received("GET_CONFIG");
    abort.abort(reason);
    await first;
    // The peer answers this one, and keeps the reply before it: a front-end that lost count would be satisfied.
    const second = device.readConfig(8, 4);
    await assert.rejects(second, virtioError("ERR_VIRTIO_PROTOCOL", "offset 0 was answered for offset 8"));
  });

  test("an abandoned reply is consumed when it comes, and the connection stays in step", async (t) => {
    const { options, release } = withholding("GET_CONFIG");
    const { peer, device } = await open(t, options);
    const abort = new AbortController();
    const first = assert.rejects(device.readConfig(0, 4, { signal: abort.signal }), reason);
    await peer.received("GET_CONFIG");
    abort.abort(reason);
    await first;
    release(peer);
    assert.deepEqual([...(await device.readConfig(8, 4))], [8, 9, 10, 11]);
    assert.deepEqual([...(await device.readConfig(0, 4))], [0, 1, 2, 3]);
  });

  test("abandoned memory is withdrawn when the back-end has taken it, and its addresses are free", async (t) => {
    for (const protocolFeatures of [ALL_PROTOCOL, REPLY_ACK]) {
      const slots = (protocolFeatures & MEM_SLOTS) !== 0n;
      const { options, release } = withholding(slots ? "ADD_MEM_REG" : "SET_MEM_TABLE");
      const { peer, device } = await open(t, { ...options, protocolFeatures });
      const before = held();
      const abort = new AbortController();
      const mapping = assert.rejects(device.mapMemory(1, { signal: abort.signal }), reason);
      await peer.until(() => peer.messages.at(-1)?.name.includes("_MEM_") ?? false);
      assert.equal(held().mappings, before.mappings + 1);
      abort.abort(reason);
      await mapping;
      assert.equal(held().mappings, before.mappings + 1, "the back-end may have it");
      release(peer);
      const region = await device.mapMemory(1);
      assert.equal(region.iova, 2 ** 21);
      assert.equal(held().mappings, before.mappings + 1);
      assert.deepEqual(
        peer.names.filter((name) => name.includes("_MEM_") && !name.startsWith("GET")),
        slots ? ["ADD_MEM_REG", "REM_MEM_REG", "ADD_MEM_REG"] : Array.from({ length: 3 }, () => "SET_MEM_TABLE"),
      );
    }
  });

  test("a change that was abandoned before it began is not begun", async (t) => {
    const { options, release } = withholding("ADD_MEM_REG");
    const { peer, device } = await open(t, options);
    const first = device.mapMemory(1);
    await peer.received("ADD_MEM_REG");
    const abort = new AbortController();
    const second = assert.rejects(device.mapMemory(1, { signal: abort.signal }), reason);
    abort.abort(reason);
    await second;
    const third = device.mapMemory(1);
    release(peer);
    assert.deepEqual([(await first).iova, (await third).iova], [2 ** 21, 2 ** 22]);
    assert.deepEqual(peer.names.slice(-2), ["ADD_MEM_REG", "ADD_MEM_REG"]);
    assert.equal(peer.all("ADD_MEM_REG").length, 2);
  });

  test("BASIC-DRV-21 abandoned queues are stopped when they have started", async (t) => {
    const { options, release } = withholding("SET_VRING_ENABLE");
    const { peer, device } = await open(t, options);
    await device.negotiate(0n);
    const region = await device.mapMemory(1);
    const before = held();
    const abort = new AbortController();
    const setups = [place(region, 0, 8)];
    const starting = assert.rejects(device.startQueues(setups, { signal: abort.signal }), reason);
    await peer.received("SET_VRING_ENABLE");
    abort.abort(reason);
    await starting;
    release(peer);
    await peer.received("GET_VRING_BASE");
    const [queue] = await device.startQueues(setups);
    assert.notEqual(queue?.completion.fd, -1);
    await device.stopQueues();
    assert.equal(held().mappings, before.mappings);
  });

  test("a signal that is never used again keeps nothing of the operations", async (t) => {
    const { device } = await open(t);
    const { signal } = new AbortController();
    let added = 0;
    const add = signal.addEventListener.bind(signal);
    const remove = signal.removeEventListener.bind(signal);
    signal.addEventListener = (...args: Parameters<typeof add>) => {
      added++;
      add(...args);
    };
    signal.removeEventListener = (...args: Parameters<typeof remove>) => {
      added--;
      remove(...args);
    };
    for (let i = 0; i < 20; i++) await device.readConfig(0, 8, { signal });
    await assert.rejects(device.readConfig(0, 61, { signal }), virtioError("ERR_VIRTIO_CONFIG"));
    assert.equal(added, 0);
  });
});

describe("timeout", () => {
  test("of one operation: it says what was awaited, and the connection goes on", async (t) => {
    t.mock.timers.enable({ apis: ["setTimeout"] });
    const { options, release } = withholding("GET_CONFIG");
    const { peer, device } = await open(t, options);
    const reading = assert.rejects(
      device.readConfig(0, 8, { timeout: 50 }),
      virtioError("ERR_VIRTIO_TIMEOUT", "within 50 ms of waiting for the reply to GET_CONFIG"),
    );
    await peer.received("GET_CONFIG");
    t.mock.timers.tick(50);
    await reading;
    release(peer);
    assert.equal((await device.readConfig(0, 8)).length, 8);
  });

  test("of connect: bounds every later operation, too", async (t) => {
    t.mock.timers.enable({ apis: ["setTimeout"] });
    const { options } = withholding("GET_CONFIG");
    const peer = new ScriptedPeer(options);
    t.after(() => peer.close());
    const device = await VhostUser.connect(peer.path, { timeout: 77 });
    const reading = assert.rejects(device.readConfig(0, 8), virtioError("ERR_VIRTIO_TIMEOUT", "77 ms"));
    await peer.received("GET_CONFIG");
    t.mock.timers.tick(77);
    await reading;
    peer.hangUp();
    await device.close();
  });

  test("a change that waits behind a silent one is bounded by its own limit", async (t) => {
    t.mock.timers.enable({ apis: ["setTimeout"] });
    const { peer, device } = await open(t, withholding("ADD_MEM_REG").options);
    const first = assert.rejects(device.mapMemory(1), virtioError("ERR_VIRTIO_TIMEOUT", "10000 ms"));
    await peer.received("ADD_MEM_REG");
    const second = assert.rejects(
      device.mapMemory(1, { timeout: 5 }),
      virtioError("ERR_VIRTIO_TIMEOUT", "5 ms of waiting for the reply to ADD_MEM_REG"),
    );
    t.mock.timers.tick(5);
    await second;
    t.mock.timers.tick(9_995);
    await first;
    assert.equal(peer.all("ADD_MEM_REG").length, 1);
    peer.hangUp();
  });
});

describe("close", () => {
  test("BASIC-DRV-23 queues stop before memory is withdrawn, and that before it is freed", async (t) => {
    const { options, release } = withholding("GET_VRING_BASE");
    const { peer, device, region } = await openRunning(t, options);
    const before = peer.messages.length;
    const closing = device.close();
    await peer.received("GET_VRING_BASE");
    assert.equal(region.buffer.byteLength, 2 ** 21);
    assert.deepEqual(peer.names.slice(before), ["SET_VRING_ENABLE", "GET_VRING_BASE"]);
    release(peer);
    await closing;
    assert.deepEqual(peer.names.slice(before), ["SET_VRING_ENABLE", "GET_VRING_BASE", "REM_MEM_REG"]);
    assert.equal(region.buffer.byteLength, 0);
    await peer.until(() => !peer.connected);
  });

  test("twice is once; everything afterwards is refused; onLost is told once", async (t) => {
    const { peer, device, queue } = await openRunning(t);
    let told = 0;
    const lost = new Promise<Error>((resolve) => {
      device.onLost = (error) => {
        told++;
        resolve(error);
      };
    });
    const first = device.close();
    assert.equal(device.close(), first);
    await first;
    await device[Symbol.asyncDispose]();
    assert.ok(virtioError("ERR_VIRTIO_CLOSED")(await lost));
    assert.equal(told, 1);
    assert.equal(peer.all("GET_VRING_BASE").length, 1);
    assert.throws(() => queue.notify(0), virtioError("ERR_VIRTIO_CLOSED"));
    assert.equal(queue.completion.fd, -1);
    const calls = [
      device.negotiate(0n),
      device.readConfig(0, 8),
      device.writeConfig(0, Uint8Array.of(1)),
      device.mapMemory(1),
      device.startQueues([]),
      device.stopQueues(),
    ];
    for (const result of await Promise.allSettled(calls)) {
      assert.equal(result.status, "rejected");
      assert.ok(virtioError("ERR_VIRTIO_CLOSED", "open it again")(result.reason));
    }
  });

  test("what is awaited meanwhile rejects at once, and leaves nothing", async (t) => {
    const before = held();
    const { options, release } = withholding("ADD_MEM_REG");
    const peer = new ScriptedPeer(options);
    t.after(() => peer.close());
    const device = await VhostUser.connect(peer.path);
    const mapping = assert.rejects(device.mapMemory(1), virtioError("ERR_VIRTIO_CLOSED"));
    const behind = assert.rejects(device.mapMemory(1), virtioError("ERR_VIRTIO_CLOSED"));
    await peer.received("ADD_MEM_REG");
    const closing = device.close();
    await mapping;
    await behind;
    release(peer);
    await closing;
    await peer.until(() => !peer.connected);
    assert.equal(peer.names.at(-1), "REM_MEM_REG", "the memory of the abandoned call");
    peer.close();
    assert.deepEqual(held(), before);
  });

  test("never rejects and is bounded when the back-end is silent, refuses, lies or is dead", async (t) => {
    t.mock.timers.enable({ apis: ["setTimeout"] });
    const before = held();
    const peers: PeerOptions[] = [
      { misbehave: ({ name }) => (name === "GET_VRING_BASE" ? {} : undefined) },
      { misbehave: ({ name }) => (name === "GET_VRING_BASE" ? { bytes: Buffer.alloc(12) } : undefined) },
      { misbehave: ({ name }) => (name === "GET_VRING_BASE" ? { close: true } : undefined) },
      { misbehave: ({ name }) => (name === "REM_MEM_REG" ? {} : undefined) },
      { status: ({ name }) => (name === "REM_MEM_REG" ? 1n : 0n) },
    ];
    for (const options of peers) {
      const peer = new ScriptedPeer(options);
      t.after(() => peer.close());
      const device = await VhostUser.connect(peer.path);
      await device.negotiate(0n);
      const region = await device.mapMemory(1);
      await device.startQueues([place(region, 0, 8)]);
      const closing = device.close().then(() => "closed" as const);
      const turn = () => new Promise<"turn">((resolve) => setImmediate(resolve, "turn"));
      await peer.received("GET_VRING_BASE");
      while ((await Promise.race([closing, turn()])) === "turn") t.mock.timers.tick(10_000);
      assert.equal(region.buffer.byteLength, 0);
      await peer.until(() => !peer.connected);
      peer.close();
    }
    assert.deepEqual(held(), before);
  });
});

describe("afterClose", () => {
  test("runs once, when everything is released; close waits for it and hands on what it throws", async (t) => {
    const peer = new ScriptedPeer();
    t.after(() => peer.close());
    const events: string[] = [];
    const device = await VhostUser.connect(peer.path, {
      async afterClose() {
        events.push("begins");
        await peer.until(() => !peer.connected);
        events.push("ends");
        throw new RangeError("its own");
      },
    });
    const region = await device.mapMemory(1);
    await assert.rejects(device.close(), RangeError);
    assert.equal(region.buffer.byteLength, 0);
    await assert.rejects(device.close(), RangeError, "the same promise");
    assert.deepEqual(events, ["begins", "ends"]);
  });

  test("does not run when there was no connection", async (t) => {
    const peer = new ScriptedPeer({ misbehave: () => ({ close: true }) });
    t.after(() => peer.close());
    const afterClose = () => assert.fail("never connected");
    await assert.rejects(VhostUser.connect(peer.path, { afterClose }), virtioError("ERR_VIRTIO_DISCONNECTED"));
  });
});

describe("nothing is left", () => {
  test("of 200 connections, whole and broken off, no descriptor and no mapping", async (t) => {
    const step = ["GET_FEATURES", "SET_BACKEND_REQ_FD", "ADD_MEM_REG", "SET_VRING_CALL", "GET_VRING_BASE", "none"];
    const cycle = async (i: number) => {
      const peer = new ScriptedPeer({
        misbehave: ({ name }) => (name === step[i % step.length] ? { close: true } : undefined),
      });
      t.after(() => peer.close());
      try {
        const device = await VhostUser.connect(peer.path);
        await live(device).finally(() => device.close());
        assert.equal(step[i % step.length], "none");
      } catch (error) {
        virtioError("ERR_VIRTIO_DISCONNECTED")(error);
      }
      await peer.until(() => !peer.connected);
      peer.close();
    };
    await cycle(0);
    const before = held();
    for (let i = 0; i < 200; i++) await cycle(i);
    assert.deepEqual(held(), before);
  });
});

describe("process", () => {
  test("that runs out of descriptors at any point gets an error, and loses none", async (t) => {
    const peer = new ScriptedPeer();
    t.after(() => peer.close());
    const program = `import { closeSync, openSync, readdirSync } from "node:fs";
      import { live } from ${JSON.stringify(new URL("../support.js", import.meta.url).href)};
      const open = () => readdirSync("/proc/self/fd").length;
      const life = async () => {
        const device = await VhostUser.connect(${path});
        await live(device).finally(() => device.close());
      };
      await life();
      const before = open();
      for (let free = 0; free < 24; free++) {
        const hoard = [];
        try {
          for (;;) hoard.push(openSync("/dev/null"));
        } catch {
          for (const fd of hoard.splice(0, free)) closeSync(fd);
        }
        // A descriptor that comes with a reply and finds no room is cut off, for which there is no errno.
        const isCut = (error) => error.code === "ERR_VIRTIO_PROTOCOL" && error.message.includes("ulimit -n");
        const cause = (error) => (isCut(error) ? 24 : error.cause?.errno ?? error.errno);
        const outcome = await life().then(() => "whole", cause);
        for (const fd of hoard) closeSync(fd);
        console.log(outcome, open() - before);
      }`;
    const { code, output } = await run(peer, program, ["-n", "100"]);
    assert.equal(code, 0, output);
    const lines = output.trimEnd().split("\n");
    const whole = lines.findIndex((each) => each === "whole 0");
    assert.ok(whole > 10, output);
    assert.deepEqual(
      lines,
      lines.map((_, i) => (i < whole ? "24 0" : "whole 0")), // EMFILE
    );
  });

  /** Run a program that gets the address of `peer` as its argument, and return its output and exit code. */
  async function run(
    peer: ScriptedPeer,
    program: string,
    limits = ["-n", "1000"],
  ): Promise<{ code: number; output: string }> {
    const transports = new URL("../../../src/transports/index.js", import.meta.url).href;
    const text = `import { VhostUser } from ${JSON.stringify(transports)};\n${program}`;
    const node = [process.execPath, "--input-type=module", "-e", text, peer.path];
    const child = spawn("sh", ["-c", `ulimit ${limits.join(" ")} && exec "$@"`, "sh", ...node], {
      stdio: ["ignore", "pipe", "pipe"],
      timeout: 30_000,
    });
    let output = "";
    for (const stream of [child.stdout, child.stderr])
      stream.on("data", (chunk: Buffer) => (output += chunk.toString()));
    const [code] = (await once(child, "close")) as [number];
    return { code, output };
  }
  const path = "process.argv[1]";

  test("ends by itself while a connection is open but nothing is awaited", async (t) => {
    const peer = new ScriptedPeer();
    t.after(() => peer.close());
    const program = `import { place } from ${JSON.stringify(new URL("../support.js", import.meta.url).href)};
      const device = await VhostUser.connect(${path});
      await device.negotiate(0n);
      await device.startQueues([place(await device.mapMemory(1), 0, 8)]);
      device.onLost = () => console.log("lost"); console.log("idle");`;
    assert.deepEqual(await run(peer, program), { code: 0, output: "idle\n" });
  });

  test("stays while a reply is awaited, and hears of the end of the wait", async (t) => {
    const peer = new ScriptedPeer(withholding("GET_CONFIG").options);
    t.after(() => peer.close());
    const program = `const device = await VhostUser.connect(${path});
      await device.readConfig(0, 8, { timeout: 100 }).catch((error) => console.log(error.code));`;
    assert.deepEqual(await run(peer, program), { code: 0, output: "ERR_VIRTIO_TIMEOUT\n" });
  });

  test("gets what onLost and onConfigChange throw, and the connection does not", async (t) => {
    const peer = new ScriptedPeer();
    t.after(() => peer.close());
    const program = `const device = await VhostUser.connect(${path});
      process.on("uncaughtException", async (error) => {
        console.log(error.message);
        await device.close();
      });
      device.onLost = (error) => { throw new Error("mine: " + error.code); };
      await device.close();`;
    assert.deepEqual(await run(peer, program), { code: 0, output: "mine: ERR_VIRTIO_CLOSED\n" });
  });
});
