/** Driver and device in two threads on the same memory: no torn request, no lost wake-up, in many rounds. */

import assert from "node:assert/strict";
import { once } from "node:events";
import { test } from "node:test";
import { Worker } from "node:worker_threads";
import { closeFd, createMemfd, mapShared, unmapShared } from "../../src/sys/index.js";
import { VirtioFeature, Virtqueue, VirtqueueLayout } from "../../src/virtqueue/index.js";
import {
  Aim,
  BELL_DEVICE,
  BELL_DRIVER,
  BELLS_BYTES,
  BELLS_STOP,
  DEVICE_SLEEPS,
  STRESS_BASE,
  STRESS_BYTES,
  STRESS_DATA_OFFSET,
  STRESS_FRAME,
  STRESS_REQUEST,
  type StressSetup,
  waitFor,
} from "./driver-stress-shared.js";

const ROUNDS = 100_000;
/** Sleeps of the driver below which the test would say little. */
const MIN_SLEEPS = 100;

/** Requests after which the other side is the one that sleeps. */
const PHASE = 4096;
/** Looks into the ring after which a driver that need not sleep does so: the device has lost a wake-up. */
const PATIENCE = 20_000;

interface Variant {
  readonly packed: boolean;
  readonly eventIdx: boolean;
  readonly inOrder: boolean;
  readonly tables: number;
  readonly queueSize: number;
}

for (const [name, variant] of [
  ["SPLIT-DRV-24 SPLIT-DRV-25 split", { packed: false, eventIdx: false, inOrder: false, tables: 0, queueSize: 16 }],
  [
    "SPLIT-DRV-24 SPLIT-DRV-25 split, EVENT_IDX",
    { packed: false, eventIdx: true, inOrder: false, tables: 3, queueSize: 16 },
  ],
  [
    "SPLIT-DRV-24 SPLIT-DRV-25 split, IN_ORDER",
    { packed: false, eventIdx: true, inOrder: true, tables: 0, queueSize: 16 },
  ],
  ["PACKED-DRV-15 PACKED-DRV-16 packed", { packed: true, eventIdx: false, inOrder: false, tables: 0, queueSize: 13 }],
  [
    "PACKED-DRV-15 PACKED-DRV-16 packed, EVENT_IDX",
    { packed: true, eventIdx: true, inOrder: false, tables: 3, queueSize: 13 },
  ],
  [
    "PACKED-DRV-15 PACKED-DRV-16 packed, IN_ORDER",
    { packed: true, eventIdx: true, inOrder: true, tables: 0, queueSize: 13 },
  ],
] as const satisfies readonly (readonly [string, Variant])[]) {
  test(`${name}: ${ROUNDS} requests between two threads that sleep`, async () => {
    const fd = createMemfd("virtio-driver-stress", STRESS_BYTES);
    const buffer = mapShared(fd, STRESS_BYTES);
    try {
      await stress(fd, buffer, variant);
    } finally {
      unmapShared(buffer);
      closeFd(fd);
    }
  });
}

async function stress(fd: number, buffer: ArrayBuffer, variant: Variant): Promise<void> {
  const { packed, eventIdx, inOrder, tables, queueSize } = variant;
  const features =
    VirtioFeature.VERSION_1 |
    (packed ? VirtioFeature.RING_PACKED : 0n) |
    (eventIdx ? VirtioFeature.EVENT_IDX : 0n) |
    (inOrder ? VirtioFeature.IN_ORDER : 0n) |
    (tables > 0 ? VirtioFeature.INDIRECT_DESC : 0n);
  const layout = new VirtqueueLayout({ queueSize, features, request: STRESS_REQUEST });
  const offset = layout.endOffset;
  const queue = new Virtqueue({
    ...{ layout, buffer, iova: STRESS_BASE, features },
    ...(tables > 0 && { indirect: { offset, iova: STRESS_BASE + offset, entries: tables } }),
  });
  const doorbells = new SharedArrayBuffer(BELLS_BYTES);
  const bells = new Int32Array(doorbells);
  const setup: StressSetup = { fd, features, queueSize, inOrder, doorbells };
  const worker = new Worker(new URL("./driver-stress-worker.js", import.meta.url), { workerData: setup });
  const exited = new Promise((resolve) => worker.once("exit", resolve));
  assert.deepEqual(await once(worker, "message"), ["ready"]);
  const messages: unknown[] = [];
  worker.on("message", (message) => messages.push(message));
  try {
    const sleeps = drive(queue, layout, buffer, bells);
    assert.ok(sleeps >= MIN_SLEEPS, `the driver slept ${sleeps} times only`);
  } catch (error) {
    Atomics.store(bells, BELLS_STOP, 1);
    ringDevice(bells);
    await exited;
    throw messages[0] ?? error;
  }
  Atomics.store(bells, BELLS_STOP, 1);
  ringDevice(bells);
  await exited;
  assert.deepEqual(messages, []);
}

