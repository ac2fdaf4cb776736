/** The virtqueues of a PCI device: their registers, and the notification address of each. */

import { rangeError, VirtioError } from "../../errors.js";
import { VirtioPciCommon } from "../../protocol/virtio-pci.js";
import type { EventFd, RegisterWidth } from "../../sys/index.js";
import { VirtioFeature } from "../../virtqueue/features.js";
import type { QueueNotifier, QueueSetup } from "../transport.js";
import type { PciStructure } from "./capabilities.js";
import type { CommonConfig } from "./common.js";
import type { PciFunction, PciRegisters } from "./function.js";

/** Notification addresses that lie in one page share what makes it reachable. */
const PAGE_BYTES = 4096;
const LOW = 0xffff;

/** How a queue is notified: the register, and what is written into it (virtio 1.3, 4.1.5.2). */
interface Doorbell {
  readonly registers: PciRegisters;
  readonly offset: number;
  readonly width: RegisterWidth;
  /** The lower 16 bits: the queue index, or what the device wants instead of it. */
  readonly value: number;
}

/** A started queue. */
export class PciQueue implements QueueNotifier {
  readonly index: number;
  readonly completion: EventFd;
  private readonly registers: PciRegisters;
  private readonly offset: number;
  private readonly width: RegisterWidth;
  private readonly value: number;
  /** What of the ring position goes along: nothing without NOTIFICATION_DATA. */
  private readonly positionMask: number;
  /** Where it is in its life; `"resetting"` until the device says that it has let go of the memory. */
  state: "running" | "resetting" | "reset" | "closed" = "running";

  constructor(index: number, completion: EventFd, { registers, offset, width, value }: Doorbell) {
    this.index = index;
    this.completion = completion;
    this.registers = registers;
    this.offset = offset;
    this.width = width;
    this.value = value;
    this.positionMask = width === 4 ? ~LOW : 0;
  }

  /**
   * One write of the doorbell, ordered behind everything written to the ring.
   *
   * @throws VirtioError ERR_VIRTIO_CLOSED when the queue does not run.
   */
  notify(data: number): void {
    if (this.state !== "running") throw this.stopped();
    // As a signed number: one above 2^31 would have to be allocated.
    this.registers.write(this.offset, this.width, (data & this.positionMask) | this.value);
  }

  /** It is over. */
  close(): void {
    this.state = "closed";
    this.completion.close();
  }

  private stopped(): VirtioError {
    const advice = this.state === "closed" ? "open the device again" : "call enableQueue first";
    return new VirtioError("ERR_VIRTIO_CLOSED", `queue ${this.index} does not run; ${advice}`);
  }
}

/** The notification structure: doorbells of queues, in stretches of a page that are made reachable when they are needed. */
class Doorbells {
  readonly #fn: PciFunction;
  readonly #structure: PciStructure & { readonly multiplier: number };
  readonly #pages = new Map<number, PciRegisters>();

  constructor(fn: PciFunction, structure: PciStructure & { readonly multiplier: number }) {
    this.#fn = fn;
    this.#structure = structure;
  }

  /**
   * The register at `notifyOff` multiples.
   *
   * @throws VirtioError ERR_VIRTIO_CONFIG when it is not within the structure, or misaligned.
   */
  at(
    notifyOff: number,
    width: RegisterWidth,
    peer: string,
    index: number,
  ): { registers: PciRegisters; offset: number } {
    const { bar, offset, length, multiplier } = this.#structure;
    const relative = notifyOff * multiplier;
    const address = offset + relative;
    if (relative + width > length || address % width !== 0) {
      throw new VirtioError(
        "ERR_VIRTIO_CONFIG",
        `${peer} wants notifications of queue ${index} as ${width} bytes at ${relative} of its notification structure, ` +
          `which begins at ${offset} of BAR ${bar} and has ${length} bytes`,
      );
    }
    const page = address - (address % PAGE_BYTES);
    let registers = this.#pages.get(page);
    if (registers === undefined) {
      registers = this.#fn.openRegisters(bar, page, Math.min(PAGE_BYTES, offset + length - page));
      this.#pages.set(page, registers);
    }
    return { registers, offset: address - page };
  }

