/** What both halves of the device's rings share: where the areas lie, and indirect tables. */

import { DESC_SIZE } from "./defs.js";
import { lyingDriver } from "./device-chain.js";
import type { DeviceMemory } from "./device-memory.js";

/** Where one area of a ring lies in memory mapped here. */
export interface RingArea {
  /** The mapped memory. */
  readonly buffer: ArrayBuffer;
  /** Byte offset of the area, aligned as the format demands. */
  readonly offset: number;
}

/** Everything that one half of a ring needs to know. Checked by `DeviceVirtqueue`, not again here. */
export interface DeviceRingOptions {
  readonly queueSize: number;
  readonly descriptorArea: RingArea;
  readonly driverArea: RingArea;
  readonly deviceArea: RingArea;
  readonly memory: DeviceMemory;
  readonly eventIdx: boolean;
  readonly indirect: boolean;
  readonly base: number;
}

/** No link of a table reaches further: `virtq_desc.next` has 16 bits. */
const MAX_TABLE_BYTES = 65536 * DESC_SIZE;

/**
 * Check the length of an indirect table.
 *
 * @throws VirtioError ERR_VIRTIO_QUEUE_BROKEN when it is 0 or not a multiple of 16.
 */
export function checkTableLength(length: number): void {
  if (length === 0 || length % DESC_SIZE !== 0) throw lyingDriver(`an indirect table of ${length} bytes`);
}

/**
 * Copy a table that does not begin at a multiple of 4: the specification names no alignment, all known
 * drivers use 16, so this may be slow.
 */
export function copyTable(memory: DeviceMemory, region: number, offset: number, length: number): Uint32Array {
  const copy = memory.bytes[region].slice(offset, offset + Math.min(length, MAX_TABLE_BYTES));
  return new Uint32Array(copy.buffer);
}
