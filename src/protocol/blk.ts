/** virtio-blk as both sides see it: feature bits, config space, requests, status codes (virtio 1.3, 5.2). */

import { VirtioError } from "../errors.js";

/** Device type of virtio-blk (5.2.1). */
export const VIRTIO_ID_BLOCK = 2;

/** Bytes of a sector: the unit of every sector number and count, whatever `blk_size` says (5.2.4). */
export const SECTOR_SIZE = 512;

/** Feature bits of virtio-blk as masks, `VIRTIO_BLK_F_…` in `<linux/virtio_blk.h>` (5.2.3). */
export const BlkFeature = {
  /** Bit 1: `size_max`, the largest data element. */
  SIZE_MAX: 1n << 1n,
  /** Bit 2: `seg_max`, the most data elements of a request. */
  SEG_MAX: 1n << 2n,
  /** Bit 4: `geometry`. */
  GEOMETRY: 1n << 4n,
  /** Bit 5: the device is read-only. */
  RO: 1n << 5n,
  /** Bit 6: `blk_size`. */
  BLK_SIZE: 1n << 6n,
  /** Bit 9: the FLUSH request. */
  FLUSH: 1n << 9n,
  /** Bit 10: `topology`. */
  TOPOLOGY: 1n << 10n,
  /** Bit 11: `writeback` can be read and written. */
  CONFIG_WCE: 1n << 11n,
  /** Bit 12: `num_queues`. */
  MQ: 1n << 12n,
  /** Bit 13: the DISCARD request and its limits. */
  DISCARD: 1n << 13n,
  /** Bit 14: the WRITE_ZEROES request and its limits. */
  WRITE_ZEROES: 1n << 14n,
  /** Bit 15: the GET_LIFETIME request. */
  LIFETIME: 1n << 15n,
  /** Bit 16: the SECURE_ERASE request and its limits. */
  SECURE_ERASE: 1n << 16n,
  /** Bit 17: zoned devices. Not accepted by this driver. */
  ZONED: 1n << 17n,
} as const;

/** Request types, `virtio_blk_req.type` (5.2.6). */
export const BlkRequestType = {
  IN: 0,
  OUT: 1,
  FLUSH: 4,
  GET_ID: 8,
  GET_LIFETIME: 10,
  DISCARD: 11,
  WRITE_ZEROES: 13,
  SECURE_ERASE: 14,
} as const;

/** Status bytes, `virtio_blk_req.status` (5.2.6). */
export const BlkStatus = {
  OK: 0,
  IOERR: 1,
  UNSUPP: 2,
} as const;

/** What the driver writes into the status byte beforehand: no device answers it. */
export const BLK_STATUS_UNWRITTEN = 0xff;

// struct virtio_blk_req (5.2.6): le32 type, le32 reserved, le64 sector, data, u8 status.
/** Bytes of the request header: type @0, reserved @4, sector @8. */
export const BLK_HEADER_SIZE = 16;
/** Bytes of the status. */
export const BLK_STATUS_SIZE = 1;
/** Bytes of `struct virtio_blk_discard_write_zeroes`: sector @0, num_sectors @8, flags @12. */
export const BLK_SEGMENT_SIZE = 16;
/** `virtio_blk_discard_write_zeroes.flags` bit 0: the device may deallocate; WRITE_ZEROES only. */
export const VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP = 1;
/** Bytes of the answer to GET_ID. */
export const BLK_ID_SIZE = 20;
/** Bytes of `struct virtio_blk_lifetime`. */
export const BLK_LIFETIME_SIZE = 6;

/** Bytes of `struct virtio_blk_config` up to and without the zoned part. */
export const BLK_CONFIG_SIZE = 72;
/** Offset of `writeback`, the only field that a driver may write. */
export const BLK_CONFIG_WRITEBACK_OFFSET = 32;
/** Offset of `num_queues`, a le16 that is there with MQ. */
export const BLK_CONFIG_NUM_QUEUES_OFFSET = 34;

/** Offset of `zoned.model`, behind the fields that this project reads otherwise. */
export const BLK_CONFIG_ZONED_MODEL_OFFSET = 92;
/** `VIRTIO_BLK_Z_HM` of `zoned.model`: a host-managed device, useless without zone commands. */
export const BLK_ZONED_HOST_MANAGED = 1;

/**
 * Widths of the fields of `struct virtio_blk_config` up to and with `zoned.model`, from the first on; `capacity` and the
 * padding are several. Where the config space is registers, each field is one access of its width (4.1.3.1).
 */
