/** The ledger of the torture: each thing that a disk must not do is told from what it may do. */

import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { type Change, Ledger, TortureFailure } from "./ledger.js";
import { fillSectors, SECTOR_SIZE } from "./pattern.js";

const SEED = 77;
const BYTES = 64 * SECTOR_SIZE;

/** A ledger, and a disk that does at once what it is told: as wrongly as a test likes. */
class Bench {
  readonly ledger: Ledger;
  readonly disk = new Uint8Array(BYTES);

  constructor(isCached = false) {
    this.ledger = new Ledger(BYTES, SEED, isCached);
  }

  begin(position: number, length = SECTOR_SIZE): Change {
    return this.ledger.begin("write", [{ position, length }]);
  }

  /** What a change leaves where it is applied. */
  apply(change: Change, into = this.disk): void {
    for (const { position, length } of change.extents) {
      if (change.kind === "write") this.ledger.fill(change, into.subarray(position, position + length));
      else into.fill(0, position, position + length);
    }
  }

  write(position: number, length = SECTOR_SIZE): Change {
    const change = this.begin(position, length);
    this.apply(change);
    this.ledger.end(change);
    return change;
  }

  read(position: number, length = SECTOR_SIZE): void {
    const reading = this.ledger.beginReading(position, length);
    this.ledger.endReading(reading, this.disk.subarray(position, position + length));
  }

  refuses(position: number, message: RegExp): void {
    assert.throws(
      () => this.read(position),
      (error) => error instanceof TortureFailure && message.test(error.message),
    );
  }
}

