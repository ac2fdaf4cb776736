/** The device's half of both rings, row by row. */

import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { DescriptorChain, DeviceMemory, DeviceVirtqueue, VirtioFeature } from "../../src/virtqueue/index.js";
import { areasOf, type DriverPlace, PackedDriver, placeRing, SplitDriver, WRITE } from "./device-driver.js";
import { EVENT_VECTORS } from "./vectors.js";

const { EVENT_IDX, INDIRECT_DESC, RING_PACKED } = VirtioFeature;
const DATA = 0x1000n;

/** Split ring of `size` with its driver, and 4 KiB of data at {@link DATA}. */
function splitRing(size: number, features = 0n, start = 0) {
  const place = placeRing(size);
  const driver = new SplitDriver(place, start);
  return { place, driver, ...deviceOn(place, features, start) };
}

/** Packed ring, the same way. */
function packedRing(size: number, features = 0n) {
  const place = placeRing(size);
  const driver = new PackedDriver(place);
  return { place, driver, ...deviceOn(place, features | RING_PACKED) };
}

function deviceOn(place: DriverPlace, features: bigint, base?: number) {
  const memory = new DeviceMemory();
  memory.add(place.address, place.buffer);
  const data = new Uint8Array(4096);
  memory.add(DATA, data.buffer);
  const device = new DeviceVirtqueue({
    ...{ queueSize: place.size, features, memory },
    ...areasOf(place),
    ...(base !== undefined && { base }),
  });
  return { memory, data, device, chain: new DescriptorChain(place.size) };
}

const readable = { address: DATA, length: 16, writable: false };
const writable = { address: DATA + 512n, length: 512, writable: true };

