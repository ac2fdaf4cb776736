/** Bringing a virtio-blk device up: features, config, memory, queues. */

import { VirtioError } from "../../errors.js";
import { BufferPool, type MemoryRegion } from "../../memory/index.js";
import {
  BLK_CONFIG_ZONED_MODEL_OFFSET,
  BLK_ZONED_HOST_MANAGED,
  type BlkConfig,
  BlkFeature,
  blkConfigSize,
  decodeBlkConfig,
  SECTOR_SIZE,
  VIRTIO_ID_BLOCK,
} from "../../protocol/blk.js";
import { type QueueNotifier, type VirtioTransport, waitOptions } from "../../transports/transport.js";
import { alignUp, DESC_ALIGN, VirtioFeature } from "../../virtqueue/index.js";
import { blkLimits } from "./limits.js";
import type { OpenBlockOptions } from "./options.js";
import { VirtioBlkQueue } from "./queue.js";

/** All that this driver knows of virtio-blk; a bit that is not here is never accepted. */
export const SUPPORTED_BLK_FEATURES = Object.values(BlkFeature).reduce((all, bit) => all | bit, 0n) & ~BlkFeature.ZONED;

/** Descriptors per queue when nobody says otherwise. */
const DEFAULT_QUEUE_SIZE = 256;
/** Memory for callers whose own the device cannot reach. Untouched pages cost nothing. */
const BOUNCE_BYTES = 16 * 1024 * 1024;
/** Memory to lend before the pool asks for another region. */
const POOL_BYTES = 48 * 1024 * 1024;

/** What an open device needs of its transport; elsewhere than in the thread that opened it, of what stands in for it. */
export interface BlkControl
  extends Pick<VirtioTransport, "address" | "features" | "offeredFeatures" | "maxQueues" | "hasConfig">,
    Pick<VirtioTransport, "readConfig" | "writeConfig" | "onLost" | "close">,
    Pick<VirtioTransport, "reconnects" | "recovery"> {
  /** Hear that the device broke a rule, to tell others who use it. */
  report?(error: VirtioError): void;
}

/** Features that mean something although the config space cannot be read. */
const CONFIG_FREE_FEATURES = BlkFeature.RO | BlkFeature.FLUSH | BlkFeature.LIFETIME;

/** Features of virtio-blk to be accepted from this device. */
function wantedBlkFeatures({ hasConfig, offeredFeatures }: VirtioTransport): bigint {
  // Limits and fields of the other features would be guesses.
  if (!hasConfig) return CONFIG_FREE_FEATURES;
  // A write cache that can be switched on and never flushed is no good (5.2.5.2: offered with FLUSH only).
  const hasFlush = (offeredFeatures & BlkFeature.FLUSH) !== 0n;
  return hasFlush ? SUPPORTED_BLK_FEATURES : SUPPORTED_BLK_FEATURES & ~BlkFeature.CONFIG_WCE;
}

/** Wanted features, given the options. */
function wantedFeatures(transport: VirtioTransport, options: OpenBlockOptions): bigint {
  const { packed = true, indirect = true, eventIdx = true, inOrder = true } = options;
  return (
    wantedBlkFeatures(transport) |
    VirtioFeature.VERSION_1 |
    VirtioFeature.ACCESS_PLATFORM |
    VirtioFeature.ORDER_PLATFORM |
    (packed ? VirtioFeature.RING_PACKED : 0n) |
    (indirect ? VirtioFeature.INDIRECT_DESC : 0n) |
    (eventIdx ? VirtioFeature.EVENT_IDX : 0n) |
    (inOrder ? VirtioFeature.IN_ORDER : 0n)
  );
}

/**
 * Agree on features with a block device.
 *
 * @throws VirtioError ERR_VIRTIO_FEATURES when the device is not a block device, or is a host-managed zoned one.
 */
export async function negotiateBlk(transport: VirtioTransport, options: OpenBlockOptions): Promise<bigint> {
  const { deviceType, offeredFeatures } = transport;
  if (deviceType !== undefined && deviceType !== VIRTIO_ID_BLOCK) {
    throw new VirtioError(
      "ERR_VIRTIO_FEATURES",
      `${transport.address} is a virtio device of type ${deviceType}, expected ${VIRTIO_ID_BLOCK} (block)`,
    );
  }
  if ((offeredFeatures & BlkFeature.ZONED) !== 0n && transport.hasConfig) {
    const [model] = await transport.readConfig(BLK_CONFIG_ZONED_MODEL_OFFSET, 1, waitOptions(options));
    if (model === BLK_ZONED_HOST_MANAGED) {
      throw new VirtioError(
        "ERR_VIRTIO_FEATURES",
        `${transport.address} is a host-managed zoned device; zoned devices are not supported`,
      );
    }
  }
  return transport.negotiate(wantedFeatures(transport, options), waitOptions(options));
}

