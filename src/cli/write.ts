/** `virtio write`: stdin to a device. */

import { fstatSync, readFileSync } from "node:fs";
import { Command } from "commander";
import { rangeError } from "../errors.js";
import type { BlockDevice } from "../index.js";
import { addressArgument, type DeviceFlags, usageError, withDevice, withDeviceOptions } from "./device.js";
import { formatBytes } from "./format.js";
import { size } from "./options.js";
import { narrate } from "./terminal.js";

/** Bytes of a request, and requests in flight. */
const CHUNK = 1 << 20;
const DEPTH = 4;
const STDIN = 0;

interface WriteFlags extends DeviceFlags {
  readonly offset: number;
  readonly pad?: true;
}

/** The subcommand. */
export const command = withDeviceOptions(
  new Command("write")
    .description("Copy stdin to a block device, then flush it.")
    .addArgument(addressArgument())
    .option("--offset <size>", "first byte, a multiple of the block size", size, 0)
    .option("--pad", "fill the last block with zeroes when the input ends inside it"),
)
  .addHelpText(
    "after",
    `
A device writes whole blocks. Input that ends inside a block is refused, unless --pad says what the rest of the
block is to be; what is on the disk there is never read and written back.

Examples:
  virtio write file:disk.img < image.raw
  virtio write vhost-user:/run/disk.sock --offset 1M < part.bin
  printf hello | virtio write file:disk.img --pad`,
  )
  .action(run);

async function run(address: string, flags: WriteFlags): Promise<void> {
  if (process.stdin.isTTY) throw usageError("stdin is a terminal; add < FILE or put PROGRAM | before");
  await withDevice(address, flags, {}, async (disk) => {
    const { offset } = flags;
    const { blockSize, capacity } = disk;
    if (offset % blockSize !== 0) throw rangeError("--offset", `a multiple of the block size ${blockSize}`, offset);
    if (offset > capacity) throw rangeError("--offset", `at most the ${capacity} bytes of the disk`, offset);
    const length = fileLength();
    if (length !== undefined) checkLength(disk, flags, length, "nothing was written");
    try {
      const copied = await copyIn(disk, flags);
      checkLength(disk, flags, copied, "what fits in whole blocks is written");
      narrate(`wrote ${formatBytes(copied)} at ${offset} of ${address} and flushed`);
    } finally {
      await disk.flush();
    }
  });
}

/** Refuse input that goes beyond the disk or ends inside a block; `outcome` says what happened to it. */
function checkLength(disk: BlockDevice, { offset, pad }: WriteFlags, length: number, outcome: string): void {
  const room = disk.capacity - offset;
  if (length > room) throw rangeError("stdin", `at most ${room} bytes up to the end of the disk (${outcome})`, length);
  if (length % disk.blockSize === 0 || pad === true) return;
  throw rangeError("stdin", `whole blocks of ${disk.blockSize} bytes, or --pad (${outcome})`, length);
}

/** Write what comes from stdin in requests of a chunk, several in flight, and return how many bytes came. */
async function copyIn(disk: BlockDevice, { offset, pad }: WriteFlags): Promise<number> {
  const { blockSize, capacity } = disk;
  const buffers = await Promise.all(Array.from({ length: DEPTH }, () => disk.allocate(CHUNK)));
  const writing: Promise<unknown>[] = [];
  let length = 0;
  for await (const chunk of chunksOf(process.stdin)) {
    const turn = (length / CHUNK) % DEPTH;
    await writing[turn];
    const { bytes } = buffers[turn];
    bytes.set(chunk);
    bytes.fill(0, chunk.length);
    const position = offset + length;
    const blocks = chunk.length / blockSize;
    const fits = Math.min((pad === true ? Math.ceil(blocks) : Math.floor(blocks)) * blockSize, capacity - position);
    if (fits > 0) writing[turn] = disk.write(buffers[turn], { position, length: fits });
    writing[turn]?.catch(() => undefined); // thrown where it is awaited, which may be later
    length += chunk.length;
    if (offset + length > capacity) break;
  }
  await Promise.all(writing);
  return length;
}

/** The stream cut into pieces of exactly a chunk, the last of which may be shorter. */
async function* chunksOf(stream: AsyncIterable<Buffer>): AsyncGenerator<Uint8Array> {
  const chunk = new Uint8Array(CHUNK);
  let filled = 0;
  for await (const data of stream) {
    for (let taken = 0; taken < data.length; ) {
      const piece = data.subarray(taken, taken + CHUNK - filled);
      chunk.set(piece, filled);
      taken += piece.length;
      filled += piece.length;
      if (filled < CHUNK) continue;
      yield chunk;
      filled = 0;
    }
  }
  if (filled > 0) yield chunk.subarray(0, filled);
}

/** Bytes to come from stdin when it is a file. */
function fileLength(): number | undefined {
  const stat = fstatSync(STDIN);
  if (!stat.isFile()) return undefined;
  const position = /^pos:\s*(\d+)/m.exec(readFileSync(`/proc/self/fdinfo/${STDIN}`, "utf8"));
  return Math.max(0, stat.size - Number(position?.[1] ?? 0));
}
