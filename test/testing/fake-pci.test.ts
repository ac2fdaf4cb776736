/** FakePciFunction itself: every rule that a driver can break is noticed, written down, and stops the access. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { EventFd } from "../../src/sys/index.js";
import { FakePciFunction, type FakePciOptions } from "../../src/testing/index.js";
import { MemoryRegion } from "../../src/memory/index.js";
import { turn } from "../sys/helpers.js";
import { BASE, Hand, IOVA, running } from "./pci-hand.js";

/** What breaks a rule: the rule, and what is done. */
const BROKEN: readonly [rule: RegExp, (hand: Hand) => unknown, FakePciOptions?][] = [
  [/no access to DEVICE_STATUS/, ({ common }) => common.read(0x14, 2)],
  [/no access to DEVICE_FEATURE/, ({ common }) => common.read(4, 2)],
  [/no access to QUEUE_DESC_HI/, ({ common }) => common.write(0x26, 2, 0)],
  [/not aligned/, ({ common }) => common.read(0x11, 2)],
  [/beyond 60 bytes/, ({ common }) => common.read(0x3c, 2)],
  [/no virtio structure/, ({ bar }) => bar.read(4, 1)],
  [/does not decode/, (hand) => (hand.fn.writeConfig(4, 2, 0), hand.read("DEVICE_STATUS"))],
  [/after close/, ({ common }) => (common.close(), common.read(0x14, 1))],
  [/not in BAR 4/, ({ fn }) => fn.openRegisters(4, 0x1_0000, 1)],
  [/not in BAR 0/, ({ fn }) => fn.openRegisters(0, 0, 1)],
  [/not for a driver to write/, ({ fn }) => fn.writeConfig(0x40, 1, 0)],
  [/of config space/, ({ fn }) => fn.readConfig(0x41, 2)],
  ...(["DEVICE_FEATURE", "NUM_QUEUES", "CONFIG_GENERATION", "QUEUE_NOTIFY_OFF"] as const).map(
    (name) =>
      [/is read-only/, (hand: Hand) => hand.write(name, 0)] as const satisfies [RegExp, (hand: Hand) => unknown],
  ),
  [/skips ACKNOWLEDGE/, (hand) => hand.write("DEVICE_STATUS", 2)],
  [/skips DRIVER/, (hand) => hand.write("DEVICE_STATUS", 1).write("DEVICE_STATUS", 9)],
  [/skips FEATURES_OK/, (hand) => hand.write("DEVICE_STATUS", 1).write("DEVICE_STATUS", 3).write("DEVICE_STATUS", 7)],
  [/clears bits/, (hand) => hand.write("DEVICE_STATUS", 1).write("DEVICE_STATUS", 2)],
  [/before DRIVER/, (hand) => hand.write("DRIVER_FEATURE", 0)],
  [/after FEATURES_OK/, (hand) => hand.agree().write("DRIVER_FEATURE", 0)],
  [/are not offered/, (hand) => hand.agree(BASE | 1n)],
  [/after FAILED/, (hand) => hand.write("DEVICE_STATUS", 129).write("QUEUE_SELECT", 0)],
  [/refused the features/, (hand) => ((hand.fn.refusesFeatures = true), hand.agree().write("DEVICE_STATUS", 15))],
  [
    /before the reset was complete/,
    (hand) => ((hand.fn.resetReads = 1), hand.write("DEVICE_STATUS", 0).write("DEVICE_STATUS", 1)),
  ],
  [
    /before the reset was complete/,
    (hand) => ((hand.fn.resetReads = 1), hand.write("DEVICE_STATUS", 0).write("QUEUE_SELECT", 0)),
  ],
  [/before FEATURES_OK/, (hand) => hand.write("QUEUE_SIZE", 8)],
  [/before FEATURES_OK/, ({ bar }) => bar.write(0x1000, 4, 0)],
  [/which is not there/, (hand) => hand.agree().write("QUEUE_SELECT", 2).write("QUEUE_SIZE", 8)],
  [/queue_size 0/, (hand) => hand.agree().write("QUEUE_SIZE", 0)],
  [/queue_size 32/, (hand) => hand.agree().write("QUEUE_SIZE", 32)],
  [/queue_size 12 of a split/, (hand) => hand.agree().write("QUEUE_SIZE", 12)],
  [/queue_enable 0/, (hand) => hand.agree().write("QUEUE_ENABLE", 0)],
  [/has no addresses/, (hand) => hand.agree().write("QUEUE_ENABLE", 1)],
  [/while it runs/, (hand) => hand.agree().place(IOVA).write("QUEUE_DESC_LO", 0)],
  [/enabled with 0 vectors/, (hand) => hand.agree().write("CONFIG_MSIX_VECTOR", 0)],
  [/enabled with 0 vectors/, (hand) => hand.agree().write("QUEUE_MSIX_VECTOR", 1)],
  [/with its feature only/, (hand) => hand.agree().read("QUEUE_NOTIF_CONFIG_DATA")],
  [/with its feature only/, (hand) => hand.agree().read("QUEUE_RESET")],
  [/without RING_RESET/, (hand) => hand.agree().place(IOVA).write("QUEUE_RESET", 1)],
  [/blocks queue 0/, (hand) => hand.agree().place(IOVA).write("DEVICE_STATUS", 15)],
  [/before DRIVER_OK/, (hand) => hand.agree().bar.write(0x2000, 2, 0)],
  [/not for reading/, ({ bar }) => bar.read(0x2000, 2)],
  [/ISR status is read-only/, ({ bar }) => bar.write(0, 1, 0)],
  [/of 3 vectors/, ({ fn }) => fn.setMsix(new Array<EventFd>(4))],
  [/INTx of a function without it/, ({ fn }) => fn.setIntx(undefined), { hasIntx: false }],
  [/setRelease after close/, ({ fn }) => (fn.close(), fn.setRelease(undefined))],
];

