/** Where a PCI function keeps its virtio structures: ids and capabilities, read from a config space that is not trusted. */

import { VirtioError } from "../../errors.js";
import { virtioPciId } from "../../protocol/pci-ids.js";
import {
  PCI_BARS,
  PCI_BASE_ADDRESS_SPACE_IO,
  PCI_CONFIG_SPACE_SIZE,
  PCI_MSIX_CAP_SIZE,
  PCI_MSIX_FLAGS,
  PCI_MSIX_FLAGS_QSIZE,
  PCI_STATUS_CAP_LIST,
  PCI_STD_HEADER_SIZE,
  PciCapabilityId,
  PciConfigField,
  type PciField,
  VIRTIO_PCI_CAP64_SIZE,
  VIRTIO_PCI_CAP_SIZE,
  VIRTIO_PCI_COMMON_SIZE,
  VIRTIO_PCI_NOTIFY_CAP_SIZE,
  VirtioPciCap,
  VirtioPciCapType,
} from "../../protocol/virtio-pci.js";
import type { PciFunction } from "./function.js";

/** A virtio structure in a BAR. */
export interface PciStructure {
  /** BAR 0 to 5. */
  readonly bar: number;
  /** Bytes from the start of the BAR. */
  readonly offset: number;
  /** Bytes that are in the BAR; what the capability claims beyond is cut off. */
  readonly length: number;
  /** Whether the BAR is of I/O ports. */
  readonly isIo: boolean;
}

/** A shared memory region of the device (virtio 1.3, 2.10 and 4.1.4.7). */
export interface PciSharedMemory {
  /** `shmid`: what it is for, by device type. */
  readonly id: number;
  /** BAR 0 to 5. */
  readonly bar: number;
  /** Bytes from the start of the BAR. */
  readonly offset: number;
  /** Bytes. */
  readonly length: number;
}

/** What is known of a virtio function before any register of it was touched. */
export interface PciLayout {
  /** virtio device type (clause 5). */
  readonly deviceType: number;
  readonly common: PciStructure;
  readonly notify: PciStructure & { readonly multiplier: number };
  readonly isr: PciStructure | undefined;
  readonly device: PciStructure | undefined;
  readonly sharedMemory: readonly PciSharedMemory[];
  /** Vectors of MSI-X that the function has; 0 without MSI-X. */
  readonly msixVectors: number;
}

/** Capabilities are multiples of 4 bytes apart, so there can be no more of them. */
const MAX_CAPABILITIES = (PCI_CONFIG_SPACE_SIZE - PCI_STD_HEADER_SIZE) / 4;
const POINTER_MASK = 0xfc;

/**
 * Find out what the function is and where its structures lie. Nothing is written.
 *
 * @throws VirtioError ERR_VIRTIO_ADDRESS when it is no virtio device, ERR_VIRTIO_FEATURES when it is a legacy one,
 *   ERR_VIRTIO_CONFIG when a structure is missing or cannot be reached, or the capabilities make no sense,
 *   ERR_VIRTIO_DISCONNECTED when nothing answers.
 */
export function readLayout(fn: PciFunction): PciLayout {
  const deviceType = checkIds(fn);
  const walk = new CapabilityWalk(fn);
  walk.run();
  const { common, notify, isr, device, sharedMemory } = walk;
  if (walk.structures === 0) {
    throw new VirtioError(
      "ERR_VIRTIO_FEATURES",
      `PCI function ${fn.address} has no virtio capabilities: it is a legacy device, which is not supported; ` +
        "make it a modern one (QEMU: disable-legacy=on,disable-modern=off)",
    );
  }
  if (common === undefined || notify === undefined) {
    const missing = common === undefined ? "common configuration" : "notification structure";
    const reasons = walk.refused.length === 0 ? "no capability names one" : walk.refused.join("; ");
    throw new VirtioError("ERR_VIRTIO_CONFIG", `PCI function ${fn.address} has no usable ${missing}: ${reasons}`);
  }
  const msixVectors = Math.min(walk.msixTableSize, fn.msixVectors);
  return { deviceType, common, notify, isr, device, sharedMemory, msixVectors };
}

function checkIds(fn: PciFunction): number {
  const vendor = read(fn, 0, PciConfigField.VENDOR_ID);
  const device = read(fn, 0, PciConfigField.DEVICE_ID);
  if (vendor === 0xffff) {
    throw new VirtioError(
      "ERR_VIRTIO_DISCONNECTED",
      `PCI function ${fn.address} does not answer: it was removed, or switched off`,
    );
  }
  const id = virtioPciId(vendor, device);
  if (id !== undefined) return id.type;
  throw new VirtioError(
    "ERR_VIRTIO_ADDRESS",
    `PCI function ${fn.address} is no virtio device: its id is ${hex(vendor)}:${hex(device)}, ` +
      "expected 1af4:1040 to 1af4:107f or a transitional one",
  );
}

/** One walk over the list of capabilities. */
class CapabilityWalk {
  common: PciStructure | undefined = undefined;
  notify: (PciStructure & { readonly multiplier: number }) | undefined = undefined;
  isr: PciStructure | undefined = undefined;
  device: PciStructure | undefined = undefined;
  readonly sharedMemory: PciSharedMemory[] = [];
  msixTableSize = 0;
  /** Capabilities of the structures that make a device a modern one, whether they can be used or not. */
  structures = 0;
  /** Why capabilities of the structures that every device needs could not be used. */
  readonly refused: string[] = [];

  private readonly fn: PciFunction;

  constructor(fn: PciFunction) {
    this.fn = fn;
  }

