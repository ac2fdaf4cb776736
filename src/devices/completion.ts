/** How a driver learns of completions: by notifications, by looking for a while before it sleeps, or by being asked. */

import { performance } from "node:perf_hooks";
import { VirtioError } from "../errors.js";
import { type EventFd, FdWatcher } from "../sys/index.js";
import type { Virtqueue } from "../virtqueue/index.js";

/**
 * `"event"`: sleep until the device notifies. `"hybrid"`: look for a short while first, as long as that has been
 * paying off. `"poll"`: nothing by itself; the owner polls.
 */
export type CompletionMode = "hybrid" | "event" | "poll";

/** Completions handled by one turn of the event loop, in queue sizes, before others get theirs. */
const TURN_REQUESTS = 4;
/** Milliseconds that one turn of the event loop may look for completions. */
const TURN_MS = 0.05;
/** Looks between two readings of the clock, which costs as much as several looks. */
const LOOKS_PER_CLOCK = 32;
/** Looks that microtasks may take between two turns of the event loop: well below a millisecond. */
const TURN_LOOKS = 20_000;
/** Mode `"event"`: requests in flight from which on notifications may come late. */
const LATE_DEPTH = 32;
/** Milliseconds after which a late notification is not waited for. */
const LATE_MS = 1;
/** How many looks fit into a millisecond, roughly: the clock costs too much to be read for each. */
const LOOKS_PER_MS = 60_000;
/** What a completion counts for among those looks: it leads to work of its own. */
const LOOKS_PER_REQUEST = 20;
/** Bounds of the time without a completion after which looking gives way to sleep, in milliseconds. */
const MIN_WINDOW_MS = 0.02;
const MAX_WINDOW_MS = 0.2;

/** The queue looked at last in this thread: where there are several, each gets a few looks in turn. */
let lastLooked: Virtqueue | undefined;

/**
 * Watches one queue. Looking costs processor time, waking up costs latency (tens of microseconds in a virtual
 * machine), so the time to look adapts as in the kernel's halt polling: a notification soon after falling asleep
 * doubles it, one long after halves it. Each turn of the event loop is bounded, so that everything else goes on.
 */
export class CompletionWatch {
  private readonly queue: Virtqueue;
  private readonly reap: (limit: number) => number;
  private readonly onError: (error: VirtioError) => void;
  private completion: EventFd | undefined = undefined;
  private watcher: FdWatcher | undefined = undefined;
  private currentMode: CompletionMode = "poll";
  private next: NodeJS.Immediate | undefined = undefined;
  private asleep = false;
  private holdsProcess = false;
  private reaping = false;
  private looksLeft = TURN_LOOKS;
  private window = MIN_WINDOW_MS;
  private lastUseful = 0;
  private asleepSince = 0;
  /** Mode `"event"`: completions that may pass before a notification. */
  private unnoticed = 0;
  /** Looks after what completes while a late notification does not come. */
  private backstop: NodeJS.Timeout | undefined = undefined;
  /** Nothing was reaped since the backstop looked last. */
  private isQuiet = false;
  /** Something completed since the clock was read last. */
  private useful = false;
  /** Notifications of the device that were heard. */
  wakeUps = 0;
  private readonly turnAgain = (): void => this.turn();

  /**
   * @param reap - reaps up to `limit` completions; returns how many.
   * @param onError - called when the queue breaks while nobody polls it.
   */
  constructor(queue: Virtqueue, reap: (limit: number) => number, onError: (error: VirtioError) => void) {
    this.queue = queue;
    this.reap = reap;
    this.onError = onError;
  }

  /** Begin, now that the device runs. */
  start(completion: EventFd, mode: CompletionMode): void {
    this.completion = completion;
    this.mode = mode;
  }

  /** Watch no more. */
  stop(): void {
    this.mode = "poll";
    this.completion = undefined;
  }

  get mode(): CompletionMode {
    return this.currentMode;
  }

  /** Go on with a device that has taken the place of the one before, and that may have completed something already. */
  restart(): void {
    this.mode = this.currentMode;
    this.kicked();
  }

  set mode(mode: CompletionMode) {
    this.currentMode = mode;
    this.watcher?.close();
    this.watcher = undefined;
    this.cancelTurn();
    this.asleep = false;
    clearInterval(this.backstop);
    this.backstop = undefined;
    this.unnoticed = 0;
    if (mode === "poll" || this.completion === undefined) {
      this.queue.disableNotifications();
      return;
    }
    this.watcher = new FdWatcher(this.completion.fd, { drain: true }, () => {
      this.wakeUps++;
      this.turn();
    });
    this.watcher.unref();
    this.holdsProcess = false;
    if (mode === "event") this.asleep = !this.queue.enableNotifications();
    else this.queue.disableNotifications();
    if (this.asleep) this.holdProcess(this.queue.inFlight > 0);
    else this.next = setImmediate(this.turnAgain);
  }

  /** Requests were made available. */
  kicked(): void {
    if (this.reaping || this.next !== undefined) return;
    if (this.currentMode === "hybrid" && !this.asleep) {
      this.lastUseful = performance.now();
      this.next = setImmediate(this.turnAgain);
    } else if (this.queue.inFlight > 0) {
      this.holdProcess(true);
      // What was just made available counts for the next notification, too.
      if (this.unnoticed > 0 && this.currentMode === "event" && !this.isNotified()) {
        this.next = setImmediate(this.turnAgain);
      }
    }
  }

