/** Which PCI functions are virtio devices, and of which type: the ids of the specification. Pure. */

/** Vendor id of virtio devices (4.1.2). */
export const VIRTIO_PCI_VENDOR = 0x1af4;

/** Device id of type 0 of devices that are not transitional (4.1.2.1). */
const MODERN_BASE = 0x1040;
const MODERN_LAST = 0x107f;

/** Types of transitional devices by device id (4.1.2.1); nothing else between 0x1000 and 0x103f is a virtio device. */
const TRANSITIONAL_TYPES: ReadonlyMap<number, number> = new Map([
  [0x1000, 1],
  [0x1001, 2],
  [0x1002, 5],
  [0x1003, 3],
  [0x1004, 8],
  [0x1005, 4],
  [0x1009, 9],
]);

/** Short names of the device types by virtio device id (5). */
const TYPE_NAMES: ReadonlyMap<number, string> = new Map([
  [1, "net"],
  [2, "blk"],
  [3, "console"],
  [4, "rng"],
  [5, "balloon"],
  [7, "rpmsg"],
  [8, "scsi"],
  [9, "9p"],
  [16, "gpu"],
  [17, "clock"],
  [18, "input"],
  [19, "vsock"],
  [20, "crypto"],
  [22, "pstore"],
  [23, "iommu"],
  [24, "mem"],
  [25, "sound"],
  [26, "fs"],
  [27, "pmem"],
  [28, "rpmb"],
  [30, "video-encoder"],
  [31, "video-decoder"],
  [32, "scmi"],
  [34, "i2c"],
  [35, "watchdog"],
  [36, "can"],
  [40, "bluetooth"],
  [41, "gpio"],
  [42, "rdma"],
  [43, "camera"],
]);

/** What the ids of a virtio PCI function say. */
export interface VirtioPciId {
  /** Virtio device id: 1 net, 2 blk, … */
  readonly type: number;
  /** Whether it may also speak the legacy interface, or nothing else. */
  readonly transitional: boolean;
}

/**
 * What a PCI function is as a virtio device; undefined when it is none. The revision plays no part (4.1.2.1).
 *
 * @param vendor PCI vendor id.
 * @param device PCI device id.
 * @example
 * ```ts
 * import { virtioPciId, virtioTypeName } from "virtio-driver/protocol";
 * const id = virtioPciId(0x1af4, 0x1042);
 * console.log(id?.type, id?.transitional, virtioTypeName(id?.type ?? 0)); // 2 false blk
 * ```
 */
export function virtioPciId(vendor: number, device: number): VirtioPciId | undefined {
  if (vendor !== VIRTIO_PCI_VENDOR) return undefined;
  if (device >= MODERN_BASE && device <= MODERN_LAST) return { type: device - MODERN_BASE, transitional: false };
  const type = TRANSITIONAL_TYPES.get(device);
  return type === undefined ? undefined : { type, transitional: true };
}

/** The short name of a device type: `blk` for 2; `type 63` for one without a name here. */
export function virtioTypeName(type: number): string {
  return TYPE_NAMES.get(type) ?? `type ${type}`;
}
