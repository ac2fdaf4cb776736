/** What one virtio-blk request may hold, from the device's config, the ring and the indirect tables. */

import { VirtioError } from "../../errors.js";
import { type BlkConfig, SECTOR_SIZE } from "../../protocol/blk.js";

/** Bounds of one request with data, all at least 1. */
export interface BlkLimits {
  /** Data elements of a request. */
  readonly maxSegments: number;
  /** Bytes of one data element; a multiple of 512 wherever the device allows one. */
  readonly maxSegmentBytes: number;
  /** Bytes of data of a request, a multiple of 512. */
  readonly maxRequestBytes: number;
}

/** Header and status: the elements of a request beside its data. */
const FRAME_OVERHEAD = 2;
/** Data elements that an indirect table has room for: beyond, memory grows and speed does not. */
const MAX_SEGMENTS = 126;
/** Bytes of an element are a u32; the largest multiple of a sector in it. */
const MAX_ELEMENT_BYTES = 2 ** 32 - SECTOR_SIZE;
/**
 * Bytes of one request when the device names no limit, or an absurd one: more would only delay the requests behind it.
 * Behind an IOMMU it must not be more: QEMU takes 1024 pieces in a request, and there each page may be one.
 */
const MAX_REQUEST_BYTES = 2 * 1024 * 1024;

/**
 * Compute the limits. `seg_max` absent or 0 means one data element, `size_max` absent or 0 means no
 * limit, as Linux reads them; a chain is never longer than the queue (2.7.7.3.1).
 *
 * @throws VirtioError ERR_VIRTIO_CONFIG when a request could not hold a single sector.
 */
export function blkLimits(config: BlkConfig, queueSize: number): BlkLimits {
  const maxSegments = Math.max(1, Math.min(config.segMax ?? 1, queueSize - FRAME_OVERHEAD, MAX_SEGMENTS));
  const sizeMax = config.sizeMax === undefined || config.sizeMax === 0 ? MAX_ELEMENT_BYTES : config.sizeMax;
  // Whole sectors, so that a request cut at an element's end is cut at a sector's end.
  const maxSegmentBytes = sizeMax >= SECTOR_SIZE ? sizeMax - (sizeMax % SECTOR_SIZE) : sizeMax;
  const bytes = Math.min(maxSegments * maxSegmentBytes, MAX_REQUEST_BYTES);
  if (bytes < SECTOR_SIZE) {
    throw new VirtioError(
      "ERR_VIRTIO_CONFIG",
      `a request may hold ${maxSegments} data elements of ${maxSegmentBytes} bytes, which is less than a sector; ` +
        "size_max or seg_max of the device is wrong, or the queue too small for it",
    );
  }
  return { maxSegments, maxSegmentBytes, maxRequestBytes: bytes - (bytes % SECTOR_SIZE) };
}
