/** Bringing a block device up: the order of steps, features, config space, queues, and every way to fail. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { BlockDevice, type OpenBlockOptions } from "../../../src/devices/blk/index.js";
import { VirtioError } from "../../../src/errors.js";
import { type BlkConfig, BlkFeature } from "../../../src/protocol/blk.js";
import { type FakeStep, FakeTransport } from "../../../src/testing/index.js";
import { VirtioFeature } from "../../../src/virtqueue/index.js";
import { failure, makeTransport, openFake, RINGS, refused } from "./support.js";

/** Bits 0 to 63 but VERSION_1's twin of legacy devices: what a device that offers everything offers. */
const EVERYTHING = (1n << 64n) - 1n;

const BLK_KNOWN =
  BlkFeature.SIZE_MAX |
  BlkFeature.SEG_MAX |
  BlkFeature.GEOMETRY |
  BlkFeature.RO |
  BlkFeature.BLK_SIZE |
  BlkFeature.FLUSH |
  BlkFeature.TOPOLOGY |
  BlkFeature.CONFIG_WCE |
  BlkFeature.MQ |
  BlkFeature.DISCARD |
  BlkFeature.WRITE_ZEROES |
  BlkFeature.LIFETIME |
  BlkFeature.SECURE_ERASE;
const RING_KNOWN =
  VirtioFeature.VERSION_1 |
  VirtioFeature.INDIRECT_DESC |
  VirtioFeature.EVENT_IDX |
  VirtioFeature.ACCESS_PLATFORM |
  VirtioFeature.RING_PACKED |
  VirtioFeature.IN_ORDER |
  VirtioFeature.ORDER_PLATFORM;

async function rejection(transport: FakeTransport, options: OpenBlockOptions, check: (e: unknown) => boolean) {
  await assert.rejects(BlockDevice.open(transport, options), check);
  assert.equal(transport.steps.at(-1), "close", "a transport that is of no use is closed");
  assert.equal(transport.regionsMapped, transport.regionsClosed);
}

describe("the order of steps", () => {
  for (const [name, features] of Object.entries(RINGS)) {
    test(`BASIC-DRV-16 BASIC-DRV-18 BASIC-DRV-21 ${name}: features, config, memory, queues, and only then requests`, async (t) => {
      const { transport, disk, queue } = await openFake(t, { features });
      assert.deepEqual(transport.steps, ["negotiate", "readConfig", "mapMemory", "startQueues"]);
      assert.deepEqual(queue.notifications, []);
      const [, , , start] = transport.log;
      assert.ok(start.step === "startQueues");
      assert.equal(start.queues.length, 1);
      await disk.close();
      assert.equal(transport.steps.at(-1), "close");
    });
  }

  test("BASIC-DRV-17 BASIC-DRV-14 BLK-DRV-03 nothing is written before FEATURES_OK, nor `writeback` read", async (t) => {
    const { transport } = await openFake(t, { features: EVERYTHING & ~BlkFeature.ZONED });
    assert.ok(!transport.steps.includes("writeConfig"));
    assert.ok(transport.steps.indexOf("negotiate") < transport.steps.indexOf("readConfig"));
  });

  test("BLK-DRV-04 BLK-DRV-05 of a zoned device only the model is read before", async (t) => {
    const config = new Uint8Array(96);
    config[0] = 8;
    const transport = new FakeTransport({ features: VirtioFeature.VERSION_1 | BlkFeature.ZONED, config });
    const disk = await BlockDevice.open(transport);
    t.after(() => disk.close());
    assert.deepEqual(transport.log[0], { step: "readConfig", offset: 92, length: 1 });
    assert.equal(disk.features & BlkFeature.ZONED, 0n);
  });
});

