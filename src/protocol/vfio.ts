/**
 * VFIO as the kernel speaks it for PCI functions behind a type 1 IOMMU: numbers of requests, flags, and the codecs of
 * their structs. Pure: bytes in, values out. Reference: `<linux/vfio.h>`, whose names are kept.
 */

import type { VirtioError } from "../errors.js";
import { blank, bytesOf, getU32, getU64, LITTLE_ENDIAN, protocolError, putU32, putU64, viewOf } from "./structs.js";

/** Requests (`VFIO_…`): type ';', numbers from 100 on, no size in them. Some mean another thing on another descriptor. */
export const VfioRequest = {
  /** On the container; returns {@link VFIO_API_VERSION}. */
  GET_API_VERSION: 0x3b64,
  /** On the container; the argument is of {@link VfioIommu}. */
  CHECK_EXTENSION: 0x3b65,
  /** On the container; the argument is of {@link VfioIommu}. */
  SET_IOMMU: 0x3b66,
  GROUP_GET_STATUS: 0x3b67,
  GROUP_SET_CONTAINER: 0x3b68,
  GROUP_UNSET_CONTAINER: 0x3b69,
  /** On the group; returns the descriptor of the device named by the string. */
  GROUP_GET_DEVICE_FD: 0x3b6a,
  DEVICE_GET_INFO: 0x3b6b,
  DEVICE_GET_REGION_INFO: 0x3b6c,
  DEVICE_GET_IRQ_INFO: 0x3b6d,
  DEVICE_SET_IRQS: 0x3b6e,
  DEVICE_RESET: 0x3b6f,
  /** On the container, as the next two. */
  IOMMU_GET_INFO: 0x3b70,
  IOMMU_MAP_DMA: 0x3b71,
  IOMMU_UNMAP_DMA: 0x3b72,
} as const;

/** The version of the interface that is described here (`VFIO_API_VERSION`). */
export const VFIO_API_VERSION = 0;

/** Kinds of IOMMU (`VFIO_…_IOMMU`). */
export const VfioIommu = {
  /** Type 1, version 2: unmapping never splits a mapping. */
  TYPE1V2: 3,
} as const;

/** `vfio_group_status.flags` (`VFIO_GROUP_FLAGS_…`). */
export const VfioGroupFlag = {
  /** Every device of the group is in the hands of VFIO, or of nobody. */
  VIABLE: 1,
} as const;

/** `vfio_device_info.flags` (`VFIO_DEVICE_FLAGS_…`). */
export const VfioDeviceFlag = {
  /** DEVICE_RESET works. */
  RESET: 1,
  /** It is a PCI function. */
  PCI: 2,
} as const;

/** `vfio_region_info.flags` (`VFIO_REGION_INFO_FLAG_…`). */
export const VfioRegionFlag = { READ: 1, WRITE: 2, MMAP: 4, CAPS: 8 } as const;

/** Indices of regions (`VFIO_PCI_…_REGION_INDEX`); 0 to 5 are the BARs. */
export const VfioPciRegion = { CONFIG: 7 } as const;

/** Indices of interrupts (`VFIO_PCI_…_IRQ_INDEX`). */
export const VfioPciIrq = { INTX: 0, MSIX: 2, REQ: 4 } as const;

/** `vfio_irq_info.flags` (`VFIO_IRQ_INFO_…`). */
export const VfioIrqFlag = {
  /** It can signal an event descriptor. */
  EVENTFD: 1,
} as const;

/** `vfio_irq_set.flags` (`VFIO_IRQ_SET_…`): one of DATA, one of ACTION. */
export const VfioIrqSetFlag = {
  DATA_NONE: 1,
  DATA_EVENTFD: 4,
  ACTION_UNMASK: 16,
  ACTION_TRIGGER: 32,
} as const;

/** `vfio_iommu_type1_dma_map.flags` (`VFIO_DMA_MAP_FLAG_…`): what the device may do. */
export const VfioDmaFlag = { READ: 1, WRITE: 2 } as const;

