/**
 * VFIO in a running kernel: opening, registers, interrupts, memory and reset of real functions, who is refused, what
 * stays behind (nothing), also when each system call fails in turn.
 */

import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { chownSync, readFileSync } from "node:fs";
import { constants } from "node:os";
import process from "node:process";
import test from "node:test";
import { VirtioError } from "../../src/errors.js";
import { MemoryRegion } from "../../src/memory/index.js";
import { EventFd } from "../../src/sys/index.js";
import type { NativeBinding } from "../../src/sys/native.js";
import type { PciFunction, PciRegisters } from "../../src/transports/pci/function.js";
import { readPciFunction } from "../../src/transports/pci/sysfs.js";
import { openVfio } from "../../src/transports/pci/vfio.js";
import { layerNative } from "../support/native.js";
import { openFds, runChild } from "../sys/helpers.js";

const { errno } = constants;
const MIB = 2 ** 20;
const VFIO = new URL("../../src/transports/pci/vfio.js", import.meta.url).href;
const MEMORY = new URL("../../src/memory/index.js", import.meta.url).href;

/** The call that is to fail, counted from now; undefined: none. */
let failing: number | undefined;
/** The system calls since it was emptied, by name. */
const calls: string[] = [];

/** Let a call of the addon fail with EIO when its turn has come. */
function failable<A extends unknown[], R>(
  name: (args: A) => string,
  call: (...args: A) => R,
): (...args: A) => R | number {
  return (...args) => {
    calls.push(name(args));
    return failing !== undefined && calls.length - 1 === failing ? -errno.EIO : call(...args);
  };
}

/** Children have the addon itself. */
const CHILD_ENVIRONMENT = { ...process.env };

layerNative((addon) => ({
  ioctl: failable(
    ([, request]) => `ioctl 0x${request.toString(16)}`,
    (...args: Parameters<NativeBinding["ioctl"]>) => addon.ioctl(...args),
  ),
  mmap: failable(
    () => "mmap",
    (...args: Parameters<NativeBinding["mmap"]>) => addon.mmap(...args),
  ),
}));

/** The address of a function of the guest; its tests are skipped where it is not given. */
function guest(name: string): { address: string; skip: string | false } {
  const address = process.env[`VIRTIO_GUEST_PCI_${name}`];
  return { address: address ?? "", skip: address === undefined ? `there is no VIRTIO_GUEST_PCI_${name}` : false };
}

/** How many mappings of VFIO devices this process has. */
function deviceMappings(): number {
  return readFileSync("/proc/self/maps", "utf8")
    .split("\n")
    .filter((line) => line.includes("[vfio-device]")).length;
}

/** Offset of a capability with this id, and for virtio's own of this type, in config space. */
function findCapability(opened: PciFunction, id: number, type?: number): number {
  for (
    let at = opened.readConfig(0x34, 1), steps = 0;
    at !== 0 && steps < 48;
    at = opened.readConfig(at + 1, 1), steps++
  ) {
    if (opened.readConfig(at, 1) === id && (type === undefined || opened.readConfig(at + 3, 1) === type)) return at;
  }
  throw new Error(`no capability ${id}, type ${type}`);
}

/** Reach the common configuration structure (virtio 1.3, 4.1.4.3). */
function openCommon(opened: PciFunction): PciRegisters {
  opened.writeConfig(4, 2, opened.readConfig(4, 2) | 2); // memory decode
  const at = findCapability(opened, 9, 1);
  return opened.openRegisters(opened.readConfig(at + 4, 1), opened.readConfig(at + 8, 4), 56);
}

/** Everything once; what was acquired is given back however it ends. */
function everything(address: string): void {
  const region = MemoryRegion.create({ name: "guest-vfio", size: 2 * MIB, iova: 4 * MIB });
  const events = [1, 2, 3].map(() => EventFd.create());
  try {
    const opened = openVfio(address);
    try {
      openCommon(opened).read(0x12, 2);
      opened.mapDma(region);
      opened.setRelease(events[0]);
      if (opened.msixVectors > 0) opened.setMsix(events.slice(0, Math.min(3, opened.msixVectors)));
      if (opened.msixVectors > 1) opened.setMsix(events.slice(0, 1));
      opened.setMsix([]);
      if (opened.hasIntx) {
        opened.setIntx(events[0]);
        opened.unmaskIntx();
      }
      if (opened.canReset) opened.reset();
      opened.unmapDma(region);
      opened.mapDma(region); // unmapped by close
    } finally {
      opened.close();
    }
  } finally {
    region.close();
    for (const event of events) event.close();
  }
}

