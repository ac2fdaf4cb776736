/** `virtio read`: bytes of a device to stdout. */

import { Command } from "commander";
import { rangeError, VirtioError } from "../errors.js";
import type { BlockDevice, DeviceBuffer } from "../index.js";
import { addressArgument, type DeviceFlags, usageError, withDevice, withDeviceOptions } from "./device.js";
import { size } from "./options.js";

/** Bytes of a request, and requests in flight. */
const CHUNK = 1 << 20;
const DEPTH = 4;

interface ReadFlags extends DeviceFlags {
  readonly offset: number;
  readonly length?: number;
}

/** The subcommand. */
export const command = withDeviceOptions(
  new Command("read")
    .description("Copy bytes of a block device to stdout.")
    .addArgument(addressArgument())
    .option("--offset <size>", "first byte", size, 0)
    .option("--length <size>", "bytes; without it to the end of the disk", size),
)
  .addHelpText(
    "after",
    `
Offset and length may be any number of bytes: whole blocks are read, and what was asked for is printed.

Examples:
  virtio read file:disk.img > copy.img
  virtio read vhost-user:/run/disk.sock --length 512 | hexdump -C
  virtio read vhost-user:/run/disk.sock --offset 1M --length 64K > part.bin`,
  )
  .action(run);

async function run(address: string, flags: ReadFlags): Promise<void> {
  if (process.stdout.isTTY) throw usageError("the bytes of a disk would upset a terminal; add > FILE or | PROGRAM");
  await withDevice(address, flags, { readOnly: true }, async (disk) => {
    const { offset } = flags;
    if (offset > disk.capacity) throw rangeError("--offset", `at most the ${disk.capacity} bytes of the disk`, offset);
    const length = flags.length ?? disk.capacity - offset;
    if (length > disk.capacity - offset) {
      throw rangeError("--length", `at most ${disk.capacity - offset}, the disk ends there`, length);
    }
    await copyOut(disk, offset, offset + length);
  });
}

/** Print the bytes from `start` to `end`, reading ahead in whole blocks. */
async function copyOut(disk: BlockDevice, start: number, end: number): Promise<void> {
  const { blockSize } = disk;
  const first = start - (start % blockSize);
  const last = Math.ceil(end / blockSize) * blockSize;
  const chunks = Math.ceil((last - first) / CHUNK);
  const buffers = await Promise.all(Array.from({ length: Math.min(DEPTH, chunks) }, () => disk.allocate(CHUNK)));
  const read = (chunk: number): Promise<DeviceBuffer> => {
    const position = first + chunk * CHUNK;
    const reading = readFully(disk, buffers[chunk % DEPTH], position, Math.min(CHUNK, last - position));
    reading.catch(() => undefined); // thrown where it is awaited, which may be later
    return reading;
  };
  const reading = buffers.map((_, chunk) => read(chunk));
  for (let chunk = 0; chunk < chunks; chunk++) {
    const { bytes } = await reading[chunk % DEPTH];
    const position = first + chunk * CHUNK;
    await print(bytes.subarray(Math.max(0, start - position), Math.min(CHUNK, end - position)));
    if (chunk + DEPTH < chunks) reading[chunk % DEPTH] = read(chunk + DEPTH);
  }
}

async function readFully(
  disk: BlockDevice,
  buffer: DeviceBuffer,
  position: number,
  length: number,
): Promise<DeviceBuffer> {
  const { bytesRead } = await disk.read(buffer, { position, length });
  if (bytesRead < length) {
    const message = `the device delivered ${bytesRead} of ${length} bytes at ${position}; look at its log`;
    throw new VirtioError("ERR_VIRTIO_IO", message);
  }
  return buffer;
}

/** Write to stdout; resolves when the bytes may change again. */
function print(bytes: Uint8Array): Promise<void> {
  return new Promise((resolve, reject) => {
    process.stdout.write(bytes, (error) => (error === null || error === undefined ? resolve() : reject(error)));
  });
}