/** Bytes of the fixed part of each struct. */
export const VfioSize = {
  /** `struct vfio_group_status` */
  GROUP_STATUS: 8,
  /** `struct vfio_device_info` without what Linux 6.2 added behind it. */
  DEVICE_INFO: 20,
  /** `struct vfio_region_info` */
  REGION_INFO: 32,
  /** `struct vfio_irq_info` */
  IRQ_INFO: 16,
  /** `struct vfio_irq_set` without its data. */
  IRQ_SET: 20,
  /** `struct vfio_iommu_type1_info` */
  TYPE1_INFO: 24,
  /** `struct vfio_iommu_type1_dma_map` */
  DMA_MAP: 32,
  /** `struct vfio_iommu_type1_dma_unmap` */
  DMA_UNMAP: 24,
} as const;

/** `vfio_info_cap_header.id` of regions (`VFIO_REGION_INFO_CAP_…`). */
const REGION_CAP_SPARSE_MMAP = 1;
/** `vfio_info_cap_header.id` of a type 1 IOMMU (`VFIO_IOMMU_TYPE1_INFO_…`). */
const TYPE1_CAP_IOVA_RANGE = 1;
const TYPE1_CAP_DMA_AVAIL = 3;
/** `vfio_iommu_type1_info.flags` (`VFIO_IOMMU_INFO_…`). */
const TYPE1_FLAG_PGSIZES = 1;
const TYPE1_FLAG_CAPS = 2;

/** `struct vfio_info_cap_header`, and where the lists of those capabilities begin that have one. */
const CAP_HEADER_SIZE = 8;
const CAP_LIST_OFFSET = 16;
const CAP_LIST_ENTRY_SIZE = 16;

/** What VFIO says of a device (`struct vfio_device_info`). */
export interface VfioDeviceInfo {
  /** Bits of {@link VfioDeviceFlag}, and others. */
  readonly flags: number;
  /** Regions have the indices below this. */
  readonly numRegions: number;
  /** Interrupts have the indices below this. */
  readonly numIrqs: number;
}

/** A part of a region. */
export interface VfioArea {
  /** Byte in the region. */
  readonly offset: number;
  /** Bytes. */
  readonly size: number;
}

/** What VFIO says of a region (`struct vfio_region_info`). */
export interface VfioRegionInfo {
  /** Bits of {@link VfioRegionFlag}, and others. */
  readonly flags: number;
  /** Bytes; 0 where there is no such region. */
  readonly size: number;
  /** Where in the device's file it begins. */
  readonly offset: number;
  /**
   * The only parts that can be mapped (`VFIO_REGION_INFO_CAP_SPARSE_MMAP`); undefined: all of it. Kernels that let the
   * MSI-X table be mapped, too (`VFIO_REGION_INFO_CAP_MSIX_MAPPABLE`), leave this capability out.
   */
  readonly mappable: readonly VfioArea[] | undefined;
}

/** What VFIO says of an interrupt (`struct vfio_irq_info`). */
export interface VfioIrqInfo {
  /** Bits of {@link VfioIrqFlag}, and others. */
  readonly flags: number;
  /** How many there are of this kind. */
  readonly count: number;
}

/** What VFIO says of a type 1 IOMMU (`struct vfio_iommu_type1_info`). */
export interface VfioType1Info {
  /** The sizes of pages, one a bit; 0 when the kernel does not say. */
  readonly pageSizes: bigint;
  /** Usable addresses, both ends included, ascending; undefined when the kernel does not say (before Linux 5.4). */
  readonly iovaRanges: readonly { readonly start: bigint; readonly end: bigint }[] | undefined;
  /** How many mappings can be added; undefined when the kernel does not say (before Linux 5.10). */
  readonly dmaAvail: number | undefined;
}

/** What `DEVICE_SET_IRQS` is given (`struct vfio_irq_set`), from interrupt 0 of its kind on. */
export interface VfioIrqSet {
  /** One of {@link VfioPciIrq}. */
  readonly index: number;
  /** `VfioIrqSetFlag.ACTION_…` */
  readonly action: number;
  /** How many interrupts it is about; without descriptors. */
  readonly count?: number;
  /** An event descriptor for each. */
  readonly fds?: readonly number[];
}

/** A piece of memory and where the device finds it (`struct vfio_iommu_type1_dma_map`). */
export interface VfioDmaMap {
  /** Bits of {@link VfioDmaFlag}. */
  readonly flags: number;
  /** Its address in this process. */
  readonly vaddr: number;
  /** The device's address. */
  readonly iova: number;
  /** Bytes. */
  readonly size: number;
}

/**
 * A struct that asks: `argsz`, and `index` where the question is about one of several things.
 *
 * @param size bytes that the kernel may fill, at least those of the struct.
 */
