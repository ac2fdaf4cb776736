/** Finding the structures of a PCI device: ids, capabilities of every shape, config spaces that nobody should trust. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import fc from "fast-check";
import { VirtioError } from "../../../src/errors.js";
import { VirtioPciCapType } from "../../../src/protocol/index.js";
import { type FakePciCapability, FakePciFunction, type FakePciOptions } from "../../../src/testing/index.js";
import { readLayout } from "../../../src/transports/pci/capabilities.js";
import { Pci } from "../../../src/transports/index.js";
import { attach, attachRunning, CONFIG, failure } from "./support.js";

const { COMMON_CFG, NOTIFY_CFG, ISR_CFG, DEVICE_CFG, PCI_CFG, SHARED_MEMORY_CFG, VENDOR_CFG } = VirtioPciCapType;

/** What is found on a function. */
function layout(options: FakePciOptions = {}) {
  return readLayout(new FakePciFunction(options));
}

/** Options that put capabilities before the usual ones. */
function before(...first: FakePciCapability[]): FakePciOptions {
  return { capabilities: (standard) => [...first, ...standard] };
}

/** Options that change the usual capability of a type. */
function changed(type: number, change: Partial<FakePciCapability>): FakePciOptions {
  return { capabilities: (all) => all.map((each) => (each.type === type ? { ...each, ...change } : each)) };
}

/** Refusal of a function, and that nothing was written to it and nothing is left of it. */
async function refused(fn: FakePciFunction, expected: (error: unknown) => true): Promise<void> {
  await assert.rejects(Pci.attach(fn), expected);
  assert.deepEqual(
    fn.log.filter(({ kind }) => kind === "write"),
    [],
  );
  assert.ok(fn.closed);
}

describe("ids", () => {
  test("PCI-DRV-01 device ids from 0x1040 on are the device type + 0x1040, of vendor 0x1af4", async () => {
    for (const type of [1, 2, 26, 63]) assert.equal(layout({ deviceId: 0x1040 + type }).deviceType, type);
    for (const deviceId of [0x1080, 0x0fff, 0x2042]) {
      await refused(new FakePciFunction({ deviceId }), failure("ERR_VIRTIO_ADDRESS", `0x${deviceId.toString(16)}`));
    }
    const fn = new FakePciFunction();
    fn.space[0] = 0x86;
    await refused(fn, failure("ERR_VIRTIO_ADDRESS", "0x1a86:0x1042"));
  });

  test("PCI-DRV-02 transitional ids stand for their types, others of that range for none", async () => {
    const types = { 0x1000: 1, 0x1001: 2, 0x1002: 5, 0x1003: 3, 0x1004: 8, 0x1005: 4, 0x1009: 9 };
    for (const [id, type] of Object.entries(types)) assert.equal(layout({ deviceId: Number(id) }).deviceType, type);
    for (const deviceId of [0x1006, 0x1008, 0x103f]) {
      await refused(new FakePciFunction({ deviceId }), failure("ERR_VIRTIO_ADDRESS"));
    }
  });

  test("PCI-DRV-03 any revision will do", () => {
    for (const revision of [0, 1, 0xff]) assert.equal(layout({ revision }).deviceType, 2);
  });

  test("a function that was removed before it was opened is said to be", async () => {
    const fn = new FakePciFunction();
    fn.remove();
    await refused(fn, failure("ERR_VIRTIO_DISCONNECTED", "does not answer"));
  });
});

