/** The order of a device's life on vhost-vdpa: each request compared with the one that belongs there. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import fc from "fast-check";
import { BlkFeature, encodeBlkConfig } from "../../../src/protocol/blk.js";
import { iotlbMessageCodec, VhostVdpaBackendFeature, VhostVdpaRequest } from "../../../src/protocol/index.js";
import { FakeVhostVdpa } from "../../../src/testing/index.js";
import { VhostVdpa } from "../../../src/transports/index.js";
import { VirtioFeature } from "../../../src/virtqueue/index.js";
import { place, virtioError } from "../support.js";
import { diskKernel, live, MODERN, open, openDisk, openRunning } from "./support.js";

const { IOTLB_MSG_V2, SUSPEND, RESUME, ENABLE_AFTER_DRIVER_OK, IOTLB_ASID } = VhostVdpaBackendFeature;
const ALL = (1n << 64n) - 1n;

/** What a whole life says to the kernel. */
function expected(packed: boolean): string[] {
  const base = packed ? "0x80008000" : "0x0";
  // Behind 16 bytes a descriptor: 2 areas of 4 bytes, or an available ring of 6 + 2n bytes and, aligned to 4, a used ring.
  const areas = packed
    ? ["0x200000 0x200080 0x200084", "0x201000 0x201100 0x201104"]
    : ["0x200000 0x200080 0x200098", "0x201000 0x201100 0x201128"];
  const queue = (index: number, size: number): string[] => [
    `SET_VRING_NUM ${index} ${size}`,
    `SET_VRING_BASE ${index} ${base}`,
    `SET_VRING_ADDR ${index} ${areas[index]}`,
    `SET_VRING_CALL ${index}`,
    `SET_VRING_KICK ${index}`,
    `SET_VRING_ENABLE ${index} 1`,
  ];
  return [
    ...["SET_OWNER", "GET_DEVICE_ID", "GET_BACKEND_FEATURES", "SET_BACKEND_FEATURES 0x32"],
    ...["GET_IOVA_RANGE", "GET_VRING_NUM", "GET_CONFIG_SIZE", "GET_VQS_COUNT"],
    ...["SET_STATUS 0", "GET_STATUS", "SET_STATUS 1", "SET_STATUS 3", "GET_FEATURES"],
    ...[`SET_FEATURES ${packed ? "0x700000000" : "0x300000000"}`, "SET_STATUS 11", "GET_STATUS"],
    ...["GET_CONFIG", "GET_CONFIG", "SET_CONFIG 32 01"],
    ...["IOTLB_UPDATE 0x200000 2097152", "IOTLB_UPDATE 0x400000 4194304"],
    ...queue(0, 8),
    ...queue(1, 16),
    ...["SET_CONFIG_CALL", "SET_STATUS 15", "GET_STATUS"],
    ...["SUSPEND", "RESUME", "IOTLB_INVALIDATE 0x400000 4194304"],
    ...["SET_STATUS 0", "GET_STATUS", "IOTLB_INVALIDATE 0x200000 2097152", "close"],
  ];
}

const WHOLE = {
  features: MODERN | VirtioFeature.RING_PACKED,
  backendFeatures: (ALL >> 55n) << 1n,
  ...{ config: new Uint8Array(60), maxQueues: 2 },
};

describe("the whole life of a device", () => {
  for (const [name, features] of [
    ["split", 0n],
    ["packed", VirtioFeature.RING_PACKED],
  ] as const) {
    test(`BASIC-DRV-01 BASIC-DRV-02 BASIC-DRV-16 BASIC-DRV-18 BASIC-DRV-23 ${name}: every request in its place`, async () => {
      const kernel = new FakeVhostVdpa(WHOLE);
      await live(kernel, 2, features);
      assert.deepEqual(
        kernel.log.filter((line) => !line.startsWith("kick")),
        expected(features !== 0n),
      );
      assert.equal(kernel.mappings, 0);
      assert.equal(kernel.status, 0);
    });
  }

  test("BASIC-DRV-21 no queue is notified before DRIVER_OK", async (t) => {
    const { kernel } = diskKernel();
    const disk = await openDisk(t, kernel, { mode: "event" });
    assert.ok(!kernel.log.some((line) => line.startsWith("kick")));
    await disk.read(new Uint8Array(512));
    const lines = kernel.log;
    assert.ok(lines.indexOf("kick 0") > lines.indexOf("SET_STATUS 15"));
  });

  test("queues are enabled before DRIVER_OK, also where they might be later: the bit is not taken", async (t) => {
    const { kernel, device } = await openRunning(t, {
      backendFeatures: ENABLE_AFTER_DRIVER_OK | IOTLB_MSG_V2 | IOTLB_ASID,
    });
    assert.equal(device.backendFeatures, IOTLB_MSG_V2);
    assert.ok(kernel.log.indexOf("SET_VRING_ENABLE 0 1") < kernel.log.indexOf("SET_STATUS 15"));
  });
});

