/** What the guest has to offer before a driver can be blamed: devices, their drivers, groups, vectors, memory. */

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { existsSync, readdirSync, readFileSync, readlinkSync, statSync } from "node:fs";
import { totalmem } from "node:os";
import { basename, join } from "node:path";
import { test } from "node:test";
import {
  GUEST_DISK_BYTES,
  GUEST_FUNCTION_NAMES,
  GUEST_FUNCTIONS,
  GUEST_MEMORY_MIB,
  type GuestFunctionName,
} from "./protocol.js";
import { imageSha256, qmp, resizeDisk } from "./support/host.js";

/** Device ids of PCI functions: a modern virtio device has 0x1040 and its class, a legacy disk 0x1001. */
const DEVICE_IDS: Readonly<Partial<Record<GuestFunctionName, string>>> = { LEGACY: "0x1001", OTHER: "0x1044" };
const MODERN_DISK = "0x1042";

const PCI_CAP_ID_MSIX = 0x11;
const PCI_CAP_ID_VENDOR = 0x09;

function variable(name: string): string {
  const value = process.env[name];
  assert.ok(value !== undefined && value !== "", `the environment has no ${name}`);
  return value;
}

function sysfs(name: GuestFunctionName): string {
  return join("/sys/bus/pci/devices", variable(`VIRTIO_GUEST_PCI_${name}`));
}

/** The capabilities of a function: where each kind begins in the config space. */
function capabilities(config: Buffer): { readonly id: number; readonly offset: number }[] {
  const list: { id: number; offset: number }[] = [];
  for (let offset = config.readUInt8(0x34); offset !== 0; offset = config.readUInt8(offset + 1)) {
    list.push({ id: config.readUInt8(offset), offset });
    assert.ok(list.length < 48, "a loop");
  }
  return list;
}

/** How many MSI-X vectors a function has. */
function vectors(name: GuestFunctionName): number {
  const config = readFileSync(join(sysfs(name), "config"));
  const capability = capabilities(config).find(({ id }) => id === PCI_CAP_ID_MSIX);
  return capability === undefined ? 0 : (config.readUInt16LE(capability.offset + 2) & 0x7ff) + 1;
}

/** Other functions in the IOMMU group. */
function neighbours(name: GuestFunctionName): string[] {
  const address = variable(`VIRTIO_GUEST_PCI_${name}`);
  return readdirSync(join(sysfs(name), "iommu_group", "devices")).filter((other) => other !== address);
}

for (const name of GUEST_FUNCTION_NAMES) {
  const { driver, purpose } = GUEST_FUNCTIONS[name];
  test(`${name} (${purpose}) is bound to ${driver}`, () => {
    const read = (file: string) => readFileSync(join(sysfs(name), file), "utf8").trim();
    assert.equal(read("vendor"), "0x1af4");
    assert.equal(read("device"), DEVICE_IDS[name] ?? MODERN_DISK);
    assert.equal(basename(readlinkSync(join(sysfs(name), "driver"))), driver);
    const structures = capabilities(readFileSync(join(sysfs(name), "config"))).filter(
      ({ id }) => id === PCI_CAP_ID_VENDOR,
    );
    if (name === "LEGACY") assert.equal(structures.length, 0, "it has virtio structures");
    else assert.ok(structures.length >= 4, `${structures.length} virtio structures`);
  });

  test(`${name} is ${name === "SHARED" ? "one of two" : "alone"} in its IOMMU group`, () => {
    const group = basename(readlinkSync(join(sysfs(name), "iommu_group")));
    assert.equal(existsSync(`/dev/vfio/${group}`), driver === "vfio-pci");
    assert.equal(neighbours(name).length, name === "SHARED" ? 1 : 0);
    for (const other of neighbours(name)) {
      assert.equal(basename(readlinkSync(join("/sys/bus/pci/devices", other, "driver"))), "virtio-pci");
    }
  });
}

test("MSI-X: a vector a queue and one for the configuration, too few, none", () => {
  assert.equal(vectors("SPLIT"), 3);
  assert.equal(vectors("PACKED"), 3);
  assert.equal(vectors("FEW_VECTORS"), 2);
  assert.equal(vectors("INTX"), 0);
  assert.equal(readFileSync(join(sysfs("INTX"), "config")).readUInt8(0x3d), 1, "no INTx pin");
});

test("PACKED offers packed rings, all disks behind the IOMMU two queues", async () => {
  for (const name of GUEST_FUNCTION_NAMES.filter((known) => GUEST_FUNCTIONS[known].disk && known !== "LEGACY")) {
    const property = (of: string) => qmp("qom-get", { path: `/machine/peripheral/${name}`, property: of });
    assert.equal(await property("packed"), name === "PACKED");
    assert.equal(await property("num-queues"), 2);
    assert.equal(await property("iommu_platform"), true);
    assert.equal(await property("ats"), true);
  }
});

test("/dev/vfio/vfio and the IOMMU are there", () => {
  assert.ok(statSync("/dev/vfio/vfio").isCharacterDevice());
  assert.ok(readdirSync("/sys/class/iommu").length > 0);
});

test("UNBOUND is a block device of the kernel", () => {
  const virtio = readdirSync(sysfs("UNBOUND")).find((entry) => entry.startsWith("virtio"));
  assert.ok(virtio !== undefined);
  const [disk] = readdirSync(join(sysfs("UNBOUND"), virtio, "block"));
  assert.ok(statSync(`/dev/${disk}`).isBlockDevice());
  assert.equal(Number(readFileSync(`/sys/block/${disk}/size`, "utf8")) * 512, GUEST_DISK_BYTES);
});

test("the vhost-vdpa node and its image are there", () => {
  assert.ok(statSync(variable("VIRTIO_GUEST_VDPA")).isCharacterDevice());
  assert.equal(statSync(variable("VIRTIO_GUEST_VDPA_IMAGE")).size, GUEST_DISK_BYTES);
});

test("there is the memory that the guest was given", () => {
  assert.ok(totalmem() > GUEST_MEMORY_MIB * 1024 * 1024 * 0.9, `${totalmem()} bytes`);
});

test("the host answers: QEMU's monitor, the images, a resize", async () => {
  assert.equal(await imageSha256("SPLIT", 4096, 8192), createHash("sha256").update(Buffer.alloc(8192)).digest("hex"));
  await assert.rejects(imageSha256("SPLIT", GUEST_DISK_BYTES - 512, 1024), /the image of SPLIT ends at/);
  await assert.rejects(qmp("no-such-command"), /no-such-command/);
  const size = async () => {
    const nodes = (await qmp("query-named-block-nodes")) as {
      "node-name": string;
      image: { "virtual-size": number };
    }[];
    return nodes.find((node) => node["node-name"] === "SPLIT")?.image["virtual-size"];
  };
  await resizeDisk("SPLIT", 2 * GUEST_DISK_BYTES);
  assert.equal(await size(), 2 * GUEST_DISK_BYTES);
  await resizeDisk("SPLIT", GUEST_DISK_BYTES);
  assert.equal(await size(), GUEST_DISK_BYTES);
});
