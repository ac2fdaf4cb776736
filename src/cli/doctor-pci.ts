/** What `virtio doctor` finds about PCI functions by VFIO; nothing is opened but a group that VFIO has. */

import { join } from "node:path";
import { VIRTIO_ID_BLOCK } from "../protocol/blk.js";
import { entries, readText } from "../sys/kernel-files.js";
import { isVfioDriver, listVirtioFunctions, type VirtioPciFacts } from "../transports/pci/sysfs.js";
import { type Finding, findingsOf, oneIsEnough } from "./doctor-findings.js";
import { formatBytes } from "./format.js";
import { type Machine, mayUse, moduleFix, procLines } from "./machine.js";
import { nameOf } from "./pci-bind.js";
import { groupProblem } from "./pci-list.js";
import { usesOf } from "./pci-use.js";

/** What pinned memory comes to: 64 MiB of buffers to begin with, rings, and as much again to grow. */
const MEMLOCK_BYTES = 128 * 2 ** 20;
/** CAP_IPC_LOCK of linux/capability.h: VFIO then does not count. */
const CAP_IPC_LOCK = 14n;

/** Everything on the way to a PCI function. */
export function pciFindings(machine: Machine): Finding[] {
  const functions = listVirtioFunctions(machine.sys).filter(
    ({ virtio, isLegacyOnly }) => virtio.type === VIRTIO_ID_BLOCK && !isLegacyOnly,
  );
  return [
    foundFunctions(functions),
    iommu(machine),
    vfioDriver(machine),
    container(machine),
    ...boundFunctions(machine, functions),
    pciMemlock(machine, functions.length > 0),
  ];
}

const { ok, missing } = findingsOf("pci");

function foundFunctions(functions: readonly VirtioPciFacts[]): Finding {
  const addresses = functions.map(({ address }) => address).join(", ");
  return functions.length > 0
    ? ok("functions", `Virtio-blk on PCI: ${addresses}.`)
    : missing(
        "functions",
        "There is no virtio-blk function on PCI.",
        "give the virtual machine one (QEMU: -device virtio-blk-pci)",
      );
}

function iommu(machine: Machine): Finding {
  const groups = entries(join(machine.sys, "kernel/iommu_groups")).length;
  if (groups > 0) return ok("IOMMU", `It is on, with ${groups} group${groups === 1 ? "" : "s"}.`);
  const words = (readText(join(machine.proc, "cmdline")) ?? "").split(/\s+/);
  const off = words.find((word) => /^(?:intel_iommu|amd_iommu|iommu)=off$/.test(word));
  const cpu = procLines(machine, "cpuinfo");
  const parameter = cpu.some((line) => line.endsWith("GenuineIntel")) ? "intel_iommu=on" : "iommu.passthrough=0";
  const advice = words.includes(parameter)
    ? "switch the IOMMU (VT-d, AMD-Vi, SMMU) on in the firmware"
    : `add ${parameter} to the kernel's command line, and switch the IOMMU (VT-d, AMD-Vi, SMMU) on in the firmware`;
  if (off !== undefined) {
    return missing("IOMMU", `It is switched off by ${off} on the kernel's command line.`, `take ${off} from it`);
  }
  if (cpu.some((line) => line.startsWith("flags") && / hypervisor\b/.test(line))) {
    const given = `give the virtual machine one (QEMU: -device intel-iommu,intremap=on,caching-mode=on), and ${advice}`;
    return missing("IOMMU", "There is none: this is a virtual machine, and its hypervisor has to offer one.", given);
  }
  return missing("IOMMU", "There is none, or it is off.", advice);
}

function vfioDriver(machine: Machine): Finding {
  if (entries(join(machine.sys, "bus/pci/drivers")).some(isVfioDriver)) return ok("vfio-pci", "The driver is loaded.");
  return missing("vfio-pci", "The driver is not loaded.", moduleFix(machine, "vfio-pci", "VFIO_PCI"));
}

