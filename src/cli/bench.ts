/** `virtio bench`: how many requests a second, how fast each, at what cost. */

import { writeFileSync } from "node:fs";
import { Command, Option } from "commander";
import type { BlockDevice } from "../index.js";
import { type BenchPlan, type Progress, queueSizeFor } from "./bench-plan.js";
import type { WriteShare } from "./bench-targets.js";
import {
  addressArgument,
  checkConsent,
  type DeviceFlags,
  usageError,
  withConsentOption,
  withDevice,
  withDeviceOptions,
} from "./device.js";
import { type MetricsFlags, openMetrics, withMetricsOption } from "./metrics-option.js";
import { positiveNumber, seconds, size } from "./options.js";
import { narrate } from "./terminal.js";

/** Milliseconds before counting begins. */
const RAMP_MS = 500;

/** The patterns of --rw, and which part of their requests writes. */
const WRITES = {
  randread: "none",
  randwrite: "all",
  randrw: "half",
  read: "none",
  write: "all",
} as const satisfies Readonly<Record<string, WriteShare>>;

interface BenchFlags extends DeviceFlags, MetricsFlags {
  readonly rw: keyof typeof WRITES;
  readonly bs: number;
  readonly iodepth: number;
  readonly numjobs: number;
  readonly runtime: number;
  readonly mode: BenchPlan["mode"];
  readonly api: BenchPlan["api"];
  readonly verify?: true;
  readonly json?: true;
  readonly svg?: string;
  readonly yesOverwrite?: true;
}

/** The subcommand. */
export const command = withConsentOption(
  withDeviceOptions(
    withMetricsOption(
      new Command("bench")
        .description("Measure a block device: requests a second, latency, processor time.")
        .addArgument(addressArgument())
        .addOption(
          new Option("--rw <pattern>", "what to do; randrw reads and writes half and half")
            .choices(Object.keys(WRITES))
            .default("randread"),
        )
        .option("--bs <size>", "bytes of a request", size, 4096)
        .option("--iodepth <n>", "requests in flight of each job", positiveNumber, 32)
        .option("--numjobs <n>", "jobs, each with a queue and a part of the disk of its own", positiveNumber, 1)
        .option("--runtime <seconds>", "how long to count; a ramp of 0.5 s comes before", seconds, 2)
        .addOption(
          new Option(
            "--mode <mode>",
            "poll burns a core and is fast; event sleeps; hybrid looks for a moment, then sleeps",
          )
            .choices(["poll", "hybrid", "event"])
            .default("poll"),
        )
        .addOption(
          new Option("--api <api>", "callback allocates nothing; promise is what most programs use")
            .choices(["callback", "promise"])
            .default("callback"),
        )
        .option("--verify", "mark what is written, and check all of it when it is read back")
        .option("--json", "print the result as JSON")
        .option("--svg <file>", "draw requests a second over time, and the latencies, to a file"),
    ),
  ),
)
  .addHelpText(
    "after",
    `
Latency counts from submission to the moment the program sees the completion. The processor time is that of this
process alone; a back-end has its own. Jobs are driven by this one process, each on a queue and an equal part of the
disk of its own; promises go to the queues in turn. Writes go anywhere on the disk and need consent. With --verify every block
written carries its number and a generation; reads of such blocks are checked on the way, and all of them after the
measurement. The first byte that differs ends the run with exit code 1. The checks cost speed.

Examples:
  virtio bench ram:256M
  virtio bench vhost-user:/run/disk.sock --rw randread --bs 4K --iodepth 32 --mode event --api promise
  virtio bench vhost-user:/run/scratch.sock --rw write --bs 1M --iodepth 4 --yes-overwrite --json
  virtio bench ram:256M --numjobs 2 --iodepth 16 --svg bench.svg
  virtio bench ram:256M --rw randrw --verify`,
  )
  .action(run);

async function run(address: string, flags: BenchFlags): Promise<void> {
  const { rw } = flags;
  const writes = WRITES[rw];
  if (writes !== "none") checkConsent(address, flags);
  else if (flags.verify === true)
    throw usageError("--verify checks what was written; add --rw write, randwrite or randrw");
  if (flags.svg === "-") throw usageError("--svg - is no file, and stdout has the result; name a file");
  const plan: BenchPlan = {
    writes,
    isRandom: rw.startsWith("rand"),
    blockSize: flags.bs,
    depth: flags.iodepth,
    jobs: flags.numjobs,
    verify: flags.verify === true,
    mode: flags.mode,
    api: flags.api,
    rampMs: RAMP_MS,
    runMs: flags.runtime * 1000,
  };
  await using page = await openMetrics(flags);
  await withQueues(address, flags, plan, async (disk) => {
    const [{ runBench }, { describePlan, toJson, toTable }, { showLive }, { Timeline }] = await Promise.all([
      import("./bench-run.js"),
      import("./bench-report.js"),
      import("./bench-live.js"),
      import("./bench-timeline.js"),
    ]);
    const what = { address, rw, plan, info: disk.info };
    if (flags.json !== true) narrate(describePlan(what));
    const metrics = page === undefined ? undefined : await import("./metrics-bench.js");
    if (page !== undefined) metrics?.addDevice(page, disk);
    const timeline = new Timeline(plan.runMs);
    const watch = (progress: Progress): (() => void) => {
      if (page !== undefined) metrics?.addProgress(page, progress, plan);
      const ends = [showLive(progress, plan.blockSize)];
      if (flags.svg !== undefined) ends.push(timeline.follow(progress));
      return () => ends.forEach((end) => end());
    };
    const measured = { ...what, result: await runBench(disk, plan, watch) };
    process.stdout.write(`${flags.json === true ? toJson(measured) : toTable(measured)}\n`);
    if (flags.svg === undefined) return;
    const { benchSvg } = await import("./bench-svg.js");
    writeFileSync(flags.svg, benchSvg(measured, timeline.stretches()));
    narrate(`drawn to ${flags.svg}`);
  });
}

/** Open the device with a queue for each job. */
async function withQueues(
  address: string,
  flags: DeviceFlags,
  { jobs, mode, writes, depth }: BenchPlan,
  use: (disk: BlockDevice) => Promise<void>,
): Promise<void> {
  // What was measured across an outage would be worth nothing.
  const shape = { mode, readOnly: writes === "none", queues: jobs, queueSize: queueSizeFor(depth) };
  const options = { ...shape, reconnect: false };
  try {
    await withDevice(address, flags, options, use);
  } catch (error) {
    if (!(error instanceof Error && "code" in error && error.code === "ERR_VIRTIO_QUEUES")) throw error;
    throw usageError(error.message.replace("queues: ", "--numjobs "));
  }
}
