/** The block driver against the embedded back-end in its own process, split and packed, RAM and file. */

import assert from "node:assert/strict";
import { readdirSync, readFileSync, truncateSync, writeFileSync } from "node:fs";
import { after, test } from "node:test";
import { spawnBackend } from "../../src/backend/index.js";
import { type OpenBlockOptions, openBlock } from "../../src/index.js";
import { writeAndVerify, zeroAndVerify } from "../support/block-suite.js";
import { TemporaryFolder } from "../support/peers.js";

const MIB = 1024 * 1024;
const DISK_BYTES = 24 * MIB;

const folder = new TemporaryFolder();
after(() => folder.close());

const VARIANTS: readonly { name: string; depth: number; options: OpenBlockOptions }[] = [
  { name: "one at a time, event", depth: 1, options: {} },
  { name: "depth 8, poll", depth: 8, options: { mode: "poll" } },
  { name: "depth 32, no indirect descriptors", depth: 32, options: { indirect: false } },
  { name: "depth 128, a ring of 16 that is always full", depth: 128, options: { queueSize: 16 } },
  { name: "depth 64, no EVENT_IDX", depth: 64, options: { eventIdx: false } },
  { name: "depth 64, no EVENT_IDX, poll", depth: 64, options: { eventIdx: false, mode: "poll" } },
  { name: "depth 32, 4 queues", depth: 32, options: { queues: 4 } },
];

for (const packed of [false, true]) {
  for (const kind of ["ram", "file"]) {
    for (const [index, { name, depth, options }] of VARIANTS.entries()) {
      test(`embedded back-end, ${kind}, ${packed ? "packed" : "split"}: ${name}`, async () => {
        const image = folder.file(`${kind}-${packed}-${index}.img`);
        if (kind === "file") {
          writeFileSync(image, "");
          truncateSync(image, DISK_BYTES);
        }
        const disk = await openBlock(kind === "ram" ? `ram:${DISK_BYTES}` : `file:${image}`, { ...options, packed });
        let model: Uint8Array;
        try {
          assert.equal(disk.capacity, DISK_BYTES);
          assert.equal(disk.info.format, packed ? "packed" : "split");
          model = await writeAndVerify(disk, depth, 2000 + index);
          await zeroAndVerify(disk, model);
        } finally {
          await disk.close();
        }
        if (kind === "file") assert.ok(Buffer.compare(readFileSync(image), model) === 0, "the file holds other bytes");
      });
    }
  }
}

test("packed rings of a size that is no power of two", async () => {
  const disk = await openBlock(`ram:${DISK_BYTES}`, { queueSize: 100, indirect: false });
  try {
    assert.equal(disk.info.queueSize, 100);
    await writeAndVerify(disk, 64, 3000);
  } finally {
    await disk.close();
  }
});

test("devices opened and closed 200 times leave no descriptor and no mapping behind", async () => {
  const backend = await spawnBackend({ kind: "ram", size: MIB });
  const count = (): { fds: number; maps: number } => ({
    fds: readdirSync("/proc/self/fd").length,
    maps: readFileSync("/proc/self/maps", "utf8")
      .split("\n")
      .filter((line) => line.includes("memfd:")).length,
  });
  const cycle = async (i: number, address: string): Promise<void> => {
    const disk = await openBlock(address, { packed: i % 2 === 0, mode: i % 3 === 0 ? "poll" : "event" });
    if (i % 3 !== 0) await disk.write(new Uint8Array(4096).fill(i));
    await disk.close();
  };
  try {
    for (let i = 0; i < 5; i++) await cycle(i, "ram:1M"); // whatever Node.js opens once is open now
    const before = count();
    for (let i = 0; i < 200; i++) await cycle(i, i % 20 === 0 ? "ram:1M" : `vhost-user:${backend.path}`);
    assert.deepEqual(count(), before);
  } finally {
    await backend.close();
  }
});