/** Send and check all requests, in bursts of changing length; returns how often the driver slept. */
function drive(queue: Virtqueue, layout: VirtqueueLayout, buffer: ArrayBuffer, bells: Int32Array): number {
  const words = new Uint32Array(buffer);
  const bytes = new Uint8Array(buffer);
  const { queueSize } = layout;
  const inSlot = new Float64Array(queueSize).fill(-1);
  const dataIova = STRESS_BASE + layout.reqOffset + STRESS_DATA_OFFSET;
  const hi = Math.floor(STRESS_BASE / 2 ** 32);
  let sent = 0;
  let done = 0;
  let sleeps = 0;
  let idle = 0;
  let random = 99;
  const aim = new Aim();
  while (done < ROUNDS) {
    random = (random * 1103515245 + 12345) & 0x7fffffff;
    // Mostly one at a time, and one side that goes to sleep just when the other one goes on: that is where a
    // missing barrier loses a wake-up. Now and then as many as fit.
    const burst = random % 64 === 0 ? queueSize : 1;
    const deviceSleeps = Math.floor(sent / PHASE) % 2 === 0;
    Atomics.store(bells, DEVICE_SLEEPS, deviceSleeps ? 1 : 0);
    for (let i = 0; i < burst && sent < ROUNDS; i++) {
      const slot = submit(queue, layout, dataIova, hi);
      if (slot < 0) break;
      assert.equal(inSlot[slot], -1);
      inSlot[slot] = sent;
      const at = queue.slotOffset(slot);
      words[at / 4] = sent;
      words[at / 4 + 1] = sent ^ 0x5a5a_5a5a;
      words[at / 4 + 2] = sent;
      words[at / 4 + 3] = sent;
      words[(at + STRESS_DATA_OFFSET) / 4] = 0xdead_beef;
      bytes[at + STRESS_FRAME.trailerOffset] = 0xff;
      sent++;
    }
    if (queue.publish()) ringDevice(bells);
    const bell = Atomics.load(bells, BELL_DRIVER);
    let reaped = 0;
    for (let slot = queue.poll(); slot >= 0; slot = queue.poll()) {
      const at = queue.slotOffset(slot);
      const number = inSlot[slot];
      inSlot[slot] = -1;
      if (number < 0) throw new Error(`slot ${slot} came back twice`);
      const got = words[(at + STRESS_DATA_OFFSET) / 4];
      if (got !== ~number >>> 0) throw new Error(`request ${number}: the device saw or wrote half of it (${got})`);
      if (bytes[at + STRESS_FRAME.trailerOffset] !== (number & 0x7f)) throw new Error(`request ${number}: no trailer`);
      if (queue.usedLength !== 5) throw new Error(`request ${number}: ${queue.usedLength} bytes`);
      done++;
      reaped++;
    }
    if (reaped > 0) idle = 0;
    if (reaped > 0 || queue.inFlight === 0 || (deviceSleeps && idle++ < PATIENCE)) continue;
    aim.wait(bells);
    const isLate = queue.enableNotifications();
    aim.adjust(isLate);
    if (isLate) continue;
    if (Atomics.load(bells, BELLS_STOP) !== 0) throw new Error("the device's thread gave up");
    waitFor(bells, BELL_DRIVER, bell, "the driver waits for a notification that never comes");
    sleeps++;
    idle = 0;
    queue.disableNotifications();
  }
  return sleeps;
}

/** Add a chain of header, 4 bytes of data of the slot itself, and trailer. */
function submit(queue: Virtqueue, layout: VirtqueueLayout, dataIova: number, hi: number): number {
  const slot = queue.begin(3);
  if (slot < 0) return slot;
  const header = dataIova - STRESS_DATA_OFFSET + slot * layout.requestSize;
  queue.push(header | 0, hi, STRESS_FRAME.headerLength, false);
  queue.push((header + STRESS_DATA_OFFSET) | 0, hi, 4, true);
  queue.push((header + STRESS_FRAME.trailerOffset) | 0, hi, STRESS_FRAME.trailerLength, true);
  return queue.commit();
}

function ringDevice(bells: Int32Array): void {
  Atomics.add(bells, BELL_DEVICE, 1);
  Atomics.notify(bells, BELL_DEVICE);
}
