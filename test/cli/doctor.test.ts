/** Tests of `virtio doctor`: what it says about made-up machines, and what the real command says about this one. */

import assert from "node:assert/strict";
import { rmSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, test } from "node:test";
import { type Finding, workingTransports } from "../../src/cli/doctor-findings.js";
import { describe as describeFindings } from "../../src/cli/doctor.js";
import { pciFindings } from "../../src/cli/doctor-pci.js";
import { systemFindings, vhostUserFindings } from "../../src/cli/doctor-system.js";
import { vdpaFindings } from "../../src/cli/doctor-vdpa.js";
import { parseVdpaTypes } from "../../src/cli/machine.js";
import { FakeMachine } from "../support/fake-machine.js";
import { requirePeer } from "../support/peers.js";
import { finished, onTerminal, start, virtio } from "./command.js";

const DISK = "0000:00:04.0";

let machine: FakeMachine;
beforeEach(() => {
  machine = new FakeMachine();
  machine.file("proc/sys/kernel/osrelease", "6.12.0-fake\n");
  machine.file(
    "modules/6.12.0-fake/modules.dep",
    "kernel/drivers/vfio/pci/vfio-pci.ko.xz: a.ko\nkernel/vhost_vdpa.ko:\n",
  );
  limits("8388608", "8388608");
});
afterEach(() => machine.close());

function limits(soft: string, hard: string): void {
  machine.file("proc/self/limits", `Limit  Soft  Hard  Units\nMax locked memory  ${soft}  ${hard}  bytes\n`);
}

/** A finding as `status: message | fix`. */
function said(findings: readonly Finding[], name: string): string | undefined {
  const found = findings.find((each) => each.name === name);
  return found && `${found.status}: ${found.message}${found.fix === null ? "" : ` | ${found.fix}`}`;
}

