/**
 * Builds what the guest boots, once, into a cache outside the repository: a kernel and busybox from Debian's
 * packages, and an initramfs with the modules that the tests need.
 */

import { execFile, spawn } from "node:child_process";
import { createHash } from "node:crypto";
import { once } from "node:events";
import { chmodSync, cpSync, existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync } from "node:fs";
import { symlinkSync, writeFileSync } from "node:fs";
import { homedir } from "node:os";
import { basename, join } from "node:path";
import { promisify } from "node:util";

const run = promisify(execFile);

/** The package that depends on the kernel of today. 6.1, the default of Debian 12, has no vDPA. */
const KERNEL = "linux-image-6.12-amd64";

/** Modules in the order in which they are loaded. What the kernel has built in is left out. */
const MODULES = [
  ["vfio", "vfio_iommu_type1", "irqbypass", "vfio-pci-core", "vfio-pci"],
  ["vdpa", "vhost_iotlb", "vduse", "vhost", "vhost_vdpa"],
  ["netfs", "9pnet", "9pnet_virtio", "9p", "virtio_console", "virtio_blk", "minix"],
].flat();

/** The first program: what every run has in common. The rest of the way is start.sh in the job folder. */
const INIT = `#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /host /job
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
fail() { echo "guest: $1"; poweroff -f; }
for module in /modules/*.ko; do insmod "$module" || fail "cannot load $module"; done
share() { mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,$3" "$1" "$2" || fail "cannot mount $1"; }
share host /host ro,cache=loose
share job /job rw
. /job/start.sh
fail "start.sh has ended"
`;

/** How long a build may take: most of it is the download of 100 MB. */
const BUILD_MS = 15 * 60_000;

/** Why there can be no guest here. */
export class GuestUnavailable extends Error {
  override readonly name = "GuestUnavailable";
}

/** Files that the guest boots from. */
export interface GuestFiles {
  readonly kernel: string;
  readonly initramfs: string;
}

/** The folder of the cache; it may be removed at any time. */
function cacheFolder(): string {
  return join(process.env["XDG_CACHE_HOME"] || join(homedir(), ".cache"), "virtio-driver");
}

/** The guest's folder: another recipe is another guest. */
function guestFolder(): string {
  const recipe = createHash("sha256")
    .update(JSON.stringify([KERNEL, MODULES, INIT]))
    .digest("hex");
  return join(cacheFolder(), `guest-${recipe.slice(0, 12)}`);
}

/** The guest when it has been built. */
export function builtGuest(): GuestFiles | undefined {
  const folder = guestFolder();
  if (!existsSync(folder)) return undefined;
  return { kernel: join(folder, "kernel"), initramfs: join(folder, "initramfs") };
}

/**
 * The guest, built now if it is not there yet. When two processes want to build it, one waits for the other.
 *
 * @throws GuestUnavailable when packages cannot be had.
 */
export async function buildGuest(log: (line: string) => void): Promise<GuestFiles> {
  const built = builtGuest();
  if (built !== undefined) return built;
  mkdirSync(cacheFolder(), { recursive: true });
  const unlock = await lock(join(cacheFolder(), "lock"));
  try {
    if (builtGuest() === undefined) await build(guestFolder(), log);
  } finally {
    await unlock();
  }
  const guest = builtGuest();
  if (guest === undefined) throw new Error(`${guestFolder()} is not there after its build`);
  return guest;
}

/**
 * Take a lock that ends with this process, whatever happens to it: a child holds it while its standard input is open.
 */
async function lock(path: string): Promise<() => Promise<void>> {
  const seconds = String(BUILD_MS / 1000);
  const child = spawn("flock", ["--timeout", seconds, path, "sh", "-c", "echo locked; exec cat"], {
    stdio: ["pipe", "pipe", "inherit"],
  });
  const ended = once(child, "close");
  await Promise.race([
    once(child.stdout, "data"),
    ended.then(() => {
      throw new Error(`${path} was locked for ${seconds} s: does another build hang?`);
    }),
  ]);
  return async () => {
    child.stdin.end();
    await ended;
  };
}

