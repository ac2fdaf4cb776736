/** Counters of a back-end and of each of its queues, and where its failures are told. */

import { BlkRequestType, BlkStatus } from "../protocol/blk.js";

/** Where a request is counted whose type has no name here, or that has no header. */
export const OTHER_TYPE = 15;
/** Where a request is counted that had no room for a status. */
export const NO_STATUS = 3;

/** Requests by kind; `other` are those that this back-end does not know, or without a whole header. */
export interface RequestCounts {
  readonly read: number;
  readonly write: number;
  readonly flush: number;
  readonly get_id: number;
  readonly discard: number;
  readonly write_zeroes: number;
  readonly secure_erase: number;
  readonly other: number;
}

/** Answers by status; `none` went to requests that had no room for a status. */
export interface AnswerCounts {
  readonly ok: number;
  readonly ioerr: number;
  readonly unsupp: number;
  readonly none: number;
}

/** What failed: the storage, a ring that cannot be understood, or a connection with its messages. */
export type FailurePlace = "storage" | "ring" | "connection";

/** What a back-end has done on one queue since it began to listen, for all of its clients. */
export class BackendQueueStats {
  /** Queue index. */
  readonly index: number;
  /** Bytes read from the storage for requests. */
  bytesRead = 0;
  /** Bytes written to the storage by requests. */
  bytesWritten = 0;
  /** Times that notifications of the driver were heard; several that come at once are one. */
  kicks = 0;
  /** Notifications sent to the driver. */
  notifications = 0;
  /** Requests carried out again because a back-end before had left them in the region of requests in flight. */
  replayed = 0;

  /** Requests taken, at the `type` of their header; those of types from 15 on are all at 15. */
  readonly taken = new Float64Array(OTHER_TYPE + 1);
  /** Requests answered, at the status; those without one at 3. */
  readonly answered = new Float64Array(NO_STATUS + 1);

  constructor(index: number) {
    this.index = index;
  }

  /** Requests taken. */
  get requests(): number {
    return sum(this.taken);
  }

  /** Requests taken and not answered yet. */
  get inFlight(): number {
    return sum(this.taken) - sum(this.answered);
  }

  /** Requests taken, by type. */
  get requestsByType(): RequestCounts {
    const { taken } = this;
    const known = {
      read: taken[BlkRequestType.IN],
      write: taken[BlkRequestType.OUT],
      flush: taken[BlkRequestType.FLUSH],
      get_id: taken[BlkRequestType.GET_ID],
      discard: taken[BlkRequestType.DISCARD],
      write_zeroes: taken[BlkRequestType.WRITE_ZEROES],
      secure_erase: taken[BlkRequestType.SECURE_ERASE],
    };
    return { ...known, other: sum(taken) - sum(Object.values(known)) };
  }

  /** Requests answered, by status. */
  get answersByStatus(): AnswerCounts {
    const { answered } = this;
    return {
      ok: answered[BlkStatus.OK],
      ioerr: answered[BlkStatus.IOERR],
      unsupp: answered[BlkStatus.UNSUPP],
      none: answered[NO_STATUS],
    };
  }
}

/** What a back-end has done since it began to listen. */
export class BackendStats {
  /** Clients that connected. */
  connections = 0;
  /** What was done on each queue. */
  readonly queues: readonly BackendQueueStats[];

  readonly #failures: Record<FailurePlace, number> = { storage: 0, ring: 0, connection: 0 };
  readonly #onError: (error: unknown) => void;

  constructor(queues: number, onError: (error: unknown) => void) {
    this.queues = Array.from({ length: queues }, (_, index) => new BackendQueueStats(index));
    this.#onError = onError;
  }

  /** Requests taken from the queues. */
  get requests(): number {
    return sum(this.queues.map(({ requests }) => requests));
  }

  /** Bytes read from the storage for requests. */
  get bytesRead(): number {
    return sum(this.queues.map(({ bytesRead }) => bytesRead));
  }

  /** Bytes written to the storage by requests. */
  get bytesWritten(): number {
    return sum(this.queues.map(({ bytesWritten }) => bytesWritten));
  }

  /** Notifications sent to the driver. */
  get notifications(): number {
    return sum(this.queues.map(({ notifications }) => notifications));
  }

  /** Failures of the storage, queues that broke, messages that were refused and connections that ended by them. */
  get errors(): number {
    return sum(Object.values(this.#failures));
  }

  /** The errors by what failed. */
  get errorsByPlace(): Readonly<Record<FailurePlace, number>> {
    return { ...this.#failures };
  }

  /** Count a failure, and tell it after the work at hand, which the listener cannot disturb by throwing. */
  failed(place: FailurePlace, error: unknown): void {
    this.#failures[place]++;
    process.nextTick(this.#onError, error);
  }
}

function sum(counts: Iterable<number>): number {
  let total = 0;
  for (const count of counts) total += count;
  return total;
}
