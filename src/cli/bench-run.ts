/** The measurement of `virtio bench`: its jobs are made, run for a while, and counted. */

import { randomFillSync } from "node:crypto";
import type { BlockDevice } from "../devices/blk/index.js";
import { rangeError } from "../errors.js";
import type { DeviceBuffer } from "../memory/index.js";
import { CallbackRun, pollAll } from "./bench-callbacks.js";
import { Meter } from "./bench-meter.js";
import type { BenchPlan, BenchResult, Job, Progress } from "./bench-plan.js";
import { pollUntil, runPromises } from "./bench-promises.js";
import { partOfDisk, Targets } from "./bench-targets.js";
import { VerifiedTargets } from "./bench-verify.js";
import { LatencyHistogram } from "./histogram.js";

/**
 * Carry out a plan on an open device that nobody else uses, with a queue for each job.
 *
 * @param watch - is given the counts before the measurement begins; what it returns is called when that ends.
 * @throws VirtioError ERR_VIRTIO_IO when the verification finds something else than was written.
 */
export async function runBench(
  disk: BlockDevice,
  plan: BenchPlan,
  watch: (progress: Progress) => () => void = () => () => undefined,
): Promise<BenchResult> {
  const most = Math.floor(disk.capacity / plan.jobs / disk.blockSize) * disk.blockSize;
  if (plan.blockSize % disk.blockSize !== 0 || plan.blockSize === 0 || plan.blockSize > most) {
    throw rangeError("--bs", `a multiple of ${disk.blockSize}, at most ${most}`, plan.blockSize);
  }
  const jobs: Job<DeviceBuffer>[] = [];
  for (let index = 0; index < plan.jobs; index++) jobs.push(await makeJob(disk, plan, index));
  const latencies = jobs.map(({ latency }) => latency);
  const meter = new Meter(plan, latencies);
  const run = runner(disk, plan, meter, jobs);
  const unwatch = watch({
    get countedMs() {
      return meter.countedMs;
    },
    counts: () => LatencyHistogram.sum(latencies),
  });
  try {
    meter.start();
    await run();
  } finally {
    unwatch();
  }
  throwIfWrong(jobs);
  if (jobs.map(({ targets }) => targets.readBack()).includes(true)) {
    meter.runUncounted();
    await run();
    throwIfWrong(jobs);
  }
  return {
    ...{ ms: meter.countedMs, latency: LatencyHistogram.sum(latencies), jobs: latencies, cpuMicros: meter.cpuMicros },
    checked: jobs.reduce((sum, { targets }) => sum + targets.checked, 0),
  };
}

/** A job with memory for all its requests and a part of the disk for itself. */
async function makeJob(disk: BlockDevice, plan: BenchPlan, index: number): Promise<Job<DeviceBuffer>> {
  const memory = await Promise.all(Array.from({ length: plan.depth }, () => disk.allocate(plan.blockSize)));
  const bytes = memory.map((buffer) => buffer.bytes);
  if (plan.writes !== "none") bytes.forEach(fillWithNoise);
  const part = partOfDisk(disk.capacity, plan.blockSize, index, plan.jobs);
  const targets = plan.verify ? new VerifiedTargets(plan, part, bytes) : new Targets(plan, part);
  return { targets, memory, latency: new LatencyHistogram() };
}

/** What keeps requests in flight until the meter or the targets say that it is enough. */
function runner(
  disk: BlockDevice,
  plan: BenchPlan,
  meter: Meter,
  jobs: readonly Job<DeviceBuffer>[],
): () => Promise<unknown> {
  if (plan.api === "promise") {
    disk.mode = plan.mode;
    if (plan.mode !== "poll") return () => unlessSilent(meter, runPromises(disk, plan, meter, jobs));
    const poll = (): number => disk.poll();
    return () => unlessSilent(meter, pollUntil(runPromises(disk, plan, meter, jobs), poll, meter));
  }
  const runs = jobs.map((job) => new CallbackRun(disk.takeQueue(), plan, meter, job));
  if (plan.mode === "poll") return () => pollAll(runs, meter);
  return async () => {
    await unlessSilent(meter, Promise.all(runs.map((run) => run.listen())));
    for (const run of runs) run.throwIfFailed();
  };
}

/** Wait for `work`, but not for a device that has fallen silent. */
async function unlessSilent(meter: Meter, work: Promise<unknown>): Promise<void> {
  let watchdog: NodeJS.Timeout | undefined;
  const silence = new Promise<never>((_, reject) => {
    watchdog = setInterval(() => {
      try {
        meter.throwIfSilent();
      } catch (error) {
        reject(error);
      }
    }, 1000);
  });
  try {
    await Promise.race([work, silence]);
  } finally {
    clearInterval(watchdog);
  }
}

function throwIfWrong(jobs: readonly Job<DeviceBuffer>[]): void {
  for (const { targets } of jobs) if (targets.failure !== undefined) throw targets.failure;
}

/** Fill memory with bytes that do not compress. */
function fillWithNoise(bytes: Uint8Array): void {
  const noise = randomFillSync(new Uint8Array(Math.min(bytes.length, 1 << 20)));
  for (let at = 0; at < bytes.length; at += noise.length) bytes.set(noise.subarray(0, bytes.length - at), at);
}
