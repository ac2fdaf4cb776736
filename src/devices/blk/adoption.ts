/** A thread that drives queues which another one handed over: its stand-in for the transport, and their memory. */

import { MessagePort, receiveMessageOnPort } from "node:worker_threads";
import { checkOptions, rangeError, typeError, VirtioError } from "../../errors.js";
import { BufferPool, MemoryRegion } from "../../memory/index.js";
import type { BlkConfig } from "../../protocol/blk.js";
import { EventFd } from "../../sys/index.js";
import {
  type AdopterMessage,
  type HandedMemory,
  type OpenerMessage,
  plainError,
  type Question,
  SETUP_KIND,
  type Setup,
  virtioError,
} from "./handover-messages.js";
import type { WaitOptions } from "../../transports/transport.js";
import type { BlkControl, BlkMemory } from "./negotiate.js";
import { type AdoptOptions, checkMode, type OpenBlockOptions } from "./options.js";
import { VirtioBlkQueue } from "./queue.js";

/** Milliseconds that the opener waits for the device when nobody said otherwise; its transport's default. */
const DEVICE_TIMEOUT = 10_000;
/** Milliseconds that the opener may take beside for an answer, and for taking queues back. */
const OPENER_TIMEOUT = 5000;

/** What a block device is made of in a thread that adopts queues. */
export interface Adopted {
  readonly control: AdoptedControl;
  readonly config: BlkConfig;
  readonly memory: BlkMemory;
  readonly options: OpenBlockOptions;
}

/**
 * Take what waits on a port of `handOver`.
 *
 * @throws TypeError when there is nothing; VirtioError when the device has ended meanwhile. The port is closed then.
 */
export function adoptQueues(port: unknown, options: AdoptOptions): Adopted {
  if (!(port instanceof MessagePort)) throw typeError("port", "a MessagePort of handOver()", port);
  if (typeof options !== "object" || options === null) throw typeError("options", "an object", options);
  checkOptions("options", options, ["mode"]);
  checkMode(options.mode);
  const setup: unknown = receiveMessageOnPort(port)?.message;
  if (!isSetup(setup)) throw typeError("port", "a port of handOver() that nobody has adopted", setup);
  const regions: MemoryRegion[] = [];
  const started: VirtioBlkQueue[] = [];
  // Said before the news are read, while an opener that closes the device reads after it has said so: one of the two
  // sees the other's word.
  say(port, { type: "adopted" });
  try {
    const news = [];
    for (let next = receiveMessageOnPort(port); next !== undefined; next = receiveMessageOnPort(port)) {
      news.push(next.message as OpenerMessage);
    }
    const config = configAfter(setup, news);
    for (const region of setup.regions) regions.push(MemoryRegion.attach(region));
    const memory = memoryOf(setup, config, regions);
    const control = new AdoptedControl(port, setup, memory.queues, regions);
    const { mode = setup.mode } = options;
    for (const [i, queue] of memory.queues.entries()) {
      started.push(queue);
      queue.start(memory.notifiers[i], mode);
    }
    return { control, config, memory, options: { ...setup.options, mode } };
  } catch (error) {
    for (const queue of started) queue.stop();
    for (const region of regions) region.close();
    say(port, { type: "returned", positions: setup.queues.map(({ position }) => position) });
    port.close();
    throw error;
  }
}

/** What stands in for the transport: the opener's, by way of the port. */
export class AdoptedControl implements BlkControl {
  readonly address: string;
  readonly features: bigint;
  readonly offeredFeatures: bigint;
  readonly maxQueues: number;
  readonly hasConfig: boolean;
  onLost: ((error: Error) => void) | undefined;
  /** Called with the config space whenever the opener has read it, and whether the device had changed it. */
  onConfig: ((config: BlkConfig, isChanged: boolean) => void) | undefined;
  /** Called when the opener closes the device and waits for the queues, for so many milliseconds. */
  onClosing: ((error: VirtioError, timeout: number) => void) | undefined;

  private readonly port: MessagePort;
  private readonly queues: readonly VirtioBlkQueue[];
  private readonly regions: readonly MemoryRegion[];
  private readonly asked = new Map<number, Asked>();
  private nextId = 0;
  /** Why there is nobody to ask any more. */
  private ended: VirtioError | undefined;
  private isPortClosed = false;
  private whenTaken: (() => void) | undefined;

  constructor(port: MessagePort, setup: Setup, queues: readonly VirtioBlkQueue[], regions: readonly MemoryRegion[]) {
    this.port = port;
    this.queues = queues;
    this.regions = regions;
    this.address = setup.address;
    this.features = setup.features;
    this.offeredFeatures = setup.offeredFeatures;
    this.maxQueues = setup.maxQueues;
    this.hasConfig = setup.hasConfig;
  }

  /** Listen to the opener. */
  start(): void {
    this.port.on("message", (message: OpenerMessage) => this.hear(message));
    this.port.on("close", () => {
      this.isPortClosed = true;
      this.lose(new VirtioError("ERR_VIRTIO_DISCONNECTED", `the thread that opened ${this.address} has ended`));
      this.whenTaken?.();
    });
    // What waits for an answer has a timer.
    this.port.unref();
  }

  async readConfig(offset: number, length: number, { timeout }: WaitOptions = {}): Promise<Uint8Array> {
    const { bytes } = await this.ask({ what: "readConfig", offset, length }, timeout);
    if (bytes === undefined) throw new VirtioError("ERR_VIRTIO_PROTOCOL", "an answer without the bytes asked for");
    return bytes;
  }

