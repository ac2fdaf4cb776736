/** Back-ends for tests: in folders of their own, closed and checked for errors after each test. */

import assert from "node:assert/strict";
import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { TestContext } from "node:test";
import {
  type BlockStorage,
  RamStorage,
  VhostUserBackend,
  type VhostUserBackendOptions,
} from "../../src/backend/index.js";
import { FrontEnd, turns } from "./front-end.js";

/** A folder that is gone after the test. */
export function folderFor(t: TestContext): string {
  const folder = mkdtempSync(join(tmpdir(), "virtio-test-"));
  t.after(() => rmSync(folder, { recursive: true, force: true }));
  return folder;
}

/** A back-end for one test, with what it complained about; it remembers requests in flight on memory, too. */
export function backendFor(
  t: TestContext,
  storage: BlockStorage = new RamStorage(1024 * 1024),
  options: Partial<VhostUserBackendOptions> = {},
): { backend: VhostUserBackend; errors: Error[] } {
  const errors: Error[] = [];
  const path = join(folderFor(t), "disk.sock");
  const backend = VhostUserBackend.listen({
    ...{ path, storage, inflight: true, onError: (error) => errors.push(error as Error) },
    ...options,
  });
  t.after(() => backend.close());
  return { backend, errors };
}

/** A front-end connected to `backend`, closed after the test. */
export function frontEndFor(t: TestContext, backend: VhostUserBackend): FrontEnd {
  const front = new FrontEnd(backend.path);
  t.after(() => front.close());
  return front;
}

/** Open descriptors of this process. */
export function openFds(): number {
  return readdirSync("/proc/self/fd").length;
}

/** Mappings of memory files in this process. */
export function mappings(): number {
  return readFileSync("/proc/self/maps", "utf8")
    .split("\n")
    .filter((line) => line.includes("memfd:")).length;
}

/** Bytes that differ from place to place. */
export function pattern(length: number, seed = 1): Uint8Array {
  return Uint8Array.from({ length }, (_, i) => (i * 31 + (i >> 8) * 7 + seed * 101) & 0xff);
}

/** Wait, turn by turn, until `condition` holds. */
export async function until(condition: () => boolean): Promise<void> {
  for (let i = 0; i < 10_000 && !condition(); i++) await turns(1);
  assert.ok(condition(), "it did not come to that");
}

/** A back-end and one front-end. */
export function pair(
  t: TestContext,
  options: Partial<VhostUserBackendOptions> = {},
): { backend: VhostUserBackend; errors: Error[]; front: FrontEnd } {
  const { backend, errors } = backendFor(t, options.storage, options);
  return { backend, errors, front: frontEndFor(t, backend) };
}