export function encodeVfioQuery(size: number, index?: number): Uint8Array {
  const view = blank(size);
  putU32(view, 0, "argsz", size);
  if (index !== undefined) putU32(view, 8, "index", index);
  return bytesOf(view);
}

/** `argsz` of an answer: how many bytes the kernel wants to give. More than it was given: ask again with that many. */
export function decodeVfioArgsz(bytes: Uint8Array): number {
  return getU32(viewOf(bytes), 0);
}

/** `struct vfio_group_status`: its flags, bits of {@link VfioGroupFlag} and others. */
export function decodeVfioGroupStatus(bytes: Uint8Array): number {
  return getU32(whole(bytes, VfioSize.GROUP_STATUS, "vfio_group_status"), 4);
}

/**
 * `struct vfio_device_info`.
 *
 * @throws VirtioError ERR_VIRTIO_PROTOCOL when it is cut short.
 */
export function decodeVfioDeviceInfo(bytes: Uint8Array): VfioDeviceInfo {
  const view = whole(bytes, VfioSize.DEVICE_INFO, "vfio_device_info");
  return { flags: getU32(view, 4), numRegions: getU32(view, 8), numIrqs: getU32(view, 12) };
}

/**
 * `struct vfio_region_info` with its capabilities.
 *
 * @throws VirtioError ERR_VIRTIO_PROTOCOL when it is cut short, or contradicts itself.
 */
export function decodeVfioRegionInfo(bytes: Uint8Array): VfioRegionInfo {
  const view = whole(bytes, VfioSize.REGION_INFO, "vfio_region_info");
  const flags = getU32(view, 4);
  const size = safe(getU64(view, 16), "the size of a region");
  const offset = safe(getU64(view, 24), "the offset of a region");
  if (!Number.isSafeInteger(offset + size)) throw impossible(`a region of ${size} bytes at ${offset}`);
  let mappable: VfioArea[] | undefined;
  const first = (flags & VfioRegionFlag.CAPS) === 0 ? 0 : getU32(view, 12);
  for (const { id, at } of capabilities(view, VfioSize.REGION_INFO, first)) {
    if (id !== REGION_CAP_SPARSE_MMAP) continue;
    mappable = entries(view, at).map((entry) => {
      const area = { offset: safe(getU64(view, entry), "a mappable area"), size: safe(getU64(view, entry + 8), "one") };
      if (area.offset + area.size > size) {
        throw impossible(`${area.size} mappable bytes at ${area.offset} of a region of ${size}`);
      }
      return area;
    });
  }
  return { flags, size, offset, mappable };
}

/**
 * `struct vfio_irq_info`.
 *
 * @throws VirtioError ERR_VIRTIO_PROTOCOL when it is cut short.
 */
export function decodeVfioIrqInfo(bytes: Uint8Array): VfioIrqInfo {
  const view = whole(bytes, VfioSize.IRQ_INFO, "vfio_irq_info");
  return { flags: getU32(view, 4), count: getU32(view, 12) };
}

/** `struct vfio_irq_set` with its descriptors, if it has some. */
export function encodeVfioIrqSet({ index, action, count = 0, fds }: VfioIrqSet): Uint8Array {
  const size = VfioSize.IRQ_SET + 4 * (fds?.length ?? 0);
  const view = blank(size);
  putU32(view, 0, "argsz", size);
  putU32(view, 4, "flags", action | (fds === undefined ? VfioIrqSetFlag.DATA_NONE : VfioIrqSetFlag.DATA_EVENTFD));
  putU32(view, 8, "index", index);
  putU32(view, 16, "count", fds?.length ?? count);
  fds?.forEach((fd, at) => putU32(view, VfioSize.IRQ_SET + 4 * at, "fd", fd));
  return bytesOf(view);
}

/**
 * `struct vfio_iommu_type1_info` with its capabilities.
 *
 * @throws VirtioError ERR_VIRTIO_PROTOCOL when it is cut short, or contradicts itself.
 */
