/** The device status field, by which driver and device follow the initialization of each other. */

/**
 * Bits of the device status (virtio 1.3, clause 2.1; C names VIRTIO_CONFIG_S_*). 0 means that the device is reset.
 *
 * @example
 * ```ts
 * import { VirtioStatus } from "virtio-driver/protocol";
 * console.log(VirtioStatus.ACKNOWLEDGE | VirtioStatus.DRIVER); // 3
 * ```
 */
export const VirtioStatus = {
  /** The driver has found the device. */
  ACKNOWLEDGE: 1,
  /** The driver knows how to drive it. */
  DRIVER: 2,
  /** The driver is set up and ready: the device is live. */
  DRIVER_OK: 4,
  /** The features are agreed on. */
  FEATURES_OK: 8,
  /** The device has an error from which only a reset recovers. */
  DEVICE_NEEDS_RESET: 64,
  /** The driver has given the device up. */
  FAILED: 128,
} as const;

/** The bits that are set in a status byte, by name, for messages: `ACKNOWLEDGE|DRIVER`. */
export function statusNames(status: number): string {
  const names = Object.entries(VirtioStatus)
    .filter(([, bit]) => (status & bit) !== 0)
    .map(([name]) => name);
  return names.length === 0 ? "0" : names.join("|");
}
