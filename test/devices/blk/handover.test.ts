/** Queues handed over: what both sides are told, give back, refuse and lose. Both in one thread, so that a test decides. */

import assert from "node:assert/strict";
import { describe, type TestContext, test } from "node:test";
import { MessageChannel, type MessagePort } from "node:worker_threads";
import { type AdoptOptions, BlockDevice, type HandOverOptions } from "../../../src/devices/blk/index.js";
import { VirtioError } from "../../../src/errors.js";
import { BlkFeature } from "../../../src/protocol/blk.js";
import { EventFd } from "../../../src/sys/index.js";
import { FakeTransport, takeBlk } from "../../../src/testing/index.js";
import type { QueueNotifier, QueueSetup } from "../../../src/transports/transport.js";
import { VirtioFeature } from "../../../src/virtqueue/index.js";
import { collectGarbage, mappings, openFds, turnUntil } from "../../sys/helpers.js";
import { answerRead, type Bench, failure, openFake, pattern, RINGS, refused, turn } from "./support.js";

const MIB = 1 << 20;

/** A device with queues to give away. */
function openQueues(t: TestContext, queues = 2, options: Parameters<typeof openFake>[1] = {}): Promise<Bench> {
  const { features = 0n, config, open, ...rest } = options;
  return openFake(t, {
    ...{ features: features | BlkFeature.MQ, config: { numQueues: queues, ...config }, maxQueues: queues },
    ...{ open: { queues, ...open }, ...rest },
  });
}

/** Hand queues over and adopt them in this thread. */
async function adoptFrom(
  t: TestContext,
  disk: BlockDevice,
  options: HandOverOptions = {},
  how: AdoptOptions = {},
): Promise<BlockDevice> {
  const adopted = await BlockDevice.adopt(await disk.handOver({ memory: MIB, ...options }), how);
  t.after(() => adopted.close());
  return adopted;
}

/** Wait for what needs messages between the two sides, which take an unknown number of turns. */
async function until(condition: () => boolean, what: string): Promise<void> {
  assert.ok(await turnUntil(condition, 100_000), what);
}

/** What the device has been asked; waits for something. */
async function asked(bench: Bench): Promise<Awaited<ReturnType<Bench["take"]>>> {
  let requests = await bench.take();
  await until(() => {
    if (requests.length === 0) requests = bench.transport.queues.flatMap((queue) => takeBlk(queue));
    return requests.length > 0;
  }, "the device is asked nothing");
  return requests;
}

