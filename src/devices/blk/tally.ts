/** Counts what fails, by queue and error code. */

import { VirtioError } from "../../errors.js";

/** How often something failed, by the code of its VirtioError. */
export type ErrorCounts = Readonly<Record<string, number>>;

/** Counts failures, by queue or by none. */
export class ErrorTally {
  private readonly counts = new Map<number | undefined, Record<string, number>>();

  /** Count a failure. What is no VirtioError has no code: the reason of a signal. */
  count(queue: number | undefined, error: unknown, times = 1): void {
    if (!(error instanceof VirtioError) || times === 0) return;
    const counts = this.counts.get(queue) ?? {};
    counts[error.code] = (counts[error.code] ?? 0) + times;
    this.counts.set(queue, counts);
  }

  /** Failures of one queue. */
  of(queue: number): ErrorCounts {
    return { ...this.counts.get(queue) };
  }

  /** All failures. */
  get total(): ErrorCounts {
    const total: Record<string, number> = {};
    for (const counts of this.counts.values()) {
      for (const [code, times] of Object.entries(counts)) total[code] = (total[code] ?? 0) + times;
    }
    return total;
  }
}
