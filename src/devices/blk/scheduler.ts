/** Spreads operations over the queues of a device: the fast path, the waiting line, kicks once a turn. */

import { VirtioError } from "../../errors.js";
import type { BufferPool, DeviceBuffer } from "../../memory/index.js";
import { BlkRequestType } from "../../protocol/blk.js";
import type { NextRequest, Operation, Part } from "./operation.js";
import type { CompletionMode } from "../completion.js";
import type { VirtioBlkQueue } from "./queue.js";
import { blkError } from "./status.js";
import { ErrorTally } from "./tally.js";

/** What a read resolves to. */
export interface ReadResult<M> {
  /** Bytes that the device delivered, counted from the start without a gap. */
  readonly bytesRead: number;
  /** The memory that was passed in. */
  readonly buffer: M;
}

/** What a write resolves to. */
export interface WriteResult<M> {
  /** Bytes written: all of them, or the write rejects. */
  readonly bytesWritten: number;
  /** The memory that was passed in. */
  readonly buffer: M;
}

/** A microtask by a promise costs a tenth of one by `queueMicrotask`. */
const NOW = Promise.resolve();

/** Requests that are kicked together. */
const KICK_REQUESTS = 16;

/** A request that no queue will ever take. */
const REFUSED = -2;

/** What is lost with a back-end that has it in memory only, until a flush covers it. */
const CHANGES: ReadonlySet<number> = new Set([
  BlkRequestType.OUT,
  BlkRequestType.DISCARD,
  BlkRequestType.WRITE_ZEROES,
  BlkRequestType.SECURE_ERASE,
]);

type Settle = (value: ReadResult<DeviceBuffer> | WriteResult<DeviceBuffer>) => void;

// The engine's own pair of functions, taken out of the executor without a closure for each request.
let capturedResolve: Settle = () => {};
let capturedReject: (error: Error) => void = () => {};
const capture = (resolve: Settle, reject: (error: Error) => void): void => {
  capturedResolve = resolve;
  capturedReject = reject;
};

/** What is in flight in each slot of one queue: a promise of the fast path, or a part of an operation. */
class Slots {
  resolve: (Settle | undefined)[];
  reject: ((error: Error) => void)[];
  buffer: (DeviceBuffer | undefined)[];
  length: Float64Array;
  part: (Part | undefined)[];
  /** Of a flush: how many changes had completed when it was submitted. */
  covers: Float64Array;
  readonly queue: VirtioBlkQueue;
  /** Requests submitted since the last kick, about. */
  unkicked = 0;

  constructor(queue: VirtioBlkQueue) {
    const n = queue.queueSize;
    this.queue = queue;
    this.resolve = new Array<Settle | undefined>(n).fill(undefined);
    this.reject = new Array<(error: Error) => void>(n).fill(() => {});
    this.buffer = new Array<DeviceBuffer | undefined>(n).fill(undefined);
    this.length = new Float64Array(n);
    this.part = new Array<Part | undefined>(n).fill(undefined);
    this.covers = new Float64Array(n);
  }

  /** The request in each slot is in slot `moves[slot]` now; where that is -1 there is none any more. */
  move(moves: Int32Array): void {
    this.resolve = moved(this.resolve, moves, undefined);
    this.reject = moved(this.reject, moves, () => {});
    this.buffer = moved(this.buffer, moves, undefined);
    this.part = moved(this.part, moves, undefined);
    this.length = new Float64Array(moved([...this.length], moves, 0));
    this.covers = new Float64Array(moved([...this.covers], moves, 0));
  }
}

function moved<T>(list: readonly T[], moves: Int32Array, nothing: T): T[] {
  const result = new Array<T>(moves.length).fill(nothing);
  moves.forEach((to, from) => {
    if (to >= 0) result[to] = list[from];
  });
  return result;
}

/**
 * Requests go to the queues in turn. When no queue has room, or memory for copying is lacking, operations
 * wait in one line, in order. Everything submitted in one turn of the event loop is published and kicked
 * together, in a microtask.
 */
export class Scheduler {
  private readonly slots: Slots[];
  private readonly taken: VirtioBlkQueue[] = [];
  private readonly bounce: BufferPool;
  private readonly lose: (error: VirtioError, queue?: number) => void;
  /** Failures of requests, and of operations that waited. */
  readonly errors = new ErrorTally();
  private waiting: Operation[] = [];
  /** Some that wait are settled, and wait for nothing. */
  private hasSettled = false;
  private readonly take = (length: number): DeviceBuffer | undefined => this.bounce.tryAllocate(length);
  private readonly flushLater = (): void => this.flush();
  private turn = 0;
  private outstanding = 0;
  /** Changes of the disk that have completed, and how many of them the flushes that have completed cover. */
  private changed = 0;
  private flushed = 0;
  private flushScheduled = false;
  private fatal: VirtioError | undefined = undefined;
  private currentMode: CompletionMode;
  private whenIdle: (() => void)[] = [];

