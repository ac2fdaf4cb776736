/** The mixed load of the torture: calls of a block device, many at a time, each of them known to the ledger. */

import { setImmediate } from "node:timers/promises";
import { type BlockDevice, type DeviceBuffer, VirtioError } from "../../src/index.js";
import type { Random } from "../fuzz/random.js";
import { type Change, type Extent, type Ledger, TortureFailure } from "./ledger.js";
import { SECTOR_SIZE } from "./pattern.js";
import type { Watch } from "./watch.js";

/** What a load works with. */
export interface LoadContext {
  readonly disk: BlockDevice;
  readonly ledger: Ledger;
  readonly random: Random;
  readonly watch: Watch;
}

/** How many calls of each kind have ended. */
export type Counts = Record<keyof typeof WEIGHTS, number>;

/** How often each kind of call is made, in relation to the others. */
const WEIGHTS = {
  read: 34,
  write: 38,
  readv: 4,
  writev: 5,
  flush: 4,
  zeroes: 4,
  discard: 2,
  abandon: 6,
  id: 1,
  allocate: 1,
} as const;

const KINDS = (Object.keys(WEIGHTS) as (keyof typeof WEIGHTS)[]).flatMap((kind) =>
  new Array<keyof typeof WEIGHTS>(WEIGHTS[kind]).fill(kind),
);

/** Lengths of reads and writes in sectors. */
const SECTORS = [1, 1, 1, 2, 3, 4, 8, 8, 8, 8, 16, 16, 24, 32, 64, 128];
const LARGEST_BYTES = 128 * SECTOR_SIZE;
/** One in so many calls goes to the hot area, which is this part of the disk. */
const HOT_CALLS = 4;
const HOT_PART = 32;
/** One in so many changes may touch what another one in flight touches. */
const COLLISIONS = 8;
/** Where `allocate` has to ask for one more region of memory sooner or later. */
const LARGE_BUFFER_BYTES = 24 * 2 ** 20;
const LARGE_BUFFERS = 3;
/** Milliseconds that a call with a deadline has at most. */
const LONGEST_DEADLINE_MS = 30;
/** Looks for completions in mode "poll" before others have their turn. */
const LOOKS = 16;

/** An extent for a call; one that changes the disk mostly keeps away from what is being changed. */
export function pickExtent({ ledger, random }: LoadContext, changes: boolean, largest = LARGEST_BYTES): Extent {
  const mayCollide = !changes || random.oneIn(COLLISIONS);
  for (let tries = 0; ; tries++) {
    const area = random.oneIn(HOT_CALLS) ? ledger.bytes / HOT_PART : ledger.bytes;
    const length = Math.min(SECTORS[random.below(SECTORS.length)] * SECTOR_SIZE, largest, area);
    const position = random.below((area - length) / SECTOR_SIZE + 1) * SECTOR_SIZE;
    if (mayCollide || tries > 8 || !ledger.collides({ position, length })) return { position, length };
  }
}

/** Look for completions. That the back-end is gone is no failure here: it comes back. */
export function pollOnce(what: { poll(): number }): void {
  try {
    what.poll();
  } catch (error) {
    if (!(error instanceof VirtioError && error.code === "ERR_VIRTIO_DISCONNECTED")) throw error;
  }
}

/** Whoever makes calls one after the other, with a lent buffer of its own. */
interface Worker {
  buffer: DeviceBuffer;
}

/** Calls of one block device, `depth` at a time. */
export class Load {
  /** What was done. */
  readonly counts = Object.fromEntries(Object.keys(WEIGHTS).map((kind) => [kind, 0])) as Counts;

  private readonly context: LoadContext;
  private readonly features: readonly string[];
  private readonly large: DeviceBuffer[] = [];
  private workers: Promise<unknown> = Promise.resolve();
  private isStopped = false;

  constructor(context: LoadContext) {
    this.context = context;
    this.features = context.disk.info.features;
  }

