/**
 * The vhost-user protocol as both ends see it: the codecs of the message header and payloads; the ids, masks
 * and limits are in `vhost-user-defs.ts`. Pure: bytes in, values out. Reference: QEMU
 * `docs/interop/vhost-user.rst`.
 */

import { checkInteger, rangeError } from "../errors.js";
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
import {
  VHOST_USER_HEADER_SIZE,
  VHOST_USER_MAX_CONFIG_SIZE,
  VHOST_USER_MAX_PAYLOAD,
  VHOST_USER_MAX_QUEUES,
  VHOST_USER_MAX_REGIONS,
  VhostUserBackendRequest,
  VhostUserRequest,
} from "./vhost-user-defs.js";

export * from "./vhost-user-defs.js";

/** The position of a packed ring in `SET_VRING_BASE` and the reply to `GET_VRING_BASE`. */
export interface PackedVringBase {
  /** Next descriptor that the device reads, bits 0 to 14. */
  readonly availIdx: number;
  /** Wrap counter that goes with `availIdx`, bit 15. */
  readonly availWrap: boolean;
  /** Next descriptor that the device writes, bits 16 to 30. */
  readonly usedIdx: number;
  /** Wrap counter that goes with `usedIdx`, bit 31. */
  readonly usedWrap: boolean;
}

/** The head of each message. */
export interface VhostUserHeader {
  /** Request id, repeated in the reply. */
  readonly request: number;
  /** Version, REPLY, NEED_REPLY. */
  readonly flags: number;
  /** Payload bytes; the header is not counted. */
  readonly size: number;
}

/** Payload of the messages about one ring (`struct vhost_vring_state`). */
export interface VringState {
  /** Queue index. */
  readonly index: number;
  /** Size, base, or enable, by message. */
  readonly num: number;
}

/** Payload of `SET_VRING_KICK`, `SET_VRING_CALL`, `SET_VRING_ERR`: a u64 of index and "no descriptor". */
export interface VringFd {
  /** Queue index, bits 0 to 7. */
  readonly index: number;
  /** Bit 8: no descriptor comes with the message, the ring is polled. */
  readonly noFd: boolean;
}

/** Payload of `SET_VRING_ADDR` (`struct vhost_vring_addr`); the areas are user addresses. */
export interface VringAddress<Address = bigint> {
  /** Queue index. */
  readonly index: number;
  /** Bit 0: log writes of the device area. */
  readonly flags: number;
  /** Descriptor area. */
  readonly desc: Address;
  /** Device area (used ring). */
  readonly used: Address;
  /** Driver area (available ring). */
  readonly avail: Address;
  /** Where in the log the device area is logged. */
  readonly log: Address;
}

/** One region of memory ("Memory region description", without the Xen fields). */
export interface VhostUserRegion<Address = bigint> {
  /** Address that descriptors use. */
  readonly guestAddress: Address;
  /** Bytes. */
  readonly size: Address;
  /** Address that `SET_VRING_ADDR` uses. */
  readonly userAddress: Address;
  /** Where in the file the region begins. */
  readonly mmapOffset: Address;
}

/** Payload of `GET_CONFIG`, `SET_CONFIG` and the reply to the former. */
export interface ConfigPayload {
  /** Byte in the config space. */
  readonly offset: number;
  /** 0 normal, 1 migration. */
  readonly flags: number;
  /** The bytes; as many as asked for, also in the request. */
  readonly data: Uint8Array;
}

/** Payload of `GET_INFLIGHT_FD` and `SET_INFLIGHT_FD`, 24 bytes with the tail padding. */
export interface InflightPayload<Address = bigint> {
  /** Bytes of the region; 0 in a reply: none. */
  readonly mmapSize: Address;
  /** Where in the file it begins. */
  readonly mmapOffset: Address;
  /** Number of queues. */
  readonly numQueues: number;
  /** Descriptors per queue. */
  readonly queueSize: number;
}

