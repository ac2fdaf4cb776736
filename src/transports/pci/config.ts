/** The device configuration as registers: whole fields by their width, consistently by the generation counter. */

import { checkInteger, rangeError, typeError, VirtioError } from "../../errors.js";
import { BLK_CONFIG_WIDTHS, VIRTIO_ID_BLOCK } from "../../protocol/blk.js";
import { VirtioPciCommon } from "../../protocol/virtio-pci.js";
import type { RegisterWidth } from "../../sys/index.js";
import type { CommonConfig } from "./common.js";
import type { PciRegisters } from "./function.js";

/** The most that is made reachable: no device type has nearly as much. */
export const MAX_CONFIG_BYTES = 4096;
/** Times that a config is read which changes under our hands. */
const MAX_ATTEMPTS = 100;

/** Widths of the config fields, from the first on, by device type. */
const WIDTHS: Readonly<Record<number, readonly RegisterWidth[]>> = { [VIRTIO_ID_BLOCK]: BLK_CONFIG_WIDTHS };

/** A part of the config that is one access. */
interface Field {
  readonly offset: number;
  readonly width: RegisterWidth;
}

/** `VIRTIO_PCI_CAP_DEVICE_CFG` (virtio 1.3, 4.1.4.6). */
export class DeviceConfig {
  readonly #registers: PciRegisters;
  readonly #common: CommonConfig;
  readonly #peer: string;
  /** Start of every field that is known, in order. */
  readonly #fields: readonly Field[];
  readonly #knownEnd: number;

  constructor(registers: PciRegisters, common: CommonConfig, deviceType: number, peer: string) {
    this.#registers = registers;
    this.#common = common;
    this.#peer = peer;
    let end = 0;
    this.#fields = (WIDTHS[deviceType] ?? []).map((width) => {
      const offset = end;
      end += width;
      return { offset, width };
    });
    this.#knownEnd = end;
  }

  /** Counts the changes of the config, as far as somebody looks. */
  get generation(): number {
    return this.#common.read(VirtioPciCommon.CONFIG_GENERATION);
  }

  /**
   * Read `length` bytes from `offset`, all of one generation.
   *
   * @throws VirtioError ERR_VIRTIO_CONFIG when it is shorter, or changes all the time.
   */
  read(offset: number, length: number): Uint8Array {
    const fields = this.#fieldsOf(offset, length);
    const [{ offset: start }] = fields;
    const last = fields[fields.length - 1];
    const bytes = new Uint8Array(last.offset + last.width - start);
    const view = new DataView(bytes.buffer);
    let before = this.generation;
    for (let attempt = 0; attempt < MAX_ATTEMPTS; attempt++) {
      for (const field of fields) put(view, field.offset - start, field.width, this.#read(field));
      const after = this.generation;
      if (after === before) return bytes.subarray(offset - start, offset - start + length);
      before = after;
    }
    throw new VirtioError(
      "ERR_VIRTIO_CONFIG",
      `the config space of ${this.#peer} changed during each of ${MAX_ATTEMPTS} readings; it never holds still`,
    );
  }

  /**
   * Write bytes of the config.
   *
   * @throws RangeError when they are a part of a field only; VirtioError ERR_VIRTIO_CONFIG when the config is shorter.
   */
  write(offset: number, bytes: Uint8Array): void {
    if (!(bytes instanceof Uint8Array)) throw typeError("bytes", "a Uint8Array", bytes);
    const fields = this.#fieldsOf(offset, bytes.length);
    const last = fields[fields.length - 1];
    if (fields[0].offset !== offset || last.offset + last.width !== offset + bytes.length) {
      throw rangeError("bytes", "whole fields of the config space", `${bytes.length} bytes at ${offset}`);
    }
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    for (const field of fields) {
      this.#registers.write(field.offset, field.width, get(view, field.offset - offset, field.width));
    }
  }

  #read({ offset, width }: Field): number {
    return this.#registers.read(offset, width);
  }

  /** The fields that hold the bytes. Where nothing is known of a device type, the widest accesses that fit. */
  #fieldsOf(offset: number, length: number): readonly Field[] {
    checkInteger("length", length, 1, MAX_CONFIG_BYTES);
    checkInteger("offset", offset, 0);
    const end = offset + length;
    const fields = this.#fields.filter((field) => field.offset < end && field.offset + field.width > offset);
    for (let at = Math.max(offset, this.#knownEnd); at < end; ) {
      const width = at % 4 === 0 && end - at >= 4 ? 4 : at % 2 === 0 && end - at >= 2 ? 2 : 1;
      fields.push({ offset: at, width });
      at += width;
    }
    const last = fields[fields.length - 1];
    if (last.offset + last.width <= this.#registers.length) return fields;
    throw new VirtioError(
      "ERR_VIRTIO_CONFIG",
      `the config space of ${this.#peer} has ${this.#registers.length} bytes, bytes ${offset} to ${end} were asked ` +
        "for; use only the fields that the offered features imply",
    );
  }
}

function put(view: DataView, offset: number, width: RegisterWidth, value: number): void {
  if (width === 1) view.setUint8(offset, value);
  else if (width === 2) view.setUint16(offset, value, true);
  else view.setUint32(offset, value, true);
}

function get(view: DataView, offset: number, width: RegisterWidth): number {
  if (width === 1) return view.getUint8(offset);
  if (width === 2) return view.getUint16(offset, true);
  return view.getUint32(offset, true);
}
