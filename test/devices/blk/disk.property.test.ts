/** Random mixtures of calls on devices with random limits, against a plain array as model. */

import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { BlockDevice, type Memory } from "../../../src/devices/blk/index.js";
import { type BlkConfig, BlkFeature } from "../../../src/protocol/blk.js";
import { type FakeBlkRequest, takeBlk } from "../../../src/testing/index.js";
import { VirtioFeature } from "../../../src/virtqueue/index.js";
import { ALL_REQUESTS, CheckedDisk, makeTransport, pattern, RINGS } from "./support.js";

const RUNS = 120;
/** Calls that the runs together must really make. */
const MIN_CALLS = 1_000;
/** Blocks of the disk; each call of a batch keeps to a stripe of its own, as calls in flight have no order. */
const STRIPES = 6;
const STRIPE_BLOCKS = 12;

interface Device {
  readonly ring: keyof typeof RINGS;
  readonly queues: number;
  readonly queueSize: number;
  readonly blkSize: number;
  readonly sizeMax: number | undefined;
  readonly segMax: number | undefined;
  readonly maxSectors: number;
  readonly maxSegments: number;
}

interface Call {
  readonly kind: number;
  readonly start: number;
  readonly blocks: number;
  readonly seed: number;
}

const device: fc.Arbitrary<Device> = fc
  .record({
    ring: fc.constantFrom(...(Object.keys(RINGS) as (keyof typeof RINGS)[])),
    queues: fc.constantFrom(1, 1, 2, 3),
    queueSize: fc.constantFrom(4, 8, 16, 64),
    blkSize: fc.constantFrom(0, 512, 4096),
    sizeMax: fc.constantFrom(undefined, 0, 300, 512, 1000, 4096, 65536),
    segMax: fc.constantFrom(undefined, 0, 1, 2, 5, 62, 1000),
    maxSectors: fc.constantFrom(0, 1, 3, 8, 4096),
    maxSegments: fc.constantFrom(0, 1, 2, 7, 256),
  })
  // A request must hold a sector, else the device is refused.
  .filter(({ sizeMax, segMax, queueSize }) => {
    const segments = Math.max(1, Math.min(segMax ?? 1, queueSize - 2));
    return sizeMax === undefined || sizeMax === 0 || segments * sizeMax >= 512;
  });

const call: fc.Arbitrary<Call> = fc.record({
  kind: fc.nat(11),
  start: fc.nat(STRIPE_BLOCKS - 1),
  blocks: fc.integer({ min: 1, max: STRIPE_BLOCKS }),
  seed: fc.nat(10_000),
});
const batches = fc.array(fc.array(call, { minLength: 1, maxLength: STRIPES }), {
  minLength: 1,
  maxLength: 12,
  size: "max",
});

test("BLK-DRV-09 BLK-DRV-16 BLK-DRV-18 BLK-DRV-31 whatever the limits, the disk is what the calls made of it", async () => {
  let calls = 0;
  await fc.assert(
    fc.asyncProperty(device, batches, async (limits, list) => {
      calls += await run(limits, list);
    }),
    { numRuns: RUNS },
  );
  assert.ok(calls >= MIN_CALLS, `${calls} calls were made, expected ${MIN_CALLS}`);
});

async function run(limits: Device, list: readonly (readonly Call[])[]): Promise<number> {
  const { ring, queues, queueSize, blkSize, sizeMax, segMax, maxSectors, maxSegments } = limits;
  const block = Math.max(512, blkSize);
  const segments = { maxSectors, maxSegments, alignment: 1 };
  const config: BlkConfig = {
    capacity: BigInt((STRIPES * STRIPE_BLOCKS * block) / 512),
    blkSize,
    numQueues: 3,
    discard: segments,
    writeZeroes: { ...segments, mayUnmap: true },
    secureErase: segments,
    ...(sizeMax !== undefined && { sizeMax }),
    ...(segMax !== undefined && { segMax }),
  };
  const features =
    RINGS[ring] |
    ALL_REQUESTS |
    BlkFeature.BLK_SIZE |
    BlkFeature.MQ |
    (sizeMax === undefined ? 0n : BlkFeature.SIZE_MAX) |
    (segMax === undefined ? 0n : BlkFeature.SEG_MAX);
  const checked = new CheckedDisk(config, queueSize);
  const serve = server(checked, (features & VirtioFeature.IN_ORDER) !== 0n);
  const transport = makeTransport({ features, config, maxQueues: 3, onNotify: (queue) => serve(takeBlk(queue)) });
  const disk = await BlockDevice.open(transport, { queues, queueSize });
  try {
    const model = checked.bytes.slice();
    let made = 0;
    for (const batch of list) {
      await Promise.all(batch.map((each, stripe) => make(disk, model, each, stripe * STRIPE_BLOCKS * block, block)));
      assert.deepEqual(checked.faults, []);
      made += batch.length;
    }
    const { buffer } = await disk.read(new Uint8Array(disk.capacity));
    assert.deepEqual(buffer, model, "what the driver reads");
    assert.deepEqual(checked.bytes, model, "what the device holds");
    assert.equal(disk.pending, 0);
    return made;
  } finally {
    await disk.close();
    assert.equal(transport.regionsMapped, transport.regionsClosed);
  }
}

