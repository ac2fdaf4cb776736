/** What the driver's half of a ring costs a request, without a device: `npm run bench:ring`. */

import { performance, PerformanceObserver } from "node:perf_hooks";
import { SegmentList, VirtioFeature, Virtqueue, VirtqueueLayout } from "../src/virtqueue/index.js";
import { type MinimalDevice, MinimalPackedDevice, MinimalSplitDevice } from "./minimal-device.js";
import { median, spread, writeResult } from "./report.js";

const QUEUE_SIZE = 256;
const TABLE_ENTRIES = 12;
const IOVA = 0x20_0000;
const REQUESTS = 2_000_000;
const ROUNDS = 5;
const WARM_UP = 2;
const GARBAGE_REQUESTS = 10_000_000;
const SCATTER = 10;

interface Case {
  readonly packed: boolean;
  readonly indirect: boolean;
  readonly batch: number;
  /** Data elements; 1 is a 4 KiB read by `addFramed`, more by `addFramedList`. */
  readonly segments: number;
}

class Setup {
  readonly queue: Virtqueue;
  readonly device: MinimalDevice;
  private readonly words: Int32Array;
  private readonly bytes: Uint8Array;
  private readonly list = new SegmentList(SCATTER);
  private sum = 0;

  constructor({ packed, indirect, segments }: Case) {
    const features =
      VirtioFeature.VERSION_1 |
      VirtioFeature.EVENT_IDX |
      (packed ? VirtioFeature.RING_PACKED : 0n) |
      (indirect ? VirtioFeature.INDIRECT_DESC : 0n);
    const layout = new VirtqueueLayout({ queueSize: QUEUE_SIZE, features, request: { size: 32, align: 16 } });
    const tables = layout.endOffset;
    const buffer = new ArrayBuffer(tables + QUEUE_SIZE * TABLE_ENTRIES * 16);
    this.queue = new Virtqueue({
      ...{ layout, buffer, iova: IOVA, features },
      frame: { headerLength: 16, trailerOffset: 16, trailerLength: 1 },
      indirect: { offset: tables, iova: IOVA + tables, entries: TABLE_ENTRIES },
    });
    const ringCount = indirect ? 1 : segments + 2;
    this.device = packed ? new MinimalPackedDevice(buffer, layout, ringCount) : new MinimalSplitDevice(buffer, layout);
    this.words = new Int32Array(buffer, this.queue.requestOffset, QUEUE_SIZE * 8);
    this.bytes = new Uint8Array(buffer, this.queue.requestOffset, QUEUE_SIZE * 32);
  }

  /** Requests one after the other in batches; returns nanoseconds a request, the device's share included. */
  run(requests: number, batch: number, segments: number): number {
    const start = performance.now();
    for (let done = 0; done < requests; done += batch) {
      for (let i = 0; i < batch; i++) {
        if (segments === 1) this.submit(done + i);
        else this.submitScatter(done + i, segments);
      }
      this.queue.publish();
      this.device.run();
      this.reap();
    }
    if (this.sum < 0) throw new Error("unreachable: keeps the status reads alive");
    return ((performance.now() - start) * 1e6) / requests;
  }

  /** The device alone. */
  runDevice(requests: number, batch: number): number {
    const start = performance.now();
    for (let done = 0; done < requests; done += batch) {
      this.device.replay(batch);
      this.device.run();
    }
    return ((performance.now() - start) * 1e6) / requests;
  }

  /** What a virtio-blk read writes: chain, header, status. */
  private submit(sector: number): void {
    const slot = this.queue.addFramed(0x100_0000, 0, 4096, true);
    this.words[slot * 8] = 0;
    this.words[slot * 8 + 2] = sector;
    this.words[slot * 8 + 3] = 0;
    this.bytes[slot * 32 + 16] = 0xff;
  }

  private submitScatter(sector: number, segments: number): void {
    const { queue, list } = this;
    list.clear();
    for (let i = 0; i < segments; i++) list.add(0x100_0000 + i * 4096, 0, 4096);
    const slot = queue.addFramedList(list, true);
    this.words[slot * 8] = 0;
    this.words[slot * 8 + 2] = sector;
    this.words[slot * 8 + 3] = 0;
    this.bytes[slot * 32 + 16] = 0xff;
  }

  private reap(): void {
    for (let slot = this.queue.poll(); slot >= 0; slot = this.queue.poll()) this.sum += this.bytes[slot * 32 + 16];
  }
}

function measure(choice: Case): string[] {
  const { packed, indirect, batch, segments } = choice;
  const totals: number[] = [];
  const devices: number[] = [];
  for (let round = -WARM_UP; round < ROUNDS; round++) {
    const total = new Setup(choice).run(REQUESTS, batch, segments);
    const device = new Setup(choice).runDevice(REQUESTS, batch);
    if (round < 0) continue;
    totals.push(total);
    devices.push(device);
  }
  const driver = totals.map((total, i) => total - devices[i]);
  return [
    packed ? "packed" : "split",
    indirect ? "indirect" : "direct",
    segments === 1 ? "read of 3 elements" : `scatter of ${segments} segments`,
    String(batch),
    median(driver).toFixed(1),
    spread(driver),
    median(devices).toFixed(1),
  ];
}

/** Run without a pause and watch the collector. */
function garbage(packed: boolean): Promise<string> {
  const choice = { packed, indirect: true, batch: 32, segments: 1 };
  const setup = new Setup(choice);
  setup.run(REQUESTS, 32, 1);
  let major = 0;
  let minor = 0;
  const observer = new PerformanceObserver((list) => {
    for (const { detail } of list.getEntries() as unknown as { detail: { kind: number } }[]) {
      if (detail.kind === MAJOR) major++;
      else minor++;
    }
  });
  observer.observe({ entryTypes: ["gc"] });
  const before = process.memoryUsage().heapUsed;
  setup.run(GARBAGE_REQUESTS, 32, 1);
  const grown = process.memoryUsage().heapUsed - before;
  // The observer is told in later turns of the event loop.
  return new Promise((resolve) => {
    setTimeout(() => {
      observer.disconnect();
      const what = `${GARBAGE_REQUESTS / 1e6} million requests, ${packed ? "packed" : "split"}`;
      resolve(`${what}: ${major} major and ${minor} minor collections, heap ${(grown / 1024).toFixed(0)} KiB larger`);
    }, 100);
  });
}

/** `NODE_PERFORMANCE_GC_MAJOR`. */
const MAJOR = 4;

const cases: Case[] = [];
for (const packed of [false, true]) {
  for (const indirect of [false, true]) {
    for (const batch of [32, 1]) cases.push({ packed, indirect, batch, segments: 1 });
    cases.push({ packed, indirect, batch: 8, segments: SCATTER });
  }
}
const rows = cases.map(measure);
const notes = [await garbage(false), await garbage(true)];
writeResult("ring", {
  title: "Cost of the driver's half of a ring",
  command: "npm run bench:ring",
  text: `Nanoseconds of driver per request (submit, publish, reap) on a ring of ${QUEUE_SIZE}, median and spread of ${ROUNDS} rounds; the cost of the minimal device, measured alone, is subtracted and shown.`,
  columns: ["format", "descriptors", "request", "batch", "driver ns", "min to max", "device ns"],
  rows,
  notes,
});
