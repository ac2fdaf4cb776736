/** When a driver notifies, and when it asks to be notified: the tables of the specification, through Virtqueue. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { RawRing } from "./raw-ring.js";
import { EVENT_VECTORS } from "./vectors.js";

describe("SPLIT-DRV-22 SPLIT-DRV-23 with EVENT_IDX the driver notifies exactly when avail_event was passed", () => {
  for (const [event, fresh, old, need] of EVENT_VECTORS) {
    test(`avail_event ${event}, avail.idx from ${old} to ${fresh}: ${need ? "notify" : "be silent"}`, () => {
      const count = (fresh - old) & 0xffff;
      const ring = new RawRing({ size: count > 8 ? 32768 : 8, eventIdx: true });
      ring.advance(ring.device(), old);
      assert.equal(ring.availIdx, old);
      for (let i = 0; i < count; i++) assert.ok(ring.add(0, 1) >= 0);
      assert.equal(ring.availIdx, old, "nothing is visible before publish");
      ring.availEvent = event;
      assert.equal(ring.queue.publish(), need);
      assert.equal(ring.availIdx, fresh);
    });
  }

  test("the decision counts from the last publish, also from one that was silent", () => {
    const ring = new RawRing({ size: 8, eventIdx: true });
    ring.availEvent = 7;
    ring.add(0, 1);
    assert.equal(ring.queue.publish(), false);
    ring.availEvent = 0; // passed already: the entry at 0 is not among those that come now
    ring.add(0, 1);
    assert.equal(ring.queue.publish(), false);
  });
});

describe("split rings without EVENT_IDX follow used.flags", () => {
  const publish = (flags: number, event: number): boolean => {
    const ring = new RawRing({ size: 4 });
    ring.usedFlags = flags;
    ring.availEvent = event;
    ring.add(1, 0);
    return ring.queue.publish();
  };
  test("SPLIT-DRV-20 flags 0: notify", () => assert.equal(publish(0, 0), true));
  test("SPLIT-DRV-19 flags 1: be silent", () => assert.equal(publish(1, 0), false));
  test("SPLIT-DRV-18 avail_event means nothing", () => {
    for (const event of [0, 1, 5, 0xffff]) {
      assert.equal(publish(0, event), true);
      assert.equal(publish(1, event), false);
    }
  });
  test("SPLIT-DRV-20 reserved bits of used.flags mean nothing", () => {
    assert.equal(publish(0xfffe, 0), true);
    assert.equal(publish(0xffff, 0), false);
  });
});

test("SPLIT-DRV-21 with EVENT_IDX used.flags means nothing", () => {
  for (const flags of [0, 1, 0xffff]) {
    const ring = new RawRing({ size: 4, eventIdx: true });
    ring.usedFlags = flags;
    ring.availEvent = 0;
    ring.add(1, 0);
    assert.equal(ring.queue.publish(), true);
    ring.availEvent = 0;
    ring.add(1, 0);
    assert.equal(ring.queue.publish(), false);
  }
});

test("nothing committed, nothing published, nobody notified", () => {
  for (const packed of [false, true]) {
    for (const eventIdx of [false, true]) {
      const ring = new RawRing({ size: 4, packed, eventIdx });
      const before = ring.bytes.slice();
      assert.equal(ring.queue.publish(), false);
      assert.deepEqual(ring.bytes, before);
    }
  }
});

describe("asking a device of a split ring for notifications", () => {
  test("SPLIT-DRV-12 without EVENT_IDX avail.flags is 0 or 1 as asked, and used_event is left alone", () => {
    const ring = new RawRing({ size: 4 });
    const device = ring.device();
    assert.equal(ring.availFlags, 0);
    for (let i = 0; i < 12; i++) {
      ring.queue.disableNotifications();
      assert.equal(ring.availFlags, 1);
      ring.advance(device, 1);
      assert.equal(ring.availFlags, 1);
      assert.equal(ring.queue.enableNotifications(), false);
      assert.equal(ring.availFlags, 0);
      ring.advance(device, 1);
      assert.equal(ring.availFlags, 0);
      assert.equal(ring.usedEvent, 0);
    }
  });

  test("SPLIT-DRV-13 with EVENT_IDX avail.flags stays 0, and only enabling moves used_event", () => {
    const ring = new RawRing({ size: 4, eventIdx: true });
    const device = ring.device();
    for (let i = 0; i < 12; i++) {
      ring.advance(device, 1);
      const armed = ring.usedEvent;
      assert.notEqual(armed, (2 * i + 1) & 0xffff, "polling does not arm");
      ring.queue.disableNotifications();
      assert.equal(ring.availFlags, 0);
      assert.equal(ring.usedEvent, armed);
      ring.advance(device, 1);
      assert.equal(ring.queue.enableNotifications(), false);
      assert.equal(ring.availFlags, 0);
      assert.equal(ring.usedEvent, 2 * (i + 1));
    }
  });
});

describe("SPLIT-DRV-14 a notification that means nothing changes nothing", () => {
  for (const packed of [false, true]) {
    test(packed ? "packed" : "split", () => {
      const ring = new RawRing({ size: 4, packed, eventIdx: true });
      for (let round = 0; round < 3; round++) {
        assert.equal(ring.queue.hasUsed(), false);
        assert.equal(ring.queue.poll(), -1);
        assert.equal(ring.queue.enableNotifications(), false);
        ring.add(1, 1);
        ring.queue.publish();
        assert.equal(ring.queue.poll(), -1);
      }
    });
  }
});

test("arming tells of chains that were used meanwhile", () => {
  for (const packed of [false, true]) {
    for (const eventIdx of [false, true]) {
      const ring = new RawRing({ size: 4, packed, eventIdx });
      const device = ring.device();
      ring.add(0, 1);
      ring.queue.publish();
      assert.equal(ring.queue.enableNotifications(), false);
      const [request] = device.take();
      device.complete(request);
      assert.equal(ring.queue.enableNotifications(), false, "not visible yet");
      assert.equal(device.publish(), true);
      assert.equal(ring.queue.enableNotifications(), true);
      assert.equal(ring.queue.poll(), 0);
      assert.equal(ring.queue.enableNotifications(), false);
    }
  }
});

const ENABLE = 0;
const DISABLE = 1;
const DESC = 2;

/** The device's flags and desc, next_avail and its wrap counter after publishing, descriptors added, notify. */
const PACKED_VECTORS = [
  [ENABLE, 0, 1, 1, 1, true],
  [DISABLE, 0, 1, 1, 1, false],
  [DESC, 0x8000, 1, 1, 1, true],
  [DESC, 0x8000, 0, 0, 8, true],
  [DESC, 0x8003, 2, 1, 2, false],
  [DESC, 0x8003, 5, 1, 3, true],
  [DESC, 0x0001, 1, 0, 2, false],
  [DESC, 0x0001, 2, 0, 3, true],
  [DESC, 0x8007, 0, 0, 1, true],
  [DESC, 0x8007, 1, 0, 1, false],
  [DESC, 0x8007, 1, 0, 2, true],
] as const;