/** Build into a folder beside `folder`, which appears only when it is whole. */
async function build(folder: string, log: (line: string) => void): Promise<void> {
  const partial = `${folder}.partial`;
  rmSync(partial, { recursive: true, force: true });
  mkdirSync(join(partial, "packages"), { recursive: true });
  const tree = join(partial, "tree");
  mkdirSync(tree);

  const depends = await step("apt-cache", ["depends", KERNEL]);
  const kernelPackage = /Depends: (linux-image-\S+)/.exec(depends)?.[1];
  if (kernelPackage === undefined) {
    throw new GuestUnavailable(`apt-cache knows no ${KERNEL} (is this Debian 12? try: apt-get update)`);
  }
  log(`downloading ${kernelPackage} and busybox-static`);
  // Without the user _apt, who may not write here: root downloads as root.
  const sandbox = process.getuid?.() === 0 ? ["-o", "APT::Sandbox::User=root"] : [];
  await step("apt-get", ["download", ...sandbox, kernelPackage, "busybox-static"], join(partial, "packages"));

  log("unpacking");
  for (const name of readdirSync(join(partial, "packages"))) {
    await step("dpkg-deb", ["--extract", join(partial, "packages", name), tree]);
  }
  const unpacked = readdirSync(tree, { recursive: true, encoding: "utf8" });
  const find = (pattern: RegExp): string | undefined => unpacked.find((path) => pattern.test(path));
  const busybox = join(tree, find(/(^|\/)bin\/busybox$/) ?? missing("busybox"));
  const builtin = readFileSync(join(tree, find(/modules\.builtin$/) ?? missing("modules.builtin")), "utf8");

  log("packing the initramfs");
  const root = join(partial, "root");
  for (const name of ["bin", "modules"]) mkdirSync(join(root, name), { recursive: true });
  cpSync(busybox, join(root, "bin", "busybox"));
  symlinkSync("busybox", join(root, "bin", "sh"));
  writeFileSync(join(root, "init"), INIT, { mode: 0o755 });
  for (const [index, name] of MODULES.entries()) {
    const file = find(new RegExp(`/${name}\\.ko(\\.xz)?$`));
    if (file === undefined) {
      if (!builtin.includes(`/${name}.ko\n`)) missing(`module ${name}`);
      continue;
    }
    const target = join(root, "modules", `${String(index).padStart(2, "0")}-${name}.ko`);
    const { stdout } = await run(busybox, [file.endsWith(".xz") ? "xzcat" : "cat", join(tree, file)], {
      encoding: "buffer",
      maxBuffer: 64 * 1024 * 1024,
    });
    writeFileSync(target, stdout);
  }
  chmodSync(root, 0o755);
  await step(
    "sh",
    ["-c", 'find . | "$1" cpio -o -H newc -R 0:0 >"$2"', "sh", busybox, join(partial, "initramfs")],
    root,
  );
  renameSync(join(tree, find(/vmlinuz-/) ?? missing("kernel")), join(partial, "kernel"));
  const versions = readdirSync(join(partial, "packages")).map((name) => basename(name, ".deb"));
  writeFileSync(join(partial, "packages.txt"), `${versions.join("\n")}\n`);
  for (const name of ["packages", "tree", "root"]) rmSync(join(partial, name), { recursive: true });
  renameSync(partial, folder);
  log(`built ${folder}`);
}

/** Run a program of the build. */
async function step(program: string, args: readonly string[], cwd?: string): Promise<string> {
  try {
    const { stdout } = await run(program, args, { cwd, timeout: BUILD_MS, maxBuffer: 16 * 1024 * 1024 });
    return stdout;
  } catch (error) {
    throw new GuestUnavailable(`the guest cannot be built: ${error instanceof Error ? error.message : String(error)}`);
  }
}

function missing(what: string): never {
  throw new Error(`the packages of the guest have no ${what}: the recipe in test/guest/host/build.ts is out of date`);
}
