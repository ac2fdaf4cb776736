/** PCI devices by VFIO in a running kernel: disks on split and packed rings, interrupts, the IOMMU, and every way to end. */

import assert from "node:assert/strict";
import { spawn, spawnSync } from "node:child_process";
import { createHash, randomBytes } from "node:crypto";
import { once } from "node:events";
import { readdirSync, readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { describe, test } from "node:test";
import {
  BlockDevice,
  BufferPool,
  type MemoryRegion,
  type OpenBlockOptions,
  openBlock,
  Pci,
  VirtioBlkQueue,
  VirtioFeature,
} from "../../src/index.js";
import { settle, writeAndVerify, zeroAndVerify } from "../support/block-suite.js";
import { GUEST_DISK_BYTES, type GuestFunctionName } from "./protocol.js";
import { imageSha256, resizeDisk } from "./support/host.js";

const INDEX = new URL("../../src/index.js", import.meta.url).href;
const MIB = 2 ** 20;

/** The PCI address of a function of the guest; its tests are skipped where it is not given. */
function guest(name: GuestFunctionName): { pci: string; address: string; skip: string | false } {
  const pci = process.env[`VIRTIO_GUEST_PCI_${name}`];
  return { pci: pci ?? "", address: `pci:${pci}`, skip: pci === undefined ? `no VIRTIO_GUEST_PCI_${name}` : false };
}

/** Interrupts that the kernel has passed on from a function, by vector. */
function interrupts(pci: string): number[] {
  return readFileSync("/proc/interrupts", "utf8")
    .split("\n")
    .filter((line) => line.includes("vfio-") && line.includes(`(${pci})`))
    .map((line) => {
      const counts = /^\s*\d+:((?:\s+\d+)+)/.exec(line)?.[1] ?? "";
      return counts.split(/\s+/).reduce((sum, count) => sum + Number(count), 0);
    });
}

/** What this process has open and mapped. */
function held(): { descriptors: number; mappings: number } {
  return {
    descriptors: readdirSync("/proc/self/fd").length,
    mappings: readFileSync("/proc/self/maps", "utf8")
      .split("\n")
      .filter((line) => /\[vfio-device\]|memfd:virtio-driver/.test(line)).length,
  };
}

/** What is on the disk as the host reads its image is what was written. */
async function checkImage(name: GuestFunctionName, model: Uint8Array): Promise<void> {
  assert.equal(await imageSha256(name, 0, model.length), createHash("sha256").update(model).digest("hex"));
}

/** Enough for the rings of {@link makeQueue}. */
const RINGS_BYTES = 65_536;

/** A queue of 16 descriptors for requests of a page, in memory of its own. */
async function makeQueue(device: Pci, features: bigint, rings?: MemoryRegion): Promise<VirtioBlkQueue> {
  const { buffer, iova } = rings ?? (await device.mapMemory(RINGS_BYTES));
  const limits = { maxSegments: 1, maxSegmentBytes: 4096, maxRequestBytes: 4096 };
  const shape = { index: 0, queueSize: 16, features, limits, capacity: GUEST_DISK_BYTES / 512 };
  return new VirtioBlkQueue({ ...shape, memory: { buffer, offset: 0, iova } });
}

interface Variant {
  readonly name: string;
  readonly depth: number;
  readonly options: OpenBlockOptions;
}

const VARIANTS: readonly Variant[] = [
  { name: "one at a time, event", depth: 1, options: { mode: "event" } },
  { name: "depth 8, poll", depth: 8, options: { mode: "poll" } },
  { name: "depth 64, hybrid, 2 queues", depth: 64, options: { queues: 2 } },
  {
    name: "depth 64, event, 2 queues, no EVENT_IDX",
    depth: 64,
    options: { queues: 2, mode: "event", eventIdx: false },
  },
  { name: "depth 64, a ring of 16 that is always full", depth: 64, options: { queueSize: 16, mode: "event" } },
  {
    name: "depth 16, poll, 2 queues, no indirect descriptors",
    depth: 16,
    options: { queues: 2, mode: "poll", indirect: false },
  },
];

for (const name of ["SPLIT", "PACKED"] as const) {
  const { pci, address, skip } = guest(name);

  describe(name, { skip }, () => {
    test("open and info", async () => {
      await using disk = await openBlock(address);
      const { info } = disk;
      assert.equal(info.address, address);
      assert.equal(info.capacity, GUEST_DISK_BYTES);
      assert.equal(info.format, name.toLowerCase());
      assert.equal(info.maxQueues, 2);
      for (const feature of ["VERSION_1", "ACCESS_PLATFORM", "EVENT_IDX", "INDIRECT_DESC", "MQ", "FLUSH"]) {
        assert.ok(info.features.includes(feature), `${feature} is not in ${info.features.join(" ")}`);
      }
    });

    for (const [index, variant] of VARIANTS.entries()) {
      test(`${variant.name}: what is written is read, and is in the image`, async () => {
        const disk = await openBlock(address, variant.options);
        try {
          const model = await writeAndVerify(disk, variant.depth, 500 + index);
          await zeroAndVerify(disk, model);
          await checkImage(name, model);
        } finally {
          await disk.close();
        }
      });
    }

    test("discard and flush", async () => {
      await using disk = await openBlock(address);
      await disk.write(new Uint8Array(MIB).fill(1), { position: 0 });
      await disk.discard({ position: 0, length: MIB });
      await disk.write(new Uint8Array(512).fill(2), { position: 512 });
      await disk.flush();
      const { buffer } = await disk.read(new Uint8Array(512), { position: 512 });
      assert.ok(buffer.every((byte) => byte === 2));
    });

    test("mode event sleeps until an interrupt comes, of both queues", async () => {
      await using disk = await openBlock(address, { queues: 2, mode: "event" });
      const before = interrupts(pci);
      assert.equal(before.length, 3, "a vector for each queue, and one for the config");
      for (let i = 0; i < 64; i++) {
        await Promise.all([disk.read(new Uint8Array(512)), disk.read(new Uint8Array(512), { position: 512 })]);
      }
      const after = interrupts(pci);
      const grown = after.map((count, i) => count - before[i]);
      assert.ok(grown.filter((count) => count > 0).length >= 2, `interrupts by vector: ${grown.join(" ")}`);
    });

    // The format of the rings makes no difference to it, and here it takes its time.
    if (name === "SPLIT") {
      test("open and close 50 times leave nothing behind", async () => {
        const cycle = async (): Promise<void> => {
          const device = await Pci.open(pci);
          try {
            const features = await device.negotiate(VirtioFeature.RING_PACKED);
            const { setup } = await makeQueue(device, features);
            const [queue] = await device.startQueues([setup]);
            queue.notify(0);
          } finally {
            await device.close();
          }
        };
        await cycle();
        await new Promise(setImmediate);
        const before = held();
        for (let i = 0; i < 50; i++) await cycle();
        await new Promise(setImmediate);
        assert.deepEqual(held(), before);
      });
    }

    test("a second opener is refused, in this process and another; the first goes on", async () => {
      await using disk = await openBlock(address);
      await assert.rejects(openBlock(address), { code: "ERR_VIRTIO_BUSY" });
      const code = `
        import { openBlock } from ${JSON.stringify(INDEX)};
        await openBlock(${JSON.stringify(address)}).catch((error) => console.log(error.code));`;
      const child = spawnSync(process.execPath, ["--input-type=module", "-e", code], { encoding: "utf8" });
      assert.equal(child.stdout, "ERR_VIRTIO_BUSY\n", child.stderr);
      assert.equal((await disk.read(new Uint8Array(512))).bytesRead, 512);
    });

    test("kill -9 in the middle of I/O; the next process starts afresh", async () => {
      const code = `
        import { openBlock } from ${JSON.stringify(INDEX)};
        const disk = await openBlock(${JSON.stringify(address)}, { queues: 2 });
        let count = 0;
        const go = async (seed) => {
          for (;;) {
            await disk.write(new Uint8Array(65536).fill(seed), { position: seed * 65536 });
            if (++count === 200) console.log("busy");
          }
        };
        await Promise.all(Array.from({ length: 32 }, (_, seed) => go(seed)));`;
      const child = spawn(process.execPath, ["--input-type=module", "-e", code], {
        stdio: ["ignore", "pipe", "inherit"],
      });
      const exit = once(child, "exit");
      const [line] = (await once(createInterface(child.stdout), "line")) as [string];
      assert.equal(line, "busy");
      child.kill("SIGKILL");
      await exit;
      const disk = await openBlock(address, { queues: 2 });
      try {
        await checkImage(name, await writeAndVerify(disk, 32, 900));
      } finally {
        await disk.close();
      }
    });

    test("memory that was withdrawn cannot be reached: the IOMMU blocks it, and the device goes on", async () => {
      const device = await Pci.open(pci);
      try {
        const features = await device.negotiate(
          VirtioFeature.RING_PACKED | VirtioFeature.EVENT_IDX | VirtioFeature.INDIRECT_DESC,
        );
        const queue = await makeQueue(device, features);
        const [notifier] = await device.startQueues([queue.setup]);
        queue.start(notifier, "event");
        const done = (): Promise<number> => {
          return new Promise((resolve) => {
            queue.onComplete = (_slot, status) => resolve(status);
            queue.kick();
          });
        };
        const lend = async (region: MemoryRegion) => {
          const pool = new BufferPool(() => Promise.reject(new Error("no more")));
          pool.addRegion(region);
          return pool.allocate(4096);
        };
        const kept = await lend(await device.mapMemory(4096));
        const gone = await device.mapMemory(4096);
        const buffer = await lend(gone);
        const pattern = randomBytes(4096);
        kept.bytes.set(pattern);
        queue.submitWrite(0, kept, 0, 4096);
        assert.equal(await done(), 0);
        queue.submitRead(0, buffer, 0, 4096);
        assert.equal(await done(), 0);
        assert.deepEqual(Buffer.from(buffer.bytes), pattern);

        await device.unmapMemory(gone);
        queue.submitRead(0, buffer, 0, 4096);
        await done(); // QEMU says 0 although nothing arrived
        assert.match(spawnSync("dmesg", { encoding: "utf8" }).stdout, /DMAR.*fault/i);
        kept.bytes.fill(0);
        queue.submitRead(0, kept, 0, 4096);
        assert.equal(await done(), 0);
        assert.deepEqual(Buffer.from(kept.bytes), pattern);
        queue.stop();
      } finally {
        await device.close();
      }
    });

    test("a queue is reset and goes on elsewhere, where RING_RESET is offered", async (t) => {
      const device = await Pci.open(pci);
      try {
        const features = await device.negotiate(VirtioFeature.RING_PACKED);
        if ((features & VirtioFeature.RING_RESET) === 0n) {
          t.diagnostic("RING_RESET is not offered");
          await assert.rejects(device.resetQueue(0), { code: "ERR_VIRTIO_STATUS" });
          return;
        }
        const pool = new BufferPool((size) => device.mapMemory(size));
        const buffer = await pool.allocate(4096);
        for (let round = 0; round < 5; round++) {
          const rings = await device.mapMemory(RINGS_BYTES);
          const queue = await makeQueue(device, features, rings);
          const notifier =
            round === 0 ? (await device.startQueues([queue.setup]))[0] : await device.enableQueue(queue.setup);
          queue.start(notifier, "event");
          const status = await new Promise((resolve) => {
            queue.onComplete = (_slot, value) => resolve(value);
            queue.submitRead(8 * round, buffer, 0, 4096);
            queue.kick();
          });
          assert.equal(status, 0, `round ${round}`);
          queue.stop();
          await device.resetQueue(0);
          await device.unmapMemory(rings);
        }
      } finally {
        await device.close();
      }
    });

    test("a disk that is resized says so, with its new size", async () => {
      const disk = await openBlock(address);
      try {
        for (const size of [GUEST_DISK_BYTES + 4 * MIB, GUEST_DISK_BYTES]) {
          const changed = once(disk, "resize");
          await resizeDisk(name, size);
          assert.equal((await changed)[0], size);
          assert.equal(disk.capacity, size);
        }
      } finally {
        await disk.close();
      }
    });
  });
}

for (const [name, vectors] of [
  ["FEW_VECTORS", 2],
  ["INTX", 1],
] as const) {
  const { pci, address, skip } = guest(name);

  describe(`${name}: interrupts that are shared`, { skip }, () => {
    for (const mode of ["event", "hybrid", "poll"] as const) {
      test(`mode ${mode}, 2 queues: what is written is read, and is in the image`, async () => {
        const disk = await openBlock(address, { queues: 2, mode });
        try {
          const before = interrupts(pci);
          assert.equal(before.length, vectors);
          const model = await writeAndVerify(disk, 32, 700);
          await settle(disk, disk.flush());
          await checkImage(name, model);
          const grown = interrupts(pci).reduce((sum, count, i) => sum + count - before[i], 0);
          if (mode === "event") assert.ok(grown > 0, "no interrupt came");
        } finally {
          await disk.close();
        }
      });
    }

    test("a disk that is resized says so", async () => {
      const disk = await openBlock(address, { queues: 2 });
      try {
        for (const size of [GUEST_DISK_BYTES + MIB, GUEST_DISK_BYTES]) {
          const changed = once(disk, "resize");
          await resizeDisk(name, size);
          assert.equal((await changed)[0], size);
        }
      } finally {
        await disk.close();
      }
    });
  });
}

const legacy = guest("LEGACY");
test("a legacy device is refused, and free for others", { skip: legacy.skip }, async () => {
  for (let i = 0; i < 2; i++) {
    await assert.rejects(openBlock(legacy.address), { code: "ERR_VIRTIO_FEATURES", message: /legacy/ });
  }
});

const other = guest("OTHER");
test("a device of another class opens as what it is, not as a disk", { skip: other.skip }, async () => {
  const device = await Pci.open(other.pci);
  assert.equal(device.deviceType, 4);
  assert.deepEqual(device.sharedMemory, []);
  await assert.rejects(BlockDevice.open(device), { code: "ERR_VIRTIO_FEATURES", message: /type 4/ });
  const again = await Pci.open(other.pci);
  await again.close();
});