describe("device's half of a split ring", () => {
  it("SPLIT-DEV-04 SPLIT-DEV-13 SPLIT-DEV-14 writes the used ring and avail_event, nothing else, and not before publish", () => {
    const { place, driver, device, chain, memory } = splitRing(4, EVENT_IDX);
    const head = driver.add([readable, writable]);
    driver.publish();
    const before = new Uint8Array(place.buffer).slice();
    assert.equal(device.pop(chain), true);
    chain.write(memory, 0, new Uint8Array([1, 2, 3]));
    device.push(chain.id, chain.ringCount, 3);
    assert.deepEqual(driver.collect(), []); // entry and length are there before the index moves
    assert.equal(driver.view.getUint32(place.device + 8, true), 3);
    device.publish();
    device.enableNotifications();
    assert.deepEqual(driver.collect(), [{ id: head, length: 3 }]);
    const after = new Uint8Array(place.buffer);
    const used = { from: place.device, to: place.device + 6 + 8 * 4 };
    const changed = Array.from(after.keys()).filter((i) => after[i] !== before[i] && (i < used.from || i >= used.to));
    assert.deepEqual(changed, []);
  });

  it("SPLIT-DEV-02 writes only into writable elements, contiguously over them", () => {
    const { driver, device, chain, memory, data } = splitRing(8);
    data.fill(0xee);
    driver.add([
      { address: DATA, length: 8, writable: false },
      { address: DATA + 16n, length: 3, writable: true },
      { address: DATA + 32n, length: 4, writable: true },
    ]);
    driver.publish();
    device.pop(chain);
    assert.equal(chain.write(memory, 1, Uint8Array.of(1, 2, 3, 4, 5, 6, 7)), 6);
    const touched = Array.from(data.entries()).filter(([, byte]) => byte !== 0xee);
    assert.deepEqual(touched, [
      [17, 1],
      [18, 2],
      [32, 3],
      [33, 4],
      [34, 5],
      [35, 6],
    ]);
    data.set([10, 11, 12, 13, 14, 15, 16, 17]);
    const into = new Uint8Array(10);
    assert.equal(chain.read(memory, 6, into), 2);
    assert.deepEqual([...into.subarray(0, 3)], [16, 17, 0]);
  });

  for (const flag of [0, WRITE]) {
    it(`SPLIT-DEV-05 SPLIT-DEV-06 normal descriptors before an indirect one, WRITE on it ${flag === 0 ? "clear" : "set"}`, () => {
      const { place, driver, device, chain } = splitRing(8, INDIRECT_DESC);
      const head = driver.add([readable, { ...readable, length: 5 }, { ...readable, length: 7 }, writable], 2);
      const at = place.descriptors + 16 * 2 + 12;
      driver.view.setUint16(at, (driver.view.getUint16(at, true) & ~WRITE) | flag, true);
      driver.publish();
      assert.equal(device.pop(chain), true);
      assert.deepEqual([...chain.length.subarray(0, chain.count)], [16, 5, 7, 512]);
      assert.equal(chain.readableCount, 3);
      assert.equal(chain.ringCount, 3);
      device.push(chain.id, chain.ringCount, 0);
      device.publish();
      assert.deepEqual(driver.collect(), [{ id: head, length: 0 }]);
    });
  }

  it("follows the links of a table in any order", () => {
    const { driver, device, chain } = splitRing(8, INDIRECT_DESC);
    driver.add([readable, { ...readable, length: 2 }, { ...readable, length: 3 }, writable], 4, [3, 1, 2]);
    driver.publish();
    device.pop(chain);
    assert.deepEqual([...chain.length.subarray(0, chain.count)], [16, 2, 3, 512]);
  });

  it("accepts a table at any address", () => {
    const { place, driver, device, chain } = splitRing(4, INDIRECT_DESC);
    driver.add([readable, writable], 2);
    const table = place.tables;
    const bytes = new Uint8Array(place.buffer);
    bytes.copyWithin(table + 1, table, table + 32);
    driver.view.setBigUint64(place.descriptors, place.address + BigInt(table + 1), true);
    driver.publish();
    assert.equal(device.pop(chain), true);
    assert.deepEqual([...chain.length.subarray(0, 2)], [16, 512]);
  });

  it("SPLIT-DEV-07 SPLIT-DEV-08 SPLIT-DEV-09 without EVENT_IDX avail.flags decides, not used_event", () => {
    for (const [flags, want] of [
      [0, true],
      [1, false],
      [2, true],
      [3, false],
    ] as const) {
      for (const event of [0, 1, 0xffff]) {
        const { place, driver, device, chain } = splitRing(4);
        driver.view.setUint16(place.driver, flags, true);
        driver.view.setUint16(place.driver + 4 + 2 * 4, event, true);
        driver.add([readable]);
        driver.publish();
        device.pop(chain);
        device.push(chain.id, chain.ringCount, 0);
        assert.equal(device.publish(), want, `flags ${flags}, used_event ${event}`);
      }
    }
  });

  for (const [event, idx, old, need] of EVENT_VECTORS) {
    it(`SPLIT-DEV-10 SPLIT-DEV-11 SPLIT-DEV-12 used ${old} to ${idx}, used_event ${event}: ${need ? "" : "not "}notified`, () => {
      const { place, driver, device, chain } = splitRing(32768, EVENT_IDX, old);
      driver.view.setUint16(place.driver, 1, true); // NO_INTERRUPT means nothing with EVENT_IDX
      driver.view.setUint16(place.driver + 4 + 2 * 32768, event, true);
      for (let i = (idx - old) & 0xffff; i > 0; i--) driver.add([readable]);
      driver.publish();
      while (device.pop(chain)) device.push(chain.id, chain.ringCount, 0);
      assert.equal(device.publish(), need);
    });
  }

  it("counts from the last decision, not from the last publish", () => {
    const { place, driver, device, chain } = splitRing(8, EVENT_IDX);
    driver.view.setUint16(place.driver + 4 + 2 * 8, 2, true);
    const decisions: boolean[] = [];
    for (let i = 0; i < 4; i++) {
      driver.add([readable]);
      driver.publish();
      device.pop(chain);
      device.push(chain.id, chain.ringCount, 0);
      decisions.push(device.publish());
    }
    assert.deepEqual(decisions, [false, false, true, false]);
    assert.equal(device.publish(), false); // nothing new
  });

  it("SPLIT-DEV-15 without EVENT_IDX used.flags is 0 or 1, and enabling tells what came meanwhile", () => {
    const { place, driver, device } = splitRing(4);
    const flags = (): number => driver.view.getUint16(place.device, true);
    device.disableNotifications();
    assert.equal(flags(), 1);
    assert.equal(device.enableNotifications(), false);
    assert.equal(flags(), 0);
    driver.add([readable]);
    driver.publish();
    assert.equal(device.enableNotifications(), true);
  });

  it("SPLIT-DEV-16 with EVENT_IDX used.flags stays 0 and avail_event follows the position", () => {
    const { place, driver, device, chain } = splitRing(4, EVENT_IDX);
    const event = (): number => driver.view.getUint16(place.device + 4 + 8 * 4, true);
    driver.add([readable]);
    driver.publish();
    device.disableNotifications();
    assert.equal(driver.view.getUint16(place.device, true), 0);
    assert.equal(event(), 0);
    device.pop(chain);
    assert.equal(device.enableNotifications(), false);
    assert.equal(event(), 1);
    driver.add([readable]);
    driver.publish();
    device.disableNotifications();
    assert.equal(event(), 1);
    assert.equal(device.enableNotifications(), true);
  });

  it("goes on at a base, takes the used index from the ring, and tells its base", () => {
    const { driver, device, chain } = splitRing(4, 0n, 65535);
    assert.equal(device.base, 65535);
    const head = driver.add([readable]);
    driver.publish();
    device.pop(chain);
    assert.equal(device.base, 0);
    device.push(chain.id, chain.ringCount, 0);
    device.publish();
    assert.deepEqual(driver.collect(), [{ id: head, length: 0 }]);
  });

  it("refuses a base that the used index in the ring cannot belong to", () => {
    const place = placeRing(4);
    const driver = new SplitDriver(place, 10);
    assert.throws(() => deviceOn(place, 0n, 15), { code: "ERR_VIRTIO_QUEUE_BROKEN", message: /used index of 10/ });
    // Four chains may be with a device that was replaced.
    const { device, chain } = deviceOn(place, 0n, 14);
    driver.availIdx = 15;
    driver.publish();
    assert.throws(() => device.pop(chain), { code: "ERR_VIRTIO_QUEUE_BROKEN" });
  });
});