describe("features", () => {
  test("BASIC-DRV-05 BASIC-DRV-07 BASIC-DRV-08 BASIC-DRV-10 BLK-DRV-04 of everything only the known is accepted", async (t) => {
    const config = new Uint8Array(96).fill(1, 0, 72);
    config.fill(0, 2, 8);
    const transport = new FakeTransport({ features: EVERYTHING, config });
    const disk = await BlockDevice.open(transport);
    t.after(() => disk.close());
    assert.equal(disk.features, BLK_KNOWN | RING_KNOWN);
  });

  test("BASIC-DRV-05 nothing is accepted that is not offered", async (t) => {
    for (let bit = 0n; bit < 64n; bit++) {
      if (bit === 17n) continue; // zoned: the config space here has no model
      const features = 1n << bit;
      const { disk, transport } = await openFake(t, { features });
      assert.equal(disk.features & ~(features | VirtioFeature.VERSION_1), 0n);
      await disk.close();
      assert.equal(transport.regionsClosed, 1);
    }
  });

  test("BASIC-DRV-30 BASIC-DRV-20 without VERSION_1 nothing goes on", async () => {
    const transport = new FakeTransport({ features: BlkFeature.FLUSH, config: new Uint8Array(72) });
    await rejection(transport, {}, failure("ERR_VIRTIO_FEATURES"));
    assert.deepEqual(transport.steps, ["negotiate", "close"]);
  });

  test("BASIC-DRV-06 CONFIG_WCE needs FLUSH", async (t) => {
    const alone = await openFake(t, { features: BlkFeature.CONFIG_WCE });
    assert.equal(alone.disk.features & BlkFeature.CONFIG_WCE, 0n);
    const both = await openFake(t, { features: BlkFeature.CONFIG_WCE | BlkFeature.FLUSH });
    assert.equal(both.disk.features & BlkFeature.CONFIG_WCE, BlkFeature.CONFIG_WCE);
  });

  test("BASIC-DRV-34 packed rings are taken when offered, each ring feature can be declined", async (t) => {
    const { RING_PACKED, INDIRECT_DESC, EVENT_IDX, IN_ORDER } = VirtioFeature;
    const all = RING_PACKED | INDIRECT_DESC | EVENT_IDX | IN_ORDER;
    const opened = await openFake(t, { features: all });
    assert.equal(opened.disk.features & all, all);
    assert.equal(opened.disk.info.format, "packed");
    for (const [option, feature] of [
      ["packed", RING_PACKED],
      ["indirect", INDIRECT_DESC],
      ["eventIdx", EVENT_IDX],
      ["inOrder", IN_ORDER],
    ] as const) {
      const { disk } = await openFake(t, { features: all, open: { [option]: false } });
      assert.equal(disk.features & all, all & ~feature);
      assert.equal(disk.info.format, option === "packed" ? "split" : "packed");
    }
  });

  test("BLK-DRV-10 a read-only device is taken as such", async (t) => {
    const { disk } = await openFake(t, { features: BlkFeature.RO });
    assert.equal(disk.readOnly, true);
    assert.ok(disk.info.features.includes("RO"));
  });

  test("BLK-DRV-06 a host-managed zoned device is refused before it is told of any feature", async () => {
    const config = new Uint8Array(96);
    config[92] = 1;
    const transport = new FakeTransport({ features: VirtioFeature.VERSION_1 | BlkFeature.ZONED, config });
    await rejection(transport, {}, failure("ERR_VIRTIO_FEATURES", "host-managed zoned"));
    assert.deepEqual(transport.steps, ["readConfig", "close"]);
  });

  test("BLK-DRV-07 a host-aware zoned device is a disk like others", async (t) => {
    const config = new Uint8Array(96).fill(0xff);
    config.fill(0, 0, 8);
    config[0] = 8;
    config[92] = 2;
    const transport = new FakeTransport({ features: VirtioFeature.VERSION_1 | BlkFeature.ZONED, config });
    const disk = await BlockDevice.open(transport);
    t.after(() => disk.close());
    assert.equal(disk.capacity, 4096);
  });

  test("a device of another type is refused", async () => {
    const transport = makeTransport({ deviceType: 1 });
    await rejection(transport, {}, failure("ERR_VIRTIO_FEATURES", "type 1, expected 2"));
    assert.deepEqual(transport.steps, ["close"]);
  });

  test("a block device is taken where the transport knows the type", async (t) => {
    const { disk } = await openFake(t, { deviceType: 2 });
    assert.equal(disk.capacity, 1 << 20);
  });
});