/** Make one call in its stripe, and do the same to the model. */
async function make(disk: BlockDevice, model: Uint8Array, one: Call, base: number, block: number): Promise<void> {
  const { kind, seed } = one;
  const position = base + one.start * block;
  const length = Math.min(one.blocks, STRIPE_BLOCKS - one.start) * block;
  const data = pattern(length, seed);
  // Two ranges with a hole between them, where there is room for one.
  const third = Math.floor(length / block / 3) * block;
  const ranges =
    third > 0
      ? [
          { position, length: third },
          { position: position + length - third, length: third },
        ]
      : [{ position, length }];
  switch (kind) {
    case 0:
    case 1: {
      const memory = await memoryFor(disk, length, kind === 0, data);
      assert.equal((await disk.write(memory, { position })).bytesWritten, length);
      model.set(data, position);
      return;
    }
    case 2: {
      const pieces = await piecesFor(disk, length, seed, data);
      assert.equal((await disk.writev(pieces, { position })).bytesWritten, length);
      model.set(data, position);
      return;
    }
    case 3:
    case 4: {
      const memory = await memoryFor(disk, length, kind === 3);
      assert.equal((await disk.read(memory, { position })).bytesRead, length);
      assert.deepEqual(bytesOf(memory), model.slice(position, position + length));
      return;
    }
    case 5: {
      const pieces = await piecesFor(disk, length, seed);
      assert.equal((await disk.readv(pieces, { position })).bytesRead, length);
      const whole = new Uint8Array(length);
      let at = 0;
      for (const piece of pieces) {
        whole.set(bytesOf(piece), at);
        at += piece.length;
      }
      assert.deepEqual(whole, model.slice(position, position + length));
      return;
    }
    case 6: {
      // From the middle of a larger buffer, whose memory others are lent from then on.
      const memory = await disk.allocate(length + 1000);
      memory.bytes.set(data, 777);
      await disk.write(memory, { position, offset: 777, length });
      memory.release();
      model.set(data, position);
      return;
    }
    case 7:
      await disk.flush();
      return;
    case 8:
    case 9:
      await disk.writeZeroes(ranges, { unmap: kind === 8 });
      fill(model, ranges, 0);
      return;
    case 10:
      await disk.discard(ranges);
      fill(model, ranges, 0xdd);
      return;
    default:
      await disk.secureErase(ranges);
      fill(model, ranges, 0xee);
  }
}

/** Serve what comes in a later turn, and unless the ring is in order in a scrambled one. */
function server(checked: CheckedDisk, inOrder: boolean): (requests: readonly FakeBlkRequest[]) => void {
  let held: FakeBlkRequest[] = [];
  let scramble = 1;
  const later = (): void => {
    const now = held;
    held = [];
    while (now.length > 0) {
      scramble = (scramble * 1103515245 + 12345) & 0x7fffffff;
      const [request] = now.splice(inOrder ? 0 : scramble % now.length, 1);
      checked.serve(request);
    }
  };
  return (requests) => {
    if (held.length === 0 && requests.length > 0) setImmediate(later);
    held.push(...requests);
  };
}

async function memoryFor(disk: BlockDevice, length: number, isLent: boolean, data?: Uint8Array): Promise<Memory> {
  const memory = isLent ? await disk.allocate(length) : new Uint8Array(length);
  if (data !== undefined) bytesOf(memory).set(data);
  return memory;
}

/** Pieces of odd lengths, lent and plain, which together are `length` bytes. */
async function piecesFor(disk: BlockDevice, length: number, seed: number, data?: Uint8Array): Promise<Memory[]> {
  const pieces: Memory[] = [];
  let random = seed;
  for (let at = 0; at < length; ) {
    random = (random * 1103515245 + 12345) & 0x7fffffff;
    const size = Math.min(length - at, 1 + ((random >> 8) % 3000));
    const isLent = seed % 3 === 0 || (seed % 3 === 1 && (random & 0x10000) !== 0);
    pieces.push(await memoryFor(disk, size, isLent, data?.subarray(at, at + size)));
    at += size;
  }
  return pieces;
}

function bytesOf(memory: Memory): Uint8Array {
  return memory instanceof Uint8Array ? memory : memory.bytes;
}

function fill(model: Uint8Array, ranges: readonly { position: number; length: number }[], value: number): void {
  for (const { position, length } of ranges) model.fill(value, position, position + length);
}
