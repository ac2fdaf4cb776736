/** What `virtio doctor` finds about the system as such, and about vhost-user, which it tries. */

import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import {
  acceptUnix,
  closeFd,
  connectUnix,
  createMemfd,
  EventFd,
  entries,
  listenUnix,
  mapShared,
  readText,
  receiveMessage,
  sendMessage,
  unmapShared,
} from "../sys/index.js";
import { type Finding, findingsOf } from "./doctor-findings.js";
import { formatBytes } from "./format.js";
import type { Machine } from "./machine.js";

const REBUILD = "npm rebuild virtio-driver (in a clone: npm run build)";
const OLDEST_NODE = [20, 19] as const;
const PROBE_BYTES = 4096;

/** Node, the platform, the addon, huge pages. */
export function systemFindings(machine: Machine): Finding[] {
  const { ok, missing, notNeeded } = findingsOf("system");
  const { platform, arch, versions } = process;
  const [major = 0, minor = 0] = versions.node.split(".").map(Number);
  const isNew = major > OLDEST_NODE[0] || (major === OLDEST_NODE[0] && minor >= OLDEST_NODE[1]);
  const release = readText(join(machine.proc, "sys/kernel/osrelease")) ?? "of unknown release";
  const user = process.getuid?.() === 0 ? "root" : `user ${process.getuid?.() ?? "unknown"}`;
  return [
    platform === "linux"
      ? ok("platform", `Linux ${release} on ${arch}; this runs as ${user}.`)
      : missing("platform", `Devices can be reached on Linux only, and this is ${platform}.`, null),
    isNew
      ? ok("Node.js", `Version ${versions.node}; ${OLDEST_NODE.join(".")} or newer is needed.`)
      : missing("Node.js", `Version ${versions.node} is older than ${OLDEST_NODE.join(".")}.`, "nvm install --lts"),
    attempt("addon", () => EventFd.create().close(), "The addon that makes the system calls loads.", REBUILD, "system"),
    hugePages(machine) > 0
      ? ok("huge pages", `${formatBytes(hugePages(machine))} of huge pages are free.`)
      : notNeeded(
          "huge pages",
          "None are free; memory for devices is made of ordinary pages.",
          "sysctl vm.nr_hugepages=64",
        ),
  ];
}

/** Free huge pages of all sizes, in bytes. */
function hugePages(machine: Machine): number {
  const folder = join(machine.sys, "kernel/mm/hugepages");
  return entries(folder).reduce((sum, name) => {
    const kilobytes = Number(/^hugepages-(\d+)kB$/.exec(name)?.[1] ?? 0);
    return sum + kilobytes * 1024 * Number(readText(join(folder, name, "free_hugepages")) ?? 0);
  }, 0);
}

/** What vhost-user is made of, tried one by one, and then a disk as a whole. */
export async function vhostUserFindings(): Promise<Finding[]> {
  const { ok, missing } = findingsOf("vhost-user");
  const parts = [
    attempt("memory files", tryMemfd, "Memory can be made and shared (memfd_create).", "use Linux 3.17 or newer"),
    attempt("events", tryEventFd, "Driver and device can wake each other (eventfd).", "use Linux 2.6.27 or newer"),
    attempt(
      "sockets",
      trySocket,
      "A Unix socket passes memory on.",
      "export TMPDIR=/tmp, or any folder you may write to",
    ),
  ];
  if (parts.some(({ status }) => status !== "ok")) return parts;
  try {
    await tryDisk();
    return [...parts, ok("a disk", "A disk in a child process was written and read back over vhost-user.")];
  } catch (error) {
    return [...parts, missing("a disk", sentence(error), "virtio demo --debug")];
  }
}

function attempt(
  name: string,
  tryIt: () => void,
  success: string,
  fix: string,
  section: Finding["section"] = "vhost-user",
): Finding {
  const { ok, missing } = findingsOf(section);
  try {
    tryIt();
    return ok(name, success);
  } catch (error) {
    return missing(name, sentence(error), fix);
  }
}

/** The message of an error as a sentence of its own. */
export function sentence(error: unknown): string {
  const message = error instanceof Error ? error.message : String(error);
  return `${message.slice(0, 1).toUpperCase()}${message.slice(1).replace(/\.$/, "")}.`;
}

function tryMemfd(): void {
  closeFd(createMemfd("virtio-doctor", PROBE_BYTES));
}

function tryEventFd(): void {
  const event = EventFd.create();
  try {
    event.signal();
    if (!event.drain()) throw new Error("an event that was signalled did not arrive");
  } finally {
    event.close();
  }
}

/** Send memory through a socket in the file system, and see that it is the same memory on the other side. */
function trySocket(): void {
  const folder = mkdtempSync(join(tmpdir(), "virtio-doctor-"));
  const open: number[] = [];
  const keep = (fd: number): number => {
    open.push(fd);
    return fd;
  };
  try {
    const path = join(folder, "socket");
    const listener = keep(listenUnix(path));
    const left = keep(connectUnix(path));
    const right = keep(acceptUnix(listener) ?? -1);
    const memory = keep(createMemfd("virtio-doctor", PROBE_BYTES));
    sendMessage(left, new Uint8Array(1), [memory]);
    const received: number[] = [];
    receiveMessage(right, new Uint8Array(1), received);
    open.push(...received);
    if (!isSameMemory(memory, received[0] ?? -1))
      throw new Error("memory sent through a socket arrived as other memory");
  } finally {
    for (const fd of open) if (fd >= 0) closeFd(fd);
    rmSync(folder, { recursive: true, force: true });
  }
}

function isSameMemory(here: number, there: number): boolean {
  const views = [mapShared(here, PROBE_BYTES), mapShared(there, PROBE_BYTES)];
  const [ours, theirs] = views.map((view) => new Uint8Array(view));
  if (ours !== undefined) ours[0] = 42;
  const isSame = theirs?.[0] === 42;
  for (const view of views) unmapShared(view);
  return isSame;
}

async function tryDisk(): Promise<void> {
  const { openBlock } = await import("../index.js");
  await using disk = await openBlock("ram:1M");
  await disk.write(new Uint8Array(512).fill(7), { position: 512 });
  const back = new Uint8Array(512);
  await disk.read(back, { position: 512 });
  if (back.some((byte) => byte !== 7)) throw new Error("a disk gave back other bytes than were written");
}
