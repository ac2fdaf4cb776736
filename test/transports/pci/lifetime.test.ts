/** How a PCI device ends: it needs a reset, it is pulled out, the system wants it back, or one of its calls fails. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { VirtioError } from "../../../src/errors.js";
import { VirtioStatus } from "../../../src/protocol/index.js";
import { Pci } from "../../../src/transports/index.js";
import { type FakePciAccess, FakePciFunction } from "../../../src/testing/index.js";
import { VirtioFeature } from "../../../src/virtqueue/features.js";
import { turn, turnUntil } from "../../sys/helpers.js";
import { held } from "../support.js";
import { attach, attachRunning, BASE, CONFIG, failure, live, start } from "./support.js";

/** What `onLost` was called with. */
function losses(device: Pci): unknown[] {
  const seen: unknown[] = [];
  device.onLost = (error) => seen.push(error);
  return seen;
}

describe("DEVICE_NEEDS_RESET", () => {
  test("BASIC-DRV-04 it is noticed by the config interrupt, told once, and everything afterwards says so", async (t) => {
    for (const msixVectors of [0, 1, 2]) {
      const { fn, device } = await attachRunning(t, {
        config: CONFIG,
        msixVectors,
        features: BASE | VirtioFeature.RING_RESET,
      });
      const seen = losses(device);
      device.onConfigChange = () => assert.fail("no config changed");
      fn.breakDown();
      assert.ok(await turnUntil(() => seen.length > 0), `${msixVectors} vectors`);
      fn.interruptConfig();
      await turn();
      assert.equal(seen.length, 1);
      failure("ERR_VIRTIO_STATUS", "DEVICE_NEEDS_RESET")(seen[0]);
      assert.equal(fn.status & VirtioStatus.FAILED, VirtioStatus.FAILED);
      await assert.rejects(device.readConfig(0, 1), failure("ERR_VIRTIO_STATUS", "DEVICE_NEEDS_RESET"));
      await assert.rejects(device.resetQueue(0), failure("ERR_VIRTIO_STATUS"));
      await device.close();
      assert.equal(fn.status, 0, "close resets it");
    }
  });
});

describe("a device that is pulled out", () => {
  test("every operation that needs an answer says so, and close still releases everything", async () => {
    const before = held();
    const operations: [string, (device: Pci) => Promise<unknown>][] = [
      ["readConfig", (device) => device.readConfig(0, 8)],
      ["resetQueue", (device) => device.resetQueue(0)],
    ];
    for (const [name, operation] of operations) {
      const fn = new FakePciFunction({ config: CONFIG, features: BASE | VirtioFeature.RING_RESET });
      const device = await Pci.attach(fn);
      await start(device);
      const seen = losses(device);
      fn.remove();
      await assert.rejects(operation(device), failure("ERR_VIRTIO_DISCONNECTED", "removed"), name);
      assert.ok(await turnUntil(() => seen.length === 1));
      failure("ERR_VIRTIO_DISCONNECTED")(seen[0]);
      await device.close();
      assert.ok(fn.closed && fn.opened.every(({ isOpen }) => !isOpen));
      assert.deepEqual(fn.violations, []);
    }
    await turn();
    assert.deepEqual(held(), before);
  });

  test("whoever waits for the reset of a queue hears of it, long before the time is up", async (t) => {
    const features = BASE | VirtioFeature.RING_RESET;
    const { fn, device } = await attachRunning(
      t,
      { features },
      {
        prepare: (each) => (each.queueResetReads = Number.POSITIVE_INFINITY),
      },
    );
    const waiting = device.resetQueue(0, { timeout: 100_000 });
    fn.remove();
    await assert.rejects(waiting, failure("ERR_VIRTIO_DISCONNECTED", "removed"));
  });

  test("in each step of bringing it up that is an error in time, never a hang", async () => {
    const whole = new FakePciFunction({ config: CONFIG, features: BASE | VirtioFeature.RING_RESET });
    await live(whole);
    for (let at = 0; at < whole.log.length; at++) {
      const fn = new FakePciFunction({ config: CONFIG, features: BASE | VirtioFeature.RING_RESET });
      let count = 0;
      fn.onAccess = () => {
        if (count++ === at) fn.remove();
      };
      // Writes vanish without a trace, so the last steps may well "succeed".
      await live(fn, { timeout: 1000 }).catch((error: unknown) => {
        assert.ok(error instanceof VirtioError, `access ${at}: ${String(error)}`);
      });
      assert.ok(fn.closed, `access ${at}`);
      assert.deepEqual(fn.violations, [], `access ${at}`);
    }
  });

  test("INTx of one that is gone does not go round in circles", async () => {
    const fn = new FakePciFunction({ config: CONFIG, msixVectors: 0 });
    const device = await Pci.attach(fn);
    await start(device);
    const seen = losses(device);
    fn.queues[0].interrupt();
    fn.remove();
    assert.ok(await turnUntil(() => seen.length === 1));
    failure("ERR_VIRTIO_DISCONNECTED")(seen[0]);
    await device.close();
  });
});