  /**
   * @param bounce - memory for callers whose own the device cannot reach.
   * @param lose - called when a queue cannot go on, with its index; expected to call {@link fail}.
   */
  constructor(
    queues: readonly VirtioBlkQueue[],
    bounce: BufferPool,
    lose: (error: VirtioError, queue?: number) => void,
  ) {
    this.bounce = bounce;
    this.lose = lose;
    this.slots = queues.map((queue) => this.attach(queue));
    this.currentMode = queues[0].mode;
  }

  /** The error that ended the device, if one did. */
  get failure(): VirtioError | undefined {
    return this.fatal;
  }

  /** Whether operations wait for room: then new ones must queue up behind them. */
  get isBacklogged(): boolean {
    return this.waiting.length > 0;
  }

  /** Queues that operations go to. */
  get queues(): number {
    return this.slots.length;
  }

  /** Requests in flight and operations waiting. */
  get pending(): number {
    return this.outstanding + this.waiting.length;
  }

  /** Changes of the disk that have completed since the last flush was submitted that has completed. */
  get unflushed(): number {
    return this.changed - this.flushed;
  }

  /**
   * Submit again what is in flight on a queue, to a device that knows nothing of it. Requests whose calls were
   * aborted end here: whether a write of theirs has happened is as open as before.
   *
   * @returns how many were submitted.
   */
  replay(queue: VirtioBlkQueue): number {
    const slots = this.slots.find((each) => each.queue === queue);
    return queue.replay((slot) => slots?.part[slot]?.operation.settled !== true);
  }

  /**
   * The fast path: one request on lent memory, a promise and nothing else.
   *
   * @returns `undefined` when there is no room now: then {@link enqueue}.
   */
  transfer(
    type: number,
    sector: number,
    buffer: DeviceBuffer,
    offset: number,
    length: number,
  ): Promise<ReadResult<DeviceBuffer> | WriteResult<DeviceBuffer>> | undefined {
    if (this.slots.length === 0) throw noQueueLeft();
    const slots = this.nextSlots();
    const queue = slots.queue;
    const slot =
      type === BlkRequestType.IN
        ? queue.submitRead(sector, buffer, offset, length)
        : queue.submitWrite(sector, buffer, offset, length);
    if (slot < 0) return undefined;
    this.outstanding++;
    // A device with nothing to do gets the first request at once, before the promise is even made; those behind
    // it are kicked together, but not so many that the device would have to wait for all of their promises.
    if (queue.inFlight === 1 || ++slots.unkicked === KICK_REQUESTS) {
      slots.unkicked = 0;
      this.kick(queue);
    }
    if (this.fatal !== undefined) return Promise.reject(this.fatal);
    const promise = new Promise<ReadResult<DeviceBuffer> | WriteResult<DeviceBuffer>>(capture);
    slots.resolve[slot] = capturedResolve;
    slots.reject[slot] = capturedReject;
    slots.buffer[slot] = buffer;
    slots.length[slot] = length;
    this.scheduleFlush();
    return promise;
  }

  /** Put an operation at the end of the line; it is submitted as soon as there is room. */
  enqueue(operation: Operation): void {
    if (this.fatal !== undefined) {
      operation.abort(this.fatal);
      return;
    }
    if (this.slots.length === 0) {
      operation.abort(noQueueLeft());
      return;
    }
    this.waiting.push(operation);
    this.scheduleFlush();
  }

  /** Reap completions on all queues and go on with what waits. Returns how many requests completed. */
  poll(): number {
    let count = 0;
    for (const { queue } of this.slots) {
      try {
        count += queue.poll();
      } catch (error) {
        const fatal = asFatal(error);
        // A device that is gone may come back; the transport tells when it does not.
        if (fatal.code !== "ERR_VIRTIO_DISCONNECTED") this.lose(fatal, queue.index);
        throw error;
      }
    }
    if (this.flushScheduled) this.flush();
    return count;
  }

  /** Resolves when nothing is in flight and nothing waits, or after `timeout` milliseconds. */
  async idle(timeout: number): Promise<void> {
    if (this.pending === 0) return;
    await new Promise<void>((resolve) => {
      const timer = setTimeout(resolve, timeout);
      this.whenIdle.push(() => {
        clearTimeout(timer);
        resolve();
      });
    });
  }

