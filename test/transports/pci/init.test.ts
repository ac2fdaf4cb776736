/** Bringing a PCI device up: status, features, reset, and what the registers see of it. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import fc from "fast-check";
import { VirtioStatus } from "../../../src/protocol/index.js";
import { Pci } from "../../../src/transports/index.js";
import { FakePciFunction } from "../../../src/testing/index.js";
import { VirtioFeature } from "../../../src/virtqueue/features.js";
import { attach, attachRunning, BASE, CONFIG, failure, live, start } from "./support.js";

const { RING_RESET } = VirtioFeature;
const ALL = (1n << 128n) - 1n;
/** What PCI can carry: the device type's bits, the rings', and its own. */
const CARRIED =
  ((1n << 24n) - 1n) |
  (((1n << 78n) - 1n) << 50n) |
  [28n, 29n, 32n, 33n, 34n, 35n, 36n, 38n, 39n, 40n].reduce((all, bit) => all | (1n << bit), 0n);

describe("status", () => {
  test("BASIC-DRV-01 BASIC-DRV-16 BASIC-DRV-24 the steps are taken in order, seen in the registers; SUSPEND is never set", async (t) => {
    const { fn, device } = await attachRunning(t, { config: CONFIG });
    await device.close();
    assert.deepEqual(fn.written("DEVICE_STATUS"), [0, 1, 3, 11, 15, 0]);
    const steps = fn.log
      .filter(
        ({ kind, name }) => kind === "write" && ["DEVICE_STATUS", "DRIVER_FEATURE", "QUEUE_ENABLE"].includes(name),
      )
      .map(({ name, value }) => (name === "DEVICE_STATUS" ? value : name));
    assert.deepEqual(steps, [0, 1, 3, "DRIVER_FEATURE", "DRIVER_FEATURE", 11, "QUEUE_ENABLE", 15, 0]);
    const written = fn.log.findIndex(
      ({ kind, name, value }) => kind === "write" && name === "DEVICE_STATUS" && value === 11,
    );
    assert.equal(fn.log[written + 1].name, "DEVICE_STATUS", "FEATURES_OK is read back at once");
    assert.equal(fn.log[written + 1].kind, "read");
  });

  test("BASIC-DRV-02 no bit is cleared but by a reset, whatever fails", async () => {
    const lives: ((fn: FakePciFunction) => void)[] = [
      () => undefined,
      (fn) => (fn.refusesFeatures = true),
      (fn) => (fn.takesVector = () => false),
    ];
    for (const prepare of lives) {
      const fn = new FakePciFunction({ features: BASE | RING_RESET, config: CONFIG });
      prepare(fn);
      await live(fn).catch(() => undefined);
      const values = fn.written("DEVICE_STATUS");
      values.forEach((value, i) => {
        assert.ok(value === 0 || i === 0 || (value & values[i - 1]) === values[i - 1], values.join(" "));
      });
      assert.equal(values.at(-1), 0);
      assert.deepEqual(fn.violations, []);
    }
  });

  test("BASIC-DRV-03 a device that was given up as FAILED is reset before the next attempt", async (t) => {
    const fn = new FakePciFunction();
    fn.refusesFeatures = true;
    const device = await Pci.attach(fn);
    t.after(() => device.close());
    await assert.rejects(device.negotiate(0n), failure("ERR_VIRTIO_FEATURES", "FEATURES_OK reads back as 0"));
    assert.equal(fn.status & VirtioStatus.FAILED, VirtioStatus.FAILED);
    // Another driver takes the function over as it was left, without the close in between.
    fn.refusesFeatures = false;
    fn.resetReads = 3;
    const again = await Pci.attach(fn);
    await again.negotiate(0n);
    assert.deepEqual(fn.written("DEVICE_STATUS"), [0, 1, 3, 11, 139, 0, 1, 3, 11]);
    assert.deepEqual(fn.violations, []);
    fn.resetReads = 0;
    await again.close();
  });

  test("BASIC-DRV-09 BASIC-DRV-19 BASIC-DRV-20 what goes wrong for good ends in FAILED, and nothing follows", async (t) => {
    const cases = [
      { features: VirtioFeature.ACCESS_PLATFORM, words: "without VERSION_1" },
      { features: VirtioFeature.VERSION_1, words: "without ACCESS_PLATFORM" },
      { features: BASE, words: "FEATURES_OK" },
    ];
    for (const { features, words } of cases) {
      const { fn, device } = await attach(t, { features }, (each) => (each.refusesFeatures = true));
      await assert.rejects(device.negotiate(ALL), failure("ERR_VIRTIO_FEATURES", words));
      assert.equal((fn.written("DEVICE_STATUS").at(-1) ?? 0) & VirtioStatus.FAILED, VirtioStatus.FAILED);
      const region = await device.mapMemory(1);
      const queues = [
        { index: 0, size: 8, descriptorArea: region.iova, driverArea: region.iova, deviceArea: region.iova },
      ];
      await assert.rejects(device.startQueues(queues), failure("ERR_VIRTIO_STATUS", "FAILED"));
      await assert.rejects(device.negotiate(0n), failure("ERR_VIRTIO_STATUS"));
      await assert.rejects(device.writeConfig(0, CONFIG), failure("ERR_VIRTIO_STATUS"));
      assert.deepEqual(fn.written("QUEUE_ENABLE"), []);
      assert.ok(!fn.written("DEVICE_STATUS").some((status) => (status & VirtioStatus.DRIVER_OK) !== 0));
    }
  });

  test("BASIC-DRV-19 BASIC-DRV-20 queues that cannot be started leave the device FAILED", async (t) => {
    const { fn, device } = await attach(t, {}, (each) => (each.takesVector = () => false));
    await assert.rejects(start(device), failure("ERR_VIRTIO_REJECTED", "no MSI-X vector"));
    assert.equal(fn.status & VirtioStatus.FAILED, VirtioStatus.FAILED);
    assert.equal(fn.status & VirtioStatus.DRIVER_OK, 0);
    await assert.rejects(start(device), failure("ERR_VIRTIO_STATUS"));
  });
});

