/**
 * What passes between a driver and the kernel on a vhost-vdpa device: codecs of the ioctls' arguments and of the IOTLB
 * messages; numbers and masks are in `vhost-vdpa-defs.ts`. `struct vhost_vring_state` and `struct vhost_vring_addr` are
 * those of vhost-user. Pure: bytes in, values out.
 */

import { checkInteger } from "../errors.js";
import {
  blank,
  bytesOf,
  getU32,
  getU64,
  LITTLE_ENDIAN,
  protocolError,
  putU32,
  putU64,
  sized,
  viewOf,
} from "./structs.js";
import type { VhostUserCodec } from "./vhost-user.js";
import { IOTLB_MESSAGE_SIZE, VDPA_CONFIG_HEADER_SIZE, VhostVdpaRequest } from "./vhost-vdpa-defs.js";

export * from "./vhost-vdpa-defs.js";

/** `struct vhost_vring_file`: an eventfd for a queue. */
export interface VringFile {
  /** Queue index. */
  readonly index: number;
  /** Its descriptor; -1 takes the last one away. */
  readonly fd: number;
}

/** `struct vhost_vdpa_config`: a stretch of the config space. */
export interface VdpaConfig {
  /** First byte in the config space. */
  readonly offset: number;
  /** The bytes; as many as are asked for, when they are to be read. */
  readonly data: Uint8Array;
}

/** `struct vhost_vdpa_iova_range`: addresses that the device can use, both ends included. */
export interface VdpaIovaRange {
  /** First address. */
  readonly first: bigint;
  /** Last address. */
  readonly last: bigint;
}

/** `struct vhost_msg` (version 1) and `struct vhost_msg_v2`, which carry a `struct vhost_iotlb_msg`. */
export interface IotlbMessage<Address = bigint> {
  /** Layout: 2 where `IOTLB_MSG_V2` is in force, otherwise 1. */
  readonly version: 1 | 2;
  /** Address space; 0 in version 1. */
  readonly asid: number;
  /** What to do, of `IotlbType`. */
  readonly type: number;
  /** The device's address of the first byte. */
  readonly iova: Address;
  /** Bytes. */
  readonly size: Address;
  /** Where the memory is mapped in this process; 0 when it is of no interest. */
  readonly uaddr: Address;
  /** What the device may do, of `IotlbAccess`. */
  readonly perm: number;
}

const VRING_FILE_SIZE = 8;
const IOVA_RANGE_SIZE = 16;
const MAX_FD = 0x7fff_ffff;

/**
 * Name an ioctl for a message to people, as C does: `VHOST_VDPA_GET_STATUS`, or `ioctl 0x1234` when there is none.
 *
 * @example
 * ```ts
 * import { vhostVdpaRequestName, VhostVdpaRequest } from "virtio-driver/protocol";
 * console.log(vhostVdpaRequestName(VhostVdpaRequest.SET_OWNER)); // VHOST_SET_OWNER
 * ```
 */
export function vhostVdpaRequestName(request: number): string {
  const name = Object.entries(VhostVdpaRequest).find(([, number]) => number === request)?.[0];
  if (name === undefined) return `ioctl 0x${request.toString(16)}`;
  // The requests of vDPA alone are numbered from 0x70.
  return (request & 0xff) >= 0x70 ? `VHOST_VDPA_${name}` : `VHOST_${name}`;
}

/**
 * `struct vhost_vring_file`, 8 bytes.
 *
 * @example
 * ```ts
 * import { vringFileCodec } from "virtio-driver/protocol";
 * console.log(vringFileCodec.decode(vringFileCodec.encode({ index: 1, fd: -1 }))); // { index: 1, fd: -1 }
 * ```
 */
export const vringFileCodec: VhostUserCodec<VringFile, VringFile> = {
  encode(value) {
    const view = blank(VRING_FILE_SIZE);
    putU32(view, 0, "index", value.index);
    view.setInt32(4, checkInteger("fd", value.fd, -1, MAX_FD), LITTLE_ENDIAN);
    return bytesOf(view);
  },
  decode(payload) {
    const view = sized(payload, VRING_FILE_SIZE, "vring file");
    return { index: getU32(view, 0), fd: view.getInt32(4, LITTLE_ENDIAN) };
  },
};

