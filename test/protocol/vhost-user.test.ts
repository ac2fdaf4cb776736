/** The vhost-user codecs against byte vectors of the C structures, and against every wrong size. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import fc from "fast-check";
import { VirtioError } from "../../src/errors.js";
import * as protocol from "../../src/protocol/index.js";

const {
  configCodec,
  decodePackedVringBase,
  decodeVhostUserHeader,
  encodePackedVringBase,
  encodeVhostUserMessage,
  inflightCodec,
  memoryTableCodec,
  singleRegionCodec,
  u64Codec,
  vringAddressCodec,
  vringFdCodec,
  vringStateCodec,
} = protocol;

const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString("hex");
const bytes = (text: string) => new Uint8Array(Buffer.from(text.replaceAll(" ", ""), "hex"));
const refused = (error: unknown) => error instanceof VirtioError && error.code === "ERR_VIRTIO_PROTOCOL";

const region = { guestAddress: 0x20_0000n, size: 0x40_0000n, userAddress: 0x7fff_ffff_f000n, mmapOffset: 0x1000n };
const regionHex = "0000200000000000 0000400000000000 00f0ffffff7f0000 0010000000000000";

const record = <T>(fields: { [K in keyof T]: fc.Arbitrary<T[K]> }) => fc.record<T>(fields, { noNullPrototype: true });
const u32 = fc.integer({ min: 0, max: 0xffff_ffff });
const u64 = fc.bigInt({ min: 0n, max: 0xffff_ffff_ffff_ffffn });
const anyRegion = record({ guestAddress: u64, size: u64, userAddress: u64, mmapOffset: u64 });

/** Round trips, and every payload size but the right one. */
function checkFixed<T>(codec: protocol.VhostUserCodec<T, T>, values: fc.Arbitrary<T>, size: number): void {
  fc.assert(
    fc.property(values, fc.integer({ min: 0, max: 7 }), (value, lead) => {
      const payload = codec.encode(value);
      assert.equal(payload.length, size);
      // A payload that does not begin where its memory begins, as in a receive buffer.
      const buffer = new Uint8Array(lead + size + 1);
      buffer.set(payload, lead);
      assert.deepEqual(codec.decode(buffer.subarray(lead, lead + size)), value);
    }),
  );
  for (const wrong of [0, 1, size - 1, size + 1, 2 * size]) {
    assert.throws(() => codec.decode(new Uint8Array(wrong)), refused, `${wrong} bytes instead of ${size}`);
  }
}

describe("ids and masks", () => {
  test("the request ids are 1 to 45 without a gap, the back-end's 1 to 10", () => {
    const upTo = (n: number) => Array.from({ length: n }, (_, i) => i + 1);
    assert.deepEqual(Object.values(protocol.VhostUserRequest), upTo(45));
    assert.deepEqual(Object.values(protocol.VhostUserBackendRequest), upTo(10));
  });

  test("the protocol features are bits 0 to 23, each at its place", () => {
    const masks = Object.values(protocol.VhostUserProtocolFeature);
    assert.deepEqual(
      masks,
      masks.map((_, bit) => 1n << BigInt(bit)),
    );
    assert.equal(masks.length, 24);
    assert.equal(protocol.VhostUserProtocolFeature.GPA_ADDRESSES, 1n << 21n);
    assert.equal(protocol.VhostUserProtocolFeature.CONFIGURE_MEM_SLOTS, 1n << 15n);
  });

  test("requests are named, unknown ones by their number", () => {
    assert.equal(protocol.vhostUserRequestName(5), "SET_MEM_TABLE");
    assert.equal(protocol.vhostUserRequestName(46), "request 46");
    assert.equal(protocol.vhostUserBackendRequestName(8), "SHARED_OBJECT_LOOKUP");
    assert.equal(protocol.vhostUserBackendRequestName(0), "request 0");
  });
});

