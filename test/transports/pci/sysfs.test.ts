/** Tests of what is read about PCI functions in sysfs, on made-up trees. */

import assert from "node:assert/strict";
import { after, test } from "node:test";
import { isVfioDriver, listVirtioFunctions, readPciFunction } from "../../../src/transports/pci/sysfs.js";
import { FakeMachine } from "../../support/fake-machine.js";

const machine = new FakeMachine();
after(() => machine.close());
machine.addFunction({ address: "0000:00:02.0", device: 0x1001 });
machine.addFunction({ address: "0000:00:04.0", driver: "vfio-pci", driverOverride: "vfio-pci", group: 7 });
machine.addFunction({ address: "0000:00:04.1", vendor: 0x8086, device: 0x100e, driver: "e1000", group: 7 });
machine.addFunction({ address: "0000:00:1c.0", vendor: 0x8086, class: 0x060400, driver: "shpchp", group: 7 });
machine.addFunction({ address: "0000:00:1f.0", vendor: 0x8086, class: 0x060100, driver: "lpc_ich", group: 7 });
machine.addFunction({ address: "0000:00:1e.0", vendor: 0x8086, driver: null, group: 7 });
machine.addFunction({ address: "0001:00:00.0", device: 0x1041 });

test("a function that nobody has touched", () => {
  assert.deepEqual(readPciFunction("0000:00:02.0", machine.sys), {
    ...{ address: "0000:00:02.0", vendor: 0x1af4, device: 0x1001, class: 0x018000 },
    ...{ virtio: { type: 2, transitional: true }, isLegacyOnly: false },
    ...{ driver: "virtio-pci", driverOverride: undefined, group: undefined },
  });
});

test("a function in a group: the kernel uses what a driver has that may do DMA, but not what VFIO or a PCI bridge has", () => {
  const { driver, driverOverride, group } = readPciFunction("0000:00:04.0", machine.sys);
  assert.deepEqual([driver, driverOverride, group?.number, group?.noIommu], ["vfio-pci", "vfio-pci", 7, false]);
  assert.deepEqual(group?.members, [
    { address: "0000:00:04.0", driver: "vfio-pci", inKernelUse: false },
    { address: "0000:00:04.1", driver: "e1000", inKernelUse: true },
    { address: "0000:00:1c.0", driver: "shpchp", inKernelUse: false },
    { address: "0000:00:1e.0", driver: undefined, inKernelUse: false },
    { address: "0000:00:1f.0", driver: "lpc_ich", inKernelUse: true },
  ]);
});

test("a group of VFIO's mode without IOMMU says so", () => {
  const unsafe = new FakeMachine();
  try {
    unsafe.addFunction({ address: "0000:00:02.0", driver: "vfio-pci", group: 0 });
    unsafe.file("sys/kernel/iommu_groups/0/name", "vfio-noiommu\n");
    assert.equal(readPciFunction("0000:00:02.0", unsafe.sys).group?.noIommu, true);
  } finally {
    unsafe.close();
  }
});

test("PCI-DRV-03 all virtio functions are listed by address, whatever their revision", () => {
  for (const [address, revision] of [
    ["0000:00:02.0", "0x00"],
    ["0000:00:04.0", "0xff"],
  ] as const) {
    machine.file(`sys/devices/pci0000:00/${address}/revision`, `${revision}\n`);
  }
  assert.deepEqual(
    listVirtioFunctions(machine.sys).map(({ address, virtio }) => [address, virtio.type]),
    [
      ["0000:00:02.0", 2],
      ["0000:00:04.0", 2],
      ["0001:00:00.0", 1],
    ],
  );
  assert.deepEqual(listVirtioFunctions("/nowhere"), []);
});

test("addresses: the domain may be left out, letters may be large; nonsense and absent functions are refused", () => {
  assert.equal(readPciFunction("00:04.1", machine.sys).address, "0000:00:04.1");
  assert.equal(readPciFunction("0000:00:1C.0", machine.sys).address, "0000:00:1c.0");
  for (const text of ["", "4", "0000:00:04", "0000:00:04.8", "0000:00:20.0", "../../x", "pci:0000:00:04.0"]) {
    assert.throws(() => readPciFunction(text, machine.sys), { code: "ERR_VIRTIO_ADDRESS" }, text);
  }
  assert.throws(() => readPciFunction("0000:00:09.0", machine.sys), {
    code: "ERR_VIRTIO_CONNECT",
    syscall: "open",
    errno: 2,
    message: /0000:00:09\.0/,
  });
});

test("PCI-DRV-25 a transitional function without a common configuration is a legacy one, if its capabilities can be read", () => {
  const legacyOnly = (device: number, bytes: Readonly<Record<number, number>>, length = 256): boolean => {
    const config = Buffer.alloc(length);
    for (const [offset, value] of Object.entries(bytes)) config[Number(offset)] = value;
    const one = new FakeMachine();
    try {
      one.addFunction({ address: "0000:00:02.0", device });
      one.file("sys/devices/pci0000:00/0000:00:02.0/config", config);
      return readPciFunction("0000:00:02.0", one.sys).isLegacyOnly;
    } finally {
      one.close();
    }
  };
  const list = { 0x06: 0x10, 0x34: 0x43 };
  const msix = { 0x40: 0x11, 0x41: 0x98 };
  const common = { 0x98: 0x09, 0x99: 0x00, 0x9b: 0x01 };
  assert.equal(legacyOnly(0x1001, { ...list, ...msix, ...common }), false);
  assert.equal(legacyOnly(0x1001, { ...list, ...msix, ...common, 0x06: 0 }), true, "no list");
  assert.equal(legacyOnly(0x1001, { ...list, ...msix, ...common, 0x9b: 5 }), true, "another structure");
  assert.equal(legacyOnly(0x1001, { ...list, ...msix, 0x98: 0x09, 0x99: 0x40 }), true, "a loop");
  assert.equal(legacyOnly(0x1001, { ...list, ...msix }, 64), false, "the header only, as users see it");
  assert.equal(legacyOnly(0x1042, {}), false, "not transitional");
});

test("drivers of VFIO", () => {
  assert.deepEqual(
    ["vfio-pci", "virtio_vfio_pci", "virtio-pci", "uio_pci_generic", undefined].map((name) => isVfioDriver(name)),
    [true, true, false, false, false],
  );
});
