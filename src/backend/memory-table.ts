/** The memory regions a front-end shares: mapped from its descriptors, and found by both of their addresses. */

import { VirtioError } from "../errors.js";
import type { VhostUserRegion } from "../protocol/vhost-user.js";
import { isLost, MemfdSeal, mapShared, memfdSeals, unmapShared } from "../sys/index.js";
import { DeviceMemory } from "../virtqueue/device-memory.js";
import type { RingAreaShape } from "../virtqueue/device.js";
import type { RingArea } from "../virtqueue/device-ring.js";

const LOW_HALF = 0xffff_ffffn;

/** One region with its mapping. */
interface MappedRegion {
  readonly region: VhostUserRegion;
  readonly buffer: ArrayBuffer;
}

/**
 * All regions of one front-end. Descriptors use guest addresses, `SET_VRING_ADDR` user addresses; neither may
 * overlap within the table.
 *
 * A file that its owner can shrink is a danger: touching a page that is gone is SIGBUS, by default the end of this
 * process. Seals exclude it, but memory of a virtual machine often comes from files that have none or cannot have any
 * (QEMU's memfd by default, tmpfs, huge pages), so refusing is for those who ask for it by `sealed`. Copying by pread
 * and pwrite instead of mapping would make every request slower, and is impossible for rings, which need atomic
 * accesses. So mappings are guarded: a page that is gone is replaced by memory of our own, and the session, which looks
 * at the count of such faults before it answers anything, ends the connection (see native/guard.c).
 */
export class MemoryTable {
  /** The regions by guest address. */
  readonly guest = new DeviceMemory();

  private readonly user = new DeviceMemory();
  private readonly regions: MappedRegion[] = [];
  private readonly sealed: boolean;

  /**
   * @param sealed refuse memory that is not sealed against shrinking.
   */
  constructor(sealed: boolean) {
    this.sealed = sealed;
  }

  /**
   * Map a region. The descriptor stays the caller's.
   *
   * @throws RangeError or VirtioError when the region is empty, above 4 GiB, not in whole pages of its file, beyond
   *   the end of it, overlaps another, cannot be mapped, or is not sealed though it has to be.
   */
  add(region: VhostUserRegion, fd: number): void {
    if (this.sealed && (memfdSeals(fd) & MemfdSeal.SHRINK) === 0) {
      throw new VirtioError(
        "ERR_VIRTIO_MEMORY",
        "the front-end's memory can be shrunk under our hands; have it sealed (F_SEAL_SHRINK), or allow unsealed memory",
      );
    }
    // Beyond 2^53 these are inexact, and far outside of what mapShared accepts.
    const buffer = mapShared(fd, Number(region.size), { offset: Number(region.mmapOffset), guarded: true });
    try {
      this.guest.add(region.guestAddress, buffer);
      this.user.add(region.userAddress, buffer);
      this.regions.push({ region, buffer });
    } catch (error) {
      this.guest.remove(buffer);
      unmapShared(buffer);
      throw error;
    }
  }

  /**
   * The buffer of a region named by its addresses and size, for {@link remove}.
   *
   * @throws VirtioError ERR_VIRTIO_PROTOCOL when there is no such region.
   */
  find(region: VhostUserRegion): ArrayBuffer {
    const found = this.regions.find(
      ({ region: { guestAddress, userAddress, size } }) =>
        guestAddress === region.guestAddress && userAddress === region.userAddress && size === region.size,
    );
    if (found === undefined) {
      const address = `0x${region.guestAddress.toString(16)}`;
      throw new VirtioError("ERR_VIRTIO_PROTOCOL", `there is no region of ${region.size} bytes at ${address}`);
    }
    return found.buffer;
  }

  /** Unmap a region. Nothing may use it any more. */
  remove(buffer: ArrayBuffer): void {
    this.guest.remove(buffer);
    this.user.remove(buffer);
    this.regions.splice(
      this.regions.findIndex((mapped) => mapped.buffer === buffer),
      1,
    );
    unmapShared(buffer);
  }

  /**
   * Where an area of a ring lies, by its user address.
   *
   * @throws VirtioError ERR_VIRTIO_PROTOCOL when it is not within one region, or not aligned there.
   */
  area(name: string, address: bigint, shape: RingAreaShape): RingArea {
    const lo = Number(address & LOW_HALF);
    const hi = Number(address >> 32n);
    const index = this.user.find(lo, hi, shape.size);
    if (index < 0) {
      throw new VirtioError(
        "ERR_VIRTIO_PROTOCOL",
        `the ${name} of ${shape.size} bytes at 0x${address.toString(16)} is outside the shared memory`,
      );
    }
    const offset = this.user.offset(index, lo, hi);
    if (offset % shape.align !== 0) {
      throw new VirtioError(
        "ERR_VIRTIO_PROTOCOL",
        `the ${name} at 0x${address.toString(16)} is not at a multiple of ${shape.align} in its region`,
      );
    }
    return { buffer: this.regions[index].buffer, offset };
  }

  /** Regions. */
  get count(): number {
    return this.regions.length;
  }

  /** Bytes of all regions. */
  get bytes(): number {
    return this.regions.reduce((sum, { buffer }) => sum + buffer.byteLength, 0);
  }

  /** Whether the front-end took memory away that it had shared. */
  get isLost(): boolean {
    return this.regions.some(({ buffer }) => isLost(buffer));
  }

  /** Unmap everything. Idempotent. */
  close(): void {
    for (const { buffer } of [...this.regions]) this.remove(buffer);
  }
}
