/** How the speed of `virtio bench` changed during the measurement, for its picture. */

import type { Progress } from "./bench-plan.js";

/** What happened in one stretch of the time. */
export interface Stretch {
  /** Its end, in seconds of counting. */
  readonly seconds: number;
  /** Requests a second in it. */
  readonly iops: number;
}

/** Stretches of a whole run, and the least milliseconds of one. */
const STRETCHES = 100;
const LEAST_MS = 20;

/** Looks at the counts of a run again and again, from outside as the live line does. */
export class Timeline {
  private readonly seen: { readonly ms: number; readonly count: number }[] = [{ ms: 0, count: 0 }];
  private readonly tickMs: number;

  /** `runMs` is how long the run will take. */
  constructor(runMs: number) {
    this.tickMs = Math.max(LEAST_MS, runMs / STRETCHES);
  }

  /** Follow a run until the returned function is called. */
  follow(progress: Progress): () => void {
    const look = (isLast: boolean): void => {
      const now = progress.countedMs;
      const isShort = now - this.seen[this.seen.length - 1].ms < this.tickMs / 2;
      // After a long turn of the event loop two looks may come at once.
      if (isShort && !isLast) return;
      if (isShort && this.seen.length > 1) this.seen.pop();
      if (now > 0) this.seen.push({ ms: now, count: progress.counts().count });
    };
    const timer = setInterval(look, this.tickMs, false);
    return () => {
      clearInterval(timer);
      look(true);
    };
  }

  /** What was seen, in the order of time. */
  stretches(): Stretch[] {
    return this.seen.slice(1).map(({ ms, count }, i) => {
      const before = this.seen[i];
      return { seconds: ms / 1000, iops: ((count - before.count) / (ms - before.ms)) * 1000 };
    });
  }
}