describe("a queue that was handed over", () => {
  for (const [name, features] of Object.entries(RINGS)) {
    for (const mode of ["event", "hybrid", "poll"] as const) {
      test(`${name}, ${mode}: serves the adopter, and the one who opened the device again afterwards`, async (t) => {
        const bench = await openQueues(t, 2, { features, open: { queueSize: 8 } });
        const { disk, transport } = bench;
        const poll = (device: BlockDevice): void => {
          if (device.mode === "poll") device.poll();
        };
        for (let round = 0; round < 20; round++) {
          const adopted = await adoptFrom(t, disk, {}, { mode });
          assert.equal(adopted.mode, mode);
          for (const [device, index] of [
            [adopted, 1],
            [disk, 0],
          ] as const) {
            for (let i = 0; i <= round % 3; i++) {
              const position = 512 * (round + i);
              const reading = device.read(i === 0 ? await device.allocate(1024) : new Uint8Array(1024), { position });
              const [request] = await asked(bench);
              assert.equal(request.sector, round + i);
              assert.equal(takeBlk(transport.queues[1 - index]).length, 0, "the other queue has work");
              answerRead(request);
              await until(() => {
                poll(device);
                return device.pending === 0;
              }, "the answer is not seen");
              const { buffer } = await reading;
              const bytes = buffer instanceof Uint8Array ? buffer : buffer.bytes;
              assert.deepEqual(bytes, pattern(1024, request.sector));
            }
          }
          await adopted.close();
          await assert.rejects(adopted.read(new Uint8Array(512)), failure("ERR_VIRTIO_CLOSED"));
        }
        // Both queues serve the opener again.
        const calls = [disk.read(new Uint8Array(512)), disk.read(new Uint8Array(512), { position: 512 })];
        const requests = await asked(bench);
        assert.equal(requests.length, 2);
        for (const request of requests) answerRead(request);
        await Promise.all(calls);
      });
    }
  }

  test("an adopted device knows what the other does", async (t) => {
    const bench = await openQueues(t, 3, {
      features: BlkFeature.FLUSH | BlkFeature.BLK_SIZE | VirtioFeature.EVENT_IDX,
      config: { blkSize: 4096 },
      open: { readOnly: true, mode: "event" },
    });
    const adopted = await adoptFrom(t, bench.disk, { queues: 2 });
    assert.deepEqual(adopted.info, { ...bench.disk.info, queues: 2 });
    assert.equal(adopted.mode, "event", "unless said otherwise");
    assert.equal(adopted.capacity, bench.disk.capacity);
    assert.equal(adopted.blockSize, 4096);
    await assert.rejects(adopted.write(new Uint8Array(4096)), failure("ERR_VIRTIO_READ_ONLY"));
  });

  test("its memory is its own, and goes back with it", async (t) => {
    const { disk } = await openQueues(t, 2);
    const span = (buffer: { iovaLo: number; iovaHi: number; length: number }) => {
      const start = buffer.iovaHi * 2 ** 32 + buffer.iovaLo;
      return [start, start + buffer.length];
    };
    const before = await disk.allocate(MIB);
    const adopted = await adoptFrom(t, disk, { memory: 2 * MIB });
    const after = await disk.allocate(40 * MIB);
    const theirs = [await adopted.allocate(MIB), await adopted.allocate(MIB - 4096), await adopted.allocate(4096)];
    for (const [start, end] of theirs.map(span)) {
      for (const [first, last] of [before, after].map(span)) assert.ok(end <= first || last <= start);
    }
    await assert.rejects(adopted.allocate(1), failure("ERR_VIRTIO_MEMORY", "pass more to handOver()"));
    theirs[1].bytes.fill(7);
    assert.equal(theirs[1].bytes[0], 7);
    await adopted.close();
    assert.equal(theirs[1].bytes.length, 0, "lent buffers end with the device");
    after.release();
    // All of it fits into the first region again.
    const whole = await disk.allocate(46 * MIB);
    assert.equal(whole.region, before.region);
    const none = await adoptFrom(t, disk, { memory: 0 });
    await assert.rejects(none.allocate(1), failure("ERR_VIRTIO_MEMORY"));
  });

  test("takeQueue of the adopted device; a queue goes back idle only", async (t) => {
    const bench = await openQueues(t, 3);
    const adopted = await adoptFrom(t, bench.disk, { queues: 2 });
    const queue = adopted.takeQueue();
    assert.equal(queue.index, 2);
    const errors: Error[] = [];
    queue.onError = (error) => errors.push(error);
    queue.submitRead(0, await adopted.allocate(512), 0, 512);
    queue.kick();
    const [request] = await asked(bench);
    await adopted.close();
    assert.deepEqual(
      errors.map((error) => error instanceof VirtioError && error.code),
      ["ERR_VIRTIO_CLOSED"],
    );
    answerRead(request);
    // Queue 1 is back, queue 2 with its request in flight is lost.
    await assert.rejects(bench.disk.handOver({ queues: 3 }), failure("ERR_VIRTIO_QUEUES", "1 went with threads"));
    const again = await adoptFrom(t, bench.disk);
    assert.equal(again.takeQueue().index, 1);
  });

  test("the modes of both sides are their own", async (t) => {
    const { disk } = await openQueues(t, 2, { open: { mode: "poll" } });
    const adopted = await adoptFrom(t, disk);
    assert.equal(adopted.mode, "poll");
    adopted.mode = "event";
    assert.equal(disk.mode, "poll");
    disk.mode = "hybrid";
    await adopted.close();
    assert.equal(disk.takeQueue().mode, "hybrid", "a queue that comes back is as the others");
  });
});

