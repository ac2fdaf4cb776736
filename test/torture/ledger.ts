/**
 * What a disk may hold, sector by sector, while many requests are in flight: every value that the last acknowledged
 * write, or one in flight beside it, may have left. Whoever reads must find one of them.
 */

import {
  describeStrange,
  fillSectors,
  identify,
  isMixOf,
  NOT_OURS,
  SECTOR_SIZE,
  UNDELIVERED,
  wordsOf,
  ZEROES,
} from "./pattern.js";

/** What the disk did is not what a disk may do. */
export class TortureFailure extends Error {
  override readonly name = "TortureFailure";
}

/** Bytes of the disk. */
export interface Extent {
  readonly position: number;
  readonly length: number;
}

/** What is left behind: the data of a write, zeroes, or anything. */
type Kind = "write" | "zeroes" | "discard";

/** A request that changes the disk. */
export interface Change {
  readonly kind: Kind;
  /** Unique for each change of a run; what a write leaves in its sectors. */
  readonly generation: number;
  readonly extents: readonly Extent[];
  /** Whether its sectors come out of several pieces of memory, which a device may write one after the other. */
  readonly inPieces: boolean;
  /** When it was asked for, by the ledger's clock. */
  readonly begun: number;
  /** When the device was known to be done with it. */
  ended: number;
  /** Whether the caller gave up waiting for it: nobody will ever know whether it happened. */
  abandoned: boolean;
}

/** A read on its way. */
export interface Reading extends Extent {
  readonly begun: number;
}

/** A value that a sector may have had since its change began, until it was certainly overwritten. */
interface Candidate {
  readonly change: Change;
  until: number;
}

/** A longer list of candidates is worth looking through for those that nobody can see any more. */
const MANY_CANDIDATES = 4;
/** Differences that a failure describes. */
const MAX_DESCRIBED = 6;

/**
 * The rules. A read may find, in each of its sectors, a value that the sector may have had at some moment of the read.
 * An acknowledged change ends the values of all changes that ended before it began; those beside it stay possible,
 * until a later one, or until a read finds one of them while nothing is in flight there: then it is the only one. A
 * change whose caller gave up stays possible until the device is known to have returned it ({@link settle}), and may
 * have happened or not. Beside a change in flight a sector may be torn between possible values, and after two at the same
 * time one of which came in pieces; otherwise never. The crash of a disk with a cache brings back what was possible since
 * the last flush that was called before it, and has resolved.
 */
export class Ledger {
  /** Sectors that a read found torn where that is allowed. */
  torn = 0;
  /** Changes that were acknowledged, flushed or not. */
  acknowledged = 0;

  private readonly seed: number;
  private readonly cells: Candidate[][];
  private readonly inFlight = new Set<Change>();
  private readonly readings = new Set<Reading>();
  private readonly history: Change[] = [];
  private readonly fresh: Change;
  /** When the changes ended that no flush has covered yet. */
  private unflushedEnds: number[] = [];
  private clock = 0;
  /** What ended before this survives a crash. */
  private durable: number;
  private crashed = 0;

  /**
   * @param bytes - size of the disk, which reads as zeroes now.
   * @param seed - tells the data of this run from those of others.
   * @param isCached - whether a crash takes what no flush has covered; otherwise what is acknowledged survives it.
   */
  constructor(bytes: number, seed: number, isCached = false) {
    this.seed = seed;
    this.durable = isCached ? 0 : Infinity;
    const start = { begun: 0, ended: 0, abandoned: false };
    this.fresh = { kind: "zeroes", generation: ZEROES, extents: [], inPieces: false, ...start };
    this.history.push(this.fresh);
    this.cells = Array.from({ length: bytes / SECTOR_SIZE }, () => [{ change: this.fresh, until: Infinity }]);
  }

  /** Size of the disk in bytes. */
  get bytes(): number {
    return this.cells.length * SECTOR_SIZE;
  }

  /** Acknowledged changes that no flush called after them has covered. */
  get unflushed(): number {
    return this.unflushedEnds.length;
  }

  /** Changes that were asked for and have not ended, those whose caller gave up among them. */
  get open(): number {
    return this.inFlight.size;
  }