test("the system wants the function back: told as a loss; close gives it", async (t) => {
  const { fn, device } = await attach(t);
  const seen = losses(device);
  fn.requestRelease();
  assert.ok(await turnUntil(() => seen.length === 1));
  failure("ERR_VIRTIO_DISCONNECTED", "wanted back by the system")(seen[0]);
  await assert.rejects(device.negotiate(0n), failure("ERR_VIRTIO_DISCONNECTED"));
  await device.close();
  assert.ok(fn.closed);
});

test("close is told to onLost, once", async (t) => {
  const { device } = await attach(t);
  const seen = losses(device);
  await device.close();
  await turn();
  assert.equal(seen.length, 1);
  failure("ERR_VIRTIO_CLOSED")(seen[0]);
});

test("no watcher of a device keeps the process alive", async () => {
  const { runChild } = await import("../../sys/helpers.js");
  const code = `
    import { Pci } from ${JSON.stringify(new URL("../../../src/transports/index.js", import.meta.url).href)};
    import { FakePciFunction } from ${JSON.stringify(new URL("../../../src/testing/index.js", import.meta.url).href)};
    await Pci.attach(new FakePciFunction());
    console.log("attached");`;
  const { stdout, signal } = runChild(code);
  assert.equal(stdout, "attached\n");
  assert.equal(signal, null);
});

describe("a call of the function that fails", () => {
  const options = { config: CONFIG, features: BASE | VirtioFeature.RING_RESET, queueSizes: [16, 16] };

  /** Live with access `at` failing, once or from then on. Returns what was accessed there, and how the life ended. */
  async function failAt(at: number, forever: boolean, msixVectors: number) {
    const fn = new FakePciFunction({ ...options, msixVectors });
    const injected = new VirtioError("ERR_VIRTIO_SYSCALL", "injected", { errno: 5, syscall: "ioctl" });
    let count = 0;
    let failed: FakePciAccess | undefined;
    fn.onAccess = (access) => {
      const now = count++;
      if (now < at || (now > at && !forever)) return;
      failed ??= access;
      throw injected;
    };
    const ending = await live(fn, { timeout: 1000 }).then(
      () => "well" as const,
      (error: unknown) => error,
    );
    return { fn, failed, ending, injected };
  }

  for (const forever of [false, true]) {
    for (const msixVectors of [3, 1, 0]) {
      const how = `${forever ? "from then on" : "once"}, ${msixVectors} vectors`;
      test(`each in turn, ${how}: the error comes out, nothing stays behind`, async () => {
        const whole = new FakePciFunction({ ...options, msixVectors });
        await live(whole);
        const before = held();
        for (let at = 0; at < whole.log.length; at++) {
          const { fn, failed, ending, injected } = await failAt(at, forever, msixVectors);
          const what = `access ${at}: ${failed?.kind} ${failed?.target} ${failed?.name}`;
          assert.ok(failed !== undefined, what);
          // What fails while closing is of no account; what is tried with fewer vectors may go well.
          const closing = whole.log.findLastIndex(({ kind, name }) => kind === "write" && name === "DEVICE_STATUS");
          const isRetried = failed.name === "setMsix" && failed.value > 1 && !forever;
          if (at < closing && !isRetried) assert.equal(ending, injected, what);
          else if (ending !== "well") assert.equal(ending, injected, what);
          if (failed.name !== "close" && !forever) assert.ok(fn.closed, what);
          if (!forever)
            assert.ok(
              fn.opened.every(({ isOpen }) => !isOpen),
              what,
            );
          assert.deepEqual(fn.violations, [], what);
        }
        await turn();
        assert.deepEqual(held(), before);
      });
    }
  }
});
