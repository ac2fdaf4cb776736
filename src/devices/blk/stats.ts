/** Figures of a block device that runs: counted where it costs nothing, derived when somebody asks. */

import type { BufferPool } from "../../memory/index.js";
import type { VirtioBlkQueue } from "./queue.js";
import type { Scheduler } from "./scheduler.js";
import type { ErrorCounts } from "./tally.js";

/** Figures of one queue, from when this thread began to drive it. */
export interface QueueStats {
  /** Queue index on the device. */
  readonly index: number;
  /** Descriptors. */
  readonly size: number;
  /** Requests submitted, and those that came back. */
  readonly submitted: number;
  readonly completed: number;
  /** Requests submitted that have not come back. */
  readonly inFlight: number;
  /**
   * Those in flight that nobody waits for any more: their calls ended by `timeout` or `signal`, or the device was
   * lost. Each keeps its place in the ring and its memory. A number that stays is a leak, of the device's making.
   */
  readonly abandoned: number;
  /** Notifications sent to the device. */
  readonly kicks: number;
  /** Notifications that came from the device. */
  readonly wakeUps: number;
  /** Requests that this driver submitted again after a reconnect. A back-end that keeps track does so by itself. */
  readonly replayed: number;
  /** Requests that failed, by code. */
  readonly errors: ErrorCounts;
}

/** Figures of a block device, of this thread. */
export interface BlockStats {
  /** How often the back-end was reached again. */
  readonly reconnects: number;
  /** Calls that wait for room in a ring, or for memory. */
  readonly waiting: number;
  /** Bytes that are lent: by `allocate`, and for copies from and to plain buffers. What is in flight counts. */
  readonly lentBytes: number;
  /** Failures by code: those of all queues, and of calls that ended before a request of theirs was sent. */
  readonly errors: ErrorCounts;
  readonly queues: readonly QueueStats[];
}

/** The figures of a device that is made of these parts. */
export function blockStats(
  queues: readonly VirtioBlkQueue[],
  scheduler: Scheduler,
  pools: readonly BufferPool[],
  reconnects: number,
): BlockStats {
  return {
    reconnects,
    waiting: scheduler.waitingCalls,
    lentBytes: pools.reduce((sum, { lent }) => sum + lent, 0),
    errors: scheduler.errors.total,
    queues: queues.map((queue) => {
      const { index, queueSize: size, inFlight, counters } = queue;
      return {
        index,
        size,
        ...counters,
        inFlight,
        abandoned: scheduler.abandoned(queue),
        errors: scheduler.errors.of(index),
      };
    }),
  };
}
