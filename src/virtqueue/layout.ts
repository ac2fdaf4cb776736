/** How the memory of each virtqueue is split: descriptor, driver and device area, per-request data, end. */

import { checkInteger, checkOptions, rangeError, typeError } from "../errors.js";
import {
  AVAIL_ALIGN,
  AVAIL_RING_OFFSET,
  DESC_ALIGN,
  DESC_SIZE,
  EVENT_SUPPRESS_ALIGN,
  EVENT_SUPPRESS_SIZE,
  USED_ALIGN,
  USED_ELEM_SIZE,
  USED_RING_OFFSET,
  VIRTQUEUE_MAX_SIZE,
} from "./defs.js";
import { VirtioFeature } from "./features.js";

/** What a {@link VirtqueueLayout} is computed from. */
export interface VirtqueueLayoutOptions {
  /** How many queues, all alike, lie one behind the other; 1 to 65536, default 1. */
  readonly numQueues?: number;
  /** Descriptors per queue: 1 to 32768, on split rings a power of two. */
  readonly queueSize: number;
  /** Negotiated features; `RING_PACKED` chooses the format. Default: split. */
  readonly features?: bigint;
  /** Data of each request that is shared with the device; default 0 bytes. */
  readonly request?: {
    /** Bytes per request. */
    readonly size: number;
    /** Alignment in bytes: a power of two, at most 16. Default 1. */
    readonly align?: number;
  };
}

/** A field of an area: a scalar, or an array of scalars or structs. */
export interface LayoutField {
  /** Name as in the specification's struct, for example `avail.idx`. */
  readonly name: string;
  /** Type as in the specification, for example `le16` or `struct virtq_desc`. */
  readonly type: string;
  /** Bytes from the start of the queue. */
  readonly offset: number;
  /** Bytes of one element. */
  readonly elementSize: number;
  /** Elements of an array; undefined for a scalar. */
  readonly count: number | undefined;
  /** Alignment in bytes that the specification asks for. */
  readonly align: number;
  /** Members of one element, where it is a struct; their offsets count from the start of the element. */
  readonly members: readonly LayoutMember[];
}

/** A member of a struct. */
export interface LayoutMember {
  /** Name as in the specification's struct, for example `addr`. */
  readonly name: string;
  /** Type as in the specification, for example `le64`. */
  readonly type: string;
  /** Bytes from the start of the struct. */
  readonly offset: number;
  /** Bytes, and the alignment. */
  readonly size: number;
}

/** One area of a virtqueue with its fields. */
export interface LayoutArea {
  /** Which area, and what it is in this format: `driver area: available ring`. */
  readonly name: string;
  /** Bytes from the start of the queue. */
  readonly offset: number;
  /** Bytes, padding at the end included. */
  readonly size: number;
  /** Alignment in bytes that the specification asks for. */
  readonly align: number;
  /** Who writes the area: the driver, the device, or both. */
  readonly writer: "driver" | "device" | "both";
  /** The fields, in order of offset, without gaps; padding may follow the last. */
  readonly fields: readonly LayoutField[];
}

/**
 * The memory of `numQueues` equal virtqueues in one block: queue `i` begins at `i * endOffset`, the
 * descriptor area at 0 of it. The block must start at a multiple of 16.
 *
 * Split (virtio 1.3, 2.7): 16 bytes a descriptor; the available ring, padded to 4; the used ring.
 * Packed (2.8): 16 bytes a descriptor; two event suppression structures of 4 bytes. The trailing event
 * fields are always there, whether `EVENT_IDX` was negotiated or not.
 *
 * @throws RangeError for a queue size that the format does not allow (split: 0, not a power of two, above
 *   32768; packed: 0, above 32768), an alignment that is not a power of two or is above 16, or a total
 *   size that no number can hold exactly. TypeError for an argument of the wrong kind.
 * @example
 * ```ts
 * import { VirtqueueLayout, VirtioFeature } from "virtio-driver";
 * const layout = new VirtqueueLayout({
 *   numQueues: 1,
 *   queueSize: 128,
 *   features: VirtioFeature.VERSION_1 | VirtioFeature.RING_PACKED,
 *   request: { size: 33, align: 1 },
 * });
 * console.log(layout.driverAreaOffset, layout.deviceAreaOffset, layout.reqOffset, layout.endOffset);
 * // 2048 2052 2056 6288
 * ```
 */
