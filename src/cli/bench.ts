/** `virtio bench`: how many requests a second, how fast each, at what cost. */

import { Command, Option } from "commander";
import type { BlockInfo } from "../index.js";
import { drawLatencies } from "./bench-drawing.js";
import type { BenchJob, BenchResult } from "./bench-run.js";
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
import { formatBytes, formatCount, formatNs } from "./format.js";
import { positiveNumber, seconds, size } from "./options.js";
import { columns } from "./table.js";
import { narrate } from "./terminal.js";

/** The percentiles that are printed, by name. */
const PERCENTILES = Object.entries({ p50: 0.5, p90: 0.9, p99: 0.99, "p99.9": 0.999, "p99.99": 0.9999 });

/** Milliseconds before counting begins. */
const RAMP_MS = 300;

/** The patterns of --rw, and which part of their requests writes. */
const WRITES = {
  randread: "none",
  randwrite: "all",
  randrw: "half",
  read: "none",
  write: "all",
} as const satisfies Readonly<Record<string, WriteShare>>;

interface BenchFlags extends DeviceFlags {
  readonly rw: keyof typeof WRITES;
  readonly bs: number;
  readonly iodepth: number;
  readonly runtime: number;
  readonly mode: BenchJob["mode"];
  readonly api: BenchJob["api"];
  readonly verify?: true;
  readonly json?: true;
  readonly yesOverwrite?: true;
}

/** The subcommand. */
export const command = withConsentOption(
  withDeviceOptions(
    new Command("bench")
      .description("Measure a block device: requests a second, latency, processor time.")
      .addArgument(addressArgument())
      .addOption(
        new Option("--rw <pattern>", "what to do; randrw reads and writes half and half")
          .choices(Object.keys(WRITES))
          .default("randread"),
      )
      .option("--bs <size>", "bytes of a request", size, 4096)
      .option("--iodepth <n>", "requests in flight", positiveNumber, 32)
      .option("--runtime <seconds>", "how long to count; a ramp of 0.3 s comes before", seconds, 2)
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
      .option("--json", "print the result as JSON"),
  ),
)
  .addHelpText(
    "after",
    `
Latency counts from submission to the moment the program sees the completion. The processor time is that of this
process alone; a back-end has its own. Writes go anywhere on the disk and need consent. With --verify every block
written carries its number and a generation; reads of such blocks are checked on the way, and all of them after the
measurement. The first byte that differs ends the run with exit code 1. The checks cost speed.

Examples:
  virtio bench ram:256M
  virtio bench vhost-user:/run/disk.sock --rw randread --bs 4K --iodepth 32 --mode event --api promise
  virtio bench vhost-user:/run/scratch.sock --rw write --bs 1M --iodepth 4 --yes-overwrite --json
  virtio bench ram:256M --rw randrw --verify`,
  )
  .action(run);

async function run(address: string, flags: BenchFlags): Promise<void> {
  const writes = WRITES[flags.rw];
  if (writes !== "none") checkConsent(address, flags);
  else if (flags.verify === true)
    throw usageError("--verify checks what was written; add --rw write, randwrite or randrw");
  const job: BenchJob = {
    writes,
    isRandom: flags.rw.startsWith("rand"),
    blockSize: flags.bs,
    depth: flags.iodepth,
    verify: flags.verify === true,
    mode: flags.mode,
    api: flags.api,
    rampMs: RAMP_MS,
    runMs: flags.runtime * 1000,
  };
  const options = {
    mode: job.mode,
    readOnly: writes === "none",
    queueSize: queueSizeFor(job.depth),
  };
  const [{ runBench }, { showLive }] = await Promise.all([import("./bench-run.js"), import("./bench-live.js")]);
  await withDevice(address, flags, options, async (disk) => {
    const { info } = disk;
    if (flags.json !== true) narrate(`${describe(address, flags)}, ${info.format} queue`);
    const result = await runBench(disk, job, (latency) => showLive(latency, job.blockSize));
    process.stdout.write(`${flags.json === true ? toJson(address, flags, info, result) : toTable(flags, result)}\n`);
  });
}

/** A third of a ring's descriptors may be lost to requests that take three of them. */
function queueSizeFor(depth: number): number {
  return Math.min(32768, Math.max(256, 2 ** Math.ceil(Math.log2(depth * 1.5))));
}

function describe(address: string, { rw, bs, iodepth, mode, api }: BenchFlags): string {
  return `${address}: ${rw} of ${formatBytes(bs)}, ${iodepth} in flight, ${mode}, ${api}`;
}

function iopsOf({ latency, ms }: BenchResult): number {
  return (latency.count / ms) * 1000;
}

function cpuNsOf({ latency, cpuMicros }: BenchResult): number {
  return (cpuMicros * 1000) / latency.count;
}

function toTable(flags: BenchFlags, result: BenchResult): string {
  const { latency } = result;
  const iops = iopsOf(result);
  const figures = columns("lr", [
    ["requests a second", formatCount(iops)],
    ["bytes a second", formatBytes(iops * flags.bs)],
    ["latency, mean", formatNs(latency.mean)],
    ...PERCENTILES.map(([name, p]) => [`latency, ${name}`, formatNs(latency.percentile(p))]),
    ["latency, max", formatNs(latency.max)],
    ["processor time a request", formatNs(cpuNsOf(result))],
    ...(flags.verify === true ? [["reads verified", formatCount(result.checked)]] : []),
  ]);
  return [...figures, "", ...drawLatencies(latency)].join("\n");
}

function toJson(address: string, flags: BenchFlags, info: BlockInfo, result: BenchResult): string {
  const { rw, bs, iodepth, runtime, mode, api } = flags;
  const { latency, ms } = result;
  const iops = iopsOf(result);
  const whole = Math.round;
  return JSON.stringify(
    {
      ...{ address, rw, bs, iodepth, runtime, mode, api, format: info.format, queueSize: info.queueSize },
      ...{ requests: latency.count, seconds: ms / 1000, iops: whole(iops), bytesPerSecond: whole(iops * bs) },
      latencyNs: {
        ...{ min: whole(latency.min), mean: whole(latency.mean) },
        ...Object.fromEntries(PERCENTILES.map(([name, p]) => [name, whole(latency.percentile(p))])),
        max: whole(latency.max),
      },
      cpuNsPerRequest: whole(cpuNsOf(result)),
      ...(flags.verify === true && { verified: result.checked }),
    },
    undefined,
    2,
  );
}
