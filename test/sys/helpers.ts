/** What several tests of the system calls need: counts of what is open and mapped, children, rounds of the loop. */

import { type SpawnSyncReturns, spawnSync } from "node:child_process";
import { readdirSync, readFileSync } from "node:fs";
import process from "node:process";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";

/** Where compiled modules of the package are, as URLs for code given to a child. */
export const SYS = new URL("../../src/sys/index.js", import.meta.url).href;
export const NATIVE = new URL("../../src/sys/native.js", import.meta.url).href;
export const LAYOUT = new URL("../../src/virtqueue/layout.js", import.meta.url).href;

/** How many descriptors this process has open. */
export function openFds(): number {
  return readdirSync("/proc/self/fd").length;
}

/** The lines of /proc/self/maps for memory files of that name. */
export function mappings(name: string): string[] {
  return readFileSync("/proc/self/maps", "utf8")
    .split("\n")
    .filter((line) => line.includes(`/memfd:${name} `));
}

/** The open flags of a descriptor, as the kernel shows them. */
export function openFlags(fd: number): number {
  const info = readFileSync(`/proc/self/fdinfo/${fd}`, "utf8");
  return Number.parseInt(/flags:\s*(\d+)/.exec(info)?.[1] ?? "0", 8);
}

/** Run a module's text in a Node.js of its own; a child that hangs is killed and has the signal SIGKILL. */
export function runChild(
  code: string,
  options: { env?: NodeJS.ProcessEnv; args?: string[] } = {},
): SpawnSyncReturns<string> {
  return spawnSync(process.execPath, [...(options.args ?? []), "--input-type=module", "-e", code], {
    encoding: "utf8",
    env: options.env ?? process.env,
    timeout: 30_000,
    killSignal: "SIGKILL",
  });
}

/** Let the event loop go round, so that what is ready is delivered. */
export function turn(): Promise<void> {
  return new Promise((resolve) => {
    setImmediate(resolve);
  });
}

/** Let the event loop go round until `condition` holds; false when it still does not after many rounds. */
export async function turnUntil(condition: () => boolean, rounds = 2000): Promise<boolean> {
  for (let round = 0; round < rounds && !condition(); round++) await turn();
  return condition();
}

/** Collect garbage now. */
export function collectGarbage(): void {
  setFlagsFromString("--expose-gc");
  const gc = runInNewContext("gc") as () => void;
  gc();
}
