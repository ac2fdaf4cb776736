/** The block driver against qemu-storage-daemon, and the images it leaves against independent readers. */

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { after, test } from "node:test";
import { type OpenBlockOptions, openBlock } from "../../src/index.js";
import { settle, writeAndVerify, zeroAndVerify } from "../support/block-suite.js";
import { requirePeer, startStorageDaemon, TemporaryFolder } from "../support/peers.js";

const MIB = 1024 * 1024;
const DISK_BYTES = 24 * MIB;
const skip = requirePeer("qemu-storage-daemon", "qemu-img", "qemu-io");

const folder = new TemporaryFolder();
after(() => folder.close());

/** Make an empty image. */
function createImage(name: string, format: "raw" | "qcow2"): string {
  const path = folder.file(name);
  execFileSync("qemu-img", ["create", "-q", "-f", format, path, String(DISK_BYTES)]);
  return path;
}

/** The `--blockdev` of an image. */
function blockdev(path: string, format: "raw" | "qcow2"): string {
  const file = `driver=file,filename=${path},discard=unmap`;
  return format === "raw" ? file : `driver=qcow2,file.driver=file,file.filename=${path},discard=unmap`;
}

/** The bytes of an image as qemu-img reads them. */
function independentRead(path: string, format: "raw" | "qcow2"): Buffer {
  const copy = folder.file("converted.raw");
  execFileSync("qemu-img", ["convert", "-f", format, "-O", "raw", path, copy]);
  return readFileSync(copy);
}

/** Whether qemu-img's map of the image says that the whole stretch reads as zeroes without data. */
function isHole(path: string, format: "raw" | "qcow2", position: number, length: number): boolean {
  const json = execFileSync("qemu-img", ["map", "--output=json", "-f", format, path], { encoding: "utf8" });
  const map = JSON.parse(json) as { start: number; length: number; data: boolean; zero: boolean }[];
  return map
    .filter((entry) => entry.start < position + length && entry.start + entry.length > position)
    .every((entry) => entry.zero && !entry.data);
}

const VARIANTS: readonly { name: string; format: "raw" | "qcow2"; depth: number; options: OpenBlockOptions }[] = [
  { name: "raw, one at a time, event", format: "raw", depth: 1, options: { mode: "event" } },
  { name: "raw, depth 8, poll", format: "raw", depth: 8, options: { mode: "poll" } },
  { name: "raw, depth 32, no indirect descriptors", format: "raw", depth: 32, options: { indirect: false } },
  { name: "raw, depth 128, event", format: "raw", depth: 128, options: { mode: "event" } },
  { name: "raw, depth 128, a ring of 16 that is always full", format: "raw", depth: 128, options: { queueSize: 16 } },
  { name: "raw, depth 64, no EVENT_IDX, poll", format: "raw", depth: 64, options: { eventIdx: false, mode: "poll" } },
  { name: "raw, depth 64, no EVENT_IDX, event", format: "raw", depth: 64, options: { eventIdx: false } },
  { name: "raw, depth 32, 4 queues", format: "raw", depth: 32, options: { queues: 4 } },
  { name: "raw, depth 32, 4 queues, poll", format: "raw", depth: 32, options: { queues: 4, mode: "poll" } },
  { name: "qcow2, depth 16, event", format: "qcow2", depth: 16, options: {} },
];

for (const [index, { name, format, depth, options }] of VARIANTS.entries()) {
  test(`qemu-storage-daemon: ${name}: the image holds what was written`, { skip }, async () => {
    const image = createImage(`disk-${index}.${format}`, format);
    const daemon = await startStorageDaemon(folder, { blockdev: blockdev(image, format), queues: options.queues ?? 1 });
    try {
      const disk = await openBlock(`vhost-user:${daemon.path}`, options);
      let model: Uint8Array;
      try {
        assert.equal(disk.capacity, DISK_BYTES);
        assert.equal(disk.info.format, "split");
        model = await writeAndVerify(disk, depth, 1000 + index);
        await zeroAndVerify(disk, model);
      } finally {
        await disk.close();
      }
      await daemon.stop();
      assert.ok(Buffer.compare(independentRead(image, format), model) === 0, "qemu-img reads other bytes");
    } finally {
      await daemon.stop();
    }
  });
}

test("qemu-storage-daemon: DISCARD and WRITE_ZEROES with unmap leave holes in the image", { skip }, async () => {
  const image = createImage("holes.raw", "raw");
  const daemon = await startStorageDaemon(folder, { blockdev: blockdev(image, "raw") });
  try {
    const disk = await openBlock(`vhost-user:${daemon.path}`);
    try {
      await disk.write(new Uint8Array(8 * MIB).fill(0xaa));
      await disk.flush();
      assert.ok(!isHole(image, "raw", 0, 8 * MIB));
      await disk.discard({ position: MIB, length: 2 * MIB });
      await disk.writeZeroes({ position: 5 * MIB, length: MIB }, { unmap: true });
      await disk.flush();
    } finally {
      await disk.close();
    }
    await daemon.stop();
    assert.ok(isHole(image, "raw", MIB, 2 * MIB), "the discarded stretch still holds data");
    assert.ok(isHole(image, "raw", 5 * MIB, MIB), "the zeroed stretch still holds data");
    assert.ok(!isHole(image, "raw", 0, MIB) && !isHole(image, "raw", 3 * MIB, 2 * MIB));
    const check = ["-f", "raw", "-c", `read -P 0xaa 0 ${MIB}`, "-c", `read -P 0 ${5 * MIB} ${MIB}`, image];
    assert.ok(!execFileSync("qemu-io", check, { encoding: "utf8" }).includes("Pattern verification failed"));
  } finally {
    await daemon.stop();
  }
});

test("qemu-storage-daemon: what qemu-io wrote is what the driver reads", { skip }, async () => {
  const image = createImage("foreign.qcow2", "qcow2");
  execFileSync("qemu-io", ["-f", "qcow2", "-c", "write -P 0x5c 1M 1M", image]);
  const daemon = await startStorageDaemon(folder, { blockdev: blockdev(image, "qcow2"), writable: false });
  try {
    await using disk = await openBlock(`vhost-user:${daemon.path}`, { mode: "poll" });
    assert.equal(disk.readOnly, true);
    const { buffer } = await settle(disk, disk.read(new Uint8Array(3 * MIB)));
    assert.ok(buffer.subarray(0, MIB).every((byte) => byte === 0));
    assert.ok(buffer.subarray(MIB, 2 * MIB).every((byte) => byte === 0x5c));
    assert.ok(buffer.subarray(2 * MIB).every((byte) => byte === 0));
    await assert.rejects(disk.write(new Uint8Array(512)), { code: "ERR_VIRTIO_READ_ONLY" });
  } finally {
    await daemon.stop();
  }
});