describe("header", () => {
  test("VHU-FE-01 is request, flags, payload size, in 12 bytes before the payload", () => {
    assert.equal(hex(encodeVhostUserMessage(3, 1)), "030000000100000000000000");
    assert.equal(
      hex(encodeVhostUserMessage(2, 9, bytes("0102030405060708"))),
      "0200000009000000080000000102030405060708",
    );
    const message = encodeVhostUserMessage(24, 5, new Uint8Array(72));
    assert.deepEqual(decodeVhostUserHeader(message), { request: 24, flags: 5, size: 72 });
    assert.deepEqual(decodeVhostUserHeader(bytes("ffffffff 05000000 00100000")), {
      request: 0xffff_ffff,
      flags: 5,
      size: 4096,
    });
  });

  test("an incomplete header and a payload above the limit are refused", () => {
    for (let length = 0; length < 12; length++) {
      assert.throws(() => decodeVhostUserHeader(new Uint8Array(length)), refused);
    }
    assert.throws(() => decodeVhostUserHeader(bytes("01000000 05000000 01100000")), refused);
    assert.throws(() => decodeVhostUserHeader(bytes("01000000 05000000 ffffffff")), refused);
    assert.throws(() => encodeVhostUserMessage(1, 1, new Uint8Array(4097)), RangeError);
    assert.throws(() => encodeVhostUserMessage(2 ** 32, 1), RangeError);
    assert.throws(() => encodeVhostUserMessage(1, -1), RangeError);
  });
});

describe("payloads of fixed size", () => {
  test("u64", () => {
    assert.equal(hex(u64Codec.encode(0x0102_0304_0506_0708n)), "0807060504030201");
    assert.equal(hex(u64Codec.encode(Number.MAX_SAFE_INTEGER)), "ffffffffffff1f00");
    checkFixed(u64Codec as protocol.VhostUserCodec<bigint, bigint>, u64, 8);
    for (const wrong of [-1n, 1n << 64n, -1, 1.5, 2 ** 53]) assert.throws(() => u64Codec.encode(wrong), RangeError);
    assert.throws(() => u64Codec.encode("1" as unknown as number), TypeError);
  });

  test("vring state", () => {
    assert.equal(hex(vringStateCodec.encode({ index: 1, num: 0x8000_8000 })), "0100000000800080");
    checkFixed(vringStateCodec, record({ index: u32, num: u32 }), 8);
    assert.throws(() => vringStateCodec.encode({ index: 0, num: 2 ** 32 }), RangeError);
  });

  test("vring address: the device area stands before the driver area", () => {
    const value = { index: 2, flags: 1, desc: 0x1000n, used: 0x3000n, avail: 0x2000n, log: 0x4000n };
    assert.equal(
      hex(vringAddressCodec.encode(value)),
      hex(bytes("02000000 01000000 0010000000000000 0030000000000000 0020000000000000 0040000000000000")),
    );
    const values = record({ index: u32, flags: u32, desc: u64, used: u64, avail: u64, log: u64 });
    checkFixed(vringAddressCodec as protocol.VhostUserCodec<protocol.VringAddress, protocol.VringAddress>, values, 40);
  });

  test("single memory region", () => {
    assert.equal(hex(singleRegionCodec.encode(region)), hex(bytes(`0000000000000000 ${regionHex}`)));
    checkFixed(
      singleRegionCodec as protocol.VhostUserCodec<protocol.VhostUserRegion, protocol.VhostUserRegion>,
      anyRegion,
      40,
    );
  });

  test("inflight description: 24 bytes, the tail padding counts", () => {
    const value = { mmapSize: 0x1000n, mmapOffset: 0n, numQueues: 4, queueSize: 256 };
    assert.equal(hex(inflightCodec.encode(value)), hex(bytes("0010000000000000 0000000000000000 0400 0001 00000000")));
    const u16 = fc.integer({ min: 0, max: 0xffff });
    checkFixed(
      inflightCodec as protocol.VhostUserCodec<protocol.InflightPayload, protocol.InflightPayload>,
      record({ mmapSize: u64, mmapOffset: u64, numQueues: u16, queueSize: u16 }),
      24,
    );
    assert.throws(() => inflightCodec.decode(new Uint8Array(20)), refused);
    assert.throws(() => inflightCodec.encode({ ...value, queueSize: 65536 }), RangeError);
  });

  test("VHU-FE-19 queue index in bits 0 to 7, bit 8 for no descriptor, nothing above", () => {
    assert.equal(hex(vringFdCodec.encode({ index: 255, noFd: false })), "ff00000000000000");
    assert.equal(hex(vringFdCodec.encode({ index: 3, noFd: true })), "0301000000000000");
    checkFixed(vringFdCodec, record({ index: fc.integer({ min: 0, max: 255 }), noFd: fc.boolean() }), 8);
    assert.throws(() => vringFdCodec.encode({ index: 256, noFd: false }), RangeError);
    for (let bit = 9n; bit < 64n; bit++) {
      assert.throws(() => vringFdCodec.decode(u64Codec.encode(1n << bit)), refused, `bit ${bit}`);
    }
  });
});