  /** Begin to make calls. */
  start(depth: number): void {
    this.workers = Promise.all([...Array.from({ length: depth }, () => this.work()), this.reap()]);
    this.workers.catch((error: unknown) => this.context.watch.fail(error));
  }

  /** End for good. Nothing may be on its way. */
  async stop(): Promise<void> {
    this.isStopped = true;
    this.context.watch.look();
    await this.context.watch.wait(this.workers);
    for (const buffer of this.large.splice(0)) buffer.release();
  }

  /** Make so many calls that change the disk, each by one request, one after the other. */
  async changes(count: number): Promise<void> {
    const worker = { buffer: await this.lend(LARGEST_BYTES) };
    for (let i = 0; i < count; i++) await (i % 2 === 0 ? this.write(worker) : this.change("zeroes", "WRITE_ZEROES", 1));
    worker.buffer.release();
  }

  private async work(): Promise<void> {
    const { watch } = this.context;
    const worker = { buffer: await this.lend(LARGEST_BYTES) };
    while (true) {
      if (watch.paused) await watch.until(() => !watch.paused || this.isStopped);
      if (this.isStopped || watch.over) break;
      await this.one(worker);
    }
    worker.buffer.release();
  }

  /** In mode "poll" nobody else looks for completions. */
  private async reap(): Promise<void> {
    const { disk, watch } = this.context;
    while (!this.isStopped && !watch.over) {
      if (disk.mode === "poll") {
        for (let i = 0; i < LOOKS; i++) {
          pollOnce(disk);
          await Promise.resolve();
        }
        await setImmediate();
      } else {
        await watch.until(() => disk.mode === "poll" || this.isStopped);
      }
    }
  }

  private one(worker: Worker): Promise<void> {
    switch (KINDS[this.context.random.below(KINDS.length)]) {
      default:
        return this.read(worker);
      case "write":
        return this.write(worker);
      case "readv":
        return this.readv();
      case "writev":
        return this.writev();
      case "flush":
        return this.flush();
      case "zeroes":
        return this.change("zeroes", "WRITE_ZEROES");
      case "discard":
        return this.change("discard", "DISCARD");
      case "abandon":
        return this.abandon(worker);
      case "id":
        return this.id();
      case "allocate":
        return this.allocate();
    }
  }

  /** Make a call: count it, and have nobody wait for ever for it. */
  private async call<T>(kind: keyof Counts, what: string, work: () => Promise<T>): Promise<T> {
    const { watch } = this.context;
    const id = watch.begin(what);
    try {
      return await work();
    } catch (error) {
      if (error instanceof TortureFailure) throw error;
      throw new TortureFailure(`${what} was rejected: ${String(error)}`, { cause: error });
    } finally {
      this.counts[kind]++;
      watch.end(id);
    }
  }

  private async read(worker: Worker): Promise<void> {
    const { disk, ledger, random } = this.context;
    const { position, length } = pickExtent(this.context, false);
    const what = `read of ${length} bytes at ${position}`;
    const memory = random.oneIn(2) ? new Uint8Array(length) : worker.buffer;
    const offset = this.offsetIn(memory, length);
    const bytes = bytesOf(memory).subarray(offset, offset + length);
    const reading = ledger.beginReading(position, length, bytes);
    const { bytesRead } = await this.call("read", what, () => disk.read(memory, { position, offset, length }));
    checkCount(what, length, bytesRead);
    ledger.endReading(
      reading,
      bytes,
      memory instanceof Uint8Array ? "a read into plain memory" : "a read into lent memory",
    );
  }

  private async write(worker: Worker): Promise<void> {
    const { disk, ledger, random } = this.context;
    const extent = pickExtent(this.context, true);
    const { position, length } = extent;
    const change = ledger.begin("write", [extent]);
    const what = nameOf(change);
    const memory = random.oneIn(2) ? new Uint8Array(length) : worker.buffer;
    const offset = this.offsetIn(memory, length);
    ledger.fill(change, bytesOf(memory).subarray(offset, offset + length));
    const { bytesWritten } = await this.call("write", what, () => disk.write(memory, { position, offset, length }));
    checkCount(what, length, bytesWritten);
    ledger.end(change);
  }

