/** The region that remembers which requests a back-end holds, beyond its death ("Inflight I/O tracking"). */

import { checkInteger, VirtioError } from "../errors.js";
import { VHOST_USER_MAX_QUEUES, type InflightPayload } from "../protocol/vhost-user.js";
import { createMemfd, isLost, MemfdSeal, mapShared, memfdSeals, unmapShared } from "../sys/index.js";
import type { DescriptorChain } from "../virtqueue/device-chain.js";
import type { DeviceVirtqueue } from "../virtqueue/device.js";
import { checkQueueSize } from "../virtqueue/layout.js";

/** `version` of a queue's part: 0 never used, or nothing to be found in it. */
export const INFLIGHT_UNUSED = 0;
/** `version` of a queue's part that is in use. */
export const INFLIGHT_VERSION = 1;

/** Bytes of the head of a queue's part and of each entry, `QueueRegionSplit` and `DescStateSplit`. */
const SPLIT_BYTES = 16;
/** The same of `QueueRegionPacked` and `DescStatePacked`. */
const PACKED_BYTES = 32;
/** The part of each queue begins at a multiple of this. */
const PART_ALIGN = 64;

/** The part of one queue in units of 8, 16 and 32 bits. */
export interface InflightViews {
  readonly bytes: Uint8Array;
  readonly halves: Uint16Array;
  readonly words: Uint32Array;
}

/**
 * What is kept of the requests of one ring. The front-end can write into the region at any time: everything that this
 * side needs again it also keeps for itself, and reads the region once, when the ring starts.
 */
export interface InflightRecord {
  /** Where the ring goes on, in the form of `SET_VRING_BASE`. */
  readonly base: number;
  /** Requests of the back-end before that are to be carried out again. */
  readonly waiting: number;
  /** Take the oldest of them. */
  refetch(queue: DeviceVirtqueue, chain: DescriptorChain): void;
  /** A chain was taken from the ring. */
  fetched(chain: DescriptorChain): void;
  /** A chain is about to be given back; it belongs to the batch that is published next. */
  done(id: number): void;
  /** The batch is about to be published; the ring will stand at `base` then. */
  publishing(base: number): void;
  /** The batch was published. */
  published(): void;
  /** Nothing is held, and the front-end knows the position: the next start believes `SET_VRING_BASE`. */
  settle(): void;
}

/** Bytes of the part of one queue. */
export function inflightPartBytes(queueSize: number, packed: boolean): number {
  const unit = packed ? PACKED_BYTES : SPLIT_BYTES;
  return Math.ceil((unit + unit * queueSize) / PART_ALIGN) * PART_ALIGN;
}

/** The views of the part of one queue. */
export function inflightViews(buffer: ArrayBuffer, offset: number, length: number): InflightViews {
  return {
    bytes: new Uint8Array(buffer, offset, length),
    halves: new Uint16Array(buffer, offset, length / 2),
    words: new Uint32Array(buffer, offset, length / 4),
  };
}

/** The error for a region that says something impossible. */
export function lyingRegion(what: string): VirtioError {
  return new VirtioError(
    "ERR_VIRTIO_PROTOCOL",
    `the region of requests in flight has ${what}; use a new one (GET_INFLIGHT_FD) and set the rings up again`,
  );
}

/** One region, mapped from the descriptor that the front-end keeps for its back-ends. */
export class InflightRegion {
  /** Descriptors of a queue at most. */
  readonly queueSize: number;
  /** Whether it is for packed rings. */
  readonly packed: boolean;

  private readonly buffer: ArrayBuffer;
  private readonly numQueues: number;

  /**
   * Make the file of a region, all zero.
   *
   * @returns its descriptor, the caller's to close, and the answer to `GET_INFLIGHT_FD`.
   * @throws RangeError when there are more queues than the device has, or none, or a size that no queue can have.
   */
  static create(
    wanted: InflightPayload,
    queues: number,
    packed: boolean,
  ): { fd: number; description: InflightPayload<number> } {
    const { numQueues, queueSize } = checkShape(wanted, queues);
    const mmapSize = numQueues * inflightPartBytes(queueSize, packed);
    const fd = createMemfd("vhost-inflight", mmapSize);
    return { fd, description: { mmapSize, mmapOffset: 0, numQueues, queueSize } };
  }

  /**
   * Map a region that comes from the front-end. The descriptor stays the caller's.
   *
   * @throws RangeError or VirtioError when it is too small, for other queues, cannot be mapped, or has to be sealed
   *   against shrinking and is not.
   */
  constructor(description: InflightPayload, fd: number, options: { queues: number; packed: boolean; sealed: boolean }) {
    const { numQueues, queueSize } = checkShape(description, options.queues);
    this.numQueues = numQueues;
    this.queueSize = queueSize;
    this.packed = options.packed;
    const size = numQueues * inflightPartBytes(queueSize, options.packed);
    // Beyond 2^53 these are inexact, and far outside of every file.
    if (Number(description.mmapSize) < size) {
      throw lyingRegion(`${description.mmapSize} bytes, ${size} are needed for ${numQueues} queues of ${queueSize}`);
    }
    if (options.sealed && (memfdSeals(fd) & MemfdSeal.SHRINK) === 0) {
      throw lyingRegion("no seal against shrinking (F_SEAL_SHRINK), which is demanded here");
    }
    this.buffer = mapShared(fd, size, { offset: Number(description.mmapOffset), guarded: true });
  }

  /**
   * The part of a ring.
   *
   * @throws VirtioError ERR_VIRTIO_PROTOCOL when there is none for it, or for rings of the other format or size.
   */
  part(index: number, queueSize: number, packed: boolean): InflightViews {
    if (index >= this.numQueues) throw lyingRegion(`parts for ${this.numQueues} queues, and none for queue ${index}`);
    if (queueSize > this.queueSize) {
      throw lyingRegion(`room for queues of ${this.queueSize}, and queue ${index} has ${queueSize} descriptors`);
    }
    if (packed !== this.packed) throw lyingRegion("the layout of the other ring format");
    const length = inflightPartBytes(this.queueSize, packed);
    return inflightViews(this.buffer, index * length, length);
  }

  /** Whether the front-end took memory of it away. */
  get isLost(): boolean {
    return isLost(this.buffer);
  }

  /** Unmap it. No ring may use it any more. */
  close(): void {
    unmapShared(this.buffer);
  }
}

function checkShape(payload: InflightPayload, queues: number): { numQueues: number; queueSize: number } {
  const { numQueues, queueSize } = payload;
  checkInteger("numQueues", numQueues, 1, Math.min(queues, VHOST_USER_MAX_QUEUES));
  return { numQueues, queueSize: checkQueueSize(queueSize, true) };
}