describe("pci", () => {
  test("a machine with nothing", () => {
    const findings = pciFindings(machine);
    assert.match(said(findings, "functions") ?? "", /^missing: There is no virtio-blk function on PCI\. \| /);
    assert.match(
      said(findings, "IOMMU") ?? "",
      /^missing: There is none, or it is off\. \| add iommu\.passthrough=0 to/,
    );
    assert.equal(said(findings, "vfio-pci"), "missing: The driver is not loaded. | modprobe vfio-pci");
    assert.equal(said(findings, "container"), `missing: There is no ${machine.dev}/vfio/vfio. | modprobe vfio-pci`);
    assert.equal(said(findings, "bound"), undefined);
    assert.equal(said(findings, "locked memory"), "not needed: At most 8 MiB, and no device here needs more.");
    assert.equal(workingTransports(findings).pci, false);
  });

  test("a machine with everything", () => {
    machine.addFunction({ address: DISK, driver: "vfio-pci", group: 4 });
    machine.file("dev/vfio/vfio", "");
    machine.file("dev/vfio/4", "");
    machine.file("sys/module/vfio_iommu_type1/version", "1\n");
    limits("unlimited", "unlimited");
    const findings = pciFindings(machine);
    assert.deepEqual(
      findings.map(({ status, name }) => [status, name]),
      ["functions", "IOMMU", "vfio-pci", "container", "bound", "locked memory"].map((name) => ["ok", name]),
    );
    assert.equal(said(findings, "bound"), `ok: ${DISK} (virtio blk), group 4, can be opened.`);
    assert.equal(workingTransports(findings).pci, true);
    machine.closed.set("vfio/4", "EBUSY");
    machine.addProcess(1, "node", [`${machine.dev}/vfio/4`]);
    assert.match(
      said(pciFindings(machine), "bound") ?? "",
      /^ok: .* is in use: .*vfio\/4 is open in process 1 \(node\)\.$/,
    );
  });

  test("without IOMMU: by kernel command line, in a virtual machine, on Intel", () => {
    machine.file("proc/cpuinfo", "vendor_id\t: GenuineIntel\nflags\t\t: fpu vme\n");
    assert.match(
      said(pciFindings(machine), "IOMMU") ?? "",
      /\| add intel_iommu=on to the kernel's command line, and switch/,
    );
    machine.file("proc/cmdline", "root=/dev/vda intel_iommu=on quiet\n");
    assert.match(
      said(pciFindings(machine), "IOMMU") ?? "",
      /\| switch the IOMMU \(VT-d, AMD-Vi, SMMU\) on in the firmware$/,
    );
    machine.file("proc/cpuinfo", "vendor_id\t: GenuineIntel\nflags\t\t: fpu vme hypervisor lahf_lm\n");
    assert.match(said(pciFindings(machine), "IOMMU") ?? "", /this is a virtual machine.*-device intel-iommu/);
    machine.file("proc/cmdline", "intel_iommu=off\n");
    assert.equal(
      said(pciFindings(machine), "IOMMU"),
      "missing: It is switched off by intel_iommu=off on the kernel's command line. | take intel_iommu=off from it",
    );
  });

  test("a kernel without the module is not told to load it", () => {
    machine.file("modules/6.12.0-fake/modules.dep", "kernel/drivers/vfio/pci/vfio-pci-core.ko:\n");
    assert.match(
      said(pciFindings(machine), "vfio-pci") ?? "",
      /\| boot a kernel with CONFIG_VFIO_PCI: \S+6\.12\.0-fake has no module/,
    );
  });

  test("a container without the IOMMU driver behind it", () => {
    machine.file("dev/vfio/vfio", "");
    assert.match(said(pciFindings(machine), "container") ?? "", /^missing: .*vfio_iommu_type1 is not loaded\. \| /);
  });

  test("functions that VFIO does not have: one that is idle is proposed, of those in use none", () => {
    machine.addFunction({ address: DISK, group: 4 });
    machine.addDisk(DISK, "vda");
    machine.file("proc/swaps", "/dev/vda partition 1 0 -2\n");
    assert.equal(
      said(pciFindings(machine), "bound"),
      "missing: VFIO has none of the functions, and all are in use. | virtio pci list",
    );
    machine.addFunction({ address: "0000:00:05.0", group: 5 });
    assert.equal(
      said(pciFindings(machine), "bound"),
      "missing: VFIO has none of the functions. | virtio pci bind 0000:00:05.0",
    );
  });

  test("a group that is not viable, and one without its node", () => {
    machine.addFunction({ address: DISK, driver: "vfio-pci", group: 4 });
    assert.match(
      said(pciFindings(machine), "bound") ?? "",
      /^missing: .*this user may not use .*vfio\/4\. \| sudo chown \$USER /,
    );
    machine.addFunction({ address: "0000:00:05.0", device: 0x1041, group: 4 });
    assert.match(
      said(pciFindings(machine), "bound") ?? "",
      /group 4 is not viable: the kernel uses 0000:00:05\.0 \(virtio-pci\)/,
    );
    machine.addFunction({ address: "0000:00:06.0", driver: "vfio-pci", group: 6 });
    machine.file("dev/vfio/6", "");
    assert.deepEqual(
      pciFindings(machine).flatMap(({ name, status }) => (name === "bound" ? [status] : [])),
      ["not needed", "ok"],
    );
  });

  test("locked memory: too little, allowed to be raised, or uncounted", () => {
    machine.addFunction({ address: DISK, group: 4 });
    assert.equal(
      said(pciFindings(machine), "locked memory"),
      "missing: At most 8 MiB; a device takes 128 MiB and more. | sudo prlimit --pid $$ --memlock=unlimited:unlimited",
    );
    limits("65536", "unlimited");
    assert.match(
      said(pciFindings(machine), "locked memory") ?? "",
      /^missing: At most 64 KiB; .* \| ulimit -l 131072$/,
    );
    machine.file("proc/self/status", "Name:\tnode\nCapEff:\t0000000000004000\n");
    assert.equal(said(pciFindings(machine), "locked memory"), "ok: Without limit: CAP_IPC_LOCK.");
    machine.file("proc/self/status", "Name:\tnode\nCapEff:\t000001ffffffbfff\n");
    assert.match(said(pciFindings(machine), "locked memory") ?? "", /^missing/);
  });
});

