/** Reading and writing the fields of C structures in the byte order of the machine. */

import { checkInteger, rangeError, VirtioError } from "../errors.js";

const U32_MAX = 0xffff_ffff;
const U64_MAX = 0xffff_ffff_ffff_ffffn;

/** vhost-user and the ioctls of the kernel speak the byte order of the machine. */
export const LITTLE_ENDIAN = new Uint8Array(Uint16Array.of(1).buffer)[0] === 1;

/** A structure of `size` zero bytes. */
export function blank(size: number): DataView {
  return new DataView(new ArrayBuffer(size));
}

/** The bytes of a structure. */
export function bytesOf(view: DataView): Uint8Array {
  return new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
}

/** A view of bytes that may begin anywhere in their memory. */
export function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/**
 * A view of a payload that has `size` bytes.
 *
 * @throws VirtioError ERR_VIRTIO_PROTOCOL when it has not.
 */
export function sized(payload: Uint8Array, size: number, what: string): DataView {
  if (payload.length !== size) throw protocolError(`a ${what} has ${size} bytes, got ${payload.length}`);
  return viewOf(payload);
}

/** Write a field; RangeError when the number does not fit. */
export function putU32(view: DataView, at: number, name: string, value: number): void {
  view.setUint32(at, checkInteger(name, value, 0, U32_MAX), LITTLE_ENDIAN);
}

/** Read a field. */
export function getU32(view: DataView, at: number): number {
  return view.getUint32(at, LITTLE_ENDIAN);
}

/** Write a field; RangeError when the number does not fit. */
export function putU64(view: DataView, at: number, name: string, value: number | bigint): void {
  if (typeof value !== "bigint") {
    view.setBigUint64(at, BigInt(checkInteger(name, value, 0)), LITTLE_ENDIAN);
    return;
  }
  if (value < 0n || value > U64_MAX) throw rangeError(name, "a number from 0 to 2^64 - 1", value);
  view.setBigUint64(at, value, LITTLE_ENDIAN);
}

/** Read a field. */
export function getU64(view: DataView, at: number): bigint {
  return view.getBigUint64(at, LITTLE_ENDIAN);
}

/** The error of a peer that sends what makes no sense. */
export function protocolError(message: string): VirtioError {
  return new VirtioError("ERR_VIRTIO_PROTOCOL", message);
}