describe("device's half of a packed ring", () => {
  it("PACKED-DEV-01 PACKED-DEV-02 takes in ring order and gives back in completion order", () => {
    const { driver, device, chain } = packedRing(5);
    const ids = [driver.add([readable]), driver.add([readable, writable]), driver.add([writable])];
    driver.publish();
    const taken: { id: number; ringCount: number }[] = [];
    while (device.pop(chain)) taken.push({ id: chain.id, ringCount: chain.ringCount });
    assert.deepEqual(taken, [
      { id: ids[0], ringCount: 1 },
      { id: ids[1], ringCount: 2 },
      { id: ids[2], ringCount: 1 },
    ]);
    for (const i of [1, 2, 0]) device.push(taken[i].id, taken[i].ringCount, i);
    device.publish();
    assert.deepEqual(driver.collect(), [
      { id: ids[1], length: 1 },
      { id: ids[2], length: 2 },
      { id: ids[0], length: 0 },
    ]);
  });

  it("PACKED-DEV-05 does not take what was not made available: zeroes, the other round, its own used entries", () => {
    const { driver, device, chain, place } = packedRing(3);
    assert.equal(device.pop(chain), false);
    driver.descriptor(0, DATA, 16, 1, 0x8000); // available, but of the other round
    assert.equal(device.pop(chain), false);
    for (let round = 0; round < 7; round++) {
      driver.add([readable]);
      driver.publish();
      assert.equal(device.pop(chain), true);
      assert.equal(device.pop(chain), false);
      device.push(chain.id, chain.ringCount, 0);
      device.publish();
      assert.equal(device.pop(chain), false);
      assert.equal(driver.collect().length, 1);
    }
    assert.equal(place.size, 3);
  });

  it("PACKED-DEV-06 the flags of the first entry of a batch are the last thing written", () => {
    const { driver, device, chain, place } = packedRing(4);
    driver.add([writable]);
    driver.add([writable]);
    driver.publish();
    for (let i = 0; i < 2; i++) {
      device.pop(chain);
      device.push(chain.id, chain.ringCount, 7);
    }
    const flags = (i: number): number => driver.view.getUint16(place.descriptors + 16 * i + 14, true);
    assert.equal(flags(0), 0x82);
    assert.equal(flags(1), 0x8082);
    assert.deepEqual(driver.collect(), []);
    const before = new Uint8Array(place.buffer).slice();
    device.publish();
    assert.equal(flags(0), 0x8082);
    // All else was written before.
    const after = new Uint8Array(place.buffer);
    assert.deepEqual(
      [...after.keys()].filter((i) => after[i] !== before[i]),
      [place.descriptors + 15],
    );
    assert.equal(driver.collect().length, 2);
  });

  it("PACKED-DEV-07 elements of a list come in its order, around the end of the ring", () => {
    const { driver, device, chain } = packedRing(5);
    driver.add([readable, readable, readable]);
    driver.publish();
    device.pop(chain);
    device.push(chain.id, chain.ringCount, 0);
    device.publish();
    driver.collect();
    const lengths = [1, 2, 3, 4, 5];
    const id = driver.add(lengths.map((length) => ({ ...readable, length })));
    driver.publish();
    device.pop(chain);
    assert.deepEqual([...chain.length.subarray(0, chain.count)], lengths);
    assert.equal(chain.id, id);
    assert.equal(device.base, 0x8003_0003);
    device.push(chain.id, chain.ringCount, 0);
    assert.equal(device.base, 0x0003_0003);
  });

  it("PACKED-DEV-03 the WRITE flag of a used entry says whether anything was written", () => {
    const { driver, device, chain, place } = packedRing(2);
    for (const [written, flags] of [
      [0, 0x8080],
      [1, 0x8082],
    ] as const) {
      driver.add([writable]);
      driver.publish();
      device.pop(chain);
      device.push(chain.id, chain.ringCount, written);
      device.publish();
      assert.equal(driver.view.getUint16(place.descriptors + 16 * (written % 2) + 14, true), flags);
      driver.collect();
    }
  });

  it("a table has no links: neither NEXT nor id in it means anything", () => {
    const { driver, device, chain } = packedRing(4, INDIRECT_DESC);
    const id = driver.add([readable, { ...readable, length: 9 }, writable], 3);
    driver.publish();
    assert.equal(device.pop(chain), true);
    assert.equal(chain.id, id);
    assert.equal(chain.ringCount, 1);
    assert.deepEqual([...chain.length.subarray(0, chain.count)], [16, 9, 512]);
  });

  // spec: flags, off_wrap, next, wrap, added, n, notified. The device's used position in place of the driver's.
  const vectors = [
    [0, 0, 1, 1, 1, 8, true],
    [1, 0, 1, 1, 1, 8, false],
    [2, 0x8000, 1, 1, 1, 8, true],
    [3, 0x8003, 1, 1, 1, 8, true],
    [0xfffd, 0x8003, 1, 1, 1, 8, false], // reserved bits mean nothing
    [2, 0x8000, 0, 0, 8, 8, true],
    [2, 0x8003, 2, 1, 2, 8, false],
    [2, 0x8003, 5, 1, 3, 8, true],
    [2, 0x0001, 1, 0, 2, 8, false],
    [2, 0x0001, 2, 0, 3, 8, true],
    [2, 0x8007, 0, 0, 1, 8, true],
    [2, 0x8007, 1, 0, 1, 8, false],
    [2, 0x8007, 1, 0, 2, 8, true],
  ] as const;
  for (const [flags, offWrap, next, wrap, added, size, need] of vectors) {
    it(`event flags ${flags}, 0x${offWrap.toString(16)}, used to ${next} (wrap ${wrap}) by ${added}: ${need ? "" : "not "}notified`, () => {
      const { place, driver, device, chain } = packedRing(size, EVENT_IDX);
      const complete = (count: number): boolean => {
        for (let i = 0; i < count; i++) driver.add([readable]);
        driver.publish();
        while (device.pop(chain)) device.push(chain.id, chain.ringCount, 0);
        const wanted = device.publish();
        driver.collect();
        return wanted;
      };
      const before = (wrap === 1 ? next : next + size) - added;
      if (before > 0) complete(before);
      driver.view.setUint16(place.driver, offWrap, true);
      driver.view.setUint16(place.driver + 2, flags, true);
      assert.equal(complete(added), need);
    });
  }

  it("DESC without EVENT_IDX means: always notify", () => {
    const { place, driver, device, chain } = packedRing(4);
    driver.view.setUint16(place.driver, 0x8003, true);
    driver.view.setUint16(place.driver + 2, 2, true);
    driver.add([readable]);
    driver.publish();
    device.pop(chain);
    device.push(chain.id, chain.ringCount, 0);
    assert.equal(device.publish(), true);
  });

  for (const features of [0n, EVENT_IDX]) {
    it(`asks for notifications ${features === 0n ? "by ENABLE" : "by DESC at its position"}, and tells what came meanwhile`, () => {
      const { place, driver, device, chain } = packedRing(3, features);
      const event = (): number[] => [
        driver.view.getUint16(place.device, true),
        driver.view.getUint16(place.device + 2, true),
      ];
      device.disableNotifications();
      assert.equal(event()[1], 1);
      assert.equal(device.enableNotifications(), false);
      assert.deepEqual(event(), features === 0n ? [0, 0] : [0x8000, 2]);
      driver.add([readable, readable, readable]);
      driver.publish();
      assert.equal(device.enableNotifications(), true);
      device.pop(chain);
      assert.equal(device.enableNotifications(), false);
      assert.deepEqual(event(), features === 0n ? [0, 0] : [0, 2]);
    });
  }

  it("goes on at a base, with both wrap counters", () => {
    for (const base of [0x8000_8000, 0x0000_0000, 0x8002_8002, 0x0001_0001, 0x8002_0001, 0x8001_8002]) {
      assert.equal(deviceOn(placeRing(3), RING_PACKED, base).device.base, base);
    }
    for (const base of [0x8003_8003, 0x8002_8001, 0x0001_8002, 0x0000_8001]) {
      assert.throws(() => deviceOn(placeRing(3), RING_PACKED, base), { name: "RangeError" }, base.toString(16));
    }
  });
});

