/** Opening and closing a function by VFIO, beside a model of the kernel: the order, and the failure of each step. */

import assert from "node:assert/strict";
import { mkdirSync, rmSync } from "node:fs";
import { constants } from "node:os";
import { join } from "node:path";
import test from "node:test";
import { VirtioError } from "../../../src/errors.js";
import { MemoryRegion } from "../../../src/memory/index.js";
import { EventFd } from "../../../src/sys/index.js";
import { openVfio } from "../../../src/transports/pci/vfio.js";
import { mappings, openFds } from "../../sys/helpers.js";
import type { ModelFacts } from "./vfio-kernel.js";
import { machine, open, refusal, withFs } from "./vfio-support.js";

const { errno } = constants;

/** The requests that open a function, in the order of the kernel's documentation. */
const OPENING = [
  ...["GET_API_VERSION", "CHECK_EXTENSION", "GROUP_GET_STATUS", "GROUP_SET_CONTAINER", "SET_IOMMU"],
  ...["IOMMU_GET_INFO", "IOMMU_GET_INFO", "GROUP_GET_DEVICE_FD", "DEVICE_GET_INFO"],
  ...new Array<string>(9).fill("DEVICE_GET_REGION_INFO").slice(0, 8),
  ...["DEVICE_GET_IRQ_INFO", "DEVICE_GET_IRQ_INFO", "DEVICE_GET_IRQ_INFO"],
];
const CLOSING = ["close device", "GROUP_UNSET_CONTAINER", "close group", "close container"];

test("a function is opened and closed in the kernel's order, and says what it has", (t) => {
  const kernel = machine(t);
  const opened = open(kernel);
  assert.deepEqual(kernel.log, OPENING);
  assert.equal(opened.address, "0000:00:04.0");
  assert.equal(opened.configSize, 4096);
  assert.deepEqual(
    [0, 1, 2, 3, 4, 5].map((bar) => opened.barSize(bar)),
    [128, 4096, 0, 0, 0x4000, 0], // BAR 5 can only be read
  );
  assert.deepEqual([opened.msixVectors, opened.hasIntx, opened.canReset, opened.maxRegions], [3, true, true, 65_535]);
  assert.deepEqual(opened.iovaRanges, [
    { start: 0, end: 0xfedf_ffff },
    { start: 0xfef0_0000, end: 0x7f_ffff_ffff },
  ]);
  kernel.log.length = 0;
  opened.close();
  assert.deepEqual(kernel.log, CLOSING);
});

test("the address is taken as lspci shows it", (t) => {
  const kernel = machine(t, { address: "0000:0a:1f.7" });
  for (const address of ["0000:0a:1f.7", "0a:1f.7", "0A:1F.7", "0000:0A:1f.7"]) {
    const opened = openVfio(address, kernel.roots);
    assert.equal(opened.address, "0000:0a:1f.7");
    opened.close();
  }
  for (const address of ["", "0a:1f", "0a:1f.8", "0a:20.0", "a:1f.7", "000:0a:1f.7", "../..", "0000:0a:1f.7 "]) {
    assert.throws(() => openVfio(address, kernel.roots), { code: "ERR_VIRTIO_ADDRESS" }, address);
  }
  assert.throws(() => openVfio(4 as unknown as string, kernel.roots), {
    name: "TypeError",
    code: "ERR_VIRTIO_ARGUMENT",
  });
  assert.throws(() => openVfio("0a:1f.7", { group: 4 } as object), { code: "ERR_VIRTIO_ARGUMENT" });
});