describe("BASIC-DRV-14 BASIC-DRV-15 the config space is read as far as the features reach, no byte more", () => {
  const lengths: readonly [name: keyof typeof BlkFeature, length: number][] = [
    ["RO", 8],
    ["FLUSH", 8],
    ["LIFETIME", 8],
    ["SIZE_MAX", 12],
    ["SEG_MAX", 16],
    ["GEOMETRY", 20],
    ["BLK_SIZE", 24],
    ["TOPOLOGY", 32],
    ["CONFIG_WCE", 33],
    ["MQ", 36],
    ["DISCARD", 48],
    ["WRITE_ZEROES", 57],
    ["SECURE_ERASE", 72],
  ];
  for (const [name, length] of lengths) {
    test(`${name}: ${length} bytes, from a config space of exactly those`, async (t) => {
      const needsFlush = name === "CONFIG_WCE" ? BlkFeature.FLUSH : 0n;
      const config = new Uint8Array(length);
      config[0] = 8;
      if (length >= 16) config[12] = 1;
      const transport = new FakeTransport({
        features: VirtioFeature.VERSION_1 | BlkFeature[name] | needsFlush,
        config,
      });
      const disk = await BlockDevice.open(transport);
      t.after(() => disk.close());
      const reads = transport.log.filter(({ step }) => step === "readConfig");
      assert.deepEqual(reads, [{ step: "readConfig", offset: 0, length }]);
      assert.equal(disk.capacity, 4096);
    });
  }

  test("BASIC-DRV-15 a config space of 4096 bytes is as good", async (t) => {
    const config = new Uint8Array(4096).fill(0xff);
    config.set([8, 0, 0, 0, 0, 0, 0, 0]);
    const transport = new FakeTransport({ features: VirtioFeature.VERSION_1, config });
    const disk = await BlockDevice.open(transport);
    t.after(() => disk.close());
    assert.equal(disk.capacity, 4096);
  });

  test("one that is shorter is refused", async () => {
    const transport = new FakeTransport({
      features: VirtioFeature.VERSION_1 | BlkFeature.BLK_SIZE,
      config: new Uint8Array(23),
    });
    await rejection(transport, {}, failure("ERR_VIRTIO_CONFIG"));
  });

  test("a field whose feature is missing is not looked at", async (t) => {
    const config: Partial<BlkConfig> = { sizeMax: 1, segMax: 99, blkSize: 4096, numQueues: 8 };
    const { disk } = await openFake(t, { config, maxQueues: 8 });
    assert.deepEqual(disk.config, { capacity: 2048n });
    assert.equal(disk.blockSize, 512);
    assert.equal(disk.info.limits.maxSegments, 1);
  });
});

describe("size of the disk", () => {
  test("the largest that numbers hold exactly is taken, one sector more is refused", async (t) => {
    const { disk } = await openFake(t, { config: { capacity: 2n ** 44n - 1n } });
    assert.equal(disk.capacity, 2 ** 53 - 512);
    for (const capacity of [2n ** 44n, 2n ** 63n, 2n ** 64n - 1n]) {
      const transport = makeTransport({ config: { capacity } });
      await rejection(transport, {}, failure("ERR_VIRTIO_CONFIG", `${capacity} sectors`));
      assert.ok(!transport.steps.includes("startQueues"));
    }
  });

  test("a disk of no size opens, and every request is outside of it", async (t) => {
    const { disk } = await openFake(t, { config: { capacity: 0n } });
    assert.equal(disk.capacity, 0);
    await assert.rejects(disk.read(new Uint8Array(512)), /512 bytes inside the 0 bytes of the disk/);
  });

  test("without config space the size must be given, and nothing else is guessed", async (t) => {
    await rejection(makeTransport({ config: null }), {}, failure("ERR_VIRTIO_CONFIG", '"capacity"'));
    const features = BLK_KNOWN | VirtioFeature.EVENT_IDX;
    const { disk, transport } = await openFake(t, { config: null, features, open: { capacity: 8192 } });
    assert.equal(disk.capacity, 8192);
    const taken = BlkFeature.RO | BlkFeature.FLUSH | BlkFeature.LIFETIME;
    assert.equal(disk.features, VirtioFeature.VERSION_1 | VirtioFeature.EVENT_IDX | taken);
    assert.ok(!transport.steps.includes("readConfig"));
  });

  test("without config space DISCARD and WRITE_ZEROES are refused, never skipped in silence", async (t) => {
    const features = BlkFeature.DISCARD | BlkFeature.WRITE_ZEROES | BlkFeature.SECURE_ERASE | BlkFeature.CONFIG_WCE;
    const { disk } = await openFake(t, { config: null, features, open: { capacity: 8192 } });
    const range = { position: 0, length: 512 };
    await assert.rejects(disk.discard(range), failure("ERR_VIRTIO_UNSUPPORTED"));
    await assert.rejects(disk.writeZeroes(range), failure("ERR_VIRTIO_UNSUPPORTED"));
    await assert.rejects(disk.secureErase(range), failure("ERR_VIRTIO_UNSUPPORTED"));
    await assert.rejects(disk.setWriteback(true), failure("ERR_VIRTIO_UNSUPPORTED"));
  });
});

