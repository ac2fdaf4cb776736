/** FakePciFunction as a device: what the specification demands of the registers, capabilities and interrupts of one. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { VIRTIO_MSI_NO_VECTOR, VirtioPciCapType, VirtioPciIsr } from "../../src/protocol/virtio-pci.js";
import { EventFd } from "../../src/sys/index.js";
import { FakePciFunction, type FakePciCapability, FakeVhostVdpa } from "../../src/testing/index.js";
import { VhostVdpa } from "../../src/transports/index.js";
import { VirtioFeature } from "../../src/virtqueue/index.js";
import { turn } from "../sys/helpers.js";
import { BASE, Hand, IOVA, running } from "./pci-hand.js";

const { NOTIFICATION_DATA, RING_RESET } = VirtioFeature;
/** Where the tests' functions have their structures in BAR 4, from 0x1000 on. */
const ISR = 0;
const DEVICE = 0x1000;

/** Events that are closed after the test. */
function events(t: { after(close: () => void): void }, count: number): EventFd[] {
  const made = Array.from({ length: count }, () => EventFd.create());
  t.after(() => {
    for (const event of made) event.close();
  });
  return made;
}

describe("the common configuration", () => {
  test("PCI-DEV-01 features in windows of 32 bits, 0 beyond the last; what the driver accepted can be read", () => {
    const offered = BASE | RING_RESET | (1n << 5n) | (1n << 100n);
    const hand = new Hand({ features: offered });
    const windows = [0, 1, 2, 3, 4, 5, 0x7fff_ffff].map((select) =>
      hand.write("DEVICE_FEATURE_SELECT", select).read("DEVICE_FEATURE"),
    );
    const bits = (from: bigint): number => Number((offered >> from) & 0xffff_ffffn);
    assert.deepEqual(windows, [bits(0n), bits(32n), bits(64n), bits(96n), 0, 0, 0]);
    assert.equal(hand.read("DEVICE_FEATURE_SELECT"), 0x7fff_ffff);
    hand.agree(BASE | (1n << 5n));
    const accepted = [0, 1, 2].map((select) => hand.write("DRIVER_FEATURE_SELECT", select).read("DRIVER_FEATURE"));
    assert.deepEqual(accepted, [1 << 5, Number(BASE >> 32n), 0]);
  });

  test("BASIC-DEV-13 devices whose addresses are translated say so, and none speaks of SR-IOV", async () => {
    const hand = new Hand();
    const features = [0, 1].map((select) => hand.write("DEVICE_FEATURE_SELECT", select).read("DEVICE_FEATURE"));
    assert.deepEqual(features, [0, Number(BASE >> 32n)]);
    const device = await VhostVdpa.open({ node: new FakeVhostVdpa().open() });
    assert.equal(device.offeredFeatures, BASE);
    await device.close();
  });

  test("PCI-DEV-02 the generation is another when a value has changed since it was read", () => {
    const hand = new Hand();
    const read = (): number[] => [hand.read("CONFIG_GENERATION"), hand.bar.read(DEVICE, 4)];
    const [first, before] = read();
    assert.deepEqual(read(), [first, before], "nothing changed");
    const seen = new Set([first]);
    for (let value = 1; value <= 200; value++) {
      hand.fn.changeConfig(Uint8Array.of(value));
      const [generation, now] = read();
      assert.equal(now, value);
      assert.ok(!seen.has(generation), `generation ${generation} again`);
      seen.add(generation);
    }
  });

  test("PCI-DEV-03 a status of 0 resets, and reads 0 when that is done; the queues are neither enabled nor reset", (t) => {
    const features = BASE | RING_RESET;
    const { hand } = running(t, { features }, features);
    assert.deepEqual([hand.read("DEVICE_STATUS"), hand.read("QUEUE_ENABLE")], [15, 1]);
    hand.fn.resetReads = 2;
    hand.write("DEVICE_STATUS", 0);
    assert.deepEqual(
      [1, 2, 3, 4].map(() => hand.read("DEVICE_STATUS")),
      [15, 15, 0, 0],
    );
    assert.deepEqual(hand.fn.queues, []);
    assert.equal(hand.read("QUEUE_ENABLE"), 0);
    hand.agree(features); // queue_reset is there with its feature only
    assert.deepEqual([hand.read("QUEUE_ENABLE"), hand.read("QUEUE_RESET")], [0, 0]);
    // Also from the midst of the reset of a queue.
    hand.place(IOVA).write("DEVICE_STATUS", 15);
    hand.fn.queueResetReads = 9;
    hand.fn.resetReads = 0;
    assert.equal(hand.write("QUEUE_RESET", 1).read("QUEUE_RESET"), 1);
    assert.equal(hand.write("DEVICE_STATUS", 0).read("DEVICE_STATUS"), 0);
    hand.agree(features);
    assert.deepEqual([hand.read("QUEUE_ENABLE"), hand.read("QUEUE_RESET")], [0, 0]);
  });

  test("VQ-DEV-01 PCI-DEV-04 queue_reset reads 1 while a queue is reset, then 0, as does queue_enable; 0 when enabled anew", (t) => {
    const features = BASE | RING_RESET;
    const { hand, event } = running(t, { features }, features);
    hand.fn.queueResetReads = 3;
    const [queue] = hand.fn.queues;
    hand.write("QUEUE_RESET", 1);
    assert.deepEqual(hand.fn.queues, [queue]);
    assert.deepEqual(
      [1, 2, 3, 4, 5].map(() => hand.read("QUEUE_RESET")),
      [1, 1, 1, 0, 0],
    );
    assert.equal(hand.read("QUEUE_ENABLE"), 0);
    assert.deepEqual(hand.fn.queues, []);
    assert.deepEqual(queue.take(), []);
    assert.throws(() => hand.bar.write(0x2000, 2, 0), /queue 0, which does not run/);
    queue.interrupt();
    assert.ok(!event.drain(), "a reset queue was notified for");
    assert.deepEqual([hand.read("QUEUE_SIZE"), hand.read("QUEUE_DESC_LO")], [16, 0], "as after switching on");
    hand.place(IOVA);
    assert.deepEqual([hand.read("QUEUE_ENABLE"), hand.read("QUEUE_RESET")], [1, 0]);
    assert.equal(hand.fn.queues.length, 1);
  });

  test("PCI-DEV-05 queue_size is 0 for a queue that is not there, and a power of two for others", () => {
    const hand = new Hand({ queueSizes: [16, 0, 1024] });
    const sizes = [0, 1, 2, 3, 0xffff].map((index) => hand.write("QUEUE_SELECT", index).read("QUEUE_SIZE"));
    assert.deepEqual(sizes, [16, 0, 1024, 0, 0]);
    for (const size of [100, 3, -1, 65_536, 1.5]) {
      assert.throws(() => new FakePciFunction({ queueSizes: [size] }), RangeError, String(size));
    }
  });
});

