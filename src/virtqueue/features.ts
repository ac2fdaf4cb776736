/** Feature bits that do not depend on the device type (virtio 1.3, clause 6), as bigint masks. */

/**
 * Device-independent feature bits as masks, to be combined with `|`. C names: `VIRTIO_F_…` and, for the
 * first two, `VIRTIO_RING_F_…` in `<linux/virtio_config.h>` and `<linux/virtio_ring.h>`.
 *
 * @example
 * ```ts
 * import { VirtioFeature } from "virtio-driver";
 * const features = VirtioFeature.VERSION_1 | VirtioFeature.RING_PACKED;
 * console.log(features === 0x5_0000_0000n); // true
 * ```
 */
export const VirtioFeature = {
  /** `VIRTIO_RING_F_INDIRECT_DESC`, bit 28: tables of descriptors. */
  INDIRECT_DESC: 1n << 28n,
  /** `VIRTIO_RING_F_EVENT_IDX`, bit 29: notifications at a chosen index. */
  EVENT_IDX: 1n << 29n,
  /** `VIRTIO_F_VERSION_1`, bit 32: not a legacy device. Always required here. */
  VERSION_1: 1n << 32n,
  /** `VIRTIO_F_ACCESS_PLATFORM`, bit 33: the device is behind an IOMMU. */
  ACCESS_PLATFORM: 1n << 33n,
  /** `VIRTIO_F_RING_PACKED`, bit 34: packed virtqueues. */
  RING_PACKED: 1n << 34n,
  /** `VIRTIO_F_IN_ORDER`, bit 35: buffers come back in the order they were made available. */
  IN_ORDER: 1n << 35n,
  /** `VIRTIO_F_ORDER_PLATFORM`, bit 36: barriers fit for hardware devices are needed. */
  ORDER_PLATFORM: 1n << 36n,
  /** `VIRTIO_F_SR_IOV`, bit 37. Never accepted. */
  SR_IOV: 1n << 37n,
  /** `VIRTIO_F_NOTIFICATION_DATA`, bit 38: notifications carry the ring position. */
  NOTIFICATION_DATA: 1n << 38n,
  /** `VIRTIO_F_NOTIF_CONFIG_DATA`, bit 39: notifications carry a value named by the device. */
  NOTIF_CONFIG_DATA: 1n << 39n,
  /** `VIRTIO_F_RING_RESET`, bit 40: single queues can be reset. */
  RING_RESET: 1n << 40n,
} as const;

/** Name every bit of `features`, lowest first; a bit without a name in `tables` reads `BIT_n`. */
export function featureNames(features: bigint, ...tables: readonly Readonly<Record<string, bigint>>[]): string[] {
  const names: string[] = [];
  for (let bit = 0n, rest = features; rest > 0n; bit += 1n, rest >>= 1n) {
    if ((rest & 1n) === 0n) continue;
    const mask = 1n << bit;
    const named = [VirtioFeature, ...tables].flatMap((table) => Object.entries(table)).find(([, m]) => m === mask);
    names.push(named === undefined ? `BIT_${bit}` : named[0]);
  }
  return names;
}
