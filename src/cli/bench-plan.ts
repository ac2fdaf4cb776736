/** What the loops of `virtio bench` are told, and what they give back. */

import type { CompletionMode } from "../devices/blk/index.js";
import type { MeterOptions } from "./bench-meter.js";
import type { TargetOptions, Targets } from "./bench-targets.js";
import type { LatencyHistogram } from "./histogram.js";

/** What to measure. */
export interface BenchPlan extends TargetOptions, MeterOptions {
  /** Requests in flight of each job. */
  readonly depth: number;
  /** Jobs; each has a queue and a part of the disk of its own. */
  readonly jobs: number;
  /** Whether to check what was written, in reads between the writes and in a pass after the measurement. */
  readonly verify: boolean;
  readonly mode: CompletionMode;
  readonly api: "callback" | "promise";
}

/** One job while it runs: where its requests go, the memory that they use, and how long they took. */
export interface Job<Memory> {
  readonly targets: Targets;
  /** As many as requests in flight, a block each. */
  readonly memory: readonly Memory[];
  readonly latency: LatencyHistogram;
}

/** The counts of a run while it goes on. */
export interface Progress {
  /** Milliseconds of counting so far; 0 in the ramp. */
  readonly countedMs: number;
  /** The latencies of all jobs together, as they are now. */
  counts(): LatencyHistogram;
}

/** What was measured. */
export interface BenchResult {
  /** Milliseconds of counting. */
  readonly ms: number;
  /** Latencies of the requests that completed in that time: all of them, and those of each job. */
  readonly latency: LatencyHistogram;
  readonly jobs: readonly LatencyHistogram[];
  /** Processor time that this process used in that time, in microseconds. */
  readonly cpuMicros: number;
  /** Reads that were compared with what had been written. */
  readonly checked: number;
}

/** Polls between two turns of the event loop, in which a lost device is noticed: a millisecond or more. */
export const LOOKS_PER_TURN = 100_000;
/** What a completed request counts for among those polls: it leads to work of its own. */
export const LOOKS_PER_REQUEST = 20;

/**
 * Descriptors of a queue for `depth` requests in flight. A third of a ring's descriptors may be lost to requests that
 * take three of them.
 */
export function queueSizeFor(depth: number): number {
  return Math.min(32768, Math.max(256, 2 ** Math.ceil(Math.log2(depth * 1.5))));
}
