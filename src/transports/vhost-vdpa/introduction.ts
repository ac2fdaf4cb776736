/** What is asked when a vhost-vdpa device was opened: what it is, its limits, what the interface can do. */

import { VirtioError } from "../../errors.js";
import { type IovaRange, REGION_ALIGN } from "../../memory/index.js";
import { BLK_CONFIG_NUM_QUEUES_OFFSET, BlkFeature, VIRTIO_ID_BLOCK } from "../../protocol/blk.js";
import { VhostVdpaBackendFeature } from "../../protocol/vhost-vdpa.js";
import { VIRTQUEUE_MAX_SIZE } from "../../virtqueue/defs.js";
import type { StatusSequence } from "../status.js";
import type { WaitOptions } from "../transport.js";
import type { VdpaControl } from "./control.js";

/**
 * The features of the interface that are used here. Not IOTLB_ASID: one address space is all that a driver needs. Not
 * ENABLE_AFTER_DRIVER_OK: queues are enabled before, as the specification has it and every device understands.
 */
const BACKEND_FEATURES =
  VhostVdpaBackendFeature.IOTLB_MSG_V2 | VhostVdpaBackendFeature.SUSPEND | VhostVdpaBackendFeature.RESUME;

/** Queue indices are 16 bits. */
const MAX_QUEUES = 0x1_0000;

/** What the first requests tell. */
export interface Introduction {
  readonly deviceType: number;
  readonly offeredFeatures: bigint;
  /** Features of the interface in force. */
  readonly backendFeatures: bigint;
  /** Addresses for memory; undefined: those of `IovaSpace`. */
  readonly ranges: readonly IovaRange[] | undefined;
  readonly maxQueues: number;
  /** A power of two. */
  readonly maxQueueSize: number;
  /** Bytes of the config space, as far as the kernel tells; it refuses what is beyond in any case. */
  readonly configSize: number;
}

/**
 * Become the owner, ask for what does not depend on the driver, reset the device and acknowledge it.
 *
 * @throws VirtioError ERR_VIRTIO_CONNECT when it is no vhost-vdpa device, ERR_VIRTIO_MEMORY or ERR_VIRTIO_QUEUES when
 *   its limits leave room for nothing, ERR_VIRTIO_TIMEOUT when the reset does not end.
 */
export async function introduce(
  control: VdpaControl,
  status: StatusSequence,
  peer: string,
  options: WaitOptions,
): Promise<Introduction> {
  control.setOwner();
  const deviceType = control.getDeviceId();
  const backendFeatures = control.getBackendFeatures() & BACKEND_FEATURES;
  if (backendFeatures !== 0n) control.setBackendFeatures(backendFeatures);
  control.iotlbVersion = (backendFeatures & VhostVdpaBackendFeature.IOTLB_MSG_V2) === 0n ? 1 : 2;
  const ranges = usableRanges(control, peer);
  const maxQueueSize = usableQueueSize(control, peer);
  const configSize = control.getConfigSize() ?? Number.POSITIVE_INFINITY;
  const count = control.getVqsCount();

  await status.reset(options);
  try {
    status.acknowledge();
    const offeredFeatures = control.getFeatures();
    const maxQueues = Math.min(count ?? configuredQueues(control, deviceType, offeredFeatures), MAX_QUEUES);
    if (maxQueues === 0) throw new VirtioError("ERR_VIRTIO_QUEUES", `${peer} says that it has no queues at all`);
    return { deviceType, offeredFeatures, backendFeatures, ranges, maxQueues, maxQueueSize, configSize };
  } catch (error) {
    status.giveUp();
    throw error;
  }
}

function usableRanges(control: VdpaControl, peer: string): readonly IovaRange[] | undefined {
  const range = control.getIovaRange();
  if (range === undefined) return undefined;
  const { first, last } = range;
  // Numbers carry 53 bits exactly, which is room for all memory there is.
  const end = last > BigInt(Number.MAX_SAFE_INTEGER) ? Number.MAX_SAFE_INTEGER : Number(last);
  const start = Number(first);
  const firstRegion = Math.max(1, Math.ceil(start / REGION_ALIGN)) * REGION_ALIGN;
  if (first <= last && firstRegion + REGION_ALIGN - 1 <= end) return [{ start, end }];
  throw new VirtioError(
    "ERR_VIRTIO_MEMORY",
    `${peer} can use the addresses 0x${first.toString(16)} to 0x${last.toString(16)}, in which there is no room for ` +
      `a region of ${REGION_ALIGN} bytes at a multiple of its size; it cannot be driven`,
  );
}

function usableQueueSize(control: VdpaControl, peer: string): number {
  const most = Math.min(control.getVringNum(), VIRTQUEUE_MAX_SIZE);
  if (most === 0) throw new VirtioError("ERR_VIRTIO_QUEUES", `${peer} says that its queues have 0 descriptors`);
  return 2 ** Math.floor(Math.log2(most));
}

/** The queues that the config space tells of, where the kernel does not: `num_queues` when its feature is offered. */
function configuredQueues(control: VdpaControl, deviceType: number, offeredFeatures: bigint): number {
  if (deviceType !== VIRTIO_ID_BLOCK || (offeredFeatures & BlkFeature.MQ) === 0n) return 1;
  const bytes = control.getConfig(BLK_CONFIG_NUM_QUEUES_OFFSET, 2);
  return new DataView(bytes.buffer).getUint16(0, true);
}
