/** Looks at active rings again and again for a short while, before it has the driver notify. */

/** What the poller does with a ring. */
export interface Pollable {
  /** Whether requests of it are being worked on that finish later. */
  readonly busy: boolean;
  /**
   * Take and carry out up to `limit` requests.
   *
   * @returns how many.
   */
  process(limit: number): number;
  /** Have the driver not notify. */
  disarm(): void;
  /**
   * Have the driver notify.
   *
   * @returns whether requests came meanwhile: then it stays active.
   */
  arm(): boolean;
}

/**
 * Requests of one ring before its answers are published and the next ring has its turn. Small, so that the driver
 * works on the first answers of a burst while this side works on the rest.
 */
const BATCH = 16;
/** Milliseconds of work before the event loop has its turn. */
const SLICE = 0.5;
/** Rounds without a request before the event loop has its turn: about 1 µs. */
const EMPTY_ROUNDS = 48;
/** Longest time without a request, in milliseconds, before rings go to sleep. */
const MAX_WINDOW = 0.2;
const MIN_WINDOW = 0.02;

/**
 * A notification costs the driver a system call and this side a wake-up of some 10 µs, so it pays to look for more
 * work for a while. How long adapts as in the kernel's halt polling: a notification soon after going to sleep
 * doubles the time, one long after halves it. The event loop has its turn after every {@link SLICE}, so messages and the
 * completions of slow storages are not held up.
 */
export class Poller {
  private readonly active: Pollable[] = [];
  private immediate: NodeJS.Immediate | undefined;
  private window = MIN_WINDOW;
  private lastWork = 0;
  private asleepSince = 0;

  /** Look at a ring now and for a while. */
  wake(ring: Pollable): void {
    if (this.active.includes(ring)) return;
    const now = performance.now();
    if (this.active.length === 0) {
      const soon = now - this.asleepSince < MAX_WINDOW;
      this.window = soon ? Math.min(MAX_WINDOW, this.window * 2) : Math.max(MIN_WINDOW, this.window / 2);
    }
    this.active.push(ring);
    this.lastWork = now;
    ring.disarm();
    this.immediate ??= setImmediate(this.turn);
  }

  /** Look at a ring no more. */
  drop(ring: Pollable): void {
    const at = this.active.indexOf(ring);
    if (at >= 0) this.active.splice(at, 1);
    if (this.active.length === 0 && this.immediate !== undefined) {
      clearImmediate(this.immediate);
      this.immediate = undefined;
    }
  }

  private readonly turn = (): void => {
    this.immediate = undefined;
    let now = performance.now();
    const end = now + SLICE;
    let busy = false;
    for (let empty = 0; empty < EMPTY_ROUNDS && now < end && !busy; ) {
      let found = 0;
      for (let i = 0; i < this.active.length; i++) {
        const ring = this.active[i];
        found += ring.process(BATCH);
        if (ring.busy) busy = true;
      }
      if (found > 0) {
        now = performance.now();
        this.lastWork = now;
        empty = 0;
      } else {
        empty++;
      }
    }
    if (now - this.lastWork > this.window) this.sleep(now);
    if (this.active.length > 0) this.immediate ??= setImmediate(this.turn);
  };

  private sleep(now: number): void {
    for (let i = this.active.length - 1; i >= 0; i--) {
      const ring = this.active[i];
      if (ring.arm()) {
        ring.disarm();
        this.lastWork = now;
      } else {
        this.active.splice(i, 1);
      }
    }
    if (this.active.length === 0) this.asleepSince = now;
  }
}
