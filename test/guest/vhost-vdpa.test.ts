/** VhostVdpa on a real kernel: a disk that qemu-storage-daemon serves by VDUSE, in the guest. */

import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { constants, openSync, readFileSync } from "node:fs";
import { describe, test } from "node:test";
import { Worker } from "node:worker_threads";
import { BlockDevice, openBlock, VhostVdpa, VirtioError } from "../../src/index.js";
import {
  IotlbAccess,
  iotlbMessageCodec,
  IotlbType,
  u64Codec,
  vdpaConfigCodec,
  VhostVdpaBackendFeature,
  VhostVdpaRequest as R,
  vringAddressCodec,
  vringStateCodec,
} from "../../src/protocol/index.js";
import { MemoryRegion } from "../../src/memory/index.js";
import { addressOf } from "../../src/sys/index.js";
import { FakeVhostVdpa } from "../../src/testing/index.js";
import { openNode, type VhostVdpaNode } from "../../src/transports/vhost-vdpa/node.js";
import { virtio } from "../cli/command.js";
import { writeAndVerify, zeroAndVerify } from "../support/block-suite.js";
import type { Command, Reply } from "../support/block-worker.js";
import { collectGarbage } from "../sys/helpers.js";
import { held, place, virtioError } from "../transports/support.js";
import { callsMade, orderFault, useFailingNative } from "./support/failing-native.js";

useFailingNative();

const NODE = process.env["VIRTIO_GUEST_VDPA"] ?? "";
const IMAGE = process.env["VIRTIO_GUEST_VDPA_IMAGE"];
const ADDRESS = `vhost-vdpa:${NODE}`;
const skip = NODE === "" ? "VIRTIO_GUEST_VDPA names no vhost-vdpa device: this runs in the guest" : false;
const MIB = 1 << 20;

describe("what the device is", { skip }, () => {
  test("type, queues, sizes and what the interface has", async () => {
    await using device = await VhostVdpa.open(NODE);
    assert.deepEqual([device.deviceType, device.maxQueues, device.maxQueueSize], [2, 2, 128]);
    assert.equal(device.backendFeatures & VhostVdpaBackendFeature.IOTLB_MSG_V2, VhostVdpaBackendFeature.IOTLB_MSG_V2);
    assert.equal(device.address, ADDRESS);
    await assert.rejects(device.readConfig(0, 4096), virtioError("ERR_VIRTIO_CONFIG", "beyond the 60 bytes"));
  });

  test("from a descriptor that is open already", async () => {
    const device = await VhostVdpa.open({ fd: openSync(NODE, constants.O_RDWR) });
    await using disk = await BlockDevice.open(device);
    assert.equal((await disk.read(new Uint8Array(512))).bytesRead, 512);
  });

  test("virtio info shows it", async () => {
    const { code, stdout, stderr } = await virtio(["info", ADDRESS, "--json"]);
    assert.equal(code, 0, stderr);
    const info = JSON.parse(stdout.toString()) as Record<string, unknown>;
    assert.equal(info["capacity"], 24 * MIB);
    assert.equal(info["queueSize"], 128);
    assert.ok(Array.isArray(info["features"]) && info["features"].includes("ACCESS_PLATFORM"));
  });
});

describe("input and output", { skip }, () => {
  for (const [mode, depth, queues] of [
    ["event", 1, 1],
    ["event", 16, 2],
    ["hybrid", 8, 1],
    ["poll", 32, 2],
  ] as const) {
    test(`${mode}, depth ${depth}, ${queues} queue(s): what is written is read back, and is in the image`, async () => {
      await using disk = await openBlock(ADDRESS, { mode, queues });
      const model = await writeAndVerify(disk, depth, 3 * depth + queues);
      if (IMAGE !== undefined) assert.equal(Buffer.compare(readFileSync(IMAGE), model), 0);
      if (depth < 16) return;
      await zeroAndVerify(disk, model);
      if (IMAGE !== undefined) assert.equal(Buffer.compare(readFileSync(IMAGE), model), 0);
    });
  }

  test("without indirect descriptors and event indices", async () => {
    await using disk = await openBlock(ADDRESS, { indirect: false, eventIdx: false, mode: "event", queueSize: 16 });
    await disk.write(new Uint8Array(4 * MIB).fill(11), { position: MIB });
    const { buffer } = await disk.read(new Uint8Array(4 * MIB), { position: MIB });
    assert.ok(buffer.every((byte) => byte === 11));
  });

  test("discard, flush, identity", async () => {
    await using disk = await openBlock(ADDRESS);
    await disk.discard({ position: 0, length: MIB });
    await disk.flush();
    assert.equal(typeof (await disk.getId()), "string");
  });

  test("a queue in a worker, by its eventfds", async () => {
    await using disk = await openBlock(ADDRESS, { queues: 2 });
    const worker = new Worker(new URL("../support/block-worker.js", import.meta.url));
    const tell = async (command: Command): Promise<void> => {
      worker.postMessage(command, command.do === "adopt" ? [command.port] : []);
      const [reply] = (await once(worker, "message")) as [Reply];
      assert.equal(reply.error, undefined);
    };
    const part = { from: 0, to: 2 * MIB, seed: 5 };
    await tell({ do: "adopt", port: await disk.handOver({ memory: 4 * MIB }), mode: "event" });
    await tell({ do: "fill", part });
    await tell({ do: "check", part });
    const here = await disk.read(new Uint8Array(512));
    assert.equal(here.bytesRead, 512);
    await tell({ do: "close" });
    await worker.terminate();
  });
});

