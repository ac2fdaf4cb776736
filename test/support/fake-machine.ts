/** A machine of files and links in a temporary folder, whose sysfs reacts to writes as the kernel's does. */

import { existsSync, mkdirSync, readFileSync, readlinkSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { constants } from "node:os";
import { basename, dirname, join, relative } from "node:path";
import type { Machine } from "../../src/cli/machine.js";
import { TemporaryFolder } from "./peers.js";

/** A PCI function to put into a machine. */
export interface FakeFunction {
  readonly address: string;
  /** Default: that of virtio. */
  readonly vendor?: number;
  /** Default: 0x1042, a virtio-blk. */
  readonly device?: number;
  readonly class?: number;
  /** Default: `virtio-pci`; null for none. */
  readonly driver?: string | null;
  readonly driverOverride?: string;
  readonly group?: number;
}

/** The machine. Everything that it lacks is missing until it is added. */
export class FakeMachine implements Machine {
  readonly #folder = new TemporaryFolder();
  readonly sys = this.#folder.file("sys");
  readonly proc = this.#folder.file("proc");
  readonly dev = this.#folder.file("dev");
  readonly modules = this.#folder.file("modules");
  /** What was written, as `file name in sysfs = text`. */
  readonly written: string[] = [];
  /** Errnos by node, with which it cannot be opened. */
  readonly closed = new Map<string, keyof typeof constants.errno>();
  /** Drivers that take no function. */
  readonly unwilling = new Set<string>();
  /** Decides whether a write fails, and how. */
  refuse: (name: string, text: string) => keyof typeof constants.errno | undefined = () => undefined;
  types = new Map<string, string>();

  /** A file with its content, relative to the machine's root. */
  file(path: string, content: string | Uint8Array): void {
    const full = this.#folder.file(path);
    mkdirSync(dirname(full), { recursive: true });
    writeFileSync(full, content);
  }

  /** A link, both paths relative to the machine's root. */
  link(path: string, target: string): void {
    const full = this.#folder.file(path);
    mkdirSync(dirname(full), { recursive: true });
    symlinkSync(relative(dirname(full), this.#folder.file(target)), full);
  }

  /** Load a driver of PCI functions. */
  addDriver(name: string): void {
    this.file(`sys/bus/pci/drivers/${name}/unbind`, "");
    this.file("sys/bus/pci/drivers_probe", "");
  }

  /** Put a PCI function in, with its driver and its group. */
  addFunction(one: FakeFunction): void {
    const { address, vendor = 0x1af4, device = 0x1042, driver = "virtio-pci", group } = one;
    const folder = `sys/devices/pci0000:00/${address}`;
    this.file(`${folder}/vendor`, `0x${vendor.toString(16).padStart(4, "0")}\n`);
    this.file(`${folder}/device`, `0x${device.toString(16).padStart(4, "0")}\n`);
    this.file(`${folder}/class`, `0x${(one.class ?? 0x018000).toString(16).padStart(6, "0")}\n`);
    this.file(`${folder}/driver_override`, `${one.driverOverride ?? "(null)"}\n`);
    this.link(`sys/bus/pci/devices/${address}`, folder);
    if (driver !== null) {
      this.addDriver(driver);
      this.link(`${folder}/driver`, `sys/bus/pci/drivers/${driver}`);
    }
    if (group !== undefined) {
      this.file(`sys/kernel/iommu_groups/${group}/type`, "DMA\n");
      this.link(`${folder}/iommu_group`, `sys/kernel/iommu_groups/${group}`);
      this.link(`sys/kernel/iommu_groups/${group}/devices/${address}`, folder);
    }
  }

  /** Make a disk, with partitions, of a function. */
  addDisk(address: string, name: string, partitions: readonly string[] = []): void {
    const folder = `sys/devices/pci0000:00/${address}/virtio0/block/${name}`;
    this.#addBlock(name, folder, "254:0");
    for (const [index, part] of partitions.entries()) this.#addBlock(part, `${folder}/${part}`, `254:${index + 1}`);
  }

  #addBlock(name: string, folder: string, number: string): void {
    this.file(`${folder}/dev`, `${number}\n`);
    mkdirSync(this.#folder.file(`${folder}/holders`), { recursive: true });
    this.link(`sys/class/block/${name}`, folder);
    this.file(`dev/${name}`, "");
  }

  /** Make a network interface of a function. */
  addInterface(address: string, name: string, flags: number): void {
    const folder = `sys/devices/pci0000:00/${address}/virtio0/net/${name}`;
    this.file(`${folder}/flags`, `0x${flags.toString(16)}\n`);
    this.link(`sys/class/net/${name}`, folder);
  }

  /** A process that has nodes open. */
  addProcess(pid: number, name: string, nodes: readonly string[]): void {
    this.file(`proc/${pid}/comm`, `${name}\n`);
    for (const [fd, node] of nodes.entries()) {
      mkdirSync(join(this.proc, String(pid), "fd"), { recursive: true });
      symlinkSync(node, join(this.proc, String(pid), "fd", String(fd)));
    }
  }

  /** The driver that has a function now. */
  driverOf(address: string): string | undefined {
    const link = this.#driverLink(address);
    return existsSync(link) ? basename(readlinkSync(link)) : undefined;
  }

  write(path: string, text: string): void {
    const name = basename(path);
    this.written.push(`${name} = ${text.trimEnd()}`);
    const refusal = existsSync(path) ? this.refuse(name, text.trimEnd()) : "ENOENT";
    if (refusal !== undefined) throw refused("write", refusal);
    if (name === "driver_override") writeFileSync(path, text === "\n" ? "(null)\n" : text);
    else if (name === "unbind") rmSync(this.#driverLink(text.trimEnd()));
    else if (name === "drivers_probe") this.#probe(text.trimEnd());
  }

  tryOpen(path: string): void {
    const refusal = this.closed.get(relative(this.dev, path)) ?? (existsSync(path) ? undefined : "ENOENT");
    if (refusal !== undefined) throw refused("open", refusal);
  }

  vdpaTypes(): ReadonlyMap<string, string> {
    return this.types;
  }

  /** Remove it. */
  close(): void {
    this.#folder.close();
  }

  #driverLink(address: string): string {
    return join(this.sys, "devices/pci0000:00", address, "driver");
  }

  /** The driver that is laid down takes the function, else the one for virtio. */
  #probe(address: string): void {
    const override = readOverride(join(this.sys, "devices/pci0000:00", address, "driver_override"));
    const driver = override ?? "virtio-pci";
    if (this.unwilling.has(driver) || !existsSync(join(this.sys, "bus/pci/drivers", driver))) return;
    this.link(`sys/devices/pci0000:00/${address}/driver`, `sys/bus/pci/drivers/${driver}`);
  }
}

function refused(syscall: string, code: keyof typeof constants.errno): Error {
  return Object.assign(new Error(`${code}: ${syscall}`), { code, syscall, errno: -constants.errno[code] });
}

function readOverride(path: string): string | undefined {
  const text = readFileSync(path, "utf8").trimEnd();
  return text === "(null)" ? undefined : text;
}