/**
 * Read the config space as far as the features reach.
 *
 * @throws VirtioError ERR_VIRTIO_CONFIG when there is none and no `capacity` was given, or it makes no sense.
 */
export async function readBlkConfig(
  transport: Pick<BlkControl, "address" | "hasConfig" | "readConfig">,
  features: bigint,
  options: OpenBlockOptions,
): Promise<BlkConfig> {
  if (!transport.hasConfig) {
    if (options.capacity === undefined) {
      throw new VirtioError(
        "ERR_VIRTIO_CONFIG",
        `${transport.address} has no config space to read the size of the disk from; pass it as the option "capacity"`,
      );
    }
    return { capacity: BigInt(options.capacity) / BigInt(SECTOR_SIZE) };
  }
  const bytes = await transport.readConfig(0, blkConfigSize(features), waitOptions(options));
  const config = decodeBlkConfig(bytes, features);
  if (config.capacity * BigInt(SECTOR_SIZE) > BigInt(Number.MAX_SAFE_INTEGER)) {
    throw new VirtioError(
      "ERR_VIRTIO_CONFIG",
      `${transport.address} says that it has ${config.capacity} sectors, expected at most 2^44 - 1 (8 PiB)`,
    );
  }
  return config;
}

/** The queues of a device with the memory they live in. */
export interface BlkMemory {
  readonly queues: VirtioBlkQueue[];
  /** How the device is told of requests and tells of completions, a queue each. */
  readonly notifiers: readonly QueueNotifier[];
  /** Lends buffers to users. */
  readonly pool: BufferPool;
  /** Lends buffers to operations whose memory the device cannot reach. */
  readonly bounce: BufferPool;
  /** All memory that the device can reach; grows with `pool`. */
  readonly regions: ReadonlySet<MemoryRegion>;
}

/**
 * Make the queues, one region for all of them and the first buffers, and start them.
 *
 * @throws VirtioError ERR_VIRTIO_QUEUES when there are fewer queues than asked for.
 */
export async function startBlkQueues(
  transport: VirtioTransport,
  config: BlkConfig,
  options: OpenBlockOptions,
): Promise<BlkMemory> {
  const features = transport.features;
  const { queues: wanted = 1, mode = "hybrid" } = options;
  const hasMq = (features & BlkFeature.MQ) !== 0n;
  const available = Math.min(transport.maxQueues, hasMq ? Math.max(1, config.numQueues ?? 1) : 1);
  if (wanted > available) {
    throw new VirtioError(
      "ERR_VIRTIO_QUEUES",
      `${transport.address} has ${available} request queue(s), ${wanted} were asked for; pass queues: ${available}`,
    );
  }
  const queueSize = options.queueSize ?? defaultQueueSize(transport.maxQueueSize);
  const limits = blkLimits(config, queueSize);
  const shape = { queueSize, features, limits, capacity: Number(config.capacity) };
  const stride = alignUp(VirtioBlkQueue.bytesNeeded(shape), QUEUE_ALIGN);
  const bounceStart = wanted * stride;
  const poolStart = bounceStart + BOUNCE_BYTES;
  const region = await transport.mapMemory(poolStart + POOL_BYTES, waitOptions(options));

  const queues: VirtioBlkQueue[] = [];
  for (let index = 0; index < wanted; index++) {
    const offset = index * stride;
    const memory = { buffer: region.buffer, offset, iova: region.iova + offset };
    queues.push(new VirtioBlkQueue({ ...shape, index, memory }));
  }
  const bounce = new BufferPool(noGrowth);
  bounce.addRegion(region, bounceStart, poolStart);
  const regions = new Set([region]);
  const pool = new BufferPool(async (size) => {
    const more = await transport.mapMemory(size);
    regions.add(more);
    return more;
  });
  pool.addRegion(region, poolStart);

  const notifiers = await transport.startQueues(
    queues.map((queue) => queue.setup),
    waitOptions(options),
  );
  try {
    queues.forEach((queue, i) => {
      queue.start(notifiers[i], mode);
    });
  } catch (error) {
    for (const queue of queues) queue.stop();
    throw error;
  }
  return { queues, notifiers, pool, bounce, regions };
}

/** The largest power of two, which either format takes, within both limits. */
function defaultQueueSize(most: number): number {
  return 2 ** Math.floor(Math.log2(Math.min(DEFAULT_QUEUE_SIZE, most)));
}

/** Queues begin at multiples of this: pages, so that no two queues share one. */
const QUEUE_ALIGN = 256 * DESC_ALIGN;

function noGrowth(): Promise<MemoryRegion> {
  return Promise.reject(new VirtioError("ERR_VIRTIO_MEMORY", "the memory for copies does not grow"));
}
