/** Runs the real command in a process of its own. */

import { type ChildProcessByStdio, type ChildProcessWithoutNullStreams, spawn } from "node:child_process";
import type { Readable, Writable } from "node:stream";
import { fileURLToPath } from "node:url";

/** What a finished command left. */
export interface Finished {
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
  readonly stdout: Buffer;
  readonly stderr: string;
}

/** The command as a file. */
export const MAIN = fileURLToPath(new URL("../../src/cli/main.js", import.meta.url));
const TIMEOUT_MS = 60_000;

/** Start `virtio` with these words, all three streams as pipes. */
export function start(words: readonly string[], env: NodeJS.ProcessEnv = {}): ChildProcessWithoutNullStreams {
  return spawn(process.execPath, [MAIN, ...words], { stdio: "pipe", ...options(env) });
}

/** Run `virtio` with these words until it ends; stdin is `input`, or an open file. */
export async function virtio(words: readonly string[], input: string | Uint8Array | number = ""): Promise<Finished> {
  if (typeof input === "number") {
    const child = spawn(process.execPath, [MAIN, ...words], { stdio: [input, "pipe", "pipe"], ...options({}) });
    return finished(child as ChildProcessByStdio<null, Readable, Readable>);
  }
  const child = start(words);
  child.stdin.on("error", () => undefined); // a command that ends early does not read all of it
  child.stdin.end(input);
  return finished(child);
}

/** Run `virtio` on a terminal of its own, which `script` (Debian: bsdutils) provides; stdout and stderr are one there. */
export function onTerminal(words: readonly string[], env: NodeJS.ProcessEnv = {}): Promise<Finished> {
  const line = [process.execPath, MAIN, ...words].map((word) => `'${word}'`).join(" ");
  return finished(spawn("script", ["-qec", line, "/dev/null"], { stdio: "pipe", ...options(env) }));
}

/** Collect the output of `child` until it ends. */
export async function finished(child: ChildProcessByStdio<Writable | null, Readable, Readable>): Promise<Finished> {
  const out: Buffer[] = [];
  const err: Buffer[] = [];
  child.stdout.on("data", (chunk: Buffer) => out.push(chunk));
  child.stderr.on("data", (chunk: Buffer) => err.push(chunk));
  const [code, signal] = await new Promise<[number | null, NodeJS.Signals | null]>((resolve, reject) => {
    child.on("error", reject);
    child.on("close", (...ended) => resolve(ended));
  });
  return { code, signal, stdout: Buffer.concat(out), stderr: Buffer.concat(err).toString() };
}

function options(env: NodeJS.ProcessEnv): { timeout: number; env: NodeJS.ProcessEnv } {
  return { timeout: TIMEOUT_MS, env: { ...process.env, NO_COLOR: "1", ...env } };
}
