/**
 * Programs that the system tests run against. A test that needs one which is not installed is skipped with the
 * reason, or fails when VIRTIO_REQUIRE_PEERS=1 says that nothing may be skipped.
 */

import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { accessSync, constants, mkdtempSync, readFileSync, rmSync, watch } from "node:fs";
import { tmpdir } from "node:os";
import { delimiter, dirname, join } from "node:path";
import { setImmediate } from "node:timers/promises";

/** How long a program may take to listen, and to end. */
const PATIENCE_MS = 20_000;

/** Packages of Debian that bring the programs. */
const PACKAGES: Readonly<Record<string, string>> = {
  "qemu-storage-daemon": "qemu-system-common",
  "qemu-img": "qemu-utils",
  "qemu-io": "qemu-utils",
  fio: "fio",
  "qemu-system-x86_64": "qemu-system-x86",
  vdpa: "iproute2",
  "apt-get": "the guest's kernel comes from Debian's packages",
};

/**
 * Whether a program is there, in the form of node:test's `skip` option.
 *
 * @returns false when it is installed, otherwise the reason to skip.
 * @throws Error when it is not installed and VIRTIO_REQUIRE_PEERS=1.
 */
export function requirePeer(...names: readonly string[]): false | string {
  const reason = missingPeers(names);
  if (reason === undefined) return false;
  if (process.env["VIRTIO_REQUIRE_PEERS"] === "1") throw new Error(`VIRTIO_REQUIRE_PEERS=1, but ${reason}`);
  return reason;
}

/** Which of the programs are not installed, and the packages that bring them; undefined when all are. */
export function missingPeers(names: readonly string[]): string | undefined {
  const missing = names.filter((name) => !isInstalled(name));
  if (missing.length === 0) return undefined;
  return missing.map((name) => `${name} is not installed (${PACKAGES[name] ?? name})`).join(", ");
}

function isInstalled(name: string): boolean {
  return (process.env["PATH"] ?? "").split(delimiter).some((folder) => {
    try {
      accessSync(join(folder, name), constants.X_OK);
      return true;
    } catch {
      return false;
    }
  });
}

/** A folder of one test. */
export class TemporaryFolder {
  readonly path = mkdtempSync(join(tmpdir(), "virtio-test-"));

  /** The path of a file in it. */
  file(name: string): string {
    return join(this.path, name);
  }

  /** Remove it with all that is in it. Idempotent. */
  close(): void {
    rmSync(this.path, { recursive: true, force: true });
  }
}

/** A program that serves a Unix socket until it is stopped. The kernel kills it when this process ends. */
export class Daemon {
  /** Path of the socket. */
  readonly path: string;
  /** What it has printed. */
  output = "";
  readonly #child: ChildProcess;
  readonly #ended: Promise<unknown>;

  private constructor(child: ChildProcess, path: string) {
    this.path = path;
    this.#child = child;
    this.#ended = once(child, "close").catch(() => undefined);
    for (const stream of [child.stdout, child.stderr]) {
      stream?.on("data", (chunk: Buffer) => {
        this.output += chunk.toString();
      });
    }
  }

  /** Process id. */
  get pid(): number {
    return this.#child.pid ?? -1;
  }

  /**
   * Start a program and wait until it listens on the socket `path`, whose folder exists.
   *
   * @throws Error with its output when it ends before that, or takes too long.
   */
  static async start(path: string, program: string, args: readonly string[]): Promise<Daemon> {
    // setpriv: PR_SET_PDEATHSIG, then exec, so that the process id is the program's.
    const child = spawn("setpriv", ["--pdeathsig", "KILL", "--", program, ...args], {
      stdio: ["ignore", "pipe", "pipe"],
    });
    const daemon = new Daemon(child, path);
    try {
      await daemon.#untilListening(program);
      return daemon;
    } catch (error) {
      await daemon.stop();
      throw error;
    }
  }

  /** Resolves when it has ended, of itself or otherwise. */
  get ended(): Promise<unknown> {
    return this.#ended;
  }

  /** Stop the program and wait for its end. Idempotent. */
  async stop(): Promise<void> {
    const patience = setTimeout(() => this.#child.kill("SIGKILL"), PATIENCE_MS);
    this.#child.kill("SIGTERM");
    await this.#ended;
    clearTimeout(patience);
  }

  /** End the program as no program wants to be ended (SIGKILL), and wait for its end. */
  async kill(): Promise<void> {
    this.#child.kill("SIGKILL");
    await this.#ended;
  }

  /** Keep the program from running at all (SIGSTOP). */
  freeze(): void {
    this.#child.kill("SIGSTOP");
  }

  async #untilListening(program: string): Promise<void> {
    const failed = (what: string) => new Error(`${program} ${what}:\n${this.output}`);
    const over = new AbortController();
    const patience = setTimeout(() => over.abort(failed("does not listen")), PATIENCE_MS);
    // The watch must exist before the first look: between the two the socket could come unseen. (The watch of
    // fs/promises begins with its first iteration only.)
    const folder = watch(dirname(this.path), { signal: over.signal });
    const appeared = once(folder, "change", { signal: over.signal });
    const listening = async () => {
      if (isListening(this.path)) return;
      await appeared;
      // Whatever changed in the folder: the socket's file is there from bind on, listen follows within microseconds.
      while (!isListening(this.path)) await setImmediate(undefined, { signal: over.signal });
    };
    try {
      await Promise.race([
        listening().catch((error: unknown) => {
          throw over.signal.aborted ? over.signal.reason : error;
        }),
        this.#ended.then(() => {
          throw failed("has ended");
        }),
      ]);
    } finally {
      clearTimeout(patience);
      appeared.catch(() => undefined);
      over.abort();
    }
  }
}

/** What `startStorageDaemon` serves. */
export interface StorageDaemonOptions {
  /** The `--blockdev` without its node name: `driver=null-co,size=1073741824`. */
  readonly blockdev: string;
  /** Default 1. */
  readonly queues?: number;
  /** Default true. */
  readonly writable?: boolean;
}

/** Serve one disk by qemu-storage-daemon; its socket is in `folder`. */
export function startStorageDaemon(folder: TemporaryFolder, options: StorageDaemonOptions): Promise<Daemon> {
  const { blockdev, queues = 1, writable = true } = options;
  const path = folder.file("vhost-user.sock");
  return Daemon.start(path, "qemu-storage-daemon", [
    "--blockdev",
    `${blockdev},node-name=disk`,
    "--export",
    `type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path=${path},` +
      `writable=${writable ? "on" : "off"},num-queues=${queues}`,
  ]);
}

/** Whether a client of the socket at `path` was accepted: a connected socket (SS_CONNECTED) that has an inode. */
export function hasClient(path: string): boolean {
  return socketsAt(path).some(
    ([, , , flags, , state, inode]) => flags === "00000000" && state === "03" && inode !== "0",
  );
}

/** Whether a socket accepts connections (__SO_ACCEPTCON in the flags of /proc/net/unix), without making one. */
function isListening(path: string): boolean {
  return socketsAt(path).some(([, , , flags]) => flags === "00010000");
}

/** The lines of /proc/net/unix for sockets with this path, in fields. */
function socketsAt(path: string): string[][] {
  return readFileSync("/proc/net/unix", "utf8")
    .split("\n")
    .filter((line) => line.endsWith(` ${path}`))
    .map((line) => line.split(/\s+/));
}
