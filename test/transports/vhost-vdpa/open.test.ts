/** Opening: what is no device, who may not, what a device must not say of itself. */

import assert from "node:assert/strict";
import { execFileSync, spawnSync } from "node:child_process";
import { chmodSync, mkdtempSync, openSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, test } from "node:test";
import { fileURLToPath } from "node:url";
import { openBlock } from "../../../src/index.js";
import { FakeVhostVdpa, type FakeVhostVdpaOptions } from "../../../src/testing/index.js";
import { VhostVdpa, type VhostVdpaTarget } from "../../../src/transports/index.js";
import { virtio } from "../../cli/command.js";
import { openFds } from "../../sys/helpers.js";
import { held, virtioError } from "../support.js";
import { diskKernel, open } from "./support.js";

const MAIN = fileURLToPath(new URL("../../../src/cli/main.js", import.meta.url));

/** A folder that is gone after the test. */
function folder(t: { after(job: () => void): void }): string {
  const path = mkdtempSync(join(tmpdir(), "virtio-vdpa-"));
  t.after(() => rmSync(path, { recursive: true }));
  return path;
}

describe("what is no vhost-vdpa device", () => {
  test("says which path, why, and what such a device is called", async (t) => {
    const path = join(folder(t), "file");
    writeFileSync(path, "");
    const before = openFds();
    const cases: readonly (readonly [string, string])[] = [
      ["/nowhere/vhost-vdpa-0", "/nowhere/vhost-vdpa-0: ENOENT from stat; no such device"],
      ["/dev/null/vhost-vdpa-0", "ENOTDIR"],
      ["/tmp", "/tmp is not a vhost-vdpa device (it is not a character device)"],
      [path, "(it is not a character device); they are called /dev/vhost-vdpa-0"],
      ["/dev/null", "/dev/null is not a vhost-vdpa device (it does not know VHOST_SET_OWNER)"],
      ["/dev/zero", "/dev/zero is not a vhost-vdpa device"],
    ];
    for (const [where, words] of cases) {
      await assert.rejects(VhostVdpa.open(where), virtioError("ERR_VIRTIO_CONNECT", words));
      await assert.rejects(VhostVdpa.open({ path: where }), virtioError("ERR_VIRTIO_CONNECT", words));
      await assert.rejects(openBlock(`vhost-vdpa:${where}`), virtioError("ERR_VIRTIO_CONNECT", words));
    }
    assert.equal(openFds(), before);
  });

  test("a descriptor of something else is closed", async () => {
    const before = openFds();
    await assert.rejects(
      VhostVdpa.open({ fd: openSync("/dev/null", "r+") }),
      virtioError("ERR_VIRTIO_CONNECT", "is not a vhost-vdpa device"),
    );
    assert.equal(openFds(), before);
    await assert.rejects(VhostVdpa.open({ fd: 0x7fff_fffe }), virtioError("ERR_VIRTIO_SYSCALL", "EBADF"));
  });

  test("a device that this user may not open", (t) => {
    if (process.getuid?.() !== 0) {
      t.diagnostic("only root can be somebody else");
      return;
    }
    const parent = folder(t);
    chmodSync(parent, 0o755);
    const path = join(parent, "device");
    // The numbers of /dev/null.
    execFileSync("mknod", ["-m", "600", path, "c", "1", "3"]);
    const { status, stderr } = spawnSync(
      "setpriv",
      ["--reuid=65534", "--regid=65534", "--clear-groups", process.execPath, MAIN, "info", `vhost-vdpa:${path}`],
      { encoding: "utf8" },
    );
    assert.equal(status, 4);
    assert.match(stderr, /ERR_VIRTIO_PERMISSION: .*: EACCES from open; read and write permission is needed/);
  });

  test("the command says it in one line", async () => {
    const { code, stderr } = await virtio(["info", "vhost-vdpa:/dev/null"]);
    assert.equal(code, 4);
    assert.match(stderr, /^virtio: ERR_VIRTIO_CONNECT: \/dev\/null is not a vhost-vdpa device/);
  });

  test("arguments that cannot be", async () => {
    const targets: unknown[] = [
      "",
      "a\0b",
      7,
      null,
      {},
      { path: 1 },
      { fd: -1 },
      { fd: 2 ** 31 },
      { node: 1 },
      { fd: 1, x: 1 },
    ];
    for (const target of targets) {
      await assert.rejects(VhostVdpa.open(target as VhostVdpaTarget), { code: "ERR_VIRTIO_ARGUMENT" });
    }
    await assert.rejects(VhostVdpa.open("/dev/null", { timeout: 0 }), { code: "ERR_VIRTIO_ARGUMENT" });
    const reason = new Error("enough");
    await assert.rejects(VhostVdpa.open("/dev/null", { signal: AbortSignal.abort(reason) }), reason);
  });
});

