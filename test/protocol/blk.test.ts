/** The codecs of virtio-blk: config space, answers, constants. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { VirtioError } from "../../src/errors.js";
import {
  BLK_CONFIG_SIZE,
  BLK_HEADER_SIZE,
  BLK_SEGMENT_SIZE,
  type BlkConfig,
  BlkFeature,
  BlkRequestType,
  BlkStatus,
  blkConfigSize,
  decodeBlkConfig,
  decodeBlkId,
  decodeBlkLifetime,
  encodeBlkConfig,
  SECTOR_SIZE,
} from "../../src/protocol/index.js";

const EVERYTHING = Object.values(BlkFeature).reduce((all, bit) => all | bit, 0n);

const FULL: BlkConfig = {
  capacity: 0x0102_0304_0506_0708n,
  sizeMax: 0x1112_1314,
  segMax: 0x2122_2324,
  geometry: { cylinders: 0x3132, heads: 0x33, sectors: 0x34 },
  blkSize: 0x4142_4344,
  topology: { physicalBlockExp: 0x51, alignmentOffset: 0x52, minIoSize: 0x5354, optIoSize: 0x5556_5758 },
  writeback: true,
  numQueues: 0x6162,
  discard: { maxSectors: 0x7172_7374, maxSegments: 0x7576_7778, alignment: 0x797a_7b7c },
  writeZeroes: { maxSectors: 0x8182_8384, maxSegments: 0x8586_8788, mayUnmap: true },
  secureErase: { maxSectors: 0x9192_9394, maxSegments: 0x9596_9798, alignment: 0x999a_9b9c },
};

// biome-ignore format: one line for each field of the struct
const FULL_BYTES = Uint8Array.of(
  0x08, 0x07, 0x06, 0x05, 0x04, 0x03, 0x02, 0x01, // capacity
  0x14, 0x13, 0x12, 0x11, // size_max
  0x24, 0x23, 0x22, 0x21, // seg_max
  0x32, 0x31, 0x33, 0x34, // geometry
  0x44, 0x43, 0x42, 0x41, // blk_size
  0x51, 0x52, 0x54, 0x53, 0x58, 0x57, 0x56, 0x55, // topology
  1, 0, // writeback, unused0
  0x62, 0x61, // num_queues
  0x74, 0x73, 0x72, 0x71, 0x78, 0x77, 0x76, 0x75, 0x7c, 0x7b, 0x7a, 0x79, // discard
  0x84, 0x83, 0x82, 0x81, 0x88, 0x87, 0x86, 0x85, 1, 0, 0, 0, // write_zeroes, unused1
  0x94, 0x93, 0x92, 0x91, 0x98, 0x97, 0x96, 0x95, 0x9c, 0x9b, 0x9a, 0x99, // secure_erase
);

describe("struct virtio_blk_config", () => {
  test("encodes byte by byte, padding 0", () => {
    assert.deepEqual(encodeBlkConfig(FULL), FULL_BYTES);
    assert.equal(FULL_BYTES.length, BLK_CONFIG_SIZE);
  });

  test("decodes every field, also from the middle of memory", () => {
    assert.deepEqual(decodeBlkConfig(FULL_BYTES, EVERYTHING), FULL);
    const memory = new Uint8Array(200).fill(0xee);
    memory.set(FULL_BYTES, 3);
    assert.deepEqual(decodeBlkConfig(memory.subarray(3, 75), EVERYTHING), FULL);
  });

  test("a config of nothing but a capacity", () => {
    const bytes = encodeBlkConfig({ capacity: 2n ** 64n - 1n });
    assert.deepEqual([...bytes.subarray(0, 8)], [255, 255, 255, 255, 255, 255, 255, 255]);
    assert.ok(bytes.subarray(8).every((byte) => byte === 0));
    assert.deepEqual(decodeBlkConfig(bytes, 0n), { capacity: 2n ** 64n - 1n });
  });

  const fields: readonly [keyof typeof BlkFeature, keyof BlkConfig, number][] = [
    ["SIZE_MAX", "sizeMax", 12],
    ["SEG_MAX", "segMax", 16],
    ["GEOMETRY", "geometry", 20],
    ["BLK_SIZE", "blkSize", 24],
    ["TOPOLOGY", "topology", 32],
    ["CONFIG_WCE", "writeback", 33],
    ["MQ", "numQueues", 36],
    ["DISCARD", "discard", 48],
    ["WRITE_ZEROES", "writeZeroes", 57],
    ["SECURE_ERASE", "secureErase", 72],
  ];
  for (const [feature, field, size] of fields) {
    test(`BASIC-DRV-14 ${feature} brings ${field}, in the first ${size} bytes, and nothing else`, () => {
      assert.equal(blkConfigSize(BlkFeature[feature]), size);
      const decoded = decodeBlkConfig(FULL_BYTES.subarray(0, size), BlkFeature[feature]);
      assert.deepEqual(decoded, { capacity: FULL.capacity, [field]: FULL[field] });
      assert.throws(
        () => decodeBlkConfig(FULL_BYTES.subarray(0, size - 1), BlkFeature[feature]),
        (error) => error instanceof VirtioError && error.code === "ERR_VIRTIO_CONFIG",
      );
    });
  }

  test("the size is that of the last field needed", () => {
    assert.equal(blkConfigSize(0n), 8);
    assert.equal(blkConfigSize(BlkFeature.RO | BlkFeature.FLUSH | BlkFeature.LIFETIME), 8);
    assert.equal(blkConfigSize(BlkFeature.SECURE_ERASE | BlkFeature.SIZE_MAX), 72);
    assert.equal(blkConfigSize(BlkFeature.MQ | BlkFeature.BLK_SIZE), 36);
    assert.equal(blkConfigSize(EVERYTHING), 72);
  });

  test("booleans are any byte but 0", () => {
    const bytes = FULL_BYTES.slice();
    for (const byte of [0, 1, 2, 255]) {
      bytes[32] = byte;
      bytes[56] = byte;
      const { writeback, writeZeroes } = decodeBlkConfig(bytes, EVERYTHING);
      assert.deepEqual([writeback, writeZeroes?.mayUnmap], [byte !== 0, byte !== 0]);
    }
  });
});

test("struct virtio_blk_lifetime", () => {
  assert.deepEqual(decodeBlkLifetime(Uint8Array.of(3, 0, 11, 0, 0x34, 0x12)), {
    preEolInfo: 3,
    deviceLifetimeEstTypA: 11,
    deviceLifetimeEstTypB: 0x1234,
  });
  assert.throws(() => decodeBlkLifetime(new Uint8Array(5)), RangeError);
});

test("the answer to GET_ID ends at the first NUL, or at 20 characters", () => {
  const id = (text: string): string => decodeBlkId(new TextEncoder().encode(text));
  assert.equal(id("disk\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"), "disk");
  assert.equal(id("\0".repeat(20)), "");
  assert.equal(id("a".repeat(20)), "a".repeat(20));
  assert.equal(id("a".repeat(25)), "a".repeat(20));
  assert.equal(id("a".repeat(21) + "\0"), "a".repeat(20));
  assert.equal(id("x\0y\0"), "x");
});

test("numbers of the specification", () => {
  assert.deepEqual(BlkRequestType, {
    IN: 0,
    OUT: 1,
    FLUSH: 4,
    GET_ID: 8,
    GET_LIFETIME: 10,
    DISCARD: 11,
    WRITE_ZEROES: 13,
    SECURE_ERASE: 14,
  });
  assert.deepEqual(BlkStatus, { OK: 0, IOERR: 1, UNSUPP: 2 });
  assert.deepEqual([SECTOR_SIZE, BLK_HEADER_SIZE, BLK_SEGMENT_SIZE], [512, 16, 16]);
  const bits = Object.entries(BlkFeature).map(([name, mask]) => [name, mask.toString(2).length - 1]);
  assert.deepEqual(Object.fromEntries(bits), {
    SIZE_MAX: 1,
    SEG_MAX: 2,
    GEOMETRY: 4,
    RO: 5,
    BLK_SIZE: 6,
    FLUSH: 9,
    TOPOLOGY: 10,
    CONFIG_WCE: 11,
    MQ: 12,
    DISCARD: 13,
    WRITE_ZEROES: 14,
    LIFETIME: 15,
    SECURE_ERASE: 16,
    ZONED: 17,
  });
});
