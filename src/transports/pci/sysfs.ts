/** What sysfs tells about PCI functions: what they are, which driver has them, with whom they share an IOMMU group. */

import { basename, join } from "node:path";
import { VirtioError } from "../../errors.js";
import { type VirtioPciId, virtioPciId } from "../../protocol/pci-ids.js";
import { errno } from "../../sys/errno.js";
import { entries, readLink, readText } from "../../sys/kernel-files.js";
import { parsePciAddress } from "./address.js";

/** Where sysfs is mounted. */
const SYSFS = "/sys";

/** A device in an IOMMU group. */
export interface IommuGroupMember {
  /** Its name on its bus: the address, for a PCI function. */
  readonly address: string;
  /** The driver that has it; undefined for none. */
  readonly driver: string | undefined;
  /** Whether the kernel uses it, so that the group cannot be given to a process before it is unbound. */
  readonly inKernelUse: boolean;
}

/** The devices that an IOMMU cannot tell apart: they are given to a process together or not at all. */
export interface IommuGroup {
  readonly number: number;
  /** Whether there is no IOMMU behind it: the unsafe mode of VFIO, in which a device reaches all memory. */
  readonly noIommu: boolean;
  /** All of them, by address. */
  readonly members: readonly IommuGroupMember[];
}

/** What sysfs tells about a PCI function. */
export interface PciFacts {
  /** Domain, bus, device and function: `0000:00:04.0`. */
  readonly address: string;
  readonly vendor: number;
  readonly device: number;
  /** Class, subclass and programming interface: 24 bits. */
  readonly class: number;
  /** What it is as a virtio device; undefined when it is none. */
  readonly virtio: VirtioPciId | undefined;
  /** The driver that has it; undefined for none. */
  readonly driver: string | undefined;
  /** The only driver that may have it, when somebody has laid that down. */
  readonly driverOverride: string | undefined;
  /** Undefined where there is no IOMMU, or it is off. */
  readonly group: IommuGroup | undefined;
}

/** The folder of a function in sysfs. */
export function pciFolder(address: string, sysfs = SYSFS): string {
  return join(sysfs, "bus/pci/devices", address);
}

/**
 * Read what sysfs tells about one PCI function, virtio or not.
 *
 * @param address as {@link parsePciAddress} takes it.
 * @param sysfs where sysfs is mounted.
 * @throws VirtioError ERR_VIRTIO_ADDRESS for no address, ERR_VIRTIO_CONNECT (errno ENOENT) when there is no such
 *   function, ERR_VIRTIO_SYSCALL or ERR_VIRTIO_PERMISSION when sysfs cannot be read.
 */
export function readPciFunction(address: string, sysfs = SYSFS): PciFacts {
  const name = parsePciAddress(address);
  const folder = pciFolder(name, sysfs);
  const vendor = readNumber(join(folder, "vendor"));
  if (vendor === undefined) {
    throw new VirtioError(
      "ERR_VIRTIO_CONNECT",
      `there is no PCI function ${name} (${folder}: ENOENT from open); \`virtio pci list\` shows the virtio functions`,
      { errno: errno.ENOENT, syscall: "open" },
    );
  }
  const device = readNumber(join(folder, "device")) ?? 0;
  const override = readText(join(folder, "driver_override"));
  return {
    address: name,
    ...{ vendor, device, class: readNumber(join(folder, "class")) ?? 0, virtio: virtioPciId(vendor, device) },
    driver: linkName(join(folder, "driver")),
    driverOverride: override === "(null)" || override === "" ? undefined : override,
    group: readGroup(folder, sysfs),
  };
}

/** A PCI function that is a virtio device. */
export type VirtioPciFacts = PciFacts & { readonly virtio: VirtioPciId };

/**
 * Read what sysfs tells about every virtio function of this machine, by address; none where there is no PCI.
 *
 * @throws VirtioError ERR_VIRTIO_SYSCALL or ERR_VIRTIO_PERMISSION when sysfs cannot be read.
 */
export function listVirtioFunctions(sysfs = SYSFS): VirtioPciFacts[] {
  return entries(pciFolder("", sysfs))
    .map((address) => readPciFunction(address, sysfs))
    .filter((facts): facts is VirtioPciFacts => facts.virtio !== undefined);
}

/** Whether a driver's whole purpose is to hand functions to user processes: vfio-pci and its kin. */
export function isVfioDriver(driver: string | undefined): boolean {
  return driver !== undefined && /vfio/.test(driver);
}

/** The group of the device in `folder`; undefined when it has none. */
function readGroup(folder: string, sysfs: string): IommuGroup | undefined {
  const number = linkName(join(folder, "iommu_group"));
  if (number === undefined) return undefined;
  const group = join(sysfs, "kernel/iommu_groups", number);
  const members = entries(join(group, "devices")).map((address): IommuGroupMember => {
    const member = join(group, "devices", address);
    const driver = linkName(join(member, "driver"));
    return { address, driver, inKernelUse: driver !== undefined && !leavesGroupAlone(member, driver) };
  });
  return { number: Number(number), noIommu: readText(join(group, "name")) === "vfio-noiommu", members };
}

/** Whether VFIO gives a group away although this driver has one of its devices. */
function leavesGroupAlone(folder: string, driver: string): boolean {
  if (isVfioDriver(driver) || driver === "pci-stub" || driver === "pcieport") return true;
  // A bridge between PCI buses (class 06, subclass 04) does no DMA of its own.
  return (readNumber(join(folder, "class")) ?? 0) >>> 8 === 0x0604;
}

/** The last name of where a link leads: that of a driver or group. */
function linkName(path: string): string | undefined {
  const target = readLink(path);
  return target === undefined ? undefined : basename(target);
}

function readNumber(path: string): number | undefined {
  const text = readText(path);
  return text === undefined ? undefined : Number(text);
}
