/** Fakes for tests of drivers and devices: the subpath `virtio-driver/testing`. */

export { FakeDevice, type FakeDeviceOptions, FakeRequest, linearMemory } from "./fake-device.js";
