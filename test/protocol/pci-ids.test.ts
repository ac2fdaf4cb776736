/** Tests of which PCI ids are virtio devices. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { VIRTIO_PCI_VENDOR, virtioPciId, virtioTypeName } from "../../src/protocol/index.js";

test("PCI-DRV-01 vendor 0x1af4 with device 0x1040 to 0x107f is type device - 0x1040, others are not", () => {
  for (let device = 0x1040; device <= 0x107f; device++) {
    assert.deepEqual(virtioPciId(VIRTIO_PCI_VENDOR, device), { type: device - 0x1040, transitional: false });
    assert.equal(virtioPciId(0x1af5, device), undefined);
  }
  for (const device of [0, 0xfff, 0x103f, 0x1080, 0x1110]) assert.equal(virtioPciId(0x1af4, device), undefined);
});

test("PCI-DRV-02 the transitional ids are the types that the specification lists, the others none", () => {
  const types = new Map([
    [0x1000, "net"],
    [0x1001, "blk"],
    [0x1002, "balloon"],
    [0x1003, "console"],
    [0x1004, "scsi"],
    [0x1005, "rng"],
    [0x1009, "9p"],
  ]);
  for (let device = 0x1000; device < 0x1040; device++) {
    const id = virtioPciId(0x1af4, device);
    assert.equal(id === undefined ? undefined : virtioTypeName(id.type), types.get(device));
    assert.equal(id?.transitional, types.has(device) ? true : undefined);
  }
});

test("types without a name are shown by their number", () => {
  assert.equal(virtioTypeName(63), "type 63");
});
