/** PCI functions that the kernel gives to this process by VFIO: container, group, TYPE1v2. */

import { checkOptions, VirtioError } from "../../errors.js";
import type { IovaRange, MemoryRegion } from "../../memory/index.js";
import { closeFd, type EventFd, type RegisterWidth } from "../../sys/index.js";
import type { PciFunction, PciRegisters } from "./function.js";
import { type IommuGroup, isVfioDriver, readPciFunction } from "./sysfs.js";
import { VfioContainer } from "./vfio-container.js";
import { VfioDevice } from "./vfio-device.js";
import { VfioInterrupts } from "./vfio-interrupts.js";
import { Holdings } from "./vfio-requests.js";

/** Where the kernel shows what it has. For tests, which show something else. */
export interface VfioOptions {
  /** Where sysfs is. Default `/sys`. */
  readonly sysfs?: string;
  /** Where the nodes of VFIO are. Default `/dev/vfio`. */
  readonly devices?: string;
}

/**
 * Take a virtio function that is bound to vfio-pci. Nobody else can open it, nor any function of its IOMMU group, until
 * it is closed; the function is reset by the kernel then.
 *
 * @param address as `lspci` shows it: `0000:00:04.0`; the domain may be left out.
 * @throws TypeError when the address is no string. VirtioError ERR_VIRTIO_ADDRESS when it is none, or not one of a
 *   virtio function; ERR_VIRTIO_CONNECT when there is no such function, it is not bound to vfio-pci, has no IOMMU, or the
 *   kernel uses another device of its group; ERR_VIRTIO_BUSY when somebody has it; ERR_VIRTIO_PERMISSION when this user
 *   may not; ERR_VIRTIO_UNSUPPORTED when VFIO has no IOMMU that we know; ERR_VIRTIO_SYSCALL, ERR_VIRTIO_PROTOCOL.
 *   Nothing stays open then.
 */
export function openVfio(address: string, options: VfioOptions = {}): PciFunction {
  checkOptions("options", options, ["sysfs", "devices"]);
  const { sysfs = "/sys", devices = "/dev/vfio" } = options;
  const { name, group } = findGroup(address, sysfs);
  const holdings = new Holdings();
  try {
    const container = VfioContainer.open(name, group, devices);
    holdings.add(() => container.close());
    const fd = container.openDevice();
    holdings.add(() => closeFd(fd));
    const device = new VfioDevice(fd, name);
    holdings.add(() => device.close());
    const interrupts = new VfioInterrupts(fd, name, device.info.numIrqs);
    holdings.add(() => interrupts.close());
    return new VfioFunction(name, { container, device, interrupts, holdings });
  } catch (error) {
    return holdings.abandon(error);
  }
}

/** What a function consists of; `holdings` gives all of it back. */
interface Parts {
  readonly container: VfioContainer;
  readonly device: VfioDevice;
  readonly interrupts: VfioInterrupts;
  readonly holdings: Holdings;
}

class VfioFunction implements PciFunction {
  readonly address: string;
  readonly configSize: number;
  readonly msixVectors: number;
  readonly hasIntx: boolean;
  readonly iovaRanges: readonly IovaRange[];
  readonly maxRegions: number;
  readonly canReset: boolean;
  readonly #parts: Parts;
  #open = true;

  constructor(address: string, parts: Parts) {
    const { container, device, interrupts } = parts;
    this.address = address;
    this.configSize = device.config.length;
    this.msixVectors = interrupts.count("MSIX");
    this.hasIntx = interrupts.count("INTX") > 0;
    this.iovaRanges = container.iovaRanges;
    this.maxRegions = container.maxRegions;
    this.canReset = device.canReset;
    this.#parts = parts;
  }

  readConfig(offset: number, width: RegisterWidth): number {
    return this.#live.device.config.read(offset, width);
  }

  writeConfig(offset: number, width: RegisterWidth, value: number): void {
    this.#live.device.config.write(offset, width, value);
  }

  barSize(bar: number): number {
    return this.#live.device.barSize(bar);
  }

  openRegisters(bar: number, offset: number, length: number): PciRegisters {
    return this.#live.device.openRegisters(bar, offset, length);
  }

  setMsix(events: readonly EventFd[]): void {
    this.#live.interrupts.set("MSIX", events);
  }

  setIntx(event: EventFd | undefined): void {
    this.#live.interrupts.set("INTX", event === undefined ? [] : [event]);
  }

  unmaskIntx(): void {
    this.#live.interrupts.unmask("INTX");
  }

  setRelease(event: EventFd | undefined): void {
    this.#live.interrupts.set("REQ", event === undefined ? [] : [event]);
  }

  mapDma(region: MemoryRegion): void {
    this.#live.container.map(region);
  }

  unmapDma(region: MemoryRegion): void {
    this.#live.container.unmap(region);
  }

  reset(): void {
    this.#live.device.reset();
  }

  close(): void {
    this.#open = false;
    this.#parts.holdings.release();
  }

  /** Descriptors are numbers that are given to others after `close`: nobody may use them then. */
  get #live(): Parts {
    if (this.#open) return this.#parts;
    throw new VirtioError("ERR_VIRTIO_CLOSED", `the function ${this.address} is closed; open it again`);
  }
}

/** What sysfs says of a function, as far as it can be opened. */
function findGroup(address: string, sysfs: string): { name: string; group: IommuGroup } {
  const { address: name, virtio, vendor, device, driver, group } = readPciFunction(address, sysfs);
  if (virtio === undefined) {
    throw new VirtioError(
      "ERR_VIRTIO_ADDRESS",
      `${name} is no virtio function: its ids are ${hex(vendor)}:${hex(device)}, those of virtio 1af4:1000 to 1af4:107f; ` +
        "`virtio pci list` shows the virtio functions",
    );
  }
  if (!isVfioDriver(driver)) {
    throw new VirtioError(
      "ERR_VIRTIO_CONNECT",
      `${name} is bound to ${driver === undefined ? "no driver" : `the driver ${driver}`}, not to vfio-pci; ` +
        `bind it: virtio pci bind ${name}`,
    );
  }
  if (group === undefined) {
    throw new VirtioError(
      "ERR_VIRTIO_CONNECT",
      `${name} has no IOMMU group: there is no IOMMU, or it is off; turn it on in the firmware, and in the kernel ` +
        "by the parameter intel_iommu=on on Intel's processors",
    );
  }
  if (group.noIommu) {
    throw new VirtioError(
      "ERR_VIRTIO_UNSUPPORTED",
      `${name} is in VFIO's no-IOMMU mode, which is refused: the device would be given physical addresses with nothing ` +
        "to check them, and a single wrong one corrupts the memory of the whole machine; turn an IOMMU on",
    );
  }
  return { name, group };
}

function hex(id: number): string {
  return id.toString(16).padStart(4, "0");
}