  /**
   * In mode `"hybrid"` look right now, until something completes or this turn's share of looking is used up. For
   * callers at the end of a microtask: what completes settles promises, whose reactions come before the next turn.
   */
  lookNow(): void {
    if (this.currentMode !== "hybrid" || this.asleep || this.reaping) return;
    let idle = this.window * LOOKS_PER_MS;
    while (idle-- > 0 && this.looksLeft > 0 && this.watcher !== undefined && this.queue.inFlight > 0) {
      const count = this.reapSafely(TURN_REQUESTS * this.queue.layout.queueSize);
      this.looksLeft -= 1 + count * LOOKS_PER_REQUEST;
      if (count > 0) {
        this.useful = true;
        return;
      }
    }
  }

  /** A notification came, or the event loop is round again. */
  private turn(): void {
    this.cancelTurn();
    // Whatever happens below, a spent budget or a callback that throws, the rest is looked after.
    this.next = setImmediate(this.turnAgain);
    if (this.currentMode === "hybrid") this.look();
    else this.drain();
  }

  /** Mode `"event"`: reap until nothing is left, then ask for the next notification. */
  private drain(): void {
    const { queue } = this;
    const depth = queue.inFlight;
    let reaped = 0;
    for (let rest = TURN_REQUESTS * queue.layout.queueSize; rest > 0; ) {
      const count = this.reapSafely(rest);
      reaped += count;
      // A device that takes back what it showed must not keep this turn from ending.
      rest -= Math.max(1, count);
      if (rest > 0 && (this.watcher === undefined || this.isNotified())) {
        this.cancelTurn();
        this.holdProcess(queue.inFlight > 0);
        this.adapt(reaped, depth);
        return;
      }
    }
  }

  /**
   * A wake-up that finds a few completions is dear; one that finds all of them left the device without work. The
   * right moment to be notified is the one from which on waking up takes as long as the device has work.
   */
  private adapt(count: number, depth: number): void {
    this.isQuiet = false;
    if (depth < LATE_DEPTH || count === 0) this.unnoticed = 0;
    else if (count * 4 > depth * 3) this.unnoticed >>= 1;
    else if (count * 3 < depth) this.unnoticed = Math.min(depth >> 1, this.unnoticed * 2 + 1);
  }

  /** Mode `"event"`: ask for the next notification; false when it will not come, because enough is used already. */
  private isNotified(): boolean {
    if (this.queue.enableNotifications(this.unnoticed)) return false;
    if (this.unnoticed > 0 && this.backstop === undefined) {
      this.isQuiet = false;
      this.backstop = setInterval(() => this.lookAfter(), LATE_MS).unref();
    }
    return true;
  }

  /** Nothing may lie unnoticed for longer than two ticks. A device that got slow notifies at once from then on. */
  private lookAfter(): void {
    if (!this.isQuiet) {
      this.isQuiet = true;
      return;
    }
    clearInterval(this.backstop);
    this.backstop = undefined;
    this.unnoticed = 0;
    if (this.currentMode === "event" && this.next === undefined) this.turn();
  }

  /** Mode `"hybrid"`: reap and look again until the turn is over, nothing is in flight, or looking does not pay. */
  private look(): void {
    const begin = performance.now();
    const isAlone = lastLooked === this.queue;
    lastLooked = this.queue;
    if (this.asleep) this.wakeUp(begin);
    if (this.useful) {
      this.useful = false;
      this.lastUseful = begin;
    }
    this.looksLeft = TURN_LOOKS;
    for (let looks = 1; ; looks++) {
      const count = this.reapSafely(TURN_REQUESTS * this.queue.layout.queueSize);
      if (this.watcher === undefined || this.queue.inFlight === 0) {
        this.cancelTurn();
        this.holdProcess(false);
        return;
      }
      // What completed leads to work in microtasks, and that comes first.
      if (count > 0) break;
      if (looks % LOOKS_PER_CLOCK !== 0) continue;
      const now = performance.now();
      if (now - this.lastUseful > this.window && this.fallAsleep(now)) return;
      if (!isAlone || now - begin > TURN_MS) return;
    }
    this.lastUseful = performance.now();
  }

  private wakeUp(now: number): void {
    this.asleep = false;
    this.queue.disableNotifications();
    this.lastUseful = now;
    const soon = now - this.asleepSince < MAX_WINDOW_MS;
    this.window = soon ? Math.min(MAX_WINDOW_MS, this.window * 2) : Math.max(MIN_WINDOW_MS, this.window / 2);
  }

  /** Wait for a notification; false when something completed meanwhile. */
  private fallAsleep(now: number): boolean {
    if (this.queue.enableNotifications()) {
      this.queue.disableNotifications();
      return false;
    }
    this.asleep = true;
    this.asleepSince = now;
    this.cancelTurn();
    this.holdProcess(true);
    return true;
  }

  /** A queue that breaks is reported, and watched no more. What a callback throws goes its normal way. */
  private reapSafely(limit: number): number {
    this.reaping = true;
    try {
      return this.reap(limit);
    } catch (error) {
      if (!(error instanceof VirtioError && error.code === "ERR_VIRTIO_QUEUE_BROKEN")) throw error;
      this.stop();
      this.onError(error);
      return 0;
    } finally {
      this.reaping = false;
    }
  }

  /** Whether sleeping here keeps the process alive: exactly while something is in flight. */
  private holdProcess(yes: boolean): void {
    if (this.holdsProcess === yes) return;
    this.holdsProcess = yes;
    if (yes) this.watcher?.ref();
    else this.watcher?.unref();
  }

  private cancelTurn(): void {
    clearImmediate(this.next);
    this.next = undefined;
  }
}
