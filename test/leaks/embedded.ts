/** The embedded back-end in this process, with one client at a time: what several leak tests go through. */

import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { openBlock } from "../../src/address.js";
import { type BlockStorage, FileStorage, RamStorage, VhostUserBackend } from "../../src/backend/index.js";
import type { BlockDevice, OpenBlockOptions } from "../../src/devices/blk/index.js";

const MIB = 1 << 20;
/** A wait for a peer that will not answer any more is over before the run is. */
export const TIMEOUT = 5000;

/** A folder with an image of 1 MiB in it, for a whole test file. */
export function workFolder(): { readonly path: string; readonly image: string; remove(): void } {
  const path = mkdtempSync(join(tmpdir(), "virtio-leaks-"));
  const image = join(path, "disk.img");
  writeFileSync(image, new Uint8Array(MIB));
  return { path, image, remove: () => rmSync(path, { recursive: true }) };
}

/** Disks of the back-end, by kind. */
export const DISKS = {
  memory: () => new RamStorage(MIB),
  file: (image: string) => FileStorage.open(image),
} as const;

/** A back-end for one run, and the errors that it has told of. */
export async function withBackend(
  path: string,
  storage: BlockStorage,
  errors: unknown[],
  work: (backend: VhostUserBackend) => Promise<void>,
): Promise<void> {
  let backend: VhostUserBackend;
  try {
    backend = VhostUserBackend.listen({
      ...{ path, storage, queues: 3, inflight: true },
      onError: (error) => errors.push(error),
    });
  } catch (error) {
    await storage.close?.();
    throw error;
  }
  try {
    await work(backend);
  } finally {
    await backend.close();
  }
}

/** A disk on a back-end for one run. */
export async function withDisk(
  backend: VhostUserBackend,
  options: OpenBlockOptions,
  work: (disk: BlockDevice) => Promise<void>,
): Promise<void> {
  const disk = await openBlock(`vhost-user:${backend.path}`, { timeout: TIMEOUT, ...options });
  try {
    await work(disk);
  } finally {
    await disk.close();
  }
}
