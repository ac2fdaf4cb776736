/** Registers of a device that are mapped into this process: single accesses of an exact width. */

import { checkInteger, rangeError } from "../errors.js";
import { systemError } from "./errno.js";
import { native } from "./native.js";

/** Bytes that are accessed at once. */
export type RegisterWidth = 1 | 2 | 4;

/**
 * Read a little-endian register by one access of `width` bytes, ordered with all accesses to memory around it.
 *
 * @param bytes a view of a mapping of the device.
 * @throws RangeError when it is not aligned to its width or not within `bytes`.
 */
export function registerRead(bytes: Uint8Array, offset: number, width: RegisterWidth): number {
  const result = native().registerRead(bytes, offset, width);
  if (result < 0) throw refused(result, bytes, offset, width);
  return result;
}

/**
 * Write a little-endian register by one access of `width` bytes. Everything written to memory before is visible to
 * the device when it sees this.
 *
 * @throws RangeError when it is not aligned to its width or not within `bytes`.
 */
export function registerWrite(bytes: Uint8Array, offset: number, width: RegisterWidth, value: number): void {
  const result = native().registerWrite(bytes, offset, width, value);
  if (result < 0) throw refused(result, bytes, offset, width);
}

function refused(result: number, bytes: Uint8Array, offset: number, width: RegisterWidth): Error {
  checkInteger("offset", offset, 0, bytes.length - width);
  if (offset % width !== 0) return rangeError("offset", `a multiple of ${width}`, offset);
  return systemError(result, "register", `accessing ${width} bytes at ${offset}`);
}
