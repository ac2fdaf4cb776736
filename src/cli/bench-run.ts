/** The measuring loops of `virtio bench`: they keep so many requests in flight, and count. */

import { randomFillSync } from "node:crypto";
import { setImmediate as nextTurn } from "node:timers/promises";
import type { BlockDevice, CompletionMode, VirtioBlkQueue } from "../devices/blk/index.js";
import { blkError } from "../devices/blk/status.js";
import { rangeError, VirtioError } from "../errors.js";
import type { DeviceBuffer } from "../memory/index.js";
import { SECTOR_SIZE } from "../protocol/blk.js";
import { type TargetOptions, Targets } from "./bench-targets.js";
import { VerifiedTargets } from "./bench-verify.js";
import { LatencyHistogram } from "./histogram.js";

/** What to measure. */
export interface BenchJob extends TargetOptions {
  /** Requests in flight. */
  readonly depth: number;
  /** Whether to check what was written, in reads between the writes and in a pass after the measurement. */
  readonly verify: boolean;
  readonly mode: CompletionMode;
  readonly api: "callback" | "promise";
  /** Milliseconds before counting begins, in which the engine compiles what is hot. */
  readonly rampMs: number;
  /** Milliseconds of counting. */
  readonly runMs: number;
}

/** What was measured. */
export interface BenchResult {
  /** Milliseconds of counting. */
  readonly ms: number;
  /** Latencies of the requests that completed in that time. */
  readonly latency: LatencyHistogram;
  /** Processor time that this process used in that time, in microseconds. */
  readonly cpuMicros: number;
  /** Reads that were compared with what had been written. */
  readonly checked: number;
}

/** Polls between two turns of the event loop, in which a lost device is noticed: a millisecond or more. */
const POLLS_PER_TURN = 100_000;
/** Milliseconds without a completion after which the device counts as dead. */
const SILENCE_MS = 10_000;
const NOTHING = Promise.resolve();

/**
 * Run one job on an open device that nobody else uses.
 *
 * @param watch - is given the counts before the measurement begins; what it returns is called when that ends.
 * @throws VirtioError ERR_VIRTIO_IO when the verification finds something else than was written.
 */
export async function runBench(
  disk: BlockDevice,
  job: BenchJob,
  watch: (latency: LatencyHistogram) => () => void = () => () => undefined,
): Promise<BenchResult> {
  if (job.blockSize % disk.blockSize !== 0 || job.blockSize === 0 || job.blockSize > disk.capacity) {
    throw rangeError("--bs", `a multiple of ${disk.blockSize}, at most ${disk.capacity}`, job.blockSize);
  }
  const meter = new Meter(job);
  const memory = await disk.allocate(job.depth * job.blockSize);
  if (job.writes !== "none") fillWithNoise(memory.bytes);
  const targets = job.verify ? new VerifiedTargets(job, disk.capacity, memory.bytes) : new Targets(job, disk.capacity);
  const run = runner(disk, job, meter, targets, memory);
  const unwatch = watch(meter.latency);
  try {
    meter.start();
    await run();
  } finally {
    unwatch();
  }
  if (targets.failure === undefined && targets.readBack()) {
    meter.runUncounted();
    await run();
  }
  if (targets.failure !== undefined) throw targets.failure;
  return { ...meter.result(), checked: targets.checked };
}

/** What keeps requests in flight until the meter or the targets say that it is enough. */
function runner(
  disk: BlockDevice,
  job: BenchJob,
  meter: Meter,
  targets: Targets,
  memory: DeviceBuffer,
): () => Promise<void> {
  if (job.api === "promise") return () => runPromises(disk, job, meter, targets, memory);
  const run = new CallbackRun(disk, job, meter, targets, memory);
  return () => (job.mode === "poll" ? run.poll() : run.listen());
}

/**
 * The clock and the counts. One look at the clock serves a whole batch of completions: it costs as much as a
 * tenth of a request.
 */
class Meter {
  /** Whether requests are to be kept in flight. */
  isRunning = true;
  /** The latencies counted so far. */
  readonly latency = new LatencyHistogram();
  private readonly job: BenchJob;
  /** Milliseconds when the clock was looked at last. In an array: a number that a call returns would be allocated. */
  readonly time = new Float64Array(1);
  /** Whether the next {@link refresh} looks at the clock. */
  isStale = true;
  private isCounting = false;
  private rampEnd = 0;
  private begin = 0;
  private end = 0;
  private cpu = { user: 0, system: 0 };