describe("features", () => {
  test("BASIC-DRV-05 BASIC-DRV-07 BASIC-DRV-08 BASIC-DRV-10 BASIC-DRV-37 BASIC-DRV-38 BASIC-DRV-40 never more than offered, wanted and carried", async () => {
    const { NOTIFICATION_DATA, NOTIF_CONFIG_DATA, RING_RESET, SR_IOV } = VirtioFeature;
    const foreign = NOTIFICATION_DATA | NOTIF_CONFIG_DATA | RING_RESET | SR_IOV | (1n << 30n) | (1n << 26n);
    const bits = fc.bigInt({ min: 0n, max: ALL });
    await fc.assert(
      fc.asyncProperty(bits, bits, async (offered, wanted) => {
        const kernel = new FakeVhostVdpa({ features: offered | VirtioFeature.VERSION_1 });
        const device = await VhostVdpa.open({ node: kernel.open() });
        const accepted = await device.negotiate(wanted);
        await device.close();
        const { ACCESS_PLATFORM, ORDER_PLATFORM, VERSION_1 } = VirtioFeature;
        const always = VERSION_1 | ACCESS_PLATFORM | ORDER_PLATFORM;
        assert.equal(accepted & ~(offered | VERSION_1), 0n);
        assert.equal(accepted & ~(wanted | always), 0n);
        assert.equal(accepted & foreign, 0n);
      }),
      { numRuns: 50 },
    );
    const kernel = new FakeVhostVdpa({ features: ALL });
    await using device = await VhostVdpa.open({ node: kernel.open() });
    const known =
      (2n ** 24n - 1n) |
      (2n ** 64n - 2n ** 50n) |
      (VirtioFeature.INDIRECT_DESC | VirtioFeature.EVENT_IDX | VirtioFeature.VERSION_1) |
      (VirtioFeature.ACCESS_PLATFORM |
        VirtioFeature.RING_PACKED |
        VirtioFeature.IN_ORDER |
        VirtioFeature.ORDER_PLATFORM);
    assert.equal(await device.negotiate(ALL), known);
    assert.equal(kernel.features, known);
  });

  test("BASIC-DRV-30 BASIC-DRV-31 BASIC-DRV-35 VERSION_1 and the platform's features are accepted although nobody asks", async (t) => {
    const platform = VirtioFeature.ACCESS_PLATFORM | VirtioFeature.ORDER_PLATFORM;
    const { kernel, device } = await open(t, { features: VirtioFeature.VERSION_1 | platform | BlkFeature.FLUSH });
    assert.equal(await device.negotiate(0n), VirtioFeature.VERSION_1 | platform);
    assert.equal(kernel.features, device.features);
  });

  test("BASIC-DRV-09 BASIC-DRV-20 BASIC-DRV-30 a legacy device: FAILED, and nothing more than closing it", async (t) => {
    const { kernel, device } = await open(t, { features: VirtioFeature.ACCESS_PLATFORM });
    await assert.rejects(device.negotiate(0n), virtioError("ERR_VIRTIO_FEATURES", "without VERSION_1"));
    assert.equal(kernel.log.at(-1), "SET_STATUS 131");
    await assert.rejects(device.startQueues([]), virtioError("ERR_VIRTIO_STATUS", "an earlier step failed"));
    await assert.rejects(device.negotiate(0n), virtioError("ERR_VIRTIO_STATUS", "once"));
    assert.equal(kernel.log.at(-1), "SET_STATUS 131");
    await device.close();
    assert.deepEqual(kernel.log.slice(-3), ["SET_STATUS 0", "GET_STATUS", "close"]);
  });

  test("BASIC-DRV-03 BASIC-DRV-19 BASIC-DRV-20 FEATURES_OK that does not stay: FAILED; opened again, it is reset first", async (t) => {
    const { kernel, device } = await open(t, { refuseFeatures: true });
    await assert.rejects(device.negotiate(0n), virtioError("ERR_VIRTIO_FEATURES", "FEATURES_OK reads back as 0"));
    assert.deepEqual(kernel.log.slice(-3), ["SET_STATUS 11", "GET_STATUS", "SET_STATUS 139"]);
    await assert.rejects(device.startQueues([]), virtioError("ERR_VIRTIO_STATUS"));
    await device.close();
    assert.ok(!kernel.log.some((line) => line.startsWith("SET_VRING") || line === "SET_STATUS 15"));
    const before = kernel.log.length;
    const again = await VhostVdpa.open({ node: kernel.open() });
    t.after(() => again.close());
    const statuses = kernel.log.slice(before).filter((line) => line.includes("STATUS"));
    assert.deepEqual(statuses, ["SET_STATUS 0", "GET_STATUS", "SET_STATUS 1", "SET_STATUS 3"]);
  });

  test("a set that the kernel refuses", async (t) => {
    const { kernel, device } = await open(t);
    kernel.failures.set("SET_FEATURES", 22);
    await assert.rejects(device.negotiate(0n), (error) => {
      virtioError("ERR_VIRTIO_FEATURES", "refuses the features 0x300000000")(error);
      assert.ok(error instanceof Error && "errno" in error && "syscall" in error);
      assert.deepEqual([error.errno, error.syscall], [22, "ioctl"]);
      return true;
    });
    assert.equal(kernel.log.at(-1), "SET_STATUS 131");
  });
});

