/** How long calls wait: a time limit and a signal around work that cannot be called back. */

import { VirtioError } from "../../errors.js";
import type { CallOptions } from "./options.js";

/**
 * Wait for `work` no longer than the bounds allow. No timer and no listener is left behind, whatever comes first.
 *
 * @param late - makes the error of a wait that took too long.
 * @param giveUp - called when the wait ends before the work, with the error that it rejects with.
 */
export function bounded<T>(
  work: Promise<T>,
  { timeout, signal }: CallOptions,
  late: () => VirtioError,
  giveUp: (error: unknown) => void,
): Promise<T> {
  return new Promise<T>((resolve, reject) => {
    const end = (): void => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", onAbort);
    };
    const stop = (error: unknown): void => {
      end();
      giveUp(error);
      reject(error);
    };
    const onAbort = (): void => stop(signal?.reason);
    const timer = timeout === undefined ? undefined : setTimeout(() => stop(late()), timeout);
    signal?.addEventListener("abort", onAbort, { once: true });
    // In this order: once the caller may have the result, nobody may give the call up, and what it holds back.
    work.finally(end).then(resolve, reject);
  });
}

/** The error of a call that took too long. */
export function lateError(what: string, timeout: number | undefined, consequence: string): VirtioError {
  return new VirtioError("ERR_VIRTIO_TIMEOUT", `${what} did not end within ${timeout} ms; ${consequence}`);
}
