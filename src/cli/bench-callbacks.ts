/** Requests of `virtio bench` by callbacks: each job keeps a queue of its own filled, nothing is allocated per request. */

import { setImmediate as nextTurn } from "node:timers/promises";
import type { VirtioBlkQueue } from "../devices/blk/index.js";
import { blkError } from "../devices/blk/status.js";
import { rangeError } from "../errors.js";
import type { DeviceBuffer } from "../memory/index.js";
import { SECTOR_SIZE } from "../protocol/blk.js";
import { type BenchPlan, type Job, LOOKS_PER_REQUEST, LOOKS_PER_TURN } from "./bench-plan.js";
import type { Meter } from "./bench-meter.js";

const NOTHING = Promise.resolve();

/** One job on its queue. */
export class CallbackRun {
  /** Requests in flight. */
  active = 0;
  private readonly queue: VirtioBlkQueue;
  private readonly plan: BenchPlan;
  private readonly meter: Meter;
  private readonly job: Job<DeviceBuffer>;
  private readonly sectorsPerBlock: number;
  /** By slot of the queue: when its request was submitted, and which part of the memory it uses. */
  private readonly since: Float64Array;
  private readonly part: Int32Array;
  /** When the request that has just completed was submitted. In an array, as the meter's clock is. */
  private readonly begun = new Float64Array(1);
  private failedStatus = 0;
  private failedType = 0;
  private kickScheduled = false;

  constructor(queue: VirtioBlkQueue, plan: BenchPlan, meter: Meter, job: Job<DeviceBuffer>) {
    this.queue = queue;
    this.plan = plan;
    this.meter = meter;
    this.job = job;
    this.sectorsPerBlock = plan.blockSize / SECTOR_SIZE;
    this.since = new Float64Array(queue.queueSize);
    this.part = new Int32Array(queue.queueSize);
    this.queue.onComplete = (slot, status) => this.complete(slot, status);
  }

  /** Submit as many requests as the plan wants in flight, in the plan's mode. */
  fill(): void {
    this.queue.mode = this.plan.mode;
    for (let part = 0; part < this.plan.depth; part++) this.submit(part);
    this.queue.kick();
    this.meter.forget();
  }

  /** Reap what has completed and kick what that led to; returns how many requests completed. */
  poll(): number {
    const count = this.queue.poll();
    if (count === 0) return 0;
    this.queue.kick();
    this.meter.forget();
    return count;
  }

  /** Fill the queue, and let notifications of the device say when something has completed; until nothing is in flight. */
  listen(): Promise<void> {
    const { queue, meter } = this;
    const kick = (): void => {
      this.kickScheduled = false;
      queue.kick();
      meter.forget();
    };
    return new Promise<void>((resolve, reject) => {
      queue.onError = reject;
      queue.onComplete = (slot, status) => {
        this.complete(slot, status);
        if (this.active === 0) resolve();
        if (this.kickScheduled) return;
        this.kickScheduled = true;
        void NOTHING.then(kick); // a tenth of what queueMicrotask costs
      };
      this.fill();
    });
  }

  /** @throws VirtioError ERR_VIRTIO_IO and the like, when the device failed a request. */
  throwIfFailed(): void {
    if (this.failedStatus !== 0) throw blkError(this.failedType, this.failedStatus);
  }

  private submit(part: number): void {
    const { blockSize } = this.plan;
    const { targets, memory } = this.job;
    const block = targets.take(part);
    if (block < 0) return;
    const sector = block * this.sectorsPerBlock;
    const slot = targets.isWrite
      ? this.queue.submitWrite(sector, memory[part], 0, blockSize)
      : this.queue.submitRead(sector, memory[part], 0, blockSize);
    if (slot < 0)
      throw rangeError("--iodepth", `at most ${this.active}, the ring has no room for more`, this.plan.depth);
    // A device with nothing to do goes to sleep within a microsecond: it is served before the clock is.
    if (++this.active === 1) this.queue.kick();
    this.meter.refresh();
    this.since[slot] = this.meter.time[0];
    this.part[slot] = part;
  }

  private complete(slot: number, status: number): void {
    this.active--;
    if (status !== 0) {
      this.failedStatus = status;
      this.failedType = this.queue.requestType(slot);
      this.meter.isRunning = false;
    } else if (!this.job.targets.completed(this.part[slot])) this.meter.isRunning = false;
    this.begun[0] = this.since[slot];
    if (this.meter.isRunning) this.submit(this.part[slot]);
    else this.meter.refresh();
    this.meter.completed(this.job.latency, this.begun, 0);
  }
}

/** Poll the queues in turn without a pause, but for a turn of the event loop now and then, until nothing is in flight. */
export async function pollAll(runs: readonly CallbackRun[], meter: Meter): Promise<void> {
  for (const run of runs) run.fill();
  for (let active = 1; active > 0; ) {
    for (let left = LOOKS_PER_TURN; left > 0 && active > 0; ) {
      active = 0;
      for (let i = 0; i < runs.length; i++) {
        left -= 1 + runs[i].poll() * LOOKS_PER_REQUEST;
        active += runs[i].active;
      }
    }
    for (const run of runs) run.throwIfFailed();
    meter.throwIfSilent();
    await nextTurn();
  }
}
