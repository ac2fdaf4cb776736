/** A disk with a cache: what is written is in the memory of the process, and in its file when a flush has finished. */

import { openSync, readFileSync, writeSync } from "node:fs";
import { setImmediate } from "node:timers/promises";
import type { BlockStorage } from "../../src/backend/index.js";
import { SECTOR_SIZE } from "./pattern.js";

/** Stretches that a flush writes before others have their turn. */
const STRETCHES_AT_ONCE = 8;

/** All that no flush has covered dies with the process, as with a disk whose power fails. */
export class CachedStorage implements BlockStorage {
  readonly capacity: number;
  readonly id = "a disk with a cache";
  private readonly bytes: Uint8Array;
  private readonly fd: number;
  private dirty = new Set<number>();
  private flushing: Promise<void> = Promise.resolve();

  /** @param image - path of a raw image. */
  constructor(image: string) {
    this.bytes = readFileSync(image);
    this.capacity = this.bytes.length;
    this.fd = openSync(image, "r+");
  }

  read(offset: number, into: Uint8Array): void {
    into.set(this.bytes.subarray(offset, offset + into.length));
  }

  write(offset: number, from: Uint8Array): void {
    this.bytes.set(from, offset);
    this.changed(offset, from.length);
  }

  discard(offset: number, length: number): void {
    this.bytes.fill(0x77, offset, offset + length);
    this.changed(offset, length);
  }

  writeZeroes(offset: number, length: number): void {
    this.bytes.fill(0, offset, offset + length);
    this.changed(offset, length);
  }

  /** One after the other: the second must not overtake what the first has begun to write. */
  flush(): Promise<void> {
    this.flushing = this.flushing.then(() => this.writeBack());
    return this.flushing;
  }

  private changed(offset: number, length: number): void {
    for (let at = offset; at < offset + length; at += SECTOR_SIZE) this.dirty.add(at / SECTOR_SIZE);
  }

  private async writeBack(): Promise<void> {
    const sectors = [...this.dirty].sort((a, b) => a - b);
    this.dirty = new Set();
    for (let from = 0, stretches = 0; from < sectors.length; ) {
      let to = from + 1;
      while (sectors[to] === sectors[to - 1] + 1) to++;
      const position = sectors[from] * SECTOR_SIZE;
      writeSync(this.fd, this.bytes, position, (to - from) * SECTOR_SIZE, position);
      from = to;
      if (++stretches % STRETCHES_AT_ONCE === 0) await setImmediate();
    }
  }
}
