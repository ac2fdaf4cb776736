/** The torture notices: a disk with one fault of each kind behind a real back-end is found out, a good one is not. */

import assert from "node:assert/strict";
import { join } from "node:path";
import { describe, it, type TestContext } from "node:test";
import { type BlockStorage, type MemoryParts, VhostUserBackend } from "../../src/backend/index.js";
import { openBlock, type VirtioBlkQueue } from "../../src/index.js";
import { folderFor } from "../backend/support.js";
import { Random } from "../fuzz/random.js";
import { Ledger } from "./ledger.js";
import { Life } from "./life.js";
import { Watch } from "./watch.js";

const DISK_BYTES = 1024 * 1024;
const CALLS = 4000;
/** A fault at one in so many requests. */
const RARELY = 100;
/** Longer than any pause of a busy machine; only the disk that falls silent waits for it. */
const PATIENCE_MS = 60_000;

/** A disk in plain memory. Faults override its methods, all of which answer later and in any order. */
class Disk implements BlockStorage {
  readonly capacity = DISK_BYTES;
  readonly bytes = new Uint8Array(DISK_BYTES);
  protected readonly random = new Random(4711);

  read(offset: number, into: Uint8Array): void | Promise<void> {
    return this.later(() => into.set(this.bytes.subarray(offset, offset + into.length)));
  }
  write(offset: number, from: Uint8Array): void | Promise<void> {
    return this.later(() => this.bytes.set(from, offset));
  }
  // As a whole, whatever pieces of memory it comes in: sectors do not tear.
  readInto(offset: number, into: MemoryParts): void | Promise<void> {
    const views = into.views();
    const bytes = new Uint8Array(Buffer.concat(views));
    const spread = (): void => {
      let at = 0;
      for (const view of views) view.set(bytes.subarray(at, (at += view.length)));
    };
    const work = this.read(offset, bytes);
    return work === undefined ? spread() : work.then(spread);
  }
  writeFrom(offset: number, from: MemoryParts): void | Promise<void> {
    return this.write(offset, new Uint8Array(Buffer.concat(from.views())));
  }
  flush(): void | Promise<void> {
    return this.later(() => undefined);
  }
  discard(offset: number, length: number): void | Promise<void> {
    return this.later(() => void this.bytes.fill(0x77, offset, offset + length));
  }
  writeZeroes(offset: number, length: number): void | Promise<void> {
    return this.later(() => void this.bytes.fill(0, offset, offset + length));
  }

  /** Whether it is time for a fault. */
  protected get now(): boolean {
    return this.random.oneIn(RARELY);
  }

  /** Do it at once, or some turns later. */
  protected later(work: () => void): void | Promise<void> {
    const turns = this.random.below(4);
    if (turns === 0) return work();
    return new Promise((resolve) => {
      const wait = (left: number): void => {
        if (left > 0) {
          setImmediate(wait, left - 1);
          return;
        }
        work();
        resolve();
      };
      wait(turns);
    });
  }
}

/** Loses a write that it acknowledges. */
class Losing extends Disk {
  override write(offset: number, from: Uint8Array): void | Promise<void> {
    return this.now ? undefined : super.write(offset, from);
  }
}

/** Loses the last sector of a write, as a crash between two pages would. */
class Cutting extends Disk {
  override write(offset: number, from: Uint8Array): void | Promise<void> {
    return super.write(offset, this.now ? from.subarray(0, from.length - 512) : from);
  }
}

/** Writes, and again some hundred requests later: as if it were replayed though it was answered. */
class Repeating extends Disk {
  private readonly old: { offset: number; bytes: Uint8Array }[] = [];

  override write(offset: number, from: Uint8Array): void | Promise<void> {
    if (this.random.oneIn(10)) this.old.push({ offset, bytes: from.slice() });
    const again = this.old.length > 30 ? this.old.shift() : undefined;
    if (again !== undefined) this.bytes.set(again.bytes, again.offset);
    return super.write(offset, from);
  }
}