for (const name of ["SPLIT", "PACKED"]) {
  const { address, skip } = guest(name);

  test(`${name}: config space, registers, interrupts, memory, reset`, { skip }, (t) => {
    const before = openFds();
    const opened = openVfio(address.toUpperCase());
    t.after(() => opened.close());
    assert.equal(opened.address, address);
    assert.equal(opened.readConfig(0, 2), 0x1af4);
    assert.equal(opened.readConfig(0, 4), 0x10421af4);
    assert.equal(opened.readConfig(1, 1), 0x1a);
    assert.deepEqual([opened.configSize, opened.msixVectors, opened.canReset], [4096, 3, true]);
    assert.equal(opened.barSize(4), 0x4000);
    assert.equal(opened.barSize(0), 0);
    assert.ok(opened.maxRegions > 1000 && opened.iovaRanges.some(({ start, end }) => start < 4 * MIB && end > 2 ** 31));

    const common = openCommon(opened);
    assert.equal(deviceMappings(), 1);
    assert.equal(common.read(0x12, 2), 2); // num_queues
    common.write(0x14, 1, 0);
    assert.equal(common.read(0x14, 1), 0);
    common.write(0x14, 1, 1);
    common.write(0x14, 1, 3);
    assert.equal(common.read(0x14, 1), 3); // device_status
    common.write(0, 4, 1); // device_feature_select
    const packed = (common.read(4, 4) & 4) !== 0;
    assert.equal(packed, name === "PACKED");

    // The message control of MSI-X shows what VFIO did.
    const msix = findCapability(opened, 0x11);
    const enabled = () => (opened.readConfig(msix + 2, 2) & 0x8000) !== 0;
    const events = [1, 2, 3].map(() => EventFd.create());
    assert.equal(enabled(), false);
    opened.setMsix(events);
    assert.equal(enabled(), true);
    opened.setMsix(events.slice(1));
    assert.equal(enabled(), true);
    assert.throws(() => opened.setIntx(events[0]), { errno: errno.EINVAL, syscall: "ioctl", message: /exclude/ });
    opened.setMsix([]);
    assert.equal(enabled(), false);
    opened.setRelease(events[0]);

    const regions = [4, 8].map((at) => MemoryRegion.create({ name: "guest-vfio", size: 2 * MIB, iova: at * MIB }));
    for (const region of regions) opened.mapDma(region);
    assert.throws(() => opened.mapDma(regions[0]), { errno: errno.EEXIST, syscall: "ioctl" });
    const outside = MemoryRegion.create({ name: "guest-vfio", size: 2 * MIB, iova: 0xfee00000 });
    assert.throws(() => opened.mapDma(outside), { errno: errno.EINVAL, syscall: "ioctl" });
    outside.close();
    opened.unmapDma(regions[0]);
    opened.mapDma(regions[0]);

    opened.reset();
    assert.equal(common.read(0x14, 1), 0); // as if it had been switched off and on
    assert.equal(opened.readConfig(4, 2) & 2, 2); // and memory decode is as it was
    opened.close();
    for (const region of regions) region.close();
    for (const event of events) event.close();
    assert.deepEqual([openFds(), deviceMappings()], [before, 0]);
  });
}

const split = guest("SPLIT");

test("a second opener is refused, and the first goes on; when it has closed, the next can open", {
  skip: split.skip,
}, (t) => {
  const before = openFds();
  const opened = openVfio(split.address);
  t.after(() => opened.close());
  const during = openFds();
  assert.throws(() => openVfio(split.address), { code: "ERR_VIRTIO_BUSY", errno: errno.EBUSY, syscall: "open" });
  assert.equal(openFds(), during);
  const open = `import { openVfio } from ${JSON.stringify(VFIO)};
    try { openVfio(${JSON.stringify(split.address)}).close(); console.log("opened"); }
    catch (error) { console.log([error.code, error.errno].join(" ")); }`;
  const refused = runChild(open, { env: CHILD_ENVIRONMENT });
  assert.equal(refused.stdout.trim(), `ERR_VIRTIO_BUSY ${errno.EBUSY}`, refused.stderr);
  assert.equal(opened.readConfig(0, 2), 0x1af4);
  opened.close();
  const next = runChild(open, { env: CHILD_ENVIRONMENT });
  assert.equal(next.stdout.trim(), "opened", next.stderr);
  assert.equal(openFds(), before);
});

test("50 rounds leave nothing open or mapped", { skip: split.skip }, () => {
  everything(split.address);
  const before = openFds();
  for (let round = 0; round < 50; round++) {
    const opened = openVfio(split.address);
    openCommon(opened).read(0x12, 2);
    opened.close();
    assert.deepEqual([openFds(), deviceMappings()], [before, 0], `round ${round}`);
  }
});