describe("block size", () => {
  for (const [blkSize, expected] of [
    [512, 512],
    [4096, 4096],
    [0, 512],
    [1, 512],
    [256, 512],
    [520, 512],
    [3000, 512],
  ]) {
    test(`blk_size ${blkSize}: ${expected}`, async (t) => {
      const { disk } = await openFake(t, { features: BlkFeature.BLK_SIZE, config: { blkSize } });
      assert.equal(disk.blockSize, expected);
    });
  }
});

describe("BLK-DRV-31 limits of a request", () => {
  const limits = async (config: Partial<BlkConfig>, open: OpenBlockOptions = {}) => {
    let features = VirtioFeature.INDIRECT_DESC;
    if (config.sizeMax !== undefined) features |= BlkFeature.SIZE_MAX;
    if (config.segMax !== undefined) features |= BlkFeature.SEG_MAX;
    const disk = await BlockDevice.open(makeTransport({ features, config }), open);
    await disk.close();
    return disk.info.limits;
  };
  const MIB = 1 << 20;
  const cases: readonly [Partial<BlkConfig>, OpenBlockOptions, readonly number[]][] = [
    [{}, {}, [1, 2 ** 32 - 512, 2 * MIB]],
    [{ segMax: 0 }, {}, [1, 2 ** 32 - 512, 2 * MIB]],
    [{ segMax: 1 }, {}, [1, 2 ** 32 - 512, 2 * MIB]],
    [{ segMax: 30 }, {}, [30, 2 ** 32 - 512, 2 * MIB]],
    [{ segMax: 4000 }, {}, [126, 2 ** 32 - 512, 2 * MIB]],
    [{ segMax: 30 }, { queueSize: 16 }, [14, 2 ** 32 - 512, 2 * MIB]],
    [{ segMax: 30 }, { queueSize: 4, indirect: false }, [2, 2 ** 32 - 512, 2 * MIB]],
    [{ sizeMax: 0, segMax: 4 }, {}, [4, 2 ** 32 - 512, 2 * MIB]],
    [{ sizeMax: 4096, segMax: 4 }, {}, [4, 4096, 16384]],
    [{ sizeMax: 5000, segMax: 4 }, {}, [4, 4608, 18432]],
    [{ sizeMax: 100, segMax: 16 }, {}, [16, 100, 1536]],
    [{ sizeMax: 512 }, {}, [1, 512, 512]],
  ];
  for (const [config, open, expected] of cases) {
    test(`${JSON.stringify(config)} ${JSON.stringify(open)}`, async () => {
      const { maxSegments, maxSegmentBytes, maxRequestBytes } = await limits(config, open);
      assert.deepEqual([maxSegments, maxSegmentBytes, maxRequestBytes], expected);
    });
  }

  test("a device whose requests could not hold a sector is refused", async () => {
    for (const config of [{ sizeMax: 511 }, { sizeMax: 1, segMax: 511 }, { sizeMax: 127, segMax: 4 }]) {
      await assert.rejects(limits(config), failure("ERR_VIRTIO_CONFIG", "less than a sector"));
    }
    await assert.rejects(limits({ sizeMax: 256, segMax: 2 }, { queueSize: 3, packed: false }), /too small for it/);
    assert.equal((await limits({ sizeMax: 256, segMax: 2 })).maxRequestBytes, 512);
  });
});

