/** One PCI function by its descriptor of VFIO: config space, BARs, reset. */

import { checkInteger, VirtioError } from "../../errors.js";
import {
  decodeVfioDeviceInfo,
  decodeVfioRegionInfo,
  type VfioDeviceInfo,
  VfioDeviceFlag,
  VfioPciRegion,
  VfioRegionFlag,
  type VfioRegionInfo,
  VfioSize,
} from "../../protocol/vfio.js";
import type { PciRegisters } from "./function.js";
import { FileRegisters, MappedRegisters } from "./vfio-registers.js";
import { vfioQuery, vfioRequest } from "./vfio-requests.js";

/** BARs of a function. */
const BARS = 6;
const PAGE_BYTES = 4096;

/** The regions of a function that this process has opened; the descriptor stays the caller's. */
export class VfioDevice {
  /** Descriptor of the device. */
  readonly fd: number;
  readonly info: VfioDeviceInfo;
  /** All of config space. */
  readonly config: PciRegisters;
  readonly #name: string;
  readonly #bars: readonly VfioRegionInfo[];
  readonly #registers = new Set<PciRegisters>();

  /**
   * @param name the function, for messages.
   * @throws VirtioError ERR_VIRTIO_UNSUPPORTED when it is no PCI function, ERR_VIRTIO_SYSCALL, ERR_VIRTIO_PROTOCOL.
   */
  constructor(fd: number, name: string) {
    this.fd = fd;
    this.#name = name;
    this.info = decodeVfioDeviceInfo(
      vfioQuery(fd, "DEVICE_GET_INFO", { size: VfioSize.DEVICE_INFO, what: `asking what ${name} is` }),
    );
    if ((this.info.flags & VfioDeviceFlag.PCI) === 0) {
      throw new VirtioError("ERR_VIRTIO_UNSUPPORTED", `${name} is no PCI function for VFIO (flags ${this.info.flags})`);
    }
    const { offset, size, flags } = this.#region(VfioPciRegion.CONFIG, "config space");
    if (!accessible(flags) || size < 256) {
      throw new VirtioError(
        "ERR_VIRTIO_PROTOCOL",
        `VFIO gives ${size} bytes of config space of ${name}, flags ${flags}`,
      );
    }
    this.config = new FileRegisters({ fd, position: offset, length: size, name: `config space of ${name}` });
    this.#bars = Array.from({ length: BARS }, (_, bar) => this.#region(bar, `BAR ${bar}`));
  }

  /** Bytes of a BAR; 0 where there is none, or where it can be neither mapped nor accessed. */
  barSize(bar: number): number {
    const { size, flags } = this.#bar(bar);
    return accessible(flags) || (flags & VfioRegionFlag.MMAP) !== 0 ? size : 0;
  }

  /**
   * Reach a stretch of a BAR: mapped where the kernel lets it be mapped, accessed by the kernel elsewhere.
   *
   * @throws RangeError when it is not within the BAR. VirtioError ERR_VIRTIO_SYSCALL when it cannot be mapped.
   */
  openRegisters(bar: number, offset: number, length: number): PciRegisters {
    const region = this.#bar(bar);
    const size = this.barSize(bar);
    checkInteger("offset", offset, 0, Math.max(0, size - 1));
    checkInteger("length", length, 1, size - offset);
    const name = `BAR ${bar} of ${this.#name}`;
    const place = { fd: this.fd, position: region.offset + offset, length, name };
    const registers = isMappable(region, offset, length) ? new MappedRegisters(place) : new FileRegisters(place);
    this.#registers.add(registers);
    return registers;
  }

  /** Whether `reset` works. */
  get canReset(): boolean {
    return (this.info.flags & VfioDeviceFlag.RESET) !== 0;
  }

  /**
   * Reset the function.
   *
   * @throws VirtioError ERR_VIRTIO_UNSUPPORTED when it has no reset of its own, ERR_VIRTIO_SYSCALL.
   */
  reset(): void {
    vfioRequest(this.fd, "DEVICE_RESET", 0, `resetting ${this.#name}`, {
      EINVAL: {
        code: "ERR_VIRTIO_UNSUPPORTED",
        advice: "the function cannot be reset alone; behind a PCI Express root port of its own it can",
      },
    });
  }

  /** Let go of all registers. The descriptor has to be closed after this: a mapping keeps the function busy. */
  close(): void {
    for (const registers of this.#registers) registers.close();
  }

  #bar(bar: number): VfioRegionInfo {
    return this.#bars[checkInteger("bar", bar, 0, BARS - 1)];
  }

  #region(index: number, what: string): VfioRegionInfo {
    if (index >= this.info.numRegions) return { flags: 0, size: 0, offset: 0, mappable: undefined };
    const question = { size: VfioSize.REGION_INFO, index, what: `asking for ${what} of ${this.#name}` };
    return decodeVfioRegionInfo(vfioQuery(this.fd, "DEVICE_GET_REGION_INFO", question));
  }
}

function accessible(flags: number): boolean {
  return (flags & VfioRegionFlag.READ) !== 0 && (flags & VfioRegionFlag.WRITE) !== 0;
}

/** Whether the pages of a stretch can be mapped: all of them, since there is no mapping of less than a page. */
function isMappable({ flags, mappable, offset: position }: VfioRegionInfo, offset: number, length: number): boolean {
  // A region that does not begin on a page cannot be mapped in pages.
  if ((flags & VfioRegionFlag.MMAP) === 0 || position % PAGE_BYTES !== 0) return false;
  if (mappable === undefined) return true;
  const start = Math.floor(offset / PAGE_BYTES) * PAGE_BYTES;
  const end = Math.ceil((offset + length) / PAGE_BYTES) * PAGE_BYTES;
  return mappable.some((area) => area.offset <= start && end <= area.offset + area.size);
}