describe("vhost-vdpa", () => {
  const FOLDER = "sys/devices/virtual/vduse/vduse0/vduse0";

  function addVduse(driver: string | undefined): void {
    machine.file(`${FOLDER}/driver_override`, "(null)\n");
    machine.link("sys/bus/vdpa/devices/vduse0", FOLDER);
    machine.file("sys/bus/vdpa/drivers/vhost_vdpa/bind", "");
    if (driver === undefined) return;
    machine.file(`sys/bus/vdpa/drivers/${driver}/unbind`, "");
    machine.link(`${FOLDER}/driver`, `sys/bus/vdpa/drivers/${driver}`);
  }

  test("a machine with nothing", () => {
    const findings = vdpaFindings(machine);
    assert.equal(said(findings, "vhost-vdpa"), "missing: The driver is not loaded. | modprobe vhost-vdpa");
    assert.match(said(findings, "device") ?? "", /^missing: There is no vDPA device\. \| vdpa dev add name /);
    assert.match(said(findings, "VDUSE") ?? "", /^not needed: /);
    assert.equal(said(findings, "locked memory"), "not needed: At most 8 MiB, and no device here needs more.");
    assert.equal(workingTransports(findings)["vhost-vdpa"], false);
  });

  test("a device of VDUSE: its type, its node, who has it; it pins nothing", () => {
    addVduse("vhost_vdpa");
    machine.file(`${FOLDER}/vhost-vdpa-0/dev`, "510:0\n");
    machine.file("dev/vhost-vdpa-0", "");
    machine.file("dev/vduse/control", "");
    machine.types.set("vduse0", "block");
    const findings = vdpaFindings(machine);
    assert.equal(said(findings, "device"), `ok: vduse0 (block), ${machine.dev}/vhost-vdpa-0, can be opened.`);
    assert.match(said(findings, "VDUSE") ?? "", /^ok: /);
    assert.match(said(findings, "locked memory") ?? "", /^not needed: /);
    assert.equal(workingTransports(findings)["vhost-vdpa"], true);
    machine.addProcess(1, "node", [`${machine.dev}/vhost-vdpa-0`]);
    assert.match(said(vdpaFindings(machine), "device") ?? "", /^ok: .*, is in use by process 1 \(node\)\.$/);
  });

  test("a device that has another driver, none, or no node", () => {
    addVduse("virtio_vdpa");
    const drivers = `${machine.sys}/bus/vdpa/drivers`;
    assert.equal(
      said(vdpaFindings(machine), "device"),
      "missing: vduse0 (type not known) has the driver virtio_vdpa, not vhost_vdpa. | " +
        `echo vduse0 > ${drivers}/virtio_vdpa/unbind; echo vduse0 > ${drivers}/vhost_vdpa/bind`,
    );
    rmSync(join(machine.sys, "devices/virtual/vduse/vduse0/vduse0/driver"));
    assert.match(
      said(vdpaFindings(machine), "device") ?? "",
      /has no driver, not vhost_vdpa\. \| echo vduse0 > \S+bind$/,
    );
    machine.link(`${FOLDER}/driver`, "sys/bus/vdpa/drivers/vhost_vdpa");
    machine.file(`${FOLDER}/vhost-vdpa-3/dev`, "510:3\n");
    assert.match(said(vdpaFindings(machine), "device") ?? "", /has no node \S+\/vhost-vdpa-3\. \| /);
  });

  test("a device of hardware pins memory", () => {
    machine.file("sys/devices/pci0000:00/0000:00:04.0/vdpa0/driver_override", "(null)\n");
    machine.link("sys/bus/vdpa/devices/vdpa0", "sys/devices/pci0000:00/0000:00:04.0/vdpa0");
    assert.match(said(vdpaFindings(machine), "locked memory") ?? "", /^missing: At most 8 MiB; /);
  });

  test("the types that the program vdpa prints", () => {
    const printed = '{"dev":{"vduse0":{"type":"block","mgmtdev":"vduse","vendor_id":0},"vdpa1":{"type":"network"}}}';
    assert.deepEqual(
      [...parseVdpaTypes(printed)],
      [
        ["vduse0", "block"],
        ["vdpa1", "network"],
      ],
    );
    assert.deepEqual([...parseVdpaTypes("")], []);
  });
});

