/** Cutting ranges of the disk into the requests of DISCARD, WRITE_ZEROES and SECURE_ERASE. */

import { BLK_SEGMENT_SIZE, SECTOR_SIZE, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP } from "../../protocol/blk.js";
import type { BlockRange } from "./options.js";

/** The limits that the device's config names for one of these requests. */
export interface SegmentLimits {
  /** Sectors of one segment; 0 means no limit. */
  readonly maxSectors: number;
  /** Segments of one request; 0 means 1. */
  readonly maxSegments: number;
}

const MAX_U32 = 0xffffffff;
/** Segments of one request, however many the device would take: 4 KiB of them. */
const MAX_SEGMENTS = 256;

/**
 * Encode the ranges as `struct virtio_blk_discard_write_zeroes` (virtio 1.3, 5.2.6), one array of segments
 * for each request that is needed.
 *
 * @param maxBytes - bytes of data that one request may hold, whatever it is for.
 */
export function discardRequests(
  ranges: readonly BlockRange[],
  limits: SegmentLimits,
  maxBytes: number,
  unmap: boolean,
): Uint8Array[] {
  const maxSectors = limits.maxSectors === 0 ? MAX_U32 : limits.maxSectors;
  const maxSegments = Math.min(Math.max(1, limits.maxSegments), MAX_SEGMENTS, Math.floor(maxBytes / BLK_SEGMENT_SIZE));
  const segments: { sector: number; count: number }[] = [];
  for (const { position, length } of ranges) {
    let sector = position / SECTOR_SIZE;
    for (let rest = length / SECTOR_SIZE; rest > 0; ) {
      const count = Math.min(rest, maxSectors);
      segments.push({ sector, count });
      sector += count;
      rest -= count;
    }
  }
  const requests: Uint8Array[] = [];
  for (let first = 0; first < segments.length; first += maxSegments) {
    requests.push(encodeSegments(segments.slice(first, first + maxSegments), unmap));
  }
  return requests;
}

function encodeSegments(segments: readonly { sector: number; count: number }[], unmap: boolean): Uint8Array {
  const bytes = new Uint8Array(segments.length * BLK_SEGMENT_SIZE);
  const view = new DataView(bytes.buffer);
  segments.forEach(({ sector, count }, i) => {
    const at = i * BLK_SEGMENT_SIZE;
    view.setBigUint64(at, BigInt(sector), true);
    view.setUint32(at + 8, count, true);
    view.setUint32(at + 12, unmap ? VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP : 0, true);
  });
  return bytes;
}
