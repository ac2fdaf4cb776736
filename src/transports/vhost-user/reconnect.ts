/** When to try to reach a back-end again that is gone: bounded exponential back-off with jitter. */

import { performance } from "node:perf_hooks";
import { checkInteger, checkOptions, rangeError, typeError, VirtioError } from "../../errors.js";
import type { ReconnectOptions } from "../transport.js";

/** How to reconnect, every bound filled in. */
export type ReconnectPolicy = Required<ReconnectOptions>;

const DEFAULTS: ReconnectPolicy = { minDelay: 10, maxDelay: 1000, timeout: 30_000 };
/** Part of a delay that is left to chance, so that many drivers do not come back in step. */
const JITTER = 0.5;

/**
 * Fill in the bounds.
 *
 * @returns undefined when there is to be no reconnecting.
 * @throws TypeError or RangeError for wrong ones.
 */
export function reconnectPolicy(given: boolean | ReconnectOptions): ReconnectPolicy | undefined {
  if (given === false) return undefined;
  if (given === true) return DEFAULTS;
  if (typeof given !== "object" || given === null) throw typeError("reconnect", "a boolean or an object", given);
  checkOptions("reconnect", given, Object.keys(DEFAULTS));
  const minDelay = checkInteger("reconnect.minDelay", given.minDelay ?? DEFAULTS.minDelay, 1, 0x7fff_ffff);
  const fallback = Math.max(minDelay, DEFAULTS.maxDelay);
  const maxDelay = checkInteger("reconnect.maxDelay", given.maxDelay ?? fallback, minDelay, 0x7fff_ffff);
  const timeout = given.timeout ?? DEFAULTS.timeout;
  if (!(typeof timeout === "number" && timeout >= 0)) {
    throw rangeError("reconnect.timeout", "milliseconds, or Infinity", timeout);
  }
  return { minDelay, maxDelay, timeout };
}

/** The delays of one outage. */
export class Backoff {
  /** Attempts so far. */
  attempts = 0;
  readonly #policy: ReconnectPolicy;
  #began = 0;
  #returned: number | undefined = undefined;
  #completed = 0;

  constructor(policy: ReconnectPolicy) {
    this.#policy = policy;
  }

  /**
   * The device is gone. That is the same outage as before when it was back for a moment and did nothing: else a request
   * that kills each device would be sent for ever.
   *
   * @param completed requests that have completed since the beginning.
   */
  lost(completed: number): void {
    const now = performance.now();
    const wasBack = this.#returned === undefined || now - this.#returned > this.#policy.maxDelay;
    if (!wasBack && completed === this.#completed) return;
    this.attempts = 0;
    this.#began = now;
    this.#completed = completed;
  }

  /** The device is back. */
  returned(): void {
    this.#returned = performance.now();
  }

  /** Milliseconds to wait before the next attempt; undefined when it is time to give up. */
  next(): number | undefined {
    const { minDelay, maxDelay, timeout } = this.#policy;
    const left = this.#began + timeout - performance.now();
    if (this.attempts > 0 && left <= 0) return undefined;
    const full = Math.min(maxDelay, minDelay * 2 ** Math.min(this.attempts++, 31));
    return Math.min(full * (1 - JITTER * Math.random()), Math.max(0, left));
  }
}

/** Whether an attempt that failed like this may succeed later: the back-end is not there yet, or went away again. */
export function isPassing(error: unknown): boolean {
  return error instanceof VirtioError && PASSING.has(error.code);
}

/** The error of a device that was not reached again. */
export function gaveUp(peer: string, attempts: number, latest: unknown): VirtioError {
  const reason = latest instanceof Error ? latest.message : String(latest);
  return new VirtioError(
    "ERR_VIRTIO_DISCONNECTED",
    `the connection to ${peer} broke and could not be made again (${attempts} attempts; the last: ${reason}); ` +
      "start the back-end again, then open it anew",
    { cause: latest },
  );
}

const PASSING: ReadonlySet<string> = new Set([
  "ERR_VIRTIO_CONNECT",
  "ERR_VIRTIO_PERMISSION",
  "ERR_VIRTIO_DISCONNECTED",
  "ERR_VIRTIO_TIMEOUT",
]);
