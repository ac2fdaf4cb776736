/** Takes a virtio function from one driver and gives it to another, by the steps that sysfs has for it. */

import { accessSync, constants } from "node:fs";
import { join } from "node:path";
import { VirtioError } from "../errors.js";
import { virtioTypeName } from "../protocol/pci-ids.js";
import { errno, fileError } from "../sys/errno.js";
import { entries } from "../sys/kernel-files.js";
import { type PciFacts, pciFolder, readPciFunction } from "../transports/pci/sysfs.js";
import type { Machine } from "./machine.js";
import { usesOf } from "./pci-use.js";

/** The kernel's driver of virtio functions, as its folder in sysfs is called, and the module that brings it. */
const KERNEL_DRIVER = "virtio-pci";

/** Class of bridges: the upper 8 of 24 bits. */
const CLASS_BRIDGE = 0x06;
/** The virtio device that is an IOMMU itself. */
const TYPE_IOMMU = 23;

/** One write to sysfs. */
interface Step {
  readonly path: string;
  /** What is written; empty takes the laid down driver back. */
  readonly text: string;
}

/** What moving a function comes to. */
export interface Move {
  /** The function before. */
  readonly facts: PciFacts;
  /** The driver that is to have it. */
  readonly driver: string;
  /** What is to be written, in order; empty when nothing is left to do. */
  readonly steps: readonly Step[];
  /** What could not be looked at. A move with anything here is for showing only. */
  readonly unknown: readonly string[];
}

/**
 * What giving the function to a VFIO driver takes.
 *
 * @throws VirtioError ERR_VIRTIO_ADDRESS when it is no virtio function, ERR_VIRTIO_CONNECT when there is none, no
 *   such driver, or no IOMMU; ERR_VIRTIO_BUSY when it is in use.
 */
export function planBind(machine: Machine, address: string, driver: string): Move {
  const facts = readVirtioFunction(machine, address);
  if (facts.driver === driver) return { facts, driver, steps: [], unknown: [] };
  const unknown = checkIdle(machine, facts);
  checkDriver(machine, driver, `it is not loaded; try: modprobe ${driver}`);
  if (facts.group === undefined) {
    throw new VirtioError(
      "ERR_VIRTIO_CONNECT",
      `${facts.address} has no IOMMU group: there is no IOMMU, or it is off. Switch it on in the firmware, and boot the ` +
        "kernel with intel_iommu=on (Intel) or amd_iommu=on (AMD); `virtio doctor` tells more",
    );
  }
  return { facts, driver, steps: stepsTo(machine, facts, driver, driver), unknown };
}

/**
 * What giving the function back to the kernel's driver takes.
 *
 * @throws VirtioError as {@link planBind}.
 */
export function planUnbind(machine: Machine, address: string): Move {
  const facts = readVirtioFunction(machine, address);
  if (facts.driver === KERNEL_DRIVER && facts.driverOverride === undefined) {
    return { facts, driver: KERNEL_DRIVER, steps: [], unknown: [] };
  }
  // Where the kernel has it already, only what was laid down is taken back, which disturbs nobody.
  const unknown = facts.driver === KERNEL_DRIVER ? [] : checkIdle(machine, facts);
  checkDriver(machine, KERNEL_DRIVER, "nobody would take the function; try: modprobe virtio_pci");
  return { facts, driver: KERNEL_DRIVER, steps: stepsTo(machine, facts, KERNEL_DRIVER, undefined), unknown };
}

function readVirtioFunction(machine: Machine, address: string): PciFacts {
  const facts = readPciFunction(address.replace(/^pci:/, ""), machine.sys);
  const refuse = (what: string): VirtioError =>
    new VirtioError(
      "ERR_VIRTIO_ADDRESS",
      `${facts.address} is ${what} and is left alone; \`virtio pci list\` shows the virtio functions`,
    );
  if (facts.class >>> 16 === CLASS_BRIDGE) throw refuse("a bridge");
  if (facts.virtio === undefined) {
    throw refuse(`no virtio function (vendor ${hexId(facts.vendor)}, device ${hexId(facts.device)})`);
  }
  if (facts.virtio.type === TYPE_IOMMU) throw refuse("the IOMMU that VFIO itself needs");
  return facts;
}

function hexId(id: number): string {
  return `0x${id.toString(16).padStart(4, "0")}`;
}

function checkDriver(machine: Machine, driver: string, otherwise: string): void {
  if (entries(join(machine.sys, "bus/pci/drivers")).includes(driver)) return;
  throw new VirtioError("ERR_VIRTIO_CONNECT", `this kernel has no PCI driver ${driver} at the moment: ${otherwise}`);
}

