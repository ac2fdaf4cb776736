/** Random reads over NBD by fio: what reaches the daemon's disks without this package. */

import { execFile } from "node:child_process";
import { promisify } from "node:util";
import type { Round } from "./round.js";

/** What fio is to do. */
export interface FioOrder {
  /** Socket of the daemon's NBD server, and the name of its export. */
  readonly socket: string;
  readonly name: string;
  readonly size: number;
  readonly depth: number;
  readonly rampMs: number;
  readonly runMs: number;
  readonly signal: AbortSignal;
}

/** The part of fio's JSON that is of interest. */
interface FioReport {
  readonly jobs: readonly {
    readonly error: number;
    readonly usr_cpu: number;
    readonly sys_cpu: number;
    readonly job_runtime: number;
    readonly read: {
      readonly iops: number;
      readonly total_ios: number;
      readonly clat_ns: { readonly percentile: Readonly<Record<"50.000000" | "99.000000", number>> };
    };
  }[];
}

const TIMEOUT_MS = 30_000;

/** Run fio once. */
export async function runFio({ socket, name, size, depth, rampMs, runMs, signal }: FioOrder): Promise<Round> {
  const { stdout } = await promisify(execFile)(
    "fio",
    [
      ...["--name=nbd", "--ioengine=nbd", `--uri=nbd+unix:///${name}?socket=${socket}`],
      ...["--rw=randread", "--norandommap", `--bs=${size}`, `--iodepth=${depth}`],
      ...["--time_based", `--ramp_time=${rampMs}ms`, `--runtime=${runMs}ms`, "--output-format=json"],
    ],
    { timeout: TIMEOUT_MS, signal, maxBuffer: 16 << 20 },
  );
  // The engine greets the server on stdout.
  const [job] = (JSON.parse(stdout.slice(stdout.indexOf("{"))) as FioReport).jobs;
  const { iops, total_ios: requests, clat_ns: latency } = job.read;
  if (job.error !== 0 || requests === 0) throw new Error(`fio read nothing from ${name}: error ${job.error}`);
  return {
    iops,
    p50: latency.percentile["50.000000"],
    p99: latency.percentile["99.000000"],
    cpuNs: (((job.usr_cpu + job.sys_cpu) / 100) * job.job_runtime * 1e6) / requests,
  };
}