test("each system call that fails is told, and leaves nothing open or mapped", { skip: split.skip }, () => {
  everything(split.address);
  const before = openFds();
  calls.length = 0;
  everything(split.address);
  const steps = [...calls];
  // The IOMMU and a BAR each answer a second time, with their capabilities: open, use and close make some 30 calls.
  assert.ok(steps.length > 25 && steps.includes("mmap"), steps.join());
  for (const [at, step] of steps.entries()) {
    calls.length = 0;
    failing = at;
    let told: unknown;
    try {
      everything(split.address);
    } catch (error) {
      told = error;
    }
    failing = undefined;
    assert.ok(told instanceof VirtioError, `${at} ${step}: ${String(told)}`);
    assert.deepEqual([told.errno, told.syscall], [errno.EIO, step.split(" ")[0]], `${at} ${step}`);
    assert.deepEqual([openFds(), deviceMappings()], [before, 0], `${at} ${step}`);
  }
  everything(split.address);
});

/** Opens the function and maps 2 MiB for it; prints how that ended. */
const MAPPING = `import { openVfio } from ${JSON.stringify(VFIO)};
  import { MemoryRegion } from ${JSON.stringify(MEMORY)};
  const region = MemoryRegion.create({ name: "limit", size: 1, iova: 2 ** 21 });
  try {
    const opened = openVfio(${JSON.stringify(split.address)});
    opened.mapDma(region);
    opened.close();
    console.log("mapped");
  } catch (error) { console.log([error.code, error.errno, error.message].join(" ")); }`;

/** Run {@link MAPPING} with other rights. */
function mapAs(rights: readonly string[], shell = ""): string {
  const script = `${shell} exec "$0" --input-type=module -e "$1"`;
  const child = spawnSync("setpriv", [...rights, "--", "sh", "-c", script, process.execPath, MAPPING], {
    encoding: "utf8",
    env: CHILD_ENVIRONMENT,
    timeout: 60_000,
  });
  return `${child.stdout}${child.stderr}`.trim();
}

test("too small a limit of locked memory is said", { skip: split.skip }, () => {
  // The kernel counts only for those who may not lock what they like.
  const limited = ["--inh-caps", "-ipc_lock", "--bounding-set", "-ipc_lock"];
  assert.match(
    mapAs(limited, "ulimit -l 1024;"),
    new RegExp(`^ERR_VIRTIO_MEMORY ${errno.ENOMEM} letting .* may lock 1048576 bytes; raise .ulimit -l`),
  );
  assert.equal(mapAs(limited, "ulimit -l 4096;"), "mapped");
});

test("a user needs the group's node, and nothing else", { skip: split.skip }, () => {
  const node = `/dev/vfio/${readPciFunction(split.address).group?.number}`;
  const user = ["--reuid", "65534", "--regid", "65534", "--clear-groups"];
  assert.match(mapAs(user), new RegExp(`^ERR_VIRTIO_PERMISSION ${errno.EACCES} opening ${node}: .*chown USER`));
  chownSync(node, 65_534, 65_534);
  try {
    assert.equal(mapAs(user), "mapped");
  } finally {
    chownSync(node, 0, 0);
  }
});

const unbound = guest("UNBOUND");
test("a function that the kernel's driver has is refused", { skip: unbound.skip }, () => {
  assert.throws(() => openVfio(unbound.address), {
    code: "ERR_VIRTIO_CONNECT",
    message: new RegExp(`the driver virtio-pci, .* virtio pci bind ${unbound.address}`),
  });
});

const shared = guest("SHARED");
test("a group of which the kernel uses another function is refused, and that function is named", {
  skip: shared.skip,
}, () => {
  const other = shared.address.replace(/0$/, "1");
  const before = openFds();
  assert.throws(() => openVfio(shared.address), {
    code: "ERR_VIRTIO_CONNECT",
    message: new RegExp(`not viable: the kernel uses ${other} \\(driver virtio-pci\\)`),
  });
  assert.equal(openFds(), before);
});

const intx = guest("INTX");
test("a function without MSI-X has INTx, and everything else works", { skip: intx.skip }, () => {
  const before = openFds();
  const opened = openVfio(intx.address);
  assert.deepEqual([opened.msixVectors, opened.hasIntx], [0, true]);
  opened.close();
  everything(intx.address);
  assert.deepEqual([openFds(), deviceMappings()], [before, 0]);
});

test("there is no function where there is none", () => {
  assert.throws(() => openVfio("ffff:ff:1f.7"), { code: "ERR_VIRTIO_CONNECT", errno: errno.ENOENT });
});
