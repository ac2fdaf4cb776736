/** The thread that opened a block device: queues that it hands over to other threads, and what comes back of them. */

import { MessageChannel, type MessagePort, receiveMessageOnPort } from "node:worker_threads";
import { checkInteger, checkOptions, typeError, VirtioError } from "../../errors.js";
import type { DeviceBuffer, MemoryRegion } from "../../memory/index.js";
import type { BlkConfig } from "../../protocol/blk.js";
import { closeFd, duplicateFd } from "../../sys/index.js";
import type { QueueNotifier } from "../../transports/transport.js";
import { type AdopterMessage, type OpenerMessage, plainError, type Question } from "./handover-messages.js";
import { SETUP_KIND, type Setup, virtioError } from "./handover-messages.js";
import type { BlkControl, BlkMemory } from "./negotiate.js";
import type { HandOverOptions, OpenBlockOptions } from "./options.js";
import { VirtioBlkQueue } from "./queue.js";
import type { Scheduler } from "./scheduler.js";

/** Memory to be lent by a thread that named no other amount. */
const LENT_BYTES = 16 * 1024 * 1024;
/** Memory for copies, beside: a few of the largest requests. */
const BOUNCE_BYTES = 4 * 1024 * 1024;
/** Milliseconds beyond their own time limit that other threads have to hear of the end and to answer. */
const CALL_BACK_MARGIN = 1000;
/** The pool lends whole granules. */
const GRANULE = 4096;

/** The device whose queues are handed over. */
export interface HandoverHost {
  readonly options: OpenBlockOptions;
  /** Why the device takes no more calls, when it does not. */
  ended(): VirtioError | undefined;
  /** Reads the config space again and passes it on to all threads. */
  refresh(): Promise<unknown>;
  /** Ends the device: a queue of it broke elsewhere. */
  lose(error: VirtioError): void;
}

/** What one port stands for. */
interface Handover {
  readonly port: MessagePort;
  readonly queues: readonly VirtioBlkQueue[];
  readonly positions: readonly number[];
  readonly buffer: DeviceBuffer;
  /** Duplicates for the other thread, which uses them by their numbers: closed when it is done, never before. */
  readonly fds: number[];
  isAdopted: boolean;
}

/**
 * All queues of a device that other threads drive. Descriptors are numbers of the whole process and outlive a thread
 * that is terminated, so this side makes the duplicates and closes them: when the other thread has given its queues
 * back, or when its end of the port is closed, as it is when the thread ends in whatever way. Until then nothing that
 * it may touch goes away, even if the device does.
 */
export class Handovers {
  private readonly control: BlkControl;
  private readonly memory: BlkMemory;
  private readonly scheduler: Scheduler;
  private readonly host: HandoverHost;
  private readonly out = new Set<Handover>();
  private config: BlkConfig;
  private gone = 0;
  private whenAllBack: (() => void) | undefined;

  constructor(control: BlkControl, memory: BlkMemory, scheduler: Scheduler, config: BlkConfig, host: HandoverHost) {
    this.control = control;
    this.memory = memory;
    this.scheduler = scheduler;
    this.config = config;
    this.host = host;
  }

  /** See `BlockDevice.handOver`. */
  async handOver(options: HandOverOptions): Promise<MessagePort> {
    if (typeof options !== "object" || options === null) throw typeError("options", "an object", options);
    checkOptions("options", options, ["queues", "memory"]);
    const count = checkInteger("queues", options.queues ?? 1, 1, 65536);
    const lent = Math.ceil(checkInteger("memory", options.memory ?? LENT_BYTES, 0) / GRANULE) * GRANULE;
    this.throwIfEnded();
    const queues = this.takeQueues(count);
    let buffer: DeviceBuffer | undefined;
    const fds: number[] = [];
    try {
      buffer = await this.memory.pool.allocate(lent + BOUNCE_BYTES);
      this.throwIfEnded();
      const { setup, positions } = this.describe(queues, buffer, lent, fds);
      for (const queue of queues) queue.fail(handedOver(queue.index));
      return this.open({ queues, positions, buffer, fds, isAdopted: false }, setup);
    } catch (error) {
      for (const fd of fds) closeFd(fd);
      buffer?.release();
      if (this.host.ended() === undefined) for (const queue of queues) this.scheduler.addQueue(queue);
      throw error;
    }
  }

