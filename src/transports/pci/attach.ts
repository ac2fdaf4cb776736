/** The first steps with a PCI device: found, answering, reset, acknowledged; and the last, however far those came. */

import { setImmediate as nextTurn } from "node:timers/promises";
import { VirtioError } from "../../errors.js";
import { PciCommand, PciConfigField, VirtioPciCommon } from "../../protocol/virtio-pci.js";
import { VIRTQUEUE_MAX_SIZE } from "../../virtqueue/defs.js";
import { Lifetime, quietly } from "../lifetime.js";
import { StatusSequence } from "../status.js";
import type { WaitOptions } from "../transport.js";
import { checkWait, DEFAULT_TIMEOUT } from "../wait.js";
import { type PciLayout, type PciStructure, readLayout } from "./capabilities.js";
import { CommonConfig, commonLength } from "./common.js";
import { DeviceConfig, MAX_CONFIG_BYTES } from "./config.js";
import type { PciFunction, PciRegisters } from "./function.js";

/** Queues whose size is read in one turn of the event loop. */
const QUEUES_PER_TURN = 256;

/** The queues of a device. */
export interface QueueLimits {
  /** The last queue that there is, + 1. */
  readonly maxQueues: number;
  /** The size that all of them take. */
  readonly maxQueueSize: number;
}

/** A function whose virtio device is reset and acknowledged. */
export class AttachedDevice {
  readonly fn: PciFunction;
  readonly layout: PciLayout;
  /** The device, for messages. */
  readonly peer: string;
  readonly timeout: number;
  readonly lifetime: Lifetime;
  readonly common: CommonConfig;
  readonly isr: PciRegisters | undefined;
  readonly config: DeviceConfig | undefined;
  readonly status: StatusSequence;
  readonly #command: CommandRegister;
  readonly #registers: PciRegisters[] = [];

  private constructor(fn: PciFunction, layout: PciLayout, timeout: number) {
    this.fn = fn;
    this.layout = layout;
    this.timeout = timeout;
    this.peer = `the PCI device ${fn.address}`;
    this.lifetime = new Lifetime(this.peer);
    const { common, isr, device } = layout;
    const structures = [common, isr, device].filter((each) => each !== undefined);
    const isIo = (structure: PciStructure) => structure.isIo;
    this.#command = new CommandRegister(fn, [...structures, layout.notify].some(isIo));
    try {
      // Registers answer only then.
      this.#command.decode();
      this.common = new CommonConfig(this.#open(common, commonLength(common.length)), this.lifetime, this.peer);
      this.isr = isr && this.#open(isr, 1);
      this.config =
        device &&
        new DeviceConfig(
          this.#open(device, Math.min(device.length, MAX_CONFIG_BYTES)),
          this.common,
          layout.deviceType,
          this.peer,
        );
      this.status = new StatusSequence(this.common, this.peer, timeout);
    } catch (error) {
      this.release();
      throw error;
    }
  }

  /**
   * Find the device of a function, reset and acknowledge it.
   *
   * @throws what {@link readLayout} and the function throw, VirtioError ERR_VIRTIO_TIMEOUT, `signal.reason`. What was
   *   done to the function is undone then; it is not closed.
   */
  static async attach(fn: PciFunction, options: WaitOptions): Promise<AttachedDevice> {
    const wait = checkWait(options, DEFAULT_TIMEOUT);
    wait.signal?.throwIfAborted();
    const device = new AttachedDevice(fn, readLayout(fn), wait.timeout);
    try {
      await device.#reset(wait);
      // Not before the reset: whoever had the device before may have left it running.
      device.#command.master();
      device.status.acknowledge();
      return device;
    } catch (error) {
      device.release();
      throw error;
    }
  }

  /** Ask for the sizes of all queues. */
  async readQueueLimits({ signal }: WaitOptions): Promise<QueueLimits> {
    const { common } = this;
    const count = common.read(VirtioPciCommon.NUM_QUEUES);
    let maxQueues = 0;
    let maxQueueSize = VIRTQUEUE_MAX_SIZE;
    for (let index = 0; index < count; index++) {
      if (index % QUEUES_PER_TURN === QUEUES_PER_TURN - 1) {
        await nextTurn();
        signal?.throwIfAborted();
      }
      common.write(VirtioPciCommon.QUEUE_SELECT, index);
      const size = common.read(VirtioPciCommon.QUEUE_SIZE);
      if (size === 0) continue;
      maxQueues = index + 1;
      maxQueueSize = Math.min(maxQueueSize, size);
    }
    // What was read of a device that vanished meanwhile is worth nothing.
    common.readStatus();
    return { maxQueues, maxQueueSize };
  }

  /** No access to memory and no MSI-X message of the device from now on. */
  stopMaster(): void {
    this.#command.stopMaster();
  }

  /** Unmap the registers, and leave the function deaf and mute. Goes on where a step fails. */
  release(): void {
    for (const registers of this.#registers.splice(0)) quietly(() => registers.close());
    quietly(() => this.#command.off());
  }

  #open({ bar, offset }: PciStructure, length: number): PciRegisters {
    const registers = this.fn.openRegisters(bar, offset, length);
    this.#registers.push(registers);
    return registers;
  }

  /** Reset the device; where it does not finish, reset the function with all that is in it, and try once more. */
  async #reset(wait: WaitOptions): Promise<void> {
    const { fn, status } = this;
    try {
      await status.reset(wait);
    } catch (error) {
      const isStuck = error instanceof VirtioError && error.code === "ERR_VIRTIO_TIMEOUT";
      if (!isStuck || !fn.canReset) throw error;
      fn.reset();
      this.#command.decode();
      await status.reset(wait);
    }
  }
}

/** The PCI command register. Bits that are none of our business stay as they were found. */
class CommandRegister {
  readonly #fn: PciFunction;
  readonly #found: number;
  readonly #decoding: number;

  constructor(fn: PciFunction, usesIo: boolean) {
    const { MEMORY, IO, MASTER } = PciCommand;
    this.#fn = fn;
    this.#decoding = usesIo ? MEMORY | IO : MEMORY;
    const { offset, width } = PciConfigField.COMMAND;
    this.#found = fn.readConfig(offset, width) & ~(MEMORY | IO | MASTER);
  }

  /** Answer in the BARs, and nothing else. */
  decode(): void {
    this.#write(this.#decoding);
  }

  /** Access memory and send MSI-X messages, too. */
  master(): void {
    this.#write(this.#decoding | PciCommand.MASTER);
  }

  stopMaster(): void {
    this.#write(this.#decoding);
  }

  off(): void {
    this.#write(0);
  }

  #write(bits: number): void {
    const { offset, width } = PciConfigField.COMMAND;
    this.#fn.writeConfig(offset, width, this.#found | bits);
  }
}
