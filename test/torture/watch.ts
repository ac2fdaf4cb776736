/** Watches over a run of the torture: what is on its way, who waits for what, and whether anything still goes on. */

import { performance } from "node:perf_hooks";
import { TortureFailure } from "./ledger.js";

/** Calls that a failure lists. */
const MAX_LISTED = 12;

interface Call {
  readonly what: string;
  readonly since: number;
}

interface Waiter {
  readonly condition: () => boolean;
  readonly resolve: () => void;
}

/**
 * Every wait of a run goes through here. It ends when what it waits for has come, when something has failed elsewhere,
 * or when nothing has gone on for so long that a request must have been forgotten.
 */
export class Watch {
  /** Calls that have ended. */
  completed = 0;
  /** Whether no new calls shall be made. */
  paused = false;
  /** What more there is to say when something has failed. */
  details: () => string = () => "";

  private readonly patience: number;
  private readonly calls = new Map<number, Call>();
  private waiters: Waiter[] = [];
  private readonly timer: NodeJS.Timeout;
  private readonly failed: Promise<never>;
  private reject: (error: Error) => void = () => undefined;
  private failure: Error | undefined = undefined;
  private lastProgress = performance.now();
  private nextCall = 0;

  /** @param patience - milliseconds without any progress, after which the run has failed. */
  constructor(patience: number) {
    this.patience = patience;
    this.failed = new Promise<never>((_, reject) => {
      this.reject = reject;
    });
    this.failed.catch(() => undefined); // Whoever waits hears of it.
    this.timer = setInterval(() => this.check(), patience / 10);
  }

  /** Calls on their way. */
  get pending(): number {
    return this.calls.size;
  }

  /** Whether something has failed: then nothing new shall begin. */
  get over(): boolean {
    return this.failure !== undefined;
  }

  /** A call has begun; its number is for {@link end}. */
  begin(what: string): number {
    const id = this.nextCall++;
    this.calls.set(id, { what, since: performance.now() });
    return id;
  }

  /** A call has ended. */
  end(id: number): void {
    this.calls.delete(id);
    this.completed++;
    this.progress();
  }

  /** Make no new calls; resolves when none is on its way. */
  async pause(): Promise<void> {
    this.paused = true;
    await this.until(() => this.calls.size === 0);
  }

  /** Make calls again. */
  resume(): void {
    this.paused = false;
    this.look();
  }

  /** Things go on. */
  progress(): void {
    this.lastProgress = performance.now();
    this.look();
  }

  /** Something has changed that somebody may wait for, though it is no progress. */
  look(): void {
    if (this.waiters.length === 0) return;
    const ready = this.waiters.filter(({ condition }) => condition());
    if (ready.length === 0) return;
    this.waiters = this.waiters.filter((waiter) => !ready.includes(waiter));
    for (const { resolve } of ready) resolve();
  }

  /** Resolves as soon as `condition` holds when something changes. */
  async until(condition: () => boolean): Promise<void> {
    if (condition()) return;
    const comes = new Promise<void>((resolve) => this.waiters.push({ condition, resolve }));
    await this.wait(comes);
  }

  /** Wait for `promise`; reject when the run has failed meanwhile. */
  wait<T>(promise: Promise<T>): Promise<T> {
    return Promise.race([promise, this.failed]);
  }

  /** Something has failed; the first failure counts, and is returned with all that is known. */
  fail(error: unknown): Error {
    if (this.failure !== undefined) return this.failure;
    const why = error instanceof Error ? error : new Error(String(error));
    this.failure = new TortureFailure(`${why.message}\n${this.describe()}`, { cause: why });
    this.reject(this.failure);
    return this.failure;
  }

  /** Stop watching. */
  close(): void {
    clearInterval(this.timer);
  }

  private check(): void {
    const silence = performance.now() - this.lastProgress;
    if (silence > this.patience) {
      this.fail(new Error(`a request was not answered: nothing has gone on for ${Math.round(silence)} ms`));
    }
  }

  private describe(): string {
    const now = performance.now();
    const listed = [...this.calls.values()]
      .slice(0, MAX_LISTED)
      .map(({ what, since }) => `\n    ${what}, for ${Math.round(now - since)} ms`);
    return `  ${this.completed} calls have ended, ${this.calls.size} are pending, the oldest:${listed.join("")}\n${this.details()}`;
  }
}