// biome-ignore format: a line for the fields of each feature
export const BLK_CONFIG_WIDTHS: readonly (1 | 2 | 4)[] = [
  4, 4, // capacity
  4, // size_max
  4, // seg_max
  2, 1, 1, // geometry
  4, // blk_size
  1, 1, 2, 4, // topology
  1, 1, // writeback
  2, // num_queues
  4, 4, 4, // discard
  4, 4, 1, 1, 1, 1, // write_zeroes
  4, 4, 4, // secure_erase
  4, 4, 4, 4, 4, 1, // zoned
];

/** `struct virtio_blk_config` (5.2.4); a field whose feature is not there is undefined. */
export interface BlkConfig {
  /** Size of the disk in sectors of 512 bytes. */
  readonly capacity: bigint;
  /** Largest data element in bytes (SIZE_MAX). */
  readonly sizeMax?: number;
  /** Most data elements of a request (SEG_MAX). */
  readonly segMax?: number;
  /** Legacy geometry (GEOMETRY). */
  readonly geometry?: { readonly cylinders: number; readonly heads: number; readonly sectors: number };
  /** Block size in bytes (BLK_SIZE). */
  readonly blkSize?: number;
  /** Hints for good performance (TOPOLOGY). */
  readonly topology?: {
    /** log2 of logical blocks per physical block. */
    readonly physicalBlockExp: number;
    /** First aligned logical block. */
    readonly alignmentOffset: number;
    /** In logical blocks. */
    readonly minIoSize: number;
    /** In logical blocks. */
    readonly optIoSize: number;
  };
  /** Whether the cache is in writeback mode (CONFIG_WCE). */
  readonly writeback?: boolean;
  /** Request queues (MQ). */
  readonly numQueues?: number;
  /** Limits of DISCARD, in sectors (DISCARD). */
  readonly discard?: { readonly maxSectors: number; readonly maxSegments: number; readonly alignment: number };
  /** Limits of WRITE_ZEROES (WRITE_ZEROES). */
  readonly writeZeroes?: { readonly maxSectors: number; readonly maxSegments: number; readonly mayUnmap: boolean };
  /** Limits of SECURE_ERASE, in sectors (SECURE_ERASE). */
  readonly secureErase?: { readonly maxSectors: number; readonly maxSegments: number; readonly alignment: number };
}

/** End of the config fields that each feature brings, in the order of the struct. */
const CONFIG_ENDS: readonly (readonly [feature: bigint, end: number])[] = [
  [BlkFeature.SIZE_MAX, 12],
  [BlkFeature.SEG_MAX, 16],
  [BlkFeature.GEOMETRY, 20],
  [BlkFeature.BLK_SIZE, 24],
  [BlkFeature.TOPOLOGY, 32],
  [BlkFeature.CONFIG_WCE, 33],
  [BlkFeature.MQ, 36],
  [BlkFeature.DISCARD, 48],
  [BlkFeature.WRITE_ZEROES, 57],
  [BlkFeature.SECURE_ERASE, 72],
];

/**
 * Bytes of config space that hold `capacity` and every field of `features`. Nothing behind them may be
 * asked for: a device that does not offer the feature may not have the bytes.
 *
 * @example
 * ```ts
 * import { blkConfigSize, BlkFeature } from "virtio-driver/protocol";
 * console.log(blkConfigSize(0n), blkConfigSize(BlkFeature.BLK_SIZE)); // 8 24
 * ```
 */
export function blkConfigSize(features: bigint): number {
  return CONFIG_ENDS.reduce((size, [feature, end]) => ((features & feature) === 0n ? size : end), 8);
}

/**
 * Decode the config space; only the fields of `features` are looked at.
 *
 * @throws VirtioError ERR_VIRTIO_CONFIG when `bytes` is shorter than `blkConfigSize(features)`.
 */