test("a function that cannot be opened is refused with what to do, before anything is opened", (t) => {
  const cases: readonly (readonly [string, Partial<ModelFacts>, object])[] = [
    ["00:05.0", {}, { code: "ERR_VIRTIO_CONNECT", errno: errno.ENOENT, message: /no PCI function 0000:00:05\.0/ }],
    ["00:04.0", { vendor: "0x8086" }, { code: "ERR_VIRTIO_ADDRESS", message: /8086:1042/ }],
    ["00:04.0", { device: "0x1110" }, { code: "ERR_VIRTIO_ADDRESS", message: /1af4:1110/ }],
    [
      "00:04.0",
      { driver: "virtio-pci" },
      { code: "ERR_VIRTIO_CONNECT", message: /the driver virtio-pci.*bind it: virtio pci bind 0000:00:04\.0/ },
    ],
    ["00:04.0", { driver: undefined }, { code: "ERR_VIRTIO_CONNECT", message: /no driver.*virtio pci bind/ }],
    ["00:04.0", { group: undefined }, { code: "ERR_VIRTIO_CONNECT", message: /no IOMMU group.*intel_iommu=on/ }],
    ["00:04.0", { groupName: "vfio-noiommu" }, { code: "ERR_VIRTIO_UNSUPPORTED", message: /physical addresses/ }],
  ];
  for (const [address, facts, expected] of cases) {
    const kernel = machine(t, facts);
    assert.throws(() => openVfio(address, kernel.roots), expected, JSON.stringify(facts));
    assert.deepEqual(kernel.log, []);
  }
});

test("missing nodes name the modules, and those of no permission whom to give them to", (t) => {
  const kernel = machine(t);
  const group = join(kernel.devices, "7");
  const container = join(kernel.devices, "vfio");
  const opening = () => openVfio("00:04.0", kernel.roots);
  const refuse = (path: string, code: "EACCES" | "EBUSY" | "ENODEV", expected: object) =>
    withFs(
      "openSync",
      (real) => (name: string, flags: string) => {
        if (name === path) throw refusal(code, errno[code], "open");
        return real(name, flags);
      },
      () => assert.throws(opening, { errno: errno[code], syscall: "open", ...expected }),
    );
  refuse(group, "EACCES", { code: "ERR_VIRTIO_PERMISSION", message: /chown USER .*\/7, .*udev/ });
  refuse(container, "EACCES", { code: "ERR_VIRTIO_PERMISSION" });
  refuse(group, "EBUSY", { code: "ERR_VIRTIO_BUSY", message: /fuser .*\/7/ });
  refuse(group, "ENODEV", { code: "ERR_VIRTIO_SYSCALL" });
  const missing = { code: "ERR_VIRTIO_CONNECT", errno: errno.ENOENT, syscall: "open" };
  rmSync(group);
  assert.throws(opening, { ...missing, message: /bind it: virtio pci bind 0000:00:04\.0/ });
  rmSync(container);
  assert.throws(opening, { ...missing, message: /modprobe -a vfio-pci vfio_iommu_type1/ });
  mkdirSync(container);
  assert.throws(opening, { code: "ERR_VIRTIO_SYSCALL", errno: errno.EISDIR, syscall: "open" });
});

test("every request that fails while opening is told, and everything is given back", (t) => {
  const kernel = machine(t);
  const before = openFds();
  for (const [at, name] of OPENING.entries()) {
    kernel.log.length = 0;
    kernel.intercept = () => (kernel.log.length === at + 1 ? -errno.EIO : undefined);
    assert.throws(
      () => openVfio("00:04.0", kernel.roots),
      (error: unknown) =>
        error instanceof VirtioError &&
        error.code === "ERR_VIRTIO_SYSCALL" &&
        error.errno === errno.EIO &&
        error.syscall === "ioctl" &&
        error.message.includes(`VFIO_${name}`),
      `${at} ${name}`,
    );
    assert.equal(openFds(), before, `descriptors after ${at} ${name}`);
    // What was acquired is given back in reverse.
    const closed = kernel.log.slice(at + 1);
    const attached = at > OPENING.indexOf("GROUP_SET_CONTAINER");
    const held = CLOSING.filter((step) => {
      if (step === "close device") return at > OPENING.indexOf("GROUP_GET_DEVICE_FD");
      if (step === "GROUP_UNSET_CONTAINER") return attached;
      return step !== "close group" || at >= OPENING.indexOf("GROUP_GET_STATUS");
    });
    assert.deepEqual(closed, held, `${at} ${name}`);
  }
});

