/** The vhost-vdpa codecs against byte vectors of the C structures and the numbers of the kernel's headers. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import fc from "fast-check";
import { VirtioError } from "../../src/errors.js";
import * as protocol from "../../src/protocol/index.js";

const { iotlbMessageCodec, vdpaConfigCodec, vdpaIovaRangeCodec, vringFileCodec, VhostVdpaRequest } = protocol;

const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString("hex");
const joined = (text: string) => text.replaceAll(" ", "");
const refused = (error: unknown) => error instanceof VirtioError && error.code === "ERR_VIRTIO_PROTOCOL";
const u32 = fc.integer({ min: 0, max: 0xffff_ffff });
const u64 = fc.bigInt({ min: 0n, max: 0xffff_ffff_ffff_ffffn });

/** Round trips, also of bytes that do not begin where their memory begins, and every size but the right one. */
function checkFixed<T>(codec: protocol.VhostUserCodec<T, T>, values: fc.Arbitrary<T>, size: number): void {
  fc.assert(
    fc.property(values, fc.integer({ min: 0, max: 7 }), (value, lead) => {
      const bytes = codec.encode(value);
      assert.equal(bytes.length, size);
      const buffer = new Uint8Array(lead + size + 1);
      buffer.set(bytes, lead);
      assert.deepEqual(codec.decode(buffer.subarray(lead, lead + size)), value);
    }),
  );
  for (const wrong of [0, 1, size - 1, size + 1, 2 * size]) {
    assert.throws(() => codec.decode(new Uint8Array(wrong)), refused, `${wrong} bytes instead of ${size}`);
  }
}

describe("numbers", () => {
  test("the requests are those of linux/vhost.h: direction, bytes of the argument, 0xaf, number", () => {
    const [none, write, read, both] = [0, 1, 2, 3];
    const expected: Record<keyof typeof VhostVdpaRequest, [direction: number, size: number, nr: number]> = {
      GET_FEATURES: [read, 8, 0x00],
      SET_FEATURES: [write, 8, 0x00],
      SET_OWNER: [none, 0, 0x01],
      SET_VRING_NUM: [write, 8, 0x10],
      SET_VRING_ADDR: [write, 40, 0x11],
      SET_VRING_BASE: [write, 8, 0x12],
      GET_VRING_BASE: [both, 8, 0x12],
      SET_VRING_KICK: [write, 8, 0x20],
      SET_VRING_CALL: [write, 8, 0x21],
      SET_BACKEND_FEATURES: [write, 8, 0x25],
      GET_BACKEND_FEATURES: [read, 8, 0x26],
      GET_DEVICE_ID: [read, 4, 0x70],
      GET_STATUS: [read, 1, 0x71],
      SET_STATUS: [write, 1, 0x72],
      GET_CONFIG: [read, 8, 0x73],
      SET_CONFIG: [write, 8, 0x74],
      SET_VRING_ENABLE: [write, 8, 0x75],
      GET_VRING_NUM: [read, 2, 0x76],
      SET_CONFIG_CALL: [write, 4, 0x77],
      GET_IOVA_RANGE: [read, 16, 0x78],
      GET_CONFIG_SIZE: [read, 4, 0x79],
      SUSPEND: [none, 0, 0x7d],
      RESUME: [none, 0, 0x7e],
      GET_VQS_COUNT: [read, 4, 0x80],
    };
    for (const [name, [direction, size, nr]] of Object.entries(expected)) {
      const number = direction * 2 ** 30 + size * 2 ** 16 + 0xaf00 + nr;
      assert.equal(new Map<string, number>(Object.entries(VhostVdpaRequest)).get(name), number, name);
    }
    assert.equal(Object.keys(VhostVdpaRequest).length, Object.keys(expected).length);
  });

  test("the features of the interface are bits 1 to 8, which C has as numbers of bits", () => {
    const masks = Object.values(protocol.VhostVdpaBackendFeature);
    assert.deepEqual(
      masks,
      masks.map((_, i) => 1n << BigInt(i + 1)),
    );
    assert.equal(protocol.VhostVdpaBackendFeature.IOTLB_PERSIST, 1n << 8n);
  });

  test("requests have the names that C has for them, unknown ones their number", () => {
    const { vhostVdpaRequestName: name } = protocol;
    assert.equal(name(0x4008_af00), "VHOST_SET_FEATURES");
    assert.equal(name(0x4028_af11), "VHOST_SET_VRING_ADDR");
    assert.equal(name(0x8001_af71), "VHOST_VDPA_GET_STATUS");
    assert.equal(name(0x8004_af80), "VHOST_VDPA_GET_VQS_COUNT");
    assert.equal(name(0x3b64), "ioctl 0x3b64");
  });
});