/** Refuse a function that is in use; what cannot be told is returned. */
function checkIdle(machine: Machine, facts: PciFacts): readonly string[] {
  const { uses, unknown } = usesOf(machine, facts);
  if (uses.length === 0) return unknown;
  const ways = uses.map(({ what, remedy }) => `${what} (${remedy})`).join("; ");
  throw new VirtioError("ERR_VIRTIO_BUSY", `${nameOf(facts)} is in use: ${ways}`, { errno: errno.EBUSY });
}

/** A function for people: `0000:00:04.0 (virtio blk)`. */
export function nameOf(facts: PciFacts): string {
  return facts.virtio === undefined ? facts.address : `${facts.address} (virtio ${virtioTypeName(facts.virtio.type)})`;
}

/** What leads from where the function is now to `driver`; undefined for none. */
function stepsTo(
  machine: Machine,
  facts: PciFacts,
  driver: string | undefined,
  override: string | undefined,
): readonly Step[] {
  const folder = pciFolder(facts.address, machine.sys);
  const steps: Step[] = [];
  // The driver is laid down first, so that no other one takes the function when it is free.
  if (facts.driverOverride !== override) steps.push({ path: join(folder, "driver_override"), text: override ?? "" });
  if (facts.driver === driver) return steps;
  if (facts.driver !== undefined) steps.push({ path: join(folder, "driver/unbind"), text: facts.address });
  if (driver !== undefined) steps.push({ path: join(machine.sys, "bus/pci/drivers_probe"), text: facts.address });
  return steps;
}

/** A step as a command of the shell. */
export function shellCommand({ path, text }: Step): string {
  return text === "" ? `echo > ${path}` : `echo ${text} > ${path}`;
}

/**
 * Move the function, and see that it arrived. A move that fails is undone.
 *
 * @returns the function after it.
 * @throws VirtioError ERR_VIRTIO_PERMISSION when this process may not write to sysfs or look whether the function is
 *   in use; ERR_VIRTIO_SYSCALL with errno when the kernel refused a step, ERR_VIRTIO_REJECTED when the driver did not
 *   take the function.
 */
export function carryOut(machine: Machine, { facts, driver, steps, unknown }: Move): PciFacts {
  if (unknown.length > 0) {
    throw new VirtioError("ERR_VIRTIO_PERMISSION", `cannot tell ${unknown.join(", ")}; run this as root`);
  }
  checkWritable(steps);
  return uninterrupted(() => {
    try {
      for (const step of steps) write(machine, step);
      const after = readPciFunction(facts.address, machine.sys);
      if (after.driver === driver) return after;
      throw new VirtioError(
        "ERR_VIRTIO_REJECTED",
        `${driver} did not take ${nameOf(facts)}: it has ${driverName(after)} now; the end of \`dmesg\` may say why`,
      );
    } catch (error) {
      if (!(error instanceof VirtioError)) throw error;
      throw undone(machine, facts, error);
    }
  });
}

/** Run `work` without being killed in the midst of it, which would leave the function with nobody. */
function uninterrupted<T>(work: () => T): T {
  const signals = ["SIGINT", "SIGTERM", "SIGHUP"] as const;
  const wait = (): void => undefined;
  for (const signal of signals) process.on(signal, wait);
  try {
    return work();
  } finally {
    for (const signal of signals) process.off(signal, wait);
  }
}

/** Before the first step, so that a user without the right to do it disturbs nothing. */
function checkWritable(steps: readonly Step[]): void {
  for (const { path } of steps) {
    try {
      accessSync(path, constants.W_OK);
    } catch (error) {
      throw fileError(error, `preparing to write to ${path}`, "run this as root");
    }
  }
}

function write(machine: Machine, step: Step): void {
  try {
    machine.write(step.path, `${step.text}\n`);
  } catch (error) {
    throw fileError(error, shellCommand(step));
  }
}

/** Give the function back to whoever had it, and say in the error how that went. */
function undone(machine: Machine, before: PciFacts, reason: VirtioError): VirtioError {
  let now: PciFacts | undefined;
  let failure: unknown;
  try {
    now = readPciFunction(before.address, machine.sys);
    for (const step of stepsTo(machine, now, before.driver, before.driverOverride)) write(machine, step);
    now = readPciFunction(before.address, machine.sys);
  } catch (error) {
    failure = error;
  }
  const { errno: code, syscall } = reason;
  const details = {
    ...(code !== undefined && { errno: code }),
    ...(syscall !== undefined && { syscall }),
    cause: reason,
  };
  if (failure === undefined && now?.driver === before.driver) {
    return new VirtioError(reason.code, `${reason.message}. Undone: it has ${driverName(before)} again`, details);
  }
  const why = failure instanceof Error ? ` (${failure.message})` : "";
  return new VirtioError(
    reason.code,
    `${reason.message}. Undoing it failed too${why}: it has ${now === undefined ? "an unknown driver" : driverName(now)}, ` +
      `and had ${driverName(before)}`,
    details,
  );
}

/** The driver of a function for people. */
export function driverName(facts: PciFacts): string {
  return facts.driver ?? "no driver";
}