/** Answers a write long before it carries it out, behind others that come later. */
class Late extends Disk {
  override write(offset: number, from: Uint8Array): void | Promise<void> {
    if (!this.now) return super.write(offset, from);
    const bytes = from.slice();
    setTimeout(() => this.bytes.set(bytes, offset), 20).unref();
    return undefined;
  }
}

/** Goes back to what it held at the last flush but one: the death of a disk with a cache of its own. */
class Forgetting extends Disk {
  private stable = new Uint8Array(DISK_BYTES);
  private flushes = 0;

  override flush(): void | Promise<void> {
    if (++this.flushes % 20 === 0) this.bytes.set(this.stable);
    else this.stable = this.bytes.slice();
    return super.flush();
  }
}

/** Writes to the place beside. */
class Missing extends Disk {
  override write(offset: number, from: Uint8Array): void | Promise<void> {
    return super.write(this.now ? (offset + 4096) % (DISK_BYTES - from.length + 512) : offset, from);
  }
}

/** Writes half a sector. */
class Tearing extends Disk {
  override write(offset: number, from: Uint8Array): void | Promise<void> {
    return super.write(offset, this.now ? from.subarray(0, from.length - 200) : from);
  }
}

/** Flips a bit of what it is given. */
class Flipping extends Disk {
  override write(offset: number, from: Uint8Array): void | Promise<void> {
    if (!this.now) return super.write(offset, from);
    const bytes = from.slice();
    bytes[this.random.below(bytes.length)] ^= 0x10;
    return super.write(offset, bytes);
  }
}

/** Says that it has read, and delivers nothing. */
class Empty extends Disk {
  override read(offset: number, into: Uint8Array): void | Promise<void> {
    return this.now ? undefined : super.read(offset, into);
  }
}

/** Reads an old state of the disk from time to time. */
class Stale extends Disk {
  private old = this.bytes.slice();

  override read(offset: number, into: Uint8Array): void | Promise<void> {
    if (this.random.oneIn(10)) this.old = this.bytes.slice();
    if (!this.random.oneIn(3)) return super.read(offset, into);
    into.set(this.old.subarray(offset, offset + into.length));
    return undefined;
  }
}

/** Leaves what it was told to fill with zeroes. */
class Keeping extends Disk {
  override writeZeroes(): void {
    // Nothing.
  }
}

/** Fails a request. */
class Failing extends Disk {
  override read(offset: number, into: Uint8Array): void | Promise<void> {
    if (this.now) throw new Error("a bad sector");
    return super.read(offset, into);
  }
}

/** Answers no flush any more, until it is told to. */
class Silent extends Disk {
  private readonly waiting: (() => void)[] = [];
  private answers = true;

  override flush(): void | Promise<void> {
    this.answers &&= !this.random.oneIn(10);
    return this.answers ? super.flush() : new Promise((resolve) => this.waiting.push(resolve));
  }

  release(): void {
    this.flush = () => undefined;
    for (const resolve of this.waiting.splice(0)) resolve();
  }
}

interface Exercise {
  readonly storage: Disk;
  readonly takesQueue?: boolean;
  readonly patience?: number;
  readonly tamper?: (image: Uint8Array) => void;
  /** Called instead of the listener of the queue that was taken. */
  readonly twist?: (complete: VirtioBlkQueue["onComplete"]) => VirtioBlkQueue["onComplete"];
}