describe("queues", () => {
  test("as many as asked for, each in its own memory, of the size asked for", async (t) => {
    const { transport, disk } = await openFake(t, {
      features: BlkFeature.MQ,
      config: { numQueues: 4 },
      maxQueues: 8,
      open: { queues: 3, queueSize: 64 },
    });
    assert.equal(disk.info.queues, 3);
    assert.equal(disk.info.queueSize, 64);
    assert.deepEqual(
      transport.queues.map(({ index, setup }) => [index, setup.size]),
      [
        [0, 64],
        [1, 64],
        [2, 64],
      ],
    );
    const addresses = transport.queues.map(({ setup }) => setup.descriptorArea);
    assert.equal(new Set(addresses.map((address) => Math.floor(address / 4096))).size, 3);
    for (const { setup } of transport.queues) {
      assert.equal(setup.descriptorArea % 16, 0);
      assert.equal(setup.driverArea % 2, 0);
      assert.equal(setup.deviceArea % 4, 0);
    }
  });

  for (const [what, options, available] of [
    ["the config says 2", { features: BlkFeature.MQ, config: { numQueues: 2 }, maxQueues: 8 }, 2],
    ["the transport has 2", { features: BlkFeature.MQ, config: { numQueues: 8 }, maxQueues: 2 }, 2],
    ["MQ is not offered", { config: { numQueues: 8 }, maxQueues: 8 }, 1],
    ["the config says 0", { features: BlkFeature.MQ, config: { numQueues: 0 }, maxQueues: 8 }, 1],
  ] as const) {
    test(`more than there are: ${what}`, async () => {
      const wanted = available + 1;
      const words = `${available} request queue(s), ${wanted} were asked for; pass queues: ${available}`;
      await rejection(makeTransport(options), { queues: wanted }, failure("ERR_VIRTIO_QUEUES", words));
    });
  }

  test("the default size is what the transport can, a power of two", async (t) => {
    for (const [maxQueueSize, expected] of [
      [32768, 256],
      [128, 128],
      [100, 64],
      [4, 4],
    ]) {
      const { disk } = await openFake(t, { maxQueueSize });
      assert.equal(disk.info.queueSize, expected);
    }
  });

  test("packed queues take any size, split ones powers of two", async (t) => {
    const { disk } = await openFake(t, { features: RINGS.packed, open: { queueSize: 100 } });
    assert.equal(disk.info.queueSize, 100);
    await rejection(makeTransport(), { queueSize: 100 }, refused("queueSize"));
  });
});

describe("every failing step closes the transport and gives all memory back", () => {
  for (const step of ["negotiate", "readConfig", "mapMemory", "startQueues"] as const satisfies readonly FakeStep[]) {
    test(step, async () => {
      const error = new VirtioError("ERR_VIRTIO_REJECTED", `no ${step}`);
      const transport = makeTransport();
      transport.failures.set(step, error);
      await rejection(transport, {}, (got) => got === error);
    });
  }

  test("a device that was lost before", async () => {
    const error = new VirtioError("ERR_VIRTIO_DISCONNECTED", "gone");
    const transport = makeTransport();
    transport.lose(error);
    await rejection(transport, {}, (got) => got === error);
  });

  test("an aborted signal", async () => {
    const reason = new Error("enough");
    const transport = makeTransport();
    await rejection(transport, { signal: AbortSignal.abort(reason) }, (got) => got === reason);
    assert.deepEqual(transport.steps, ["close"]);
  });
});

describe("wrong options are refused before the device hears of anything", () => {
  const cases: readonly [Record<string, unknown>, string][] = [
    [{ queueCount: 2 }, "openBlock"],
    [{ queuesize: 64 }, "openBlock"],
    [{ readonly: true }, "openBlock"],
    [{ mode: "interrupt" }, "mode"],
    [{ queues: 0 }, "queues"],
    [{ queues: 1.5 }, "queues"],
    [{ queues: "2" }, "queues"],
    [{ queueSize: 2 }, "queueSize"],
    [{ queueSize: 65536 }, "queueSize"],
    [{ capacity: -1 }, "capacity"],
    [{ capacity: 2 ** 53 }, "capacity"],
  ];
  for (const [options, name] of cases) {
    test(JSON.stringify(options), async () => {
      const transport = makeTransport();
      await rejection(transport, options, refused(name));
      assert.deepEqual(transport.steps, ["close"]);
    });
  }

  test("a misspelled option is told the right one", async () => {
    await rejection(makeTransport(), { readonly: true } as OpenBlockOptions, (error) => {
      return error instanceof TypeError && error.message.includes('option "readOnly", got "readonly"');
    });
  });

  test("options that are none", async () => {
    await rejection(makeTransport(), 5 as unknown as OpenBlockOptions, refused("options"));
  });
});

describe("BLK-DRV-02 what is known of the cache", () => {
  const cases: readonly [features: bigint, config: Partial<BlkConfig>, expected: string][] = [
    [0n, {}, "unknown"],
    [BlkFeature.FLUSH, {}, "writeback"],
    [BlkFeature.FLUSH | BlkFeature.CONFIG_WCE, { writeback: true }, "writeback"],
    [BlkFeature.FLUSH | BlkFeature.CONFIG_WCE, { writeback: false }, "writethrough"],
    [BlkFeature.CONFIG_WCE, { writeback: true }, "unknown"],
  ];
  for (const [features, config, expected] of cases) {
    test(`${features} ${JSON.stringify(config)}: ${expected}`, async (t) => {
      const { disk } = await openFake(t, { features, config });
      assert.equal(disk.info.cache, expected);
    });
  }
});