export class VirtqueueLayout {
  /** Number of queues in the block. */
  readonly numQueues: number;
  /** Descriptors per queue. */
  readonly queueSize: number;
  /** Whether the queues are packed virtqueues. */
  readonly packed: boolean;
  /** Offset of the driver area: available ring, or driver event suppression. */
  readonly driverAreaOffset: number;
  /** Offset of the device area: used ring, or device event suppression. */
  readonly deviceAreaOffset: number;
  /** Offset of the per-request data; request `i` begins at `reqOffset + i * requestSize`. */
  readonly reqOffset: number;
  /** Bytes per request. */
  readonly requestSize: number;
  /** Alignment of the per-request data. */
  readonly requestAlign: number;
  /** End of the queue, a multiple of 16; the next queue begins here. */
  readonly endOffset: number;

  constructor(options: VirtqueueLayoutOptions) {
    if (typeof options !== "object" || options === null) throw typeError("options", "an object", options);
    checkOptions("VirtqueueLayout", options, ["numQueues", "queueSize", "features", "request"]);
    const { features = 0n, request = { size: 0 } } = options;
    if (typeof features !== "bigint") throw typeError("features", "a bigint", features);
    if (typeof request !== "object" || request === null) throw typeError("request", "an object", request);
    checkOptions("request", request, ["size", "align"]);

    this.packed = (features & VirtioFeature.RING_PACKED) !== 0n;
    this.numQueues = checkInteger("numQueues", options.numQueues ?? 1, 1, 65536);
    this.queueSize = checkQueueSize(options.queueSize, this.packed);
    this.requestSize = checkInteger("request.size", request.size, 0);
    this.requestAlign = checkInteger("request.align", request.align ?? 1, 1, DESC_ALIGN);
    if (!isPowerOfTwo(this.requestAlign)) throw rangeError("request.align", "a power of two", this.requestAlign);

    const n = this.queueSize;
    this.driverAreaOffset = DESC_SIZE * n;
    this.deviceAreaOffset =
      this.driverAreaOffset + (this.packed ? EVENT_SUPPRESS_SIZE : alignUp(availBytes(n), USED_ALIGN));
    this.reqOffset = alignUp(this.deviceAreaEnd, this.requestAlign);
    this.endOffset = alignUp(this.reqOffset + this.requestSize * n, DESC_ALIGN);
    if (!Number.isSafeInteger(this.totalSize)) {
      throw rangeError("request.size", "a layout of at most 2^53 bytes in all", this.requestSize);
    }
  }

  /** End of the device area, before the padding in front of the per-request data. */
  get deviceAreaEnd(): number {
    return this.deviceAreaOffset + (this.packed ? EVENT_SUPPRESS_SIZE : usedBytes(this.queueSize));
  }

  /** Bytes of all queues together. */
  get totalSize(): number {
    return this.numQueues * this.endOffset;
  }

  /** The areas and their fields, in order of offset, for people: tables, drawings, debuggers. */
  get areas(): readonly LayoutArea[] {
    return this.packed ? packedAreas(this) : splitAreas(this);
  }
}

/** Round `value` up to a multiple of `align`, a power of two. Exact up to 2^53. */
export function alignUp(value: number, align: number): number {
  return Math.ceil(value / align) * align;
}

/** Whether `value` is a power of two (1 included). */
export function isPowerOfTwo(value: number): boolean {
  return Number.isSafeInteger(value) && value > 0 && 2 ** Math.round(Math.log2(value)) === value;
}

/**
 * Return `size` when the format allows it as a queue size.
 *
 * @throws RangeError otherwise.
 */
export function checkQueueSize(size: number, packed: boolean): number {
  checkInteger("queueSize", size, 1, VIRTQUEUE_MAX_SIZE);
  if (!packed && !isPowerOfTwo(size)) throw rangeError("queueSize", "a power of two on a split virtqueue", size);
  return size;
}

// Both rings end in a le16 event field; the reference layout counts it as four bytes, and so do we, so
// that memory laid out by either side means the same to the other.
const SPLIT_EVENT_FIELD_SIZE = 4;

/** Bytes of `struct virtq_avail` with its trailing `used_event`. */
function availBytes(n: number): number {
  return AVAIL_RING_OFFSET + 2 * n + SPLIT_EVENT_FIELD_SIZE;
}

