/** One open device under the load of the torture, from the first call to the last look at every byte of the disk. */

import { setImmediate } from "node:timers/promises";
import type { BlockDevice, BlockStats, VirtioBlkQueue } from "../../src/index.js";
import { TortureFailure } from "./ledger.js";
import { Load, type LoadContext, pollOnce } from "./load.js";
import { QueueLoad } from "./queue-load.js";

/** Calls in flight at a time. */
const DEPTH = 64;
/** Of these, on a queue that was taken, if one was. */
const QUEUE_DEPTH = 24;
/** Bytes of the reads of the last look. */
const LOOK_BYTES = 64 * 1024;

/** What one device has been asked for. */
export interface LifeCounts {
  /** Requests of every kind that have ended, given up or not. */
  requests: number;
  /** Of these, calls that were made to be given up. */
  abandoned: number;
  /** Of these, flushes. */
  flushes: number;
  /** Of these, those of a queue that was taken. */
  lowLevel: number;
}

/** A device that is kept busy: by promises, and on a queue that was taken from it. */
export class Life {
  private readonly context: LoadContext;
  private readonly load: Load;
  private readonly queueLoad: QueueLoad | undefined;

  /** @param queue - one that was taken from the device, to be driven by the low-level API. */
  constructor(context: LoadContext, queue: VirtioBlkQueue | undefined) {
    this.context = context;
    this.queueLoad = queue === undefined ? undefined : new QueueLoad(context, queue);
    this.load = new Load(context);
  }

  /** Begin. */
  start(): void {
    this.context.watch.paused = false;
    this.load.start(this.queueLoad === undefined ? DEPTH : DEPTH - QUEUE_DEPTH);
    this.queueLoad?.start(QUEUE_DEPTH);
  }

  /** Wait until the device has returned everything, also what was given up. The load stays paused. */
  async drain(): Promise<void> {
    const { disk, ledger, watch } = this.context;
    await watch.pause();
    // What was given up makes no promise that one could wait for.
    while (disk.pending > 0 && !watch.over) {
      if (disk.mode === "poll") pollOnce(disk);
      await setImmediate();
    }
    ledger.settle();
  }

  /** Have everything that was acknowledged survive the back-end. */
  async flush(): Promise<void> {
    const { disk, ledger, watch } = this.context;
    const begun = ledger.flushing();
    await watch.wait(disk.flush());
    ledger.flushed(begun);
  }

  /** While the load is paused: change something, `times` times, one after the other. */
  async change(times: number): Promise<void> {
    await this.context.watch.wait(this.load.changes(times));
  }

  /**
   * End, when all is drained: flush, and look at every byte of the disk, as the driver reads it.
   *
   * @throws TortureFailure for a wrong byte, and when the device counts otherwise than every request once.
   */
  async end(): Promise<void> {
    const { disk, watch } = this.context;
    await watch.wait(this.load.stop());
    await this.queueLoad?.stop();
    disk.mode = "event";
    await this.flush();
    await lookAtEveryByte(disk, this.context);
    checkStats(disk.stats());
  }

  /** What was done so far. */
  get counts(): LifeCounts {
    const { counts } = this.load;
    const lowLevel = this.queueLoad?.requests ?? 0;
    const calls = Object.values(counts).reduce((sum, count) => sum + count, 0);
    return {
      requests: calls - counts.allocate + lowLevel,
      ...{ abandoned: counts.abandon, flushes: counts.flush, lowLevel },
    };
  }
}

/** Everything came back, once, with its memory, and nothing failed but what was given up. */
function checkStats(stats: BlockStats): void {
  const { waiting, lentBytes, errors, queues } = stats;
  const isEven = queues.every(({ submitted, completed, inFlight, abandoned }) => {
    return submitted === completed && inFlight === 0 && abandoned === 0;
  });
  const onlyLate = Object.keys(errors).every((code) => code === "ERR_VIRTIO_TIMEOUT");
  if (isEven && onlyLate && waiting === 0 && lentBytes === 0) return;
  throw new TortureFailure(`a device at rest counts ${JSON.stringify(stats)}`);
}

/** Read the whole disk in order. */
async function lookAtEveryByte(disk: BlockDevice, { ledger, watch }: LoadContext): Promise<void> {
  const bytes = new Uint8Array(Math.min(LOOK_BYTES, ledger.bytes));
  for (let position = 0; position < ledger.bytes; position += bytes.length) {
    const length = Math.min(bytes.length, ledger.bytes - position);
    const part = bytes.subarray(0, length);
    const reading = ledger.beginReading(position, length, part);
    await watch.wait(disk.read(part, { position }));
    ledger.endReading(reading, part, "the last look");
    watch.progress();
  }
}
