/** `virtio demo`: a disk is found, written, read back and compared, told in plain words. */

import { createHash, randomFillSync } from "node:crypto";
import { Argument, Command } from "commander";
import { VirtioError } from "../errors.js";
import type { BlockDevice, BlockInfo } from "../index.js";
import { VirtioFeature } from "../virtqueue/features.js";
import { VirtqueueLayout } from "../virtqueue/layout.js";
import { checkConsent, type DeviceFlags, withConsentOption, withDevice, withDeviceOptions } from "./device.js";
import { formatBytes, formatCount, formatNs } from "./format.js";
import { layoutBand } from "./layout-band.js";
import { styled } from "./terminal.js";

const DEFAULT_ADDRESS = "ram:64M";
/** Bytes written and read back, unless the disk is smaller; bytes of a request; requests in flight. */
const PATTERN_BYTES = 16 << 20;
const REQUEST_BYTES = 256 << 10;
const DEPTH = 8;
const SPEED_BYTES = 4096;
const SPEED_DEPTH = 32;
const SPEED_MS = 500;

interface DemoFlags extends DeviceFlags {
  readonly yesOverwrite?: true;
}

/** The subcommand. */
export const command = withConsentOption(
  withDeviceOptions(
    new Command("demo")
      .description("Write, read back and verify a virtio disk, and tell what happens on the way.")
      .addArgument(new Argument("[address]", "the device").default(DEFAULT_ADDRESS)),
  ),
)
  .addHelpText(
    "after",
    `
Without an address it starts a disk of its own in memory, in a child process, and needs no rights. On any other
device it writes over the first ${formatBytes(PATTERN_BYTES)}, for which it asks your consent.

Examples:
  virtio demo
  virtio demo vhost-user:/run/scratch.sock --yes-overwrite`,
  )
  .action(run);

async function run(address: string, flags: DemoFlags): Promise<void> {
  checkConsent(address, flags);
  const begin = performance.now();
  const isOwn = address.startsWith("ram:");
  if (isOwn) say("start", `the embedded back-end in a child process, a disk of ${address.slice(4)} in memory`);
  await withDevice(address, flags, {}, async (disk) => {
    const { info } = disk;
    await tellDevice(disk, info);
    tellQueue(info);
    await writeAndVerify(disk);
    await tellSpeed(disk, isOwn);
  });
  const seconds = ((performance.now() - begin) / 1000).toFixed(1);
  say(
    "done",
    `in ${seconds} s; the device is closed${isOwn ? ", the back-end has ended, nothing is left behind" : ""}`,
  );
}

async function tellDevice(disk: BlockDevice, info: BlockInfo): Promise<void> {
  say("found", `a virtio-blk disk of ${formatBytes(info.capacity)} at ${info.address}`);
  say(
    "",
    `blocks of ${info.blockSize} bytes, ${info.maxQueues === 1 ? "1 queue" : `${info.maxQueues} queues`}${await idOf(disk)}`,
  );
  say("features", `${info.offered.length} offered, ${info.features.length} agreed:`);
  for (const line of wrapped(info.features, 86)) say("", line);
}

async function idOf(disk: BlockDevice): Promise<string> {
  try {
    return `, id "${await disk.getId()}"`;
  } catch (error) {
    if (error instanceof VirtioError && error.code === "ERR_VIRTIO_UNSUPPORTED") return "";
    throw error;
  }
}

function tellQueue({ format, queueSize }: BlockInfo): void {
  const features = format === "packed" ? VirtioFeature.RING_PACKED : 0n;
  say("virtqueue", `${format}, ${queueSize} descriptors, in memory that both processes share:`);
  for (const line of layoutBand(new VirtqueueLayout({ queueSize, features }))) say("", line);
}

/** Write a random pattern, flush, read it back into other memory, and compare checksums. */
async function writeAndVerify(disk: BlockDevice): Promise<void> {
  const length = Math.min(PATTERN_BYTES, disk.capacity - (disk.capacity % disk.blockSize));
  const pattern = randomFillSync(new Uint8Array(length));
  const written = await inPieces(length, (position, size) =>
    disk.write(pattern, { position, offset: position, length: size }),
  );
  const requests = `${written.requests} requests of up to ${formatBytes(REQUEST_BYTES)}, ${DEPTH} in flight`;
  say("write", `${formatBytes(length)} of random bytes in ${requests}: ${formatNs(written.ns)}`);
  const flushBegin = performance.now();
  await disk.flush();
  say("flush", formatNs((performance.now() - flushBegin) * 1e6));
  const copy = new Uint8Array(length);
  const read = await inPieces(length, (position, size) =>
    disk.read(copy, { position, offset: position, length: size }),
  );
  say("read back", `${formatBytes(length)}: ${formatNs(read.ns)}`);
  const [wanted, got] = [sha256(pattern), sha256(copy)];
  say("sha-256", `written ${wanted.slice(0, 32)}…`);
  say("", `read    ${got.slice(0, 32)}…`);
  if (wanted !== got) {
    const at = pattern.findIndex((byte, i) => byte !== copy[i]);
    throw new VirtioError("ERR_VIRTIO_IO", `what was read back differs from what was written, first at byte ${at}`);
  }
  say("verified", styled(process.stdout, "green", "they are the same"));
}

/** A short run of small reads. */
async function tellSpeed(disk: BlockDevice, isOwn: boolean): Promise<void> {
  const { runBench } = await import("./bench-run.js");
  const { latency, ms } = await runBench(disk, {
    ...{ writes: "none", isRandom: true, blockSize: SPEED_BYTES, depth: SPEED_DEPTH, mode: "poll", api: "callback" },
    ...{ jobs: 1, verify: false, rampMs: 200, runMs: SPEED_MS },
  });
  const iops = formatCount((latency.count / ms) * 1000);
  const request = `random reads of ${formatBytes(SPEED_BYTES)}, ${SPEED_DEPTH} in flight, polled`;
  say("speed", `${iops} a second, ${formatNs(latency.percentile(0.5))} each: ${request}`);
  const caveat = isOwn ? "both ends are JavaScript on this machine, " : "";
  say("", `${caveat}${SPEED_MS} ms long: a glimpse, no benchmark; try: virtio bench --help`);
}

/** Run `transfer` on all pieces of `length` bytes, several at a time. */
async function inPieces(
  length: number,
  transfer: (position: number, size: number) => Promise<unknown>,
): Promise<{ requests: number; ns: number }> {
  const begin = performance.now();
  let next = 0;
  const worker = async (): Promise<void> => {
    while (next < length) {
      const position = next;
      next += REQUEST_BYTES;
      await transfer(position, Math.min(REQUEST_BYTES, length - position));
    }
  };
  await Promise.all(Array.from({ length: DEPTH }, worker));
  return { requests: Math.ceil(length / REQUEST_BYTES), ns: (performance.now() - begin) * 1e6 };
}

function sha256(bytes: Uint8Array): string {
  return createHash("sha256").update(bytes).digest("hex");
}

/** Words in lines of at most `width` characters. */
function wrapped(words: readonly string[], width: number): string[] {
  const lines: string[] = [];
  for (const word of words) {
    const last = lines.at(-1);
    if (last === undefined || last.length + word.length >= width) lines.push(word);
    else lines[lines.length - 1] = `${last} ${word}`;
  }
  return lines;
}

/** A line of the story: what it is about, and what happened. */
function say(what: string, text: string): void {
  process.stdout.write(`${styled(process.stdout, "bold", what.padEnd(10))} ${text}\n`);
}
