/** Fakes for tests of drivers and devices: the subpath `virtio-driver/testing`. */

export { type FakeBlkAnswer, FakeBlkRequest, takeBlk } from "./fake-blk.js";
export { FakeDevice, type FakeDeviceOptions, FakeRequest, linearMemory } from "./fake-device.js";
export {
  type FakePciAccess,
  type FakePciCall,
  FakePciFunction,
  type FakePciOptions,
} from "./fake-pci.js";
export type { FakePciCapability } from "./fake-pci-space.js";
export {
  type FakeEvent,
  type FakeInterrupt,
  FakeQueue,
  type FakeStep,
  FakeTransport,
  type FakeTransportOptions,
} from "./fake-transport.js";
export { FakeVhostVdpa, type FakeVhostVdpaOptions } from "./fake-vhost-vdpa.js";
export { HostileDevice } from "./hostile-device.js";
export type { HostileRing } from "./hostile-ring.js";
export { LIES, type Lie, type LieOutcome } from "./lies.js";