export function decodeVfioType1Info(bytes: Uint8Array): VfioType1Info {
  const view = whole(bytes, VfioSize.TYPE1_INFO, "vfio_iommu_type1_info");
  const flags = getU32(view, 4);
  let iovaRanges: { start: bigint; end: bigint }[] | undefined;
  let dmaAvail: number | undefined;
  const first = (flags & TYPE1_FLAG_CAPS) === 0 ? 0 : getU32(view, 16);
  for (const { id, at } of capabilities(view, VfioSize.TYPE1_INFO, first)) {
    if (id === TYPE1_CAP_IOVA_RANGE) {
      let past = 0n;
      iovaRanges = entries(view, at).map((entry) => {
        const range = { start: getU64(view, entry), end: getU64(view, entry + 8) };
        if (range.start < past || range.end < range.start) {
          throw impossible(`IOVA range 0x${range.start.toString(16)} to 0x${range.end.toString(16)} out of order`);
        }
        past = range.end + 1n;
        return range;
      });
    } else if (id === TYPE1_CAP_DMA_AVAIL) {
      if (at + CAP_HEADER_SIZE + 4 > view.byteLength) throw impossible("a DMA_AVAIL capability cut short");
      dmaAvail = getU32(view, at + CAP_HEADER_SIZE);
    }
  }
  return { pageSizes: (flags & TYPE1_FLAG_PGSIZES) === 0 ? 0n : getU64(view, 8), iovaRanges, dmaAvail };
}

/** `struct vfio_iommu_type1_dma_map`. */
export function encodeVfioDmaMap({ flags, vaddr, iova, size }: VfioDmaMap): Uint8Array {
  const view = blank(VfioSize.DMA_MAP);
  putU32(view, 0, "argsz", VfioSize.DMA_MAP);
  putU32(view, 4, "flags", flags);
  putU64(view, 8, "vaddr", vaddr);
  putU64(view, 16, "iova", iova);
  putU64(view, 24, "size", size);
  return bytesOf(view);
}

/** `struct vfio_iommu_type1_dma_unmap`. */
export function encodeVfioDmaUnmap({ iova, size }: Pick<VfioDmaMap, "iova" | "size">): Uint8Array {
  const view = blank(VfioSize.DMA_UNMAP);
  putU32(view, 0, "argsz", VfioSize.DMA_UNMAP);
  putU64(view, 8, "iova", iova);
  putU64(view, 16, "size", size);
  return bytesOf(view);
}

/** `struct vfio_iommu_type1_dma_unmap` as the kernel gives it back: how many bytes were unmapped. */
export function decodeVfioDmaUnmap(bytes: Uint8Array): bigint {
  return getU64(whole(bytes, VfioSize.DMA_UNMAP, "vfio_iommu_type1_dma_unmap"), 16);
}

/** Walk a chain of `struct vfio_info_cap_header`; `first` is 0 when there is none. */
function capabilities(view: DataView, structSize: number, first: number): { id: number; at: number }[] {
  const found: { id: number; at: number }[] = [];
  for (let at = first; at !== 0; at = getU32(view, at + 4)) {
    if (at < structSize || at + CAP_HEADER_SIZE > view.byteLength) {
      throw impossible(`a capability at ${at} of a struct of ${view.byteLength} bytes`);
    }
    if (found.some((capability) => capability.at === at)) throw impossible(`a loop of capabilities at ${at}`);
    found.push({ id: view.getUint16(at, LITTLE_ENDIAN), at });
  }
  return found;
}

/** Where the entries lie of a capability that has a list of pairs of u64, their number at byte 8. */
function entries(view: DataView, at: number): number[] {
  const count = at + CAP_LIST_OFFSET > view.byteLength ? Infinity : getU32(view, at + CAP_HEADER_SIZE);
  if (at + CAP_LIST_OFFSET + count * CAP_LIST_ENTRY_SIZE > view.byteLength) {
    throw impossible(`a list of ${count} entries at ${at} of a struct of ${view.byteLength} bytes`);
  }
  return Array.from({ length: count }, (_, index) => at + CAP_LIST_OFFSET + index * CAP_LIST_ENTRY_SIZE);
}

function whole(bytes: Uint8Array, size: number, name: string): DataView {
  if (bytes.length < size) throw impossible(`${bytes.length} bytes of a struct ${name}, which has ${size}`);
  return viewOf(bytes);
}

function safe(value: bigint, what: string): number {
  if (value > BigInt(Number.MAX_SAFE_INTEGER)) throw impossible(`${what}: 0x${value.toString(16)}`);
  return Number(value);
}

function impossible(what: string): VirtioError {
  return protocolError(`VFIO in this kernel answers what cannot be: ${what}`);
}
