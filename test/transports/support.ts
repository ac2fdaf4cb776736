/** What the tests of the transports share: rings placed in memory, whole lives of a device, leak counts. */

import { readdirSync, readFileSync } from "node:fs";
import type { TestContext } from "node:test";
import { VirtioError } from "../../src/errors.js";
import type { MemoryRegion } from "../../src/memory/index.js";
import type { QueueSetup } from "../../src/transports/index.js";
import { VhostUser } from "../../src/transports/index.js";
import { VirtioFeature } from "../../src/virtqueue/features.js";
import { VirtqueueLayout } from "../../src/virtqueue/layout.js";
import { type PeerOptions, ScriptedPeer } from "./scripted-peer.js";

/** Rings of queue `index` at `offset` of a region. */
export function place(region: MemoryRegion, index: number, size: number, packed = false, offset = 0): QueueSetup {
  const layout = new VirtqueueLayout({ queueSize: size, features: packed ? VirtioFeature.RING_PACKED : 0n });
  const descriptorArea = region.iova + offset;
  return {
    index,
    size,
    descriptorArea,
    driverArea: descriptorArea + layout.driverAreaOffset,
    deviceArea: descriptorArea + layout.deviceAreaOffset,
  };
}

/** A device on a scripted peer; both are closed after the test. */
export async function open(
  t: TestContext,
  options: PeerOptions = {},
): Promise<{ peer: ScriptedPeer; device: VhostUser }> {
  const peer = new ScriptedPeer(options);
  const device = await VhostUser.connect(peer.path).catch((error: unknown) => {
    peer.close();
    throw error;
  });
  t.after(async () => {
    await device.close();
    peer.close();
  });
  return { peer, device };
}

/** A device with one running queue. */
export async function openRunning(t: TestContext, options: PeerOptions = {}, features = 0n) {
  const { peer, device } = await open(t, options);
  const accepted = await device.negotiate(features);
  const region = await device.mapMemory(1);
  const packed = (accepted & VirtioFeature.RING_PACKED) !== 0n;
  const setup = place(region, 0, 8, packed);
  const [queue] = await device.startQueues([setup]);
  if (queue === undefined) throw new Error("startQueues returned no queue");
  return { peer, device, region, setup, queue };
}

/** Every message that a front-end sends, once each, in the order of a device's life. */
export async function live(device: VhostUser): Promise<void> {
  await device.negotiate(0n);
  if (device.hasConfig) {
    await device.readConfig(0, 8);
    await device.writeConfig(32, Uint8Array.of(1));
  }
  const region = await device.mapMemory(1);
  const count = Math.min(2, device.maxQueues);
  await device.startQueues(
    Array.from({ length: count }, (_, index) => place(region, index, 8 << index, false, 4096 * index)),
  );
  await device.stopQueues();
  await device.unmapMemory(region);
}

/** Whether an error is a VirtioError of this code whose message has `words` in it. */
export function virtioError(code: VirtioError["code"], words: string | RegExp = ""): (error: unknown) => true {
  return (error) => {
    if (!(error instanceof VirtioError)) throw new Error("not a VirtioError", { cause: error });
    if (error.code !== code) throw new Error(`expected ${code}, got ${error.code}: ${error.message}`);
    const isThere = typeof words === "string" ? error.message.includes(words) : words.test(error.message);
    if (!isThere) throw new Error(`"${String(words)}" is not in: ${error.message}`);
    return true;
  };
}

/** Open descriptors and mapped memory files of this process. */
export function held(): { descriptors: number; mappings: number } {
  return {
    // The directory itself is open while it is read, each time.
    descriptors: readdirSync("/proc/self/fd").length,
    mappings: readFileSync("/proc/self/maps", "utf8")
      .split("\n")
      .filter((line) => line.includes("/memfd:virtio-driver")).length,
  };
}
