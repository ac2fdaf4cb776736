/** MemoryRegion: size, address, seals, and that nothing is left when it is closed. */

import assert from "node:assert/strict";
import test from "node:test";
import { MemoryRegion } from "../../src/memory/index.js";
import { fileSize, MemfdSeal, memfdSeals } from "../../src/sys/index.js";
import { mappings, openFds } from "../sys/helpers.js";

const MIB = 2 ** 20;

test("a region is whole 2 MiB, aligned, sealed and mapped", () => {
  const region = MemoryRegion.create({ name: "region", size: 2 * MIB + 1, iova: 6 * MIB });
  assert.equal(region.size, 4 * MIB);
  assert.equal(region.iova, 6 * MIB);
  assert.equal(region.buffer.byteLength, 4 * MIB);
  assert.equal(fileSize(region.fd), 4 * MIB);
  assert.equal(memfdSeals(region.fd) & MemfdSeal.SHRINK, MemfdSeal.SHRINK);
  const [line = ""] = mappings("region");
  assert.equal(BigInt(`0x${line.split("-")[0] ?? ""}`) % BigInt(2 * MIB), 0n);
  region.close();
});

test("closing detaches, unmaps and closes, once", () => {
  const before = openFds();
  const region = MemoryRegion.create({ name: "closing", size: 1, iova: 2 * MIB });
  const view = new Uint8Array(region.buffer);
  assert.equal(view.length, 2 * MIB);
  region.close();
  region.close();
  assert.equal(view.length, 0);
  assert.equal(region.buffer.byteLength, 0);
  assert.equal(region.fd, -1);
  assert.deepEqual(mappings("closing"), []);
  assert.equal(openFds(), before);
});

test("a region attached elsewhere is the same memory, and its descriptor is not touched", () => {
  const before = openFds();
  const region = MemoryRegion.create({ name: "attached", size: 3 * MIB, iova: 8 * MIB });
  const other = MemoryRegion.attach(region);
  assert.deepEqual([other.size, other.iova, other.fd], [4 * MIB, 8 * MIB, -1]);
  assert.equal(mappings("attached").length, 2);
  new Uint8Array(region.buffer)[4 * MIB - 1] = 42;
  assert.equal(new Uint8Array(other.buffer)[4 * MIB - 1], 42);
  region.close();
  new Uint8Array(other.buffer)[0] = 1; // lives on
  other.close();
  other.close();
  assert.equal(other.buffer.byteLength, 0);
  assert.deepEqual(mappings("attached"), []);
  assert.equal(openFds(), before);
});

test("what cannot be attached is refused", () => {
  const region = MemoryRegion.create({ name: "refused", size: 1, iova: 2 * MIB });
  const { fd, size, iova } = region;
  assert.throws(() => MemoryRegion.attach({ fd, size: size + 1, iova }), { code: "ERR_VIRTIO_ARGUMENT" });
  region.close();
  assert.throws(() => MemoryRegion.attach({ fd, size, iova }), { code: "ERR_VIRTIO_SYSCALL" });
  assert.deepEqual(mappings("refused"), []);
});

test("200 regions leave no descriptor and no mapping", () => {
  const before = openFds();
  for (let i = 0; i < 200; i++) MemoryRegion.create({ name: "many", size: 64 * MIB, iova: 2 * MIB }).close();
  assert.deepEqual(mappings("many"), []);
  assert.equal(openFds(), before);
});

test("wrong sizes and addresses are refused, and leave nothing", () => {
  const before = openFds();
  const refused = { code: "ERR_VIRTIO_ARGUMENT" };
  const good = { name: "wrong", size: 4096, iova: 2 * MIB };
  for (const size of [0, -1, 1.5, 2 ** 53 - 1]) {
    assert.throws(() => MemoryRegion.create({ ...good, size }), refused, String(size));
  }
  for (const iova of [0, 4096, 3 * MIB, -2 * MIB, 2 ** 53]) {
    assert.throws(() => MemoryRegion.create({ ...good, iova }), refused, String(iova));
  }
  assert.throws(() => MemoryRegion.create({ ...good, huge: true } as typeof good), refused);
  assert.throws(() => MemoryRegion.create({ ...good, hugePages: "4K" as "2M" }), refused);
  // More than an address space holds: refused by the engine or by the kernel, whoever is asked first.
  assert.throws(() => MemoryRegion.create({ ...good, size: 2 ** 48 }));
  assert.deepEqual(mappings("wrong"), []);
  assert.equal(openFds(), before);
});
