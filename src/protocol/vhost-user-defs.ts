/** Request ids, feature masks and limits of the vhost-user protocol (QEMU `docs/interop/vhost-user.rst`). */

/**
 * Requests of the front-end (`enum VhostUserRequest`, "Front-end message types").
 *
 * @example
 * ```ts
 * import { VhostUserRequest } from "virtio-driver/protocol";
 * console.log(VhostUserRequest.SET_VRING_KICK); // 12
 * ```
 */
export const VhostUserRequest = {
  GET_FEATURES: 1,
  SET_FEATURES: 2,
  SET_OWNER: 3,
  RESET_OWNER: 4,
  SET_MEM_TABLE: 5,
  SET_LOG_BASE: 6,
  SET_LOG_FD: 7,
  SET_VRING_NUM: 8,
  SET_VRING_ADDR: 9,
  SET_VRING_BASE: 10,
  GET_VRING_BASE: 11,
  SET_VRING_KICK: 12,
  SET_VRING_CALL: 13,
  SET_VRING_ERR: 14,
  GET_PROTOCOL_FEATURES: 15,
  SET_PROTOCOL_FEATURES: 16,
  GET_QUEUE_NUM: 17,
  SET_VRING_ENABLE: 18,
  SEND_RARP: 19,
  NET_SET_MTU: 20,
  SET_BACKEND_REQ_FD: 21,
  IOTLB_MSG: 22,
  SET_VRING_ENDIAN: 23,
  GET_CONFIG: 24,
  SET_CONFIG: 25,
  CREATE_CRYPTO_SESSION: 26,
  CLOSE_CRYPTO_SESSION: 27,
  POSTCOPY_ADVISE: 28,
  POSTCOPY_LISTEN: 29,
  POSTCOPY_END: 30,
  GET_INFLIGHT_FD: 31,
  SET_INFLIGHT_FD: 32,
  GPU_SET_SOCKET: 33,
  RESET_DEVICE: 34,
  VRING_KICK: 35,
  GET_MAX_MEM_SLOTS: 36,
  ADD_MEM_REG: 37,
  REM_MEM_REG: 38,
  SET_STATUS: 39,
  GET_STATUS: 40,
  GET_SHARED_OBJECT: 41,
  SET_DEVICE_STATE_FD: 42,
  CHECK_DEVICE_STATE: 43,
  GET_SHMEM_CONFIG: 44,
  GET_VRING_BASE_SKIP_DRAIN: 45,
} as const;

/**
 * Requests of the back-end on the channel that `SET_BACKEND_REQ_FD` opened ("Back-end message types").
 *
 * @example
 * ```ts
 * import { VhostUserBackendRequest } from "virtio-driver/protocol";
 * console.log(VhostUserBackendRequest.CONFIG_CHANGE_MSG); // 2
 * ```
 */
export const VhostUserBackendRequest = {
  IOTLB_MSG: 1,
  CONFIG_CHANGE_MSG: 2,
  VRING_HOST_NOTIFIER_MSG: 3,
  VRING_CALL: 4,
  VRING_ERR: 5,
  SHARED_OBJECT_ADD: 6,
  SHARED_OBJECT_REMOVE: 7,
  SHARED_OBJECT_LOOKUP: 8,
  SHMEM_MAP: 9,
  SHMEM_UNMAP: 10,
} as const;

/**
 * Protocol features as masks ("Protocol features", `VHOST_USER_PROTOCOL_F_…`).
 *
 * @example
 * ```ts
 * import { VhostUserProtocolFeature } from "virtio-driver/protocol";
 * const wanted = VhostUserProtocolFeature.REPLY_ACK | VhostUserProtocolFeature.CONFIG;
 * console.log(wanted === 0x208n); // true
 * ```
 */
export const VhostUserProtocolFeature = {
  MQ: 1n << 0n,
  LOG_SHMFD: 1n << 1n,
  RARP: 1n << 2n,
  REPLY_ACK: 1n << 3n,
  MTU: 1n << 4n,
  BACKEND_REQ: 1n << 5n,
  CROSS_ENDIAN: 1n << 6n,
  CRYPTO_SESSION: 1n << 7n,
  PAGEFAULT: 1n << 8n,
  CONFIG: 1n << 9n,
  BACKEND_SEND_FD: 1n << 10n,
  HOST_NOTIFIER: 1n << 11n,
  INFLIGHT_SHMFD: 1n << 12n,
  RESET_DEVICE: 1n << 13n,
  INBAND_NOTIFICATIONS: 1n << 14n,
  CONFIGURE_MEM_SLOTS: 1n << 15n,
  STATUS: 1n << 16n,
  XEN_MMAP: 1n << 17n,
  SHARED_OBJECT: 1n << 18n,
  DEVICE_STATE: 1n << 19n,
  GET_VRING_BASE_INFLIGHT: 1n << 20n,
  GPA_ADDRESSES: 1n << 21n,
  SHMEM: 1n << 22n,
  GET_VRING_BASE_SKIP_DRAIN: 1n << 23n,
} as const;

/** Bit 30 of the virtio features: protocol features can be negotiated. Never shown to a driver. */
export const VHOST_USER_F_PROTOCOL_FEATURES = 1n << 30n;
/** Bit 26 of the virtio features, `VHOST_F_LOG_ALL`: dirty page logging. Never shown to a driver. */
export const VHOST_F_LOG_ALL = 1n << 26n;

/** Bytes of a message header. */
export const VHOST_USER_HEADER_SIZE = 12;
/** Flags of a request: version 1. */
export const VHOST_USER_FLAGS_REQUEST = 0x1;
/** Flag of a request that asks for an acknowledgement (`VHOST_USER_NEED_REPLY_MASK`). */
export const VHOST_USER_FLAG_NEED_REPLY = 0x8;
/** Flag of a reply (`VHOST_USER_REPLY_MASK`). */
export const VHOST_USER_FLAG_REPLY = 0x4;
/** Flags of a reply: version 1 and REPLY, nothing else. */
export const VHOST_USER_FLAGS_REPLY = 0x5;
/** The bits of the flags that hold the version (`VHOST_USER_VERSION_MASK`). */
export const VHOST_USER_VERSION_MASK = 0x3;

/** Regions of one `SET_MEM_TABLE`, and so its descriptors, at most. */
export const VHOST_USER_MAX_REGIONS = 8;
/** Descriptors beside one message at most. */
export const VHOST_USER_MAX_FDS = 8;
/** Bytes of config space that one message carries at most. */
export const VHOST_USER_MAX_CONFIG_SIZE = 256;
/** Payload bytes that no message of this protocol exceeds here; a longer one is refused unread. */
export const VHOST_USER_MAX_PAYLOAD = 4096;
/** Queues of one connection at most: the index in `SET_VRING_KICK` has 8 bits. */
export const VHOST_USER_MAX_QUEUES = 256;

/** `SET_VRING_BASE` of a fresh split ring: available index 0. */
export const VRING_BASE_SPLIT = 0;
/** `SET_VRING_BASE` of a fresh packed ring: both indices 0, both wrap counters 1. */
export const VRING_BASE_PACKED = 0x8000_8000;