  private async readv(): Promise<void> {
    const { disk, ledger } = this.context;
    const { position, length } = pickExtent(this.context, false);
    const pieces = await this.pieces(length);
    const reading = ledger.beginReading(position, length, ...pieces.map(bytesOf));
    const what = `readv of ${pieces.map((piece) => piece.length).join("+")} bytes at ${position}`;
    const { bytesRead } = await this.call("readv", what, () => disk.readv(pieces, { position }));
    checkCount(what, length, bytesRead);
    ledger.endReading(reading, new Uint8Array(Buffer.concat(pieces.map(bytesOf))), "a readv");
    for (const piece of pieces) if (!(piece instanceof Uint8Array)) piece.release();
  }

  private async writev(): Promise<void> {
    const { disk, ledger } = this.context;
    const extent = pickExtent(this.context, true);
    const { position, length } = extent;
    const pieces = await this.pieces(length);
    const change = ledger.begin("write", [extent], pieces.length > 1);
    const data = new Uint8Array(length);
    ledger.fill(change, data);
    let at = 0;
    for (const piece of pieces) {
      bytesOf(piece).set(data.subarray(at, at + piece.length));
      at += piece.length;
    }
    const what = `${nameOf(change)} in ${pieces.length} pieces`;
    const { bytesWritten } = await this.call("writev", what, () => disk.writev(pieces, { position }));
    checkCount(what, length, bytesWritten);
    ledger.end(change);
    for (const piece of pieces) if (!(piece instanceof Uint8Array)) piece.release();
  }

  private async flush(): Promise<void> {
    const { disk, ledger } = this.context;
    const begun = ledger.flushing();
    await this.call("flush", "flush", () => disk.flush());
    ledger.flushed(begun);
  }

  /** One range or two, written with zeroes or discarded. */
  private async change(kind: "zeroes" | "discard", feature: string, most = 2): Promise<void> {
    const { disk, ledger, random } = this.context;
    if (!this.features.includes(feature)) return this.flush();
    const ranges = [pickExtent(this.context, true)];
    const second = pickExtent(this.context, true);
    const [{ position, length }] = ranges;
    const apart = second.position >= position + length || second.position + second.length <= position;
    if (most > 1 && random.oneIn(4) && apart) ranges.push(second);
    const change = ledger.begin(kind, ranges);
    await this.call(kind, nameOf(change), () =>
      kind === "zeroes" ? disk.writeZeroes(ranges, { unmap: random.oneIn(2) }) : disk.discard(ranges),
    );
    ledger.end(change);
  }

  /** A call with a deadline, or whose caller gives up after some turns: it rejects at once then, or had ended before. */
  private async abandon(worker: Worker): Promise<void> {
    const { disk, ledger, random } = this.context;
    const writes = random.oneIn(2);
    const extent = pickExtent(this.context, writes);
    const { position, length } = extent;
    const lent = random.oneIn(2);
    const bytes = lent ? worker.buffer.bytes.subarray(0, length) : new Uint8Array(length);
    const buffer = lent ? worker.buffer : bytes;
    const change = writes ? ledger.begin("write", [extent]) : undefined;
    const reading = ledger.beginReading(position, length, bytes);
    if (change !== undefined) ledger.fill(change, bytes);
    const what = change === undefined ? `read of ${length} bytes at ${position}` : nameOf(change);
    const ended = await this.call("abandon", `${what} to be given up`, () => {
      const bounds = { position, length };
      const begin = (more: { signal: AbortSignal } | { timeout: number }): Promise<unknown> =>
        change === undefined ? disk.read(buffer, { ...bounds, ...more }) : disk.write(buffer, { ...bounds, ...more });
      if (random.oneIn(2)) return hasEnded(begin({ timeout: 1 + random.below(LONGEST_DEADLINE_MS) }), isLate);
      return givenUp((signal) => begin({ signal }), random.below(4), what);
    });
    if (ended) {
      if (change !== undefined) ledger.end(change);
      else ledger.endReading(reading, bytes, "a read that would have been given up");
    } else {
      if (change !== undefined) ledger.abandon(change);
      // The device may still use the memory: it must not be lent to anybody before it has returned the request.
      if (lent) {
        worker.buffer.release();
        worker.buffer = await this.lend(LARGEST_BYTES);
      }
    }
    ledger.forget(reading);
  }

