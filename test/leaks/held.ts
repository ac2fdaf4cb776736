/** What this process holds: descriptors by what they are of, and shared memory that is mapped. */

import { readdirSync, readFileSync, readlinkSync } from "node:fs";

/** A line for each kind, with how many there are. */
export function held(): string[] {
  const counts = new Map<string, number>();
  const count = (what: string): void => void counts.set(what, (counts.get(what) ?? 0) + 1);
  for (const fd of readdirSync("/proc/self/fd")) {
    const target = targetOf(fd);
    // Sockets and pipes have a number each; that of this listing is gone by now.
    if (target !== undefined) count(`descriptor of ${target.replace(/\[\d+\]/, "")}`);
  }
  for (const line of readFileSync("/proc/self/maps", "utf8").split("\n")) {
    const [, access = "", , , , ...name] = line.split(/ +/);
    // What is shared: memory files, and anonymous memory (which Linux calls /dev/zero).
    if (access.endsWith("s")) count(`mapping of ${name.join(" ")}`);
  }
  return [...counts].map(([what, number]) => `${number} ${what}`).sort();
}

function targetOf(fd: string): string | undefined {
  try {
    return readlinkSync(`/proc/self/fd/${fd}`);
  } catch {
    return undefined;
  }
}