/** How one kind of payload becomes bytes and back. `W` is what the encoder takes, `R` what the decoder gives. */
export interface VhostUserCodec<W, R> {
  /**
   * Make the payload.
   *
   * @throws RangeError when a number does not fit its field, TypeError when it is none.
   */
  encode(value: W): Uint8Array;
  /**
   * Read the payload; it must have exactly the right size.
   *
   * @throws VirtioError ERR_VIRTIO_PROTOCOL when it has not, or contradicts itself.
   */
  decode(payload: Uint8Array): R;
}

const VRING_FD_INDEX_MASK = 0xffn;
const VRING_FD_NO_FD = 0x100n;
const REGION_SIZE = 32;
const TABLE_HEADER_SIZE = 8;
const SINGLE_REGION_HEADER_SIZE = 8;
const CONFIG_HEADER_SIZE = 12;

/**
 * Name a front-end request for a message to people: `SET_OWNER`, or `request 99` when there is none.
 *
 * @example
 * ```ts
 * import { vhostUserRequestName } from "virtio-driver/protocol";
 * console.log(vhostUserRequestName(3)); // "SET_OWNER"
 * ```
 */
export function vhostUserRequestName(request: number): string {
  return nameOf(VhostUserRequest, request);
}

/** Name a back-end request, as {@link vhostUserRequestName} does for the front-end's. */
export function vhostUserBackendRequestName(request: number): string {
  return nameOf(VhostUserBackendRequest, request);
}

/**
 * Put a header before a payload: the bytes of one whole message.
 *
 * @throws RangeError when the payload is longer than {@link VHOST_USER_MAX_PAYLOAD}.
 * @example
 * ```ts
 * import { encodeVhostUserMessage, VHOST_USER_FLAGS_REQUEST, VhostUserRequest } from "virtio-driver/protocol";
 * const bytes = encodeVhostUserMessage(VhostUserRequest.SET_OWNER, VHOST_USER_FLAGS_REQUEST);
 * console.log(bytes.length); // 12
 * ```
 */
export function encodeVhostUserMessage(request: number, flags: number, payload?: Uint8Array): Uint8Array {
  const size = payload === undefined ? 0 : payload.length;
  if (size > VHOST_USER_MAX_PAYLOAD) throw rangeError("payload", `at most ${VHOST_USER_MAX_PAYLOAD} bytes`, size);
  const bytes = new Uint8Array(VHOST_USER_HEADER_SIZE + size);
  const view = new DataView(bytes.buffer);
  putU32(view, 0, "request", request);
  putU32(view, 4, "flags", flags);
  putU32(view, 8, "size", size);
  if (payload !== undefined) bytes.set(payload, VHOST_USER_HEADER_SIZE);
  return bytes;
}

/**
 * Read the header at the start of `bytes`, whose remainder may be payload.
 *
 * @throws VirtioError ERR_VIRTIO_PROTOCOL when there are fewer than 12 bytes, or the payload would be longer
 *   than {@link VHOST_USER_MAX_PAYLOAD}. Id and flags are the caller's to judge.
 * @example
 * ```ts
 * import { decodeVhostUserHeader, encodeVhostUserMessage } from "virtio-driver/protocol";
 * const header = decodeVhostUserHeader(encodeVhostUserMessage(1, 0x5, new Uint8Array(8)));
 * console.log(header); // { request: 1, flags: 5, size: 8 }
 * ```
 */
export function decodeVhostUserHeader(bytes: Uint8Array): VhostUserHeader {
  if (bytes.length < VHOST_USER_HEADER_SIZE) {
    throw protocolError(`a vhost-user header has ${VHOST_USER_HEADER_SIZE} bytes, got ${bytes.length}`);
  }
  const view = viewOf(bytes);
  const header = { request: getU32(view, 0), flags: getU32(view, 4), size: getU32(view, 8) };
  if (header.size > VHOST_USER_MAX_PAYLOAD) {
    throw protocolError(
      `the message ${header.request} announces ${header.size} payload bytes, at most ${VHOST_USER_MAX_PAYLOAD} are taken`,
    );
  }
  return header;
}

