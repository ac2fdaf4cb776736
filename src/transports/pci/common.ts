/** The common configuration of a virtio PCI device: registers by their names, features, the end of a device that vanished. */

import { VirtioError } from "../../errors.js";
import { type PciField, VIRTIO_PCI_COMMON_FULL_SIZE, VirtioPciCommon } from "../../protocol/virtio-pci.js";
import type { Lifetime } from "../lifetime.js";
import type { StatusRegister } from "../status.js";
import type { PciRegisters } from "./function.js";

/** A status that no device has, as bit 5 is reserved: nobody answers on the bus any more. */
const STATUS_OF_NOBODY = 0xff;
/** Bits of one feature window. */
const WINDOW_BITS = 32n;
/** Windows of the feature bits 0 to 127. */
const WINDOWS = 4;
const WINDOW_MASK = 0xffff_ffffn;

/** Bytes of the common configuration that are of use here. */
export function commonLength(available: number): number {
  return Math.min(available, VIRTIO_PCI_COMMON_FULL_SIZE);
}

/** `struct virtio_pci_common_cfg` (virtio 1.3, 4.1.4.3). Each access is one of exactly the field's width. */
export class CommonConfig implements StatusRegister {
  readonly #registers: PciRegisters;
  readonly #lifetime: Lifetime;
  readonly #peer: string;

  /** @param lifetime ends when the device turns out to have vanished. */
  constructor(registers: PciRegisters, lifetime: Lifetime, peer: string) {
    this.#registers = registers;
    this.#lifetime = lifetime;
    this.#peer = peer;
  }

  /** Whether the device has the register: the later ones came with features. */
  has({ offset, width }: PciField): boolean {
    return offset + width <= this.#registers.length;
  }

  read({ offset, width }: PciField): number {
    return this.#registers.read(offset, width);
  }

  write({ offset, width }: PciField, value: number): void {
    this.#registers.write(offset, width, value);
  }

  /**
   * The status byte.
   *
   * @throws VirtioError ERR_VIRTIO_DISCONNECTED when the device was removed: then every register reads as all ones.
   */
  readStatus(): number {
    const status = this.read(VirtioPciCommon.DEVICE_STATUS);
    if (status !== STATUS_OF_NOBODY) return status;
    const error = new VirtioError(
      "ERR_VIRTIO_DISCONNECTED",
      `${this.#peer} does not answer any more, all its registers read as ones: it was removed, or switched off`,
    );
    this.#lifetime.end(error);
    throw error;
  }

  writeStatus(status: number): void {
    this.write(VirtioPciCommon.DEVICE_STATUS, status);
  }

  /** Feature bits 0 to 127 that the device offers. */
  readFeatures(): bigint {
    let features = 0n;
    for (let window = 0; window < WINDOWS; window++) {
      this.write(VirtioPciCommon.DEVICE_FEATURE_SELECT, window);
      features |= BigInt(this.read(VirtioPciCommon.DEVICE_FEATURE)) << (WINDOW_BITS * BigInt(window));
    }
    return features;
  }

  /**
   * Write the accepted features.
   *
   * @param offered what the device offers: a device without features from bit 64 on need not know of their windows.
   */
  writeFeatures(features: bigint, offered: bigint): void {
    for (let window = 0; window < WINDOWS; window++) {
      const shift = WINDOW_BITS * BigInt(window);
      if (window >= 2 && offered >> shift === 0n) break;
      this.write(VirtioPciCommon.DRIVER_FEATURE_SELECT, window);
      this.write(VirtioPciCommon.DRIVER_FEATURE, Number((features >> shift) & WINDOW_MASK));
    }
  }

  /** Write an address by its halves. */
  writeAddress(lo: PciField, hi: PciField, address: number): void {
    this.write(lo, address % 2 ** 32);
    this.write(hi, Math.floor(address / 2 ** 32));
  }
}
