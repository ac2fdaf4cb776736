/** Interrupts of a PCI function: MSI-X vectors for queues and config, shared where they are few, or INTx with the ISR byte. */

import { VirtioError } from "../../errors.js";
import { VIRTIO_MSI_NO_VECTOR, VirtioPciCommon, VirtioPciIsr } from "../../protocol/virtio-pci.js";
import { EventFd, FdWatcher } from "../../sys/index.js";
import type { CommonConfig } from "./common.js";
import type { PciFunction, PciRegisters } from "./function.js";

/** Which vector each event is given. */
export interface VectorPlan {
  /** Vectors in use, from 0 on. */
  readonly count: number;
  /** The vector of config changes. */
  readonly config: number;
  /** The vector of each queue. */
  readonly queues: readonly number[];
}

/**
 * The ways to give `queues` queues and the config their interrupts with at most `vectors` vectors, best first: one for
 * each; one for the config and one for all queues; one for all.
 */
export function vectorPlans(queues: number, vectors: number): VectorPlan[] {
  const most = Math.min(vectors, queues + 1);
  const counts = [...new Set([most, 2, 1])].filter((count) => count <= most);
  return counts.map((count) => ({
    count,
    config: 0,
    queues: Array.from({ length: queues }, (_, i) => (count === 1 ? 0 : 1 + (i % (count - 1)))),
  }));
}

/** A queue as far as interrupts go. */
export interface InterruptQueue {
  readonly index: number;
  readonly completion: EventFd;
}

/** What `PciInterrupts` needs of the device. */
export interface InterruptSource {
  readonly fn: PciFunction;
  readonly common: CommonConfig;
  /** The ISR byte, where there is one. */
  readonly isr: PciRegisters | undefined;
  /** Vectors of MSI-X. */
  readonly msixVectors: number;
  /** The device, for messages. */
  readonly peer: string;
  /**
   * An interrupt may be about the config.
   *
   * @param isCertain whether it is: false where queues use the same vector.
   */
  readonly onConfig: (isCertain: boolean) => void;
  /** An interrupt came and its reason could not be read. */
  readonly onFailure: (error: unknown) => void;
}

/**
 * The interrupts of a device. A vector of one queue signals the queue's `completion` without our help; one that is
 * shared wakes this thread, which signals all it can be about.
 */
export class PciInterrupts {
  readonly #source: InterruptSource;
  readonly #vectors = new Map<number, number>();
  /** What is to be closed, watchers before their events. */
  #held: { close(): void }[] = [];

  constructor(source: InterruptSource) {
    this.#source = source;
  }

  /**
   * Connect the queues and the config to interrupts; once.
   *
   * @throws VirtioError ERR_VIRTIO_REJECTED when the device takes no vector, ERR_VIRTIO_UNSUPPORTED when it has no
   *   interrupts, and what the function throws.
   */
  connect(queues: readonly InterruptQueue[]): void {
    const { msixVectors, fn, isr, peer } = this.#source;
    if (msixVectors > 0) {
      this.#connectMsix(queues);
    } else if (fn.hasIntx && isr !== undefined) {
      this.#connectIntx(queues, isr);
    } else {
      const lack = fn.hasIntx ? "no MSI-X, and no ISR status to use INTx with" : "neither MSI-X nor INTx";
      throw new VirtioError(
        "ERR_VIRTIO_UNSUPPORTED",
        `${peer} has ${lack}; without interrupts it cannot be driven here`,
      );
    }
  }

