/** The clock of the measuring loops of `virtio bench`: when counting begins and ends. */

import { VirtioError } from "../errors.js";
import type { LatencyHistogram } from "./histogram.js";

/** How long to measure. */
export interface MeterOptions {
  /** Milliseconds before counting begins, in which the engine compiles what is hot. */
  readonly rampMs: number;
  /** Milliseconds of counting. */
  readonly runMs: number;
}

/** Milliseconds without a completion after which the device counts as dead. */
const SILENCE_MS = 10_000;

/** Counts in the ramp that are thrown away. */
const REHEARSALS = 10;

/**
 * One look at the clock serves a whole batch of completions: it costs as much as a tenth of a request. The ramp is
 * made of short counts that are thrown away, so that beginning to count brings no code that was not compiled yet.
 */
export class Meter {
  /** Whether requests are to be kept in flight. */
  isRunning = true;
  /** Milliseconds when the clock was looked at last. In an array: a number that a call returns would be allocated. */
  readonly time = new Float64Array(1);
  /** Whether the next {@link refresh} looks at the clock. */
  isStale = true;
  private readonly rehearsalMs: number;
  private readonly runMs: number;
  private readonly latencies: readonly LatencyHistogram[];
  private rehearsals = REHEARSALS;
  private isCounting = true;
  private begin = 0;
  /** When the present count ends. */
  private end = Number.POSITIVE_INFINITY;
  private cpu = { user: 0, system: 0 };

  /** `latencies` are counted in; what they hold when counting begins is cleared. */
  constructor({ rampMs, runMs }: MeterOptions, latencies: readonly LatencyHistogram[]) {
    this.rehearsalMs = rampMs / REHEARSALS;
    this.runMs = runMs;
    this.latencies = latencies;
  }

  /** Begin the ramp. */
  start(): void {
    this.refresh();
    this.end = this.time[0] + this.rehearsalMs;
    this.forget();
  }

  /** Keep requests in flight again, after the counting, until there are none. */
  runUncounted(): void {
    this.isRunning = true;
    this.forget();
  }

  /** Look at the clock, unless that was done since the last {@link forget}. */
  refresh(): void {
    if (this.isStale) this.look();
  }

  /** The next {@link refresh} looks at the clock again. */
  forget(): void {
    this.isStale = true;
  }

  /** Count in `latency` a request that was submitted at `since[at]` and completed at the time of the last look. */
  completed(latency: LatencyHistogram, since: Float64Array, at: number): void {
    if (!this.isCounting) return;
    const ns = (this.time[0] - since[at]) * 1e6;
    latency.record(ns < 2 ** 31 ? ns | 0 : ns); // a small integer needs no memory
  }

  /** @throws VirtioError ERR_VIRTIO_TIMEOUT when nothing has completed for long. */
  throwIfSilent(): void {
    if (performance.now() - this.time[0] < SILENCE_MS) return;
    throw new VirtioError(
      "ERR_VIRTIO_TIMEOUT",
      `no request completed in ${SILENCE_MS} ms; see whether the device runs`,
    );
  }

  /** Milliseconds of counting so far; 0 in the ramp. */
  get countedMs(): number {
    if (this.rehearsals > 0) return 0;
    return (this.isCounting ? performance.now() : this.end) - this.begin;
  }

  /** Processor time that this process used while counting, in microseconds, once {@link isRunning} is false. */
  get cpuMicros(): number {
    return this.cpu.user + this.cpu.system;
  }

  private look(): void {
    const now = performance.now();
    this.time[0] = now;
    this.isStale = false;
    if (now >= this.end && this.isCounting) this.endCount(now);
  }

  private endCount(now: number): void {
    if (this.rehearsals > 0) {
      this.rehearsals--;
      this.begin = now;
      this.end = now + (this.rehearsals > 0 ? this.rehearsalMs : this.runMs);
      for (const latency of this.latencies) latency.clear();
      this.cpu = process.cpuUsage();
    } else {
      this.isCounting = false;
      this.isRunning = false;
      this.end = now;
      this.cpu = process.cpuUsage(this.cpu);
    }
  }
}