describe("the config space", () => {
  test("BLK-DRV-08 a new capacity counts everywhere, and everybody is told", async (t) => {
    const bench = await openQueues(t, 2);
    const adopted = await adoptFrom(t, bench.disk);
    const seen: [string, number][] = [];
    bench.disk.on("resize", (capacity) => seen.push(["opener", capacity]));
    adopted.on("resize", (capacity) => seen.push(["adopter", capacity]));
    const position = MIB;
    await assert.rejects(adopted.read(new Uint8Array(512), { position }), refused("position"));
    bench.transport.changeConfig(Uint8Array.of(1, 8)); // 2049 sectors
    await until(() => seen.length === 2, "the adopter is not told");
    assert.deepEqual(seen, [
      ["opener", MIB + 512],
      ["adopter", MIB + 512],
    ]);
    const reading = adopted.read(await adopted.allocate(512), { position });
    answerRead((await asked(bench))[0]);
    await reading;
    // A queue that comes back knows it, too.
    await adopted.close();
    const calls = [0, 1].map(() => bench.disk.read(new Uint8Array(512), { position }));
    for (const request of await asked(bench)) answerRead(request);
    await Promise.all(calls);
  });

  test("a change between handing over and adopting is not lost", async (t) => {
    const bench = await openQueues(t, 2);
    const port = await bench.disk.handOver();
    bench.transport.changeConfig(Uint8Array.of(16, 0));
    await turn();
    const adopted = await BlockDevice.adopt(port);
    assert.equal(adopted.capacity, 16 * 512);
    await adopted.close();
  });

  test("setWriteback, wherever it is called, is known everywhere, and nobody is told of a change", async (t) => {
    const bench = await openQueues(t, 3, { features: BlkFeature.FLUSH | BlkFeature.CONFIG_WCE });
    const { disk, transport } = bench;
    const one = await adoptFrom(t, disk);
    const other = await adoptFrom(t, disk);
    for (const each of [disk, one, other]) each.on("config", () => assert.fail("the device did not change it"));
    for (const [caller, enabled] of [
      [one, true],
      [disk, false],
      [other, true],
    ] as const) {
      assert.equal(await caller.setWriteback(enabled), enabled);
      const cache = enabled ? "writeback" : "writethrough";
      await until(
        () => [disk, one, other].every(({ info }) => info.cache === cache),
        `${cache} is not known everywhere`,
      );
    }
    assert.equal(transport.steps.filter((step) => step === "writeConfig").length, 3);
    assert.equal((await other.refresh()).writeback, true);
  });

  test("what the device refuses the opener, it refuses the adopter", async (t) => {
    const bench = await openQueues(t, 2, { features: BlkFeature.FLUSH | BlkFeature.CONFIG_WCE });
    const adopted = await adoptFrom(t, bench.disk);
    bench.transport.failures.set(
      "writeConfig",
      new VirtioError("ERR_VIRTIO_REJECTED", "no", { errno: 5, syscall: "x" }),
    );
    await assert.rejects(adopted.setWriteback(true), (error) => {
      return failure("ERR_VIRTIO_REJECTED", /^no$/)(error) && (error as VirtioError).errno === 5;
    });
    bench.transport.failures.clear();
    bench.transport.failures.set("readConfig", new RangeError("odd"));
    await assert.rejects(adopted.refresh(), failure("ERR_VIRTIO_DISCONNECTED", "RangeError: odd"));
    bench.transport.failures.clear();
    assert.equal(await adopted.setWriteback(true), true);
    assert.equal(adopted.pending, 0);
  });

  test("an opener that does not answer gives an error in time", async (t) => {
    const bench = await openQueues(t, 2, { open: { timeout: 1000 } });
    const adopted = await adoptFrom(t, bench.disk);
    t.mock.method(bench.transport, "readConfig", () => new Promise(() => {}));
    t.mock.timers.enable({ apis: ["setTimeout"] });
    const waiting = assert.rejects(adopted.refresh(), failure("ERR_VIRTIO_TIMEOUT", "6000 ms"));
    await turn();
    t.mock.timers.tick(6000);
    await waiting;
  });
});

