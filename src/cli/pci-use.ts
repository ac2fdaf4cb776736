/** What the kernel has made of a PCI function, disks and network interfaces, and who is using that. */

import { constants } from "node:fs";
import { basename, dirname, join, sep } from "node:path";
import { errno, errnoName } from "../sys/errno.js";
import { entries, readText } from "../sys/kernel-files.js";
import { isVfioDriver, type PciFacts, pciFolder } from "../transports/pci/sysfs.js";
import { type Machine, openErrno, openersOf, procLines, realPath } from "./machine.js";

/** Virtio device types whose file systems the kernel can mount: 9p and virtiofs. */
const TYPE_9P = 9;
const TYPE_FS = 26;
/** IFF_UP of linux/if.h. */
const IFF_UP = 1;

/** What stands on a function. */
export interface Standing {
  /** Block devices by name, partitions with the disks that they are on: `vda`, `vda1`. */
  readonly blockDevices: readonly string[];
  /** Network interfaces by name. */
  readonly interfaces: readonly string[];
}

/** A use of a function, and how to end it. */
export interface Use {
  /** A sentence without its full stop: `vda1 is mounted on /data`. */
  readonly what: string;
  /** What ends it: `umount /data`. */
  readonly remedy: string;
}

/** What is in the way of taking a function from its driver. */
export interface Uses {
  readonly uses: readonly Use[];
  /** What could not be looked at: `whether /dev/vda is in use (EACCES)`. */
  readonly unknown: readonly string[];
}

/** The block devices and network interfaces of a function. */
export function standingOn(machine: Machine, address: string): Standing {
  const below = `${realPath(pciFolder(address, machine.sys))}${sep}`;
  const of = (kind: string): string[] =>
    entries(join(machine.sys, "class", kind)).filter((name) =>
      realPath(join(machine.sys, "class", kind, name)).startsWith(below),
    );
  return { blockDevices: of("block"), interfaces: of("net") };
}

/** Who uses the function; what cannot be told is listed, never taken for idle. */
export function usesOf(machine: Machine, facts: PciFacts): Uses {
  if (isVfioDriver(facts.driver)) return processUses(machine, facts);
  const { blockDevices, interfaces } = standingOn(machine, facts.address);
  const uses: Use[] = [
    ...mountUses(machine, facts, blockDevices),
    ...swapUses(machine, blockDevices),
    ...stackedUses(machine, blockDevices),
    ...interfaceUses(machine, interfaces),
  ];
  const unknown: string[] = [];
  // What is mounted is open as well: saying it once is enough.
  if (uses.length === 0) for (const name of blockDevices) openUses(machine, name, uses, unknown);
  return { uses, unknown };
}

/** A process that drives the function itself. Unbinding it would wait in the kernel until that process lets go. */
function processUses(machine: Machine, facts: PciFacts): Uses {
  if (facts.group === undefined) return { uses: [], unknown: [] };
  const node = groupNode(machine, facts.group);
  const code = openErrno(machine, node, constants.O_RDWR);
  if (code === errno.EBUSY) {
    const nodes = [node, ...deviceNodes(machine, facts.address)];
    return {
      uses: [{ what: `${node} is open in ${openedBy(machine, nodes)}`, remedy: "close it there" }],
      unknown: [],
    };
  }
  // No node: nobody can have it open.
  const isUnknown = code !== 0 && code !== errno.ENOENT;
  return { uses: [], unknown: isUnknown ? [`whether ${node} is in use (${errnoName(code)})`] : [] };
}

/** The node by which a process takes a group. */
export function groupNode(machine: Machine, group: { readonly number: number; readonly noIommu: boolean }): string {
  return join(machine.dev, "vfio", group.noIommu ? `noiommu-${group.number}` : String(group.number));
}

/** The nodes by which newer programs take the function without its group. */
function deviceNodes(machine: Machine, address: string): string[] {
  return entries(join(pciFolder(address, machine.sys), "vfio-dev")).map((name) =>
    join(machine.dev, "vfio", "devices", name),
  );
}

function openedBy(machine: Machine, nodes: readonly string[]): string {
  const openers = openersOf(machine, nodes);
  return openers.length === 0 ? "a process that cannot be seen from here" : `process ${openers.join(", ")}`;
}

interface Mount {
  readonly number: string;
  readonly point: string;
  readonly type: string;
  readonly source: string;
}

/** The mounts that this process sees (proc(5), mountinfo). */
function mounts(machine: Machine): Mount[] {
  return procLines(machine, "self/mountinfo").map((line) => {
    const fields = line.split(" ").map(unescapeOctal);
    const end = fields.indexOf("-");
    return {
      number: fields[2] ?? "",
      point: fields[4] ?? "",
      type: fields[end + 1] ?? "",
      source: fields[end + 2] ?? "",
    };
  });
}

