/** The steps of the initialization by the status field (virtio 1.3, clause 3.1.1), for transports that have it as a register. */

import { setTimeout as sleep } from "node:timers/promises";
import { VirtioError } from "../errors.js";
import { statusNames, VirtioStatus } from "../protocol/device-status.js";
import type { WaitOptions } from "./transport.js";
import { checkWait, DEFAULT_TIMEOUT } from "./wait.js";

/** The status field of a device; writing 0 resets it. */
export interface StatusRegister {
  /** The status byte as the device has it now. */
  readStatus(): number;
  /** Write the status byte. */
  writeStatus(status: number): void;
}

/** Milliseconds between two looks at a device that has not finished its reset. */
const RESET_INTERVAL = 1;

/** Walks a device through its initialization. No bit is ever cleared but by a reset. */
export class StatusSequence {
  readonly #register: StatusRegister;
  readonly #peer: string;
  readonly #timeout: number;
  #written = 0;

  /**
   * @param peer the device, for messages.
   * @param timeout milliseconds that a reset may take when nobody says otherwise.
   */
  constructor(register: StatusRegister, peer: string, timeout: number = DEFAULT_TIMEOUT) {
    this.#register = register;
    this.#peer = peer;
    this.#timeout = timeout;
  }

  /**
   * Reset the device and wait until it says that it is: the status reads 0.
   *
   * @throws VirtioError ERR_VIRTIO_TIMEOUT when it does not in time; `signal.reason` when aborted.
   */
  async reset(options: WaitOptions = {}): Promise<void> {
    const { timeout, signal } = checkWait(options, this.#timeout);
    signal?.throwIfAborted();
    this.#written = 0;
    this.#register.writeStatus(0);
    const end = performance.now() + timeout;
    for (let status = this.#register.readStatus(); status !== 0; status = this.#register.readStatus()) {
      if (performance.now() >= end) {
        throw new VirtioError(
          "ERR_VIRTIO_TIMEOUT",
          `${this.#peer} did not finish its reset within ${timeout} ms, its status is still ${statusNames(status)}; ` +
            'it may be stuck: raise "timeout", or reset the whole device',
        );
      }
      await sleep(RESET_INTERVAL);
      signal?.throwIfAborted();
    }
  }

  /** ACKNOWLEDGE, then DRIVER: we have seen the device, and know how to drive it. */
  acknowledge(): void {
    this.#add(VirtioStatus.ACKNOWLEDGE);
    this.#add(VirtioStatus.DRIVER);
  }

  /**
   * FEATURES_OK, read back: the device says whether it takes the features that were written before.
   *
   * @throws VirtioError ERR_VIRTIO_FEATURES when it does not; the device is marked FAILED then.
   */
  featuresOk(features: bigint): void {
    this.#add(VirtioStatus.FEATURES_OK);
    if ((this.#register.readStatus() & VirtioStatus.FEATURES_OK) !== 0) return;
    this.fail();
    throw new VirtioError(
      "ERR_VIRTIO_FEATURES",
      `${this.#peer} refuses the features 0x${features.toString(16)}: FEATURES_OK reads back as 0; ` +
        "ask for fewer of them",
    );
  }

  /** DRIVER_OK: the device is live from here on, and may be notified. */
  driverOk(): void {
    this.#add(VirtioStatus.DRIVER_OK);
  }

  /** FAILED: the driver has given up; only a reset makes the device usable again. */
  fail(): void {
    this.#add(VirtioStatus.FAILED);
  }

  /** FAILED, as far as the device lets itself be told: for one who has an error to report that matters more. */
  giveUp(): void {
    if ((this.#written & VirtioStatus.FAILED) !== 0) return;
    try {
      this.fail();
    } catch {
      // The device is unreachable, too, and nothing can be said to it.
    }
  }

  /** Whether the device has met an error from which only a reset recovers. */
  get needsReset(): boolean {
    return (this.#register.readStatus() & VirtioStatus.DEVICE_NEEDS_RESET) !== 0;
  }

  #add(bit: number): void {
    this.#written |= bit;
    this.#register.writeStatus(this.#written);
  }
}
