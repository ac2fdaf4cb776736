/** Request numbers, feature masks and limits of vhost-vdpa (`<linux/vhost.h>`, `<linux/vhost_types.h>`). */

/**
 * Numbers of the ioctls on a vhost-vdpa device; C names with `VHOST_` or `VHOST_VDPA_` before them. The same on
 * x86-64 and arm64.
 *
 * @example
 * ```ts
 * import { VhostVdpaRequest } from "virtio-driver/protocol";
 * console.log(VhostVdpaRequest.SET_OWNER.toString(16)); // af01
 * ```
 */
export const VhostVdpaRequest = {
  /** u64: features that the device offers. */
  GET_FEATURES: 0x8008_af00,
  /** u64: features to be in force. */
  SET_FEATURES: 0x4008_af00,
  /** No argument. This process is the owner: its memory is what addresses mean. */
  SET_OWNER: 0x0000_af01,
  /** `struct vhost_vring_state`: descriptors. */
  SET_VRING_NUM: 0x4008_af10,
  /** `struct vhost_vring_addr`: where the areas are, as IOVAs. */
  SET_VRING_ADDR: 0x4028_af11,
  /** `struct vhost_vring_state`: position to begin at. */
  SET_VRING_BASE: 0x4008_af12,
  /** `struct vhost_vring_state`: position of a queue that is stopped. */
  GET_VRING_BASE: 0xc008_af12,
  /** `struct vhost_vring_file`: eventfd by which the driver notifies. */
  SET_VRING_KICK: 0x4008_af20,
  /** `struct vhost_vring_file`: eventfd by which the device notifies. */
  SET_VRING_CALL: 0x4008_af21,
  /** u64: features of the interface to be in force, masks of {@link VhostVdpaBackendFeature}. */
  SET_BACKEND_FEATURES: 0x4008_af25,
  /** u64: features that the interface has. */
  GET_BACKEND_FEATURES: 0x8008_af26,
  /** u32: device type (virtio 1.3, clause 5). */
  GET_DEVICE_ID: 0x8004_af70,
  /** u8: device status. */
  GET_STATUS: 0x8001_af71,
  /** u8: device status; 0 resets. */
  SET_STATUS: 0x4001_af72,
  /** `struct vhost_vdpa_config` with room for the bytes. */
  GET_CONFIG: 0x8008_af73,
  /** `struct vhost_vdpa_config` with the bytes. */
  SET_CONFIG: 0x4008_af74,
  /** `struct vhost_vring_state`: 1 enables a queue. */
  SET_VRING_ENABLE: 0x4008_af75,
  /** u16: most descriptors of any queue. */
  GET_VRING_NUM: 0x8002_af76,
  /** int: eventfd that tells of changes of the config space and of the status. */
  SET_CONFIG_CALL: 0x4004_af77,
  /** `struct vhost_vdpa_iova_range`. */
  GET_IOVA_RANGE: 0x8010_af78,
  /** u32: bytes of the config space. */
  GET_CONFIG_SIZE: 0x8004_af79,
  /** No argument: stop the device and keep its state. */
  SUSPEND: 0x0000_af7d,
  /** No argument: go on after `SUSPEND`. */
  RESUME: 0x0000_af7e,
  /** u32: queues of the device; Linux 5.18. */
  GET_VQS_COUNT: 0x8004_af80,
} as const;

/**
 * Features of the interface itself as masks (`VHOST_BACKEND_F_…`, which in C are numbers of bits).
 *
 * @example
 * ```ts
 * import { VhostVdpaBackendFeature } from "virtio-driver/protocol";
 * console.log(VhostVdpaBackendFeature.IOTLB_MSG_V2); // 2n
 * ```
 */
export const VhostVdpaBackendFeature = {
  /** Bit 1: IOTLB messages of version 2. */
  IOTLB_MSG_V2: 1n << 1n,
  /** Bit 2: several IOTLB messages as one change. */
  IOTLB_BATCH: 1n << 2n,
  /** Bit 3: several address spaces. */
  IOTLB_ASID: 1n << 3n,
  /** Bit 4: `SUSPEND`. */
  SUSPEND: 1n << 4n,
  /** Bit 5: `RESUME`. */
  RESUME: 1n << 5n,
  /** Bit 6: queues may be enabled after DRIVER_OK. */
  ENABLE_AFTER_DRIVER_OK: 1n << 6n,
  /** Bit 7: descriptors in an address space of their own. */
  DESC_ASID: 1n << 7n,
  /** Bit 8: mappings outlive a reset of the device. */
  IOTLB_PERSIST: 1n << 8n,
} as const;

/** `type` of a `struct vhost_iotlb_msg` (`VHOST_IOTLB_…`). */
export const IotlbType = { UPDATE: 2, INVALIDATE: 3, BATCH_BEGIN: 5, BATCH_END: 6 } as const;

/** `perm` of a `struct vhost_iotlb_msg` (`VHOST_ACCESS_…`): what the device may do. */
export const IotlbAccess = { NONE: 0, READ: 1, WRITE: 2, READ_WRITE: 3 } as const;

/** Bytes of a `struct vhost_msg` and of a `struct vhost_msg_v2`. */
export const IOTLB_MESSAGE_SIZE = 72;

/** Bytes of a `struct vhost_vdpa_config` before its data. */
export const VDPA_CONFIG_HEADER_SIZE = 8;
