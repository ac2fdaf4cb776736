/** Checks of what a call wants of a disk: memory that the device can reach, bytes that the disk has. */

import { checkInteger, rangeError, typeError, VirtioError } from "../../errors.js";
import { DeviceBuffer, type MemoryRegion } from "../../memory/index.js";
import { BlkRequestType } from "../../protocol/blk.js";

/** What the checks need to know of a disk. */
export interface Disk {
  readonly address: string;
  readonly blockSize: number;
  /** Bytes. */
  readonly capacity: number;
  readonly readOnly: boolean;
}

/** Refuse what is no memory, and lent memory that is not of these regions or was given back. */
export function checkMemory(buffer: unknown, regions: ReadonlySet<MemoryRegion>): void {
  if (buffer instanceof DeviceBuffer) {
    if (buffer.released) throw rangeError("buffer", "a lent buffer that was not released", "a released one");
    // The address of another device's memory means something else to this one: its own rings, perhaps.
    if (!regions.has(buffer.region)) throw rangeError("buffer", "a buffer lent by this device", "another's");
    return;
  }
  if (!(buffer instanceof Uint8Array)) throw typeError("buffer", "a Uint8Array or a DeviceBuffer", buffer);
}

/** Refuse a part of a buffer that is not inside it. */
export function checkPart(buffer: { readonly length: number }, offset: number, length: number): void {
  const end = buffer.length;
  if (Number.isSafeInteger(offset) && offset >= 0 && offset <= end && offset + length <= end) return;
  checkInteger("offset", offset, 0, end);
  checkInteger("length", length, 1, end - offset);
}

/**
 * Refuse a range that is not of whole blocks of the disk.
 *
 * @param type - `BlkRequestType` of what is to be done with it.
 * @throws RangeError; VirtioError ERR_VIRTIO_READ_ONLY.
 */
export function checkRange(disk: Disk, type: number, position: number, length: number): void {
  const { blockSize, capacity } = disk;
  if (disk.readOnly && type !== BlkRequestType.IN) {
    throw new VirtioError("ERR_VIRTIO_READ_ONLY", `${disk.address} is read-only; nothing was changed`);
  }
  if (!(Number.isSafeInteger(length) && length > 0 && length % blockSize === 0)) {
    throw rangeError("length", `a positive multiple of the block size ${blockSize}`, length);
  }
  if (!(Number.isSafeInteger(position) && position >= 0 && position % blockSize === 0)) {
    throw rangeError("position", `a multiple of the block size ${blockSize}`, position);
  }
  if (length > capacity || position > capacity - length) throw beyondEnd(capacity, position, length);
}

/** The error of a range that the disk does not have. */
export function beyondEnd(capacity: number, position: number, length: number): RangeError {
  return rangeError("position", `${length} bytes inside the ${capacity} bytes of the disk`, position);
}