  /**
   * Give a queue its vector, again after its reset.
   *
   * @throws VirtioError ERR_VIRTIO_REJECTED when the device does not take it.
   */
  assign(index: number): void {
    const vector = this.#vectors.get(index);
    if (vector === undefined || this.#setQueueVector(index, vector)) return;
    throw new VirtioError(
      "ERR_VIRTIO_REJECTED",
      `${this.#source.peer} does not take MSI-X vector ${vector} for queue ${index} again; close it and open it again`,
    );
  }

  /** Disable what was connected, and forget it. What still waits to be signalled is not. */
  disconnect(): void {
    const { fn, msixVectors } = this.#source;
    if (this.#held.length === 0) return;
    try {
      if (msixVectors > 0) fn.setMsix([]);
      else fn.setIntx(undefined);
    } finally {
      for (const each of this.#held.splice(0)) each.close();
      this.#vectors.clear();
    }
  }

  #connectMsix(queues: readonly InterruptQueue[]): void {
    const { msixVectors, peer } = this.#source;
    for (const plan of vectorPlans(queues.length, msixVectors)) {
      if (this.#enable(plan, queues) && this.#tell(plan, queues)) return;
      this.disconnect();
    }
    throw new VirtioError(
      "ERR_VIRTIO_REJECTED",
      `${peer} takes no MSI-X vector, not even one for everything, though it has ${msixVectors}; reset the function, ` +
        "or have it emulate INTx",
    );
  }

  /** Have MSI-X enabled with the vectors of a plan; false when there are not so many to be had, but perhaps fewer. */
  #enable(plan: VectorPlan, queues: readonly InterruptQueue[]): boolean {
    const events = Array.from({ length: plan.count }, (_, vector) =>
      this.#eventOf(
        queues.filter((__, i) => plan.queues[i] === vector),
        vector === plan.config,
      ),
    );
    queues.forEach(({ index }, i) => this.#vectors.set(index, plan.queues[i]));
    try {
      this.#source.fn.setMsix(events);
      return true;
    } catch (error) {
      if (plan.count === 1) throw error;
      return false;
    }
  }

  /** Tell the device which vector each event has, now that they are enabled; false when it does not take one. */
  #tell(plan: VectorPlan, queues: readonly InterruptQueue[]): boolean {
    const { common } = this.#source;
    common.write(VirtioPciCommon.CONFIG_MSIX_VECTOR, plan.config);
    let isTaken = common.read(VirtioPciCommon.CONFIG_MSIX_VECTOR) === plan.config;
    queues.forEach(({ index }, i) => (isTaken &&= this.#setQueueVector(index, plan.queues[i])));
    if (isTaken) return true;
    common.write(VirtioPciCommon.CONFIG_MSIX_VECTOR, VIRTIO_MSI_NO_VECTOR);
    for (const { index } of queues) this.#setQueueVector(index, VIRTIO_MSI_NO_VECTOR);
    return false;
  }

  #setQueueVector(index: number, vector: number): boolean {
    const { common } = this.#source;
    common.write(VirtioPciCommon.QUEUE_SELECT, index);
    common.write(VirtioPciCommon.QUEUE_MSIX_VECTOR, vector);
    return common.read(VirtioPciCommon.QUEUE_MSIX_VECTOR) === vector;
  }

  /** The event of a vector for these queues, and for the config if it is that, too. */
  #eventOf(queues: readonly InterruptQueue[], isConfig: boolean): EventFd {
    if (queues.length === 1 && !isConfig) return queues[0].completion;
    return this.#watched(() => {
      for (const { completion } of queues) completion.signal();
      if (isConfig) this.#source.onConfig(queues.length === 0);
    });
  }

  #connectIntx(queues: readonly InterruptQueue[], isr: PciRegisters): void {
    const { fn, onConfig, onFailure } = this.#source;
    const event = this.#watched(() => {
      let reason = 0;
      try {
        // Reading takes the line back; only then can it be let through again.
        reason = isr.read(0, 1);
        if ((reason & VirtioPciIsr.QUEUE) !== 0) for (const { completion } of queues) completion.signal();
        fn.unmaskIntx();
      } catch (error) {
        onFailure(error);
        return;
      }
      if ((reason & VirtioPciIsr.CONFIG) !== 0) onConfig(true);
    });
    fn.setIntx(event);
  }

  /** A new event whose signals call `onSignal`. It does not keep the process alive: whoever waits for more does. */
  #watched(onSignal: () => void): EventFd {
    const event = EventFd.create();
    this.#held.push(event);
    const watcher = new FdWatcher(event.fd, { drain: true }, onSignal);
    watcher.unref();
    this.#held.unshift(watcher);
    return event;
  }
}
