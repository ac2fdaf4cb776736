/** Requests of `virtio bench` by promises: as many loops as requests in flight, each as a program would write it. */

import { setImmediate as nextTurn } from "node:timers/promises";
import { type BenchPlan, type Job, LOOKS_PER_REQUEST, LOOKS_PER_TURN } from "./bench-plan.js";
import type { Meter } from "./bench-meter.js";

/** What is read and written: a `BlockDevice`, a `FileHandle`. */
export interface PromiseDisk<Memory> {
  read(memory: Memory, options: TransferPlace): Promise<unknown>;
  write(memory: Memory, options: TransferPlace): Promise<unknown>;
}

/** From where on the disk to where in the memory, in bytes. */
export interface TransferPlace {
  position: number;
  readonly offset: number;
  readonly length: number;
}

const NOTHING = Promise.resolve();

/** Keep requests in flight until the meter or the targets say that it is enough. */
export async function runPromises<Memory>(
  disk: PromiseDisk<Memory>,
  plan: BenchPlan,
  meter: Meter,
  jobs: readonly Job<Memory>[],
): Promise<void> {
  const { blockSize: length, depth, mode } = plan;
  const forget = (): void => meter.forget();
  // All that completes in the same turn of the event loop shares one look at the clock.
  const refresh = (): void => {
    if (meter.isStale && mode === "event") process.nextTick(forget);
    // In mode hybrid many round trips fit into one turn, and each is to be timed.
    else if (meter.isStale && mode === "hybrid") void NOTHING.then(forget);
    meter.refresh();
  };
  const loop = async ({ targets, memory, latency }: Job<Memory>, part: number, since: Float64Array): Promise<void> => {
    const options = { position: 0, offset: 0, length };
    const buffer = memory[part];
    for (let isFirst = true; meter.isRunning; isFirst = false) {
      const block = targets.take(part);
      if (block < 0) return;
      options.position = block * length;
      const request = targets.isWrite ? disk.write(buffer, options) : disk.read(buffer, options);
      // The clock comes after the device, as it does for callbacks: one look ends the request before and begins this.
      refresh();
      if (!isFirst) meter.completed(latency, since, part);
      since[part] = meter.time[0];
      await request;
      if (!targets.completed(part)) meter.isRunning = false;
    }
  };
  const loops = jobs.flatMap((job) => {
    const since = new Float64Array(depth);
    return Array.from({ length: depth }, (_, part) => loop(job, part, since));
  });
  try {
    await Promise.all(loops);
  } finally {
    meter.isRunning = false;
  }
}

/** Call `poll`, which returns how many requests completed, until `work` has ended. */
export async function pollUntil(work: Promise<void>, poll: () => number, meter: Meter): Promise<void> {
  let isDone = false;
  const polled = async (): Promise<void> => {
    while (!isDone) {
      for (let left = LOOKS_PER_TURN; left > 0 && !isDone; ) {
        left -= 1 + poll() * LOOKS_PER_REQUEST;
        await NOTHING; // the continuations of what completed run here
        meter.forget();
      }
      await nextTurn();
    }
  };
  const ended = work.finally(() => {
    isDone = true;
  });
  // Both are listened to from the start: a request may fail while the other waits for the event loop.
  await Promise.all([polled(), ended]);
}
