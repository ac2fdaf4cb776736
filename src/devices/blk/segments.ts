/** Stretches of lent buffers that a request consists of, lent to the device together. */

import type { DeviceBuffer } from "../../memory/index.js";

/** A stretch of a lent buffer: one data element, or several when the device's `size_max` is smaller. */
export interface DataSegment {
  /** Memory lent by the device's pool. */
  readonly buffer: DeviceBuffer;
  /** First byte in the buffer. */
  readonly offset: number;
  /** Bytes, at least 1. */
  readonly length: number;
}

/**
 * Lend all pieces to the device, or none.
 *
 * @throws VirtioError as `DeviceBuffer.lend`, also when the device is to write and pieces overlap each other.
 */
export function lendAll(segments: readonly DataSegment[], deviceWrites: boolean): void {
  let lent = 0;
  try {
    for (; lent < segments.length; lent++) {
      const { buffer, offset, length } = segments[lent];
      buffer.lend(offset, length, deviceWrites);
    }
  } catch (error) {
    giveBackAll(segments, lent);
    throw error;
  }
}

/** Take the pieces back, all or the first `count`. */
export function giveBackAll(segments: readonly DataSegment[], count: number = segments.length): void {
  for (let i = 0; i < count; i++) {
    const { buffer, offset, length } = segments[i];
    buffer.giveBack(offset, length);
  }
}