describe("a device of another type", () => {
  test("is refused as a disk, by its number, and closed", async () => {
    const { kernel } = diskKernel(0n, { deviceType: 1 });
    const device = await VhostVdpa.open({ node: kernel.open() });
    assert.equal(device.deviceType, 1);
    const { BlockDevice } = await import("../../../src/index.js");
    await assert.rejects(
      BlockDevice.open(device),
      virtioError("ERR_VIRTIO_FEATURES", "is a virtio device of type 1, expected 2 (block)"),
    );
    assert.equal(kernel.log.at(-1), "close");
  });
});

describe("a device that says absurd things of itself", () => {
  const refusals: readonly (readonly [
    string,
    FakeVhostVdpaOptions,
    "ERR_VIRTIO_QUEUES" | "ERR_VIRTIO_MEMORY",
    string,
  ])[] = [
    ["queues of 0 descriptors", { maxQueueSize: 0 }, "ERR_VIRTIO_QUEUES", "0 descriptors"],
    ["no queues", { maxQueues: 0 }, "ERR_VIRTIO_QUEUES", "no queues at all"],
    ["no addresses", { iovaRange: { first: 1n, last: 0n } }, "ERR_VIRTIO_MEMORY", "0x1 to 0x0"],
    ["a page of addresses", { iovaRange: { first: 0n, last: 4095n } }, "ERR_VIRTIO_MEMORY", "no room for a region"],
    ["less than a region", { iovaRange: { first: 0n, last: 0x3f_fffen } }, "ERR_VIRTIO_MEMORY", "0x0 to 0x3ffffe"],
    ["no aligned region", { iovaRange: { first: 0x20_0001n, last: 0x5f_fffen } }, "ERR_VIRTIO_MEMORY", "2097152 bytes"],
    ["addresses far away", { iovaRange: { first: 1n << 60n, last: (1n << 61n) - 1n } }, "ERR_VIRTIO_MEMORY", "cannot"],
  ];
  for (const [name, options, code, words] of refusals) {
    test(`${name}: refused when it is opened`, async () => {
      const before = held();
      const kernel = new FakeVhostVdpa(options);
      await assert.rejects(VhostVdpa.open({ node: kernel.open() }), virtioError(code, words));
      assert.equal(kernel.log.at(-1), "close");
      assert.deepEqual(held(), before);
    });
  }

  test("room for one region is room for one", async (t) => {
    const { device } = await open(t, { iovaRange: { first: 0n, last: 0x3f_ffffn } });
    const region = await device.mapMemory(1);
    assert.equal(region.iova, 0x20_0000);
    await assert.rejects(device.mapMemory(1), virtioError("ERR_VIRTIO_MEMORY", "device addresses"));
    await device.unmapMemory(region);
    assert.equal((await device.mapMemory(1)).iova, 0x20_0000);
  });

  test("more of everything than there can be is cut to what can", async (t) => {
    const { device } = await open(t, { maxQueues: 0xffff_ffff, maxQueueSize: 0xffff });
    assert.deepEqual([device.maxQueues, device.maxQueueSize], [65_536, 32_768]);
    const odd = await open(t, { maxQueueSize: 1000 });
    assert.equal(odd.device.maxQueueSize, 512);
    const high = await open(t, { iovaRange: { first: 1n << 40n, last: (1n << 64n) - 1n } });
    assert.equal((await high.device.mapMemory(1)).iova, 2 ** 40);
  });
});
