/** How long a polling driver leaves the device alone between two looks. */

/** Steps of the shortest pause: some 30 nanoseconds. */
const MIN_PAUSE = 16;
/** Steps of the longest pause: about a microsecond. */
const MAX_PAUSE = 512;
/** Steps by which the pause grows. */
const GROWTH = 8;
/** Requests in flight from which on the pause adapts: below, each completion is waited for. */
const MIN_DEPTH = 8;

/**
 * A look takes the cache line that the device writes its answers to, and the device has to fetch it back: the more
 * often the driver looks, the slower the device gets. With many requests in flight nothing is lost by looking when a
 * good part of them has completed, so the pause grows while a look finds few, and halves when it finds many.
 */
export class PollPacer {
  /** Steps of the next pause. */
  pause = MIN_PAUSE;
  private left = 0;

  /** Spend the pause. */
  wait(): void {
    for (this.left = this.pause; this.left > 0; ) this.left--;
  }

  /** Learn from a look that found `count` of `depth` requests completed. */
  adapt(count: number, depth: number): void {
    if (depth < MIN_DEPTH) this.pause = MIN_PAUSE;
    else if (count * 3 < depth) this.pause = Math.min(MAX_PAUSE, this.pause + GROWTH);
    else if (count * 3 > depth * 2) this.pause = Math.max(MIN_PAUSE, this.pause >> 1);
  }
}