  private async id(): Promise<void> {
    const { disk } = this.context;
    const id = await this.call("id", "getId", () => disk.getId());
    if (!/^[\x20-\x7e]{1,20}$/.test(id)) throw new TortureFailure(`getId has ${JSON.stringify(id)}`);
  }

  /** Large buffers, so that the memory has to grow at some time. */
  private async allocate(): Promise<void> {
    const { random } = this.context;
    if (this.large.length >= LARGE_BUFFERS) this.large.splice(random.below(LARGE_BUFFERS), 1)[0].release();
    const length = 4096 * (1 + random.below(LARGE_BUFFER_BYTES / 4096));
    this.large.push(await this.lend(length));
  }

  private lend(length: number): Promise<DeviceBuffer> {
    return this.call("allocate", `allocate of ${length} bytes`, () => this.context.disk.allocate(length));
  }

  private offsetIn(buffer: Uint8Array | DeviceBuffer, length: number): number {
    return this.context.random.below((buffer.length - length) / SECTOR_SIZE + 1) * SECTOR_SIZE;
  }

  /** Pieces of odd lengths, plain and lent, of `length` bytes together. */
  private async pieces(length: number): Promise<(Uint8Array | DeviceBuffer)[]> {
    const { random } = this.context;
    const pieces: (Uint8Array | DeviceBuffer)[] = [];
    const allLent = random.oneIn(2);
    for (let left = length; left > 0; ) {
      const take = pieces.length === 3 ? left : 1 + random.below(left);
      pieces.push(allLent || random.oneIn(2) ? await this.lend(take) : new Uint8Array(take));
      left -= take;
    }
    return pieces;
  }
}

/** Give a call up after some turns. Returns whether it had ended before; it may not take longer than a turn then. */
async function givenUp(
  begin: (signal: AbortSignal) => Promise<unknown>,
  turns: number,
  what: string,
): Promise<boolean> {
  const controller = new AbortController();
  const reason = new Error("given up");
  let isSettled = false;
  const outcome = hasEnded(begin(controller.signal), (error) => error === reason);
  const settled = (): void => {
    isSettled = true;
  };
  outcome.then(settled, settled);
  for (let i = 0; i < turns; i++) await setImmediate();
  controller.abort(reason);
  await setImmediate();
  if (!isSettled) throw new TortureFailure(`${what} was given up and did not reject at once`);
  return outcome;
}

/** Whether a call has ended well; false when it has ended because its caller wanted that. */
async function hasEnded(call: Promise<unknown>, isGivenUp: (error: unknown) => boolean): Promise<boolean> {
  try {
    await call;
    return true;
  } catch (error) {
    if (isGivenUp(error)) return false;
    throw error;
  }
}

function isLate(error: unknown): boolean {
  return error instanceof VirtioError && error.code === "ERR_VIRTIO_TIMEOUT";
}

function bytesOf(memory: Uint8Array | DeviceBuffer): Uint8Array {
  return memory instanceof Uint8Array ? memory : memory.bytes;
}

function checkCount(what: string, expected: number, got: number): void {
  if (got !== expected) throw new TortureFailure(`${what} says that ${got} bytes were transferred`);
}

function nameOf({ kind, generation, extents }: Change): string {
  return `${kind} ${generation} of ${extents.map((each) => `${each.length} bytes at ${each.position}`).join(", ")}`;
}
