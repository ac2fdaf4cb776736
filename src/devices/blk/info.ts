/** What is known of an open block device, as one plain object. */

import { type BlkConfig, BlkFeature } from "../../protocol/blk.js";
import { featureNames, VirtioFeature } from "../../virtqueue/index.js";
import type { BlkLimits } from "./limits.js";
import type { BlkControl } from "./negotiate.js";
import type { VirtioBlkQueue } from "./queue.js";

/**
 * When a completed write survives a loss of power (virtio 1.3, 5.2.5.2): at once (`writethrough`), after a
 * flush (`writeback`), or never for sure (`unknown`: the device offers no FLUSH).
 */
export type CacheMode = "writethrough" | "writeback" | "unknown";

/** A description of an open block device. */
export interface BlockInfo {
  /** The address it was opened by. */
  readonly address: string;
  /** Size of the disk in bytes. */
  readonly capacity: number;
  /** Unit of reads and writes in bytes. */
  readonly blockSize: number;
  readonly readOnly: boolean;
  readonly cache: CacheMode;
  /** Format of the virtqueues. */
  readonly format: "split" | "packed";
  /** Queues in use, descriptors of each. */
  readonly queues: number;
  readonly queueSize: number;
  /** Queues that the transport could start. */
  readonly maxQueues: number;
  /** Names of the features that the device offers, and of those that were accepted. */
  readonly offered: readonly string[];
  readonly features: readonly string[];
  /** Bounds of one request. */
  readonly limits: BlkLimits;
  /** The config space as far as the accepted features reach; `capacity` in sectors, as a number. */
  readonly config: Omit<BlkConfig, "capacity"> & { readonly capacity: number };
}

/** Describe a device. */
export function describeDevice(
  transport: Pick<BlkControl, "address" | "features" | "offeredFeatures" | "maxQueues">,
  config: BlkConfig,
  queues: readonly VirtioBlkQueue[],
  device: { readonly capacity: number; readonly blockSize: number; readonly readOnly: boolean },
): BlockInfo {
  const { features } = transport;
  const [first] = queues;
  return {
    address: transport.address,
    capacity: device.capacity,
    blockSize: device.blockSize,
    readOnly: device.readOnly,
    cache: cacheMode(transport.offeredFeatures, features, config),
    format: (features & VirtioFeature.RING_PACKED) !== 0n ? "packed" : "split",
    queues: queues.length,
    queueSize: first.queueSize,
    maxQueues: transport.maxQueues,
    offered: featureNames(transport.offeredFeatures, BlkFeature),
    features: featureNames(features, BlkFeature),
    limits: first.limits,
    config: { ...config, capacity: Number(config.capacity) },
  };
}

/** The cache mode that a driver has to assume (BLK-DRV-02). */
export function cacheMode(offered: bigint, features: bigint, config: BlkConfig): CacheMode {
  if ((features & BlkFeature.CONFIG_WCE) !== 0n) return config.writeback === false ? "writethrough" : "writeback";
  if ((features & BlkFeature.FLUSH) !== 0n) return "writeback";
  return (offered & BlkFeature.FLUSH) !== 0n ? "writethrough" : "unknown";
}
