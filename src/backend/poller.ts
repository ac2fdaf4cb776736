/** Looks at active rings again and again for a short while, before it has the driver notify. */

/** What the poller does with a ring. */
export interface Pollable {
  /** Whether requests of it are being worked on that finish later. */
  readonly busy: boolean;
  /**
   * Take and carry out some requests, and publish the answers.
   *
   * @returns how many.
   */
  process(): number;
  /** Have the driver not notify. */
  disarm(): void;
  /**
   * Have the driver notify.
   *
   * @returns whether requests came meanwhile: then it stays active.
   */
  arm(): boolean;
}

/** Milliseconds of work before the event loop has its turn. */
const SLICE = 0.5;
/** Rounds without a request between two looks at the clock: about 1 µs. */
const ROUNDS_PER_LOOK = 48;
/** Longest time without a request, in milliseconds, before rings go to sleep. */
const MAX_WINDOW = 0.2;
const MIN_WINDOW = 0.02;

/**
 * A notification costs the driver a system call and this side a wake-up of some 10 µs, so it pays to look for more
 * work for a while. How long adapts as in the kernel's halt polling: a notification soon after going to sleep
 * doubles the time, one long after halves it. The event loop has its turn after every {@link SLICE}, so messages are
 * not held up. While requests wait for other threads, nothing is looked for without finding it: those threads may
 * need this processor, and the end of such a request wakes the ring.
 */
export class Poller {
  private readonly active: Pollable[] = [];
  private immediate: NodeJS.Immediate | undefined;
  private window = MIN_WINDOW;
  private lastWork = 0;
  private asleepSince = 0;

  /** The driver has sent a notification: look at a ring now and for a while. */
  notified(ring: Pollable): void {
    if (this.active.length === 0) {
      const soon = performance.now() - this.asleepSince < MAX_WINDOW;
      this.window = soon ? Math.min(MAX_WINDOW, this.window * 2) : Math.max(MIN_WINDOW, this.window / 2);
    }
    this.wake(ring);
  }

  /** Look at a ring now and for a while. */
  wake(ring: Pollable): void {
    if (this.active.includes(ring)) return;
    this.active.push(ring);
    this.lastWork = performance.now();
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
    let found = 0;
    let waits = false;
    let empty = 0;
    do {
      found = 0;
      for (let i = 0; i < this.active.length; i++) {
        const ring = this.active[i];
        found += ring.process();
        if (ring.busy) waits = true;
      }
      if (found > 0) {
        now = performance.now();
        this.lastWork = now;
        empty = 0;
      } else if (++empty === ROUNDS_PER_LOOK) {
        now = performance.now();
        if (now - this.lastWork > this.window) break;
        empty = 0;
      }
    } while (now < end && !waits);
    if (found === 0 && (waits || now - this.lastWork > this.window)) this.sleep(now);
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