describe("opening and closing", { skip }, () => {
  test("50 times: no descriptor and no mapping is left", async () => {
    const life = async (i: number): Promise<void> => {
      await using disk = await openBlock(ADDRESS, { queues: 1 + (i % 2) });
      await disk.read(new Uint8Array(4096), { position: 4096 * i });
    };
    await life(0);
    collectGarbage();
    const before = held();
    for (let i = 0; i < 50; i++) await life(i);
    assert.deepEqual(held(), before);
  });

  test("a second opener is refused, and the first goes on", async () => {
    await using disk = await openBlock(ADDRESS);
    const before = held();
    await assert.rejects(openBlock(ADDRESS), (error) => {
      virtioError("ERR_VIRTIO_BUSY", `${NODE}: EBUSY from open; somebody has it open`)(error);
      assert.ok(error instanceof VirtioError);
      assert.deepEqual([error.errno, error.syscall], [16, "open"]);
      return true;
    });
    assert.deepEqual(held(), before);
    const { code, stderr } = await virtio(["info", ADDRESS]);
    assert.equal(code, 4);
    assert.match(stderr, /ERR_VIRTIO_BUSY.*EBUSY/);
    assert.equal((await disk.read(new Uint8Array(512))).bytesRead, 512);
  });

  test("closed under load: every call ends", async () => {
    const before = held();
    const disk = await openBlock(ADDRESS, { queues: 2 });
    const calls = Array.from({ length: 100 }, (_, i) => disk.read(new Uint8Array(65_536), { position: i * 4096 }));
    await disk.close();
    for (const end of await Promise.allSettled(calls)) {
      if (end.status === "rejected") virtioError("ERR_VIRTIO_CLOSED")(end.reason);
    }
    assert.deepEqual(held(), before);
  });

  test("more queues than there are, a queue that is too large, one that is no power of two", async () => {
    const before = held();
    await assert.rejects(openBlock(ADDRESS, { queues: 3 }), virtioError("ERR_VIRTIO_QUEUES", "pass queues: 2"));
    await assert.rejects(openBlock(ADDRESS, { queueSize: 256 }), { name: "RangeError", message: /at most 128/ });
    await using device = await VhostVdpa.open(NODE);
    await device.negotiate(0n);
    const region = await device.mapMemory(1);
    await assert.rejects(device.startQueues([place(region, 0, 8), place(region, 2, 8, false, 4096)]), {
      code: "ERR_VIRTIO_QUEUES",
    });
    await device.close();
    assert.deepEqual(held(), before);
  });
});

describe("failures", { skip }, () => {
  test("each system call of a device's life refused in turn: an error that says so, nothing left, and it works again", async () => {
    /** Open, write, read, close; the error, if there is one. */
    const life = async (): Promise<unknown> => {
      try {
        await using disk = await openBlock(ADDRESS, { queues: 2, queueSize: 16, mode: "event" });
        await disk.write(new Uint8Array(4096).fill(7), { position: 8192 });
        await disk.read(new Uint8Array(4096), { position: 8192 });
        return undefined;
      } catch (error) {
        return error;
      }
    };
    assert.equal(await life(), undefined);
    collectGarbage();
    const before = held();
    orderFault(-1, 0);
    assert.equal(await life(), undefined);
    const calls = [...callsMade()];
    for (const name of ["ioctl", "mmap", "eventfd", "memfdCreate", "ftruncate", "watch", "write"]) {
      assert.ok(calls.includes(name), `${name} is not called`);
    }
    const syscalls: Readonly<Record<string, string>> = { memfdCreate: "memfd_create", watch: "epoll_ctl" };
    // The last calls are those of close, which ends well whatever they say: reset, status, one region.
    const heard = calls.length - 3;
    for (const [n, name] of calls.entries()) {
      orderFault(n, 5);
      const error = await life();
      orderFault(-1, 0);
      const what = `call ${n} of ${calls.length}, ${name}`;
      if (n < heard) {
        assert.ok(error instanceof VirtioError, `${what}: ${String(error)}`);
        assert.deepEqual([error.errno, error.syscall], [5, syscalls[name] ?? name], what);
      } else {
        assert.equal(error, undefined, what);
      }
      assert.deepEqual(held(), before, what);
    }
    assert.equal(await life(), undefined);
  });

  test("killed in the midst of requests, the device is free and works", async () => {
    const index = new URL("../../src/index.js", import.meta.url).href;
    const program = `import { openBlock } from ${JSON.stringify(index)};
      const disk = await openBlock(process.argv[1], { queues: 2 });
      const bytes = new Uint8Array(65536).fill(1);
      let done = 0;
      const loop = async (i) => {
        for (;; i++) {
          await disk.write(bytes, { position: (i % 64) * 65536 });
          if (++done === 64) console.log("under way");
        }
      };
      for (let i = 0; i < 16; i++) void loop(i);`;
    for (let round = 0; round < 3; round++) {
      const child: ChildProcess = spawn(process.execPath, ["--input-type=module", "-e", program, ADDRESS], {
        stdio: ["ignore", "pipe", "inherit"],
      });
      assert.ok(child.stdout !== null);
      await once(child.stdout, "data");
      const ended = once(child, "exit");
      child.kill("SIGKILL");
      await ended;
      await using disk = await openBlock(ADDRESS, { queues: 2, mode: "event" });
      await disk.write(new Uint8Array(8192).fill(round + 1), { position: 4096 });
      const { buffer } = await disk.read(new Uint8Array(8192), { position: 4096 });
      assert.ok(buffer.every((byte) => byte === round + 1));
    }
  });
});