describe("capabilities", () => {
  test("PCI-DRV-25 a legacy device is refused with nothing written to it", async () => {
    await refused(new FakePciFunction({ capabilities: () => [] }), failure("ERR_VIRTIO_FEATURES", "legacy"));
    await refused(new FakePciFunction({ capabilities: () => [], msixVectors: 0 }), failure("ERR_VIRTIO_FEATURES"));
    const vendor = { type: VENDOR_CFG, bar: 0, offset: 0, length: 0 };
    await refused(new FakePciFunction({ capabilities: () => [vendor] }), failure("ERR_VIRTIO_FEATURES", "legacy"));
  });

  test("PCI-DRV-05 reserved types are ignored", async (t) => {
    const odd = [0, 6, 7, 10, 0x80, 0xff].map((type) => ({ type, bar: 4, offset: 0x8000, length: 64 }));
    const { device } = await attach(t, { ...before(...odd), config: CONFIG });
    assert.equal((await device.readConfig(5, 1))[0], 5);
  });

  test("PCI-DRV-06 the first capability of a type that can be used is", async (t) => {
    const first = { type: NOTIFY_CFG, bar: 2, offset: 0x10, length: 0x10, multiplier: 4 };
    assert.equal(layout(before(first)).notify.bar, 4, "BAR 2 cannot be reached here");
    const io = { ...before(first), bars: { 2: 0x20, 4: 0x1_0000 }, ioBars: [2] };
    assert.deepEqual(layout(io).notify, { bar: 2, offset: 0x10, length: 0x10, isIo: true, multiplier: 4 });
    const { fn } = await attach(t, io);
    assert.deepEqual(fn.log.find(({ kind }) => kind === "write")?.value, 0b11, "I/O and memory decode");
  });

  test("PCI-DRV-07 a capability may be longer than the specification says", () => {
    for (const type of [COMMON_CFG, NOTIFY_CFG, ISR_CFG])
      assert.equal(layout(changed(type, { size: 32 })).common.bar, 4);
  });

  test("PCI-DRV-08 capabilities with a reserved BAR are ignored", () => {
    const odd = [6, 7, 255].map((bar) => ({ type: COMMON_CFG, bar, offset: 0, length: 64 }));
    assert.equal(layout(before(...odd)).common.bar, 4);
    assert.throws(() => layout(changed(COMMON_CFG, { bar: 6 })), failure("ERR_VIRTIO_CONFIG", "reserved BAR 6"));
  });

  test("PCI-DRV-09 PCI-DRV-10 of structures that claim to be huge only what is needed is mapped", async (t) => {
    const length = 2 ** 31;
    for (const type of [COMMON_CFG, NOTIFY_CFG, ISR_CFG, DEVICE_CFG]) {
      const last = (each: FakePciCapability) => (each.type === type ? { ...each, length, offset: 0x8000 } : each);
      const { fn, device } = await attachRunning(t, {
        capabilities: (all) => all.map(last),
        ...{ config: CONFIG, bars: { 4: 2 ** 32 } },
      });
      await device.readConfig(0, 16);
      assert.ok(fn.opened.length >= 4);
      assert.ok(
        fn.opened.every((stretch) => stretch.length <= 4096),
        JSON.stringify(fn.opened),
      );
      // What a BAR does not have cannot be used.
      assert.equal(layout({ capabilities: (all) => all.map(last), bars: { 4: 0x9000 } }).common.length <= 0x1000, true);
    }
  });

  test("PCI-DRV-10 a structure that is too small, or not in its BAR, is refused", async () => {
    const bad: [number, Partial<FakePciCapability>, string][] = [
      [COMMON_CFG, { length: 55 }, "has 55 bytes"],
      [COMMON_CFG, { offset: 0x1_0000 - 32 }, "has 32 bytes"],
      [COMMON_CFG, { offset: 0x2_0000 }, "has 0 bytes"],
      [COMMON_CFG, { offset: 2 }, "no multiple of 4"],
      [COMMON_CFG, { bar: 1 }, "cannot be reached"],
      [COMMON_CFG, { size: 15 }, "a capability of 15 bytes"],
      [NOTIFY_CFG, { size: 16 }, "a capability of 16 bytes"],
      [NOTIFY_CFG, { length: 1 }, "has 1 bytes"],
      [NOTIFY_CFG, { offset: 0x3001 }, "no multiple of 2"],
    ];
    for (const [type, change, words] of bad) {
      await refused(new FakePciFunction(changed(type, change)), failure("ERR_VIRTIO_CONFIG", words));
    }
    const without = (type: number) => ({
      capabilities: (all: readonly FakePciCapability[]) => all.filter((c) => c.type !== type),
    });
    await refused(new FakePciFunction(without(NOTIFY_CFG)), failure("ERR_VIRTIO_CONFIG", "no capability names one"));
    assert.equal(layout(without(ISR_CFG)).isr, undefined);
    assert.equal(layout({ ...without(DEVICE_CFG), config: CONFIG }).device, undefined);
  });

  test("PCI-DRV-11 nothing of config space but the command register is written in a whole life", async (t) => {
    const { fn, device } = await attach(t, before({ type: PCI_CFG, bar: 4, offset: 0, length: 4 }));
    await device.close();
    const writes = fn.log.filter(({ kind, target }) => kind === "write" && target === "config");
    assert.deepEqual(
      writes.map(({ offset, value }) => [offset, value]),
      [
        [4, 2],
        [4, 6],
        [4, 2],
        [4, 0],
      ],
    );
  });

  test("PCI-DRV-21 PCI-DRV-22 vendor data are not looked at beyond their type", async (t) => {
    const { fn } = await attach(t, before({ type: VENDOR_CFG, bar: 0xff, offset: 1, length: 1, size: 20 }));
    const at = fn.space.findIndex((_, i) => i >= 64 && i % 4 === 0 && fn.space[i] === 9 && fn.space[i + 3] === 9);
    assert.ok(at >= 64);
    assert.ok(fn.log.every(({ target, offset }) => target !== "config" || offset < at + 4 || offset >= at + 20));
  });

  test("PCI-DRV-26 the MSI-X table has as many vectors as its capability says, 1 to 2048", () => {
    for (const msixVectors of [0, 1, 2, 3, 2048]) assert.equal(layout({ msixVectors }).msixVectors, msixVectors);
  });

  test("shared memory regions are listed, with 64-bit offsets and lengths; impossible ones are not", async (t) => {
    const big = 2 ** 40;
    const { device } = await attach(t, {
      bars: { 2: big, 4: 0x1_0000 },
      ...before(
        { type: SHARED_MEMORY_CFG, id: 1, bar: 2, offset: 2 ** 33, length: 2 ** 34 + 4096 },
        { type: SHARED_MEMORY_CFG, id: 1, bar: 2, offset: 0, length: 4096 },
        { type: SHARED_MEMORY_CFG, id: 2, bar: 2, offset: big, length: 1 },
        { type: SHARED_MEMORY_CFG, id: 3, bar: 6, offset: 0, length: 1 },
        { type: SHARED_MEMORY_CFG, id: 5, bar: 2, offset: 0, length: 4096, size: 16 },
      ),
      msixVectors: 0,
    });
    assert.deepEqual(device.sharedMemory, [{ id: 1, bar: 2, offset: 2 ** 33, length: 2 ** 34 + 4096 }]);
  });

  test("a list that loops, or leads into the header, is refused", async () => {
    for (const [to, words] of [
      [0x40, "never ends"],
      [0x10, "into the header"],
    ] as const) {
      const fn = new FakePciFunction();
      const last = fn.space.lastIndexOf(9);
      fn.space[Math.floor(last / 4) * 4 + 1] = to;
      await refused(fn, failure("ERR_VIRTIO_CONFIG", words));
    }
  });

  test("the two lowest bits of pointers are ignored", () => {
    const fn = new FakePciFunction();
    fn.space[0x34] |= 3;
    assert.equal(readLayout(fn).common.bar, 4);
  });
});

