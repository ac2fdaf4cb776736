/** What the torture writes into a sector: who wrote it, where it belongs, and a filling that shows every other byte. */

import { SECTOR_SIZE } from "../../src/protocol/blk.js";

export { SECTOR_SIZE };

/** Generation of a sector that reads as zeroes; writes count from 1. */
export const ZEROES = 0;
/** In the place of a generation: no sector as a write of this run leaves it. */
export const NOT_OURS = -1;

/** What a buffer holds before a read: it shows where nothing was delivered. */
export const UNDELIVERED = 0xee;

const MAGIC = 0x746f7274;
const WORDS = SECTOR_SIZE / 4;
/** Words before the filling: magic and seed, generation, sector, checksum of these. */
const HEAD = 4;

/** Fill whole sectors, the first of which is `sector`, for the write `generation`. */
export function fillSectors(bytes: Uint8Array, seed: number, generation: number, sector: number): void {
  const words = wordsOf(bytes);
  for (let at = 0, place = sector; at < words.length; at += WORDS, place++) {
    const check = checksum(seed, generation, place);
    words[at] = (MAGIC ^ seed) >>> 0;
    words[at + 1] = generation;
    words[at + 2] = place;
    words[at + 3] = check;
    for (let i = HEAD; i < WORDS; i++) words[at + i] = filling(check, i);
  }
}

/** Which write left sector `sector`, whose bytes begin at byte `at`: its generation, ZEROES or NOT_OURS. */
export function identify(words: Uint32Array, at: number, seed: number, sector: number): number {
  const first = at / 4;
  if (words[first] === 0) {
    for (let i = 1; i < WORDS; i++) if (words[first + i] !== 0) return NOT_OURS;
    return ZEROES;
  }
  const check = checksum(seed, words[first + 1], sector);
  if (words[first] !== (MAGIC ^ seed) >>> 0 || words[first + 2] !== sector || words[first + 3] !== check)
    return NOT_OURS;
  for (let i = HEAD; i < WORDS; i++) if (words[first + i] !== filling(check, i)) return NOT_OURS;
  return words[first + 1];
}

/** Whether each byte of a sector is that of one of these generations there. */
export function isMixOf(found: Uint8Array, seed: number, sector: number, generations: readonly number[]): boolean {
  const sources = generations.map((generation) => sectorOf(seed, generation, sector));
  return found.every((byte, i) => sources.some((source) => source[i] === byte));
}

/**
 * Say what is wrong with a sector that no write left like that.
 *
 * @param generations - what may stand there, or stood there before.
 */
export function describeStrange(
  found: Uint8Array,
  seed: number,
  sector: number,
  generations: readonly number[],
): string {
  if (found.every((byte) => byte === UNDELIVERED)) return "nothing was delivered: the buffer is as it was before";
  const words = wordsOf(found.slice());
  const [magic, generation, place, check] = words;
  if (magic === (MAGIC ^ seed) >>> 0 && check === checksum(seed, generation, place)) {
    if (place !== sector && identify(words, 0, seed, place) === generation) {
      return `misplaced: write ${generation} for sector ${place}`;
    }
    if (place === sector) return tornAfter(found, seed, sector, generation, generations);
  }
  const beginsLike = generations.find((each) =>
    sectorOf(seed, each, sector).every((byte, i) => i >= 16 || byte === found[i]),
  );
  if (beginsLike !== undefined) return tornAfter(found, seed, sector, beginsLike, generations);
  return `invented: no write has these bytes, ${Buffer.from(found.subarray(0, 16)).toString("hex")}…`;
}

function tornAfter(
  found: Uint8Array,
  seed: number,
  sector: number,
  generation: number,
  generations: readonly number[],
): string {
  const own = sectorOf(seed, generation, sector);
  const from = found.findIndex((byte, i) => byte !== own[i]);
  const rest = generations.find((each) =>
    sectorOf(seed, each, sector).every((byte, i) => i < from || byte === found[i]),
  );
  const what = rest === undefined ? "bytes of no write" : nameOf(rest);
  return `torn: ${nameOf(generation)} up to byte ${from}, then ${what}`;
}

function nameOf(generation: number): string {
  return generation === ZEROES ? "zeroes" : `write ${generation}`;
}

function sectorOf(seed: number, generation: number, sector: number): Uint8Array {
  const bytes = new Uint8Array(SECTOR_SIZE);
  if (generation > ZEROES) fillSectors(bytes, seed, generation, sector);
  return bytes;
}

/** The same memory in words; it must begin at a multiple of 4. */
export function wordsOf(bytes: Uint8Array): Uint32Array {
  return new Uint32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4);
}

function checksum(seed: number, generation: number, sector: number): number {
  let hash = Math.imul(seed ^ 0x9e3779b9, 0x85ebca6b) ^ generation;
  hash = Math.imul(hash ^ (hash >>> 15), 0xc2b2ae35) ^ sector;
  hash = Math.imul(hash ^ (hash >>> 13), 0x27d4eb2f);
  return (hash ^ (hash >>> 16)) >>> 0;
}

function filling(check: number, i: number): number {
  return Math.imul(check + i, 0x9e3779b1) >>> 0;
}