describe("reset", () => {
  test("BASIC-DRV-11 is over when the status reads 0, and not before", async (t) => {
    const { kernel } = await open(t, { resetReads: 3 });
    const from = kernel.log.indexOf("SET_STATUS 0");
    const reads = Array.from({ length: 4 }, () => "GET_STATUS");
    assert.deepEqual(kernel.log.slice(from, from + 6), ["SET_STATUS 0", ...reads, "SET_STATUS 1"]);
  });

  test("one that never ends is given up, and the device is closed", async () => {
    const kernel = new FakeVhostVdpa({ resetReads: Number.POSITIVE_INFINITY });
    await assert.rejects(
      VhostVdpa.open({ node: kernel.open() }, { timeout: 20 }),
      virtioError("ERR_VIRTIO_TIMEOUT", "did not finish its reset within 20 ms"),
    );
    assert.equal(kernel.log.at(-1), "close");
    kernel.open().close();
  });

  test("one that is waited for ends with the signal, and the device is closed", async () => {
    const kernel = new FakeVhostVdpa({ resetReads: Number.POSITIVE_INFINITY });
    const abort = new AbortController();
    const opening = VhostVdpa.open({ node: kernel.open() }, { signal: abort.signal });
    abort.abort(new RangeError("enough"));
    await assert.rejects(opening, RangeError);
    assert.equal(kernel.log.at(-1), "close");
  });

  test("close gives a device that does not finish it the time limit, then closes it all the same", async () => {
    const kernel = new FakeVhostVdpa();
    const node = kernel.open();
    let stuck = false;
    const device = await VhostVdpa.open(
      {
        node: {
          ...node,
          ioctl(request, argument) {
            node.ioctl(request, argument);
            if (stuck && request === VhostVdpaRequest.GET_STATUS && argument !== undefined) argument[0] = 15;
          },
        },
      },
      { timeout: 20 },
    );
    await device.mapMemory(1);
    stuck = true;
    await device.close();
    assert.equal(kernel.log.at(-1), "close");
    assert.equal(kernel.mappings, 0);
  });
});

describe("older kernels", () => {
  const OLD = [
    ...[VhostVdpaRequest.GET_BACKEND_FEATURES, VhostVdpaRequest.GET_IOVA_RANGE],
    ...[VhostVdpaRequest.GET_CONFIG_SIZE, VhostVdpaRequest.GET_VQS_COUNT],
  ];

  test("IOTLB messages are of version 2 where that is offered, otherwise of version 1", async () => {
    for (const backendFeatures of [IOTLB_MSG_V2, 0n]) {
      const kernel = new FakeVhostVdpa({ backendFeatures });
      const node = kernel.open();
      const versions: number[] = [];
      const device = await VhostVdpa.open({
        node: {
          ...node,
          write(message) {
            versions.push(iotlbMessageCodec.decode(message).version);
            node.write(message);
          },
        },
      });
      await device.unmapMemory(await device.mapMemory(1));
      await device.close();
      const version = backendFeatures === 0n ? 1 : 2;
      assert.deepEqual(versions, [version, version]);
      assert.equal(kernel.log.includes("SET_BACKEND_FEATURES 0x2"), backendFeatures !== 0n);
    }
  });

  test("BASIC-DRV-14 without a queue count: num_queues where MQ is offered, otherwise 1, and no look at the field", async (t) => {
    const config = encodeBlkConfig({ capacity: 8n, numQueues: 3 });
    const many = await open(t, { config, features: MODERN | BlkFeature.MQ, maxQueues: 3, unknown: OLD });
    assert.equal(many.device.maxQueues, 3);
    const one = await open(t, { config, maxQueues: 3, unknown: OLD });
    assert.equal(one.device.maxQueues, 1);
    assert.ok(!one.kernel.log.includes("GET_CONFIG"));
    const net = await open(t, { config, features: MODERN | BlkFeature.MQ, deviceType: 1, unknown: OLD });
    assert.equal(net.device.maxQueues, 1);
    assert.ok(!net.kernel.log.includes("GET_CONFIG"));
  });

  test("one that knows nothing new drives a device all the same", async () => {
    const kernel = new FakeVhostVdpa({ ...WHOLE, backendFeatures: 0n, unknown: OLD, maxQueues: 1 });
    await assert.rejects(live(kernel, 1), virtioError("ERR_VIRTIO_UNSUPPORTED", "SUSPEND"));
    assert.ok(kernel.log.includes("SET_STATUS 15"));
    assert.equal(kernel.log.at(-1), "close");
  });

  test("what newer kernels have is not needed: any answer that says no will do", async (t) => {
    for (const errno of [22, 25, 38, 95, 105]) {
      const kernel = new FakeVhostVdpa();
      for (const name of ["GET_BACKEND_FEATURES", "GET_IOVA_RANGE", "GET_CONFIG_SIZE", "GET_VQS_COUNT"]) {
        kernel.failures.set(name, errno);
      }
      const device = await VhostVdpa.open({ node: kernel.open() });
      t.after(() => device.close());
      assert.deepEqual([device.maxQueues, device.backendFeatures, device.hasConfig], [1, 0n, true]);
    }
  });
});