/**
 * Join the position of a packed ring into the number that `SET_VRING_BASE` carries.
 *
 * @throws RangeError when an index does not fit 15 bits.
 * @example
 * ```ts
 * import { encodePackedVringBase, VRING_BASE_PACKED } from "virtio-driver/protocol";
 * const base = encodePackedVringBase({ availIdx: 0, availWrap: true, usedIdx: 0, usedWrap: true });
 * console.log(base === VRING_BASE_PACKED); // true
 * ```
 */
export function encodePackedVringBase(base: PackedVringBase): number {
  const avail = checkInteger("availIdx", base.availIdx, 0, 0x7fff) | (base.availWrap ? 0x8000 : 0);
  const used = checkInteger("usedIdx", base.usedIdx, 0, 0x7fff) | (base.usedWrap ? 0x8000 : 0);
  return used * 0x1_0000 + avail;
}

/**
 * Split the number of `SET_VRING_BASE` for a packed ring.
 *
 * @example
 * ```ts
 * import { decodePackedVringBase, VRING_BASE_PACKED } from "virtio-driver/protocol";
 * console.log(decodePackedVringBase(VRING_BASE_PACKED).usedWrap); // true
 * ```
 */
export function decodePackedVringBase(num: number): PackedVringBase {
  return {
    availIdx: num & 0x7fff,
    availWrap: (num & 0x8000) !== 0,
    usedIdx: (num >>> 16) & 0x7fff,
    usedWrap: num >>> 31 === 1,
  };
}

/**
 * A single u64: features, counts, acknowledgements.
 *
 * @example
 * ```ts
 * import { u64Codec } from "virtio-driver/protocol";
 * console.log(u64Codec.decode(u64Codec.encode(5))); // 5n
 * ```
 */
export const u64Codec: VhostUserCodec<number | bigint, bigint> = {
  encode(value) {
    const view = blank(8);
    putU64(view, 0, "value", value);
    return bytesOf(view);
  },
  decode(payload) {
    return getU64(sized(payload, 8, "u64"), 0);
  },
};

/**
 * `struct vhost_vring_state`, 8 bytes.
 *
 * @example
 * ```ts
 * import { vringStateCodec } from "virtio-driver/protocol";
 * console.log(vringStateCodec.decode(vringStateCodec.encode({ index: 1, num: 256 }))); // { index: 1, num: 256 }
 * ```
 */
export const vringStateCodec: VhostUserCodec<VringState, VringState> = {
  encode(value) {
    const view = blank(8);
    putU32(view, 0, "index", value.index);
    putU32(view, 4, "num", value.num);
    return bytesOf(view);
  },
  decode(payload) {
    const view = sized(payload, 8, "vring state");
    return { index: getU32(view, 0), num: getU32(view, 4) };
  },
};

/**
 * The u64 of `SET_VRING_KICK`, `SET_VRING_CALL` and `SET_VRING_ERR`.
 *
 * @example
 * ```ts
 * import { vringFdCodec } from "virtio-driver/protocol";
 * console.log(vringFdCodec.encode({ index: 3, noFd: true }).subarray(0, 2)); // Uint8Array(2) [ 3, 1 ]
 * ```
 */
export const vringFdCodec: VhostUserCodec<VringFd, VringFd> = {
  encode(value) {
    const index = checkInteger("index", value.index, 0, VHOST_USER_MAX_QUEUES - 1);
    return u64Codec.encode(BigInt(index) | (value.noFd ? VRING_FD_NO_FD : 0n));
  },
  decode(payload) {
    const value = u64Codec.decode(payload);
    if (value > (VRING_FD_INDEX_MASK | VRING_FD_NO_FD)) {
      throw protocolError(`a vring descriptor message has reserved bits set: 0x${value.toString(16)}`);
    }
    return { index: Number(value & VRING_FD_INDEX_MASK), noFd: (value & VRING_FD_NO_FD) !== 0n };
  },
};