export function decodeBlkConfig(bytes: Uint8Array, features: bigint): BlkConfig {
  const size = blkConfigSize(features);
  if (bytes.length < size) {
    throw new VirtioError(
      "ERR_VIRTIO_CONFIG",
      `the device's config space has ${bytes.length} bytes, its features need ${size}`,
    );
  }
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const u32 = (offset: number): number => view.getUint32(offset, true);
  const has = (feature: bigint): boolean => (features & feature) !== 0n;
  return {
    capacity: view.getBigUint64(0, true),
    ...(has(BlkFeature.SIZE_MAX) && { sizeMax: u32(8) }),
    ...(has(BlkFeature.SEG_MAX) && { segMax: u32(12) }),
    ...(has(BlkFeature.GEOMETRY) && {
      geometry: { cylinders: view.getUint16(16, true), heads: bytes[18], sectors: bytes[19] },
    }),
    ...(has(BlkFeature.BLK_SIZE) && { blkSize: u32(20) }),
    ...(has(BlkFeature.TOPOLOGY) && {
      topology: {
        physicalBlockExp: bytes[24],
        alignmentOffset: bytes[25],
        minIoSize: view.getUint16(26, true),
        optIoSize: u32(28),
      },
    }),
    ...(has(BlkFeature.CONFIG_WCE) && { writeback: bytes[BLK_CONFIG_WRITEBACK_OFFSET] !== 0 }),
    ...(has(BlkFeature.MQ) && { numQueues: view.getUint16(BLK_CONFIG_NUM_QUEUES_OFFSET, true) }),
    ...(has(BlkFeature.DISCARD) && {
      discard: { maxSectors: u32(36), maxSegments: u32(40), alignment: u32(44) },
    }),
    ...(has(BlkFeature.WRITE_ZEROES) && {
      writeZeroes: { maxSectors: u32(48), maxSegments: u32(52), mayUnmap: bytes[56] !== 0 },
    }),
    ...(has(BlkFeature.SECURE_ERASE) && {
      secureErase: { maxSectors: u32(60), maxSegments: u32(64), alignment: u32(68) },
    }),
  };
}

/** Encode a config space of {@link BLK_CONFIG_SIZE} bytes; fields that are undefined and all padding are 0. */
export function encodeBlkConfig(config: BlkConfig): Uint8Array {
  const bytes = new Uint8Array(BLK_CONFIG_SIZE);
  const view = new DataView(bytes.buffer);
  const { geometry, topology, discard, writeZeroes, secureErase } = config;
  view.setBigUint64(0, config.capacity, true);
  view.setUint32(8, config.sizeMax ?? 0, true);
  view.setUint32(12, config.segMax ?? 0, true);
  view.setUint16(16, geometry?.cylinders ?? 0, true);
  bytes[18] = geometry?.heads ?? 0;
  bytes[19] = geometry?.sectors ?? 0;
  view.setUint32(20, config.blkSize ?? 0, true);
  bytes[24] = topology?.physicalBlockExp ?? 0;
  bytes[25] = topology?.alignmentOffset ?? 0;
  view.setUint16(26, topology?.minIoSize ?? 0, true);
  view.setUint32(28, topology?.optIoSize ?? 0, true);
  bytes[BLK_CONFIG_WRITEBACK_OFFSET] = config.writeback === true ? 1 : 0;
  view.setUint16(BLK_CONFIG_NUM_QUEUES_OFFSET, config.numQueues ?? 0, true);
  view.setUint32(36, discard?.maxSectors ?? 0, true);
  view.setUint32(40, discard?.maxSegments ?? 0, true);
  view.setUint32(44, discard?.alignment ?? 0, true);
  view.setUint32(48, writeZeroes?.maxSectors ?? 0, true);
  view.setUint32(52, writeZeroes?.maxSegments ?? 0, true);
  bytes[56] = writeZeroes?.mayUnmap === true ? 1 : 0;
  view.setUint32(60, secureErase?.maxSectors ?? 0, true);
  view.setUint32(64, secureErase?.maxSegments ?? 0, true);
  view.setUint32(68, secureErase?.alignment ?? 0, true);
  return bytes;
}

/** `struct virtio_blk_lifetime` (5.2.6): how worn the storage is. */
export interface BlkLifetime {
  /** 0 undefined, 1 normal, 2 warning (80 % of reserved blocks used), 3 urgent (90 %). */
  readonly preEolInfo: number;
  /** Wear of SLC cells: 0 undefined, 1 to 10 = up to n times 10 % used, 11 exceeded. */
  readonly deviceLifetimeEstTypA: number;
  /** Wear of MLC cells, same scale. */
  readonly deviceLifetimeEstTypB: number;
}

/** Decode the answer to GET_LIFETIME from its 6 bytes. */
export function decodeBlkLifetime(bytes: Uint8Array): BlkLifetime {
  const view = new DataView(bytes.buffer, bytes.byteOffset, BLK_LIFETIME_SIZE);
  return {
    preEolInfo: view.getUint16(0, true),
    deviceLifetimeEstTypA: view.getUint16(2, true),
    deviceLifetimeEstTypB: view.getUint16(4, true),
  };
}

/** Decode the answer to GET_ID: ASCII up to the first NUL, or all 20 bytes. */
export function decodeBlkId(bytes: Uint8Array): string {
  const end = bytes.indexOf(0);
  return String.fromCharCode(...bytes.subarray(0, end < 0 ? BLK_ID_SIZE : Math.min(end, BLK_ID_SIZE)));
}
