/** The side of VFIO that is about memory: a container with one IOMMU group, and what the IOMMU lets through. */

import { openSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { rangeError, VirtioError } from "../../errors.js";
import type { IovaRange, MemoryRegion } from "../../memory/index.js";
import {
  decodeVfioDmaUnmap,
  decodeVfioGroupStatus,
  decodeVfioType1Info,
  encodeVfioDmaMap,
  encodeVfioDmaUnmap,
  encodeVfioQuery,
  VFIO_API_VERSION,
  VfioDmaFlag,
  VfioGroupFlag,
  VfioIommu,
  VfioSize,
  type VfioType1Info,
} from "../../protocol/vfio.js";
import { addressOf, closeFd, errnoName, fileError } from "../../sys/index.js";
import type { IommuGroup } from "./sysfs.js";
import { Holdings, type Refusal, vfioQuery, vfioRequest } from "./vfio-requests.js";

/** Mappings of a container where the kernel does not say how many it takes: the default of vfio_iommu_type1. */
const DEFAULT_MAPPINGS = 65_535;
/** The smallest page of an IOMMU that IovaSpace reckons with. */
const MIN_PAGE = 4096n;
/** Addresses from here on are left alone: no device memory needs them, and numbers stay far below 2^53. */
const IOVA_END = 2n ** 46n;

/** A container that holds one IOMMU group, alone. */
export class VfioContainer {
  /** What the function can be given for memory, in whole pages of the IOMMU. */
  readonly iovaRanges: readonly IovaRange[];
  /** Regions that can be mapped at the same time. */
  readonly maxRegions: number;
  readonly #name: string;
  readonly #fd: number;
  readonly #group: number;
  readonly #holdings: Holdings;
  readonly #mapped = new Set<MemoryRegion>();

  private constructor(name: string, fd: number, group: number, holdings: Holdings) {
    this.#name = name;
    this.#fd = fd;
    this.#group = group;
    this.#holdings = holdings;
    const info = decodeVfioType1Info(
      vfioQuery(fd, "IOMMU_GET_INFO", { size: VfioSize.TYPE1_INFO, what: `asking for the addresses of ${name}` }),
    );
    this.iovaRanges = usableRanges(info, name);
    this.maxRegions = info.dmaAvail ?? DEFAULT_MAPPINGS;
  }

  /**
   * Take an IOMMU group, and put it behind an IOMMU of type 1, version 2.
   *
   * @param address the function that it is taken for, for messages.
   * @param folder where the nodes of VFIO are: `/dev/vfio`.
   * @throws VirtioError ERR_VIRTIO_BUSY when somebody has the group, ERR_VIRTIO_CONNECT when it is not viable,
   *   ERR_VIRTIO_UNSUPPORTED when VFIO has no such IOMMU, ERR_VIRTIO_PERMISSION, ERR_VIRTIO_SYSCALL.
   */
  static open(address: string, group: IommuGroup, folder: string): VfioContainer {
    const holdings = new Holdings();
    try {
      const fd = openNode(join(folder, "vfio"), holdings, {
        ENOENT: { code: "ERR_VIRTIO_CONNECT", advice: "load the modules: modprobe -a vfio-pci vfio_iommu_type1" },
      });
      checkKind(fd);
      const node = join(folder, String(group.number));
      const groupFd = openNode(node, holdings, {
        ENOENT: {
          code: "ERR_VIRTIO_CONNECT",
          advice: `no driver of VFIO has a device of this group; bind it: virtio pci bind ${address}`,
        },
        EBUSY: {
          code: "ERR_VIRTIO_BUSY",
          advice: `somebody has it open, and one process at a time can; \`fuser ${node}\` tells who, close it there`,
        },
        EACCES: {
          code: "ERR_VIRTIO_PERMISSION",
          advice: `give it to the user: chown USER ${node}, or for good by a udev rule SUBSYSTEM=="vfio", OWNER="USER"`,
        },
      });
      attach(fd, groupFd, address, group, holdings);
      return new VfioContainer(address, fd, groupFd, holdings);
    } catch (error) {
      return holdings.abandon(error);
    }
  }

  /**
   * Take the function out of the group: a descriptor of its own, which is the caller's.
   *
   * @throws VirtioError ERR_VIRTIO_CONNECT when it is not in VFIO's hands any more, ERR_VIRTIO_SYSCALL.
   */
  openDevice(): number {
    const what = `opening ${this.#name} by VFIO`;
    return vfioRequest(this.#group, "GROUP_GET_DEVICE_FD", Buffer.from(`${this.#name}\0`), what, {
      ENODEV: { code: "ERR_VIRTIO_CONNECT", advice: `bind it: virtio pci bind ${this.#name}` },
      EBUSY: { code: "ERR_VIRTIO_BUSY", advice: "somebody uses it; close it there" },
    });
  }

  /**
   * Let the function read and write a region at its IOVA. Its memory is locked meanwhile.
   *
   * @throws VirtioError ERR_VIRTIO_MEMORY when less memory may be locked or no mapping is left, ERR_VIRTIO_SYSCALL.
   */
  map(region: MemoryRegion): void {
    const { iova, size } = region;
    const bytes = encodeVfioDmaMap({
      flags: VfioDmaFlag.READ | VfioDmaFlag.WRITE,
      vaddr: addressOf(region.buffer),
      iova,
      size,
    });
    vfioRequest(
      this.#fd,
      "IOMMU_MAP_DMA",
      bytes,
      `letting ${this.#name} reach ${size} bytes at 0x${iova.toString(16)}`,
      {
        ENOMEM: {
          code: "ERR_VIRTIO_MEMORY",
          advice:
            `all memory that a function can reach is locked, and this process may lock ${lockedMemoryLimit()}; raise ` +
            "`ulimit -l` (LimitMEMLOCK= of a systemd unit, memlock of /etc/security/limits.conf), or use less memory",
        },
        ENOSPC: {
          code: "ERR_VIRTIO_MEMORY",
          advice: "the container takes no more mappings; use fewer and larger regions",
        },
        EEXIST: { advice: "something is mapped there already" },
      },
    );
    this.#mapped.add(region);
  }

  /**
   * Take a region from the function: no access of it follows.
   *
   * @throws RangeError when it is not mapped. VirtioError ERR_VIRTIO_SYSCALL or ERR_VIRTIO_PROTOCOL when it cannot be
   *   taken; the function may reach it still.
   */
  unmap(region: MemoryRegion): void {
    if (!this.#mapped.has(region)) throw rangeError("region", "a region that mapDma was given", region);
    const { iova, size } = region;
    const what = `taking ${size} bytes at 0x${iova.toString(16)} from ${this.#name}`;
    const bytes = encodeVfioDmaUnmap({ iova, size });
    vfioRequest(this.#fd, "IOMMU_UNMAP_DMA", bytes, what);
    const unmapped = decodeVfioDmaUnmap(bytes);
    if (unmapped !== BigInt(size)) {
      throw new VirtioError(
        "ERR_VIRTIO_PROTOCOL",
        `${what}: the kernel unmapped ${unmapped} bytes; close the function`,
      );
    }
    this.#mapped.delete(region);
  }

  /** Unmap what is mapped, give the group back. The function must have been closed. */
  close(): void {
    for (const region of this.#mapped) this.#holdings.add(() => this.unmap(region));
    this.#holdings.release();
  }
}

/** Open a node of VFIO. */
function openNode(path: string, holdings: Holdings, refusals: Readonly<Record<string, Refusal>>): number {
  let fd: number;
  try {
    fd = openSync(path, "r+");
  } catch (cause) {
    const { errno = 0 } = fileError(cause, path);
    const refusal = refusals[errnoName(errno)];
    const error = fileError(cause, `opening ${path}`, refusal?.advice);
    if (refusal?.code === undefined) throw error;
    throw new VirtioError(refusal.code, error.message, { errno, syscall: "open" });
  }
  holdings.add(() => closeFd(fd));
  return fd;
}

/** Refuse a container of another interface, or without the IOMMU that we need. */
function checkKind(fd: number): void {
  const version = vfioRequest(fd, "GET_API_VERSION", 0, "asking for the version of VFIO");
  if (version !== VFIO_API_VERSION) {
    throw new VirtioError(
      "ERR_VIRTIO_UNSUPPORTED",
      `VFIO of this kernel has version ${version}, only ${VFIO_API_VERSION} is known; use a newer virtio-driver`,
    );
  }
  if (vfioRequest(fd, "CHECK_EXTENSION", VfioIommu.TYPE1V2, "asking for a type 1 IOMMU") === 0) {
    throw new VirtioError(
      "ERR_VIRTIO_UNSUPPORTED",
      "VFIO of this kernel has no IOMMU of type 1, version 2; load the module: modprobe vfio_iommu_type1",
    );
  }
}

/** Put the group into the container, and the container behind the IOMMU. */
function attach(fd: number, group: number, address: string, facts: IommuGroup, holdings: Holdings): void {
  const name = `IOMMU group ${facts.number}`;
  const status = encodeVfioQuery(VfioSize.GROUP_STATUS);
  vfioRequest(group, "GROUP_GET_STATUS", status, `asking for the status of ${name}`);
  const used = `${name}, in which ${address} is, is not viable: ${usersOf(facts)}`;
  if ((decodeVfioGroupStatus(status) & VfioGroupFlag.VIABLE) === 0) throw new VirtioError("ERR_VIRTIO_CONNECT", used);
  const container = new Uint8Array(Int32Array.of(fd).buffer);
  vfioRequest(group, "GROUP_SET_CONTAINER", container, `putting ${name} into a container`, {
    EBUSY: { code: "ERR_VIRTIO_CONNECT", advice: used },
  });
  holdings.add(() => vfioRequest(group, "GROUP_UNSET_CONTAINER", 0, `taking ${name} out of its container`));
  vfioRequest(fd, "SET_IOMMU", VfioIommu.TYPE1V2, `putting ${name} behind its IOMMU`, {
    EPERM: {
      advice:
        "this IOMMU cannot tell whose interrupts are whose: turn interrupt remapping on (firmware, kernel parameters), " +
        "or, where every function is trusted, load vfio_iommu_type1 with allow_unsafe_interrupts=1",
    },
  });
}

/** Who keeps a group from being given away. */
function usersOf({ members }: IommuGroup): string {
  const users = members.filter(({ inKernelUse }) => inKernelUse);
  if (users.length === 0) return "the kernel uses a device of it; see who is in the group by `virtio pci list`";
  const list = users.map(({ address, driver }) => `${address} (driver ${driver})`).join(", ");
  return `the kernel uses ${list}; unbind all functions of the group, or bind them to vfio-pci`;
}

/** The addresses that are fit for `IovaSpace`. */
function usableRanges({ iovaRanges, pageSizes }: VfioType1Info, name: string): IovaRange[] {
  if (iovaRanges === undefined) {
    throw new VirtioError(
      "ERR_VIRTIO_UNSUPPORTED",
      `this kernel does not say which addresses ${name} can use; Linux 5.4 and newer do`,
    );
  }
  // The lowest bit: the smallest page.
  const smallest = pageSizes & -pageSizes;
  const page = smallest > MIN_PAGE ? smallest : MIN_PAGE;
  const usable: IovaRange[] = [];
  for (const { start, end } of iovaRanges) {
    const from = ((start + page - 1n) / page) * page;
    const past = end < IOVA_END ? end + 1n : IOVA_END;
    const to = (past / page) * page;
    if (from < to) usable.push({ start: Number(from), end: Number(to - 1n) });
  }
  if (usable.length > 0) return usable;
  throw new VirtioError(
    "ERR_VIRTIO_UNSUPPORTED",
    `the IOMMU of ${name} has no address below 2^46 in pages of ${page} bytes; this is no IOMMU for this driver`,
  );
}

/** What this process may lock, in words. */
function lockedMemoryLimit(): string {
  const limit = /^Max locked memory +(\d+|unlimited)/m.exec(readFileSync("/proc/self/limits", "utf8"))?.[1];
  return limit === undefined || limit === "unlimited" ? "any amount" : `${limit} bytes`;
}
