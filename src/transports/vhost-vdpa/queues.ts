/** The queues of a vhost-vdpa device while they run: eventfds, and the one that tells of changes of the device. */

import { VirtioError } from "../../errors.js";
import { statusNames, VirtioStatus } from "../../protocol/device-status.js";
import { VRING_BASE_PACKED, VRING_BASE_SPLIT } from "../../protocol/vhost-user.js";
import { EventFd, FdWatcher } from "../../sys/index.js";
import type { StatusSequence } from "../status.js";
import type { QueueNotifier, QueueSetup } from "../transport.js";
import type { VdpaControl } from "./control.js";

/** A started queue: the two eventfds that it shares with the kernel. */
class VdpaQueue implements QueueNotifier {
  readonly index: number;
  readonly completion: EventFd;
  readonly kick: EventFd;

  constructor(index: number, make: () => EventFd) {
    this.index = index;
    this.completion = make();
    this.kick = make();
  }

  /** The value of `VIRTIO_F_NOTIFICATION_DATA` has no way through an eventfd and is not taken. */
  notify(): void {
    this.kick.signal();
  }
}

/** All queues of one device. */
export class VdpaQueues {
  readonly #control: VdpaControl;
  readonly #status: StatusSequence;
  readonly #peer: string;
  readonly #onChange: () => void;
  readonly #events: EventFd[] = [];
  #watcher: FdWatcher | undefined = undefined;
  #queues: VdpaQueue[] = [];

  /**
   * @param peer the device, for messages.
   * @param onChange called when the device says that its config space or its status has changed.
   */
  constructor(control: VdpaControl, status: StatusSequence, peer: string, onChange: () => void) {
    this.#control = control;
    this.#status = status;
    this.#peer = peer;
    this.#onChange = onChange;
  }

  /** Whether queues are started, or about to be. */
  get running(): boolean {
    return this.#events.length > 0;
  }

  /** Start the queues. When this throws, the device is marked FAILED and all eventfds are closed. */
  start(setups: readonly QueueSetup[], packed: boolean): QueueNotifier[] {
    try {
      const make = (): EventFd => {
        const event = EventFd.create();
        this.#events.push(event);
        return event;
      };
      this.#queues = setups.map(({ index }) => new VdpaQueue(index, make));
      setups.forEach((setup, i) => {
        this.#control.setUpQueue(setup, packed ? VRING_BASE_PACKED : VRING_BASE_SPLIT, this.#queues[i]);
      });
      const change = make();
      this.#watcher = new FdWatcher(change.fd, { drain: true }, this.#onChange);
      this.#watcher.unref();
      this.#control.setConfigCall(change);
      this.#status.driverOk();
      this.#checkLive();
      return [...this.#queues];
    } catch (error) {
      this.#status.giveUp();
      this.close();
      throw error;
    }
  }

  /** A device that does not come up, as when the program behind it is gone, says so by its status alone. */
  #checkLive(): void {
    const status = this.#control.readStatus();
    if ((status & VirtioStatus.DRIVER_OK) !== 0) return;
    throw new VirtioError(
      "ERR_VIRTIO_STATUS",
      `${this.#peer} does not start: its status is ${statusNames(status)} after DRIVER_OK was written; ` +
        "see the log of what serves it",
    );
  }

  /** Notify every queue, for what was made available while nobody looked. */
  notifyAll(): void {
    for (const queue of this.#queues) queue.notify();
  }

  /** Free the eventfds; the kernel has its own references. Idempotent. */
  close(): void {
    this.#watcher?.close();
    this.#watcher = undefined;
    this.#queues = [];
    for (const event of this.#events.splice(0)) event.close();
  }
}
