/** What several threads on one block device must do, whatever is behind it: real workers, real endings. */

import assert from "node:assert/strict";
import { once } from "node:events";
import { after, test, type TestContext } from "node:test";
import { Worker } from "node:worker_threads";
import {
  type BlockDevice,
  type CompletionMode,
  openBlock,
  type OpenBlockOptions,
  VirtioError,
} from "../../src/index.js";
import { EventFd } from "../../src/sys/index.js";
import { openFds, turn } from "../sys/helpers.js";
import { check, churn, type Command, fill, type Part, type Reply } from "./block-worker.js";

const MIB = 1024 * 1024;
/** No honest wait is longer. */
const PATIENCE_MS = 60_000;

/** A back-end of a test: at least 24 MiB, as many queues as asked for. */
export interface Peer {
  readonly address: string;
  readonly options?: OpenBlockOptions;
  /** End it without a warning. */
  kill(): void;
  stop(): Promise<void>;
}

/** A device in another thread. */
class RemoteDisk {
  private readonly worker: Worker;

  private constructor(worker: Worker) {
    this.worker = worker;
  }

  /** Start a thread and hand a queue over to it. */
  static async start(t: TestContext, disk: BlockDevice, mode: CompletionMode): Promise<RemoteDisk> {
    const worker = new Worker(new URL("./block-worker.js", import.meta.url));
    t.after(() => worker.terminate());
    const remote = new RemoteDisk(worker);
    await remote.adopt(disk, mode);
    return remote;
  }

  /** Hand a queue over to the thread, which has given back the one before. */
  async adopt(disk: BlockDevice, mode: CompletionMode): Promise<void> {
    const port = await disk.handOver({ memory: 4 * MIB });
    this.worker.postMessage({ do: "adopt", port, mode } satisfies Command, [port]);
    await this.reply();
  }

  /** Have a command carried out. */
  async tell(command: Exclude<Command, { do: "adopt" }>): Promise<Reply> {
    this.worker.postMessage(command);
    return this.reply();
  }

  /** The next answer. */
  async reply(): Promise<Reply> {
    const [reply] = (await once(this.worker, "message")) as [Reply];
    assert.equal(reply.error, undefined);
    return reply;
  }

  /** End the thread in whatever it does. */
  async terminate(): Promise<void> {
    await this.worker.terminate();
  }
}

/** Part `i` of the disk, 2 MiB each. */
function partOf(i: number, seed: number): Part {
  return { from: 2 * MIB * i, to: 2 * MIB * (i + 1), seed };
}