describe("the ledger of the torture", () => {
  it("a new disk reads as zeroes, a written one as the last write", () => {
    const bench = new Bench();
    bench.read(0, BYTES);
    bench.write(512, 4096);
    bench.write(1024, 512);
    bench.read(0, BYTES);
    bench.ledger.checkImage(bench.disk, "the image");
  });

  it("an acknowledged write that is lost: the one before it, or zeroes, are stale", () => {
    const bench = new Bench();
    bench.ledger.end(bench.begin(0));
    bench.refuses(0, /sector 0: stale or never asked for: zeroes; it may hold write 1 \(512 bytes at 0;/);
    bench.write(512);
    const lost = bench.begin(512);
    bench.ledger.end(lost);
    bench.refuses(512, /stale or never asked for: write 2 .*may hold write 3/);
    bench.apply(lost);
    bench.read(512);
  });

  it("a write in flight may have happened, in each sector by itself, or not", () => {
    const bench = new Bench();
    bench.write(0, 2048);
    const flying = bench.begin(512, 1024);
    bench.read(0, 2048);
    const half = bench.disk.slice();
    bench.apply(flying, half);
    bench.disk.set(half.subarray(512, 1024), 512);
    bench.read(0, 2048);
    bench.ledger.end(flying);
    bench.refuses(1024, /stale/);
    bench.apply(flying);
    bench.read(0, 2048);
  });

  it("of two writes at the same time either may have won, but what was seen afterwards stays", () => {
    for (const winner of [0, 1]) {
      const bench = new Bench();
      bench.write(0);
      const both = [bench.begin(0), bench.begin(0)];
      bench.ledger.end(both[1]);
      bench.ledger.end(both[0]);
      bench.apply(both[winner]);
      const before = bench.disk.slice();
      bench.read(0);
      bench.read(0);
      bench.apply(both[1 - winner]);
      bench.refuses(0, /stale or never asked for: write [23]/);
      bench.disk.set(before);
      bench.read(0);
    }
  });

  it("the one before two writes at the same time is gone as soon as one of them is acknowledged", () => {
    const bench = new Bench();
    bench.write(0);
    const first = bench.begin(0);
    bench.ledger.end(bench.begin(0));
    bench.refuses(0, /stale or never asked for: write 1 /);
    bench.ledger.end(first);
    bench.refuses(0, /stale or never asked for: write 1 /);
  });

  it("a read may see what was there at any moment between its call and its answer", () => {
    const bench = new Bench();
    bench.write(0);
    const old = bench.disk.slice(0, SECTOR_SIZE);
    const early = bench.ledger.beginReading(0, SECTOR_SIZE);
    for (let i = 0; i < 20; i++) bench.write(0);
    bench.ledger.endReading(early, old);
    const late = bench.ledger.beginReading(0, SECTOR_SIZE);
    assert.throws(() => bench.ledger.endReading(late, old), TortureFailure);
  });

  it("a duplicate: a write that happens again after a later one was acknowledged", () => {
    const bench = new Bench();
    const first = bench.write(0);
    bench.write(0);
    bench.apply(first);
    bench.refuses(0, /stale or never asked for: write 1 .*may hold write 2/);
  });

  it("what was given up may have happened or not, but not after the device has returned it and a later write", () => {
    const bench = new Bench();
    bench.write(0);
    const before = bench.disk.slice();
    const given = bench.begin(0);
    bench.ledger.abandon(given);
    bench.read(0);
    bench.apply(given);
    bench.read(0);
    bench.ledger.settle();
    assert.equal(bench.ledger.open, 0);
    bench.read(0);
    bench.disk.set(before);
    bench.refuses(0, /write 1 /); // It was seen to have happened.
    bench.write(0);
    bench.apply(given);
    bench.refuses(0, /stale.*given up/);
  });

  it("invented, misplaced, torn, foreign and undelivered data are told apart", () => {
    const bench = new Bench();
    bench.write(0, 4096);
    const good = bench.disk.slice();
    bench.disk.fill(0x55, 0, 512);
    bench.refuses(0, /sector 0: invented: no write has these bytes, 5555/);
    bench.disk.set(good.subarray(512, 1024), 0);
    bench.refuses(0, /sector 0: misplaced: write 1 for sector 1/);
    bench.disk.set(good);
    bench.write(0);
    bench.disk.set(good.subarray(300, 512), 300);
    bench.refuses(0, /sector 0: torn: write 2 up to byte 300, then write 1;/);
    bench.disk.fill(0, 100, 512);
    bench.refuses(0, /torn: write 2 up to byte 100, then zeroes;/);
    bench.disk.set(good);
    bench.disk[511] ^= 1;
    bench.refuses(0, /torn: write 1 up to byte 511, then bytes of no write;/);
    fillSectors(bench.disk.subarray(0, 512), SEED + 1, 2, 0);
    bench.refuses(0, /invented/);
    const buffer = new Uint8Array(512);
    const reading = bench.ledger.beginReading(0, 512, buffer);
    assert.throws(() => bench.ledger.endReading(reading, buffer), /nothing was delivered/);
  });

  it("a sector may be torn beside a write in flight, of possible values only", () => {
    const bench = new Bench();
    bench.write(0);
    const old = bench.disk.slice(0, SECTOR_SIZE);
    bench.write(0);
    const flying = bench.begin(0);
    const torn = bench.disk.slice(0, SECTOR_SIZE);
    const next = new Uint8Array(BYTES);
    bench.apply(flying, next);
    torn.set(next.subarray(0, 200));
    bench.disk.set(torn);
    bench.read(0);
    assert.equal(bench.ledger.torn, 1);
    bench.disk.set(old.subarray(400), 400);
    bench.refuses(0, /torn/);
    bench.disk.set(torn);
    bench.ledger.end(flying);
    bench.refuses(0, /torn: write 3 up to byte 200/);
  });

  it("after two writes at the same time a sector may be torn between them when one came in pieces", () => {
    for (const inPieces of [true, false]) {
      const bench = new Bench();
      const both = [bench.begin(0), bench.ledger.begin("write", [{ position: 0, length: 512 }], inPieces)];
      for (const change of both) bench.ledger.end(change);
      bench.apply(both[0]);
      const first = bench.disk.slice(0, 200);
      bench.apply(both[1]);
      bench.disk.set(first);
      if (inPieces) bench.read(0);
      else bench.refuses(0, /torn: write 1 up to byte 200, then write 2/);
    }
    const bench = new Bench();
    bench.ledger.end(bench.ledger.begin("write", [{ position: 0, length: 512 }], true));
    bench.disk[0] = 1;
    bench.refuses(0, /invented|torn/);
  });

  it("zeroes are zeroes; what was discarded may be anything until it is written", () => {
    const bench = new Bench();
    bench.write(0, 2048);
    const zeroes = bench.ledger.begin("zeroes", [
      { position: 0, length: 512 },
      { position: 1024, length: 512 },
    ]);
    bench.read(0, 2048);
    bench.apply(zeroes);
    bench.read(0, 2048);
    bench.ledger.end(zeroes);
    bench.read(0, 2048);
    bench.disk.fill(1, 1024, 1025);
    bench.refuses(1024, /invented|torn/);
    bench.ledger.end(bench.ledger.begin("discard", [{ position: 512, length: 1024 }]));
    bench.disk.fill(9, 512, 1536);
    bench.read(0, 2048);
    bench.disk.fill(8, 512, 1536);
    bench.read(0, 2048);
    bench.ledger.end(bench.begin(512));
    bench.refuses(512, /invented/);
    bench.read(1024);
  });

  it("a flush covers what was acknowledged before it was called", () => {
    const bench = new Bench();
    bench.write(0);
    const flying = bench.begin(512);
    const begun = bench.ledger.flushing();
    bench.ledger.end(flying);
    bench.write(1024);
    assert.equal(bench.ledger.unflushed, 3);
    bench.ledger.flushed(begun);
    assert.equal(bench.ledger.unflushed, 2);
  });

  it("the crash of a disk with a cache may take what no flush covers, and nothing else", () => {
    const bench = new Bench(true);
    const { ledger, disk } = bench;
    bench.write(0);
    ledger.flushed(ledger.flushing());
    const flushed = disk.slice();
    for (let i = 0; i < 10; i++) bench.write(0);
    const last = disk.slice();
    disk.set(flushed);
    bench.refuses(0, /stale or never asked for: write 1 /); // Without a crash nothing is back.
    ledger.crash();
    bench.read(0);
    disk.fill(0);
    bench.refuses(0, /stale or never asked for: zeroes/);
    disk.set(last);
    bench.refuses(0, /it may hold write 1 /); // What was seen after the crash stays.
    bench.write(0);
    bench.disk.set(flushed);
    bench.refuses(0, /stale/);
  });

  it("where what is acknowledged survives, a crash brings nothing back", () => {
    const bench = new Bench();
    bench.write(0);
    const before = bench.disk.slice();
    bench.write(0);
    bench.ledger.crash();
    bench.disk.set(before);
    bench.refuses(0, /stale/);
  });

  it("a flush that resolves after the crash does not cover what was lost in it", () => {
    const bench = new Bench(true);
    const { ledger, disk } = bench;
    bench.write(0);
    const begun = ledger.flushing();
    ledger.crash();
    ledger.flushed(begun);
    ledger.crash(); // The driver has learnt by now of all that the dead one had completed.
    disk.fill(0);
    bench.read(0);
    bench.write(0);
    ledger.flushed(ledger.flushing());
    ledger.crash();
    disk.fill(0);
    bench.refuses(0, /stale or never asked for: zeroes/);
  });

  it("knows whether a change in flight touches a stretch", () => {
    const bench = new Bench();
    const flying = bench.begin(1024, 1024);
    assert.equal(bench.ledger.collides({ position: 0, length: 1024 }), false);
    assert.equal(bench.ledger.collides({ position: 0, length: 1536 }), true);
    assert.equal(bench.ledger.collides({ position: 2048, length: 512 }), false);
    bench.ledger.end(flying);
    assert.equal(bench.ledger.collides({ position: 1024, length: 512 }), false);
  });

  it("wants the image to be as large as the disk", () => {
    const bench = new Bench();
    assert.throws(() => bench.ledger.checkImage(new Uint8Array(512), "the image"), /the image has 512 bytes/);
  });
});
