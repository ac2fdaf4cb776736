/** The machine that `virtio pci` and `virtio doctor` look at: its folders, and what of them the tests replace. */

import { spawnSync } from "node:child_process";
import { accessSync, closeSync, constants, openSync, realpathSync, writeSync } from "node:fs";
import { join } from "node:path";
import { VirtioError } from "../errors.js";
import { errno, fileError } from "../sys/errno.js";
import { entries, readLink, readText } from "../sys/kernel-files.js";

/** Where the kernel shows the machine, and the two calls that change something or depend on who else is there. */
export interface Machine {
  /** Where sysfs is mounted. */
  readonly sys: string;
  /** Where procfs is mounted. */
  readonly proc: string;
  /** Where the device nodes are. */
  readonly dev: string;
  /** Where the modules of the kernel are, by its release. */
  readonly modules: string;
  /** Write to an attribute of sysfs; throws what `node:fs` throws. */
  write(path: string, text: string): void;
  /** Open a node and close it again; throws what `node:fs` throws. */
  tryOpen(path: string, flags: number): void;
  /** Types of the vDPA devices by name, which sysfs does not tell and the program `vdpa` of iproute2 does. */
  vdpaTypes(): ReadonlyMap<string, string>;
}

/** How long the program `vdpa` may take. */
const VDPA_MS = 5000;

/** This machine. */
export const THIS_MACHINE: Machine = {
  sys: "/sys",
  proc: "/proc",
  dev: "/dev",
  modules: "/lib/modules",
  write(path, text) {
    // No O_CREAT and no O_TRUNC: an attribute that is not there is an error.
    const fd = openSync(path, constants.O_WRONLY);
    try {
      writeSync(fd, text);
    } finally {
      closeSync(fd);
    }
  },
  tryOpen(path, flags) {
    closeSync(openSync(path, flags));
  },
  vdpaTypes() {
    const { stdout } = spawnSync("vdpa", ["-j", "dev", "show"], { encoding: "utf8", timeout: VDPA_MS });
    return parseVdpaTypes(stdout ?? "");
  },
};

/** The types in what `vdpa -j dev show` printed: `{"dev":{"vdpa0":{"type":"block",…}}}`; none in anything else. */
export function parseVdpaTypes(text: string): ReadonlyMap<string, string> {
  return new Map([...text.matchAll(/"([^"]+)":\{"type":"([^"]+)"/g)].map(([, name = "", type = ""]) => [name, type]));
}

/** The errno with which a node cannot be opened; 0 when it can. */
export function openErrno(machine: Machine, path: string, flags: number): number {
  try {
    machine.tryOpen(path, flags);
    return 0;
  } catch (error) {
    return fileError(error, `opening ${path}`).errno ?? errno.EIO;
  }
}

/** Whether this process may read and write a node; it is not opened. */
export function mayUse(path: string): boolean {
  try {
    accessSync(path, constants.R_OK | constants.W_OK);
    return true;
  } catch {
    return false;
  }
}

/** Where a path really leads; the path itself when that is nowhere. */
export function realPath(path: string): string {
  try {
    return realpathSync(path);
  } catch {
    return path;
  }
}

/** Lines of a file of procfs; none when it is not there. */
export function procLines(machine: Machine, name: string): string[] {
  return (readText(join(machine.proc, name)) ?? "").split("\n").filter((line) => line !== "");
}

/** The processes that have one of the nodes open, of those that may be asked; root may ask all. `1234 (qemu)`. */
export function openersOf(machine: Machine, nodes: readonly string[]): string[] {
  return entries(machine.proc)
    .filter((pid) => /^\d+$/.test(pid) && pid !== String(process.pid))
    .filter((pid) => hasOpen(join(machine.proc, pid, "fd"), nodes))
    .map((pid) => `${pid} (${readText(join(machine.proc, pid, "comm")) ?? "ended"})`);
}

function hasOpen(folder: string, nodes: readonly string[]): boolean {
  try {
    return entries(folder).some((fd) => nodes.includes(readLink(join(folder, fd)) ?? ""));
  } catch (error) {
    if (error instanceof VirtioError && error.code === "ERR_VIRTIO_PERMISSION") return false;
    throw error;
  }
}

/** The command that loads a module, or what to do when this kernel has none. */
export function moduleFix(machine: Machine, module: string, option: string): string {
  const release = readText(join(machine.proc, "sys/kernel/osrelease")) ?? "";
  const folder = join(machine.modules, release);
  const file = module.replaceAll(/[-_]/g, "[-_]");
  if (new RegExp(`/${file}\\.ko`).test(readText(join(folder, "modules.dep")) ?? "")) return `modprobe ${module}`;
  return `boot a kernel with CONFIG_${option}: ${folder} has no module ${module}`;
}
