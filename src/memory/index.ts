/** Memory that a device can reach: regions, the addresses it knows them by, and a pool that lends buffers. */

export { type IovaRange, IovaSpace } from "./iova.js";
export { BufferPool, DeviceBuffer } from "./pool.js";
export { MemoryRegion, REGION_ALIGN } from "./region.js";
