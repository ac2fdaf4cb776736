/** The interrupts of a PCI function by VFIO: each signals an event descriptor. */

import { checkInteger, VirtioError } from "../../errors.js";
import {
  decodeVfioIrqInfo,
  encodeVfioIrqSet,
  VfioIrqFlag,
  VfioIrqSetFlag,
  VfioPciIrq,
  VfioSize,
} from "../../protocol/vfio.js";
import type { EventFd } from "../../sys/index.js";
import { vfioQuery, vfioRequest } from "./vfio-requests.js";

/** A kind of interrupt that can be enabled. */
type Kind = keyof typeof VfioPciIrq;

/** Which interrupts a function has, and which are enabled. */
export class VfioInterrupts {
  readonly #fd: number;
  readonly #name: string;
  readonly #counts: Readonly<Record<Kind, number>>;
  readonly #enabled = new Set<Kind>();

  /**
   * @param fd of the device; stays the caller's.
   * @param name the function, for messages.
   * @param kinds how many kinds of interrupts VFIO says that it has.
   */
  constructor(fd: number, name: string, kinds: number) {
    this.#fd = fd;
    this.#name = name;
    const count = (kind: Kind): number => {
      if (VfioPciIrq[kind] >= kinds) return 0;
      const question = {
        size: VfioSize.IRQ_INFO,
        index: VfioPciIrq[kind],
        what: `asking for the interrupts of ${name}`,
      };
      const info = decodeVfioIrqInfo(vfioQuery(fd, "DEVICE_GET_IRQ_INFO", question));
      return (info.flags & VfioIrqFlag.EVENTFD) === 0 ? 0 : info.count;
    };
    this.#counts = { INTX: count("INTX"), MSIX: count("MSIX"), REQ: count("REQ") };
  }

  /** How many there are of a kind. */
  count(kind: Kind): number {
    return this.#counts[kind];
  }

  /**
   * Let the interrupts of a kind, from the first one on, signal these events; none disables them. All are set at once:
   * where some are enabled they are disabled first, since few devices can add more (`VFIO_IRQ_INFO_NORESIZE`).
   *
   * @throws RangeError when there are fewer of this kind. VirtioError ERR_VIRTIO_SYSCALL when the kernel refuses,
   *   ERR_VIRTIO_QUEUES when the machine has fewer vectors left. What was enabled is disabled then.
   */
  set(kind: Kind, events: readonly EventFd[]): void {
    checkInteger("events.length", events.length, 0, this.#counts[kind]);
    if (this.#enabled.has(kind)) {
      this.#request(kind, `disabling ${kind}`, { action: VfioIrqSetFlag.ACTION_TRIGGER });
      this.#enabled.delete(kind);
    }
    if (events.length === 0) return;
    const fds = events.map(({ fd }) => fd);
    this.#request(kind, `enabling ${events.length} of ${kind}`, { action: VfioIrqSetFlag.ACTION_TRIGGER, fds });
    this.#enabled.add(kind);
  }

  /** Let an interrupt that was masked when it signalled do so again. */
  unmask(kind: Kind): void {
    this.#request(kind, `unmasking ${kind}`, { action: VfioIrqSetFlag.ACTION_UNMASK, count: 1 });
  }

  /** Disable all that is enabled. */
  close(): void {
    for (const kind of this.#enabled) this.set(kind, []);
  }

  #request(kind: Kind, what: string, set: { action: number; count?: number; fds?: readonly number[] }): void {
    const bytes = encodeVfioIrqSet({ index: VfioPciIrq[kind], ...set });
    const given = vfioRequest(this.#fd, "DEVICE_SET_IRQS", bytes, `${what} of ${this.#name}`, {
      EINVAL: { advice: "MSI-X and INTx exclude each other: disable the one before the other is enabled" },
      ENOSPC: { advice: "the machine has no interrupt vector left; use fewer queues, or unbind other devices" },
    });
    // Not an error for the kernel, though it has enabled nothing: as many as there are, fewer than were asked for.
    if (given > 0) {
      throw new VirtioError(
        "ERR_VIRTIO_QUEUES",
        `${what} of ${this.#name}: the machine has ${given} interrupt vectors left; use fewer queues`,
      );
    }
  }
}