  /** A request that changes the disk is about to be made. */
  begin(kind: Kind, extents: readonly Extent[], inPieces = false): Change {
    const generation = this.history.length;
    const change = { kind, generation, extents, inPieces, begun: ++this.clock, ended: Infinity, abandoned: false };
    this.history.push(change);
    this.inFlight.add(change);
    this.eachCell(extents, (cell, sector) => {
      if (cell.length >= MANY_CANDIDATES) this.prune(sector);
      this.cells[sector].push({ change, until: Infinity });
    });
    return change;
  }

  /** Fill `bytes` with what a change of kind `write` shall leave at its place. */
  fill(change: Change, bytes: Uint8Array): void {
    const [{ position }] = change.extents;
    fillSectors(bytes, this.seed, change.generation, position / SECTOR_SIZE);
  }

  /** A change was acknowledged. */
  end(change: Change): void {
    this.close(change);
    this.acknowledged++;
    this.unflushedEnds.push(change.ended);
    this.eachCell(change.extents, (cell) => {
      for (const candidate of cell) {
        if (candidate.change.ended < change.begun && candidate.until === Infinity) candidate.until = this.clock;
      }
    });
  }

  /** The caller of a change gave up. */
  abandon(change: Change): void {
    change.abandoned = true;
  }

  /** The device has returned everything, also what was abandoned: from now on it has happened, or never will. */
  settle(): void {
    for (const change of this.inFlight) if (change.abandoned) this.close(change);
  }

  /** A flush is about to be called; give the result to {@link flushed}. */
  flushing(): number {
    return ++this.clock;
  }

  /** A flush has resolved. */
  flushed(begun: number): void {
    this.unflushedEnds = this.unflushedEnds.filter((ended) => ended > begun);
    // One that began before a crash was carried out by the next back-end, which never had what the dead one lost.
    if (begun > this.crashed) this.durable = Math.max(this.durable, begun);
  }

  /**
   * The back-end has died. Values that were there after the last flush, or just before, may be back. To be called again
   * when everything is known that the dead one has acknowledged.
   */
  crash(): void {
    this.crashed = ++this.clock;
    for (const cell of this.cells) {
      for (const candidate of cell) if (candidate.until > this.durable) candidate.until = Infinity;
    }
  }

  /** A read is about to be made into `bytes`, or into several buffers. */
  beginReading(position: number, length: number, ...buffers: readonly Uint8Array[]): Reading {
    for (const bytes of buffers) bytes.fill(UNDELIVERED);
    const reading = { position, length, begun: ++this.clock };
    this.readings.add(reading);
    return reading;
  }

  /** Nobody will look at what a read delivers. */
  forget(reading: Reading): void {
    this.readings.delete(reading);
  }

  /**
   * A read has delivered `bytes`.
   *
   * @param where - what was read, for the failure.
   * @throws TortureFailure when they could not be there.
   */
  endReading(reading: Reading, bytes: Uint8Array, where = "a read"): void {
    this.readings.delete(reading);
    this.clock++;
    // Whatever the caller's memory is aligned to.
    const aligned = bytes.byteOffset % 4 === 0 ? bytes : bytes.slice();
    const words = wordsOf(aligned);
    const first = reading.position / SECTOR_SIZE;
    const wrong: string[] = [];
    for (let at = 0; at < reading.length; at += SECTOR_SIZE) {
      const sector = first + at / SECTOR_SIZE;
      const found = identify(words, at, this.seed, sector);
      if (this.accept(reading, sector, found, aligned, at)) continue;
      wrong.push(this.explain(reading, sector, found, aligned.subarray(at, at + SECTOR_SIZE)));
    }
    if (wrong.length === 0) return;
    const more = wrong.length > MAX_DESCRIBED ? `\n  and ${wrong.length - MAX_DESCRIBED} sectors more` : "";
    throw new TortureFailure(
      `${where} of ${reading.length} bytes at ${reading.position}, begun at step ${reading.begun} of ${this.clock}, ` +
        `has wrong data in ${wrong.length} sectors:\n  ${wrong.slice(0, MAX_DESCRIBED).join("\n  ")}${more}`,
    );
  }

  /** Check the whole disk, as somebody else than the driver reads it at this moment. */
  checkImage(bytes: Uint8Array, where: string): void {
    if (bytes.length !== this.bytes) {
      throw new TortureFailure(`${where} has ${bytes.length} bytes, and the disk ${this.bytes}`);
    }
    this.endReading(this.beginReading(0, bytes.length), bytes, where);
  }