describe("PACKED-DRV-16 the driver follows the device's event suppression", () => {
  const N = 8;
  for (const [flags, desc, next, wrap, added, need] of PACKED_VECTORS) {
    test(`flags ${flags}, desc 0x${desc.toString(16)}, ${added} up to ${next} of round ${wrap}: ${need}`, () => {
      const ring = new RawRing({ size: N, packed: true, eventIdx: true });
      ring.advance(ring.device(), next + (wrap === 1 ? 0 : N) - added);
      for (let i = 0; i < added; i++) assert.ok(ring.add(0, 1) >= 0);
      ring.setDeviceEvent(desc, flags);
      assert.equal(ring.queue.publish(), need);
      assert.equal(ring.queue.notificationData, (next | (wrap << 15)) * 2 ** 16);
    });
  }

  test("chains of several descriptors count whole", () => {
    // Descriptors 0 to 2, then 3 to 5: only the second chain has descriptor 4.
    const ring = new RawRing({ size: N, packed: true, eventIdx: true });
    ring.setDeviceEvent(0x8004, DESC);
    ring.add(2, 1);
    assert.equal(ring.queue.publish(), false);
    ring.add(2, 1);
    assert.equal(ring.queue.publish(), true);
  });

  test("DESC without EVENT_IDX, and the reserved value, are read as ENABLE", () => {
    for (const [eventIdx, flags] of [
      [false, DESC],
      [false, 3],
      [true, 3],
    ] as const) {
      const ring = new RawRing({ size: N, packed: true, eventIdx });
      ring.setDeviceEvent(0x8007, flags);
      ring.add(0, 1);
      assert.equal(ring.queue.publish(), true);
    }
  });

  test("reserved bits of the flags mean nothing", () => {
    const ring = new RawRing({ size: N, packed: true, eventIdx: true });
    ring.setDeviceEvent(0, 0xfffc | DISABLE);
    ring.add(0, 1);
    assert.equal(ring.queue.publish(), false);
  });

  test("what was decided by ENABLE or DISABLE does not count for a later DESC", () => {
    for (const first of [ENABLE, DISABLE]) {
      const ring = new RawRing({ size: N, packed: true, eventIdx: true });
      ring.setDeviceEvent(0, first);
      for (let i = 0; i < 3; i++) ring.add(0, 1);
      assert.equal(ring.queue.publish(), first === ENABLE);
      ring.setDeviceEvent(0x8001, DESC); // among the three, not among the next
      ring.add(0, 1);
      assert.equal(ring.queue.publish(), false);
    }
  });
});