describe("refused", () => {
  test("ERR_VIRTIO_QUEUES: more queues than are left, or while calls are pending; nothing is changed", async (t) => {
    const bench = await openQueues(t, 3);
    const { disk } = bench;
    await assert.rejects(disk.handOver({ queues: 4 }), failure("ERR_VIRTIO_QUEUES", "4 queue(s) were asked for and 3"));
    const reading = disk.read(new Uint8Array(512));
    await assert.rejects(disk.handOver(), failure("ERR_VIRTIO_QUEUES", "1 calls are pending"));
    answerRead((await asked(bench))[0]);
    await reading;
    const first = await adoptFrom(t, disk, { queues: 2 });
    assert.deepEqual([first.takeQueue().index, first.takeQueue().index], [2, 1]);
    const another = disk.read(new Uint8Array(512));
    answerRead((await asked(bench))[0]);
    await another;
    const second = await adoptFrom(t, disk);
    await assert.rejects(disk.handOver(), failure("ERR_VIRTIO_QUEUES", "0 are left"));
    await assert.rejects(disk.read(new Uint8Array(512)), failure("ERR_VIRTIO_QUEUES", "handed over"));
    assert.throws(() => disk.takeQueue(), failure("ERR_VIRTIO_QUEUES", "handed over"));
    await second.close();
    assert.equal(disk.takeQueue().index, 0);
    await assert.rejects(disk.handOver(), failure("ERR_VIRTIO_QUEUES"), "a queue that was taken is not handed over");
  });

  test("wrong options", async (t) => {
    const { disk } = await openQueues(t, 2);
    for (const queues of [0, -1, 1.5, 70_000]) await assert.rejects(disk.handOver({ queues }), refused("queues"));
    for (const memory of [-1, 0.5, Number.NaN]) await assert.rejects(disk.handOver({ memory }), refused("memory"));
    await assert.rejects(disk.handOver({ Queues: 1 } as HandOverOptions), refused("options"));
    await assert.rejects(disk.handOver(null as unknown as HandOverOptions), refused("options"));
    const port = await disk.handOver();
    await assert.rejects(BlockDevice.adopt(port, { mode: "fast" } as unknown as AdoptOptions), refused("mode"));
    await assert.rejects(BlockDevice.adopt(port, { modes: "poll" } as unknown as AdoptOptions), refused("options"));
    await assert.rejects(BlockDevice.adopt(port, 7 as unknown as AdoptOptions), refused("options"));
    await (await BlockDevice.adopt(port)).close();
  });

  test("to adopt what was not handed over, or twice", async (t) => {
    const { disk } = await openQueues(t, 2);
    const port = await disk.handOver();
    for (const wrong of [undefined, null, 1, "port", {}, { kind: "virtio-driver", port }, new EventTarget()]) {
      await assert.rejects(BlockDevice.adopt(wrong as unknown as MessagePort), refused("port"));
    }
    const { port1, port2 } = new MessageChannel();
    await assert.rejects(BlockDevice.adopt(port2), refused("port"));
    for (const message of ["setup", null, { kind: 1 }, { type: "lost" }]) {
      port1.postMessage(message);
      await assert.rejects(BlockDevice.adopt(port2), refused("port"));
    }
    port1.close();
    const adopted = await BlockDevice.adopt(port);
    await assert.rejects(BlockDevice.adopt(port), refused("port"));
    await adopted.close();
    await assert.rejects(BlockDevice.adopt(port), refused("port"));
  });

  test("ERR_VIRTIO_MEMORY when the device takes no more memory; the queues stay", async (t) => {
    const { disk } = await openQueues(t, 2, { maxRegions: 1 });
    await assert.rejects(disk.handOver({ queues: 2, memory: 100 * MIB }), failure("ERR_VIRTIO_MEMORY"));
    const adopted = await adoptFrom(t, disk, { queues: 2, memory: 4 * MIB });
    assert.equal(adopted.info.queues, 2);
  });

  test("ERR_VIRTIO_UNSUPPORTED by a device that was adopted itself, and where no eventfd notifies the device", async (t) => {
    const { disk } = await openQueues(t, 2);
    const adopted = await adoptFrom(t, disk);
    await assert.rejects(adopted.handOver(), failure("ERR_VIRTIO_UNSUPPORTED", "the thread that opened it"));
    class NoKick extends FakeTransport {
      override async startQueues(queues: readonly QueueSetup[]): Promise<QueueNotifier[]> {
        const notifiers = await super.startQueues(queues);
        return notifiers.map(({ index, completion }) => ({ index, completion, notify: () => {} }));
      }
    }
    const plain = await BlockDevice.open(new NoKick(), { capacity: MIB });
    await assert.rejects(plain.handOver(), failure("ERR_VIRTIO_UNSUPPORTED", "eventfds"));
    await plain.close();
  });
});