  /** Give a queue away, the last one first. */
  takeQueue(): VirtioBlkQueue {
    const [queue] = this.removeQueues(1) ?? [];
    if (queue === undefined) throw noQueueLeft();
    queue.onComplete = () => {};
    this.taken.push(queue);
    return queue;
  }

  /** Do without the last `count` queues from now on; undefined, with nothing changed, when there are not as many. */
  removeQueues(count: number): VirtioBlkQueue[] | undefined {
    if (this.pending > 0) {
      throw new VirtioError("ERR_VIRTIO_QUEUES", `${this.pending} calls are pending; await them before taking a queue`);
    }
    if (this.slots.length < count) return undefined;
    this.turn = 0;
    return this.slots.splice(-count).map(({ queue }) => queue);
  }

  /** Use one more queue, an idle one. */
  addQueue(queue: VirtioBlkQueue): void {
    this.slots.push(this.attach(queue));
    if (this.waiting.length > 0) this.scheduleFlush();
  }

  /** How the queues learn of completions. */
  get mode(): CompletionMode {
    return this.currentMode;
  }

  /** Switch all queues to another way of learning of completions. */
  setMode(mode: CompletionMode): void {
    this.currentMode = mode;
    for (const { queue } of this.slots) queue.mode = mode;
  }

  /** Calls in the line: they wait for room. */
  get waitingCalls(): number {
    return this.waiting.length;
  }

  /** Nobody waits for an operation any more: it rejects with `error`; what is in flight of it comes back later. */
  giveUp(operation: Operation, error: unknown): void {
    if (operation.settled) return;
    if (operation.outstanding === 0) this.errors.count(undefined, error);
    else {
      for (const { queue, part } of this.slots) {
        const parts = part.reduce((sum, each) => (each?.operation === operation ? sum + 1 : sum), 0);
        this.errors.count(queue.index, error, parts);
      }
    }
    operation.abort(error);
    this.hasSettled = true;
    this.scheduleFlush();
  }

  /** Refuse what waits for bytes that the disk does not have any more. */
  refuseBeyond(capacity: number): void {
    for (const operation of this.waiting) {
      if (operation.refuseBeyond(capacity)) this.hasSettled = true;
    }
    if (this.hasSettled) this.scheduleFlush();
  }

  /** Requests in flight on a queue that nobody waits for. */
  abandoned(queue: VirtioBlkQueue): number {
    if (this.fatal !== undefined) return queue.inFlight;
    const slots = this.slots.find((each) => each.queue === queue);
    return slots?.part.filter((part) => part?.operation.settled === true).length ?? 0;
  }

  /** End everything with `error`: what is in flight, what waits, and what comes later. */
  fail(error: VirtioError): void {
    if (this.fatal !== undefined) return;
    this.fatal = error;
    this.countLost(error);
    for (const slots of this.slots) {
      slots.queue.fail(error);
      for (let slot = 0; slot < slots.queue.queueSize; slot++) {
        if (slots.resolve[slot] !== undefined) slots.reject[slot](error);
        slots.resolve[slot] = undefined;
        slots.buffer[slot] = undefined;
        slots.part[slot]?.operation.abort(error);
        slots.part[slot] = undefined;
      }
    }
    for (const queue of this.taken) {
      queue.fail(error);
      queue.report(error);
    }
    for (const operation of this.waiting.splice(0)) operation.abort(error);
    this.outstanding = 0;
    this.becameIdle();
  }

  private attach(queue: VirtioBlkQueue): Slots {
    const slots = new Slots(queue);
    queue.onComplete = (slot, status, written) => this.complete(slots, slot, status, written);
    queue.onError = (error) => this.lose(asFatal(error), queue.index);
    queue.onReplay = (moves) => this.replayed(slots, moves);
    return slots;
  }

  private kick(queue: VirtioBlkQueue): void {
    try {
      queue.kick();
    } catch (error) {
      this.lose(asFatal(error));
    }
  }

  private nextSlots(): Slots {
    const slots = this.slots[this.turn];
    if (++this.turn === this.slots.length) this.turn = 0;
    return slots;
  }

  private complete(slots: Slots, slot: number, status: number, written: number): void {
    const resolve = slots.resolve[slot];
    if (resolve !== undefined) {
      const buffer = slots.buffer[slot] as DeviceBuffer;
      const length = slots.length[slot];
      slots.resolve[slot] = undefined;
      slots.buffer[slot] = undefined;
      if (status !== 0) slots.reject[slot](this.failed(slots.queue, slot, status));
      else if (slots.queue.requestType(slot) === BlkRequestType.OUT) {
        this.changed++;
        resolve({ bytesWritten: length, buffer });
      }
      // The status is the last byte that the device writes; what it does not account for is not delivered.
      else resolve({ bytesRead: written > length ? length : Math.max(0, written - 1), buffer });
    } else {
      const part = slots.part[slot] as Part;
      slots.part[slot] = undefined;
      if (status === 0) {
        const { type } = part.operation;
        if (CHANGES.has(type)) this.changed++;
        else if (type === BlkRequestType.FLUSH) this.flushed = Math.max(this.flushed, slots.covers[slot]);
      }
      part.operation.partDone(part, status === 0 ? undefined : this.failed(slots.queue, slot, status), written);
    }
    this.outstanding--;
    this.wentOn();
  }