  async writeConfig(offset: number, bytes: Uint8Array, { timeout }: WaitOptions = {}): Promise<void> {
    await this.ask({ what: "writeConfig", offset, bytes }, timeout);
  }

  /** The device broke a rule here: nobody else shall trust it either. */
  report(error: VirtioError): void {
    if (this.ended !== undefined) return;
    say(this.port, { type: "lost", error: plainError(error) });
    this.end(error);
  }

  /** Give everything back, and wait until the opener has it. */
  async close(): Promise<void> {
    const positions = this.ended === undefined ? this.queues.map(({ position }) => position) : [];
    this.end(new VirtioError("ERR_VIRTIO_CLOSED", `${this.address} is closed`));
    // First: what the opener has back it lends to others.
    for (const region of this.regions) region.close();
    if (this.isPortClosed) return;
    await new Promise<void>((resolve) => {
      const timer = setTimeout(resolve, OPENER_TIMEOUT);
      this.whenTaken = () => {
        clearTimeout(timer);
        resolve();
      };
      say(this.port, { type: "returned", positions });
    });
    this.port.close();
  }

  private hear(message: OpenerMessage): void {
    switch (message.type) {
      case "config":
        this.onConfig?.(message.config, message.isChanged);
        break;
      case "closing":
        this.onClosing?.(closedElsewhere(this.address), message.timeout);
        break;
      case "lost":
        this.lose(virtioError(message.error));
        break;
      case "answer":
        this.asked.get(message.id)?.resolve(message);
        break;
      case "taken":
        this.whenTaken?.();
        break;
    }
  }

  private lose(error: VirtioError): void {
    if (this.ended !== undefined) return;
    this.end(error);
    this.onLost?.(error);
  }

  private end(error: VirtioError): void {
    this.ended ??= error;
    for (const { reject } of this.asked.values()) reject(error);
  }

  /** Have the opener do something on the control channel. */
  private async ask(question: Question, timeout: number | undefined): Promise<Answer> {
    if (this.ended !== undefined) throw this.ended;
    const id = this.nextId++;
    const patience = (timeout ?? DEVICE_TIMEOUT) + OPENER_TIMEOUT;
    let timer: NodeJS.Timeout | undefined;
    try {
      const answer = await new Promise<Answer>((resolve, reject) => {
        timer = setTimeout(() => reject(openerSilent(this.address, patience)), patience);
        this.asked.set(id, { resolve, reject });
        say(this.port, { type: "ask", id, question, timeout });
      });
      if (answer.error !== undefined) throw virtioError(answer.error);
      return answer;
    } finally {
      clearTimeout(timer);
      this.asked.delete(id);
    }
  }
}

function say(port: MessagePort, message: AdopterMessage): void {
  port.postMessage(message);
}

type Answer = Extract<OpenerMessage, { type: "answer" }>;

interface Asked {
  readonly resolve: (answer: Answer) => void;
  readonly reject: (error: VirtioError) => void;
}

function isSetup(message: unknown): message is Setup {
  return typeof message === "object" && message !== null && "kind" in message && message.kind === SETUP_KIND;
}

/** The config space after what the opener said since it handed the queues over. Throws when the device has ended. */
function configAfter({ config, address }: Setup, news: readonly OpenerMessage[]): BlkConfig {
  let latest = config;
  for (const message of news) {
    if (message.type === "config") latest = message.config;
    else if (message.type === "closing") throw closedElsewhere(address);
    else if (message.type === "lost") throw virtioError(message.error);
  }
  return latest;
}

function memoryOf(setup: Setup, config: BlkConfig, regions: readonly MemoryRegion[]): BlkMemory {
  const { features, limits, queueSize } = setup;
  const regionOf = (iova: number): MemoryRegion => {
    const found = regions.find((region) => iova >= region.iova && iova < region.iova + region.size);
    if (found === undefined) throw rangeError("iova", "an address in the memory handed over", iova);
    return found;
  };
  const poolOf = ({ iova, length }: HandedMemory): BufferPool => {
    const pool = new BufferPool(noGrowth);
    const region = regionOf(iova);
    pool.addRegion(region, iova - region.iova, iova - region.iova + length);
    return pool;
  };
  const queues = setup.queues.map(({ index, iova, position }) => {
    const region = regionOf(iova);
    const memory = { buffer: region.buffer, offset: iova - region.iova, iova };
    const capacity = Number(config.capacity);
    return new VirtioBlkQueue({ index, queueSize, features, limits, capacity, memory, resume: position });
  });
  const notifiers = setup.queues.map(({ index, kick, completion }) => {
    // Both stay the opener's; a watcher has a duplicate of its own.
    const kicked = EventFd.fromFd(kick);
    return { index, completion: EventFd.fromFd(completion), notify: () => kicked.signal() };
  });
  return { queues, notifiers, pool: poolOf(setup.lent), bounce: poolOf(setup.bounce), regions: new Set(regions) };
}

function noGrowth(): Promise<MemoryRegion> {
  return Promise.reject(
    new VirtioError(
      "ERR_VIRTIO_MEMORY",
      "the memory that came with the queues does not grow; release buffers, or pass more to handOver()",
    ),
  );
}

function closedElsewhere(address: string): VirtioError {
  return new VirtioError("ERR_VIRTIO_CLOSED", `${address} is closed by the thread that opened it; open it again`);
}

function openerSilent(address: string, patience: number): VirtioError {
  return new VirtioError(
    "ERR_VIRTIO_TIMEOUT",
    `the thread that opened ${address} has not answered for ${patience} ms; it has to give its event loop turns`,
  );
}