describe("a port that nobody adopts", () => {
  test("closed, it gives queues and memory back", async (t) => {
    const { disk } = await openQueues(t, 2);
    const before = openFds();
    const port = await disk.handOver({ queues: 2, memory: 40 * MIB });
    port.close();
    await until(() => openFds() === before, "its descriptors stay open");
    const adopted = await adoptFrom(t, disk, { queues: 2, memory: 40 * MIB });
    const { length } = await adopted.allocate(MIB);
    assert.equal(length, MIB);
  });

  test("adopted after the device was closed or lost, it says so", async (t) => {
    for (const end of ["close", "lose"] as const) {
      const bench = await openQueues(t, 2);
      const port = await bench.disk.handOver();
      if (end === "close") await bench.disk.close();
      else bench.transport.lose(new VirtioError("ERR_VIRTIO_QUEUE_BROKEN", "the device lied"));
      await turn();
      const error = end === "close" ? failure("ERR_VIRTIO_CLOSED") : failure("ERR_VIRTIO_QUEUE_BROKEN", "lied");
      await assert.rejects(BlockDevice.adopt(port), error);
      await assert.rejects(bench.disk.handOver(), error);
    }
  });

  test("the device does not wait for it when it is closed", async (t) => {
    const bench = await openQueues(t, 2);
    const port = await bench.disk.handOver();
    t.mock.timers.enable({ apis: ["setTimeout"] }); // time stands still
    await bench.disk.close();
    assert.equal(bench.transport.regionsClosed, 1);
    port.close();
  });

  test("queues are handed over by several calls at once", async (t) => {
    const { disk } = await openQueues(t, 3);
    const ports = await Promise.all([disk.handOver({ memory: 60 * MIB }), disk.handOver({ memory: 60 * MIB })]);
    await assert.rejects(disk.handOver({ queues: 2 }), failure("ERR_VIRTIO_QUEUES"));
    const adopted = await Promise.all(ports.map((port) => BlockDevice.adopt(port)));
    assert.deepEqual(
      adopted.map((each) => each.takeQueue().index),
      [2, 1],
    );
    await Promise.all(adopted.map((each) => each.close()));
  });
});

