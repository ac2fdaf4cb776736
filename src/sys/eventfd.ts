/** Event descriptors: the counters by which driver and device wake each other. */

import { VirtioError } from "../errors.js";
import { checkFd, closeFd } from "./descriptor.js";
import { errno, systemError } from "./errno.js";
import { native } from "./native.js";

const CLOSED = -1;

/**
 * An eventfd(2): a 64-bit counter in the kernel that one side raises and the other reads back to zero. Watch it
 * with `FdWatcher`.
 *
 * Whoever shares the descriptor shares its flags: a peer that clears O_NONBLOCK and fills the counter makes the
 * next {@link EventFd.signal} wait, until somebody reads: a `JamGuard` does. Reading never waits.
 */
export class EventFd {
  #fd: number;

  private constructor(fd: number) {
    this.#fd = fd;
  }

  /**
   * Make an event descriptor: counter 0, non-blocking, close-on-exec.
   *
   * @throws VirtioError ERR_VIRTIO_SYSCALL when there are too many descriptors (EMFILE).
   */
  static create(): EventFd {
    const fd = native().eventfd();
    if (fd < 0) throw systemError(fd, "eventfd", "making an event descriptor");
    return new EventFd(fd);
  }

  /** Take over a descriptor that came from elsewhere; it is closed by {@link EventFd.close}. */
  static fromFd(fd: number): EventFd {
    return new EventFd(checkFd("fd", fd));
  }

  /** The descriptor; -1 after {@link EventFd.close}. */
  get fd(): number {
    return this.#fd;
  }

  /**
   * Add 1 to the counter. A counter that is full stays full, which the other side sees as well.
   *
   * @throws VirtioError ERR_VIRTIO_CLOSED after `close`, ERR_VIRTIO_SYSCALL when the kernel refuses.
   */
  signal(): void {
    const result = native().signal(this.#fd);
    if (result !== undefined) throw this.#error(result, "write");
  }

  /**
   * Set the counter back to 0. Never waits, whatever the peer did to the descriptor's flags.
   *
   * @returns whether it was above 0.
   * @throws VirtioError ERR_VIRTIO_CLOSED after `close`, ERR_VIRTIO_SYSCALL when the kernel refuses.
   */
  drain(): boolean {
    const result = native().drain(this.#fd);
    if (result >= 0) return true;
    if (result === -errno.EAGAIN) return false;
    throw this.#error(result, "read");
  }

  /** Close the descriptor. Idempotent. */
  close(): void {
    if (this.#fd === CLOSED) return;
    const fd = this.#fd;
    this.#fd = CLOSED;
    closeFd(fd);
  }

  #error(result: number, syscall: string): VirtioError {
    if (this.#fd === CLOSED) {
      return new VirtioError("ERR_VIRTIO_CLOSED", `${syscall} on an event descriptor that was closed; make a new one`);
    }
    return systemError(result, syscall, `${syscall} on event descriptor ${this.#fd}`);
  }
}