describe("reset", () => {
  test("BASIC-DRV-11 PCI-DRV-16 it is complete when the status reads 0, not before", async (t) => {
    const { fn } = await attach(t, {}, (each) => (each.resetReads = 5));
    fn.resetReads = 0;
    const reads = fn.log.findIndex(
      ({ kind, name, value }) => kind === "write" && name === "DEVICE_STATUS" && value === 1,
    );
    const polls = fn.log.slice(0, reads).filter(({ kind, name }) => kind === "read" && name === "DEVICE_STATUS");
    assert.equal(polls.length, 6);
  });

  test("a device that stays in its reset is an error in time, and given back", async () => {
    const fn = new FakePciFunction({ canReset: false });
    fn.resetReads = Number.POSITIVE_INFINITY;
    await assert.rejects(Pci.attach(fn, { timeout: 20 }), failure("ERR_VIRTIO_TIMEOUT", "did not finish its reset"));
    assert.ok(fn.closed && fn.opened.every(({ isOpen }) => !isOpen));
    assert.deepEqual(fn.violations, []);
  });

  test("where the function can be reset as a whole, that is tried", async (t) => {
    const fn = new FakePciFunction();
    fn.resetReads = Number.POSITIVE_INFINITY;
    const device = await Pci.attach(fn, { timeout: 20 });
    t.after(() => device.close());
    assert.equal(fn.log.filter(({ name }) => name === "reset").length, 1);
    await start(device);
    assert.deepEqual(fn.violations, []);
  });

  test("it can be given up", async () => {
    const fn = new FakePciFunction();
    fn.resetReads = Number.POSITIVE_INFINITY;
    const controller = new AbortController();
    const attaching = Pci.attach(fn, { signal: controller.signal });
    controller.abort(new Error("enough"));
    await assert.rejects(attaching, /enough/);
    await assert.rejects(Pci.attach(new FakePciFunction(), { signal: controller.signal }), /enough/);
    assert.ok(fn.closed);
  });
});

