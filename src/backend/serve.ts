/** Serving in the foreground: until a signal. */

import type { VhostUserBackend } from "./vhost-user-backend.js";

const SIGNALS = ["SIGINT", "SIGTERM"] as const;

/**
 * Wait for SIGINT or SIGTERM, then close the back-end, which flushes its storage. A second signal ends the process at
 * once.
 *
 * @returns the signal, when the back-end is closed.
 * @throws what `backend.close` throws.
 */
export async function serveUntilSignal(backend: VhostUserBackend): Promise<(typeof SIGNALS)[number]> {
  const signal = await new Promise<(typeof SIGNALS)[number]>((resolve) => {
    const onSignal = (name: NodeJS.Signals): void => {
      for (const other of SIGNALS) process.off(other, onSignal);
      resolve(name === "SIGINT" ? "SIGINT" : "SIGTERM");
    };
    for (const name of SIGNALS) process.on(name, onSignal);
  });
  await backend.close();
  return signal;
}
