/** Registers of a device that are mapped into this process: single accesses of an exact width. */

import { rangeError, typeError } from "../errors.js";
import { native } from "./native.js";

/** Bytes that are accessed at once. */
export type RegisterWidth = 1 | 2 | 4;

/**
 * Read a little-endian register by one access of `width` bytes, ordered with all accesses to memory around it.
 *
 * @param bytes a view of a mapping of the device.
 * @throws RangeError when it is not aligned to its width or not within `bytes`, which is empty after unmapping.
 */
export function registerRead(bytes: Uint8Array, offset: number, width: RegisterWidth): number {
  const result = native().registerRead(bytes, offset, width);
  if (result < 0) throw refused(bytes, offset, width);
  return result;
}

/**
 * Write a little-endian register by one access of `width` bytes. Everything written to memory before is visible to
 * the device when it sees this.
 *
 * @param value the bits above the register's width do not count.
 * @throws RangeError when it is not aligned to its width or not within `bytes`, which is empty after unmapping.
 */
export function registerWrite(bytes: Uint8Array, offset: number, width: RegisterWidth, value: number): void {
  const result = native().registerWrite(bytes, offset, width, value);
  if (result < 0) throw refused(bytes, offset, width);
}

/** Which argument the addon has refused. */
function refused(bytes: Uint8Array, offset: number, width: RegisterWidth): Error {
  if (!(bytes instanceof Uint8Array)) return typeError("bytes", "a Uint8Array", bytes);
  if (width !== 1 && width !== 2 && width !== 4) return rangeError("width", "1, 2 or 4", width);
  const at = bytes.byteOffset + offset;
  if (at % width !== 0) return rangeError("offset", `a register at a multiple of ${width} of its page`, at);
  return rangeError("offset", `${width} bytes within the ${bytes.length} that are mapped`, offset);
}
