/** The address space of a fake vhost-vdpa device: IOTLB messages in, memory that the device can reach out. */

import { closeSync, fstatSync, openSync, readdirSync, readFileSync } from "node:fs";
import { VirtioError } from "../errors.js";
import { iotlbMessageCodec, IotlbAccess, type IotlbMessage, IotlbType } from "../protocol/vhost-vdpa.js";
import { errno, mapShared, unmapShared } from "../sys/index.js";
import { DeviceMemory } from "../virtqueue/device-memory.js";
import { Refusal } from "./refusal.js";

const PAGE = 4096n;
const U64_END = 1n << 64n;

/** What the device can use an address for. */
interface Mapping {
  readonly iova: bigint;
  readonly size: bigint;
  /** The memory, mapped once more; undefined when it is none that a device can reach. */
  readonly buffer: ArrayBuffer | undefined;
}

/** The mappings of one device. */
export class FakeIotlb {
  /** What the device can reach. */
  readonly memory = new DeviceMemory();

  private readonly range: { readonly first: bigint; readonly last: bigint };
  private mappings: Mapping[] = [];

  constructor(range: { readonly first: bigint; readonly last: bigint }) {
    this.range = range;
  }

  /** A message by its name and what it is about, for a log. */
  static describe(message: Uint8Array): { name: string; detail: string } {
    const decoded = tryDecode(message);
    if (decoded === undefined) return { name: "IOTLB", detail: `${message.length} bytes` };
    const { type, iova, size } = decoded;
    const name = Object.entries(IotlbType).find(([, value]) => value === type)?.[0] ?? `type ${type}`;
    return { name: `IOTLB_${name}`, detail: `0x${iova.toString(16)} ${size}` };
  }

  /** Mappings that exist. */
  get size(): number {
    return this.mappings.length;
  }

  /**
   * Do what a message says, by the kernel's rules; but what that would round is refused. The kernel says EFAULT of
   * every message that it understands and does not like, whatever the reason.
   */
  apply(message: Uint8Array): void {
    const decoded = tryDecode(message);
    if (decoded === undefined) throw new Refusal(errno.EINVAL);
    const { type, asid, iova, size, uaddr, perm } = decoded;
    if (size === 0n) throw new Refusal(errno.EINVAL);
    if (asid !== 0 || iova + size > U64_END) throw new Refusal(errno.EFAULT);
    if (iova % PAGE !== 0n || size % PAGE !== 0n || uaddr % PAGE !== 0n) throw new Refusal(errno.EFAULT);
    const hit = (mapping: Mapping): boolean => mapping.iova < iova + size && iova < mapping.iova + mapping.size;
    if (type === IotlbType.UPDATE) {
      if (perm !== IotlbAccess.READ_WRITE) throw new Refusal(errno.EFAULT);
      if (iova < this.range.first || iova + size - 1n > this.range.last) throw new Refusal(errno.EFAULT);
      if (this.mappings.some(hit)) throw new Refusal(errno.EFAULT);
      const buffer = mapAgain(uaddr, size);
      if (buffer !== undefined) this.memory.add(iova, buffer);
      this.mappings.push({ iova, size, buffer });
    } else if (type === IotlbType.INVALIDATE) {
      // The address space itself goes with its last mapping.
      if (this.mappings.length === 0) throw new Refusal(errno.EFAULT);
      for (const mapping of this.mappings.filter(hit)) this.drop(mapping);
    } else {
      throw new Refusal(errno.EFAULT);
    }
  }

  /** Where the `length` bytes at an address lie; undefined when they are not within one mapping. */
  find(iova: number, length: number): { buffer: ArrayBuffer; offset: number } | undefined {
    for (const { iova: start, buffer } of this.mappings) {
      const offset = iova - Number(start);
      if (buffer !== undefined && offset >= 0 && offset + length <= buffer.byteLength) return { buffer, offset };
    }
    return undefined;
  }

  /** Drop every mapping. */
  clear(): void {
    for (const mapping of this.mappings) this.drop(mapping);
  }

  private drop(mapping: Mapping): void {
    this.mappings = this.mappings.filter((other) => other !== mapping);
    if (mapping.buffer === undefined) return;
    this.memory.remove(mapping.buffer);
    unmapShared(mapping.buffer);
  }
}

/** A message; undefined for bytes that are none. */
function tryDecode(message: Uint8Array): IotlbMessage | undefined {
  try {
    return iotlbMessageCodec.decode(message);
  } catch (error) {
    if (error instanceof VirtioError) return undefined;
    throw error;
  }
}

/**
 * Map the file that is mapped at an address of this process; undefined when what is there is not all of one shared
 * mapping of a file. Kernels pass over such memory without a word, so that a device does not reach it.
 */
function mapAgain(uaddr: bigint, size: bigint): ArrayBuffer | undefined {
  for (const line of readFileSync("/proc/self/maps", "utf8").split("\n")) {
    const [, start, end, mode, offset, inode] = /^(\w+)-(\w+) (\S+) (\w+) \S+ (\d+)/.exec(line) ?? [];
    if (start === undefined || end === undefined) continue;
    const from = BigInt(`0x${start}`);
    if (uaddr < from || uaddr + size > BigInt(`0x${end}`) || !mode.endsWith("s")) continue;
    const fd = openByInode(Number(inode));
    if (fd === undefined) return undefined;
    try {
      return mapShared(fd, Number(size), { offset: Number(BigInt(`0x${offset}`) + uaddr - from) });
    } finally {
      closeSync(fd);
    }
  }
  return undefined;
}

/** Open once more what some descriptor of this process has open. */
function openByInode(inode: number): number | undefined {
  for (const fd of readdirSync("/proc/self/fd")) {
    try {
      if (fstatSync(Number(fd)).ino === inode) return openSync(`/proc/self/fd/${fd}`, "r+");
    } catch {
      // It was the directory that is being read.
    }
  }
  return undefined;
}