/** Keep a device over `storage` busy, then look at all of it; rejects with what was found. */
async function exercise(t: TestContext, options: Exercise) {
  const { storage, takesQueue = false, patience = PATIENCE_MS, tamper, twist } = options;
  const watch = new Watch(patience);
  t.after(() => watch.close());
  const backend = VhostUserBackend.listen({ path: join(folderFor(t), "disk.sock"), storage, queues: 2 });
  const disk = await openBlock(`vhost-user:${backend.path}`, { queues: takesQueue ? 2 : 1 });
  try {
    const ledger = new Ledger(DISK_BYTES, 99);
    const queue = takesQueue ? disk.takeQueue() : undefined;
    const life = new Life({ disk, ledger, random: new Random(5), watch }, queue);
    if (queue !== undefined && twist !== undefined) queue.onComplete = twist(queue.onComplete);
    life.start();
    await watch.until(() => watch.completed >= CALLS);
    await life.drain();
    await life.end();
    const image = storage.bytes.slice();
    tamper?.(image);
    ledger.checkImage(image, "the image");
    return life.counts;
  } finally {
    watch.fail(new Error("the test is over"));
    if (storage instanceof Silent) storage.release();
    await disk.close();
    await backend.close();
  }
}

describe("the torture finds out", () => {
  it("nothing about a good disk, whose requests overtake each other", async (t) => {
    const counts = await exercise(t, { storage: new Disk() });
    assert.ok(counts.requests >= CALLS / 2 && counts.flushes > 0 && counts.abandoned > 0, JSON.stringify(counts));
  });

  it("nothing about a good disk, one queue of which is driven slot by slot", async (t) => {
    const counts = await exercise(t, { storage: new Disk(), takesQueue: true });
    assert.ok(counts.lowLevel > CALLS / 10, JSON.stringify(counts));
  });

  /** What lay there before: an older write, zeroes, or what the disk put where something was discarded. */
  const old = /stale or never asked for|invented/;
  const faults: readonly (readonly [what: string, storage: new () => Disk, message: RegExp])[] = [
    ["a write that was acknowledged and lost", Losing, old],
    ["a write that lost its last sector", Cutting, old],
    ["a write that is carried out twice", Repeating, old],
    ["a write that is carried out after later ones", Late, old],
    ["a disk that forgets what was acknowledged", Forgetting, old],
    ["a write that goes elsewhere", Missing, /misplaced|stale|invented/],
    ["a write that tears a sector", Tearing, /torn: .* up to byte 312|invented/],
    ["a bit that was flipped", Flipping, /torn: |invented/],
    ["a read that delivers nothing", Empty, /has wrong data/],
    ["a read of what is no more", Stale, old],
    ["zeroes that are none", Keeping, old],
    ["a request that fails", Failing, /was rejected: .*|status 1/],
  ];
  for (const [what, Storage, message] of faults) {
    it(what, async (t) => {
      await assert.rejects(exercise(t, { storage: new Storage() }), { name: "TortureFailure", message });
    });
  }

  it("a request that is answered twice, or whose answer goes to another", async (t) => {
    let count = 0;
    const twice: Exercise["twist"] = (complete) => (slot, status, written) => {
      complete(slot, status, written);
      if (++count === 100) complete(slot, status, written);
    };
    await assert.rejects(exercise(t, { storage: new Disk(), takesQueue: true, twist: twice }), {
      message: /slot \d+ was answered and has no request: twice\?/,
    });
    const astray: Exercise["twist"] = (complete) => (slot, status, written) => {
      complete(++count === 200 ? (slot + 1) % 256 : slot, status, written);
    };
    await assert.rejects(exercise(t, { storage: new Disk(), takesQueue: true, twist: astray }), {
      message: /has no request: twice|used length|wrong data/,
    });
  });

  it("an image that is not what the disk reads as", async (t) => {
    const tamper = (image: Uint8Array): void => void image.fill(0, 8192, 8192 + 128 * 512);
    await assert.rejects(exercise(t, { storage: new Disk(), tamper }), { message: /the image .*stale/s });
  });

  it("a request that is not answered, and says which", { timeout: 30_000 }, async (t) => {
    const silent = exercise(t, { storage: new Silent(), patience: 1000 });
    await assert.rejects(silent, { message: /was not answered: nothing has gone on .*\d+ are pending.*flush, for/s });
  });
});