describe("closing", () => {
  test("BASIC-DRV-23 by the opener: adopters end what is in flight, then the device is stopped", async (t) => {
    const bench = await openQueues(t, 2);
    const { disk, transport } = bench;
    const adopted = await adoptFrom(t, disk);
    const losses: VirtioError[] = [];
    adopted.on("lost", (error) => losses.push(error));
    const reading = adopted.read(new Uint8Array(512));
    const [request] = await asked(bench);
    const closing = disk.close();
    await until(() => losses.length === 1, "the adopter is not told");
    assert.ok(failure("ERR_VIRTIO_CLOSED", "by the thread that opened it")(losses[0]));
    await assert.rejects(adopted.read(new Uint8Array(512)), failure("ERR_VIRTIO_CLOSED"));
    assert.ok(!transport.steps.includes("close"));
    answerRead(request);
    assert.equal((await reading).bytesRead, 512);
    await closing;
    await adopted.close();
    assert.equal(losses.length, 1);
    assert.equal(transport.regionsClosed, 1);
  });

  test("BASIC-DRV-23 a request that hangs: after five seconds the adopter gives up and the device is stopped", async (t) => {
    const bench = await openQueues(t, 2);
    const { disk, transport } = bench;
    const adopted = await adoptFrom(t, disk);
    let isTold = false;
    adopted.on("lost", () => {
      isTold = true;
    });
    let rejected: unknown;
    const reading = adopted.read(new Uint8Array(512)).catch((error: unknown) => {
      rejected = error;
    });
    await asked(bench);
    t.mock.timers.enable({ apis: ["setTimeout"] });
    const closing = disk.close();
    await until(() => isTold, "the adopter is not told");
    t.mock.timers.tick(4999);
    await turn();
    assert.equal(rejected, undefined);
    t.mock.timers.tick(1);
    await reading;
    await closing;
    assert.ok(failure("ERR_VIRTIO_CLOSED")(rejected));
    assert.equal(transport.regionsClosed, 1);
    await adopted.close();
  });

  test("an adopter that does not answer holds the opener up for a second more, no longer", async (t) => {
    const bench = await openQueues(t, 2);
    const port = await bench.disk.handOver();
    const adopted = await BlockDevice.adopt(port);
    const reading = adopted.read(new Uint8Array(512));
    await asked(bench);
    t.mock.timers.enable({ apis: ["setTimeout"] });
    port.removeAllListeners("message"); // deaf from now on
    let isClosed = false;
    const closing = bench.disk.close().finally(() => {
      isClosed = true;
    });
    await turn();
    t.mock.timers.tick(5999);
    await turn();
    assert.ok(!isClosed);
    t.mock.timers.tick(1);
    await closing;
    assert.equal(bench.transport.regionsClosed, 1);
    // Its own mapping and descriptors are still there: it notices nothing, and nothing breaks. What has taken the
    // numbers of those that were closed is not touched.
    const bystanders = Array.from({ length: 64 }, () => EventFd.create());
    const buffer = await adopted.allocate(512);
    buffer.bytes.fill(1);
    const another = adopted.read(buffer);
    await turn();
    assert.ok(bystanders.every((event) => !event.drain()));
    for (const event of bystanders) event.close();
    const rejected = [reading, another].map((call) => assert.rejects(call, failure("ERR_VIRTIO_CLOSED")));
    const end = adopted.close();
    await turn();
    t.mock.timers.tick(5000);
    await turn();
    t.mock.timers.tick(5000); // nobody takes the queues any more
    await end;
    await Promise.all(rejected);
  });

  test("by both at the same time", async (t) => {
    const { disk, transport } = await openQueues(t, 2);
    const adopted = await adoptFrom(t, disk);
    adopted.on("lost", () => assert.fail("whoever closes need not be told"));
    await Promise.all([adopted.close(), disk.close(), adopted.close(), disk.close()]);
    assert.equal(transport.steps.filter((step) => step === "close").length, 1);
  });

  test("by an adopter whose requests hang: queue and memory are lost to the device until it is closed", async (t) => {
    const bench = await openQueues(t, 2, { maxRegions: 1 });
    const { disk } = bench;
    const adopted = await adoptFrom(t, disk, { memory: 30 * MIB });
    const reading = assert.rejects(adopted.read(new Uint8Array(512)), failure("ERR_VIRTIO_CLOSED"));
    const [late] = await asked(bench);
    t.mock.timers.enable({ apis: ["setTimeout"] });
    const closing = adopted.close();
    t.mock.timers.tick(5000);
    await closing;
    await reading;
    t.mock.timers.reset();
    await assert.rejects(disk.handOver({ queues: 2 }), failure("ERR_VIRTIO_QUEUES", "1 went with threads"));
    await assert.rejects(disk.allocate(30 * MIB), failure("ERR_VIRTIO_MEMORY"));
    answerRead(late); // into memory that is nobody else's
    const other = disk.read(new Uint8Array(512));
    answerRead((await asked(bench))[0]);
    assert.equal((await other).bytesRead, 512);
  });

  test("200 times: no descriptor and no mapping stays", async (t) => {
    const { disk } = await openQueues(t, 2);
    const cycle = async (i: number): Promise<void> => {
      const adopted = await BlockDevice.adopt(await disk.handOver({ queues: 1 + (i % 2) }));
      if (i % 3 === 0) await adopted.allocate(4096);
      await adopted.close();
    };
    for (let i = 0; i < 5; i++) await cycle(i);
    const before = { fds: openFds(), maps: mappings("virtio-driver-fake").length };
    for (let i = 0; i < 200; i++) await cycle(i);
    collectGarbage();
    assert.deepEqual({ fds: openFds(), maps: mappings("virtio-driver-fake").length }, before);
  });
});