test("what the kernel's refusals mean is said", (t) => {
  const others = { "0000:00:05.0": "nvme", "0000:00:05.1": "vfio-pci", "0000:00:05.2": "pcieport" };
  const kernel = machine(t, { others });
  const users = /the kernel uses 0000:00:05\.0 \(driver nvme\); unbind/;
  const cases: readonly (readonly [string, number, object])[] = [
    ["SET_IOMMU", -errno.EPERM, { code: "ERR_VIRTIO_PERMISSION", errno: errno.EPERM, message: /interrupt remapping/ }],
    ["GROUP_SET_CONTAINER", -errno.EBUSY, { code: "ERR_VIRTIO_CONNECT", errno: errno.EBUSY, message: users }],
    ["GROUP_GET_DEVICE_FD", -errno.ENODEV, { code: "ERR_VIRTIO_CONNECT", message: /virtio pci bind/ }],
    ["GROUP_GET_DEVICE_FD", -errno.EBUSY, { code: "ERR_VIRTIO_BUSY" }],
    ["GET_API_VERSION", 1, { code: "ERR_VIRTIO_UNSUPPORTED", errno: undefined, message: /version 1/ }],
  ];
  for (const [request, answer, expected] of cases) {
    kernel.intercept = (name) => (name === request ? answer : undefined);
    assert.throws(() => openVfio("00:04.0", kernel.roots), expected, request);
  }
  kernel.intercept = () => undefined;
  kernel.facts.viable = false;
  assert.throws(() => openVfio("00:04.0", kernel.roots), { code: "ERR_VIRTIO_CONNECT", message: users });
  const alone = machine(t, { viable: false });
  assert.throws(() => openVfio("00:04.0", alone.roots), { code: "ERR_VIRTIO_CONNECT", message: /virtio pci list/ });
  const untyped = machine(t, { hasType1v2: false });
  assert.throws(() => openVfio("00:04.0", untyped.roots), {
    code: "ERR_VIRTIO_UNSUPPORTED",
    message: /modprobe vfio_iommu_type1/,
  });
});

test("what the kernel says of a function is checked", (t) => {
  const cases: readonly (readonly [Partial<ModelFacts>, object])[] = [
    [{ deviceFlags: 1 }, { code: "ERR_VIRTIO_UNSUPPORTED", message: /no PCI function/ }],
    [{ numRegions: 0 }, { code: "ERR_VIRTIO_PROTOCOL", message: /0 bytes of config space/ }],
    [{ regions: { 7: { flags: 3, size: 255 } } }, { code: "ERR_VIRTIO_PROTOCOL", message: /255 bytes/ }],
    [{ regions: { 7: { flags: 1, size: 256 } } }, { code: "ERR_VIRTIO_PROTOCOL", message: /flags 1/ }],
    [
      { regions: { 0: { flags: 0xf, size: 4096, sparse: [[4096, 1]] }, 7: { flags: 3, size: 256 } } },
      { code: "ERR_VIRTIO_PROTOCOL", message: /mappable/ },
    ],
    [{ iovaRanges: [[5n, 4n]] }, { code: "ERR_VIRTIO_PROTOCOL", message: /IOVA range 0x5 to 0x4/ }],
    [{ iovaRanges: undefined }, { code: "ERR_VIRTIO_UNSUPPORTED", message: /Linux 5\.4/ }],
    [{ iovaRanges: [] }, { code: "ERR_VIRTIO_UNSUPPORTED", message: /no address/ }],
    [{ iovaRanges: [[2n ** 46n, 2n ** 64n - 1n]] }, { code: "ERR_VIRTIO_UNSUPPORTED", message: /below 2\^46/ }],
  ];
  for (const [facts, expected] of cases) {
    const kernel = machine(t, facts);
    const before = openFds();
    assert.throws(() => openVfio("00:04.0", kernel.roots), expected);
    assert.equal(openFds(), before);
  }
});

test("an answer that grows each time, or is huge, is not asked for again and again", (t) => {
  const kernel = machine(t);
  for (const wanted of [(argsz: number) => argsz + 8, () => 2 ** 31]) {
    let asked = 0;
    kernel.intercept = (name, argument) => {
      if (name !== "IOMMU_GET_INFO" || typeof argument === "number") return undefined;
      const view = new DataView(argument.buffer, argument.byteOffset);
      new Uint32Array(argument.buffer, argument.byteOffset, 1)[0] = wanted(view.byteLength);
      return ++asked > 2 ? -errno.ELOOP : 0;
    };
    assert.throws(() => openVfio("00:04.0", kernel.roots), { code: "ERR_VIRTIO_PROTOCOL", message: /IOMMU_GET_INFO/ });
  }
});

