/** What the command says and returns when something failed. */

import { CommanderError } from "commander";
import { ERR_VIRTIO_ARGUMENT, VirtioError, type VirtioErrorCode } from "../errors.js";

/** Exit codes of the command. */
const EXIT = { ok: 0, failed: 1, usage: 2, device: 4 } as const;

const DEVICE_CODES: readonly VirtioErrorCode[] = [
  "ERR_VIRTIO_BACKEND",
  "ERR_VIRTIO_BUSY",
  "ERR_VIRTIO_CONNECT",
  "ERR_VIRTIO_DISCONNECTED",
  "ERR_VIRTIO_NATIVE_UNAVAILABLE",
  "ERR_VIRTIO_PERMISSION",
  "ERR_VIRTIO_TIMEOUT",
];

/** Print `error` as one line on stderr, or with its stack under `--debug`, and return the exit code. */
export function reportFailure(error: unknown, words: readonly string[]): number {
  if (error instanceof CommanderError) {
    if (error.exitCode === 0) return EXIT.ok;
    const reason = oneLine(error.message)
      .replace(/^error: /, "")
      .replace(/\.$/, "");
    process.stderr.write(`virtio: ${ERR_VIRTIO_ARGUMENT}: ${reason}; try: ${helpHint(error, words)}\n`);
    return EXIT.usage;
  }
  const { code, message, stack } = describe(error);
  process.stderr.write(`virtio: ${code}: ${oneLine(message)}\n`);
  if (words.includes("--debug")) process.stderr.write(`${stack}\n`);
  return exitCode(error, code);
}

function exitCode(error: unknown, code: string): number {
  if (code === ERR_VIRTIO_ARGUMENT || code === "ERR_VIRTIO_ADDRESS") return EXIT.usage;
  if (error instanceof VirtioError && DEVICE_CODES.includes(error.code)) return EXIT.device;
  return EXIT.failed;
}

/** An error of ours or of Node has a code; one without is a fault of ours, and says so. */
function describe(error: unknown): { code: string; message: string; stack: string } {
  if (!(error instanceof Error)) return { code: "ERR_UNEXPECTED", message: String(error), stack: "" };
  const code = "code" in error && typeof error.code === "string" ? error.code : "ERR_UNEXPECTED";
  const message = error.message.startsWith(`${code}: `) ? error.message.slice(code.length + 2) : error.message;
  const cause = error.cause instanceof Error ? `\ncaused by ${error.cause.stack}` : "";
  return { code, message, stack: `${error.stack}${cause}` };
}

function oneLine(message: string): string {
  return message.replaceAll(/\s*\n\s*/g, " ");
}

function helpHint(error: CommanderError, words: readonly string[]): string {
  const named = words.find((word) => !word.startsWith("-"));
  return named === undefined || error.code === "commander.unknownCommand" ? "virtio --help" : `virtio help ${named}`;
}