  constructor(job: BenchJob) {
    this.job = job;
  }

  /** Begin the ramp. */
  start(): void {
    this.refresh();
    this.rampEnd = this.time[0] + this.job.rampMs;
    this.forget();
  }

  /** Keep requests in flight again, after the counting, until there are none. */
  runUncounted(): void {
    this.rampEnd = Number.POSITIVE_INFINITY;
    this.isRunning = true;
    this.forget();
  }

  /** Look at the clock, unless that was done since the last {@link forget}. */
  refresh(): void {
    if (this.isStale) this.look();
  }

  /** The next {@link refresh} looks at the clock again. */
  forget(): void {
    this.isStale = true;
  }

  /** Count a request that was submitted at `since[at]` and completed at the time of the last look. */
  completed(since: Float64Array, at: number): void {
    if (!this.isCounting) return;
    const ns = (this.time[0] - since[at]) * 1e6;
    this.latency.record(ns < 2 ** 31 ? ns | 0 : ns); // a small integer needs no memory
  }

  /** @throws VirtioError ERR_VIRTIO_TIMEOUT when nothing has completed for long. */
  throwIfSilent(): void {
    if (performance.now() - this.time[0] < SILENCE_MS) return;
    throw new VirtioError(
      "ERR_VIRTIO_TIMEOUT",
      `no request completed in ${SILENCE_MS} ms; see whether the device runs`,
    );
  }

  /** The counts, once {@link isRunning} is false. */
  result(): Omit<BenchResult, "checked"> {
    const { user, system } = this.cpu;
    return { ms: this.end - this.begin, latency: this.latency, cpuMicros: user + system };
  }

  private look(): void {
    const now = performance.now();
    this.time[0] = now;
    this.isStale = false;
    if (this.isCounting && now >= this.begin + this.job.runMs) {
      this.isCounting = false;
      this.isRunning = false;
      this.end = now;
      this.cpu = process.cpuUsage(this.cpu);
    } else if (this.isRunning && !this.isCounting && this.rampEnd > 0 && now >= this.rampEnd) {
      this.isCounting = true;
      this.begin = now;
      this.cpu = process.cpuUsage();
    }
  }
}

/** Requests by callbacks on one queue; nothing is allocated per request. */
class CallbackRun {
  private readonly queue: VirtioBlkQueue;
  private readonly job: BenchJob;
  private readonly meter: Meter;
  private readonly targets: Targets;
  private readonly memory: DeviceBuffer;
  private readonly sectorsPerBlock: number;
  /** By slot of the queue: when its request was submitted, and which part of the memory it uses. */
  private readonly since: Float64Array;
  private readonly part: Int32Array;
  /** When the request that has just completed was submitted. In an array, as the meter's clock is. */
  private readonly begun = new Float64Array(1);
  private active = 0;
  private failedStatus = 0;
  private failedType = 0;
  private kickScheduled = false;

  constructor(disk: BlockDevice, job: BenchJob, meter: Meter, targets: Targets, memory: DeviceBuffer) {
    this.queue = disk.takeQueue();
    this.job = job;
    this.meter = meter;
    this.targets = targets;
    this.memory = memory;
    this.sectorsPerBlock = job.blockSize / SECTOR_SIZE;
    this.since = new Float64Array(this.queue.queueSize);
    this.part = new Int32Array(this.queue.queueSize);
    this.queue.onComplete = (slot, status) => this.complete(slot, status);
  }

  /** Poll without a pause, but for a turn of the event loop now and then. */
  async poll(): Promise<void> {
    const { queue, meter } = this;
    queue.mode = "poll";
    this.fill();
    while (this.active > 0) {
      for (let polls = 0; polls < POLLS_PER_TURN && this.active > 0; polls++) {
        if (queue.poll() === 0) continue;
        queue.kick();
        meter.forget();
      }
      this.throwIfFailed();
      meter.throwIfSilent();
      await nextTurn();
    }
    this.throwIfFailed();
  }

  /** Let notifications of the device say when something has completed. */
  async listen(): Promise<void> {
    const { queue, meter } = this;
    queue.mode = this.job.mode;
    const kick = (): void => {
      this.kickScheduled = false;
      queue.kick();
      meter.forget();
    };
    const done = new Promise<void>((resolve, reject) => {
      queue.onError = reject;
      queue.onComplete = (slot, status) => {
        this.complete(slot, status);
        if (this.active === 0) resolve();
        if (this.kickScheduled) return;
        this.kickScheduled = true;
        void NOTHING.then(kick); // a tenth of what queueMicrotask costs
      };
    });
    this.fill();
    await unlessSilent(meter, done);
    this.throwIfFailed();
  }

