/** Virtqueues without a device: constants, layout, and the driver's and the device's half of both rings. */

export * from "./defs.js";
export { featureNames, VirtioFeature } from "./features.js";
export {
  alignUp,
  isPowerOfTwo,
  type LayoutArea,
  type LayoutField,
  VirtqueueLayout,
  type VirtqueueLayoutOptions,
} from "./layout.js";
export { type IndirectTables, type RequestFrame, type SegmentSink } from "./ring.js";
export { Virtqueue, type VirtqueueOptions } from "./virtqueue.js";
export { DescriptorChain } from "./device-chain.js";
export { DeviceMemory } from "./device-memory.js";
export { DeviceVirtqueue, type DeviceVirtqueueOptions, ringAreas, type RingAreaShape } from "./device.js";
export type { RingArea } from "./device-ring.js";