function container(machine: Machine): Finding {
  const node = join(machine.dev, "vfio/vfio");
  if (!entries(join(machine.dev, "vfio")).includes("vfio")) {
    return missing("container", `There is no ${node}.`, moduleFix(machine, "vfio-pci", "VFIO_PCI"));
  }
  if (!mayUse(node)) return missing("container", `This user may not use ${node}.`, `sudo chmod 666 ${node}`);
  if (!entries(join(machine.sys, "module")).includes("vfio_iommu_type1")) {
    const fix = moduleFix(machine, "vfio_iommu_type1", "VFIO_IOMMU_TYPE1");
    return missing("container", `${node} is there, but nothing behind it: vfio_iommu_type1 is not loaded.`, fix);
  }
  return ok("container", `${node} may be used.`);
}

/** The functions that VFIO has, each with its group; what to bind when it has none. */
function boundFunctions(machine: Machine, functions: readonly VirtioPciFacts[]): Finding[] {
  const bound = functions.filter(({ driver }) => isVfioDriver(driver));
  if (bound.length > 0) return oneIsEnough(bound.map((facts) => boundFunction(machine, facts)));
  if (functions.length === 0) return [];
  const idle = functions.find((facts) => usesOf(machine, facts).uses.length === 0);
  if (idle !== undefined) {
    return [missing("bound", "VFIO has none of the functions.", `virtio pci bind ${idle.address}`)];
  }
  return [missing("bound", "VFIO has none of the functions, and all are in use.", "virtio pci list")];
}

function boundFunction(machine: Machine, facts: VirtioPciFacts): Finding {
  const { address, group } = facts;
  if (group === undefined || group.noIommu) {
    return missing("bound", `${nameOf(facts)} has no IOMMU behind it.`, "see IOMMU above");
  }
  const problem = groupProblem(machine, address, group);
  if (problem !== undefined) return missing("bound", `${nameOf(facts)}: ${problem.what}.`, problem.remedy);
  const { uses } = usesOf(machine, facts);
  const state = uses.length > 0 ? `is in use: ${uses.map(({ what }) => what).join("; ")}` : "can be opened";
  return ok("bound", `${nameOf(facts)}, group ${group.number}, ${state}.`);
}

function pciMemlock(machine: Machine, isNeeded: boolean): Finding {
  const capabilities = BigInt(`0x${statusField(machine, "CapEff") ?? "0"}`);
  if (((capabilities >> CAP_IPC_LOCK) & 1n) === 1n) return ok("locked memory", "Without limit: CAP_IPC_LOCK.");
  return memlockFinding(machine, "pci", isNeeded);
}

/** Whether enough memory may be pinned for a device. */
export function memlockFinding(machine: Machine, section: "pci" | "vhost-vdpa", isNeeded: boolean): Finding {
  const of = findingsOf(section);
  const [, soft = "", hard = ""] =
    /^Max locked memory\s+(\S+)\s+(\S+)/.exec(
      procLines(machine, "self/limits").find((line) => /locked/.test(line)) ?? "",
    ) ?? [];
  const limit = soft === "unlimited" ? Infinity : Number(soft);
  const shown = limit === Infinity ? "No limit" : `At most ${formatBytes(limit)}`;
  if (limit >= MEMLOCK_BYTES) return of.ok("locked memory", `${shown}.`);
  if (!isNeeded) return of.notNeeded("locked memory", `${shown}, and no device here needs more.`);
  const isAllowed = hard === "unlimited" || Number(hard) >= MEMLOCK_BYTES;
  const fix = isAllowed ? `ulimit -l ${MEMLOCK_BYTES / 1024}` : "sudo prlimit --pid $$ --memlock=unlimited:unlimited";
  return of.missing("locked memory", `${shown}; a device takes ${formatBytes(MEMLOCK_BYTES)} and more.`, fix);
}

function statusField(machine: Machine, name: string): string | undefined {
  const line = procLines(machine, "self/status").find((each) => each.startsWith(`${name}:`));
  return line?.slice(name.length + 1).trim();
}