test("addresses are whole pages of the IOMMU below 2^46", (t) => {
  const kernel = machine(t, {
    pageSizes: 0x1_0000n,
    iovaRanges: [
      [0x1_0001n, 0x4_fffen],
      [0x5_0000n, 0x5_fffen], // less than a page
      [0x8_0000n, 0x8_ffffn],
      [2n ** 40n, 2n ** 64n - 1n],
    ],
    dmaAvail: undefined,
  });
  const opened = open(kernel);
  assert.deepEqual(opened.iovaRanges, [
    { start: 0x2_0000, end: 0x3_ffff },
    { start: 0x8_0000, end: 0x8_ffff },
    { start: 2 ** 40, end: 2 ** 46 - 1 },
  ]);
  assert.equal(opened.maxRegions, 65_535);
  const tiny = machine(t, { pageSizes: 0n, iovaRanges: [[1n, 0x2fffn]], dmaAvail: 2 });
  const second = open(tiny);
  assert.deepEqual(second.iovaRanges, [{ start: 0x1000, end: 0x2fff }]);
  assert.equal(second.maxRegions, 2);
});

test("close disables, unmaps and releases in this order, once, and nothing works afterwards", (t) => {
  const kernel = machine(t);
  const opened = open(kernel);
  const [event, release] = [EventFd.create(), EventFd.create()];
  const regions = [2 ** 21, 2 ** 22].map((iova) => MemoryRegion.create({ name: "vfio-region", size: 1, iova }));
  opened.setMsix([event]);
  opened.setRelease(release);
  for (const region of regions) opened.mapDma(region);
  const registers = [opened.openRegisters(4, 0, 64), opened.openRegisters(0, 0, 64)];
  assert.equal(mappings("vfio-model").length, 1);
  kernel.log.length = 0;
  opened.close();
  assert.deepEqual(kernel.log, [
    ...["DEVICE_SET_IRQS", "DEVICE_SET_IRQS", "close device", "IOMMU_UNMAP_DMA", "IOMMU_UNMAP_DMA"],
    ...CLOSING.slice(1),
  ]);
  assert.deepEqual([kernel.dma.size, mappings("vfio-model").length], [0, 0]);
  const before = openFds();
  opened.close();
  const closed = { code: "ERR_VIRTIO_CLOSED" };
  for (const call of [
    () => opened.readConfig(0, 2),
    () => opened.writeConfig(4, 2, 0),
    () => opened.barSize(0),
    () => opened.openRegisters(4, 0, 4),
    () => opened.setMsix([]),
    () => opened.setIntx(event),
    () => opened.unmaskIntx(),
    () => opened.setRelease(undefined),
    () => opened.mapDma(regions[0]),
    () => opened.unmapDma(regions[0]),
    () => opened.reset(),
    ...registers.flatMap((part) => [() => part.read(0, 4), () => part.write(0, 4, 1)]),
  ]) {
    assert.throws(call, closed, String(call));
  }
  for (const part of registers) part.close();
  assert.equal(kernel.log.length, 8);
  assert.equal(openFds(), before);
  for (const region of regions) region.close();
  event.close();
  release.close();
});

test("a request that fails while closing is told when everything else was given back", (t) => {
  const before = openFds();
  for (const failing of ["DEVICE_SET_IRQS", "IOMMU_UNMAP_DMA", "GROUP_UNSET_CONTAINER"]) {
    const kernel = machine(t);
    const opened = open(kernel);
    const event = EventFd.create();
    const region = MemoryRegion.create({ name: "vfio-region", size: 1, iova: 2 ** 21 });
    opened.setMsix([event]);
    opened.mapDma(region);
    opened.openRegisters(4, 0, 64);
    kernel.intercept = (name) => (name === failing ? -errno.EIO : undefined);
    assert.throws(() => opened.close(), { code: "ERR_VIRTIO_SYSCALL", errno: errno.EIO, syscall: "ioctl" }, failing);
    opened.close();
    region.close();
    event.close();
    assert.deepEqual(mappings("vfio-model"), []);
    assert.equal(openFds(), before, failing);
  }
});

test("50 rounds of opening and closing leave nothing", (t) => {
  const kernel = machine(t);
  const before = openFds();
  for (let round = 0; round < 50; round++) {
    const opened = openVfio("00:04.0", kernel.roots);
    opened.openRegisters(4, 0x2000, 0x2000);
    opened.close();
    assert.equal(openFds(), before);
  }
});
