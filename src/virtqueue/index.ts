/** Virtqueues without a device: constants, layout, and the driver's and the device's half of both rings. */

export * from "./defs.js";
export { featureNames, VirtioFeature } from "./features.js";
export { type LayoutArea, type LayoutField, VirtqueueLayout, type VirtqueueLayoutOptions } from "./layout.js";
export type { IndirectTables, RequestFrame } from "./ring.js";
export { Virtqueue, type VirtqueueOptions } from "./virtqueue.js";