describe("features", () => {
  test("BASIC-DRV-05 nothing is accepted that was not offered, whatever is wanted", async () => {
    await fc.assert(
      fc.asyncProperty(fc.bigInt({ min: 0n, max: ALL }), fc.bigInt({ min: 0n, max: ALL }), async (random, wanted) => {
        const fn = new FakePciFunction({ features: random | BASE });
        const device = await Pci.attach(fn);
        const accepted = await device.negotiate(wanted);
        assert.equal(device.offeredFeatures, random | BASE);
        assert.equal(accepted & ~device.offeredFeatures, 0n);
        assert.equal(fn.driverFeatures, accepted);
        await device.close();
        assert.deepEqual(fn.violations, []);
      }),
      { numRuns: 100 },
    );
  });

  test("BASIC-DRV-07 BASIC-DRV-08 BASIC-DRV-10 of 128 bits offered and wanted those are accepted that PCI can carry", async (t) => {
    const { fn, device } = await attach(t, { features: ALL });
    assert.equal(await device.negotiate(ALL), CARRIED);
    assert.equal(device.features, CARRIED);
    assert.equal(fn.driverFeatures, CARRIED);
  });

  test("BASIC-DRV-37 BASIC-DRV-38 BASIC-DRV-40 PCI-DRV-19 neither SR_IOV, ADMIN_VQ nor bit 30", async (t) => {
    const { device } = await attach(t, { features: ALL });
    const accepted = await device.negotiate(ALL);
    for (const bit of [30n, 37n, 41n]) assert.equal(accepted & (1n << bit), 0n);
  });

  test("BASIC-DRV-30 BASIC-DRV-31 BASIC-DRV-35 BASIC-DRV-39 what the platform needs is accepted though nobody asks", async (t) => {
    const { device } = await attach(t, { features: ALL });
    const accepted = await device.negotiate(0n);
    const { VERSION_1, ACCESS_PLATFORM, ORDER_PLATFORM, NOTIFICATION_DATA, NOTIF_CONFIG_DATA } = VirtioFeature;
    assert.equal(
      accepted,
      VERSION_1 | ACCESS_PLATFORM | ORDER_PLATFORM | NOTIFICATION_DATA | NOTIF_CONFIG_DATA | RING_RESET,
    );
  });

  test("BASIC-DRV-33 a device without ACCESS_PLATFORM would take our addresses for physical ones: refused", async (t) => {
    const { fn, device } = await attach(t, { features: VirtioFeature.VERSION_1 });
    await assert.rejects(device.negotiate(0n), failure("ERR_VIRTIO_FEATURES", "iommu_platform=on"));
    assert.equal(fn.regionsMapped, 0);
  });

  test("registers that a short common configuration does not have are not used, nor are their features", async (t) => {
    for (const [length, missing] of [
      [0x38, [39n, 40n]],
      [0x3a, [40n]],
      [0x3c, []],
      [0x40, []],
    ] as const) {
      const { device } = await attach(t, {
        features: ALL,
        capabilities: (all) => all.map((each) => (each.type === 1 ? { ...each, length } : each)),
      });
      const { queues } = await start(device);
      queues[0].notify(0);
      assert.equal(
        device.features,
        missing.reduce((rest, bit) => rest & ~(1n << bit), device.features),
      );
    }
  });

  test("BASIC-DRV-18 features are negotiated once, and windows above 63 are written only where something is offered", async (t) => {
    const { fn, device } = await attach(t);
    await device.negotiate(0n);
    await assert.rejects(device.negotiate(0n), failure("ERR_VIRTIO_STATUS", "once"));
    assert.deepEqual(fn.written("DRIVER_FEATURE_SELECT"), [0, 1]);
    const high = await attach(t, { features: BASE | (1n << 127n) });
    assert.equal(await high.device.negotiate(1n << 127n), BASE | (1n << 127n));
    assert.deepEqual(high.fn.written("DRIVER_FEATURE_SELECT"), [0, 1, 2, 3]);
  });

  test("a wrong set of wanted features is an argument error, and changes nothing", async (t) => {
    const { fn, device } = await attach(t);
    for (const wanted of [-1n, 1n << 128n]) await assert.rejects(device.negotiate(wanted), RangeError);
    // @ts-expect-error: a number is no set of features
    await assert.rejects(device.negotiate(1), TypeError);
    assert.deepEqual(fn.written("DEVICE_STATUS"), [0, 1, 3]);
    await device.negotiate(0n);
  });
});

describe("registers", () => {
  test("PCI-DRV-04 PCI-DRV-12 every access has the width of its field, and none writes what is read-only", async () => {
    for (const features of [BASE, BASE | RING_RESET, ALL]) {
      const fn = new FakePciFunction({ features, config: CONFIG, queueSizes: [256, 128] });
      await live(fn).catch((error: unknown) => assert.ok(failure("ERR_VIRTIO_UNSUPPORTED", "RING_RESET")(error)));
      assert.deepEqual(fn.violations, []);
      assert.ok(fn.closed);
    }
  });

  test("decode is on before the first register, bus mastering after the reset; both are off at the end", async (t) => {
    const { fn, device } = await attachRunning(t);
    await device.close();
    const steps = fn.log
      .filter(({ kind, target, name }) => kind === "write" && (target === "config" || name === "DEVICE_STATUS"))
      .map(({ target, value }) => (target === "config" ? `command ${value}` : `status ${value}`));
    assert.deepEqual(steps, [
      ...["command 2", "status 0", "command 6", "status 1", "status 3", "status 11", "status 15"],
      ...["status 0", "command 2", "command 0"],
    ]);
  });

  test("bits of the command register that are not ours stay as they were", async () => {
    const fn = new FakePciFunction();
    fn.space[4] = 0x47;
    fn.space[5] = 0x04;
    const device = await Pci.attach(fn);
    assert.equal(fn.space[4] | (fn.space[5] << 8), 0x446);
    await device.close();
    assert.equal(fn.space[4] | (fn.space[5] << 8), 0x440);
  });

  test("maxQueues and maxQueueSize are what the queues say: the last that is there, the size that all take", async (t) => {
    const { device } = await attach(t, { queueSizes: [256, 64, 0, 1024, 0] });
    assert.equal(device.maxQueues, 4);
    assert.equal(device.maxQueueSize, 64);
    const none = await attach(t, { queueSizes: [0] });
    assert.equal(none.device.maxQueues, 0);
    const many = await attach(t, { queueSizes: Array.from({ length: 1500 }, () => 16), msixVectors: 3 });
    assert.equal(many.device.maxQueues, 1500);
  });
});
