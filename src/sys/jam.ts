/** Looks after eventfds that a peer has: one that would make a signal wait is emptied, and told. */

import { VirtioError } from "../errors.js";
import { EventFd } from "./eventfd.js";
import { systemError } from "./errno.js";
import { native, type NativeJam } from "./native.js";
import { FdWatcher } from "./watcher.js";

/**
 * A peer that shares an eventfd can clear O_NONBLOCK and fill the counter; the next {@link EventFd.signal} waits then.
 * While a guard has the descriptor, that wait ends within a second: twice a second a thread of the addon, one for the whole
 * process, looks at all counters that are guarded, and empties those that are full. No honest peer fills one. On Linux
 * before 5.8 the wait goes on until somebody reads.
 */
export class JamGuard {
  readonly #report: EventFd;
  readonly #watcher: FdWatcher;
  readonly #jams = new Map<EventFd, NativeJam>();

  /**
   * @param onJam called when a counter was full, in a turn of the event loop of its own, and again when it happens again.
   * @throws VirtioError ERR_VIRTIO_SYSCALL when there are too many descriptors (EMFILE).
   */
  constructor(onJam: () => void) {
    this.#report = EventFd.create();
    try {
      this.#watcher = new FdWatcher(this.#report.fd, { drain: true }, onJam);
      this.#watcher.unref();
    } catch (error) {
      this.#report.close();
      throw error;
    }
  }

  /**
   * Look after `event`, which stays the caller's: the guard has a duplicate.
   *
   * @throws VirtioError ERR_VIRTIO_SYSCALL when there are too many descriptors (EMFILE) or threads (EAGAIN).
   */
  add(event: EventFd): void {
    const jam = native().jamWatch(event.fd, this.#report.fd);
    if (typeof jam === "number") throw systemError(jam, "dup", `looking after event descriptor ${event.fd}`);
    this.#jams.set(event, jam);
  }

  /** Look after `event` no more. */
  remove(event: EventFd): void {
    const jam = this.#jams.get(event);
    if (jam !== undefined) native().jamEnd(jam);
    this.#jams.delete(event);
  }

  /** Look after nothing any more. Idempotent. */
  close(): void {
    for (const event of this.#jams.keys()) this.remove(event);
    this.#watcher.close();
    this.#report.close();
  }
}

/** The error that ends the connection to a peer that was found to do this. */
export function jammedBy(peer: string): VirtioError {
  return new VirtioError(
    "ERR_VIRTIO_PROTOCOL",
    `${peer} fills the counter of a notification, which makes us wait; it is hostile or broken: mend it, or use another`,
  );
}
