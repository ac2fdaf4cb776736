/** Entry point of the child process of `spawnBackend`: one back-end, until the parent says so or is gone. */

import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { VirtioError } from "../errors.js";
import { openStorage, type StorageSpec } from "./spec.js";
import { VhostUserBackend, type VhostUserBackendOptions } from "./vhost-user-backend.js";

/** The first message of the parent: what to serve. The second, any, ends the child. */
export interface ChildStart {
  readonly spec: StorageSpec;
  readonly options: Pick<VhostUserBackendOptions, "queues" | "packed" | "blockSize">;
}

/** A message of the child: where it listens, or what went wrong. */
export interface ChildReport {
  readonly path?: string;
  readonly error?: { readonly message: string; readonly errno?: number };
}

/** After the parent is gone, nobody waits for more than this. */
const LAST_MS = 5000;

let folder: string | undefined;
let backend: VhostUserBackend | undefined;
let ending = false;

process.once("message", (start: ChildStart) => {
  try {
    // mkdtemp makes it for this user only (mode 0700).
    folder = mkdtempSync(join(tmpdir(), "virtio-driver-"));
    const path = join(folder, "disk.sock");
    backend = VhostUserBackend.listen({ ...start.options, path, storage: openStorage(start.spec) });
    report({ path });
    process.once("message", () => void end());
  } catch (error) {
    report({ error: describe(error) });
    void end(1);
  }
});
// The channel ends with the parent, however the parent ends.
process.once("disconnect", () => void end());
process.once("SIGTERM", () => void end());
// A Ctrl-C at the terminal goes to the parent as well, which decides.
process.on("SIGINT", () => undefined);

async function end(code = 0): Promise<void> {
  if (ending) return;
  ending = true;
  // A storage that hangs must not keep the process: what cannot be flushed by then is lost either way.
  setTimeout(() => process.kill(process.pid, "SIGKILL"), LAST_MS).unref();
  try {
    await backend?.close();
  } catch (error) {
    report({ error: describe(error) });
    code = 1;
  }
  if (folder !== undefined) rmSync(folder, { recursive: true, force: true });
  process.exitCode = code;
  if (process.connected) process.disconnect();
}

function report(message: ChildReport): void {
  if (process.connected) process.send?.(message);
}

function describe(error: unknown): { message: string; errno?: number } {
  if (!(error instanceof Error)) return { message: String(error) };
  const errno = error instanceof VirtioError ? error.errno : undefined;
  return { message: error.message, ...(errno !== undefined && { errno }) };
}