describe("suspend and resume", () => {
  test("are the kernel's requests where they are offered; resumed queues are notified", async (t) => {
    const { kernel, device } = await openRunning(t, { backendFeatures: SUSPEND | RESUME });
    await device.suspend();
    await device.resume();
    assert.deepEqual(kernel.log.slice(-2), ["SUSPEND", "RESUME"]);
    await new Promise(setImmediate);
    assert.equal(kernel.log.at(-1), "kick 0");
  });

  test("are refused where they are not, and before queues run", async (t) => {
    const { device } = await openRunning(t, { backendFeatures: IOTLB_MSG_V2 });
    await assert.rejects(device.suspend(), virtioError("ERR_VIRTIO_UNSUPPORTED", "does not offer SUSPEND"));
    await assert.rejects(device.resume(), virtioError("ERR_VIRTIO_UNSUPPORTED", "does not offer RESUME"));
    const early = await open(t, { backendFeatures: SUSPEND | RESUME });
    await assert.rejects(early.device.suspend(), virtioError("ERR_VIRTIO_STATUS", "no queues run"));
    await assert.rejects(early.device.resume(), virtioError("ERR_VIRTIO_STATUS", "no queues run"));
  });
});

describe("starting queues", () => {
  test("the kernel's rules are checked before it is asked, and a wrong argument may be corrected", async (t) => {
    const { kernel, device } = await open(t, {
      features: MODERN | VirtioFeature.RING_PACKED,
      ...{ maxQueueSize: 48, maxQueues: 2 },
    });
    const region = await device.mapMemory(1);
    await assert.rejects(device.startQueues([place(region, 0, 8)]), virtioError("ERR_VIRTIO_STATUS", "negotiate"));
    await device.negotiate(VirtioFeature.RING_PACKED);
    assert.equal(device.maxQueueSize, 32);
    const before = kernel.log.length;
    const refusals = [
      [place(region, 0, 12, true), /"size" expected a power of two/],
      [place(region, 0, 64, true), /"size" expected at most 32/],
    ] as const;
    for (const [setup, words] of refusals) {
      await assert.rejects(device.startQueues([setup]), { name: "RangeError", message: words });
    }
    await assert.rejects(device.startQueues([place(region, 2, 8, true)]), virtioError("ERR_VIRTIO_QUEUES", "2 queues"));
    assert.equal(kernel.log.length, before);
    await device.startQueues([place(region, 0, 32, true)]);
    await assert.rejects(device.startQueues([place(region, 0, 32, true)]), virtioError("ERR_VIRTIO_STATUS", "already"));
  });

  test("a device that does not come up says so by its status", async (t) => {
    const kernel = new FakeVhostVdpa();
    const node = kernel.open();
    const device = await VhostVdpa.open({
      node: {
        ...node,
        ioctl(request, argument) {
          // As VDUSE does when the program behind it refuses: the call succeeds, the status stays.
          if (request === VhostVdpaRequest.SET_STATUS && argument?.[0] === 15) return;
          node.ioctl(request, argument);
        },
      },
    });
    t.after(() => device.close());
    await device.negotiate(0n);
    const region = await device.mapMemory(1);
    await assert.rejects(
      device.startQueues([place(region, 0, 8)]),
      virtioError("ERR_VIRTIO_STATUS", "its status is ACKNOWLEDGE|DRIVER|FEATURES_OK after DRIVER_OK"),
    );
    assert.equal(kernel.status, 143);
  });
});
