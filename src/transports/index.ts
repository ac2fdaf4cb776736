/** The ways to reach a device. */

export type { PciSharedMemory } from "./pci/capabilities.js";
export type { PciFunction, PciRegisters } from "./pci/function.js";
export { Pci, type PciOptions } from "./pci/pci.js";
export {
  type QueueNotifier,
  type QueueSetup,
  type ReconnectOptions,
  type Recovery,
  type ReturnedDevice,
  type VirtioTransport,
  type WaitOptions,
  waitOptions,
} from "./transport.js";
export { VhostUser, type VhostUserOptions, type VhostUserTarget } from "./vhost-user/vhost-user.js";
export { VhostVdpa, type VhostVdpaOptions, type VhostVdpaTarget } from "./vhost-vdpa/vhost-vdpa.js";
export type { VhostVdpaNode } from "./vhost-vdpa/node.js";