describe("a chain", () => {
  it("has 2^32 bytes at most", () => {
    for (const features of [0n, RING_PACKED]) {
      const place = placeRing(16);
      const memory = new DeviceMemory();
      memory.add(DATA, new ArrayBuffer(2 ** 29)); // never touched
      const device = new DeviceVirtqueue({ queueSize: 16, features, memory, ...areasOf(place) });
      const driver = features === 0n ? new SplitDriver(place) : new PackedDriver(place);
      const most = Array.from({ length: 8 }, (_, i) => ({ address: DATA, length: 2 ** 29, writable: i > 3 }));
      driver.add(most);
      driver.publish();
      const chain = new DescriptorChain(16);
      assert.equal(device.pop(chain), true);
      assert.equal(chain.readableBytes + chain.writableBytes, 2 ** 32);
      device.push(chain.id, chain.ringCount, 0xffff_ffff);
      device.publish();
      driver.collect();
      driver.add([...most, { address: DATA, length: 1, writable: true }]);
      driver.publish();
      assert.throws(() => device.pop(chain), { code: "ERR_VIRTIO_QUEUE_BROKEN", message: /more than 2\^32 bytes/ });
    }
  });
});

describe("making a device's half", () => {
  const { buffer, ...place } = placeRing(4);
  const memory = new DeviceMemory();
  const good = { queueSize: 4, features: 0n, memory, ...areasOf({ buffer, ...place }) };
  const at = (offset: number) => ({ buffer, offset });
  const wrong = [
    ["a queue size of 0", { queueSize: 0 }],
    ["a split queue size that is no power of two", { queueSize: 6 }],
    ["a queue size above 32768", { queueSize: 65536 }],
    ["descriptors not at 16", { descriptorArea: at(8) }],
    ["an available ring not at 2", { driverArea: at(129) }],
    ["a used ring not at 4", { deviceArea: at(130) }],
    ["descriptors beyond the end", { descriptorArea: at(buffer.byteLength - 48) }],
    ["a used ring beyond the end", { deviceArea: at(buffer.byteLength - 36) }],
    ["a negative offset", { driverArea: at(-2) }],
    ["a base above 32 bits", { base: 2 ** 32 }],
    ["event suppression not at 4", { features: RING_PACKED, driverArea: at(2) }],
  ] as const;
  for (const [what, options] of wrong) {
    it(`refuses ${what}`, () => {
      assert.throws(() => new DeviceVirtqueue({ ...good, ...options }), {
        name: "RangeError",
        code: "ERR_VIRTIO_ARGUMENT",
      });
    });
  }

  it("refuses a misspelled option, and a chain that is too small", () => {
    assert.throws(() => new DeviceVirtqueue({ ...good, queuesize: 4 } as typeof good), { name: "TypeError" });
    const device = new DeviceVirtqueue(good);
    assert.throws(() => device.pop(new DescriptorChain(2)), { name: "RangeError" });
  });
});

