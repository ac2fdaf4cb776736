/**
 * A disk that is computed on the fly: sector n tells its number. Serves it over vhost-user in this process, reads a
 * few sectors through a real virtqueue, and prints them.
 *
 *     node dist/examples/computed-disk.js
 */

import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { openBlock } from "virtio-driver";
import { type BlockStorage, VhostUserBackend } from "virtio-driver/backend";

const SECTOR = 512;
const text = new TextEncoder();

/** 8 PiB of disk that take no memory at all. */
const storage: BlockStorage = {
  capacity: 2 ** 53 - SECTOR,
  readOnly: true,
  id: "computed",
  read(offset, into) {
    into.fill(0);
    for (let at = 0; at < into.length; at += SECTOR) {
      text.encodeInto(`This is sector ${(offset + at) / SECTOR}.\n`, into.subarray(at));
    }
  },
  write() {
    throw new Error("a computed disk cannot be written"); // never called: the disk is read-only
  },
  flush() {
    // Nothing was written.
  },
};

const folder = mkdtempSync(join(tmpdir(), "computed-disk-"));
const backend = VhostUserBackend.listen({ path: join(folder, "disk.sock"), storage });
try {
  const disk = await openBlock(`vhost-user:${backend.path}`);
  for (const sector of [0, 1, 42, 2 ** 40]) {
    const { buffer } = await disk.read(new Uint8Array(SECTOR), { position: sector * SECTOR });
    process.stdout.write(new TextDecoder().decode(buffer.subarray(0, buffer.indexOf(0))));
  }
  await disk.close();
} finally {
  await backend.close();
  rmSync(folder, { recursive: true });
}
