/** Wakes JavaScript when a descriptor becomes readable or writable, on the event loop of this thread. */

import { checkOptions, typeError } from "../errors.js";
import { checkFd } from "./descriptor.js";
import { errno, systemError } from "./errno.js";
import { type NativeWatch, native } from "./native.js";

/**
 * A level-triggered watch: the callback runs in each round of the event loop in which the descriptor can be read
 * (or, with `writable`, written), is at its end, or has an error. What the callback throws becomes an `uncaughtException`. The watch keeps the
 * process alive until `unref` or `close`, and ends with its worker thread.
 *
 * It watches a duplicate, so closing the descriptor itself neither ends nor endangers the watch; but an open file
 * (and thus the peer's end of file) lasts until the watch is closed, too.
 */
export class FdWatcher {
  #watch: NativeWatch | undefined;

  /**
   * @param options.drain read 8 bytes (the counter of an eventfd) before each callback, without ever waiting.
   * @param options.writable wait until the descriptor can be written instead of read. Default false.
   * @throws VirtioError ERR_VIRTIO_SYSCALL when it is not open (EBADF) or cannot be watched, as a regular file (EPERM:
   *   ERR_VIRTIO_PERMISSION).
   */
  constructor(fd: number, options: { drain: boolean; writable?: boolean }, onReady: () => void) {
    checkFd("fd", fd);
    checkOptions("options", options, ["drain", "writable"]);
    if (typeof options.drain !== "boolean") throw typeError("drain", "a boolean", options.drain);
    const { drain, writable = false } = options;
    if (typeof writable !== "boolean") throw typeError("writable", "a boolean", writable);
    if (typeof onReady !== "function") throw typeError("onReady", "a function", onReady);
    const result = native().watch(fd, drain, writable, onReady);
    if (typeof result === "number") {
      const advice = result === -errno.EPERM ? "regular files cannot be watched" : undefined;
      throw systemError(result, "epoll_ctl", `watching descriptor ${fd}`, advice);
    }
    this.#watch = result;
  }

  /** Keep the process alive while the watch goes on (the default). No effect after `close`. */
  ref(): void {
    if (this.#watch !== undefined) native().watchRef(this.#watch, true);
  }

  /** Let the process end although the watch goes on. No effect after `close`. */
  unref(): void {
    if (this.#watch !== undefined) native().watchRef(this.#watch, false);
  }

  /** End the watch; no callback runs afterwards. The descriptor stays open. Idempotent. */
  close(): void {
    if (this.#watch === undefined) return;
    native().watchClose(this.#watch);
    this.#watch = undefined;
  }
}