describe("BASIC-DRV-04 losing", () => {
  test("a lost device is lost everywhere, with the same error", async (t) => {
    const bench = await openQueues(t, 3);
    const adopted = [await adoptFrom(t, bench.disk), await adoptFrom(t, bench.disk)];
    const losses: VirtioError[] = [];
    const calls: Promise<void>[] = [];
    const same = failure("ERR_VIRTIO_DISCONNECTED", "the device is gone");
    for (const device of [bench.disk, ...adopted]) {
      device.on("lost", (error) => losses.push(error));
      calls.push(assert.rejects(device.read(new Uint8Array(512)), same));
    }
    await asked(bench);
    bench.transport.lose(new VirtioError("ERR_VIRTIO_DISCONNECTED", "the device is gone"));
    await Promise.all(calls);
    for (const device of adopted) {
      await assert.rejects(device.allocate(1), same);
      await assert.rejects(device.refresh(), same);
    }
    assert.equal(losses.length, 3);
    await Promise.all(adopted.map((device) => device.close()));
    await bench.disk.close();
    assert.equal(losses.length, 3);
  });

  test("a call to the control channel ends, too", async (t) => {
    const bench = await openQueues(t, 2);
    const adopted = await adoptFrom(t, bench.disk);
    t.mock.method(bench.transport, "readConfig", () => new Promise(() => {}));
    const waiting = assert.rejects(adopted.refresh(), failure("ERR_VIRTIO_DISCONNECTED", "gone"));
    bench.transport.lose(new VirtioError("ERR_VIRTIO_DISCONNECTED", "gone"));
    await waiting;
    const other = await openQueues(t, 2);
    const second = await adoptFrom(t, other.disk);
    t.mock.method(other.transport, "readConfig", () => new Promise(() => {}));
    const closed = assert.rejects(second.refresh(), failure("ERR_VIRTIO_CLOSED"));
    await second.close();
    await closed;
  });

  for (const mode of ["event", "poll"] as const) {
    test(`${mode}: a queue that breaks for an adopter ends the device for all`, async (t) => {
      const bench = await openQueues(t, 2, { open: { mode } });
      const adopted = await adoptFrom(t, bench.disk);
      const losses: VirtioError[] = [];
      for (const device of [bench.disk, adopted]) device.on("lost", (error) => losses.push(error));
      const broken = failure("ERR_VIRTIO_QUEUE_BROKEN", "65535");
      const reading = assert.rejects(adopted.read(new Uint8Array(512)), broken);
      await asked(bench);
      bench.transport.queues[1].device.forge(0xffff, 513);
      bench.transport.queues[1].publish();
      if (mode === "poll") assert.throws(() => adopted.poll(), broken);
      await reading;
      await until(() => losses.length === 2, "the opener is not told");
      assert.ok(losses.every(broken));
      await assert.rejects(bench.disk.read(new Uint8Array(512)), broken);
      await adopted.close();
    });
  }

  test("an adopter that ends without close: its queues and memory are gone, the others go on", async (t) => {
    const bench = await openQueues(t, 2, { maxRegions: 1 });
    const { disk } = bench;
    const before = openFds();
    const port = await disk.handOver({ memory: 30 * MIB });
    const adopted = await BlockDevice.adopt(port);
    const lost = failure("ERR_VIRTIO_DISCONNECTED", "has ended");
    const reading = assert.rejects(adopted.read(new Uint8Array(512)), lost);
    const [late] = await asked(bench);
    port.close(); // what the end of a thread does
    await reading;
    await until(() => openFds() <= before, "the descriptors stay open");
    await assert.rejects(disk.handOver({ queues: 2 }), failure("ERR_VIRTIO_QUEUES", "1 went with threads"));
    await assert.rejects(disk.allocate(30 * MIB), failure("ERR_VIRTIO_MEMORY"));
    answerRead(late);
    const other = disk.read(new Uint8Array(512));
    answerRead((await asked(bench))[0]);
    assert.equal((await other).bytesRead, 512);
    t.mock.timers.enable({ apis: ["setTimeout"] }); // time stands still: nothing may wait for it
    await adopted.close();
    await disk.close();
  });
});
