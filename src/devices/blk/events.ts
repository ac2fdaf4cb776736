/** What a block device tells of itself: its events, and how they are emitted without harm to the device. */

import { EventEmitter } from "node:events";
import { type DiagnosticMessages, publish } from "../../diagnostics.js";
import type { VirtioError } from "../../errors.js";
import type { BlkConfig } from "../../protocol/blk.js";

/** Events of a `BlockDevice` by name, with what their listeners are called with. */
export interface BlockEvents {
  /** The back-end is gone. The device tries to reach it again; its calls wait meanwhile. */
  disconnect: [error: VirtioError];
  /** Before attempt 1, 2, … to reach the back-end again, which begins after `delay` milliseconds. */
  reconnecting: [attempt: ReconnectAttempt];
  /** The back-end is back, and everything that was in flight is on its way again. */
  reconnect: [outcome: ReconnectOutcome];
  /** The device changed its config space. */
  config: [config: BlkConfig];
  /** The disk has another size, in bytes; comes after `config`. Requests beyond a new end are refused already. */
  resize: [capacity: number, previous: number];
  /** The device is gone for good; every pending and later call rejects with the same error. */
  lost: [error: VirtioError];
}

/** What comes with the event `reconnecting`. */
export interface ReconnectAttempt {
  /** 1 for the first of an outage. */
  readonly attempt: number;
  /** Milliseconds until it begins. */
  readonly delay: number;
}

/** What comes with the event `reconnect`. */
export interface ReconnectOutcome {
  /** Attempts that it took. */
  readonly attempts: number;
  /** Requests in flight that were submitted again: by the driver, or by the back-end when `tracked`. */
  readonly replayed: number;
  /** Whether the back-end itself knew what was in flight (INFLIGHT_SHMFD). */
  readonly tracked: boolean;
  /**
   * Writes, discards and their kind that had completed and that no flush covers; 0 where what has completed is stable.
   * Those of a queue that was taken are for its owner to count.
   */
  readonly unflushed: number;
}

type Channel<E extends keyof BlockEvents> = `virtio:device:${E}`;

/** The message of each event for those who watch all devices. */
const MESSAGES: {
  readonly [E in keyof BlockEvents]: (address: string, ...values: BlockEvents[E]) => DiagnosticMessages[Channel<E>];
} = {
  disconnect: (address, error) => ({ address, error }),
  reconnecting: (address, { attempt, delay }) => ({ address, attempt, delay }),
  reconnect: (address, outcome) => ({ address, ...outcome }),
  config: (address, config) => ({ address, config }),
  resize: (address, capacity, previous) => ({ address, capacity, previous }),
  lost: (address, error) => ({ address, error }),
};

/**
 * The emitter that a block device is. What a listener throws is an uncaught exception, as everywhere in Node, but never
 * in the midst of what the device does.
 */
export abstract class BlockEmitter extends EventEmitter<BlockEvents> {
  /** The address of the device. */
  abstract readonly address: string;
  /** How often `reconnect` was emitted. */
  protected reconnects = 0;

  /** Emit an event, and publish it. A listener that throws keeps those behind it from hearing of it, and harms nobody else. */
  protected tell<E extends keyof BlockEvents>(event: E, ...values: BlockEvents[E]): void {
    if (event === "reconnect") this.reconnects++;
    publish<Channel<E>>(`virtio:device:${event}`, MESSAGES[event](this.address, ...values));
    try {
      (this as EventEmitter).emit(event, ...values);
    } catch (error) {
      queueMicrotask(() => {
        throw error;
      });
    }
  }
}