describe("PACKED-DRV-18 the driver's event suppression", () => {
  test("with EVENT_IDX: DISABLE, or DESC at the next used position; all other bits 0", () => {
    const ring = new RawRing({ size: 5, packed: true, eventIdx: true });
    const device = ring.device();
    assert.deepEqual(ring.driverEvent, [0, ENABLE]);
    for (let used = 0; used < 23; used++) {
      ring.queue.disableNotifications();
      assert.equal(ring.driverEvent[1], DISABLE);
      assert.equal(ring.queue.enableNotifications(), false);
      const wrap = Math.floor(used / 5) % 2 === 0 ? 0x8000 : 0;
      assert.deepEqual(ring.driverEvent, [(used % 5) | wrap, DESC]);
      ring.advance(device, 1);
    }
  });

  test("without EVENT_IDX: DISABLE or ENABLE, never DESC", () => {
    const ring = new RawRing({ size: 5, packed: true });
    const device = ring.device();
    for (let used = 0; used < 23; used++) {
      ring.queue.disableNotifications();
      assert.deepEqual(ring.driverEvent, [0, DISABLE]);
      assert.equal(ring.queue.enableNotifications(), false);
      assert.deepEqual(ring.driverEvent, [0, ENABLE]);
      ring.advance(device, 1);
    }
  });
});

