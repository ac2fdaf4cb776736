/** The end of a transport: noticed once, told once, and remembered for whoever calls afterwards. */

import { VirtioError } from "../errors.js";

/** Whether a device can still be used, and if not, why. */
export class Lifetime {
  readonly #peer: string;
  #ended: VirtioError | undefined = undefined;
  #onLost: ((error: Error) => void) | undefined = undefined;
  #told = false;
  #closing: Promise<void> | undefined = undefined;

  /** @param peer the device, for messages. */
  constructor(peer: string) {
    this.#peer = peer;
  }

  /** Why the device can no longer be used; undefined while it can. */
  get ended(): VirtioError | undefined {
    return this.#ended;
  }

  /** Whether it has ended, or is being closed. */
  get isOver(): boolean {
    return this.#ended !== undefined || this.#closing !== undefined;
  }

  /** Called once, in a microtask, when the device is gone; soon when it already is. */
  get onLost(): ((error: Error) => void) | undefined {
    return this.#onLost;
  }

  set onLost(callback: ((error: Error) => void) | undefined) {
    this.#onLost = callback;
    this.#tell();
  }

  /** The error of one who calls after `close`. */
  closedError(): VirtioError {
    return new VirtioError("ERR_VIRTIO_CLOSED", `the connection to ${this.#peer} is closed; open it again`);
  }

  /**
   * The device is gone. Only the first reason counts.
   *
   * @returns whether this was the first.
   */
  end(error: VirtioError): boolean {
    if (this.#ended !== undefined) return false;
    this.#ended = error;
    this.#tell();
    return true;
  }

  /** Close once: `shutDown` runs at the first call, which all calls await. */
  close(shutDown: () => Promise<void>): Promise<void> {
    this.#closing ??= shutDown();
    return this.#closing;
  }

  /**
   * Let nobody use a device that is closed or gone.
   *
   * @throws VirtioError ERR_VIRTIO_CLOSED, or what the device ended with.
   */
  check(): void {
    if (this.#closing !== undefined) throw this.closedError();
    if (this.#ended !== undefined) throw this.#ended;
  }

  #tell(): void {
    const callback = this.#onLost;
    const error = this.#ended;
    if (callback === undefined || error === undefined || this.#told) return;
    this.#told = true;
    queueMicrotask(() => callback(error));
  }
}

/**
 * A step of giving a device back. What it answers no longer matters: closing the device takes everything from it, and
 * what led here has been told.
 */
export function quietly(step: () => void): void {
  try {
    step();
  } catch {
    // See above.
  }
}
