/** Boots the guest, runs test files in it, and passes on what happens there; with a diagnosis when it ends early. */

import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, readdirSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { TestNews } from "../protocol.js";
import { requirePeer } from "../../support/peers.js";
import { buildGuest, builtGuest } from "./build.js";
import { Machine } from "./machine.js";

/** How long the guest may take until its devices are ready: some 10 s on an idle machine. */
const BOOT_MS = 4 * 60_000;
/** How long a test file may be silent, and then the guest as a whole. */
const FILE_SILENCE_MS = 3 * 60_000;
const GUEST_SILENCE_MS = 4 * 60_000;
/** Lines of the console in an error. */
const CONSOLE_LINES = 60;

/** Programs without which there is no guest, in the order in which they are needed. */
export const GUEST_PROGRAMS = [
  ...["apt-get", "dpkg-deb", "flock", "setpriv"],
  ...["qemu-system-x86_64", "qemu-storage-daemon", "vdpa"],
];

/** Why there is no guest here, in the form of node:test's `skip`. It is a download of 100 MB: not made by the way. */
export function reasonForNoGuest(...programs: readonly string[]): false | string {
  const missing = requirePeer(...programs);
  if (missing !== false) return missing;
  const mayBuild = process.env["VIRTIO_REQUIRE_PEERS"] === "1" || process.env["VIRTIO_BUILD_GUEST"] === "1";
  return builtGuest() !== undefined || mayBuild ? false : "the guest is not built yet; npm run test:system builds it";
}

/** What is run in the guest. */
export interface GuestRun {
  /** The working tree whose compiled tests are run. */
  readonly root: string;
  /** Test files, absolute paths; default: all in the root's dist/test/guest. */
  readonly files?: readonly string[];
  /** Hears what the guest's console and QEMU say. */
  readonly onConsole?: ((text: string) => void) | undefined;
  /** Hears of the build and the boot. */
  readonly log?: (line: string) => void;
}

/** The compiled test files for the guest in a working tree. */
function guestTests(root: string): string[] {
  const folder = join(root, "dist", "test", "guest");
  return readdirSync(folder)
    .filter((name) => name.endsWith(".test.js"))
    .sort()
    .map((name) => join(folder, name));
}

/**
 * Run test files in the guest.
 *
 * @returns What happens there, as it happens.
 * @throws GuestUnavailable when it cannot be built here.
 * @throws Error with the end of its console when it does not boot, hangs or ends before the tests do.
 */
export async function* runInGuest(options: GuestRun): AsyncGenerator<TestNews> {
  const { root, files, onConsole, log = () => undefined } = options;
  const guest = await buildGuest(log);
  const folder = new WorkFolder();
  const coverage = process.env["NODE_V8_COVERAGE"];
  const machine = new Machine({
    files: guest,
    folder: folder.path,
    root,
    job: { files: files ?? guestTests(root), silenceMs: FILE_SILENCE_MS },
    environment: testEnvironment(),
    writable: coverage === undefined ? [] : [coverage],
    onConsole,
    shell: false,
  });
  const broken = (what: string) => new Error(`${what}; the end of its console:\n${tail(machine.console)}`);
  const lines = machine.lines();
  const start = performance.now();
  let booted = false;
  let failed = false;
  let current = "nothing has run yet";
  let overdue: NodeJS.Timeout | undefined;
  try {
    for (;;) {
      const patience = booted ? GUEST_SILENCE_MS : BOOT_MS;
      const silence = new Promise<never>((_resolve, reject) => {
        overdue = setTimeout(
          () => reject(broken(`the guest was silent for ${patience / 1000} s (${current})`)),
          patience,
        );
      });
      const next = await Promise.race([lines.next(), silence]);
      clearTimeout(overdue);
      if (next.done === true) throw broken(`the guest ended too early (${current}): ${await machine.ended}`);
      const message = next.value;
      switch (message.type) {
        case "ready":
          booted = true;
          log(`the guest was ready after ${((performance.now() - start) / 1000).toFixed(1)} s`);
          break;
        case "ask":
          await machine.answer(message.id, message.question);
          break;
        case "broken":
          throw broken(`the guest could not be prepared, or its runner failed (${current}): ${message.error}`);
        case "done":
          return;
        default:
          if (message.type === "file") {
            current = `${message.file} began`;
            machine.takeConsole();
            failed = false;
          }
          if (message.type === "begin") current = `"${message.name}" began`;
          if ("error" in message && message.error !== undefined) failed = true;
          if (message.type === "file-end" && failed) {
            yield { type: "output", text: `The console of the guest meanwhile:\n${machine.takeConsole()}\n` };
          }
          yield message;
      }
    }
  } finally {
    clearTimeout(overdue);
    await machine.stop();
    await folder.close();
  }
}

/** A shell in the prepared guest, on this process's terminal; resolves when QEMU has ended. */
export async function openShell(root: string, log: (line: string) => void): Promise<void> {
  const files = await buildGuest(log);
  const folder = new WorkFolder();
  try {
    const job = { files: [], silenceMs: FILE_SILENCE_MS };
    const options = {
      files,
      folder: folder.path,
      root,
      job,
      environment: testEnvironment(),
      writable: [],
      shell: true,
    };
    const machine = new Machine(options);
    for await (const message of machine.lines()) {
      if (message.type === "broken") log(message.error);
      if (message.type === "ask") await machine.answer(message.id, message.question);
    }
    log(await machine.ended);
  } finally {
    await folder.close();
  }
}

/**
 * A folder for images and the job. However this process ends, it is removed: by a child that waits for the end of its
 * standard input, in a session of its own so that no signal to our group reaches it.
 */
class WorkFolder {
  readonly path = mkdtempSync(join(tmpdir(), "virtio-guest-"));
  readonly #cleaner = spawn("sh", ["-c", 'cat; rm -rf "$1"', "sh", this.path], {
    stdio: ["pipe", "ignore", "inherit"],
    detached: true,
  });
  readonly #removed = once(this.#cleaner, "exit");

  async close(): Promise<void> {
    this.#cleaner.stdin.end();
    await this.#removed;
  }
}

/** What tests in the guest see of our environment. */
function testEnvironment(): Record<string, string> {
  const names = ["PATH", "NODE_V8_COVERAGE", "VIRTIO_REQUIRE_PEERS"];
  return Object.fromEntries(
    names.flatMap((name) => {
      const value = process.env[name];
      return value === undefined ? [] : [[name, value]];
    }),
  );
}

function tail(text: string): string {
  return text === "" ? "(it is empty)" : text.split("\n").slice(-CONSOLE_LINES).join("\n");
}
