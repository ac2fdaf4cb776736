/** The virtio functions of a machine, as a table and as JSON, with what each lacks to be used from here. */

import { VIRTIO_ID_BLOCK } from "../protocol/blk.js";
import { virtioTypeName } from "../protocol/pci-ids.js";
import {
  type IommuGroup,
  type IommuGroupMember,
  isVfioDriver,
  listVirtioFunctions,
  type PciFacts,
  type VirtioPciFacts,
} from "../transports/pci/sysfs.js";
import { type Machine, mayUse } from "./machine.js";
import { groupNode, standingOn, type Use, usesOf } from "./pci-use.js";
import { columns } from "./table.js";
import { styled } from "./terminal.js";

/** A function as `virtio pci list --json` shows it. */
export interface ListedFunction {
  readonly address: string;
  /** Short name of the virtio device type. */
  readonly type: string;
  /** The virtio device id. */
  readonly typeId: number;
  readonly transitional: boolean;
  /** Whether it has nothing but the interface of before virtio 1.0, as far as this user can see. */
  readonly legacyOnly: boolean;
  readonly vendorId: number;
  readonly deviceId: number;
  readonly driver: string | null;
  readonly driverOverride: string | null;
  readonly group: number | null;
  /** The others in the group. */
  readonly groupMembers: readonly { readonly address: string; readonly driver: string | null }[];
  /** Whether VFIO would give the group away as its members are now; null without a group. */
  readonly groupViable: boolean | null;
  readonly blockDevices: readonly string[];
  readonly interfaces: readonly string[];
  /** Who uses it, as sentences. */
  readonly inUse: readonly string[];
  /** Whether a program of this user can open it now. */
  readonly ready: boolean;
  /** What to do next, as a sentence or command. */
  readonly advice: string;
}

/** Every virtio function of the machine, by address. */
export function listFunctions(machine: Machine): ListedFunction[] {
  return listVirtioFunctions(machine.sys).map((facts) => listed(machine, facts));
}

function listed(machine: Machine, facts: VirtioPciFacts): ListedFunction {
  const { virtio, group } = facts;
  const { uses } = usesOf(machine, facts);
  const others = group?.members.filter(({ address }) => address !== facts.address) ?? [];
  const problem = problemOf(machine, facts, uses);
  return {
    address: facts.address,
    ...{ type: virtioTypeName(virtio.type), typeId: virtio.type, transitional: virtio.transitional },
    ...{ legacyOnly: facts.isLegacyOnly, vendorId: facts.vendor, deviceId: facts.device },
    ...{ driver: facts.driver ?? null, driverOverride: facts.driverOverride ?? null, group: group?.number ?? null },
    groupMembers: others.map(({ address, driver }) => ({ address, driver: driver ?? null })),
    groupViable: group === undefined ? null : isViable(group, facts.address),
    ...standingOn(machine, facts.address),
    inUse: uses.map(({ what }) => what),
    ready: problem === undefined,
    advice: problem ?? `virtio info pci:${facts.address}`,
  };
}

/** Whether the group can be given away once the function itself is with VFIO. */
function isViable(group: IommuGroup, address: string): boolean {
  return !group.noIommu && inTheWay(group, address).length === 0;
}

/** The other members that the kernel uses. */
function inTheWay(group: IommuGroup, address: string): IommuGroupMember[] {
  return group.members.filter((member) => member.inKernelUse && member.address !== address);
}

/** What keeps a program of this user from opening the function, and what to do; undefined for nothing. */
function problemOf(machine: Machine, facts: VirtioPciFacts, uses: readonly Use[]): string | undefined {
  if (facts.virtio.type !== VIRTIO_ID_BLOCK) return "no driver for it here: virtio-blk only, so far";
  if (uses.length > 0) return `in use: ${uses.map(({ what }) => what).join("; ")}`;
  if (facts.isLegacyOnly) return "legacy interface only: not supported (QEMU: disable-modern=off)";
  const { group } = facts;
  if (group === undefined) return "no IOMMU group: see `virtio doctor`";
  if (group.noIommu) return "no IOMMU behind it: VFIO's unsafe mode is not supported";
  if (!isVfioDriver(facts.driver)) return `virtio pci bind ${facts.address}`;
  return groupAdvice(groupProblem(machine, facts.address, group));
}

function groupAdvice(problem: Use | undefined): string | undefined {
  return problem === undefined ? undefined : `${problem.what}: ${problem.remedy}`;
}

/** What keeps a group from being opened by this user, and what to do; undefined for nothing. */
export function groupProblem(machine: Machine, address: string, group: IommuGroup): Use | undefined {
  const others = inTheWay(group, address);
  if (others.length > 0) {
    const [first] = others;
    return {
      what: `group ${group.number} is not viable: the kernel uses ${others.map(memberName).join(", ")}`,
      remedy: `when nothing needs that, echo ${first?.address} > /sys/bus/pci/devices/${first?.address}/driver/unbind`,
    };
  }
  const node = groupNode(machine, group);
  return mayUse(node) ? undefined : { what: `this user may not use ${node}`, remedy: `sudo chown $USER ${node}` };
}

function memberName({
  address,
  driver,
}: {
  readonly address: string;
  readonly driver: string | null | undefined;
}): string {
  return `${address} (${driver ?? "no driver"})`;
}

/** The functions as lines of text. */
export function describeFunctions(functions: readonly ListedFunction[]): string[] {
  if (functions.length === 0) {
    return ["no virtio function on PCI here; `virtio doctor` tells what else there is"];
  }
  const title = ["address", "type", "driver", "group", "shared with", "is", ""];
  const rows = functions.map((each) => [
    each.address,
    each.transitional ? `${each.type} (transitional)` : each.type,
    each.driver ?? "none",
    each.group === null ? "none" : String(each.group),
    each.groupMembers.map(memberName).join(", ") || "nobody",
    [...each.blockDevices, ...each.interfaces].join(", ") || "-",
    each.ready ? `ready: ${each.advice}` : each.advice,
  ]);
  const [head = "", ...lines] = columns("lllrlll", [title, ...rows]);
  return [styled(process.stdout, "bold", head), ...lines];
}

/** What a user is told about the group of a function that was bound. */
export function describeGroup(machine: Machine, facts: PciFacts): string {
  const { group } = facts;
  if (group === undefined) return "it has no IOMMU group";
  const problem = groupAdvice(groupProblem(machine, facts.address, group));
  const isOurs = facts.virtio?.type === VIRTIO_ID_BLOCK;
  const next = isOurs ? `; try: virtio info pci:${facts.address}` : "";
  return problem ?? `group ${group.number} is viable, by ${groupNode(machine, group)}${next}`;
}
