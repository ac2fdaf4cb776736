/** What every block device must do, whatever is behind it: patterns, depths, sizes, zeroes, discards. */

import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import type { BlockDevice, Memory } from "../../src/index.js";

/** Sizes that extents are drawn from; the largest needs splitting on every device. */
const EXTENT_SIZES = [512, 1024, 4096, 12_288, 65_536, 100 * 512, 1024 * 1024, 4 * 1024 * 1024];

/** A small, seeded source of numbers (mulberry32): a failing run can be repeated. */
export class Random {
  private state: number;

  constructor(seed: number) {
    this.state = seed >>> 0;
  }

  /** A whole number from 0 to `below - 1`. */
  next(below: number): number {
    this.state = (this.state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(this.state ^ (this.state >>> 15), this.state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) % below;
  }

  /** The same elements in another order. */
  shuffle<T>(list: readonly T[]): T[] {
    const result = [...list];
    for (let i = result.length - 1; i > 0; i--) {
      const k = this.next(i + 1);
      [result[i], result[k]] = [result[k], result[i]];
    }
    return result;
  }
}

interface Extent {
  readonly position: number;
  readonly length: number;
}

/** Cut [0, size) into extents of mixed sizes, in random order. */
function extents(random: Random, size: number, blockSize: number): Extent[] {
  const list: Extent[] = [];
  for (let position = 0; position < size; ) {
    const wanted = EXTENT_SIZES[random.next(EXTENT_SIZES.length)];
    const length = Math.min(Math.ceil(wanted / blockSize) * blockSize, size - position);
    list.push({ position, length });
    position += length;
  }
  return random.shuffle(list);
}

/** Carry out `work` for every item, `depth` at a time; in mode `"poll"` reap meanwhile. */
export async function inParallel<T>(
  disk: BlockDevice,
  items: readonly T[],
  depth: number,
  work: (item: T) => Promise<void>,
): Promise<void> {
  const rest = [...items];
  let done = false;
  const worker = async (): Promise<void> => {
    for (let item = rest.pop(); item !== undefined; item = rest.pop()) await work(item);
  };
  const all = Promise.all(Array.from({ length: depth }, worker)).finally(() => {
    done = true;
  });
  if (disk.mode === "poll") await pollUntil(disk, () => done);
  await all;
}

/** Reap until `done`, giving the event loop its turns. */
export async function pollUntil(disk: BlockDevice, done: () => boolean): Promise<void> {
  while (!done()) {
    for (let i = 0; i < 100 && !done(); i++) {
      disk.poll();
      await Promise.resolve();
    }
    await new Promise(setImmediate);
  }
}

/** Await something in either mode. */
export async function settle<T>(disk: BlockDevice, promise: Promise<T>): Promise<T> {
  let done = false;
  const watched = promise.finally(() => {
    done = true;
  });
  watched.catch(() => undefined); // awaited below; until then nobody does
  if (disk.mode === "poll") await pollUntil(disk, () => done);
  return watched;
}

/** Write the extent from memory of a random kind: lent, plain, or several pieces. */
async function writeExtent(disk: BlockDevice, random: Random, model: Uint8Array, extent: Extent): Promise<void> {
  const { position, length } = extent;
  const bytes = model.subarray(position, position + length);
  switch (random.next(3)) {
    case 0: {
      const buffer = await disk.allocate(length);
      buffer.bytes.set(bytes);
      assert.equal((await disk.write(buffer, { position })).bytesWritten, length);
      buffer.release();
      break;
    }
    case 1:
      assert.equal((await disk.write(bytes, { position })).bytesWritten, length);
      break;
    default: {
      const cut = random.next(length);
      const pieces = [bytes.subarray(0, cut), bytes.subarray(cut)];
      assert.equal((await disk.writev(pieces, { position })).bytesWritten, length);
    }
  }
}

/** Read the extent into memory of a random kind and compare. */
async function checkExtent(disk: BlockDevice, random: Random, model: Uint8Array, extent: Extent): Promise<void> {
  const { position, length } = extent;
  const lent = random.next(2) === 0;
  const buffer: Memory = lent ? await disk.allocate(length) : new Uint8Array(length);
  const bytes = buffer instanceof Uint8Array ? buffer : buffer.bytes;
  bytes.fill(0xee);
  assert.equal((await disk.read(buffer, { position })).bytesRead, length);
  assertSame(bytes, model, position);
  if (!(buffer instanceof Uint8Array)) buffer.release();
}

/** Compare with the model, naming the first byte that differs instead of printing megabytes. */
export function assertSame(bytes: Uint8Array, model: Uint8Array, position: number): void {
  const expected = model.subarray(position, position + bytes.length);
  if (Buffer.compare(bytes, expected) === 0) return;
  const at = bytes.findIndex((byte, i) => byte !== expected[i]);
  assert.fail(
    `byte ${position + at} is ${bytes[at]}, expected ${expected[at]} (extent at ${position}, ${bytes.length} bytes)`,
  );
}

/** Write the whole disk with a fresh random pattern and read it back in other pieces. Returns the pattern. */
export async function writeAndVerify(disk: BlockDevice, depth: number, seed: number): Promise<Uint8Array> {
  const random = new Random(seed);
  const model = randomBytes(disk.capacity);
  await inParallel(disk, extents(random, disk.capacity, disk.blockSize), depth, (extent) =>
    writeExtent(disk, random, model, extent),
  );
  await settle(disk, disk.flush());
  await verify(disk, model, depth, seed + 1);
  return model;
}

/** Read the whole disk in random pieces and compare. */
export async function verify(disk: BlockDevice, model: Uint8Array, depth: number, seed: number): Promise<void> {
  const random = new Random(seed);
  await inParallel(disk, extents(random, disk.capacity, disk.blockSize), depth, (extent) =>
    checkExtent(disk, random, model, extent),
  );
}

/** Zero two stretches, one of them with unmap, and see zeroes there and nothing else changed. */
export async function zeroAndVerify(disk: BlockDevice, model: Uint8Array): Promise<void> {
  const mib = 1024 * 1024;
  const kept = { position: 2 * mib, length: 3 * mib };
  const unmapped = { position: 8 * mib, length: mib + disk.blockSize };
  await settle(disk, disk.writeZeroes(kept));
  await settle(disk, disk.writeZeroes([unmapped, { position: 12 * mib, length: disk.blockSize }], { unmap: true }));
  model.fill(0, kept.position, kept.position + kept.length);
  model.fill(0, unmapped.position, unmapped.position + unmapped.length);
  model.fill(0, 12 * mib, 12 * mib + disk.blockSize);
  await settle(disk, disk.flush());
  await verify(disk, model, 8, 77);
}