/** Bytes of `struct virtq_used` with its trailing `avail_event`. */
function usedBytes(n: number): number {
  return USED_RING_OFFSET + USED_ELEM_SIZE * n + SPLIT_EVENT_FIELD_SIZE;
}

const SCALAR_SIZES = { le16: 2, le32: 4, le64: 8 } as const;
type Scalar = keyof typeof SCALAR_SIZES;
type Writer = LayoutArea["writer"];

function splitAreas(layout: VirtqueueLayout): LayoutArea[] {
  const n = layout.queueSize;
  const avail = layout.driverAreaOffset;
  const used = layout.deviceAreaOffset;
  const availRing = avail + AVAIL_RING_OFFSET;
  const usedRing = used + USED_RING_OFFSET;
  return [
    area("descriptor area: descriptor table", 0, avail, DESC_ALIGN, "driver", [
      array("desc", "struct virtq_desc", 0, n, [
        ["addr", "le64"],
        ["len", "le32"],
        ["flags", "le16"],
        ["next", "le16"],
      ]),
    ]),
    area("driver area: available ring", avail, used, AVAIL_ALIGN, "driver", [
      scalar("avail.flags", "le16", avail),
      scalar("avail.idx", "le16", avail + 2),
      { ...scalar("avail.ring", "le16", availRing), count: n },
      scalar("avail.used_event", "le16", availRing + 2 * n),
    ]),
    area("device area: used ring", used, layout.deviceAreaEnd, USED_ALIGN, "device", [
      scalar("used.flags", "le16", used),
      scalar("used.idx", "le16", used + 2),
      array("used.ring", "struct virtq_used_elem", usedRing, n, [
        ["id", "le32"],
        ["len", "le32"],
      ]),
      scalar("used.avail_event", "le16", usedRing + USED_ELEM_SIZE * n),
    ]),
    ...requestArea(layout),
  ];
}

function packedAreas(layout: VirtqueueLayout): LayoutArea[] {
  const driver = layout.driverAreaOffset;
  const device = layout.deviceAreaOffset;
  const suppression = (who: "driver" | "device", offset: number): LayoutArea =>
    area(`${who} area: event suppression`, offset, offset + EVENT_SUPPRESS_SIZE, EVENT_SUPPRESS_ALIGN, who, [
      scalar(`${who}_event.desc`, "le16", offset),
      scalar(`${who}_event.flags`, "le16", offset + 2),
    ]);
  return [
    area("descriptor area: descriptor ring", 0, driver, DESC_ALIGN, "both", [
      array("desc", "struct pvirtq_desc", 0, layout.queueSize, [
        ["addr", "le64"],
        ["len", "le32"],
        ["id", "le16"],
        ["flags", "le16"],
      ]),
    ]),
    suppression("driver", driver),
    suppression("device", device),
    ...requestArea(layout),
  ];
}

function requestArea(layout: VirtqueueLayout): LayoutArea[] {
  const { reqOffset, requestSize, requestAlign, queueSize } = layout;
  if (requestSize === 0) return [];
  const end = reqOffset + requestSize * queueSize;
  const field = {
    type: `u8[${requestSize}]`,
    offset: reqOffset,
    elementSize: requestSize,
    count: queueSize,
    align: requestAlign,
  };
  return [area("request data", reqOffset, end, requestAlign, "both", [{ name: "request", ...field, members: [] }])];
}

function area(
  name: string,
  offset: number,
  end: number,
  align: number,
  writer: Writer,
  fields: readonly LayoutField[],
): LayoutArea {
  return { name, offset, size: end - offset, align, writer, fields };
}

function scalar(name: string, type: Scalar, offset: number): LayoutField {
  const size = SCALAR_SIZES[type];
  return { name, type, offset, elementSize: size, count: undefined, align: size, members: [] };
}

/** An array of structs whose members follow one another without holes. */
function array(
  name: string,
  type: string,
  offset: number,
  count: number,
  memberTypes: readonly (readonly [name: string, type: Scalar])[],
): LayoutField {
  const members: LayoutMember[] = [];
  let elementSize = 0;
  for (const [memberName, memberType] of memberTypes) {
    const size = SCALAR_SIZES[memberType];
    members.push({ name: memberName, type: memberType, offset: elementSize, size });
    elementSize += size;
  }
  return { name, type, offset, elementSize, count, align: Math.max(...members.map((m) => m.size)), members };
}