  /** Requests have come back: there is room for what waits, or nothing left. */
  private wentOn(): void {
    if (this.waiting.length > 0) this.scheduleFlush();
    else if (this.outstanding === 0) this.becameIdle();
  }

  private replayed(slots: Slots, moves: Int32Array): void {
    const given = slots.part.filter((part, slot) => part !== undefined && moves[slot] < 0);
    slots.move(moves);
    for (const part of given) {
      part?.operation.partDone(part, undefined, 0);
      this.outstanding--;
    }
    this.wentOn();
  }

  private scheduleFlush(): void {
    if (this.flushScheduled) return;
    this.flushScheduled = true;
    void NOW.then(this.flushLater);
  }

  /** Submit what waits while there is room, then kick. */
  private flush(): void {
    this.flushScheduled = false;
    if (this.fatal !== undefined) return;
    if (this.hasSettled) this.dropSettled();
    try {
      while (this.waiting.length > 0 && this.submitNext(this.waiting[0])) {
        if (this.waiting[0].allSubmitted) this.waiting.shift();
      }
      for (const slots of this.slots) {
        slots.unkicked = 0;
        slots.queue.kick();
      }
      // With several queues, looking at one would keep the others waiting.
      if (this.slots.length === 1) this.slots[0].queue.lookNow();
    } catch (error) {
      this.lose(asFatal(error));
    }
    if (this.pending === 0) this.becameIdle();
  }

  /** Submit one request of an operation. Returns false when there is no room for it. */
  private submitNext(operation: Operation): boolean {
    if (operation.allSubmitted) return true;
    // Asked first: the next request may have to copy its data, which would be for nothing.
    if (this.slots.every(({ queue }) => queue.isFull)) return false;
    const request = operation.next(this.take);
    if (request === undefined) return false;
    for (let tries = 0; tries < this.slots.length; tries++) {
      const slots = this.nextSlots();
      const slot = this.submit(slots.queue, operation, request);
      if (slot === REFUSED) break;
      if (slot < 0) continue;
      slots.part[slot] = request.part;
      slots.covers[slot] = this.changed;
      operation.submitted(request.part);
      this.outstanding++;
      return true;
    }
    request.part.bounce?.release();
    return operation.allSubmitted;
  }

  /** Returns the slot, -1 when there is no room, or `REFUSED` when only this operation cannot go on. */
  private submit(queue: VirtioBlkQueue, operation: Operation, { sector, segments }: NextRequest): number {
    try {
      return queue.submitLent(operation.type, sector, segments, operation.deviceWrites);
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      // While it waited, its buffer was released or the disk became smaller.
      operation.abort(error);
      return REFUSED;
    }
  }

  private failed(queue: VirtioBlkQueue, slot: number, status: number): VirtioError {
    const error = blkError(queue.requestType(slot), status);
    this.errors.count(queue.index, error);
    return error;
  }

  /** Count what `error` ends. */
  private countLost(error: VirtioError): void {
    for (const { queue, resolve, part } of this.slots) {
      let lost = 0;
      for (let slot = 0; slot < queue.queueSize; slot++) {
        if (resolve[slot] !== undefined || part[slot]?.operation.settled === false) lost++;
      }
      this.errors.count(queue.index, error, lost);
    }
    const unsent = this.waiting.filter(({ settled, outstanding }) => !settled && outstanding === 0);
    this.errors.count(undefined, error, unsent.length);
  }

  private dropSettled(): void {
    this.hasSettled = false;
    this.waiting = this.waiting.filter(({ settled }) => !settled);
  }

  private becameIdle(): void {
    if (this.whenIdle.length === 0) return;
    for (const resolve of this.whenIdle.splice(0)) resolve();
  }
}

function noQueueLeft(): VirtioError {
  return new VirtioError(
    "ERR_VIRTIO_QUEUES",
    "every queue was taken by takeQueue() or handed over; open the device with more queues",
  );
}

function asFatal(error: unknown): VirtioError {
  if (error instanceof VirtioError) return error;
  return new VirtioError("ERR_VIRTIO_QUEUE_BROKEN", `the queue cannot go on: ${String(error)}`, { cause: error });
}