describe("rules", () => {
  for (const [i, [rule, act, options]] of BROKEN.entries()) {
    test(`${i}: ${rule.source}`, () => {
      const hand = new Hand(options);
      assert.throws(() => act(hand), rule);
      assert.equal(hand.fn.violations.length, 1);
      assert.match(hand.fn.violations[0], rule);
    });
  }

  test("those of a running queue: notifications, ISR with MSI-X, memory that is taken, bus mastering", (t) => {
    const { hand, region } = running(t);
    const { fn, bar } = hand;
    const rules: [RegExp, () => unknown][] = [
      [/notification of 4 bytes/, () => bar.write(0x2000, 4, 0)],
      [/which is no queue's/, () => bar.write(0x2000, 2, 1)],
      [/queue 1, which does not run/, () => bar.write(0x2004, 2, 1)],
      [/read while MSI-X is enabled/, () => bar.read(0, 1)],
      [/unmapped while it ran/, () => fn.unmapDma(region)],
      [/without bus mastering/, () => (fn.writeConfig(4, 2, 2), fn.queues[0].interrupt())],
    ];
    for (const [rule, act] of rules) assert.throws(act, rule, rule.source);
    assert.equal(fn.violations.length, rules.length);
  });

  test("a queue that is started without bus mastering", (t) => {
    const hand = new Hand();
    const region = MemoryRegion.create({ name: "fake-pci-test", size: 1, iova: IOVA });
    t.after(() => region.close());
    hand.fn.mapDma(region);
    assert.throws(() => hand.agree().place(IOVA).write("DEVICE_STATUS", 15), /without bus mastering/);
  });

  test("I/O ports decode by a bit of their own", () => {
    const fn = new FakePciFunction({
      bars: { 2: 64, 4: 0x1_0000 },
      ioBars: [2],
      capabilities: (all) => [{ type: 3, bar: 2, offset: 0, length: 1 }, ...all],
    });
    const isr = fn.openRegisters(2, 0, 1);
    fn.writeConfig(4, 2, 2);
    assert.throws(() => isr.read(0, 1), /does not decode/);
    fn.writeConfig(4, 2, 1);
    assert.equal(isr.read(0, 1), 0);
  });
});

describe("what it does", () => {
  test("PCI-DEV-09 notifications reach the device; nothing signals without a vector; a reset ends it", async (t) => {
    const seen: number[] = [];
    const { hand, event } = running(t, { onNotify: (queue) => seen.push(queue.index) });
    hand.bar.write(0x2000, 2, 0);
    await turn();
    assert.deepEqual(seen, [0]);
    assert.deepEqual(hand.fn.queues[0].notifications, [0]);
    hand.fn.queues[0].interrupt();
    assert.ok(!event.drain(), "the queue has no vector");
    hand.fn.changeConfig(Uint8Array.of(1));
    assert.ok(!event.drain(), "nor has the config");
    const [queue] = hand.fn.queues;
    hand.write("DEVICE_STATUS", 0);
    assert.equal(hand.read("DEVICE_STATUS"), 0);
    assert.deepEqual(hand.fn.queues, []);
    assert.deepEqual(queue.take(), []);
    assert.deepEqual(hand.fn.violations, []);
  });

  test("INTx signals once until it is unmasked, and again if the reason is still there", (t) => {
    const event = EventFd.create();
    t.after(() => event.close());
    const { fn, bar } = new Hand({ msixVectors: 0 });
    fn.setIntx(event);
    fn.changeConfig(Uint8Array.of(1));
    assert.ok(event.drain());
    fn.changeConfig(Uint8Array.of(2));
    assert.ok(!event.drain(), "it is masked");
    fn.unmaskIntx();
    assert.ok(event.drain(), "nobody has read the ISR");
    assert.equal(bar.read(0, 1), 2);
    fn.unmaskIntx();
    assert.ok(!event.drain());
  });

  test("a device that was removed reads as ones, and hears nothing", () => {
    const hand = new Hand();
    hand.fn.remove();
    hand.write("DEVICE_STATUS", 1);
    assert.equal(hand.read("DEVICE_STATUS"), 0xff);
    assert.equal(hand.read("DEVICE_FEATURE"), 0xffff_ffff);
    assert.equal(hand.fn.readConfig(0, 2), 0xffff);
    assert.equal(hand.fn.status, 0);
  });

  test("the log has everything in order; onAccess comes first, and can fail it", () => {
    const hand = new Hand();
    hand.fn.log.length = 0;
    hand.write("QUEUE_SELECT", 1).read("QUEUE_NOTIFY_OFF");
    hand.fn.onAccess = ({ name }) => {
      if (name === "QUEUE_SELECT") throw new Error("no");
    };
    assert.throws(() => hand.write("QUEUE_SELECT", 0), /no/);
    assert.deepEqual(hand.fn.log, [
      { kind: "write", target: "common", name: "QUEUE_SELECT", offset: 0x16, width: 2, value: 1 },
      { kind: "read", target: "common", name: "QUEUE_NOTIFY_OFF", offset: 0x1e, width: 2, value: 1 },
    ]);
    assert.deepEqual(hand.fn.written("QUEUE_SELECT"), [1]);
    assert.equal(hand.read("QUEUE_NOTIFY_OFF"), 1);
  });

  test("wrong options are refused", () => {
    // @ts-expect-error: it is called queueSizes
    assert.throws(() => new FakePciFunction({ queuesizes: [1] }), /"queueSizes"/);
    assert.throws(() => new FakePciFunction({ msixVectors: 2049 }), RangeError);
    const many = Array.from({ length: 20 }, () => ({ type: 9, bar: 0, offset: 0, length: 0 }));
    assert.throws(() => new FakePciFunction({ capabilities: () => many }), RangeError);
  });
});
