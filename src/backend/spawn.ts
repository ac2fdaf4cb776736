/** The embedded back-end in a child process that ends with its parent. */

import { type ChildProcess, fork } from "node:child_process";
import { rmSync } from "node:fs";
import { dirname } from "node:path";
import { fileURLToPath } from "node:url";
import { checkOptions, VirtioError } from "../errors.js";
import type { ChildReport, ChildStart } from "./child.js";
import type { StorageSpec } from "./spec.js";

/** How {@link spawnBackend} sets the disk up. */
export interface SpawnBackendOptions {
  /** Request queues, 1 to 256. Default 1. */
  readonly queues?: number;
  /** Whether to offer packed virtqueues. Default true. */
  readonly packed?: boolean;
  /** Block size that the disk names, in bytes. Default 512. */
  readonly blockSize?: number;
}

/** A back-end in a child process. */
export interface SpawnedBackend {
  /** The Unix socket it listens on, in a directory of its own that only this user can enter. */
  readonly path: string;
  /** Its process. */
  readonly pid: number;
  /**
   * Finish what is in flight, flush, end the process, remove the socket and its directory. Idempotent.
   *
   * @throws VirtioError ERR_VIRTIO_BACKEND when the process ended by itself before, or could not flush;
   *   ERR_VIRTIO_TIMEOUT when it had to be killed.
   */
  close(): Promise<void>;
}

/** How long a child may take to start, and to end. */
const START_MS = 15_000;
const CLOSE_MS = 15_000;
/** How a child ends that has flushed everything. */
const CLEAN = "exit code 0";
/** Of what the child complains about, so many characters are kept. */
const COMPLAINT_LENGTH = 2000;

/**
 * Start a back-end in a child process, for `ram:` and `file:` addresses. The child does not keep this process alive,
 * and ends when this process does, however it ends.
 *
 * @returns when it listens.
 * @throws VirtioError ERR_VIRTIO_BACKEND with the reason when it does not start.
 * @example
 * ```ts
 * import { spawnBackend } from "virtio-driver/backend";
 * const backend = await spawnBackend({ kind: "ram", size: 64 * 1024 * 1024 }, { queues: 2 });
 * console.log(backend.pid > 0); // true
 * await backend.close();
 * ```
 */
export async function spawnBackend(spec: StorageSpec, options: SpawnBackendOptions = {}): Promise<SpawnedBackend> {
  checkOptions("spawnBackend", options, ["queues", "packed", "blockSize"]);
  const child = fork(fileURLToPath(new URL("./child.js", import.meta.url)), [], {
    execArgv: [],
    stdio: ["ignore", "ignore", "pipe", "ipc"],
  });
  const handle = new Child(child);
  const path = await handle.start({ spec, options });
  return { path, pid: handle.pid, close: () => handle.close() };
}

class Child {
  readonly pid: number;

  readonly #process: ChildProcess;
  readonly #exited: Promise<string>;
  #complaint = "";
  #report: ChildReport | undefined;
  #onReport: (() => void) | undefined;
  #path: string | undefined;
  #ended: string | undefined;
  #closed: Promise<void> | undefined;

  constructor(child: ChildProcess) {
    this.#process = child;
    this.pid = child.pid ?? 0;
    child.stderr?.setEncoding("utf8").on("data", (text: string) => {
      this.#complaint = (this.#complaint + text).slice(-COMPLAINT_LENGTH);
    });
    child.on("message", (message: ChildReport) => {
      this.#report = message;
      this.#onReport?.();
    });
    this.#exited = new Promise((resolve) => {
      child.once("error", (error) => resolve(error.message));
      child.once("exit", (code, signal) => resolve(signal === null ? `exit code ${code}` : signal));
    });
    void this.#cleanUp();
  }

  async #cleanUp(): Promise<void> {
    this.#ended = await this.#exited;
    this.#onReport?.();
    // A child that was killed could not do it.
    if (this.#path !== undefined) rmSync(dirname(this.#path), { recursive: true, force: true });
  }

  /** Tell the child what to do; resolves with its socket when it listens. */
  async start(start: ChildStart): Promise<string> {
    const reported = new Promise<void>((resolve) => {
      this.#onReport = resolve;
    });
    this.#process.send(start, () => undefined); // A failure to send shows as the end of the process.
    const timer = setTimeout(() => this.#process.kill("SIGKILL"), START_MS);
    await reported;
    clearTimeout(timer);
    this.#onReport = undefined;
    const report = this.#report;
    if (report?.path === undefined) {
      const { message = `its process ended (${this.#ended}) ${this.#complaint}`, errno } = report?.error ?? {};
      await this.#exited;
      throw new VirtioError("ERR_VIRTIO_BACKEND", `the back-end did not start: ${message.trim()}`, {
        ...(errno !== undefined && { errno }),
      });
    }
    this.#path = report.path;
    this.#process.unref();
    this.#process.channel?.unref();
    if (this.#process.stderr !== null && "unref" in this.#process.stderr) {
      (this.#process.stderr as unknown as { unref(): void }).unref();
    }
    return report.path;
  }

  close(): Promise<void> {
    this.#closed ??= this.#close();
    return this.#closed;
  }

  async #close(): Promise<void> {
    const asked = this.#ended === undefined;
    this.#process.ref();
    this.#report = undefined;
    if (this.#process.connected) this.#process.send("close", () => undefined);
    let late = false;
    const timer = setTimeout(() => {
      late = true;
      this.#process.kill("SIGKILL");
    }, CLOSE_MS);
    const how = await this.#exited;
    clearTimeout(timer);
    // A child that was told to end by somebody else has flushed, too.
    if (how === CLEAN) return;
    if (late) throw new VirtioError("ERR_VIRTIO_TIMEOUT", `the back-end did not end in ${CLOSE_MS} ms and was killed`);
    const why = (this.#report as ChildReport | undefined)?.error?.message ?? this.#complaint;
    const when = asked ? "ended with" : "had ended by itself with";
    throw new VirtioError("ERR_VIRTIO_BACKEND", `the back-end ${when} ${how}; writes may be lost. ${why}`.trim());
  }
}