/**
 * `struct vhost_vring_addr`, 40 bytes; the device area stands before the driver area.
 *
 * @example
 * ```ts
 * import { vringAddressCodec } from "virtio-driver/protocol";
 * const bytes = vringAddressCodec.encode({ index: 0, flags: 0, desc: 0x1000, used: 0x3000, avail: 0x2000, log: 0 });
 * console.log(vringAddressCodec.decode(bytes).used); // 12288n
 * ```
 */
export const vringAddressCodec: VhostUserCodec<VringAddress<number | bigint>, VringAddress> = {
  encode(value) {
    const view = blank(40);
    putU32(view, 0, "index", value.index);
    putU32(view, 4, "flags", value.flags);
    putU64(view, 8, "desc", value.desc);
    putU64(view, 16, "used", value.used);
    putU64(view, 24, "avail", value.avail);
    putU64(view, 32, "log", value.log);
    return bytesOf(view);
  },
  decode(payload) {
    const view = sized(payload, 40, "vring address");
    return {
      index: getU32(view, 0),
      flags: getU32(view, 4),
      desc: getU64(view, 8),
      used: getU64(view, 16),
      avail: getU64(view, 24),
      log: getU64(view, 32),
    };
  },
};

/**
 * The table of `SET_MEM_TABLE`: 8 bytes and 32 a region, at most {@link VHOST_USER_MAX_REGIONS}. Its
 * descriptors come in the same order.
 *
 * @example
 * ```ts
 * import { memoryTableCodec } from "virtio-driver/protocol";
 * const region = { guestAddress: 0x200000, size: 0x200000, userAddress: 0x200000, mmapOffset: 0 };
 * console.log(memoryTableCodec.encode([region]).length); // 40
 * ```
 */
export const memoryTableCodec: VhostUserCodec<readonly VhostUserRegion<number | bigint>[], VhostUserRegion[]> = {
  encode(value) {
    checkInteger("regions", value.length, 0, VHOST_USER_MAX_REGIONS);
    const view = blank(TABLE_HEADER_SIZE + REGION_SIZE * value.length);
    putU32(view, 0, "regions", value.length);
    value.forEach((region, i) => putRegion(view, TABLE_HEADER_SIZE + REGION_SIZE * i, region));
    return bytesOf(view);
  },
  decode(payload) {
    if (payload.length < TABLE_HEADER_SIZE) {
      throw protocolError(`a memory table has at least ${TABLE_HEADER_SIZE} bytes, got ${payload.length}`);
    }
    const count = getU32(viewOf(payload), 0);
    if (count > VHOST_USER_MAX_REGIONS) {
      throw protocolError(`a memory table has at most ${VHOST_USER_MAX_REGIONS} regions, got ${count}`);
    }
    const view = sized(payload, TABLE_HEADER_SIZE + REGION_SIZE * count, `memory table of ${count} regions`);
    return Array.from({ length: count }, (_, i) => getRegion(view, TABLE_HEADER_SIZE + REGION_SIZE * i));
  },
};

/**
 * The region of `ADD_MEM_REG` and `REM_MEM_REG`, 40 bytes.
 *
 * @example
 * ```ts
 * import { singleRegionCodec } from "virtio-driver/protocol";
 * const region = { guestAddress: 0x200000, size: 0x200000, userAddress: 0x200000, mmapOffset: 0 };
 * console.log(singleRegionCodec.decode(singleRegionCodec.encode(region)).size); // 2097152n
 * ```
 */