  /** Whether a change in flight touches these bytes. */
  collides({ position, length }: Extent): boolean {
    for (const { extents } of this.inFlight) {
      for (const each of extents) {
        if (each.position < position + length && position < each.position + each.length) return true;
      }
    }
    return false;
  }

  private accept(reading: Reading, sector: number, found: number, bytes: Uint8Array, at: number): boolean {
    const cell = this.cells[sector];
    let legal = false;
    let concurrent = false;
    let inPieces = false;
    let values = 0;
    let quietSince = 0;
    for (const { change, until } of cell) {
      if (until <= reading.begun) continue;
      legal ||= change.kind === "discard" || leaves(change) === found;
      concurrent ||= change.ended > reading.begun;
      inPieces ||= change.inPieces;
      values++;
      quietSince = Math.max(quietSince, change.ended);
    }
    if (legal && !concurrent && cell.length > 1) this.narrow(sector, found, quietSince);
    // Two changes at the same time, one of them in pieces, may have left a mixture.
    if (legal || found !== NOT_OURS || !(concurrent || (inPieces && values > 1))) return legal;
    const isMix = isMixOf(bytes.subarray(at, at + SECTOR_SIZE), this.seed, sector, this.possible(reading, sector));
    if (isMix) this.torn++;
    return isMix;
  }

  /** Nothing was in flight in this sector since `quietSince`, and somebody saw what it holds: that stays. */
  private narrow(sector: number, found: number, quietSince: number): void {
    const live = this.cells[sector].filter(({ until }) => until === Infinity);
    // What was discarded may read as anything, each time.
    if (live.some(({ change }) => change.kind === "discard")) return;
    for (const candidate of live) if (leaves(candidate.change) !== found) candidate.until = quietSince;
  }

  private possible(reading: Reading, sector: number): number[] {
    return this.cells[sector].filter(({ until }) => until > reading.begun).map(({ change }) => leaves(change));
  }

  private explain(reading: Reading, sector: number, found: number, bytes: Uint8Array): string {
    const cell = this.cells[sector];
    const legal = cell.filter(({ until }) => until > reading.begun).map(({ change }) => this.tell(change));
    const what =
      found === NOT_OURS
        ? describeStrange(
            bytes,
            this.seed,
            sector,
            cell.map(({ change }) => leaves(change)),
          )
        : `stale or never asked for: ${this.tellGeneration(found)}`;
    return `sector ${sector}: ${what}; it may hold ${legal.join(" or ")}`;
  }

  private tellGeneration(generation: number): string {
    if (generation === ZEROES) return "zeroes";
    const change = this.history[generation] as Change | undefined;
    return change === undefined ? `write ${generation}, which there was none` : this.tell(change);
  }

  private tell(change: Change): string {
    if (change === this.fresh) return "zeroes from the start";
    const { kind, generation, begun, ended, abandoned } = change;
    const places = change.extents.map(({ position, length }) => `${length} bytes at ${position}`).join(", ");
    const end = ended === Infinity ? "in flight" : `ended at ${ended}`;
    return `${kind} ${generation} (${places}; begun at ${begun}, ${end}${abandoned ? ", given up" : ""})`;
  }

  private close(change: Change): void {
    change.ended = ++this.clock;
    this.inFlight.delete(change);
  }

  /** Forget the values that no read on its way can have seen, and no crash can bring back. */
  private prune(sector: number): void {
    // A set keeps its order: the first is the oldest.
    const [oldest] = this.readings;
    const since = Math.min(oldest === undefined ? this.clock : oldest.begun, this.durable);
    this.cells[sector] = this.cells[sector].filter(({ until }) => until > since);
  }

  private eachCell(extents: readonly Extent[], visit: (cell: Candidate[], sector: number) => void): void {
    for (const { position, length } of extents) {
      const end = (position + length) / SECTOR_SIZE;
      for (let sector = position / SECTOR_SIZE; sector < end; sector++) visit(this.cells[sector], sector);
    }
  }
}

/** The generation that is found where a change has happened. */
function leaves(change: Change): number {
  return change.kind === "write" ? change.generation : ZEROES;
}
