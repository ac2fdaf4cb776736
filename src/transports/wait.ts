/**
 * Bounded waiting: a time limit and an AbortSignal around work that goes on by itself. Giving a wait up never
 * interrupts the work, so the conversation with the peer stays in step; whoever gives up undoes the outcome.
 */

import { checkInteger, checkOptions, typeError, VirtioError } from "../errors.js";
import type { WaitOptions } from "./transport.js";

/** Milliseconds that a wait lasts at most when nobody says otherwise. */
export const DEFAULT_TIMEOUT = 10_000;
/** The longest delay that a timer of Node takes. */
const MAX_TIMEOUT = 0x7fff_ffff;

/** One wait for a value. It ends once: by the value, an error, its time limit, its signal, or with all others. */
export interface Wait<T> {
  /** What the caller awaits. */
  readonly promise: Promise<T>;
  /** Whether it has ended. */
  readonly over: boolean;
  /** End it by the value; false when it had ended before, and nobody will see the value. */
  readonly resolve: (value: T) => boolean;
  /** End it by an error; no effect when it had ended before. */
  readonly reject: (error: unknown) => void;
}

/** The waits of one transport that have not ended. */
export class Waits {
  readonly #timeout: number;
  readonly #describe: () => string;
  readonly #rejects = new Set<(error: Error) => void>();

  /**
   * @param timeout milliseconds of a wait that names none.
   * @param describe says what a wait that ends by its limit has been waiting for.
   */
  constructor(timeout: number, describe: () => string) {
    this.#timeout = timeout;
    this.#describe = describe;
  }

  /**
   * Begin to wait. The timer keeps the process alive meanwhile, nothing else here does. The wait rejects with
   * `signal.reason`, VirtioError ERR_VIRTIO_TIMEOUT, or the error given to `endAll`.
   *
   * @throws `signal.reason` when the signal has aborted already; TypeError or RangeError for a wrong bound.
   */
  begin<T>(options: WaitOptions = {}): Wait<T> {
    const { timeout, signal } = checkWait(options, this.#timeout);
    signal?.throwIfAborted();
    let over = false;
    let settle: { resolve: (value: T) => void; reject: (error: unknown) => void } | undefined;
    const promise = new Promise<T>((resolve, reject) => {
      settle = { resolve, reject };
    });
    const end = () => {
      over = true;
      clearTimeout(timer);
      signal?.removeEventListener("abort", onAbort);
      this.#rejects.delete(reject);
    };
    const reject = (error: unknown) => {
      if (over) return;
      end();
      settle?.reject(error);
    };
    const onAbort = () => reject(signal?.reason);
    const timer = setTimeout(() => reject(this.#timedOut(timeout)), timeout);
    signal?.addEventListener("abort", onAbort, { once: true });
    this.#rejects.add(reject);
    return {
      promise,
      get over() {
        return over;
      },
      resolve(value) {
        if (over) return false;
        end();
        settle?.resolve(value);
        return true;
      },
      reject,
    };
  }

  /** Wait for what `start` returns; it is not called when the signal has aborted already. */
  async during<T>(start: () => Promise<T>, options?: WaitOptions): Promise<T> {
    const wait = this.begin<T>(options);
    start().then(wait.resolve, wait.reject);
    return wait.promise;
  }

  /** End every wait with `error`. */
  endAll(error: Error): void {
    for (const reject of this.#rejects) reject(error);
  }

  #timedOut(timeout: number): VirtioError {
    return new VirtioError(
      "ERR_VIRTIO_TIMEOUT",
      `no end within ${timeout} ms of waiting for ${this.#describe()}; a back-end that serves one client at a ` +
        `time is silent to the second one; otherwise see whether it runs, or raise "timeout"`,
    );
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
  #last: Promise<void> = Promise.resolve();

  /** Run `job` when all earlier ones have ended. */
  run(job: () => Promise<void>): Promise<void> {
    const result = this.#last.then(job);
    this.#last = result.catch(() => undefined);
    return result;
  }
}