/** All that is to be true of `start`ed peers called `name`. */
export function workerSuite(
  name: string,
  start: (queues: number) => Promise<Peer>,
  skip: false | string = false,
): void {
  const peers: Peer[] = [];
  after(() => Promise.all(peers.map((peer) => peer.stop())));

  /** A device with so many queues on a peer of its own; `fds` descriptors were open before. */
  const open = async (t: TestContext, queues: number): Promise<{ disk: BlockDevice; peer: Peer; fds: number }> => {
    const peer = await start(queues);
    peers.push(peer);
    // The first worker makes the runtime open descriptors that stay.
    await new Worker("", { eval: true }).terminate();
    const fds = openFds();
    const disk = await openBlock(peer.address, { ...peer.options, queues });
    t.after(async () => {
      // A peer that was killed has something to say of that; its test has heard it.
      await disk.close().catch(() => undefined);
      await peer.stop();
    });
    return { disk, peer, fds };
  };

  test(`${name}: what two workers and the main thread write, each of them reads`, { skip }, async (t) => {
    const { disk } = await open(t, 3);
    const workers = [await RemoteDisk.start(t, disk, "event"), await RemoteDisk.start(t, disk, "poll")];
    for (const [round, modes] of (
      [
        ["event", "poll"],
        ["hybrid", "event"],
        ["poll", "hybrid"],
      ] as const
    ).entries()) {
      if (round > 0) await Promise.all(workers.map((worker, i) => worker.adopt(disk, modes[i])));
      const parts = [0, 1, 2].map((i) => partOf(i, 10 * round + i));
      const [mine, ...theirs] = parts;
      await Promise.all([
        fill(disk, mine),
        ...workers.map((worker, i) => worker.tell({ do: "fill", part: theirs[i] })),
      ]);
      for (const part of parts) {
        await Promise.all([check(disk, part), ...workers.map((worker) => worker.tell({ do: "check", part }))]);
      }
      // Given back, handed over again in the next round.
      await Promise.all(workers.map((worker) => worker.tell({ do: "close" })));
    }
    (await disk.handOver({ queues: 3, memory: 0 })).close();
  });

  test(`${name}: a worker that is terminated in the midst of requests; the others go on`, { skip }, async (t) => {
    const { disk } = await open(t, 3);
    const survivor = await RemoteDisk.start(t, disk, "hybrid");
    const victim = await RemoteDisk.start(t, disk, "event");
    const mine = partOf(0, 1);
    const theirs = partOf(1, 2);
    await Promise.all([fill(disk, mine), survivor.tell({ do: "fill", part: theirs })]);
    assert.deepEqual(await victim.tell({ do: "churn", part: partOf(2, 3), depth: 32 }), { under: "way" });
    const checks = [check(disk, mine), survivor.tell({ do: "check", part: theirs })];
    await victim.terminate();
    await Promise.all(checks);
    await Promise.all([check(disk, theirs), survivor.tell({ do: "check", part: mine })]);
    await survivor.tell({ do: "close" });
    await untilLost(disk, 3, "2 are left (1 went with threads");
    const again = await RemoteDisk.start(t, disk, "hybrid");
    await again.tell({ do: "check", part: mine });
  });

  test(`${name}: closed by the main thread while workers are busy, all calls end`, { skip }, async (t) => {
    const { disk } = await open(t, 3);
    const workers = [await RemoteDisk.start(t, disk, "event"), await RemoteDisk.start(t, disk, "hybrid")];
    for (const [i, worker] of workers.entries()) {
      assert.deepEqual(await worker.tell({ do: "churn", part: partOf(i, i), depth: 8 }), { under: "way" });
    }
    const replies = workers.map((worker) => worker.reply());
    await disk.close();
    for (const { codes, done = 0 } of await Promise.all(replies)) {
      assert.deepEqual(codes, new Array(8).fill("ERR_VIRTIO_CLOSED"));
      assert.ok(done >= 160);
    }
    await Promise.all(workers.map((worker) => worker.tell({ do: "close" })));
  });

  test(`${name}: killed while workers are busy, all calls end`, { skip }, async (t) => {
    const { disk, peer } = await open(t, 3);
    const workers = [await RemoteDisk.start(t, disk, "event"), await RemoteDisk.start(t, disk, "hybrid")];
    for (const [i, worker] of workers.entries()) {
      assert.deepEqual(await worker.tell({ do: "churn", part: partOf(i, i), depth: 8 }), { under: "way" });
    }
    const replies = workers.map((worker) => worker.reply());
    const mine = churn(disk, partOf(2, 2), 8, () => peer.kill());
    for (const { codes } of [await mine, ...(await Promise.all(replies))]) {
      assert.deepEqual(codes, new Array(8).fill("ERR_VIRTIO_DISCONNECTED"));
    }
    await Promise.all(workers.map((worker) => worker.tell({ do: "close" })));
  });

  test(`${name}: closed while a worker polls without end: it does no harm, not even to reused descriptors`, {
    skip,
  }, async (t) => {
    const { disk, fds } = await open(t, 2);
    const worker = await RemoteDisk.start(t, disk, "poll");
    const flag = new SharedArrayBuffer(4);
    t.after(() => Atomics.store(new Int32Array(flag), 0, 1));
    assert.deepEqual(await worker.tell({ do: "spin", until: flag }), { under: "way" });
    t.mock.timers.enable({ apis: ["setTimeout"] });
    const closing = disk.close();
    t.mock.timers.tick(6000);
    await closing;
    t.mock.timers.reset();
    // The numbers that the device has set free are taken by others, whom nobody may signal.
    const bystanders = Array.from({ length: 64 }, () => EventFd.create());
    const seen = new Int32Array(flag);
    for (let i = 0; i < 1000; i++) await new Promise(setImmediate);
    Atomics.store(seen, 0, 1);
    await worker.reply();
    await worker.tell({ do: "close" });
    assert.ok(bystanders.every((event) => !event.drain()));
    for (const event of bystanders) event.close();
    await worker.terminate();
    await until(() => openFds() <= fds, "descriptors are left");
  });

  test(`${name}: workers come and go, closing or not; no descriptor is left`, { skip }, async (t) => {
    const { disk, fds } = await open(t, 8);
    for (let i = 0; i < 21; i++) {
      const worker = await RemoteDisk.start(t, disk, (["poll", "hybrid", "event"] as const)[i % 3]);
      const part = partOf(i % 3, i);
      if (i % 3 === 2) {
        assert.deepEqual(await worker.tell({ do: "churn", part: partOf(3, i), depth: 4 }), { under: "way" });
      } else {
        await worker.tell({ do: "fill", part });
        await worker.tell({ do: "close" });
        await check(disk, part);
      }
      await worker.terminate();
    }
    await untilLost(disk, 2, "1 are left (7 went with threads");
    await disk.close();
    await until(() => openFds() <= fds, "descriptors are left");
  });
}

/** Wait until handing over so many queues is refused in these words: a worker may have ended before its port has. */
async function untilLost(disk: BlockDevice, queues: number, words: string): Promise<void> {
  const end = Date.now() + PATIENCE_MS;
  for (let message = ""; !message.includes(words); await turn()) {
    await assert.rejects(disk.handOver({ queues }), (error) => {
      message = error instanceof VirtioError && error.code === "ERR_VIRTIO_QUEUES" ? error.message : "";
      return message !== "";
    });
    assert.ok(Date.now() < end, message);
  }
}

/** Wait for what other threads and the kernel take an unknown time for. */
async function until(condition: () => boolean, what: string): Promise<void> {
  for (const end = Date.now() + PATIENCE_MS; !condition(); await turn()) assert.ok(Date.now() < end, what);
}
