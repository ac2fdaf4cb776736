/** The result of `virtio bench` as a table and as JSON. */

import type { BlockInfo } from "../index.js";
import { drawLatencies } from "./bench-drawing.js";
import type { BenchPlan, BenchResult } from "./bench-plan.js";
import { formatBytes, formatCount, formatNs } from "./format.js";
import type { LatencyHistogram } from "./histogram.js";
import { columns } from "./table.js";

/** The percentiles that are printed, by name. */
export const PERCENTILES = Object.entries({ p50: 0.5, p90: 0.9, p99: 0.99, "p99.9": 0.999, "p99.99": 0.9999 });

/** What was measured on what. */
export interface Measured {
  readonly address: string;
  /** The pattern of --rw. */
  readonly rw: string;
  readonly plan: BenchPlan;
  readonly info: BlockInfo;
  readonly result: BenchResult;
}

/** What is measured, in a line. */
export function describePlan(what: Omit<Measured, "result">): string {
  return `${what.address}: ${what.rw} of ${formatBytes(what.plan.blockSize)}, ${describeWay(what)}`;
}

/** By which means it is measured, in a line. */
export function describeWay({ plan, info }: Omit<Measured, "result">): string {
  const { depth, jobs, mode, api } = plan;
  const queues = jobs === 1 ? `${info.format} queue` : `${jobs} jobs on ${info.format} queues`;
  return `${depth} in flight, ${mode}, ${api}, ${queues}`;
}

/** The most important figures, in a line. */
export function summarize({ plan, result }: Measured): string {
  const { latency } = result;
  const iops = iopsOf(latency, result);
  return [
    `${formatCount(iops)} requests a second`,
    `${formatBytes(iops * plan.blockSize)}/s`,
    `mean ${formatNs(latency.mean)}`,
    `max ${formatNs(latency.max)}`,
    `${formatNs(cpuNsOf(result))} of processor time a request`,
  ].join(" · ");
}

/** The figures and a small drawing, for people. */
export function toTable({ plan, result }: Measured): string {
  const { latency, jobs } = result;
  const iops = iopsOf(latency, result);
  const each = jobs.map((job) => iopsOf(job, result));
  const figures = columns("lr", [
    ["requests a second", formatCount(iops)],
    ...(jobs.length === 1
      ? []
      : [
          ["slowest job", formatCount(Math.min(...each))],
          ["fastest job", formatCount(Math.max(...each))],
        ]),
    ["bytes a second", formatBytes(iops * plan.blockSize)],
    ["latency, mean", formatNs(latency.mean)],
    ...PERCENTILES.map(([name, p]) => [`latency, ${name}`, formatNs(latency.percentile(p))]),
    ["latency, max", formatNs(latency.max)],
    ["processor time a request", formatNs(cpuNsOf(result))],
    ...(plan.verify ? [["reads verified", formatCount(result.checked)]] : []),
  ]);
  return [...figures, "", ...drawLatencies(latency)].join("\n");
}

/** All figures, for programs. */
export function toJson({ address, rw, plan, info, result }: Measured): string {
  const { blockSize: bs, depth: iodepth, jobs: numjobs, mode, api, runMs } = plan;
  const { latency, jobs, ms } = result;
  const iops = iopsOf(latency, result);
  const whole = Math.round;
  return JSON.stringify(
    {
      ...{ address, rw, bs, iodepth, numjobs, runtime: runMs / 1000, mode, api },
      ...{ format: info.format, queueSize: info.queueSize },
      ...{ requests: latency.count, seconds: ms / 1000, iops: whole(iops), bytesPerSecond: whole(iops * bs) },
      latencyNs: latencyNs(latency),
      cpuNsPerRequest: whole(cpuNsOf(result)),
      ...(plan.verify && { verified: result.checked }),
      jobs: jobs.map((job) => {
        return { requests: job.count, iops: whole(iopsOf(job, result)), latencyNs: latencyNs(job) };
      }),
    },
    undefined,
    2,
  );
}

function latencyNs(latency: LatencyHistogram): Record<string, number> {
  const whole = Math.round;
  return {
    ...{ min: whole(latency.min), mean: whole(latency.mean) },
    ...Object.fromEntries(PERCENTILES.map(([name, p]) => [name, whole(latency.percentile(p))])),
    max: whole(latency.max),
  };
}

function iopsOf(latency: LatencyHistogram, { ms }: BenchResult): number {
  return (latency.count / ms) * 1000;
}

function cpuNsOf({ latency, cpuMicros }: BenchResult): number {
  return (cpuMicros * 1000) / latency.count;
}