describe("payloads of variable size", () => {
  test("memory table: count, padding, regions in order", () => {
    const second = { ...region, guestAddress: 0x80_0000n };
    const table = memoryTableCodec.encode([region, second]);
    assert.equal(hex(table), hex(bytes(`02000000 00000000 ${regionHex} ${regionHex.replace("00002000", "00008000")}`)));
    assert.deepEqual(memoryTableCodec.decode(table), [region, second]);
    assert.equal(hex(memoryTableCodec.encode([])), "0000000000000000");
  });

  test("memory tables of 0 to 8 regions round trip; the count must match the size", () => {
    fc.assert(
      fc.property(fc.array(anyRegion, { maxLength: 8 }), (regions) => {
        const table = memoryTableCodec.encode(regions);
        assert.deepEqual(memoryTableCodec.decode(table), regions);
        assert.throws(() => memoryTableCodec.decode(table.subarray(0, table.length - 1)), refused);
        const longer = new Uint8Array(table.length + 32);
        longer.set(table);
        assert.throws(() => memoryTableCodec.decode(longer), refused);
      }),
    );
    assert.throws(() => memoryTableCodec.encode(Array.from({ length: 9 }, () => region)), RangeError);
    assert.throws(() => memoryTableCodec.decode(new Uint8Array(7)), refused);
    const nine = new Uint8Array(8 + 9 * 32);
    nine[0] = 9;
    assert.throws(() => memoryTableCodec.decode(nine), refused);
    const lying = bytes("ffffffff 00000000");
    assert.throws(() => memoryTableCodec.decode(lying), refused);
  });

  test("config: offset, size, flags, data", () => {
    const payload = configCodec.encode({ offset: 8, flags: 1, data: bytes("aabbcc") });
    assert.equal(hex(payload), hex(bytes("08000000 03000000 01000000 aabbcc")));
    assert.deepEqual(configCodec.decode(payload), { offset: 8, flags: 1, data: bytes("aabbcc") });
  });

  test("config: the data is a copy, so a receive buffer may be used again", () => {
    const payload = configCodec.encode({ offset: 0, flags: 0, data: bytes("aa") });
    const { data } = configCodec.decode(payload);
    payload.fill(0);
    assert.deepEqual(data, bytes("aa"));
  });

  test("config: the size must be that of the data", () => {
    fc.assert(
      fc.property(u32, fc.uint8Array({ maxLength: 256 }), (offset, data) => {
        const payload = configCodec.encode({ offset, flags: 0, data });
        assert.deepEqual(configCodec.decode(payload).data, data);
        assert.throws(() => configCodec.decode(payload.subarray(0, payload.length - 1)), refused);
        assert.throws(() => configCodec.decode(Uint8Array.of(...payload, 0)), refused);
      }),
    );
    assert.deepEqual(configCodec.decode(new Uint8Array(12)).data.length, 0);
    assert.throws(() => configCodec.decode(bytes("00000000 ffffffff 00000000")), refused);
    assert.throws(() => configCodec.encode({ offset: 0, flags: 0, data: new Uint8Array(257) }), RangeError);
  });
});

describe("VHU-FE-20 ring positions", () => {
  test("fresh rings: 0, and 0x80008000 for packed ones", () => {
    assert.equal(protocol.VRING_BASE_SPLIT, 0);
    assert.equal(
      encodePackedVringBase({ availIdx: 0, availWrap: true, usedIdx: 0, usedWrap: true }),
      protocol.VRING_BASE_PACKED,
    );
    assert.equal(protocol.VRING_BASE_PACKED, 0x8000_8000);
  });

  test("packed: available half low, used half high", () => {
    assert.equal(
      encodePackedVringBase({ availIdx: 0x1234, availWrap: false, usedIdx: 0x0abc, usedWrap: true }),
      0x8abc_1234,
    );
    const idx = fc.integer({ min: 0, max: 0x7fff });
    fc.assert(
      fc.property(record({ availIdx: idx, availWrap: fc.boolean(), usedIdx: idx, usedWrap: fc.boolean() }), (base) =>
        assert.deepEqual(decodePackedVringBase(encodePackedVringBase(base)), base),
      ),
    );
    const zero = { availIdx: 0, availWrap: false, usedIdx: 0, usedWrap: false };
    assert.throws(() => encodePackedVringBase({ ...zero, availIdx: 0x8000 }), RangeError);
    assert.throws(() => encodePackedVringBase({ ...zero, usedIdx: -1 }), RangeError);
  });
});