  run(): void {
    const { fn } = this;
    if ((read(fn, 0, PciConfigField.STATUS) & PCI_STATUS_CAP_LIST) === 0) return;
    let at = read(fn, 0, PciConfigField.CAPABILITY_LIST) & POINTER_MASK;
    for (let count = 0; at !== 0; count++) {
      if (at < PCI_STD_HEADER_SIZE || count === MAX_CAPABILITIES) {
        const what = at < PCI_STD_HEADER_SIZE ? `leads into the header, to ${hex(at)}` : "never ends";
        throw new VirtioError("ERR_VIRTIO_CONFIG", `the capability list of PCI function ${fn.address} ${what}`);
      }
      this.visit(at);
      at = read(fn, at, VirtioPciCap.CAP_NEXT) & POINTER_MASK;
    }
  }

  private visit(at: number): void {
    const { fn } = this;
    const id = read(fn, at, VirtioPciCap.CAP_VNDR);
    if (id === PciCapabilityId.MSIX && this.msixTableSize === 0 && at + PCI_MSIX_CAP_SIZE <= PCI_CONFIG_SPACE_SIZE) {
      this.msixTableSize = (read(fn, at, PCI_MSIX_FLAGS) & PCI_MSIX_FLAGS_QSIZE) + 1;
    }
    if (id !== PciCapabilityId.VNDR) return;
    const size = read(fn, at, VirtioPciCap.CAP_LEN);
    // All that a capability of vendor data has in common with the others.
    if (size <= VirtioPciCap.CFG_TYPE.offset || at + size > PCI_CONFIG_SPACE_SIZE) return;
    const type = read(fn, at, VirtioPciCap.CFG_TYPE);
    if (type >= VirtioPciCapType.COMMON_CFG && type <= VirtioPciCapType.DEVICE_CFG) this.structures++;
    switch (type) {
      case VirtioPciCapType.COMMON_CFG:
        this.common ??= this.structure("common configuration", at, size, { least: VIRTIO_PCI_COMMON_SIZE, align: 4 });
        break;
      case VirtioPciCapType.NOTIFY_CFG:
        this.notify ??= this.notifyStructure(at, size);
        break;
      case VirtioPciCapType.ISR_CFG:
        this.isr ??= this.structure("ISR status", at, size, { least: 1, align: 1 });
        break;
      case VirtioPciCapType.DEVICE_CFG:
        this.device ??= this.structure("device configuration", at, size, { least: 1, align: 4 });
        break;
      case VirtioPciCapType.SHARED_MEMORY_CFG:
        this.addSharedMemory(at, size);
        break;
      default:
      // Reserved types are ignored. PCI_CFG, too: the function lets us reach every BAR, so nobody needs the window.
      // VENDOR_CFG means something to its vendor only.
    }
  }

  private notifyStructure(at: number, size: number): (PciStructure & { readonly multiplier: number }) | undefined {
    const limits = { least: 2, align: 2, capSize: VIRTIO_PCI_NOTIFY_CAP_SIZE };
    const structure = this.structure("notification structure", at, size, limits);
    if (structure === undefined) return undefined;
    return { ...structure, multiplier: read(this.fn, at, VirtioPciCap.NOTIFY_OFF_MULTIPLIER) };
  }

  /** The structure that a capability names, if it can be used. */
  private structure(
    name: string,
    at: number,
    size: number,
    { least, align, capSize = VIRTIO_PCI_CAP_SIZE }: { least: number; align: number; capSize?: number },
  ): PciStructure | undefined {
    const { fn } = this;
    const refuse = (why: string): undefined => {
      this.refused.push(`the ${name} at ${hex(at)} ${why}`);
    };
    if (size < capSize) return refuse(`has a capability of ${size} bytes, expected ${capSize}`);
    const bar = read(fn, at, VirtioPciCap.BAR);
    const offset = read(fn, at, VirtioPciCap.OFFSET);
    const claimed = read(fn, at, VirtioPciCap.LENGTH);
    if (bar >= PCI_BARS) return refuse(`is in the reserved BAR ${bar}`);
    const barSize = fn.barSize(bar);
    if (barSize === 0) return refuse(`is in BAR ${bar}, which cannot be reached`);
    const length = Math.min(claimed, barSize - offset);
    if (length < least) return refuse(`has ${Math.max(0, length)} bytes in BAR ${bar}, expected at least ${least}`);
    if (offset % align !== 0) return refuse(`begins at ${hex(offset)}, no multiple of ${align}`);
    const base = read(fn, 4 * bar, PciConfigField.BASE_ADDRESS_0);
    return { bar, offset, length, isIo: (base & PCI_BASE_ADDRESS_SPACE_IO) !== 0 };
  }

  private addSharedMemory(at: number, size: number): void {
    const { fn } = this;
    if (size < VIRTIO_PCI_CAP64_SIZE) return;
    const bar = read(fn, at, VirtioPciCap.BAR);
    const id = read(fn, at, VirtioPciCap.ID);
    const wide = (lo: PciField, hi: PciField) => read(fn, at, hi) * 2 ** 32 + read(fn, at, lo);
    const offset = wide(VirtioPciCap.OFFSET, VirtioPciCap.OFFSET_HI);
    const length = wide(VirtioPciCap.LENGTH, VirtioPciCap.LENGTH_HI);
    // Above 2^53 sums are not exact, but no BAR is anywhere near.
    if (bar >= PCI_BARS || length === 0 || offset + length > fn.barSize(bar)) return;
    if (this.sharedMemory.some((other) => other.id === id)) return;
    this.sharedMemory.push({ id, bar, offset, length });
  }
}

function read(fn: PciFunction, at: number, { offset, width }: PciField): number {
  return fn.readConfig(at + offset, width);
}

function hex(value: number): string {
  return `0x${value.toString(16)}`;
}
