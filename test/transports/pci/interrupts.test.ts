/** Interrupts of a PCI device: vectors for each, vectors that are shared, INTx, and what they are about. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import fc from "fast-check";
import { VirtioError } from "../../../src/errors.js";
import type { FakePciFunction } from "../../../src/testing/index.js";
import { vectorPlans } from "../../../src/transports/pci/interrupts.js";
import { turnUntil } from "../../sys/helpers.js";
import { attach, attachRunning, BASE, CONFIG, failure, signalled, start, woken } from "./support.js";

const THREE = { queueSizes: [16, 16, 16], config: CONFIG };

describe("plans", () => {
  test("PCI-DRV-26 PCI-DRV-27 no vector beyond the table, the config on one, each queue on one; best plan first", () => {
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 300 }), fc.integer({ min: 1, max: 2048 }), (queues, vectors) => {
        const plans = vectorPlans(queues, vectors);
        assert.equal(plans.at(-1)?.count, 1);
        for (const plan of plans) {
          assert.ok(plan.count <= vectors && plan.count <= queues + 1);
          assert.equal(plan.queues.length, queues);
          for (const vector of [plan.config, ...plan.queues]) assert.ok(vector >= 0 && vector < plan.count);
          assert.equal(new Set([plan.config, ...plan.queues]).size, plan.count, "each vector is used");
        }
        assert.ok(plans.every(({ count }, i) => i === 0 || count < plans[i - 1].count));
      }),
    );
    assert.deepEqual(vectorPlans(3, 8)[0], { count: 4, config: 0, queues: [1, 2, 3] });
    assert.deepEqual(vectorPlans(3, 3)[0], { count: 3, config: 0, queues: [1, 2, 1] });
    assert.deepEqual(vectorPlans(3, 1), [{ count: 1, config: 0, queues: [0, 0, 0] }]);
  });
});

describe("MSI-X", () => {
  test("PCI-DRV-26 PCI-DRV-28 with a vector for each, a queue's interrupt is its completion, without our help", async (t) => {
    for (const msixVectors of [4, 2048]) {
      const { fn, queues } = await attachRunning(t, { ...THREE, msixVectors });
      assert.deepEqual(fn.written("CONFIG_MSIX_VECTOR"), [0]);
      assert.deepEqual(fn.written("QUEUE_MSIX_VECTOR"), [1, 2, 3]);
      for (const vector of ["CONFIG_MSIX_VECTOR", "QUEUE_MSIX_VECTOR"]) {
        const written = fn.log.flatMap(({ kind, name }, i) => (kind === "write" && name === vector ? [i] : []));
        for (const i of written) assert.deepEqual([fn.log[i + 1].kind, fn.log[i + 1].name], ["read", vector]);
      }
      fn.queues[1].interrupt();
      assert.deepEqual(signalled(queues), [1]);
    }
  });

  test("PCI-DRV-27 with fewer vectors, queues share them, and all of them are signalled", async (t) => {
    const all = [0, 1, 2];
    const cases = [
      { msixVectors: 3, vectors: [1, 2, 1], together: [[0, 2], [1], [0, 2]] },
      { msixVectors: 2, vectors: [1, 1, 1], together: [all, all, all] },
      { msixVectors: 1, vectors: [0, 0, 0], together: [all, all, all] },
    ];
    for (const { msixVectors, vectors, together } of cases) {
      const { fn, queues } = await attachRunning(t, { ...THREE, msixVectors });
      assert.deepEqual(fn.written("QUEUE_MSIX_VECTOR"), vectors);
      for (const [i, expected] of together.entries()) {
        fn.queues[i].interrupt();
        assert.deepEqual(await woken(queues, expected), expected, `queue ${i}, ${msixVectors} vectors`);
      }
    }
  });

  test("PCI-DRV-28 a vector that reads back as NO_VECTOR is shared instead", async (t) => {
    const { fn, queues } = await attachRunning(
      t,
      { ...THREE },
      { prepare: (each) => (each.takesVector = (vector) => vector < 2) },
    );
    assert.deepEqual(
      fn.log.filter(({ name }) => name === "setMsix").map(({ value }) => value),
      [4, 0, 2],
    );
    assert.deepEqual(fn.written("QUEUE_MSIX_VECTOR").slice(-3), [1, 1, 1]);
    fn.queues[2].interrupt();
    assert.deepEqual(await woken(queues, [2]), [0, 1, 2]);
  });

  test("PCI-DRV-28 a device that takes one vector only gets everything on it; one that takes none is refused", async (t) => {
    const one = await attachRunning(t, THREE, { prepare: (each) => (each.takesVector = (vector) => vector === 0) });
    assert.deepEqual(one.fn.written("QUEUE_MSIX_VECTOR").slice(-3), [0, 0, 0]);
    const { fn, device } = await attach(t, THREE, (each) => (each.takesVector = () => false));
    await assert.rejects(start(device), failure("ERR_VIRTIO_REJECTED", "4"));
    assert.equal(fn.log.filter(({ name }) => name === "setMsix").at(-1)?.value, 0, "MSI-X is off again");
    assert.deepEqual(fn.written("QUEUE_ENABLE"), []);
  });

  test("PCI-DRV-28 the vector of the config is verified as well", async (t) => {
    const refusing = (each: FakePciFunction) => (each.takesVector = (_vector, queue) => queue !== undefined);
    const { fn, device } = await attach(t, THREE, refusing);
    await assert.rejects(start(device), failure("ERR_VIRTIO_REJECTED"));
    assert.deepEqual(fn.written("QUEUE_ENABLE"), []);
  });

  test("where the system is short of vectors, fewer are tried; the last refusal is told", async (t) => {
    const short = (least: number) => (each: { onAccess?: unknown }) => {
      each.onAccess = ({ name, value }: { name: string; value: number }) => {
        if (name === "setMsix" && value > least) throw new VirtioError("ERR_VIRTIO_SYSCALL", "ENOSPC", { errno: 28 });
      };
    };
    const { fn } = await attachRunning(t, THREE, { prepare: short(2) });
    assert.deepEqual(fn.written("QUEUE_MSIX_VECTOR"), [1, 1, 1]);
    const { device } = await attach(t, THREE, short(0));
    await assert.rejects(start(device), failure("ERR_VIRTIO_SYSCALL", "ENOSPC"));
  });

  test("PCI-DRV-20 the ISR status is never read while MSI-X is on", async (t) => {
    const { fn, device, queues } = await attachRunning(t, { ...THREE, msixVectors: 1 });
    let changes = 0;
    device.onConfigChange = () => changes++;
    fn.queues[0].interrupt();
    fn.changeConfig(Uint8Array.of(9));
    assert.deepEqual(await woken(queues, [0]), [0, 1, 2]);
    assert.ok(await turnUntil(() => changes === 1));
    assert.ok(fn.log.every(({ target }) => target !== "isr"));
  });
});

describe("INTx", () => {
  test("without MSI-X the ISR byte says what it is about; the line is let through again", async (t) => {
    const { fn, device, queues } = await attachRunning(t, { ...THREE, msixVectors: 0 });
    assert.deepEqual(fn.written("QUEUE_MSIX_VECTOR"), []);
    let changes = 0;
    device.onConfigChange = () => changes++;
    for (let round = 1; round <= 3; round++) {
      fn.queues[1].interrupt();
      assert.deepEqual(await woken(queues, [0, 1, 2]), [0, 1, 2], `round ${round}`);
      assert.equal(changes, round - 1);
      fn.changeConfig(Uint8Array.of(round));
      assert.ok(await turnUntil(() => changes === round));
      assert.deepEqual(signalled(queues), []);
    }
    const isr = fn.log.filter(({ target }) => target === "isr").map(({ value }) => value);
    assert.deepEqual(isr, [1, 2, 1, 2, 1, 2]);
    await device.close();
    assert.deepEqual(
      fn.log.filter(({ name }) => name === "setIntx").map(({ value }) => value),
      [1, 0],
    );
  });

  test("a device with no way to interrupt is refused", async (t) => {
    const none = await attach(t, { msixVectors: 0, hasIntx: false });
    await assert.rejects(start(none.device), failure("ERR_VIRTIO_UNSUPPORTED", "neither MSI-X nor INTx"));
    const noIsr = await attach(t, { msixVectors: 0, capabilities: (all) => all.filter(({ type }) => type !== 3) });
    await assert.rejects(start(noIsr.device), failure("ERR_VIRTIO_UNSUPPORTED", "no ISR status"));
  });

  test("with MSI-X a missing ISR status does not matter", async (t) => {
    await attachRunning(t, { capabilities: (all) => all.filter(({ type }) => type !== 3) });
  });
});

describe("changes of the config", () => {
  test("PCI-DRV-32 one interrupt that means both a queue and the config is heard as both", async (t) => {
    for (const msixVectors of [0, 1]) {
      const { fn, device, queues } = await attachRunning(t, { ...THREE, msixVectors });
      let changes = 0;
      device.onConfigChange = () => changes++;
      // Both before the driver gets to see either.
      fn.changeConfig(Uint8Array.of(77));
      fn.queues[0].interrupt();
      assert.deepEqual(await woken(queues, [0]), [0, 1, 2], `${msixVectors} vectors`);
      assert.ok(await turnUntil(() => changes > 0));
      assert.equal(changes, 1);
      assert.equal((await device.readConfig(0, 1))[0], 77);
    }
  });

  test("an interrupt of queues on the same vector is no change of the config", async (t) => {
    const { fn, device, queues } = await attachRunning(t, { ...THREE, msixVectors: 1 });
    let changes = 0;
    device.onConfigChange = () => changes++;
    for (let i = 0; i < 3; i++) {
      fn.queues[i].interrupt();
      assert.deepEqual(await woken(queues, [0, 1, 2]), [0, 1, 2]);
    }
    assert.equal(changes, 0);
    fn.changeConfig(Uint8Array.of(1));
    assert.ok(await turnUntil(() => changes === 1));
    assert.deepEqual(signalled(queues), [0, 1, 2]);
    fn.queues[0].interrupt();
    assert.deepEqual(await woken(queues, [0, 1, 2]), [0, 1, 2]);
    assert.equal(changes, 1, "a change is told once");
  });

  test("each is told, also one that came while nobody read", async (t) => {
    const { fn, device } = await attachRunning(t, { ...THREE, features: BASE });
    let changes = 0;
    device.onConfigChange = () => changes++;
    fn.changeConfig(Uint8Array.of(1));
    assert.ok(await turnUntil(() => changes === 1));
    fn.changeConfig(Uint8Array.of(2));
    assert.ok(await turnUntil(() => changes === 2));
  });
});
