/** The disks that `npm run bench` reads: those of one qemu-storage-daemon over vhost-user and NBD, and our own. */

import { execFileSync } from "node:child_process";
import { randomFillSync } from "node:crypto";
import { closeSync, existsSync, mkdtempSync, openSync, rmSync, writeSync } from "node:fs";
import { join } from "node:path";
import { Daemon, missingPeers, TemporaryFolder } from "../test/support/peers.js";
import type { Case, DiskName } from "./cases.js";

const SHARED_MEMORY = "/dev/shm";
const DISK_MIB = 256;

const DAEMON = "qemu-storage-daemon";

/** What is there to be measured, and why the rest is not. */
export class Peers {
  /** What could not be measured, and why. */
  readonly missing: readonly string[];
  private readonly daemon: Daemon | undefined;
  private readonly folder: TemporaryFolder;
  private readonly shared: string | undefined;
  private readonly hasFio: boolean;

  private constructor(folder: TemporaryFolder, shared: string | undefined, daemon: Daemon | undefined) {
    const noFio = missingPeers(["fio"]);
    this.folder = folder;
    this.shared = shared;
    this.daemon = daemon;
    this.hasFio = noFio === undefined;
    const missing: string[] = [];
    if (shared === undefined) missing.push(`${SHARED_MEMORY} is not there: nothing was read from a file`);
    if (daemon === undefined) missing.push(`${missingPeers([DAEMON])}: nothing was measured through it`);
    if (noFio !== undefined) missing.push(`${noFio}: nothing was measured over NBD`);
    this.missing = missing;
  }

  /** Start the daemon and write the file, as far as that is possible here. */
  static async start(): Promise<Peers> {
    const folder = new TemporaryFolder();
    const shared = existsSync(SHARED_MEMORY) ? mkdtempSync(join(SHARED_MEMORY, "virtio-bench-")) : undefined;
    try {
      if (shared !== undefined) writeNoise(join(shared, "disk.img"));
      const hasDaemon = shared !== undefined && missingPeers([DAEMON]) === undefined;
      return new Peers(folder, shared, hasDaemon ? await startDaemon(folder, join(shared, "disk.img")) : undefined);
    } catch (error) {
      folder.close();
      if (shared !== undefined) rmSync(shared, { recursive: true });
      throw error;
    }
  }

  /** Whether a case can be measured here. */
  has({ disk, way }: Case): boolean {
    if (way.by === "fs") return this.shared !== undefined;
    if (disk === "embedded") return true;
    return this.daemon !== undefined && (way.by !== "nbd" || this.hasFio);
  }

  /** Address of a disk over vhost-user. */
  address(disk: DiskName): string {
    return disk === "embedded" ? `ram:${DISK_MIB}M` : `vhost-user:${this.folder.file(`${disk}.sock`)}`;
  }

  /** Path of the file. */
  get file(): string {
    return join(this.shared ?? SHARED_MEMORY, "disk.img");
  }

  /** Socket of the NBD server, whose exports have the names of the disks. */
  get nbdSocket(): string {
    return this.folder.file("nbd.sock");
  }

  /** Names and versions of the programs that were measured with. */
  versions(): string[] {
    const versions = this.daemon === undefined ? [] : [firstLine(DAEMON)];
    return this.hasFio ? [...versions, firstLine("fio")] : versions;
  }

  /** Stop the daemon, remove the file. */
  async close(): Promise<void> {
    await this.daemon?.stop();
    this.folder.close();
    if (this.shared !== undefined) rmSync(this.shared, { recursive: true });
  }
}

/** Both disks by one daemon, each exported both ways. */
function startDaemon(folder: TemporaryFolder, file: string): Promise<Daemon> {
  const disks: readonly (readonly [DiskName, string])[] = [
    ["null", `driver=null-co,size=${DISK_MIB * 2 ** 20},read-zeroes=off`],
    ["file", `driver=file,filename=${file},read-only=on`],
  ];
  const exports = disks.flatMap(([name]) => [
    ...["--export", `type=nbd,id=nbd-${name},node-name=${name},name=${name}`],
    ...[
      "--export",
      `type=vhost-user-blk,id=${name},node-name=${name},addr.type=unix,addr.path=${folder.file(`${name}.sock`)}`,
    ],
  ]);
  // Exports are made in the order of the words: when the last one listens, all do.
  return Daemon.start(folder.file("file.sock"), DAEMON, [
    ...disks.flatMap(([name, driver]) => ["--blockdev", `${driver},node-name=${name}`]),
    ...["--nbd-server", `addr.type=unix,addr.path=${folder.file("nbd.sock")}`, ...exports],
  ]);
}

/** A file without holes: a hole costs less to read than data. */
function writeNoise(path: string): void {
  const noise = randomFillSync(new Uint8Array(1 << 20));
  const fd = openSync(path, "wx");
  for (let i = 0; i < DISK_MIB; i++) writeSync(fd, noise);
  closeSync(fd);
}

function firstLine(program: string): string {
  return execFileSync(program, ["--version"], { encoding: "utf8" }).split("\n")[0];
}
