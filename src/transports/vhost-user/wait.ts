/**
 * Bounded waiting: a time limit and an AbortSignal around work that goes on by itself. Giving a wait up never
 * interrupts the work, so the conversation with the peer stays in step; whoever gives up undoes the outcome.
 */

import { checkInteger, checkOptions, typeError, VirtioError } from "../../errors.js";
import type { WaitOptions } from "../transport.js";

/** Milliseconds that a wait lasts at most when nobody says otherwise. */
export const DEFAULT_TIMEOUT = 10_000;
/** The longest delay that a timer of Node takes. */
const MAX_TIMEOUT = 0x7fff_ffff;

/** The waits of one transport that have not ended. */
export class Waits {
  readonly #timeout: number;
  readonly #describe: () => string;
  readonly #giveUps = new Set<(error: Error) => void>();

  /**
   * @param timeout milliseconds of a wait that names none.
   * @param describe says what a wait that ends by its limit has been waiting for.
   */
  constructor(timeout: number, describe: () => string) {
    this.#timeout = timeout;
    this.#describe = describe;
  }

  /**
   * Wait for what `start` returns. The timer keeps the process alive meanwhile, nothing else here does.
   *
   * @throws whatever the work rejects with; `signal.reason` when the signal aborts (before `start` when it
   *   already has); VirtioError ERR_VIRTIO_TIMEOUT when the time is over; the error given to `endAll`.
   * @param late takes the outcome of work that succeeded when the wait for it was over.
   */
  async during<T>(start: () => Promise<T>, options: WaitOptions = {}, late?: (value: T) => void): Promise<T> {
    const { timeout, signal } = checkWait(options, this.#timeout);
    signal?.throwIfAborted();
    const work = start();
    return new Promise<T>((resolve, reject) => {
      const timer = setTimeout(() => {
        giveUp(
          new VirtioError(
            "ERR_VIRTIO_TIMEOUT",
            `no answer within ${timeout} ms, waiting for ${this.#describe()}; a back-end that serves one client ` +
              `at a time is silent to the second one; otherwise see whether it runs, or raise "timeout"`,
          ),
        );
      }, timeout);
      let waiting = true;
      const end = () => {
        waiting = false;
        clearTimeout(timer);
        signal?.removeEventListener("abort", onAbort);
        this.#giveUps.delete(giveUp);
      };
      const giveUp = (error: unknown) => {
        end();
        // oxlint-disable-next-line typescript/prefer-promise-reject-errors -- signal.reason may be anything
        reject(error);
      };
      const onAbort = () => giveUp(signal?.reason);
      signal?.addEventListener("abort", onAbort, { once: true });
      this.#giveUps.add(giveUp);
      const finish = (value: T) => {
        if (!waiting) return late?.(value);
        end();
        return resolve(value);
      };
      work.then(finish, giveUp);
    });
  }

  /** End every wait with `error`. */
  endAll(error: Error): void {
    for (const giveUp of this.#giveUps) giveUp(error);
  }
}

/**
 * Check the bounds of a wait and fill in the time limit.
 *
 * @throws TypeError or RangeError for a wrong one.
 */
export function checkWait(options: WaitOptions, fallback: number): { timeout: number; signal?: AbortSignal } {
  if (typeof options !== "object" || options === null) throw typeError("options", "an object", options);
  checkOptions("options", options, ["timeout", "signal"]);
  const timeout = checkInteger("timeout", options.timeout ?? fallback, 1, MAX_TIMEOUT);
  if (options.signal === undefined) return { timeout };
  if (!(options.signal instanceof AbortSignal)) throw typeError("signal", "an AbortSignal", options.signal);
  return { timeout, signal: options.signal };
}

/** Runs jobs one after the other, each to its end, whatever the end is. */
export class Serial {
  #last: Promise<unknown> = Promise.resolve();

  /** Run `job` when all earlier ones have ended. */
  run<T>(job: () => Promise<T>): Promise<T> {
    const result = this.#last.then(job);
    this.#last = result.catch(() => undefined);
    return result;
  }
}