test("PCI-DEV-06 the notification structure has room for each queue, unless a test wants it otherwise", () => {
  for (const queues of [1, 2, 7, 64]) {
    for (const notifyMultiplier of [0, 2, 4, 4096 / queues]) {
      let notify: FakePciCapability | undefined;
      const queueSizes = new Array<number>(queues).fill(16);
      const hand = new Hand({
        ...{ queueSizes, features: BASE | NOTIFICATION_DATA, bars: { 4: 1 << 20 } },
        notifyMultiplier: 2 ** Math.floor(Math.log2(notifyMultiplier)),
        capabilities: (all) => ((notify = all.find(({ type }) => type === VirtioPciCapType.NOTIFY_CFG)), all),
      });
      assert.ok(notify?.multiplier !== undefined);
      assert.ok(Number.isInteger(Math.log2(notify.multiplier)) || notify.multiplier === 0);
      assert.equal(notify.offset % 4, 0);
      for (let index = 0; index < queues; index++) {
        const offset = hand.write("QUEUE_SELECT", index).read("QUEUE_NOTIFY_OFF");
        assert.ok(notify.length >= offset * notify.multiplier + 4, `queue ${index} of ${queues}`);
      }
    }
  }
});

describe("interrupts", () => {
  test("PCI-DEV-07 the ISR tells of config and queues before INTx signals, and is cleared by reading", (t) => {
    const [intx] = events(t, 1);
    const { hand } = running(t, { msixVectors: 0 });
    const { fn, bar } = hand;
    fn.setIntx(intx);
    assert.equal(bar.read(ISR, 1), 0);
    fn.changeConfig(Uint8Array.of(1));
    assert.ok(intx.drain());
    assert.deepEqual([bar.read(ISR, 1), bar.read(ISR, 1)], [VirtioPciIsr.CONFIG, 0]);
    fn.unmaskIntx();
    fn.queues[0].interrupt();
    assert.ok(intx.drain());
    assert.equal(bar.read(ISR, 1), VirtioPciIsr.QUEUE);
    fn.unmaskIntx();
    fn.queues[0].interrupt();
    fn.interruptConfig();
    assert.equal(bar.read(ISR, 1), VirtioPciIsr.CONFIG | VirtioPciIsr.QUEUE);
    assert.equal(bar.read(ISR, 1), 0);
  });

  test("PCI-DEV-08 every event can have every vector, or none; what is refused reads NO_VECTOR; a reset unmaps all", (t) => {
    const vectors = events(t, 3);
    const { hand } = running(t);
    const { fn } = hand;
    const map = (config: number, queue: number): number[] => {
      hand.write("DEVICE_STATUS", 0).read("DEVICE_STATUS");
      fn.setMsix(vectors);
      assert.deepEqual(
        [hand.read("CONFIG_MSIX_VECTOR"), hand.write("QUEUE_SELECT", 0).read("QUEUE_MSIX_VECTOR")],
        [VIRTIO_MSI_NO_VECTOR, VIRTIO_MSI_NO_VECTOR],
        "unmapped by the reset",
      );
      hand.agree().write("CONFIG_MSIX_VECTOR", config);
      hand.write("QUEUE_SELECT", 0).write("QUEUE_MSIX_VECTOR", queue);
      hand.place(IOVA).write("DEVICE_STATUS", 15);
      return [hand.read("CONFIG_MSIX_VECTOR"), hand.read("QUEUE_MSIX_VECTOR")];
    };
    const signalled = (): number[] => vectors.flatMap((event, i) => (event.drain() ? [i] : []));
    const none = VIRTIO_MSI_NO_VECTOR;
    for (const config of [0, 1, 2, none]) {
      for (const queue of [0, 1, 2, none]) {
        assert.deepEqual(map(config, queue), [config, queue]);
        fn.interruptConfig();
        assert.deepEqual(signalled(), config === none ? [] : [config]);
        fn.queues[0].interrupt();
        assert.deepEqual(signalled(), queue === none ? [] : [queue]);
      }
    }
    fn.takesVector = (vector) => vector !== 2;
    assert.deepEqual(map(2, 1), [none, 1]);
    fn.takesVector = (_vector, queue) => queue === undefined;
    assert.deepEqual(map(2, 1), [2, none]);
    assert.deepEqual(fn.violations, []);
  });

  test("PCI-DEV-09 nothing is signalled for what has no vector, also with work to tell of", async (t) => {
    const { hand, event } = running(t);
    hand.fn.queues[0].interrupt();
    hand.fn.interruptConfig();
    hand.fn.breakDown();
    await turn();
    assert.ok(!event.drain());
  });
});
