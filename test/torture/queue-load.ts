/** The load of the torture on a queue of the low-level API: every slot answers once, and for its own request. */

import { setImmediate } from "node:timers/promises";
import type { DeviceBuffer, VirtioBlkQueue } from "../../src/index.js";
import { type Change, type Reading, TortureFailure } from "./ledger.js";
import { type LoadContext, pickExtent, pollOnce } from "./load.js";
import { SECTOR_SIZE } from "./pattern.js";

/** Bytes of the buffer of each request. */
const BUFFER_BYTES = 16 * 1024;
/** One in so many requests is a flush. */
const FLUSHES = 20;

/** What is in a slot. */
interface Flight {
  readonly id: number;
  readonly buffer: DeviceBuffer;
  readonly length: number;
  readonly change: Change | undefined;
  readonly reading: Reading | undefined;
  readonly flush: number | undefined;
}

/** Keeps a queue that was taken from a device busy; its requests are known to the ledger like all others. */
export class QueueLoad {
  /** Requests that were answered. */
  requests = 0;

  private readonly context: LoadContext;
  private readonly queue: VirtioBlkQueue;
  private flights = new Map<number, Flight>();
  private free: DeviceBuffer[] = [];
  private work: Promise<void> = Promise.resolve();
  private isStopped = false;

  constructor(context: LoadContext, queue: VirtioBlkQueue) {
    this.context = context;
    this.queue = queue;
    queue.onError = (error) => context.watch.fail(new TortureFailure(`a taken queue has ended: ${error.message}`));
    queue.onReplay = (moves) => this.guarded(() => this.moved(moves));
    queue.onComplete = (slot, status, written) => this.guarded(() => this.completed(slot, status, written));
  }

  /** Begin to submit. */
  start(depth: number): void {
    this.work = this.run(depth);
    this.work.catch((error: unknown) => this.context.watch.fail(error));
  }

  /** End for good. Nothing may be on its way. */
  async stop(): Promise<void> {
    this.isStopped = true;
    this.queue.onError = () => undefined;
    this.context.watch.look();
    await this.context.watch.wait(this.work);
  }

  private async run(depth: number): Promise<void> {
    const { disk, watch } = this.context;
    this.free = await Promise.all(Array.from({ length: depth }, () => disk.allocate(BUFFER_BYTES)));
    while (!this.isStopped && !watch.over) {
      this.refill();
      if (this.queue.mode === "poll") {
        pollOnce(this.queue);
        await setImmediate();
      } else {
        await watch.until(() => this.isStopped || this.mayGoOn || this.queue.mode === "poll");
      }
    }
    for (const buffer of this.free.splice(0)) buffer.release();
  }

  private get mayGoOn(): boolean {
    return !this.context.watch.paused && this.free.length > 0 && !this.queue.isFull;
  }

  private refill(): void {
    while (this.mayGoOn) this.submit();
    this.queue.kick();
  }

  private submit(): void {
    const { queue, context } = this;
    const { ledger, random, watch } = context;
    const buffer = this.free.pop() as DeviceBuffer;
    if (random.oneIn(FLUSHES)) {
      const flush = ledger.flushing();
      const flight = { buffer, flush, length: 0, change: undefined, reading: undefined };
      return this.fly(queue.submitFlush(), { id: watch.begin("a flush on a queue"), ...flight });
    }
    const writes = random.oneIn(2);
    const extent = pickExtent(context, writes, BUFFER_BYTES);
    const { position, length } = extent;
    const bytes = buffer.bytes.subarray(0, length);
    const sector = position / SECTOR_SIZE;
    const id = watch.begin(`a ${writes ? "write" : "read"} on a queue of ${length} bytes at ${position}`);
    if (writes) {
      const change = ledger.begin("write", [extent]);
      ledger.fill(change, bytes);
      const slot = queue.submitWrite(sector, buffer, 0, length);
      return this.fly(slot, { id, buffer, length, change, reading: undefined, flush: undefined });
    }
    const reading = ledger.beginReading(position, length, bytes);
    const slot = queue.submitRead(sector, buffer, 0, length);
    return this.fly(slot, { id, buffer, length, change: undefined, reading, flush: undefined });
  }

  private fly(slot: number, flight: Flight): void {
    if (slot < 0) throw new TortureFailure("a queue that is not full took no request");
    if (this.flights.has(slot)) throw new TortureFailure(`slot ${slot} was given to two requests`);
    this.flights.set(slot, flight);
  }

  private guarded(work: () => void): void {
    try {
      work();
    } catch (error) {
      this.context.watch.fail(error);
    }
  }

  /** Requests were submitted again and may be in other slots: each in one, and in one of its own. */
  private moved(moves: Int32Array): void {
    const flights = new Map<number, Flight>();
    for (const [slot, flight] of this.flights) {
      if (moves[slot] < 0) throw new TortureFailure(`the request in slot ${slot} was not submitted again`);
      flights.set(moves[slot], flight);
    }
    const count = moves.filter((to) => to >= 0).length;
    if (count !== this.flights.size || flights.size !== count) {
      throw new TortureFailure(`${count} requests were submitted again, and ${this.flights.size} were in flight`);
    }
    this.flights = flights;
  }

  private completed(slot: number, status: number, written: number): void {
    const { ledger, watch } = this.context;
    const flight = this.flights.get(slot);
    if (flight === undefined) throw new TortureFailure(`slot ${slot} was answered and has no request: twice?`);
    this.flights.delete(slot);
    const { id, buffer, length, change, reading, flush } = flight;
    if (status !== 0) throw new TortureFailure(`slot ${slot} was answered with the status ${status}`);
    if (change !== undefined) ledger.end(change);
    if (flush !== undefined) ledger.flushed(flush);
    if (reading !== undefined) {
      if (written !== length + 1) throw new TortureFailure(`a read of ${length} bytes has a used length of ${written}`);
      ledger.endReading(reading, buffer.bytes.subarray(0, length), "a read on a queue");
    }
    this.free.push(buffer);
    this.requests++;
    watch.end(id);
  }
}
