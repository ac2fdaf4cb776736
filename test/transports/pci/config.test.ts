/** The device config of a PCI device: fields by their width, consistent while it changes, never beyond its end. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import fc from "fast-check";
import { BLK_CONFIG_SIZE, BLK_CONFIG_WIDTHS } from "../../../src/protocol/index.js";
import type { FakePciFunction } from "../../../src/testing/index.js";
import { attach, failure } from "./support.js";

const CONFIG = Uint8Array.from({ length: 96 }, (_, i) => 255 - i);

/** Accesses to the config as `width@offset`. */
function accesses(fn: FakePciFunction, kind: "read" | "write"): string[] {
  return fn.log
    .filter((each) => each.kind === kind && each.target === "device")
    .map(({ width, offset }) => `${width}@${offset}`);
}

describe("reading", () => {
  test("PCI-DRV-04 fields of virtio-blk are read whole, each by its width", async (t) => {
    assert.equal(
      BLK_CONFIG_WIDTHS.reduce((sum: number, width) => sum + width, 0),
      93,
    );
    const { fn, device } = await attach(t, { config: CONFIG });
    assert.deepEqual(await device.readConfig(0, BLK_CONFIG_SIZE), CONFIG.slice(0, BLK_CONFIG_SIZE));
    assert.deepEqual(accesses(fn, "read"), [
      ...["4@0", "4@4", "4@8", "4@12", "2@16", "1@18", "1@19", "4@20", "1@24", "1@25", "2@26", "4@28", "1@32", "1@33"],
      ...["2@34", "4@36", "4@40", "4@44", "4@48", "4@52", "1@56", "1@57", "1@58", "1@59", "4@60", "4@64", "4@68"],
    ]);
    fn.log.length = 0;
    assert.deepEqual(await device.readConfig(92, 1), CONFIG.slice(92, 93));
    assert.deepEqual(await device.readConfig(5, 12), CONFIG.slice(5, 17), "parts of the fields at both ends");
    assert.deepEqual(accesses(fn, "read"), ["1@92", "4@4", "4@8", "4@12", "2@16"]);
  });

  test("where the device type is not known here, the widest aligned accesses are used", async (t) => {
    const { fn, device } = await attach(t, { deviceId: 0x1041, config: CONFIG });
    assert.deepEqual(await device.readConfig(1, 10), CONFIG.slice(1, 11));
    assert.deepEqual(accesses(fn, "read"), ["1@1", "2@2", "4@4", "2@8", "1@10"]);
  });

  test("any stretch reads as it is", async (t) => {
    const { device } = await attach(t, { config: CONFIG });
    await fc.assert(
      fc.asyncProperty(fc.nat({ max: 91 }), fc.integer({ min: 1, max: 96 }), async (offset, length) => {
        const end = Math.min(offset + length, 93);
        assert.deepEqual(await device.readConfig(offset, end - offset), CONFIG.slice(offset, end));
      }),
    );
  });

  test("BASIC-DRV-12 BASIC-DRV-13 a config that changes under the hands is read again until it does not", async (t) => {
    const { fn, device } = await attach(t, { config: new Uint8Array(8) });
    let changes = 0;
    fn.onAccess = ({ target, kind, offset }) => {
      // Between the halves: the upper one was read in its old state.
      if (target !== "device" || kind !== "read" || offset !== 4 || changes === 2) return;
      changes++;
      fn.changeConfig(new Uint8Array(8).fill(changes));
    };
    assert.deepEqual(await device.readConfig(0, 8), new Uint8Array(8).fill(2));
    assert.deepEqual(accesses(fn, "read"), ["4@0", "4@4", "4@0", "4@4", "4@0", "4@4"]);
  });

  test("one that never holds still is an error, in bounded time", async (t) => {
    const { fn, device } = await attach(t, { config: new Uint8Array(8) });
    fn.onAccess = ({ target }) => {
      if (target === "device") fn.changeConfig(new Uint8Array(8));
    };
    await assert.rejects(device.readConfig(0, 8), failure("ERR_VIRTIO_CONFIG", "never holds still"));
  });

  test("BASIC-DRV-15 a config of exactly what is read will do, and one of 4096 bytes", async (t) => {
    for (const length of [8, 4096]) {
      const { device } = await attach(t, { config: new Uint8Array(length), bars: { 4: 0x1_0000 } });
      assert.equal((await device.readConfig(0, 8)).length, 8);
    }
  });

  test("more than there is, or any where there is none, is refused", async (t) => {
    const { device } = await attach(t, { config: new Uint8Array(10) });
    await assert.rejects(device.readConfig(8, 4), failure("ERR_VIRTIO_CONFIG", "has 10 bytes"));
    await assert.rejects(device.readConfig(0, 0), RangeError);
    await assert.rejects(device.readConfig(-1, 1), RangeError);
    const none = await attach(t);
    assert.equal(none.device.hasConfig, false);
    await assert.rejects(none.device.readConfig(0, 1), failure("ERR_VIRTIO_CONFIG", "no config space"));
  });
});

describe("writing", () => {
  test("BASIC-DRV-17 not before the features are agreed on", async (t) => {
    const { fn, device } = await attach(t, { config: CONFIG });
    await device.readConfig(0, 8);
    await assert.rejects(device.writeConfig(32, Uint8Array.of(1)), failure("ERR_VIRTIO_STATUS", "negotiate first"));
    assert.deepEqual(accesses(fn, "write"), []);
    await device.negotiate(0n);
    await device.writeConfig(32, Uint8Array.of(1));
    assert.deepEqual(accesses(fn, "write"), ["1@32"]);
    assert.equal(fn.config[32], 1);
  });

  test("whole fields by their width; a part of one is refused", async (t) => {
    const { fn, device } = await attach(t, { config: CONFIG });
    await device.negotiate(0n);
    await device.writeConfig(16, Uint8Array.of(1, 2, 3, 4));
    assert.deepEqual(accesses(fn, "write"), ["2@16", "1@18", "1@19"]);
    assert.deepEqual(fn.config.slice(16, 20), Uint8Array.of(1, 2, 3, 4));
    for (const [offset, length] of [
      [0, 2],
      [17, 1],
      [20, 3],
      [22, 2],
    ]) {
      await assert.rejects(device.writeConfig(offset, new Uint8Array(length)), RangeError);
    }
    await assert.rejects(device.writeConfig(96, new Uint8Array(4)), failure("ERR_VIRTIO_CONFIG"));
    // @ts-expect-error: an array is no bytes
    await assert.rejects(device.writeConfig(32, [1]), TypeError);
    assert.equal(accesses(fn, "write").length, 3);
  });
});
