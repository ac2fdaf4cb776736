/** Measures one case once, in a process of its own as a user's program would be: `node round.js JSON`, prints JSON. */

import { open } from "node:fs/promises";
import { readSync } from "node:fs";
import { Meter } from "../src/cli/bench-meter.js";
import { type BenchPlan, type BenchResult, queueSizeFor } from "../src/cli/bench-plan.js";
import { runPromises, type TransferPlace } from "../src/cli/bench-promises.js";
import { runBench } from "../src/cli/bench-run.js";
import { partOfDisk, Targets } from "../src/cli/bench-targets.js";
import { LatencyHistogram } from "../src/cli/histogram.js";
import { type BlockDevice, openBlock } from "../src/index.js";
import type { Way } from "./cases.js";

/** What is to be measured. */
export interface RoundOrder {
  /** Address of a device, or path of a file. */
  readonly target: string;
  readonly way: Exclude<Way, { readonly by: "nbd" }>;
  readonly size: number;
  readonly depth: number;
  readonly rampMs: number;
  readonly runMs: number;
}

/** What was measured. */
export interface Round {
  /** Requests a second. */
  readonly iops: number;
  /** Latency that half of the requests did not exceed, and 99 of 100, in nanoseconds. */
  readonly p50: number;
  readonly p99: number;
  /** Processor time of the process that asks, in nanoseconds for a request. */
  readonly cpuNs: number;
}

async function overVhostUser(order: RoundOrder & { way: { by: "vhost-user" } }): Promise<BenchResult> {
  const { target, way, depth } = order;
  const { mode, packed } = way;
  await using disk = await openBlock(target, { mode, packed, queueSize: queueSizeFor(depth) });
  if (target.startsWith("ram:")) await writeAll(disk);
  return await runBench(disk, planOf(order, mode, way.api));
}

/** Memory that was never written is not there yet: what is read must come from somewhere. */
async function writeAll(disk: BlockDevice): Promise<void> {
  const { mode } = disk;
  disk.mode = "hybrid";
  const buffer = await disk.allocate(1 << 20);
  buffer.bytes.fill(1);
  for (let position = 0; position < disk.capacity; position += buffer.length) await disk.write(buffer, { position });
  buffer.release();
  disk.mode = mode;
}

/** The file by Node's own calls, in the loops that drive the device otherwise. */
async function byFs(order: RoundOrder): Promise<BenchResult> {
  const { target, way, size, depth } = order;
  await using file = await open(target);
  const latency = new LatencyHistogram();
  const plan = planOf(order, "event", "promise");
  const meter = new Meter(plan, [latency]);
  const targets = new Targets(plan, partOfDisk((await file.stat()).size, size, 0, 1));
  const memory = Array.from({ length: depth }, () => Buffer.alloc(size));
  const disk = {
    read: (into: Buffer, place: TransferPlace) => file.read(into, place),
    write: () => Promise.reject(new Error("only reads are measured")),
  };
  meter.start();
  if (way.api === "promise") await runPromises(disk, plan, meter, [{ targets, memory, latency }]);
  else readInTurn(file.fd, memory[0], targets, meter, latency);
  return { ms: meter.countedMs, latency, jobs: [latency], cpuMicros: meter.cpuMicros, checked: 0 };
}

/** One read after the other. */
function readInTurn(fd: number, memory: Buffer, targets: Targets, meter: Meter, latency: LatencyHistogram): void {
  const since = new Float64Array(1);
  while (meter.isRunning) {
    const position = targets.take(0) * memory.length;
    since[0] = meter.time[0];
    readSync(fd, memory, 0, memory.length, position);
    meter.forget();
    meter.refresh();
    meter.completed(latency, since, 0);
  }
}

function planOf(order: RoundOrder, mode: BenchPlan["mode"], api: BenchPlan["api"]): BenchPlan {
  const { size, depth, rampMs, runMs } = order;
  return {
    ...{ writes: "none", isRandom: true, verify: false, blockSize: size },
    ...{ depth, jobs: 1, mode, api, rampMs, runMs },
  };
}

const order = JSON.parse(process.argv[2]) as RoundOrder;
const isOverVhostUser = (each: RoundOrder): each is RoundOrder & { way: { by: "vhost-user" } } =>
  each.way.by === "vhost-user";
const { latency, ms, cpuMicros } = isOverVhostUser(order) ? await overVhostUser(order) : await byFs(order);
if (latency.count === 0) throw new Error(`nothing completed in ${ms} ms`);
const round: Round = {
  iops: (latency.count / ms) * 1000,
  p50: latency.percentile(0.5),
  p99: latency.percentile(0.99),
  cpuNs: (cpuMicros * 1000) / latency.count,
};
process.stdout.write(JSON.stringify(round));