  /** Whether another thread drives queues. */
  get areOut(): boolean {
    return this.out.size > 0;
  }

  /** Tell all threads what the config space is now, and whether the device has changed it. */
  tellConfig(config: BlkConfig, isChanged: boolean): void {
    this.config = config;
    this.tellAll({ type: "config", config, isChanged });
  }

  /** Tell all threads that the device has ended; there is nothing more to wait for. */
  tellLost(error: VirtioError): void {
    this.tellAll({ type: "lost", error: plainError(error) });
    this.whenAllBack?.();
  }

  /**
   * Have all threads end what is in flight there, for which each waits `timeout` milliseconds at most, and give their
   * queues back. Resolves when all that adopted some have done so, or a little later.
   */
  async callBack(timeout: number): Promise<void> {
    this.tellAll({ type: "closing", timeout });
    for (const handover of this.out) {
      let next = receiveMessageOnPort(handover.port);
      for (; next !== undefined; next = receiveMessageOnPort(handover.port)) {
        this.hear(handover, next.message as AdopterMessage);
      }
    }
    if (this.allBack) return;
    await new Promise<void>((resolve) => {
      const timer = setTimeout(resolve, timeout + CALL_BACK_MARGIN);
      this.whenAllBack = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }

  /** Take queues from the scheduler, all or none. */
  private takeQueues(count: number): VirtioBlkQueue[] {
    const { control, memory, scheduler } = this;
    if (memory.notifiers.some(({ kick }) => kick === undefined)) {
      throw new VirtioError(
        "ERR_VIRTIO_UNSUPPORTED",
        `queues of ${control.address} can be handed over by the thread that opened it only, and only where ` +
          "notifications are eventfds",
      );
    }
    const queues = scheduler.removeQueues(count);
    if (queues !== undefined) return queues;
    const lost = this.gone === 0 ? "" : ` (${this.gone} went with threads that ended without close())`;
    throw new VirtioError(
      "ERR_VIRTIO_QUEUES",
      `${count} queue(s) were asked for and ${scheduler.queues} are left${lost}; wait until some are given back, or ` +
        "open the device with more",
    );
  }

  private describe(
    queues: readonly VirtioBlkQueue[],
    buffer: DeviceBuffer,
    lent: number,
    fds: number[],
  ): { setup: Setup; positions: number[] } {
    const { control, config, scheduler, host } = this;
    const duplicate = (fd: number): number => {
      const copy = duplicateFd(fd);
      fds.push(copy);
      return copy;
    };
    const regions = new Set([buffer.region, ...queues.map((queue) => this.regionOf(queue))]);
    const handed = queues.map(({ index, setup, position }) => {
      const { kick, completion } = this.notifierOf(index);
      if (kick === undefined || position === undefined) throw new Error(`queue ${index} was taken and is not idle`);
      return {
        ...{ index, iova: setup.descriptorArea, position },
        kick: duplicate(kick.fd),
        completion: duplicate(completion.fd),
      };
    });
    const { readOnly, capacity, timeout } = host.options;
    const [{ queueSize, limits }] = queues;
    const iova = buffer.iovaHi * 2 ** 32 + buffer.iovaLo;
    const { address, features, offeredFeatures, maxQueues, hasConfig } = control;
    const setup: Setup = {
      ...{ kind: SETUP_KIND, address, features, offeredFeatures, maxQueues, hasConfig, config, mode: scheduler.mode },
      options: {
        ...(readOnly !== undefined && { readOnly }),
        ...(capacity !== undefined && { capacity }),
        ...(timeout !== undefined && { timeout }),
      },
      ...{ queueSize, limits, queues: handed },
      regions: [...regions].map(({ fd, size, iova: start }) => ({ fd: duplicate(fd), size, iova: start })),
      lent: { iova, length: lent },
      bounce: { iova: iova + lent, length: BOUNCE_BYTES },
    };
    return { setup, positions: handed.map(({ position }) => position) };
  }

  /** Make the port. What it holds back until somebody adopts it comes first. */
  private open(parts: Omit<Handover, "port">, setup: Setup): MessagePort {
    const { port1, port2 } = new MessageChannel();
    const handover = { ...parts, port: port1 };
    this.out.add(handover);
    port1.postMessage(setup);
    port1.on("message", (message: AdopterMessage) => this.hear(handover, message));
    port1.on("close", () => this.portClosed(handover));
    // Whoever waits for another thread has the Worker itself, and `close` a timer.
    port1.unref();
    return port2;
  }

  private hear(handover: Handover, message: AdopterMessage): void {
    switch (message.type) {
      case "adopted":
        handover.isAdopted = true;
        break;
      case "ask":
        void this.answer(handover, message.id, message.question, message.timeout);
        break;
      case "lost":
        this.host.lose(virtioError(message.error));
        break;
      case "returned":
        this.takeBack(handover, message.positions);
        tell(handover, { type: "taken" });
        break;
    }
  }

  private async answer(handover: Handover, id: number, question: Question, timeout: number | undefined): Promise<void> {
    const { control } = this;
    const wait = timeout === undefined ? {} : { timeout };
    try {
      if (question.what === "readConfig") {
        const bytes = await control.readConfig(question.offset, question.length, wait);
        tell(handover, { type: "answer", id, bytes });
      } else {
        await control.writeConfig(question.offset, question.bytes, wait);
        await this.host.refresh();
        tell(handover, { type: "answer", id });
      }
    } catch (error) {
      tell(handover, { type: "answer", id, error: plainError(error) });
    }
  }

  /** The other end of the port is closed: the thread has given everything back before, or it has ended. */
  private portClosed(handover: Handover): void {
    // What nobody adopted is as it was; what somebody did may be in the hands of the device.
    if (this.out.has(handover)) this.takeBack(handover, handover.isAdopted ? [] : handover.positions);
  }

  /** The other thread touches nothing any more. Queues without a position, and memory of theirs, are lost. */
  private takeBack(handover: Handover, positions: readonly (number | undefined)[]): void {
    if (!this.out.delete(handover)) return;
    for (const fd of handover.fds) closeFd(fd);
    handover.queues.forEach((queue, i) => {
      const position = positions[i];
      if (position === undefined) this.gone++;
      else this.useOrLose(queue, position);
    });
    // What is still in flight, in rings or by descriptors, keeps its memory until the device is closed.
    if (handover.queues.every((_, i) => positions[i] !== undefined)) handover.buffer.release();
    if (this.allBack) this.whenAllBack?.();
  }

  /** As {@link use}. Nobody who could be told waits for it: a queue that this thread cannot drive is the device's end. */
  private useOrLose(queue: VirtioBlkQueue, position: number): void {
    try {
      this.use(queue, position);
    } catch (error) {
      if (!(error instanceof VirtioError)) throw error;
      this.host.lose(error);
    }
  }

  /** Drive a queue from this thread again. */
  private use({ index, queueSize, limits, setup }: VirtioBlkQueue, position: number): void {
    const { control, memory, scheduler, config } = this;
    if (this.host.ended() !== undefined) return;
    const region = this.regionOf({ setup });
    const iova = setup.descriptorArea;
    const queue = new VirtioBlkQueue({
      ...{ index, queueSize, limits, features: control.features, capacity: Number(config.capacity), resume: position },
      memory: { buffer: region.buffer, offset: iova - region.iova, iova },
    });
    memory.queues[memory.queues.findIndex((old) => old.index === index)] = queue;
    queue.start(this.notifierOf(index), scheduler.mode);
    scheduler.addQueue(queue);
  }

  private get allBack(): boolean {
    for (const { isAdopted } of this.out) if (isAdopted) return false;
    return true;
  }

  private throwIfEnded(): void {
    const ended = this.host.ended();
    if (ended !== undefined) throw ended;
  }

  private regionOf({ setup }: Pick<VirtioBlkQueue, "setup">): MemoryRegion {
    const { descriptorArea } = setup;
    for (const region of this.memory.regions) {
      if (descriptorArea >= region.iova && descriptorArea < region.iova + region.size) return region;
    }
    throw new Error(`no region has the address ${descriptorArea}`);
  }

  private notifierOf(index: number): QueueNotifier {
    const notifier = this.memory.notifiers.find((each) => each.index === index);
    if (notifier === undefined) throw new Error(`queue ${index} was never started`);
    return notifier;
  }

  private tellAll(message: OpenerMessage): void {
    for (const handover of this.out) tell(handover, message);
  }
}

function tell({ port }: Handover, message: OpenerMessage): void {
  port.postMessage(message);
}

function handedOver(index: number): VirtioError {
  return new VirtioError("ERR_VIRTIO_CLOSED", `queue ${index} was handed over to another thread`);
}
