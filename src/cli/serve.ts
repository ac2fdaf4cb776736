/** `virtio serve`: a virtual disk on a Unix socket, for any vhost-user front-end. */

import { Argument, Command, Option } from "commander";
import type { StorageSpec, VhostUserBackend } from "../backend/index.js";
import { VirtioError } from "../errors.js";
import { parseSize } from "../size.js";
import { formatBytes } from "./format.js";
import { type MetricsFlags, openMetrics, withMetricsOption } from "./metrics-option.js";
import { addBackend } from "./metrics-serve.js";
import { positiveNumber, size } from "./options.js";
import { narrate } from "./terminal.js";

interface ServeFlags extends MetricsFlags {
  readonly socket: string;
  readonly readOnly?: true;
  readonly queues: number;
  readonly packed?: true;
  readonly split?: true;
  readonly blockSize: number;
}

/** The subcommand. */
export const command = withMetricsOption(
  new Command("serve")
    .description("Serve a virtual disk to vhost-user front-ends: this library, QEMU, others.")
    .addArgument(new Argument("<storage>", "what the disk is made of: ram:SIZE or file:PATH"))
    .requiredOption("--socket <path>", "where to listen; a stale socket there is replaced")
    .option("--read-only", "refuse requests that change the disk")
    .option("--queues <n>", "request queues, 1 to 256", positiveNumber, 1)
    .addOption(new Option("--packed", "offer packed virtqueues beside split ones (default)").conflicts("split"))
    .addOption(new Option("--split", "offer split virtqueues only"))
    .option("--block-size <size>", "block size: a power of two from 512 to 64K", size, 512),
)
  .addHelpText(
    "after",
    `
It serves one client after another until SIGINT or SIGTERM, then flushes and removes the socket. At SIGUSR2 it takes
over the size that the file has by then, and tells the driver: truncate -s 2G disk.img; kill -USR2 PID

Examples:
  virtio serve ram:64M --socket /run/disk.sock
  virtio serve file:disk.img --socket /run/disk.sock --queues 4
  virtio serve file:golden.img --socket /run/disk.sock --read-only --split
  virtio serve ram:1G --socket /run/disk.sock --metrics 9100`,
  )
  .action(run);

async function run(address: string, flags: ServeFlags): Promise<void> {
  const readOnly = flags.readOnly === true;
  const spec = parseStorage(address, readOnly);
  await using page = await openMetrics(flags);
  const { openStorage, serveUntilSignal, VhostUserBackend } = await import("../backend/index.js");
  const storage = Object.assign(openStorage(spec), { readOnly });
  let backend: VhostUserBackend;
  try {
    backend = VhostUserBackend.listen({
      ...{ path: flags.socket, storage, queues: flags.queues, blockSize: flags.blockSize },
      packed: flags.split !== true,
      onError: (error) => narrate(`virtio serve: ${reasonOf(error)}`),
    });
  } catch (error) {
    await storage.close?.();
    throw error;
  }
  if (page !== undefined) addBackend(page, backend);
  const stopped = serveUntilSignal(backend, (error) => {
    if (error === undefined) narrate(`the disk has ${formatBytes(storage.capacity)} now`);
    else narrate(`virtio serve: ${reasonOf(error)}; the disk keeps its size`);
  });
  const disk = `${readOnly ? "a read-only disk" : "a disk"} of ${formatBytes(storage.capacity)}`;
  narrate(`serving ${disk} at vhost-user:${flags.socket}; stop it with Ctrl-C`);
  const signal = await stopped;
  const { connections, requests, errors } = backend.stats;
  narrate(`${signal}: flushed and stopped; ${connections} clients, ${requests} requests, ${errors} errors`);
}

function reasonOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** What an address says the disk is to be made of. */
function parseStorage(address: string, readOnly: boolean): StorageSpec {
  const [, scheme, rest] = /^(ram|file):(.+)$/s.exec(address) ?? [];
  if (scheme === "file") return { kind: "file", path: rest, readOnly };
  if (scheme === "ram") return { kind: "ram", size: parseSize(rest, "ram:SIZE") };
  throw new VirtioError("ERR_VIRTIO_ADDRESS", `"${address}" cannot be served, expected ram:SIZE or file:PATH`);
}