/**
 * `struct vhost_vdpa_config`: 8 bytes and the data.
 *
 * @example
 * ```ts
 * import { vdpaConfigCodec } from "virtio-driver/protocol";
 * console.log(vdpaConfigCodec.encode({ offset: 0, data: new Uint8Array(60) }).length); // 68
 * ```
 */
export const vdpaConfigCodec: VhostUserCodec<VdpaConfig, VdpaConfig> = {
  encode(value) {
    const view = blank(VDPA_CONFIG_HEADER_SIZE + value.data.length);
    putU32(view, 0, "offset", value.offset);
    putU32(view, 4, "length", value.data.length);
    const bytes = bytesOf(view);
    bytes.set(value.data, VDPA_CONFIG_HEADER_SIZE);
    return bytes;
  },
  decode(payload) {
    if (payload.length < VDPA_CONFIG_HEADER_SIZE) {
      throw protocolError(`a vDPA config has at least ${VDPA_CONFIG_HEADER_SIZE} bytes, got ${payload.length}`);
    }
    const length = getU32(viewOf(payload), 4);
    const view = sized(payload, VDPA_CONFIG_HEADER_SIZE + length, `vDPA config of ${length} bytes`);
    return { offset: getU32(view, 0), data: payload.slice(VDPA_CONFIG_HEADER_SIZE) };
  },
};

/**
 * `struct vhost_vdpa_iova_range`, 16 bytes.
 *
 * @example
 * ```ts
 * import { vdpaIovaRangeCodec } from "virtio-driver/protocol";
 * const bytes = vdpaIovaRangeCodec.encode({ first: 0n, last: 0xffff_ffffn });
 * console.log(vdpaIovaRangeCodec.decode(bytes).last); // 4294967295n
 * ```
 */
export const vdpaIovaRangeCodec: VhostUserCodec<VdpaIovaRange, VdpaIovaRange> = {
  encode(value) {
    const view = blank(IOVA_RANGE_SIZE);
    putU64(view, 0, "first", value.first);
    putU64(view, 8, "last", value.last);
    return bytesOf(view);
  },
  decode(payload) {
    const view = sized(payload, IOVA_RANGE_SIZE, "IOVA range");
    return { first: getU64(view, 0), last: getU64(view, 8) };
  },
};

/**
 * `struct vhost_msg` and `struct vhost_msg_v2`, 72 bytes each: the version is the first field. Written to the device,
 * not passed by an ioctl.
 *
 * @example
 * ```ts
 * import { IotlbAccess, iotlbMessageCodec, IotlbType } from "virtio-driver/protocol";
 * const mapping = { iova: 0x200000, size: 0x1000, uaddr: 0x7f0000000000, perm: IotlbAccess.READ_WRITE };
 * const bytes = iotlbMessageCodec.encode({ version: 2, asid: 0, type: IotlbType.UPDATE, ...mapping });
 * console.log(bytes.length, bytes[32], bytes[33]); // 72 3 2
 * ```
 */
export const iotlbMessageCodec: VhostUserCodec<IotlbMessage<number | bigint>, IotlbMessage> = {
  encode(value) {
    const view = blank(IOTLB_MESSAGE_SIZE);
    putU32(view, 0, "version", checkInteger("version", value.version, 1, 2));
    // Version 1 has padding there, which is 0.
    putU32(view, 4, "asid", value.version === 2 ? value.asid : checkInteger("asid", value.asid, 0, 0));
    putU64(view, 8, "iova", value.iova);
    putU64(view, 16, "size", value.size);
    putU64(view, 24, "uaddr", value.uaddr);
    view.setUint8(32, checkInteger("perm", value.perm, 0, 0xff));
    view.setUint8(33, checkInteger("type", value.type, 0, 0xff));
    return bytesOf(view);
  },
  decode(payload) {
    const view = sized(payload, IOTLB_MESSAGE_SIZE, "IOTLB message");
    const version = getU32(view, 0);
    if (version !== 1 && version !== 2) throw protocolError(`an IOTLB message has version 1 or 2, got ${version}`);
    return {
      version,
      asid: version === 2 ? getU32(view, 4) : 0,
      type: view.getUint8(33),
      iova: getU64(view, 8),
      size: getU64(view, 16),
      uaddr: getU64(view, 24),
      perm: view.getUint8(32),
    };
  },
};
