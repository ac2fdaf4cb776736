/** The memory of one transport: sealed memory files at addresses of our choice, made known to the device one by one. */

import { rangeError, VirtioError } from "../errors.js";
import { type IovaRange, IovaSpace, MemoryRegion, REGION_ALIGN } from "../memory/index.js";
import { alignUp } from "../virtqueue/layout.js";

/** How a device is told about memory. */
export interface RegionMapper {
  /**
   * Let the device reach `region`.
   *
   * @param all every region it can reach then, the new one last.
   */
  add(region: MemoryRegion, all: readonly MemoryRegion[]): void | Promise<void>;
  /**
   * Take `region` from the device. When this throws, the device may still reach it.
   *
   * @param rest every region that stays.
   */
  remove(region: MemoryRegion, rest: readonly MemoryRegion[]): void | Promise<void>;
}

/** The regions that a device can reach. */
export class TransportMemory {
  /** Regions that the device takes at the same time. */
  readonly maxRegions: number;
  readonly #mapper: RegionMapper;
  readonly #peer: string;
  readonly #space: IovaSpace;
  readonly #regions: MemoryRegion[] = [];

  /**
   * @param options.peer the device, for messages.
   * @param options.ranges addresses that it can use; default: those of `IovaSpace`.
   */
  constructor(
    mapper: RegionMapper,
    { maxRegions, peer, ranges }: { maxRegions: number; peer: string; ranges?: readonly IovaRange[] },
  ) {
    this.#mapper = mapper;
    this.maxRegions = maxRegions;
    this.#peer = peer;
    this.#space = new IovaSpace(ranges === undefined ? {} : { ranges });
  }

  /** All regions, oldest first. */
  get regions(): readonly MemoryRegion[] {
    return this.#regions;
  }

  /**
   * Make a region and tell the device about it.
   *
   * @throws VirtioError ERR_VIRTIO_MEMORY when no region is left; what the mapper throws. Nothing stays behind then.
   */
  async map(size: number): Promise<MemoryRegion> {
    if (this.#regions.length >= this.maxRegions) {
      throw new VirtioError(
        "ERR_VIRTIO_MEMORY",
        `${this.#peer} takes ${this.maxRegions} memory regions and all are in use; map fewer and larger ones`,
      );
    }
    const iova = this.#space.allocate(alignUp(size, REGION_ALIGN), REGION_ALIGN);
    let region: MemoryRegion | undefined;
    try {
      region = MemoryRegion.create({ name: "virtio-driver", size, iova });
      this.#regions.push(region);
      await this.#mapper.add(region, this.#regions);
      return region;
    } catch (error) {
      this.#forget(region, iova);
      throw error;
    }
  }

  /**
   * Withdraw a region from the device, then free it. It stays as it is when the mapper throws.
   *
   * @throws RangeError when it is not a region of this memory.
   */
  async unmap(region: MemoryRegion): Promise<void> {
    if (!this.#regions.includes(region)) {
      throw rangeError("region", "a region that mapMemory of this transport returned", region);
    }
    // Two active regions must not overlap: the addresses are free for others only when this is confirmed.
    await this.#mapper.remove(
      region,
      this.#regions.filter((other) => other !== region),
    );
    this.#forget(region, region.iova);
  }

  /** Whether the `length` bytes at `address` lie in one region. */
  contains(address: number, length: number): boolean {
    return this.#regions.some(({ iova, size }) => address >= iova && address + length <= iova + size);
  }

  /** Free all regions here; the device must have lost them before. */
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
}