  close(): void {
    for (const registers of this.#pages.values()) registers.close();
    this.#pages.clear();
  }
}

/** Sets queues up, register by register (virtio 1.3, 4.1.5.1.3). */
export class PciQueues {
  readonly #common: CommonConfig;
  readonly #peer: string;
  readonly #doorbells: Doorbells;

  constructor(
    fn: PciFunction,
    common: CommonConfig,
    notify: PciStructure & { readonly multiplier: number },
    peer: string,
  ) {
    this.#common = common;
    this.#peer = peer;
    this.#doorbells = new Doorbells(fn, notify);
  }

  /** Descriptors that a queue can have at most, before it is enabled; 0 when there is no such queue. */
  maxSize(index: number): number {
    this.#common.write(VirtioPciCommon.QUEUE_SELECT, index);
    return this.#common.read(VirtioPciCommon.QUEUE_SIZE);
  }

  /**
   * Whether a queue can be set up so. Nothing of it is written.
   *
   * @throws VirtioError ERR_VIRTIO_QUEUES when the device has no such queue; RangeError for a size above the queue's.
   */
  check({ index, size }: QueueSetup): void {
    const most = this.maxSize(index);
    if (most === 0) {
      throw new VirtioError(
        "ERR_VIRTIO_QUEUES",
        `${this.#peer} has no queue ${index}: its size reads as 0; start others, or give the device more`,
      );
    }
    if (size > most) throw rangeError("size", `at most ${most}, the size of queue ${index}`, size);
  }

  /**
   * How a queue is notified.
   *
   * @throws VirtioError ERR_VIRTIO_CONFIG when the device names a place outside of its notification structure.
   */
  doorbell(index: number, features: bigint): Doorbell {
    const common = this.#common;
    const has = (feature: bigint) => (features & feature) !== 0n;
    common.write(VirtioPciCommon.QUEUE_SELECT, index);
    const width = has(VirtioFeature.NOTIFICATION_DATA) ? 4 : 2;
    const place = this.#doorbells.at(common.read(VirtioPciCommon.QUEUE_NOTIFY_OFF), width, this.#peer, index);
    const value = has(VirtioFeature.NOTIF_CONFIG_DATA) ? common.read(VirtioPciCommon.QUEUE_NOTIF_CONFIG_DATA) : index;
    return { ...place, width, value };
  }

  /** Write size and addresses of a queue. */
  configure({ index, size, descriptorArea, driverArea, deviceArea }: QueueSetup): void {
    const common = this.#common;
    common.write(VirtioPciCommon.QUEUE_SELECT, index);
    if (common.read(VirtioPciCommon.QUEUE_SIZE) !== size) common.write(VirtioPciCommon.QUEUE_SIZE, size);
    common.writeAddress(VirtioPciCommon.QUEUE_DESC_LO, VirtioPciCommon.QUEUE_DESC_HI, descriptorArea);
    common.writeAddress(VirtioPciCommon.QUEUE_DRIVER_LO, VirtioPciCommon.QUEUE_DRIVER_HI, driverArea);
    common.writeAddress(VirtioPciCommon.QUEUE_DEVICE_LO, VirtioPciCommon.QUEUE_DEVICE_HI, deviceArea);
  }

  /** Let the device use a queue; everything else of it was written before. */
  enable(index: number): void {
    this.#common.write(VirtioPciCommon.QUEUE_SELECT, index);
    this.#common.write(VirtioPciCommon.QUEUE_ENABLE, 1);
  }

  /** Ask for the reset of a queue; it is done when {@link isResetDone} says so. */
  beginReset(index: number): void {
    this.#common.write(VirtioPciCommon.QUEUE_SELECT, index);
    this.#common.write(VirtioPciCommon.QUEUE_RESET, 1);
  }

  isResetDone(index: number): boolean {
    this.#common.write(VirtioPciCommon.QUEUE_SELECT, index);
    return this.#common.read(VirtioPciCommon.QUEUE_RESET) === 0;
  }

  /** Unmap the doorbells. Idempotent. */
  close(): void {
    this.#doorbells.close();
  }
}