describe("system", () => {
  test("huge pages of all sizes count", () => {
    assert.match(said(systemFindings(machine), "huge pages") ?? "", /^not needed: .* \| sysctl vm\.nr_hugepages=64$/);
    machine.file("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "3\n");
    machine.file("sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages", "1\n");
    assert.equal(said(systemFindings(machine), "huge pages"), "ok: 1.0 GiB of huge pages are free.");
  });

  test("vhost-user works here, with everything that it needs", async () => {
    const findings = await vhostUserFindings();
    assert.deepEqual(
      findings.map(({ status, name }) => [status, name]),
      ["memory files", "events", "sockets", "a disk"].map((name) => ["ok", name]),
    );
  });
});

describe("the command", () => {
  test("doctor: every transport with its findings, exit code 0 as vhost-user works", async () => {
    const { code, stdout, stderr } = await virtio(["doctor"]);
    const lines = stdout.toString().split("\n");
    assert.deepEqual([code, stderr], [0, ""]);
    assert.deepEqual(
      lines.filter((line) => /^\S/.test(line)).map((line) => line.replace(/: .*/, "")),
      ["system", "vhost-user", "vhost-vdpa", "pci"],
    );
    assert.ok(lines.includes("vhost-user: works"));
    assert.ok(!stdout.includes("\x1b"));
  });

  test("doctor --json", async () => {
    const { code, stdout } = await virtio(["doctor", "--json"]);
    assert.equal(code, 0);
    const { transports, findings, ...rest } = JSON.parse(stdout.toString()) as {
      transports: Record<string, boolean>;
      findings: Finding[];
    };
    assert.deepEqual(rest, {});
    assert.deepEqual(Object.keys(transports), ["vhost-user", "vhost-vdpa", "pci"]);
    assert.equal(transports["vhost-user"], true);
    for (const finding of findings) {
      assert.deepEqual(Object.keys(finding), ["section", "name", "status", "message", "fix"]);
      assert.match(finding.section, /^(?:system|vhost-user|vhost-vdpa|pci)$/);
      assert.match(finding.status, /^(?:ok|missing|not needed)$/);
      assert.match(finding.message, /^[A-Z/0-9].*\.$/, finding.message);
      assert.ok(finding.status === "ok" ? finding.fix === null : finding.fix !== "");
    }
  });

  test("without the addon: exit code 1, and what would build it", async () => {
    const child = start(["doctor"], { VIRTIO_NATIVE_PATH: "/nowhere/addon.node" });
    child.stdin.end();
    const { code, stdout } = await finished(child);
    assert.equal(code, 1);
    assert.match(
      stdout.toString(),
      /missing +addon +The native part is missing \(\/nowhere\/addon\.node\).*\n +fix: npm rebuild/,
    );
    assert.match(stdout.toString(), /^vhost-user: does not work yet$/m);
  });

  test("where no socket can be made: exit code 1, and what would help", async () => {
    const child = start(["doctor"], { TMPDIR: "/nowhere" });
    child.stdin.end();
    const { code, stdout } = await finished(child);
    assert.equal(code, 1);
    assert.match(stdout.toString(), /missing +sockets +.*ENOENT.*\n +fix: export TMPDIR=/);
  });

  test("a word too many: usage error", async () => {
    const { code, stderr } = await virtio(["doctor", "who"]);
    assert.equal(code, 2);
    assert.match(stderr, /^virtio: ERR_VIRTIO_ARGUMENT: too many arguments for 'doctor'.*; try: virtio help doctor\n$/);
  });

  const skip = requirePeer("script");
  test("a terminal gets colours, unless NO_COLOR is set", { skip }, async () => {
    const terminal = { TERM: "xterm", CI: undefined };
    assert.ok((await onTerminal(["doctor"], { ...terminal, NO_COLOR: undefined })).stdout.includes("\x1b[32mok"));
    assert.ok(!(await onTerminal(["doctor"], { ...terminal, NO_COLOR: "1" })).stdout.includes("\x1b["));
  });
});

test("what the system lacks no transport can do without; what one lacks is its own matter", () => {
  const missing = (section: Finding["section"]): Finding => ({
    ...{ section, name: "x", status: "missing", message: "Y.", fix: null },
  });
  assert.deepEqual(workingTransports([missing("system")]), { "vhost-user": false, "vhost-vdpa": false, pci: false });
  assert.deepEqual(workingTransports([missing("pci")]), { "vhost-user": true, "vhost-vdpa": true, pci: false });
});

test("only what is missing has its fix below it", () => {
  const base = { section: "pci", name: "x", message: "Y." } as const;
  const findings: Finding[] = [
    { ...base, status: "missing", fix: "do it" },
    { ...base, status: "missing", fix: null },
    { ...base, status: "not needed", fix: "leave it" },
    { ...base, status: "ok", fix: null },
  ];
  assert.deepEqual(describeFindings(findings, { "vhost-user": true, "vhost-vdpa": true, pci: false }), [
    ...["system", "vhost-user: works", "vhost-vdpa: works", "pci: does not work yet"],
    ...[
      "  missing     x  Y.",
      "              fix: do it",
      "  missing     x  Y.",
      "  not needed  x  Y.",
      "  ok          x  Y.",
    ],
  ]);
});
