/** Counters of a back-end, and where its failures are told. */

/** What a back-end has done since it began to listen. */
export class BackendStats {
  /** Clients that connected. */
  connections = 0;
  /** Requests taken from the queues. */
  requests = 0;
  /** Bytes read from the storage for requests. */
  bytesRead = 0;
  /** Bytes written to the storage by requests. */
  bytesWritten = 0;
  /** Requests that failed in the storage, queues that broke, connections that were closed for bad messages. */
  errors = 0;
  /** Notifications sent to the driver. */
  notifications = 0;

  readonly #onError: (error: unknown) => void;

  constructor(onError: (error: unknown) => void) {
    this.#onError = onError;
  }

  /** Count a failure, and tell it after the work at hand, which the listener cannot disturb by throwing. */
  failed(error: unknown): void {
    this.errors++;
    process.nextTick(this.#onError, error);
  }
}
