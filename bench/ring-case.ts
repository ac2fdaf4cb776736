/**
 * One case of the ring benchmark, written as a script is that drives a queue: the queue is a constant of the module.
 * Imported once per case with the case in the address, so that each has harness code of its own, while all of them
 * share the code of the rings.
 */

import { performance } from "node:perf_hooks";
import { VirtioFeature, Virtqueue, VirtqueueLayout } from "../src/virtqueue/index.js";
import { MinimalPackedDevice, MinimalSplitDevice } from "./minimal-device.js";

const QUEUE_SIZE = 256;
const TABLE_ENTRIES = 12;
const IOVA = 0x20_0000;

const query = new URL(import.meta.url).searchParams;
const packed = query.get("packed") === "true";
const indirect = query.get("indirect") === "true";
const segments = Number(query.get("segments"));
const batch = Number(query.get("batch"));

const features =
  VirtioFeature.VERSION_1 |
  VirtioFeature.EVENT_IDX |
  (packed ? VirtioFeature.RING_PACKED : 0n) |
  (indirect ? VirtioFeature.INDIRECT_DESC : 0n);
const layout = new VirtqueueLayout({ queueSize: QUEUE_SIZE, features, request: { size: 32, align: 16 } });
const tables = layout.endOffset;
const buffer = new ArrayBuffer(tables + QUEUE_SIZE * TABLE_ENTRIES * 16);
const queue = new Virtqueue({
  ...{ layout, buffer, iova: IOVA, features },
  frame: { headerLength: 16, trailerOffset: 16, trailerLength: 1 },
  indirect: { offset: tables, iova: IOVA + tables, entries: TABLE_ENTRIES },
});
const ringCount = indirect ? 1 : segments + 2;
const device = packed ? new MinimalPackedDevice(buffer, layout, ringCount) : new MinimalSplitDevice(buffer, layout);
const words = new Int32Array(buffer, queue.requestOffset, QUEUE_SIZE * 8);
const bytes = new Uint8Array(buffer, queue.requestOffset, QUEUE_SIZE * 32);
let statuses = 0;

let sector = 0;
const submitBatch = (): void => {
  for (const end = sector + batch; sector < end; sector++) {
    if (segments === 1) submit();
    else submitScatter();
  }
  queue.publish();
};
const runMinimalDevice = (): void => device.run();
/** As `VirtioBlkQueue.poll` does: no look more when nothing is in flight. */
const reap = (): void => {
  do {
    const slot = queue.poll();
    if (slot < 0) break;
    statuses |= bytes[slot * 32 + 16];
  } while (queue.inFlight > 0);
};
// Called by way of an array, the steps stay functions of their own, as they are in a program: in one loop the engine
// would put them into each other until a limit is reached, somewhere in the midst of one of them.
const steps = [submitBatch, runMinimalDevice, reap];

/** Requests one after the other in batches; returns nanoseconds a request, the device's share included. */
export function run(requests: number): number {
  sector = 0;
  const start = performance.now();
  while (sector < requests) for (let i = 0; i < steps.length; i++) steps[i]();
  const end = performance.now();
  if (statuses !== 0xff || queue.inFlight !== 0) throw new Error(`status ${statuses}: a request was lost`);
  return ((end - start) * 1e6) / requests;
}

/** The device alone. */
export function runDevice(requests: number): number {
  const alone = new ArrayBuffer(buffer.byteLength);
  const again = packed ? new MinimalPackedDevice(alone, layout, ringCount) : new MinimalSplitDevice(alone, layout);
  const replay = [(): void => again.replay(batch), (): void => again.run()];
  const start = performance.now();
  for (let done = 0; done < requests; done += batch) for (let i = 0; i < replay.length; i++) replay[i]();
  return ((performance.now() - start) * 1e6) / requests;
}

/** What a virtio-blk read of 4 KiB writes: chain, header, status. */
function submit(): void {
  writeRequest(queue.addFramed(0x100_0000, 0, 4096, true));
}

function submitScatter(): void {
  const slot = queue.beginFramed(segments, true);
  for (let i = 0; i < segments; i++) queue.segments.add(0x100_0000 + i * 4096, 0, 4096);
  queue.commitFramed();
  writeRequest(slot);
}

function writeRequest(slot: number): void {
  words[slot * 8] = 0;
  words[slot * 8 + 2] = sector;
  words[slot * 8 + 3] = 0;
  bytes[slot * 32 + 16] = 0xff;
}