/** The text in which procfs writes blanks and backslashes as octal numbers. */
function unescapeOctal(text: string): string {
  return text.replaceAll(/\\([0-7]{3})/g, (_, digits: string) => String.fromCharCode(Number.parseInt(digits, 8)));
}

function mountUses(machine: Machine, facts: PciFacts, blockDevices: readonly string[]): Use[] {
  const numbers = new Map(blockDevices.map((name) => [blockAttribute(machine, name, "dev"), name]));
  const tags = fileSystemTags(machine, facts);
  return mounts(machine).flatMap(({ number, point, type, source }) => {
    // Some file systems have a number of their own, others a source that says nothing: either will do.
    const device = numbers.get(number) ?? named(blockDevices, source);
    const served = (type === "9p" || type === "virtiofs") && (tags.has(source) || tags.has(ANY_TAG[type]));
    if (device === undefined && !served) return [];
    return [{ what: `${device ?? `the file system "${source}"`} is mounted on ${point}`, remedy: `umount ${point}` }];
  });
}

/** Stands for every tag, where the kernel does not tell the tag of a function. */
const ANY_TAG = { "9p": "\0any 9p", virtiofs: "\0any virtiofs" } as const;

/** By which names the file system behind a 9p or virtiofs function can be mounted. */
function fileSystemTags(machine: Machine, facts: PciFacts): ReadonlySet<string> {
  const type = facts.virtio?.type;
  const folder = pciFolder(facts.address, machine.sys);
  if (type === TYPE_9P) {
    const names = entries(folder).filter((name) => /^virtio\d+$/.test(name));
    return new Set(
      names.map((name) => readText(join(folder, name, "mount_tag"))?.replaceAll("\0", "") ?? ANY_TAG["9p"]),
    );
  }
  return new Set(type === TYPE_FS ? [ANY_TAG.virtiofs] : []);
}

function swapUses(machine: Machine, blockDevices: readonly string[]): Use[] {
  return procLines(machine, "swaps").flatMap((line) => {
    const path = unescapeOctal(line.split(/\s/)[0] ?? "");
    const device = named(blockDevices, path);
    return device === undefined ? [] : [{ what: `${device} is swap space`, remedy: `swapoff ${path}` }];
  });
}

/** Which of the block devices `path` is the node of, by whatever link; undefined for none. */
function named(blockDevices: readonly string[], path: string): string | undefined {
  const node = path.startsWith("/") ? realPath(path) : "";
  return dirname(node) === "/dev" ? blockDevices.find((name) => name === basename(node)) : undefined;
}

/** Device mapper, RAID and LVM hold the devices below them; loop devices do so without saying it there. */
function stackedUses(machine: Machine, blockDevices: readonly string[]): Use[] {
  const held = blockDevices.flatMap((device) =>
    entries(join(machine.sys, "class/block", device, "holders")).map((holder) => ({
      what: `${device} is part of ${holder}${describeMapping(machine, holder)}`,
      remedy: `take ${holder} apart first (dmsetup, mdadm, vgchange -an)`,
    })),
  );
  const looped = entries(join(machine.sys, "class/block")).flatMap((loop) => {
    const device = named(blockDevices, blockAttribute(machine, loop, "loop/backing_file") ?? "");
    return device === undefined ? [] : [{ what: `${device} is behind ${loop}`, remedy: `losetup -d /dev/${loop}` }];
  });
  return [...held, ...looped];
}

/** ` (vg0-root)` for a device of the device mapper. */
function describeMapping(machine: Machine, holder: string): string {
  const name = blockAttribute(machine, holder, "dm/name");
  return name === undefined ? "" : ` (${name})`;
}

function interfaceUses(machine: Machine, interfaces: readonly string[]): Use[] {
  return interfaces
    .filter((name) => (Number(readText(join(machine.sys, "class/net", name, "flags")) ?? 0) & IFF_UP) !== 0)
    .map((name) => ({ what: `its network interface ${name} is up`, remedy: `ip link set ${name} down` }));
}

/** A claim that shows nowhere else: another container's mount, a program with the disk for itself, one that just has it open. */
function openUses(machine: Machine, device: string, uses: Use[], unknown: string[]): void {
  const node = join(machine.dev, device);
  const code = openErrno(machine, node, constants.O_RDONLY | constants.O_EXCL | constants.O_NONBLOCK);
  const openers = openersOf(machine, [node]);
  if (code === errno.EBUSY || openers.length > 0) {
    uses.push({ what: `${node} is open in ${openedBy(machine, [node])}`, remedy: "close it there" });
  } else if (code !== 0) {
    unknown.push(`whether ${node} is in use (${errnoName(code)})`);
  }
}

function blockAttribute(machine: Machine, device: string, name: string): string | undefined {
  return readText(join(machine.sys, "class/block", device, name));
}
