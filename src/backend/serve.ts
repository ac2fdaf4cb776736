/** Serving in the foreground: until a signal. */

import type { VhostUserBackend } from "./vhost-user-backend.js";

const SIGNALS = ["SIGINT", "SIGTERM"] as const;

/**
 * Wait for SIGINT or SIGTERM, then close the back-end, which flushes its storage. A second signal ends the process at
 * once.
 *
 * @returns the signal, when the back-end is closed.
 * @throws what `backend.close` throws.
 * @example
 * ```ts
 * import { mkdtempSync, rmSync } from "node:fs";
 * import { tmpdir } from "node:os";
 * import { join } from "node:path";
 * import { openStorage, serveUntilSignal, VhostUserBackend } from "virtio-driver/backend";
 *
 * const folder = mkdtempSync(join(tmpdir(), "example-"));
 * const storage = openStorage({ kind: "ram", size: 1024 * 1024 });
 * const backend = VhostUserBackend.listen({ path: join(folder, "disk.sock"), storage });
 * setTimeout(() => process.kill(process.pid, "SIGTERM"), 10); // somebody stops the service
 * console.log(await serveUntilSignal(backend)); // SIGTERM
 * rmSync(folder, { recursive: true });
 * ```
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
