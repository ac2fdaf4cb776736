/**
 * The memory that the back-end can reach: our own regions at our own addresses, told to it one by one
 * (CONFIGURE_MEM_SLOTS) or as a whole table. Guest address, user address and IOVA are the same number, so
 * the back-end never learns where this process has mapped anything.
 */

import { rangeError, VirtioError } from "../../errors.js";
import { IovaSpace, MemoryRegion, REGION_ALIGN } from "../../memory/index.js";
import { memoryTableCodec, singleRegionCodec, VhostUserRequest } from "../../protocol/vhost-user.js";
import type { VhostUserRegion } from "../../protocol/vhost-user.js";
import { alignUp } from "../../virtqueue/layout.js";
import type { Message, RequestChannel } from "./channel.js";

/** The regions of one connection. */
export class VhostUserMemory {
  /** Regions that the back-end takes at the same time. */
  readonly maxRegions: number;
  readonly #channel: RequestChannel;
  readonly #slots: boolean;
  readonly #space = new IovaSpace();
  readonly #regions: MemoryRegion[] = [];

  /** @param slots whether CONFIGURE_MEM_SLOTS is in force; otherwise each change sends the whole table. */
  constructor(channel: RequestChannel, slots: boolean, maxRegions: number) {
    this.#channel = channel;
    this.#slots = slots;
    this.maxRegions = maxRegions;
  }

  /** Whether a change replaces the mapping of every region, which running queues do not survive safely. */
  get replacesAll(): boolean {
    return !this.#slots;
  }

  /**
   * Make a region and tell the back-end about it.
   *
   * @throws VirtioError ERR_VIRTIO_MEMORY when there is no region left.
   */
  async map(size: number): Promise<MemoryRegion> {
    if (this.#regions.length >= this.maxRegions) {
      throw new VirtioError(
        "ERR_VIRTIO_MEMORY",
        `the back-end takes ${this.maxRegions} memory regions and all are in use; map fewer and larger ones`,
      );
    }
    const iova = this.#space.allocate(alignUp(size, REGION_ALIGN), REGION_ALIGN);
    let region: MemoryRegion | undefined;
    try {
      region = MemoryRegion.create({ name: "virtio-driver", size, iova });
      this.#regions.push(region);
      await this.#channel.confirm([this.#slots ? addition(region) : this.#table()]);
      return region;
    } catch (error) {
      this.#forget(region, iova);
      throw error;
    }
  }

  /** Withdraw a region from the back-end, then free it. It stays as it is when the back-end refuses. */
  async unmap(region: MemoryRegion): Promise<void> {
    const at = this.#regions.indexOf(region);
    if (at < 0) throw rangeError("region", "a region that mapMemory of this transport returned", region);
    // Two active regions must not overlap: the addresses are free for others only when this is confirmed.
    if (this.#slots) {
      await this.#channel.confirm([removal(region)]);
    } else {
      this.#regions.splice(at, 1);
      try {
        await this.#channel.confirm([this.#table()]);
      } catch (error) {
        this.#regions.splice(at, 0, region);
        throw error;
      }
    }
    this.#forget(region, region.iova);
  }

  /** Whether the `length` bytes at `address` lie in one region. */
  contains(address: number, length: number): boolean {
    return this.#regions.some(({ iova, size }) => address >= iova && address + length <= iova + size);
  }

  /** Withdraw everything, as far as the protocol has words for it. The queues have stopped. */
  async withdraw(): Promise<void> {
    if (this.#slots && this.#regions.length > 0) await this.#channel.confirm(this.#regions.map(removal));
  }

  /** Free all regions here. */
  close(): void {
    for (const region of this.#regions.splice(0)) region.close();
  }

  #forget(region: MemoryRegion | undefined, iova: number): void {
    if (region !== undefined) {
      const at = this.#regions.indexOf(region);
      if (at >= 0) this.#regions.splice(at, 1);
      region.close();
    }
    this.#space.free(iova);
  }

  #table(): Message {
    return {
      request: VhostUserRequest.SET_MEM_TABLE,
      payload: memoryTableCodec.encode(this.#regions.map(describe)),
      fds: this.#regions.map(({ fd }) => fd),
    };
  }
}

function addition(region: MemoryRegion): Message {
  const payload = singleRegionCodec.encode(describe(region));
  return { request: VhostUserRequest.ADD_MEM_REG, payload, fds: [region.fd] };
}

/** Without a descriptor: the addresses and the size name the region ("VHOST_USER_REM_MEM_REG"). */
function removal(region: MemoryRegion): Message {
  return { request: VhostUserRequest.REM_MEM_REG, payload: singleRegionCodec.encode(describe(region)) };
}

function describe({ iova, size }: MemoryRegion): VhostUserRegion<number> {
  return { guestAddress: iova, size, userAddress: iova, mmapOffset: 0 };
}
