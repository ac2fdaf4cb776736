/** Stretches of a PCI function's registers, mapped into this process or accessed by the kernel for us. */

import { readSync, writeSync } from "node:fs";
import { checkInteger, rangeError, VirtioError } from "../../errors.js";
import {
  fileError,
  mapShared,
  type RegisterWidth,
  registerRead,
  registerWrite,
  systemError,
  unmapShared,
} from "../../sys/index.js";
import type { PciRegisters } from "./function.js";

const PAGE_BYTES = 4096;

/** Where a stretch lies in the file of its device. */
export interface RegisterPlace {
  /** Descriptor of the device. */
  readonly fd: number;
  /** Byte in its file. */
  readonly position: number;
  /** Bytes. */
  readonly length: number;
  /** What it is, for messages: `BAR 4 of 0000:00:04.0`. */
  readonly name: string;
}

/** Registers in the memory of this process: an access is a load or a store. */
export class MappedRegisters implements PciRegisters {
  readonly length: number;
  readonly #name: string;
  readonly #buffer: ArrayBuffer;
  readonly #bytes: Uint8Array;

  /**
   * Map the pages that the stretch lies in, and no others.
   *
   * @throws VirtioError ERR_VIRTIO_SYSCALL when the kernel refuses.
   */
  constructor({ fd, position, length, name }: RegisterPlace) {
    this.length = length;
    this.#name = name;
    const before = position % PAGE_BYTES;
    const pages = Math.ceil((before + length) / PAGE_BYTES);
    this.#buffer = mapShared(fd, pages * PAGE_BYTES, { offset: position - before });
    this.#bytes = new Uint8Array(this.#buffer, before, length);
  }

  read(offset: number, width: RegisterWidth): number {
    if (this.#bytes.length === 0) throw closedError(this.#name);
    return registerRead(this.#bytes, offset, width);
  }

  write(offset: number, width: RegisterWidth, value: number): void {
    if (this.#bytes.length === 0) throw closedError(this.#name);
    registerWrite(this.#bytes, offset, width, value);
  }

  close(): void {
    if (this.#buffer.byteLength > 0) unmapShared(this.#buffer);
  }
}

/** Registers that the kernel accesses: config space, I/O ports, and what it lets nobody map. */
export class FileRegisters implements PciRegisters {
  readonly #place: RegisterPlace;
  /** One access goes through this; its bytes are those of the register, which is little-endian. */
  readonly #view = new DataView(new ArrayBuffer(4));
  #open = true;

  constructor(place: RegisterPlace) {
    this.#place = place;
  }

  get length(): number {
    return this.#place.length;
  }

  read(offset: number, width: RegisterWidth): number {
    this.#check(offset, width);
    this.#transfer("pread", offset, width);
    if (width === 1) return this.#view.getUint8(0);
    return width === 2 ? this.#view.getUint16(0, true) : this.#view.getUint32(0, true);
  }

  write(offset: number, width: RegisterWidth, value: number): void {
    this.#check(offset, width);
    if (width === 1) this.#view.setUint8(0, value);
    else if (width === 2) this.#view.setUint16(0, value, true);
    else this.#view.setUint32(0, value, true);
    this.#transfer("pwrite", offset, width);
  }

  close(): void {
    this.#open = false;
  }

  #check(offset: number, width: RegisterWidth): void {
    const { name, length, position } = this.#place;
    if (!this.#open) throw closedError(name);
    if (width !== 1 && width !== 2 && width !== 4) throw rangeError("width", "1, 2 or 4", width);
    checkInteger("offset", offset, 0, length - width);
    const at = position + offset;
    if (at % width !== 0) throw rangeError("offset", `a register at a multiple of ${width} of its page`, at);
  }

  /** One pread or pwrite of `width` bytes, which the kernel makes one access of the register. */
  #transfer(syscall: "pread" | "pwrite", offset: number, width: RegisterWidth): void {
    const { fd, position, name } = this.#place;
    const what = `accessing ${width} bytes at ${offset} of ${name}`;
    let count: number;
    try {
      const at = position + offset;
      count = syscall === "pread" ? readSync(fd, this.#view, 0, width, at) : writeSync(fd, this.#view, 0, width, at);
    } catch (error) {
      const { errno = 0 } = fileError(error, what);
      throw systemError(-errno, syscall, what);
    }
    if (count === width) return;
    throw new VirtioError("ERR_VIRTIO_PROTOCOL", `${what}: ${syscall} did ${count}; the function may be gone`, {
      syscall,
    });
  }
}

function closedError(name: string): VirtioError {
  return new VirtioError("ERR_VIRTIO_CLOSED", `these registers of ${name} were closed; open the function again`);
}
