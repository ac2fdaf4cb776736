/** What the tests of the PCI transport share: a device on a fake function, its whole life, what it may not leave behind. */

import assert from "node:assert/strict";
import type { TestContext } from "node:test";
import { VirtioError, type VirtioErrorCode } from "../../../src/errors.js";
import { Pci, type PciOptions, type QueueNotifier } from "../../../src/transports/index.js";
import { FakePciFunction, type FakePciOptions } from "../../../src/testing/index.js";
import { VirtioFeature } from "../../../src/virtqueue/features.js";
import { turnUntil } from "../../sys/helpers.js";
import { place } from "../support.js";

export const BASE = VirtioFeature.VERSION_1 | VirtioFeature.ACCESS_PLATFORM;

/** A config space of 16 bytes, each its offset. */
export const CONFIG = Uint8Array.from({ length: 16 }, (_, i) => i);

/** A device on a fake function. It is closed after the test, which fails when a rule was broken. */
export async function attach(
  t: TestContext,
  options: FakePciOptions = {},
  prepare: (fn: FakePciFunction) => void = () => undefined,
): Promise<{ fn: FakePciFunction; device: Pci }> {
  const fn = new FakePciFunction(options);
  prepare(fn);
  const device = await Pci.attach(fn);
  t.after(async () => {
    await device.close();
    assert.deepEqual(fn.violations, []);
  });
  return { fn, device };
}

/** As {@link attach}, with all its queues running, each of 8 descriptors in one region. */
export async function attachRunning(
  t: TestContext,
  options: FakePciOptions = {},
  { features = 0n, prepare = () => undefined }: { features?: bigint; prepare?: (fn: FakePciFunction) => void } = {},
) {
  const { fn, device } = await attach(t, options, prepare);
  const { region, queues } = await start(device, features);
  return { fn, device, region, queues };
}

/** Negotiate and start all queues. */
export async function start(device: Pci, wanted = 0n) {
  const features = await device.negotiate(wanted);
  const region = await device.mapMemory(1);
  const packed = (features & VirtioFeature.RING_PACKED) !== 0n;
  const setups = Array.from({ length: device.maxQueues }, (_, i) => place(region, i, 8, packed, 4096 * i));
  const queues = await device.startQueues(setups);
  return { region, queues, setups };
}

/** Everything that can be done to a device, once. */
export async function live(fn: FakePciFunction, options: PciOptions = {}): Promise<void> {
  const device = await Pci.attach(fn, options);
  try {
    const { queues, setups, region } = await start(device);
    await device.readConfig(0, 16);
    await device.writeConfig(0, Uint8Array.of(1, 2, 3, 4));
    queues[0].notify(0);
    await device.resetQueue(0);
    await device.enableQueue(setups[0]);
    const more = await device.mapMemory(1);
    await device.unmapMemory(more);
    assert.ok(region.size > 0);
  } finally {
    await device.close();
  }
}

/** For `assert.rejects`: a VirtioError of this code, whose message has `words` in it. */
export function failure(code: VirtioErrorCode, words: string | RegExp = ""): (error: unknown) => true {
  return (error) => {
    if (!(error instanceof VirtioError)) throw new Error("not a VirtioError", { cause: error });
    assert.equal(error.code, code, error.message);
    if (typeof words === "string") assert.ok(error.message.includes(words), error.message);
    else assert.match(error.message, words);
    return true;
  };
}

/** The completion events that have been signalled, by queue index; they are not afterwards. */
export function signalled(queues: readonly QueueNotifier[]): number[] {
  return queues.filter(({ completion }) => completion.drain()).map(({ index }) => index);
}

/** Wait until these queues have been signalled; which others were is returned with them. */
export async function woken(queues: readonly QueueNotifier[], expected: readonly number[]): Promise<number[]> {
  const got = new Set<number>();
  await turnUntil(() => {
    for (const index of signalled(queues)) got.add(index);
    return expected.every((index) => got.has(index));
  });
  return [...got].sort((a, b) => a - b);
}