describe("SPLIT-DRV-13 PACKED-DRV-18 a late notification", () => {
  const rings = [
    { packed: false, size: 8 },
    { packed: true, size: 7 },
  ];
  for (const { packed, size } of rings) {
    test(`${packed ? "packed" : "split"}: comes behind as many as asked for, at most half of what is published`, () => {
      const ring = new RawRing({ size, packed, eventIdx: true });
      const device = ring.device();
      // Every position of the ring, and how many may pass: 0 to half of six, more is cut down to that.
      for (let round = 0; round < 40; round++) {
        const unnoticed = round % 5;
        for (let i = 0; i < 6; i++) ring.add(0, 1);
        ring.queue.publish();
        assert.equal(ring.queue.enableNotifications(unnoticed), false);
        const expected = Math.min(unnoticed, 3);
        for (const [done, request] of device.take().entries()) {
          device.complete(request);
          assert.equal(device.publish(), done === expected, `round ${round}, used chain ${done}`);
        }
        assert.equal(ring.queue.enableNotifications(unnoticed), true);
        while (ring.queue.poll() >= 0);
      }
    });

    test(`${packed ? "packed" : "split"}: none will come once more than may pass were used`, () => {
      const ring = new RawRing({ size, packed, eventIdx: true });
      const device = ring.device();
      for (let i = 0; i < 6; i++) ring.add(0, 1);
      ring.queue.publish();
      const requests = device.take();
      for (const request of requests.slice(0, 2)) device.complete(request);
      device.publish();
      assert.equal(ring.queue.enableNotifications(1), true);
      assert.equal(ring.queue.enableNotifications(2), false);
      device.complete(requests[2]);
      assert.equal(device.publish(), true);
    });

    test(`${packed ? "packed" : "split"}: what is not published does not count`, () => {
      const ring = new RawRing({ size, packed, eventIdx: true });
      const device = ring.device();
      for (let i = 0; i < 2; i++) ring.add(0, 1);
      ring.queue.publish();
      for (let i = 0; i < 4; i++) ring.add(0, 1);
      assert.equal(ring.queue.enableNotifications(3), false);
      const [first, second] = device.take();
      device.complete(first);
      assert.equal(device.publish(), false);
      device.complete(second);
      assert.equal(device.publish(), true, "one of the two published may pass");
    });

    test(`${packed ? "packed" : "split"}: without EVENT_IDX it comes at once`, () => {
      const ring = new RawRing({ size, packed });
      const device = ring.device();
      for (let i = 0; i < 6; i++) ring.add(0, 1);
      ring.queue.publish();
      assert.equal(ring.queue.enableNotifications(3), false);
      device.complete(device.take()[0]);
      assert.equal(device.publish(), true);
      assert.equal(ring.queue.enableNotifications(3), true);
    });
  }
});

describe("the data of a notification (virtio 1.3, 2.9)", () => {
  /** Format, queue index, chains published, queue size, expected value. */
  const vectors = [
    [false, 0, 0, 8, 0x0000_0000],
    [false, 0, 1, 8, 0x0001_0000],
    [false, 3, 0x7fff, 8, 0x7fff_0003],
    [false, 3, 0x8000, 8, 0x8000_0003],
    [false, 5, 0xffff, 8, 0xffff_0005],
    [true, 0, 0, 8, 0x8000_0000],
    [true, 1, 5, 8, 0x8005_0001],
    [true, 1, 13, 8, 0x0005_0001],
    [true, 1, 8, 8, 0x0000_0001],
    [true, 65535, 16, 8, 0x8000_ffff],
  ] as const;
  for (const [packed, index, published, size, value] of vectors) {
    const id = packed ? "PACKED-DRV-04 packed" : "split";
    test(`${id}: queue ${index} after ${published} descriptors: 0x${value.toString(16).padStart(8, "0")}`, () => {
      const ring = new RawRing({ size, packed, index });
      ring.advance(ring.device(), published);
      assert.equal(ring.queue.notificationData, value);
      ring.add(1, 1);
      assert.equal(ring.queue.notificationData, value, "a chain that is not published is not available");
    });
  }

  test("PACKED-DRV-04 a chain across the end of the ring: the position behind it, in the next round", () => {
    const ring = new RawRing({ size: 5, packed: true });
    ring.advance(ring.device(), 4);
    ring.add(2, 1); // positions 4, 0, 1
    assert.equal(ring.queue.notificationData, 0x8004_0000);
    ring.queue.publish();
    assert.equal(ring.queue.notificationData, 0x0002_0000);
    ring.add(1, 0);
    assert.equal(ring.queue.notificationData, 0x0002_0000);
  });
});
