/** What queues of a device in several threads bring: `npm run bench:workers [-- SECONDS [ROUNDS]]`. */

import { once } from "node:events";
import { setTimeout as sleep } from "node:timers/promises";
import { Worker } from "node:worker_threads";
import { spawnBackend } from "../src/backend/index.js";
import { type BlockDevice, openBlock } from "../src/index.js";
import { Daemon, requirePeer, TemporaryFolder } from "../test/support/peers.js";
import { median, spread, writeResult } from "./report.js";
import { type Count, drive, type Job, modeOf, now, type WorkerJob } from "./workers-drive.js";

const DISK_BYTES = 2 ** 30;
/** Small enough that its pages are all there when the counting begins. */
const RAM_BYTES = 2 ** 26;
/** Requests in flight, on one queue or on two together. */
const DEPTH = 64;
/** Time for threads to start and for the engine to compile. */
const RAMP_MS = 500;

/** A device, or two of a queue each, to be opened at these addresses. */
interface Peer {
  readonly name: string;
  readonly paths: readonly string[];
  stop(): Promise<void>;
}

const DRIVERS = ["1 queue, main thread", "2 queues, main thread", "2 queues, 2 workers"] as const;
type Driver = (typeof DRIVERS)[number];
const APIS = ["callbacks", "promises"] as const;

const seconds = Number(process.argv[2] ?? 1);
const rounds = Number(process.argv[3] ?? 5);

async function embedded(name: string, processes: number): Promise<Peer> {
  const backends = await Promise.all(
    Array.from({ length: processes }, () => spawnBackend({ kind: "ram", size: RAM_BYTES }, { queues: 2 / processes })),
  );
  return {
    name,
    paths: backends.map(({ path }) => path),
    stop: async () => {
      for (const backend of backends) await backend.close();
    },
  };
}

/** qemu-storage-daemon with an I/O thread for each export: in 7.2 an export has one, whatever its queues. */
async function storageDaemon(name: string, exports: number): Promise<Peer> {
  const folder = new TemporaryFolder();
  const paths = Array.from({ length: exports }, (_, i) => folder.file(`${i}.sock`));
  const args = paths.flatMap((path, i) => [
    ...["--object", `iothread,id=t${i}`],
    ...["--blockdev", `driver=null-co,node-name=d${i},size=${DISK_BYTES},read-zeroes=off`],
    "--export",
    `type=vhost-user-blk,id=e${i},node-name=d${i},addr.type=unix,addr.path=${path},writable=on,` +
      `num-queues=${2 / exports},iothread=t${i}`,
  ]);
  // Exports are made in order: when the last one listens, all do.
  const daemon = await Daemon.start(paths[exports - 1], "qemu-storage-daemon", args);
  return {
    name,
    paths,
    stop: async () => {
      await daemon.stop();
      folder.close();
    },
  };
}

/** Hand two queues over to a thread each. */
async function driveByWorkers(disks: readonly BlockDevice[], job: Job, worker: URL): Promise<Count[]> {
  const ports = [];
  for (const disk of disks) for (let i = 2 / disks.length; i > 0; i--) ports.push(await disk.handOver());
  return Promise.all(
    ports.map(async (port) => {
      const thread = new Worker(worker);
      // Both may come in one turn: to wait for the second after the first could miss it.
      const ended = once(thread, "exit");
      thread.postMessage({ ports: [port], job } satisfies WorkerJob, [port]);
      const [count] = (await once(thread, "message")) as [Count];
      await ended;
      return count;
    }),
  );
}

/** Requests a second, and nanoseconds of this process's processor time for each. */
async function measure(peer: Peer, driver: Driver, api: Job["api"]): Promise<{ iops: number; cpu: number }> {
  const one = driver === "1 queue, main thread";
  const paths = one ? peer.paths.slice(0, 1) : peer.paths;
  const disks: BlockDevice[] = [];
  try {
    for (const path of paths) {
      const queues = one ? 1 : 2 / paths.length;
      disks.push(await openBlock(`vhost-user:${path}`, { queues, mode: modeOf({ api }) }));
    }
    const begin = now() + RAMP_MS;
    const job: Job = { api, depth: one ? DEPTH : DEPTH / 2, begin, end: begin + seconds * 1000 };
    const cpu = cpuBetween(begin, job.end);
    const counts =
      driver === "2 queues, 2 workers"
        ? await driveByWorkers(disks, job, new URL("./workers-drive.js", import.meta.url))
        : [await drive(disks, job)];
    const requests = counts.reduce((sum, count) => sum + count.requests, 0);
    const iops = counts.reduce((sum, count) => sum + (count.requests / count.ms) * 1000, 0);
    return { iops, cpu: ((await cpu) * 1000) / requests };
  } finally {
    for (const disk of disks) await disk.close();
  }
}

/** Microseconds of processor time of all threads of this process. */
async function cpuBetween(begin: number, end: number): Promise<number> {
  await sleep(begin - now());
  const before = process.cpuUsage();
  await sleep(end - now());
  const { user, system } = process.cpuUsage(before);
  return user + system;
}

const peers = [await embedded("embedded, one process of 2 queues", 1), await embedded("embedded, two processes", 2)];
const missing = requirePeer("qemu-storage-daemon");
if (missing === false) {
  peers.push(await storageDaemon("qemu-storage-daemon null-co, one export of 2 queues, one I/O thread", 1));
  peers.push(await storageDaemon("qemu-storage-daemon null-co, two exports, an I/O thread each", 2));
}
const rows: string[][] = [];
try {
  for (const peer of peers) {
    for (const api of APIS) {
      const results = DRIVERS.map(() => ({ iops: [] as number[], cpu: [] as number[] }));
      // In turn, so that what drifts drifts for all.
      for (let round = 0; round < rounds; round++) {
        for (const [i, driver] of DRIVERS.entries()) {
          const { iops, cpu } = await measure(peer, driver, api);
          results[i].iops.push(iops / 1000);
          results[i].cpu.push(cpu);
        }
      }
      const base = median(results[0].iops);
      for (const [i, { iops, cpu }] of results.entries()) {
        const ratio = `${(median(iops) / base).toFixed(2)} ×`;
        const figures = [median(iops).toFixed(0), spread(iops, 0), ratio, median(cpu).toFixed(0)];
        rows.push([peer.name, api, DRIVERS[i], ...figures]);
      }
    }
  }
} finally {
  for (const peer of peers) await peer.stop();
}
writeResult("workers", {
  title: "Queues of one device in several threads",
  command: "npm run bench:workers",
  text:
    `Random 4 KiB reads, ${DEPTH} in flight on all queues together, ${rounds} rounds of ${seconds} s; callbacks by ` +
    "polling, promises in mode hybrid. A device needs processor time as well: threads can only bring something " +
    "where there are more cores than it keeps busy.",
  columns: ["device", "API", "driver", "thousand requests/s", "min to max", "to 1 queue", "CPU ns/request"],
  rows,
  ...(missing !== false && { notes: [missing] }),
});
