/** The loops of the benchmark of threads: 4 KiB reads, so many in flight on each queue, counted between two times. */

import { setImmediate as nextTurn } from "node:timers/promises";
import { isMainThread, type MessagePort, parentPort } from "node:worker_threads";
import { BlockDevice, type CompletionMode, type DeviceBuffer, type VirtioBlkQueue } from "../src/index.js";

const BLOCK = 4096;
const SECTORS_PER_BLOCK = BLOCK / 512;
/** Looks at every queue between two looks at the clock. */
const LOOKS_PER_CLOCK = 256;
/** Milliseconds between two turns of the event loop. */
const TURN_MS = 1;

/** What to do, and when: times are those of {@link now}. */
export interface Job {
  /** Callbacks are polled on each queue by itself; promises are spread over the queues by the device. */
  readonly api: "callbacks" | "promises";
  /** Requests in flight on each queue. */
  readonly depth: number;
  readonly begin: number;
  readonly end: number;
}

/** What was counted. */
export interface Count {
  readonly requests: number;
  readonly ms: number;
}

/** What a worker is sent. */
export interface WorkerJob {
  readonly ports: readonly MessagePort[];
  readonly job: Job;
}

/** How a job's devices learn of completions. */
export function modeOf({ api }: Pick<Job, "api">): CompletionMode {
  return api === "callbacks" ? "poll" : "hybrid";
}

/** Milliseconds on a clock that all threads share. */
export function now(): number {
  return Number(process.hrtime.bigint()) / 1e6;
}

/** Drive all queues of the devices in this thread. */
export function drive(disks: readonly BlockDevice[], job: Job): Promise<Count> {
  return job.api === "callbacks" ? pollQueues(disks, job) : awaitReads(disks, job);
}

/** Random places on a disk, as many as a mask allows: a division per request would be measured, too. */
class Places {
  private readonly mask: number;
  private state = 1;

  constructor(capacity: number) {
    this.mask = 2 ** Math.floor(Math.log2(capacity / BLOCK)) - 1;
  }

  /** Number of a block. */
  next(): number {
    this.state = (Math.imul(this.state, 1664525) + 1013904223) | 0;
    return (this.state >>> 8) & this.mask;
  }
}

/** One queue, kept full. */
class QueueRun {
  readonly queue: VirtioBlkQueue;
  /** Requests completed. */
  done = 0;
  /** Whether what completes is followed by another request. */
  isRunning = true;
  private readonly places: Places;
  /** By slot: the buffer of its request. */
  private readonly buffers: DeviceBuffer[];
  private failed = 0;

  /** @param buffers - one for each request in flight. */
  constructor(queue: VirtioBlkQueue, buffers: readonly DeviceBuffer[], capacity: number) {
    this.queue = queue;
    this.places = new Places(capacity);
    this.buffers = new Array<DeviceBuffer>(queue.queueSize).fill(buffers[0]);
    queue.onComplete = (slot, status) => {
      this.done++;
      this.failed |= status;
      if (this.isRunning) this.submit(this.buffers[slot]);
    };
    for (const buffer of buffers) this.submit(buffer);
    queue.kick();
  }

  look(): void {
    if (this.queue.poll() > 0) this.queue.kick();
  }

  throwIfFailed(): void {
    if (this.failed !== 0) throw new Error(`a request ended with status ${this.failed}`);
  }

  private submit(buffer: DeviceBuffer): void {
    const slot = this.queue.submitRead(this.places.next() * SECTORS_PER_BLOCK, buffer, 0, BLOCK);
    this.buffers[slot] = buffer;
  }
}

async function pollQueues(disks: readonly BlockDevice[], { depth, begin, end }: Job): Promise<Count> {
  const runs: QueueRun[] = [];
  for (const disk of disks) {
    const { queues } = disk.info;
    for (let i = 0; i < queues; i++) {
      const buffers = await Promise.all(Array.from({ length: depth }, () => disk.allocate(BLOCK)));
      runs.push(new QueueRun(disk.takeQueue(), buffers, disk.capacity));
    }
  }
  const total = (): number => runs.reduce((sum, { done }) => sum + done, 0);
  let before = 0;
  let since = 0;
  for (let turn = now(); ; ) {
    for (let i = 0; i < LOOKS_PER_CLOCK; i++) for (const run of runs) run.look();
    const time = now();
    if (since === 0 && time >= begin) {
      before = total();
      since = time;
    }
    if (time >= end) {
      const count = { requests: total() - before, ms: time - since };
      await drain(runs);
      return count;
    }
    if (time - turn < TURN_MS) continue;
    await nextTurn();
    turn = now();
  }
}

async function drain(runs: readonly QueueRun[]): Promise<void> {
  for (const run of runs) run.isRunning = false;
  while (runs.some(({ queue }) => queue.inFlight > 0)) {
    for (const run of runs) run.look();
    await nextTurn();
  }
  for (const run of runs) run.throwIfFailed();
}

async function awaitReads(disks: readonly BlockDevice[], { depth, begin, end }: Job): Promise<Count> {
  let done = 0;
  let before = 0;
  let since = 0;
  let until = 0;
  const loop = async (disk: BlockDevice, places: Places): Promise<void> => {
    const buffer = await disk.allocate(BLOCK);
    while (until === 0) {
      await disk.read(buffer, { position: places.next() * BLOCK });
      if ((++done & 63) !== 0) continue;
      const time = now();
      if (since === 0 && time >= begin) {
        before = done;
        since = time;
      } else if (since > 0 && time >= end && until === 0) {
        until = time;
        before = done - before;
      }
    }
    buffer.release();
  };
  const loops = disks.flatMap((disk) => {
    const places = new Places(disk.capacity);
    return Array.from({ length: depth * disk.info.queues }, () => loop(disk, places));
  });
  await Promise.all(loops);
  return { requests: before, ms: until - since };
}

/** A worker's part: adopt, drive, give back, tell. */
if (!isMainThread) {
  parentPort?.once("message", async ({ ports, job }: WorkerJob) => {
    const disks = await Promise.all(ports.map((port) => BlockDevice.adopt(port, { mode: modeOf(job) })));
    const count = await drive(disks, job);
    for (const disk of disks) await disk.close();
    parentPort?.postMessage(count);
  });
}