describe("the fake", { skip }, () => {
  test("says what the kernel says to calls that break its rules", async (t) => {
    const region = MemoryRegion.create({ name: "virtio-driver-test", size: 2 * MIB, iova: 2 * MIB });
    t.after(() => region.close());
    const uaddr = addressOf(region.buffer);

    /** What a node answers, call by call: the errno, or 0. */
    const answers = (node: VhostVdpaNode): string[] => {
      const said: string[] = [];
      const attempt = (what: string, call: () => void): void => {
        try {
          call();
          said.push(`${what}: ok`);
        } catch (error) {
          if (!(error instanceof VirtioError)) throw error;
          said.push(`${what}: errno ${error.errno} of ${error.syscall}`);
        }
      };
      const ioctl = (what: string, request: number, argument?: Uint8Array): void =>
        attempt(what, () => node.ioctl(request, argument));
      const num = (index: number, value: number): void =>
        ioctl(`size ${value} of ${index}`, R.SET_VRING_NUM, vringStateCodec.encode({ index, num: value }));
      const area = (desc: number, avail: number, used: number, flags = 0): void =>
        ioctl(
          `areas ${desc} ${avail} ${used} ${flags}`,
          R.SET_VRING_ADDR,
          vringAddressCodec.encode({ index: 0, flags, desc, avail, used, log: 0 }),
        );
      const config = (offset: number, length: number): void =>
        ioctl(
          `config ${offset} ${length}`,
          R.GET_CONFIG,
          vdpaConfigCodec.encode({ offset, data: new Uint8Array(length) }),
        );
      const map = (what: string, iova: number, size: number, type: number = IotlbType.UPDATE): void =>
        attempt(what, () => {
          const perm = type === IotlbType.UPDATE ? IotlbAccess.READ_WRITE : IotlbAccess.NONE;
          const from = type === IotlbType.UPDATE ? uaddr : 0;
          node.write(iotlbMessageCodec.encode({ version: 2, asid: 0, type, iova, size, uaddr: from, perm }));
        });
      const status = (bits: number): void => ioctl(`status ${bits}`, R.SET_STATUS, Uint8Array.of(bits));

      num(0, 8);
      map("map before the owner", 2 * MIB, MIB);
      ioctl("owner", R.SET_OWNER);
      ioctl("owner again", R.SET_OWNER);
      ioctl("features of the interface", R.SET_BACKEND_FEATURES, u64Codec.encode(VhostVdpaBackendFeature.IOTLB_MSG_V2));
      ioctl("unknown ones", R.SET_BACKEND_FEATURES, u64Codec.encode(1n << 40n));
      ioctl("features of the interface", R.SET_BACKEND_FEATURES, u64Codec.encode(VhostVdpaBackendFeature.IOTLB_MSG_V2));
      ioctl("no such request", 0x4008_af99, new Uint8Array(8));
      for (const value of [8, 0, 12, 65_536]) num(0, value);
      num(2, 8);
      area(2 * MIB, 2 * MIB + 128, 2 * MIB + 152);
      area(2 * MIB, 2 * MIB + 129, 2 * MIB + 152);
      area(2 * MIB, 2 * MIB + 128, 2 * MIB + 154);
      area(2 * MIB, 2 * MIB + 128, 2 * MIB + 152, 2);
      config(0, 60);
      config(0, 61);
      config(60, 1);
      config(0, 0);
      map("unmap what is not there", 2 * MIB, MIB, IotlbType.INVALIDATE);
      map("map", 2 * MIB, MIB);
      map("map over it", 2 * MIB + 4096, 4096);
      map("map nothing", 8 * MIB, 0);
      map("unmap", 2 * MIB, MIB, IotlbType.INVALIDATE);
      map("no such message", 2 * MIB, MIB, 9);
      attempt("a short message", () => node.write(new Uint8Array(8)));
      for (const bits of [1, 3, 1, 0]) status(bits);
      attempt("close", () => node.close());
      return said;
    };
    const kernel = new FakeVhostVdpa({ config: new Uint8Array(60), maxQueues: 2 });
    assert.deepEqual(answers(kernel.open()), answers(openNode(NODE)));
  });
});
