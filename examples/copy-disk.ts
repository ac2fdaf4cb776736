/** Copies one disk to another, four requests of a megabyte in flight, and compares checksums. */

import { createHash } from "node:crypto";
import { type BlockDevice, openBlock } from "virtio-driver";

const CHUNK = 1 << 20;
const DEPTH = 4;

await using source = await openBlock(process.argv[2] ?? "file:disk.img", { readOnly: true });
await using target = await openBlock(process.argv[3] ?? "ram:64M");

let next = 0;
const copyChunks = async (): Promise<void> => {
  const buffer = await source.allocate(CHUNK);
  const copy = await target.allocate(CHUNK);
  while (next < source.capacity) {
    const position = next;
    next += CHUNK;
    const length = Math.min(CHUNK, source.capacity - position);
    await source.read(buffer, { position, length });
    copy.bytes.set(buffer.bytes);
    await target.write(copy, { position, length });
  }
  buffer.release();
  copy.release();
};
await Promise.all(Array.from({ length: DEPTH }, copyChunks));
await target.flush();

if ((await sha256(source)) !== (await sha256(target))) throw new Error("the copy differs");
console.log(`copied ${source.capacity} bytes`);

async function sha256(disk: BlockDevice): Promise<string> {
  const hash = createHash("sha256");
  const buffer = await disk.allocate(CHUNK);
  for (let position = 0; position < source.capacity; position += CHUNK) {
    const { bytesRead } = await disk.read(buffer, { position, length: Math.min(CHUNK, source.capacity - position) });
    hash.update(buffer.bytes.subarray(0, bytesRead));
  }
  buffer.release();
  return hash.digest("hex");
}