describe("structures", () => {
  test("vring file: index, descriptor, -1 for none", () => {
    assert.equal(hex(vringFileCodec.encode({ index: 1, fd: 0x15 })), "0100000015000000");
    assert.equal(hex(vringFileCodec.encode({ index: 0, fd: -1 })), "00000000ffffffff");
    checkFixed(
      vringFileCodec,
      fc.record({ index: u32, fd: fc.integer({ min: -1, max: 0x7fff_ffff }) }, { noNullPrototype: true }),
      8,
    );
    assert.throws(() => vringFileCodec.encode({ index: 0, fd: -2 }), RangeError);
    assert.throws(() => vringFileCodec.encode({ index: 0, fd: 2 ** 31 }), RangeError);
  });

  test("config: offset, length, bytes", () => {
    assert.equal(
      hex(vdpaConfigCodec.encode({ offset: 32, data: Uint8Array.of(1, 2) })),
      joined("20000000 02000000 0102"),
    );
    const { offset, data } = vdpaConfigCodec.decode(Buffer.from(joined("08000000 03000000 aabbcc"), "hex"));
    assert.deepEqual([offset, [...data]], [8, [0xaa, 0xbb, 0xcc]]);
    for (const wrong of ["", "08000000 030000", "08000000 03000000 aabb", "08000000 ffffffff aa"]) {
      assert.throws(() => vdpaConfigCodec.decode(Buffer.from(joined(wrong), "hex")), refused, wrong);
    }
  });

  test("IOVA range: both ends included", () => {
    assert.equal(
      hex(vdpaIovaRangeCodec.encode({ first: 0x1000n, last: 0xffff_ffff_ffff_ffffn })),
      joined("0010000000000000 ffffffffffffffff"),
    );
    checkFixed(vdpaIovaRangeCodec, fc.record({ first: u64, last: u64 }, { noNullPrototype: true }), 16);
  });

  test("IOTLB message: the message begins at byte 8 in both versions, 38 bytes behind it are 0", () => {
    const message = { type: 2, iova: 0x20_0000n, size: 0x40_0000n, uaddr: 0x7f12_3456_7000n, perm: 3 };
    const body = "0000200000000000 0000400000000000 0070563412 7f0000 03 02";
    const tail = "00".repeat(38);
    assert.equal(
      hex(iotlbMessageCodec.encode({ version: 1, asid: 0, ...message })),
      joined(`01000000 00000000 ${body} ${tail}`),
    );
    assert.equal(
      hex(iotlbMessageCodec.encode({ version: 2, asid: 7, ...message })),
      joined(`02000000 07000000 ${body} ${tail}`),
    );
    assert.equal(protocol.IOTLB_MESSAGE_SIZE, 72);
    const u8 = fc.integer({ min: 0, max: 0xff });
    checkFixed(
      iotlbMessageCodec as protocol.VhostUserCodec<protocol.IotlbMessage, protocol.IotlbMessage>,
      fc.record(
        {
          ...{ version: fc.constant<2>(2), asid: u32, type: u8, iova: u64, size: u64, uaddr: u64, perm: u8 },
        },
        { noNullPrototype: true },
      ),
      72,
    );
    assert.throws(() => iotlbMessageCodec.encode({ version: 1, asid: 1, ...message }), RangeError);
    const unknown = iotlbMessageCodec.encode({ version: 2, asid: 0, ...message });
    for (const version of [0, 3]) {
      unknown[0] = version;
      assert.throws(() => iotlbMessageCodec.decode(unknown), refused);
    }
  });
});