describe("hostile config spaces", () => {
  const walk = (fn: FakePciFunction): void => {
    try {
      const found = readLayout(fn);
      for (const structure of [found.common, found.notify, found.isr, found.device]) {
        if (structure === undefined) continue;
        const { bar, offset, length } = structure;
        assert.ok(offset >= 0 && length > 0 && offset + length <= fn.barSize(bar));
      }
    } catch (error) {
      if (!(error instanceof VirtioError)) throw error;
    }
    assert.deepEqual(fn.violations, []);
    assert.ok(fn.log.length < 2000, `${fn.log.length} accesses`);
  };

  test("random bytes end the walk with a layout that fits, or a VirtioError", () => {
    fc.assert(
      fc.property(fc.uint8Array({ minLength: 252, maxLength: 252 }), (bytes) => {
        const fn = new FakePciFunction();
        fn.space.set(bytes, 4);
        fn.space[6] |= 0x10;
        walk(fn);
      }),
      { numRuns: 300 },
    );
  });

  test("so does a valid one with a few bytes changed", () => {
    const change = fc.tuple(fc.integer({ min: 0, max: 255 }), fc.integer({ min: 0, max: 255 }));
    fc.assert(
      fc.property(fc.array(change, { minLength: 1, maxLength: 6 }), (changes) => {
        const fn = new FakePciFunction({ config: CONFIG });
        for (const [at, value] of changes) fn.space[at] = value;
        walk(fn);
      }),
      { numRuns: 500 },
    );
  });

  test("so do capabilities of random contents", () => {
    const edge = fc.oneof(fc.nat({ max: 0x1_0010 }), fc.constantFrom(0, 0xffff_ffff, 0x8000_0000, 0xffff_fff0));
    const capability = fc.record({
      type: fc.integer({ min: 0, max: 10 }),
      bar: fc.constantFrom(0, 2, 4, 4, 4, 5, 6, 255),
      offset: edge,
      length: edge,
      size: fc.integer({ min: 0, max: 40 }),
      multiplier: edge,
    });
    fc.assert(
      fc.property(fc.array(capability, { maxLength: 4 }), (capabilities) => {
        walk(new FakePciFunction({ capabilities: () => capabilities, bars: { 2: 64, 4: 0x1_0000 } }));
      }),
      { numRuns: 300 },
    );
  });
});
