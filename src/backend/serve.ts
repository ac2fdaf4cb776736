/** Serving in the foreground: until a signal. */

import type { VhostUserBackend } from "./vhost-user-backend.js";

const SIGNALS = ["SIGINT", "SIGTERM"] as const;

/**
 * Wait for SIGINT or SIGTERM, then close the back-end, which flushes its storage. A second signal ends the process at
 * once. At each SIGUSR2 meanwhile the disk takes the size over that its storage has by now. (SIGHUP is what a terminal
 * sends that is closed, and ends the process.)
 *
 * @param onResize hears of the result: an error, or undefined when it worked.
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
export async function serveUntilSignal(
  backend: VhostUserBackend,
  onResize: (error: unknown) => void = () => undefined,
): Promise<(typeof SIGNALS)[number]> {
  const resize = (): void => void backend.resize().then(() => onResize(undefined), onResize);
  process.on("SIGUSR2", resize);
  const signal = await new Promise<(typeof SIGNALS)[number]>((resolve) => {
    const onSignal = (name: NodeJS.Signals): void => {
      for (const other of SIGNALS) process.off(other, onSignal);
      resolve(name === "SIGINT" ? "SIGINT" : "SIGTERM");
    };
    for (const name of SIGNALS) process.on(name, onSignal);
  });
  process.off("SIGUSR2", resize);
  await backend.close();
  return signal;
}