  private fill(): void {
    for (let part = 0; part < this.job.depth; part++) this.submit(part);
    this.queue.kick();
    this.meter.forget();
  }

  private submit(part: number): void {
    const { blockSize } = this.job;
    const block = this.targets.take(part);
    if (block < 0) return;
    const sector = block * this.sectorsPerBlock;
    const slot = this.targets.isWrite
      ? this.queue.submitWrite(sector, this.memory, part * blockSize, blockSize)
      : this.queue.submitRead(sector, this.memory, part * blockSize, blockSize);
    if (slot < 0)
      throw rangeError("--iodepth", `at most ${this.active}, the ring has no room for more`, this.job.depth);
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
    } else if (!this.targets.completed(this.part[slot])) this.meter.isRunning = false;
    this.begun[0] = this.since[slot];
    if (this.meter.isRunning && this.failedStatus === 0) this.submit(this.part[slot]);
    else this.meter.refresh();
    this.meter.completed(this.begun, 0);
  }

  private throwIfFailed(): void {
    if (this.failedStatus !== 0) throw blkError(this.failedType, this.failedStatus);
  }
}

/** Requests by promises: as many loops as requests in flight, each as a program would write it. */
async function runPromises(
  disk: BlockDevice,
  job: BenchJob,
  meter: Meter,
  targets: Targets,
  memory: DeviceBuffer,
): Promise<void> {
  const { blockSize: length } = job;
  const forget = (): void => meter.forget();
  // All that completes in the same turn of the event loop shares one look at the clock.
  const refresh = (): void => {
    if (meter.isStale && job.mode === "event") process.nextTick(forget);
    // In mode hybrid many round trips fit into one turn, and each is to be timed.
    else if (meter.isStale && job.mode === "hybrid") void NOTHING.then(forget);
    meter.refresh();
  };
  const since = new Float64Array(job.depth);
  const loop = async (part: number): Promise<void> => {
    const options = { position: 0, offset: part * length, length };
    for (let isFirst = true; meter.isRunning; isFirst = false) {
      const block = targets.take(part);
      if (block < 0) return;
      options.position = block * length;
      const request = targets.isWrite ? disk.write(memory, options) : disk.read(memory, options);
      // The clock comes after the device, as it does for callbacks: one look ends the request before and begins this.
      refresh();
      if (!isFirst) meter.completed(since, part);
      since[part] = meter.time[0];
      await request;
      if (!targets.completed(part)) meter.isRunning = false;
    }
  };
  let isDone = false;
  disk.mode = job.mode;
  const loops = Promise.all(Array.from({ length: job.depth }, (_, part) => loop(part)))
    .then(
      () => undefined,
      (error: unknown) => {
        meter.isRunning = false;
        throw error;
      },
    )
    .finally(() => {
      isDone = true;
    });
  const polled = async (): Promise<void> => {
    while (!isDone) {
      for (let polls = 0; polls < POLLS_PER_TURN && !isDone; polls++) {
        disk.poll();
        await NOTHING; // the continuations of what completed run here
        meter.forget();
      }
      await nextTurn();
    }
  };
  // Both are listened to from the start: a request may fail while the other waits for the event loop.
  await unlessSilent(meter, job.mode === "poll" ? Promise.all([polled(), loops]) : loops);
}

/** Wait for `work`, but not for a device that has fallen silent. */
async function unlessSilent(meter: Meter, work: Promise<unknown>): Promise<void> {
  let watchdog: NodeJS.Timeout | undefined;
  const silence = new Promise<never>((_, reject) => {
    watchdog = setInterval(() => {
      try {
        meter.throwIfSilent();
      } catch (error) {
        reject(error);
      }
    }, 1000);
  });
  try {
    await Promise.race([work, silence]);
  } finally {
    clearInterval(watchdog);
  }
}

/** Fill memory with bytes that do not compress. */
function fillWithNoise(bytes: Uint8Array): void {
  const noise = randomFillSync(new Uint8Array(Math.min(bytes.length, 1 << 20)));
  for (let at = 0; at < bytes.length; at += noise.length) bytes.set(noise.subarray(0, bytes.length - at), at);
}