export const singleRegionCodec: VhostUserCodec<VhostUserRegion<number | bigint>, VhostUserRegion> = {
  encode(value) {
    const view = blank(SINGLE_REGION_HEADER_SIZE + REGION_SIZE);
    putRegion(view, SINGLE_REGION_HEADER_SIZE, value);
    return bytesOf(view);
  },
  decode(payload) {
    const view = sized(payload, SINGLE_REGION_HEADER_SIZE + REGION_SIZE, "single memory region");
    return getRegion(view, SINGLE_REGION_HEADER_SIZE);
  },
};

/**
 * Config space: 12 bytes and the data. A reply whose data is empty says that the request failed; some
 * back-ends leave out the 12 bytes as well, which the caller sees by the size in the header.
 *
 * @example
 * ```ts
 * import { configCodec } from "virtio-driver/protocol";
 * const request = configCodec.encode({ offset: 0, flags: 0, data: new Uint8Array(60) });
 * console.log(request.length); // 72
 * ```
 */
export const configCodec: VhostUserCodec<ConfigPayload, ConfigPayload> = {
  encode(value) {
    const size = checkInteger("data", value.data.length, 0, VHOST_USER_MAX_CONFIG_SIZE);
    const view = blank(CONFIG_HEADER_SIZE + size);
    putU32(view, 0, "offset", value.offset);
    putU32(view, 4, "size", size);
    putU32(view, 8, "flags", value.flags);
    const bytes = bytesOf(view);
    bytes.set(value.data, CONFIG_HEADER_SIZE);
    return bytes;
  },
  decode(payload) {
    if (payload.length < CONFIG_HEADER_SIZE) {
      throw protocolError(`a config message has at least ${CONFIG_HEADER_SIZE} bytes, got ${payload.length}`);
    }
    const size = getU32(viewOf(payload), 4);
    const view = sized(payload, CONFIG_HEADER_SIZE + size, `config message of ${size} bytes`);
    return { offset: getU32(view, 0), flags: getU32(view, 8), data: payload.slice(CONFIG_HEADER_SIZE) };
  },
};

/**
 * The description of the in-flight region, 24 bytes: that of C with its tail padding, not the 20 that the
 * protocol document shows.
 *
 * @example
 * ```ts
 * import { inflightCodec } from "virtio-driver/protocol";
 * console.log(inflightCodec.encode({ mmapSize: 0, mmapOffset: 0, numQueues: 1, queueSize: 128 }).length); // 24
 * ```
 */
export const inflightCodec: VhostUserCodec<InflightPayload<number | bigint>, InflightPayload> = {
  encode(value) {
    const view = blank(24);
    putU64(view, 0, "mmapSize", value.mmapSize);
    putU64(view, 8, "mmapOffset", value.mmapOffset);
    view.setUint16(16, checkInteger("numQueues", value.numQueues, 0, 0xffff), LITTLE_ENDIAN);
    view.setUint16(18, checkInteger("queueSize", value.queueSize, 0, 0xffff), LITTLE_ENDIAN);
    return bytesOf(view);
  },
  decode(payload) {
    const view = sized(payload, 24, "inflight description");
    return {
      mmapSize: getU64(view, 0),
      mmapOffset: getU64(view, 8),
      numQueues: view.getUint16(16, LITTLE_ENDIAN),
      queueSize: view.getUint16(18, LITTLE_ENDIAN),
    };
  },
};

function putRegion(view: DataView, at: number, region: VhostUserRegion<number | bigint>): void {
  putU64(view, at, "guestAddress", region.guestAddress);
  putU64(view, at + 8, "size", region.size);
  putU64(view, at + 16, "userAddress", region.userAddress);
  putU64(view, at + 24, "mmapOffset", region.mmapOffset);
}

function getRegion(view: DataView, at: number): VhostUserRegion {
  return {
    guestAddress: getU64(view, at),
    size: getU64(view, at + 8),
    userAddress: getU64(view, at + 16),
    mmapOffset: getU64(view, at + 24),
  };
}

function nameOf(table: Readonly<Record<string, number>>, request: number): string {
  return Object.keys(table).find((name) => table[name] === request) ?? `request ${request}`;
}
