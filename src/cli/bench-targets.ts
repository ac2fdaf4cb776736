/** Which block each request of `virtio bench` goes to, and whether it reads or writes. */

import type { VirtioError } from "../errors.js";

/** Which part of the requests writes: none of them, every second one on average, all of them. */
export type WriteShare = "none" | "half" | "all";

/** What a {@link Targets} is made from. */
export interface TargetOptions {
  readonly writes: WriteShare;
  readonly isRandom: boolean;
  /** Bytes of a request. */
  readonly blockSize: number;
}

/** A part of the disk, in blocks of the size of a request. */
export interface DiskPart {
  readonly firstBlock: number;
  readonly blocks: number;
}

/** The part of a disk of `capacity` bytes that job number `index` has to itself, all `jobs` having as much. */
export function partOfDisk(capacity: number, blockSize: number, index: number, jobs: number): DiskPart {
  const blocks = Math.floor(capacity / blockSize / jobs);
  return { firstBlock: index * blocks, blocks };
}

/** Where the next request goes: block after block, or anywhere. */
export class Targets {
  /** Whether the request of the last {@link take} writes. */
  isWrite: boolean;
  /** The part of the disk that they reach. */
  protected readonly firstBlock: number;
  protected readonly blocks: number;
  private readonly isMixed: boolean;
  private readonly isRandom: boolean;
  private state = 0x2545f491;
  private next = 0;

  constructor(options: TargetOptions, { firstBlock, blocks }: DiskPart) {
    this.firstBlock = firstBlock;
    this.blocks = blocks;
    this.isRandom = options.isRandom;
    this.isMixed = options.writes === "half";
    this.isWrite = options.writes === "all";
  }

  /**
   * Number of the block on the disk for the next request, which will use part `_part` of the memory; -1 when there
   * is nothing more to do.
   */
  take(_part: number): number {
    if (this.isRandom) {
      // xorshift32: cheap, and good enough to defeat caches.
      let x = this.state;
      x ^= x << 13;
      x ^= x >>> 17;
      x ^= x << 5;
      this.state = x;
      if (this.isMixed) this.isWrite = (x & 1) === 1; // the block comes from the upper bits
      return this.firstBlock + Math.floor(((x >>> 0) / 2 ** 32) * this.blocks);
    }
    const block = this.next;
    this.next = block + 1 === this.blocks ? 0 : block + 1;
    return this.firstBlock + block;
  }

  /** The request that used part `_part` of the memory has succeeded. False: what it read is wrong; see {@link failure}. */
  completed(_part: number): boolean {
    return true;
  }

  /** From now on read what was written. False: there is nothing to read. */
  readBack(): boolean {
    return false;
  }

  /** Reads that were compared with what had been written. */
  get checked(): number {
    return 0;
  }

  /** What was wrong with what was read, if anything was. */
  get failure(): VirtioError | undefined {
    return undefined;
  }
}