describe("a device's memory", () => {
  it("finds ranges that lie in one region wholly, whatever the address", () => {
    const memory = new DeviceMemory();
    assert.equal(memory.find(0, 0, 1), -1);
    memory.add(0xffff_f000n, new ArrayBuffer(0x2000));
    memory.add(0x1_0000_1000n, new ArrayBuffer(0x1000)); // touches the first
    memory.add(0xffff_ffff_ffff_f000n, new ArrayBuffer(0x1000)); // ends with the address space
    const cases = [
      [0xffff_f000, 0, 0x2000, 0],
      [0xffff_f000, 0, 0x2001, -1],
      [0xffff_efff, 0, 1, -1],
      [0xfff, 1, 1, 0],
      [0xfff, 1, 2, -1],
      [0x1000, 1, 0x1000, 1],
      [0x2000, 1, 1, -1],
      [0xffff_f000, 0xffff_ffff, 0x1000, 2],
      [0xffff_ffff, 0xffff_ffff, 1, 2],
      [0xffff_ffff, 0xffff_ffff, 2, -1],
      [0xffff_f000, 0xffff_ffff, 0xffff_ffff, -1],
      [0, 0, 0xffff_ffff, -1],
      [0xffff_f000, 0x8000_0000, 1, -1],
    ] as const;
    for (const [lo, hi, length, region] of cases)
      assert.equal(memory.find(lo, hi, length), region, `${hi}:${lo} ${length}`);
    assert.equal(memory.offset(0, 0xfff, 1), 0x1fff);
  });

  it("refuses regions that overlap, are empty, too many, or outside the address space", () => {
    const memory = new DeviceMemory();
    memory.add(0x1000n, new ArrayBuffer(0x1000));
    const bad = [
      [0x1fffn, 0x10],
      [0x0n, 0x1001],
      [0xffff_ffff_ffff_ffffn, 2],
      [-1n, 1],
      [0x5000n, 0],
    ] as const;
    for (const [address, size] of bad) {
      assert.throws(() => memory.add(address, new ArrayBuffer(size)), { name: "RangeError" }, `${address} ${size}`);
    }
    assert.throws(() => memory.add(0x5000n, new ArrayBuffer(64), 4), { name: "RangeError" });
    for (let i = 1; i < 64; i++) memory.add(BigInt(i) * 0x10000n, new ArrayBuffer(8));
    assert.throws(() => memory.add(0x5000n, new ArrayBuffer(8)), { name: "RangeError", message: /at most 64/ });
  });

  it("forgets a region", () => {
    const memory = new DeviceMemory();
    const [first, second] = [new ArrayBuffer(0x1000), new ArrayBuffer(0x1000)];
    memory.add(0x1000n, first);
    memory.add(0x8000n, second);
    assert.equal(memory.find(0x8000, 0, 1), 1);
    memory.remove(first);
    assert.equal(memory.find(0x1000, 0, 1), -1);
    assert.equal(memory.find(0x8000, 0, 0x1000), 0);
    assert.equal(memory.bytes[0].buffer, second);
    memory.remove(second);
    assert.equal(memory.find(0x8000, 0, 1), -1);
    memory.add(0x1000n, first);
    assert.equal(memory.find(0x1000, 0, 1), 0);
  });
});
