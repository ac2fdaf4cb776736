/** Tests of `virtio pci` and `virtio doctor` on functions of a real kernel: bound, unbound, refused, told. */

import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { closeSync, constants, mkdtempSync, openSync, readdirSync, readlinkSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { afterEach, test } from "node:test";
import type { ListedFunction } from "../../src/cli/pci-list.js";
import { virtio } from "../cli/command.js";

/** Functions of the guest: a disk of the kernel, a disk of VFIO, a virtio device of another class. */
const UNBOUND = process.env["VIRTIO_GUEST_PCI_UNBOUND"] ?? "";
const SPLIT = process.env["VIRTIO_GUEST_PCI_SPLIT"] ?? "";
const OTHER = process.env["VIRTIO_GUEST_PCI_OTHER"] ?? "";
const LEGACY = process.env["VIRTIO_GUEST_PCI_LEGACY"] ?? "";
const SHARED = process.env["VIRTIO_GUEST_PCI_SHARED"] ?? "";

afterEach(async () => {
  if (driverOf(UNBOUND) !== "virtio-pci") await virtio(["pci", "unbind", UNBOUND]);
});

async function list(): Promise<ListedFunction[]> {
  const { stdout, code } = await virtio(["pci", "list", "--json"]);
  assert.equal(code, 0);
  const { functions } = JSON.parse(stdout.toString()) as { functions: ListedFunction[] };
  return functions;
}

async function listed(address: string): Promise<ListedFunction> {
  return pick(await list(), address);
}

function pick(functions: readonly ListedFunction[], address: string): ListedFunction {
  const found = functions.find((each) => each.address === address);
  assert.ok(found !== undefined, `${address} is not among ${functions.map((each) => each.address).join(", ")}`);
  return found;
}

/** The disk that the kernel has made of the function. */
function diskOf(address: string): string {
  const folder = `/sys/bus/pci/devices/${address}`;
  const [device = ""] = readdirSync(folder).filter((name) => /^virtio\d+$/.test(name));
  const [disk = ""] = readdirSync(join(folder, device, "block"));
  return `/dev/${disk}`;
}

function driverOf(address: string): string {
  return basename(readlinkSync(`/sys/bus/pci/devices/${address}/driver`));
}

test("pci list shows a disk of the kernel, one of VFIO, and another class", async () => {
  const functions = await list();
  const unbound = pick(functions, UNBOUND);
  assert.deepEqual(
    [unbound.type, unbound.driver, unbound.ready, unbound.inUse, unbound.advice],
    ["blk", "virtio-pci", false, [], `virtio pci bind ${UNBOUND}`],
  );
  assert.equal(typeof unbound.group, "number");
  assert.match(unbound.blockDevices[0] ?? "", /^vd[a-z]$/);

  const split = pick(functions, SPLIT);
  assert.deepEqual([split.type, split.driver, split.groupViable, split.inUse], ["blk", "vfio-pci", true, []]);
  assert.deepEqual([split.ready, split.advice, split.blockDevices], [true, `virtio info pci:${SPLIT}`, []]);

  const other = pick(functions, OTHER);
  assert.notEqual(other.type, "blk");
  assert.equal(other.ready, false);

  const legacy = pick(functions, LEGACY);
  assert.deepEqual([legacy.type, legacy.transitional, legacy.legacyOnly, legacy.ready], ["blk", true, true, false]);
  assert.equal(split.legacyOnly, false);

  const shared = pick(functions, SHARED);
  assert.deepEqual([shared.groupViable, shared.ready], [false, false]);
  assert.match(shared.advice, /^group \d+ is not viable: the kernel uses /);
});

test("pci bind and unbind a disk for real; each a second time changes nothing", async () => {
  const bound = await virtio(["pci", "bind", UNBOUND]);
  assert.equal(bound.code, 0, bound.stderr);
  assert.match(bound.stderr, /had virtio-pci, has vfio-pci now\ngroup \d+ is viable, by \/dev\/vfio\/\d+; try: /);
  assert.equal(driverOf(UNBOUND), "vfio-pci");
  assert.equal((await listed(UNBOUND)).ready, true);
  const again = await virtio(["pci", "bind", UNBOUND]);
  assert.equal(again.code, 0);
  assert.match(again.stderr, /has vfio-pci already, nothing to do\n/);

  const back = await virtio(["pci", "unbind", UNBOUND]);
  assert.equal(back.code, 0, back.stderr);
  assert.match(back.stderr, /had vfio-pci, has virtio-pci now\n$/);
  assert.deepEqual([driverOf(UNBOUND), (await listed(UNBOUND)).driverOverride], ["virtio-pci", null]);
  assert.match(diskOf(UNBOUND), /^\/dev\/vd[a-z]$/);
  assert.match((await virtio(["pci", "unbind", UNBOUND])).stderr, /has virtio-pci already, nothing to do\n/);
});

test("the commands of pci bind --dry-run, pasted into a shell, do what bind does", async () => {
  const { code, stdout } = await virtio(["pci", "bind", UNBOUND, "--dry-run"]);
  assert.equal(code, 0);
  assert.equal(driverOf(UNBOUND), "virtio-pci");
  const shell = spawnSync("sh", ["-e"], { input: stdout, encoding: "utf8" });
  assert.deepEqual([shell.status, shell.stderr], [0, ""]);
  assert.equal(driverOf(UNBOUND), "vfio-pci");
});

test("a group that a process has open is not taken from it", async () => {
  const { group } = await listed(SPLIT);
  const fd = openSync(`/dev/vfio/${group}`, constants.O_RDWR);
  try {
    const { code, stderr } = await virtio(["pci", "unbind", SPLIT]);
    assert.equal(code, 4);
    assert.match(
      stderr,
      new RegExp(`^virtio: ERR_VIRTIO_BUSY: .*/dev/vfio/${group} is open in process ${process.pid} `),
    );
  } finally {
    closeSync(fd);
  }
  assert.equal(driverOf(SPLIT), "vfio-pci");
});

test("a disk that a process has for itself is refused", async () => {
  const disk = diskOf(UNBOUND);
  const fd = openSync(disk, constants.O_RDONLY | constants.O_EXCL);
  try {
    const { code, stderr } = await virtio(["pci", "bind", UNBOUND]);
    assert.equal(code, 4);
    assert.match(stderr, new RegExp(`^virtio: ERR_VIRTIO_BUSY: .*${disk} is open in process ${process.pid} `));
  } finally {
    closeSync(fd);
  }
  assert.equal(driverOf(UNBOUND), "virtio-pci");
});

test("a mounted disk is refused, by its mount point", async () => {
  const disk = diskOf(UNBOUND);
  const folder = mkdtempSync(join(tmpdir(), "mount point-"));
  run("mkfs.minix", [disk]);
  run("mount", ["-t", "minix", disk, folder]);
  try {
    await refused(disk, `${basename(disk)} is mounted on ${folder}`);
  } finally {
    run("umount", [folder]);
    rmSync(folder, { recursive: true });
  }
  const { code, stderr } = await virtio(["pci", "bind", UNBOUND]);
  assert.equal(code, 0, stderr);
});

test("swap space is refused", async () => {
  const disk = diskOf(UNBOUND);
  run("mkswap", [disk]);
  run("swapon", [disk]);
  try {
    await refused(disk, `${basename(disk)} is swap space`);
  } finally {
    run("swapoff", [disk]);
  }
});

/** That UNBOUND is not taken, for this reason, and shown with it. */
async function refused(disk: string, use: string): Promise<void> {
  assert.deepEqual((await listed(UNBOUND)).inUse, [use]);
  const { code, stderr } = await virtio(["pci", "bind", UNBOUND]);
  assert.equal(code, 4);
  assert.ok(stderr.startsWith(`virtio: ERR_VIRTIO_BUSY: ${UNBOUND} (virtio blk) is in use: ${use} (`), stderr);
  assert.equal(diskOf(UNBOUND), disk);
}

test("doctor says that PCI and vhost-vdpa work here, and which device is where", async () => {
  const { code, stdout } = await virtio(["doctor", "--json"]);
  assert.equal(code, 0);
  const { transports, findings } = JSON.parse(stdout.toString()) as {
    transports: Record<string, boolean>;
    findings: { section: string; name: string; status: string; message: string }[];
  };
  assert.deepEqual(transports, { "vhost-user": true, "vhost-vdpa": true, pci: true }, stdout.toString());
  const [device] = findings.filter(({ section, name }) => section === "vhost-vdpa" && name === "device");
  assert.match(device?.message ?? "", /^\S+ \((?:block|type not known)\), \/dev\/vhost-vdpa-0, can be opened\.$/);
  const bound = findings.filter(({ section, name }) => section === "pci" && name === "bound");
  assert.ok(
    bound.some(({ message, status }) => status === "ok" && message.startsWith(`${SPLIT} (virtio blk), group `)),
  );
});

function run(program: string, words: readonly string[]): void {
  const { status, stderr, error } = spawnSync(program, words, { encoding: "utf8" });
  assert.equal(status, 0, `${program} ${words.join(" ")}: ${error?.message ?? stderr}`);
}
