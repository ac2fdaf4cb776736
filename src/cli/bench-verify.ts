/** `virtio bench --verify`: every block written says what it is, and what is read back is compared. */

import { randomInt } from "node:crypto";
import { rangeError, VirtioError } from "../errors.js";
import { type DiskPart, type TargetOptions, Targets } from "./bench-targets.js";

/** Most blocks of which the generations are kept, 5 bytes each. */
const MAX_BLOCKS = 2 ** 30;
/** A block consists of stamps: its number, its generation, the number of the run, the stamp's place in the block. */
const STAMP_WORDS = 4;
const STAMP_BYTES = STAMP_WORDS * 4;

/** What a {@link VerifiedTargets} is made from. */
export interface VerifyOptions extends TargetOptions {
  /** Requests in flight. */
  readonly depth: number;
}

/**
 * Targets that keep account of what each block holds. No two requests in flight go to the same block, for then
 * nobody could say what it holds.
 */
export class VerifiedTargets extends Targets {
  private readonly memory: readonly Int32Array[];
  private readonly wordsPerBlock: number;
  private readonly blockSize: number;
  private readonly run = randomInt(1, 2 ** 31);
  /** By block of the part of the disk: how often this run has written it, and whether a request is under way there. */
  private readonly generations: Uint32Array;
  private readonly busy: Uint8Array;
  /** By part of the memory: the block of the request, counted in the part of the disk, and whether it is a read. */
  private readonly blockOf: Uint32Array;
  private readonly isRead: Uint8Array;
  private checkedBlocks = 0;
  private mismatch: VirtioError | undefined;
  /** In the pass that reads back: the block to go on with. */
  private readBackAt = -1;

  /**
   * @throws RangeError when the disk has fewer blocks than requests are in flight, or too many to keep account of.
   */
  constructor(options: VerifyOptions, part: DiskPart, memory: readonly Uint8Array[]) {
    super(options, part);
    const { blockSize, depth } = options;
    if (this.blocks > MAX_BLOCKS) {
      throw rangeError(
        "--bs",
        `at least ${Math.ceil((this.blocks * blockSize) / MAX_BLOCKS)} on so large a disk with --verify`,
        blockSize,
      );
    }
    if (depth > this.blocks) {
      throw rangeError(
        "--iodepth",
        `at most ${this.blocks} with --verify, one request for each block of the disk`,
        depth,
      );
    }
    this.blockSize = blockSize;
    this.memory = memory.map(({ buffer, byteOffset, length }) => new Int32Array(buffer, byteOffset, length / 4));
    this.wordsPerBlock = blockSize / 4;
    this.generations = new Uint32Array(this.blocks);
    this.busy = new Uint8Array(this.blocks);
    this.blockOf = new Uint32Array(depth);
    this.isRead = new Uint8Array(depth);
  }

  override take(part: number): number {
    const block = this.readBackAt < 0 ? this.takeIdle() : this.takeWritten();
    if (block < 0) return -1;
    this.busy[block] = 1;
    this.blockOf[part] = block;
    this.isRead[part] = this.isWrite ? 0 : 1;
    if (this.isWrite) this.stamp(part, this.firstBlock + block, ++this.generations[block]);
    return this.firstBlock + block;
  }

  override completed(part: number): boolean {
    const block = this.blockOf[part];
    this.busy[block] = 0;
    const generation = this.generations[block];
    if (this.isRead[part] === 0 || generation === 0) return true;
    return this.check(part, this.firstBlock + block, generation);
  }

  override readBack(): boolean {
    this.isWrite = false;
    this.readBackAt = 0;
    return this.generations.some((generation) => generation > 0);
  }

  override get checked(): number {
    return this.checkedBlocks;
  }

  override get failure(): VirtioError | undefined {
    return this.mismatch;
  }

  /** A block, counted in the part of the disk, that no request is under way to. */
  private takeIdle(): number {
    let block = super.take(0) - this.firstBlock;
    while (this.busy[block] !== 0) block = block + 1 === this.blocks ? 0 : block + 1;
    return block;
  }

  /** The next block, counted in the part of the disk, that was written; -1 behind the last. */
  private takeWritten(): number {
    let block = this.readBackAt;
    while (block < this.blocks && this.generations[block] === 0) block++;
    this.readBackAt = block + 1;
    return block < this.blocks ? block : -1;
  }

  private stamp(part: number, block: number, generation: number): void {
    const { run, wordsPerBlock } = this;
    const memory = this.memory[part];
    for (let word = 0; word < wordsPerBlock; word += STAMP_WORDS) {
      memory[word] = block;
      memory[word + 1] = generation;
      memory[word + 2] = run;
      memory[word + 3] = word;
    }
  }

  private check(part: number, block: number, generation: number): boolean {
    const { run, wordsPerBlock } = this;
    const memory = this.memory[part];
    for (let word = 0; word < wordsPerBlock; word += STAMP_WORDS) {
      const isRight =
        memory[word] === block &&
        memory[word + 1] === (generation | 0) &&
        memory[word + 2] === run &&
        memory[word + 3] === word;
      if (isRight) continue;
      this.mismatch ??= this.describe(memory, block, generation, word);
      return false;
    }
    this.checkedBlocks++;
    return true;
  }

  private describe(memory: Int32Array, block: number, generation: number, word: number): VirtioError {
    const [foundBlock, foundGeneration, foundRun, foundWord] = memory.subarray(word, word + STAMP_WORDS);
    const isOurs =
      foundRun === this.run &&
      foundWord === word &&
      foundGeneration >>> 0 <= this.generations[foundBlock - this.firstBlock];
    const found = isOurs
      ? `block ${foundBlock}, generation ${foundGeneration >>> 0}, which this run wrote too`
      : "something that this run never wrote";
    const offset = block * this.blockSize + (word / STAMP_WORDS) * STAMP_BYTES;
    return new VirtioError(
      "ERR_VIRTIO_IO",
      `verification failed at offset ${offset}: expected block ${block}, generation ${generation}, found ${found}`,
    );
  }
}
