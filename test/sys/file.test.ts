/** Reads and writes of files to and from parts of memory, and ranges of files; at once and on threads. */

import assert from "node:assert/strict";
import { closeSync, fstatSync, mkdtempSync, openSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { constants, tmpdir } from "node:os";
import { join } from "node:path";
import test, { type TestContext } from "node:test";
import {
  closeFd,
  createMemfd,
  fallocate,
  fallocateLater,
  MAX_PARTS,
  mapShared,
  RWF_NOWAIT,
  readParts,
  readPartsLater,
  unmapShared,
  writeParts,
  writePartsLater,
} from "../../src/sys/index.js";
import { collectGarbage, runChild, SYS, turn, turnUntil } from "./helpers.js";

const { errno } = constants;

/** A file of `bytes`, open for reading and writing, gone after the test. */
function fileFor(t: TestContext, bytes: Uint8Array): { fd: number; path: string } {
  const folder = mkdtempSync(join(tmpdir(), "virtio-"));
  const path = join(folder, "file");
  writeFileSync(path, bytes);
  const fd = openSync(path, "r+");
  t.after(() => {
    closeSync(fd);
    rmSync(folder, { recursive: true });
  });
  return { fd, path };
}

function countingBytes(length: number): Uint8Array {
  return Uint8Array.from({ length }, (_, i) => (i * 7 + (i >> 8)) & 0xff);
}

for (const [name, read, write] of [
  ["at once", async (...args: Parameters<typeof readPartsLater>) => readParts(...args, 0), writeParts],
  ["on a thread", readPartsLater, writePartsLater],
] as const) {
  test(`parts of memory are filled from a file in their order, ${name}`, async (t) => {
    const data = countingBytes(5000);
    const { fd } = fileFor(t, data);
    const memory = new Uint8Array(3000).fill(0xaa);
    const places = Float64Array.of(2000, 100, 0, 7, 500, 0, 1000, 1, 9, 9);
    assert.equal(await read(fd, memory, places, 4, 1234), 108);
    const expected = new Uint8Array(3000).fill(0xaa);
    expected.set(data.subarray(1234, 1334), 2000);
    expected.set(data.subarray(1334, 1341), 0);
    expected.set(data.subarray(1341, 1342), 1000);
    assert.deepEqual(memory, expected);
    assert.equal(await read(fd, memory, Float64Array.of(0, 1000), 1, 4900), 100, "the end of the file");
    assert.equal(await read(fd, memory, Float64Array.of(0, 1000), 1, 5000), 0, "behind it");
  });

  test(`parts of memory are written to a file in their order, ${name}`, async (t) => {
    const { fd, path } = fileFor(t, new Uint8Array(1000));
    const memory = countingBytes(600).subarray(100);
    assert.equal(await write(fd, memory, Float64Array.of(400, 100, 0, 50), 2, 300, 0), 150);
    const expected = new Uint8Array(1000);
    expected.set(memory.subarray(400, 500), 300);
    expected.set(memory.subarray(0, 50), 400);
    assert.deepEqual(new Uint8Array(readFileSync(path)), expected);
  });

  test(`what the kernel refuses is -errno, and parts outside the memory reach no kernel, ${name}`, async (t) => {
    const { fd, path } = fileFor(t, countingBytes(1000));
    const memory = new Uint8Array(100);
    const whole = Float64Array.of(0, 100);
    assert.equal(await read(0x7fff_ffff, memory, whole, 1, 0), -errno.EBADF);
    const readOnly = openSync(path, "r");
    assert.equal(await write(readOnly, memory, whole, 1, 0, 0), -errno.EBADF);
    closeSync(readOnly);
    const wrong: [Float64Array, number, number][] = [
      [Float64Array.of(1, 100), 1, 0],
      [Float64Array.of(101, 0), 1, 0],
      [Float64Array.of(-1, 2), 1, 0],
      [Float64Array.of(50, -10), 1, 0],
      [Float64Array.of(Number.NaN, 1), 1, 0],
      [Float64Array.of(0, Number.NaN), 1, 0],
      [Float64Array.of(0, Number.POSITIVE_INFINITY), 1, 0],
      [Float64Array.of(2 ** 53, 2 ** 63), 1, 0],
      [whole, 2, 0],
      [whole, -1, 0],
      [whole, 1, -1],
      [new Float64Array(2 * MAX_PARTS + 2), MAX_PARTS + 1, 0],
    ];
    for (const [places, count, position] of wrong) {
      assert.equal(await read(fd, memory, places, count, position), -errno.EINVAL, `read of ${places.join()}`);
      assert.equal(await write(fd, memory, places, count, position, 0), -errno.EINVAL, `write of ${places.join()}`);
    }
    const noPlaces = [0, 100] as unknown as Float64Array;
    assert.equal(await read(fd, memory, noPlaces, 1, 0), -errno.EINVAL);
    assert.equal(await read(fd, new Uint32Array(10) as unknown as Uint8Array, whole, 1, 0), -errno.EINVAL);
    assert.deepEqual(memory, new Uint8Array(100));
    const most = new Float64Array(2 * MAX_PARTS).fill(1);
    assert.equal(await read(fd, memory, most, MAX_PARTS, 0), 1000, "as many parts as there may be");
  });
}

test("RWF_NOWAIT transfers what is there, says EAGAIN, or that the file system cannot", (t) => {
  const data = countingBytes(4096);
  const { fd } = fileFor(t, data);
  const memory = new Uint8Array(4096);
  const whole = Float64Array.of(0, 4096);
  const result = readParts(fd, memory, whole, 1, 0, RWF_NOWAIT);
  assert.ok([4096, -errno.EAGAIN, -errno.EOPNOTSUPP].includes(result), `${result}`);
  if (result === 4096) assert.deepEqual(memory, data);
});

test("the memory and the places of reads on threads may be forgotten meanwhile", async (t) => {
  const { fd } = fileFor(t, countingBytes(1 << 20));
  const results: number[] = [];
  const begin = (): void => {
    // Nothing but the calls themselves hold this memory; it would be unmapped when it is collected.
    const memfd = createMemfd("forgotten", 1 << 20);
    const memory = new Uint8Array(mapShared(memfd, 1 << 20));
    closeFd(memfd);
    const places = Float64Array.of(0, 1 << 20);
    for (let i = 0; i < 500; i++) {
      void readPartsLater(fd, memory, places, 1, 0).then((result) => results.push(result));
    }
    places.fill(-1);
  };
  begin();
  await turn();
  collectGarbage();
  assert.ok(await turnUntil(() => results.length === 500, 10_000_000));
  assert.deepEqual(new Set(results), new Set([1 << 20]));
});

test("what the callback of a call on a thread throws becomes an uncaughtException", () => {
  const child = runChild(`
    import { native } from ${JSON.stringify(new URL("./native.js", SYS).href)};
    process.on("uncaughtException", (error) => console.log(error.message));
    native().preadv(-1, new Uint8Array(1), Float64Array.of(0, 1), 1, 0, 0, (result) => { throw new Error(String(result)) });
  `);
  assert.equal(child.stdout, `${-errno.EBADF}\n`, child.stderr);
});

test("a worker thread can be terminated while calls run on threads", () => {
  const child = runChild(`
    import { Worker } from "node:worker_threads";
    const code = \`
      import { parentPort } from "node:worker_threads";
      import { createMemfd, fallocateLater, readPartsLater } from ${JSON.stringify(SYS)};
      const fd = createMemfd("worker", 64 << 20);
      for (let i = 0; i < 64; i++) {
        readPartsLater(fd, new Uint8Array(1 << 20), Float64Array.of(0, 1 << 20), 1, i << 20);
        fallocateLater(fd, "punchHole", 0, 64 << 20);
      }
      parentPort.postMessage("running");
    \`;
    for (let i = 0; i < 5; i++) {
      const worker = new Worker(code, { eval: true });
      await new Promise((resolve, reject) => worker.once("message", resolve).once("error", reject));
      await worker.terminate();
    }
    console.log("terminated");
  `);
  assert.equal(child.stdout, "terminated\n", child.stderr);
});

test("fallocate gives blocks back, zeroes, and allocates", () => {
  const folder = mkdtempSync(join(tmpdir(), "virtio-"));
  const path = join(folder, "disk");
  writeFileSync(path, new Uint8Array(1 << 20).fill(0xaa));
  const fd = openSync(path, "r+");
  const full = fstatSync(fd).blocks;
  fallocate(fd, "punchHole", 65536, 2 * 65536);
  const holed = fstatSync(fd).blocks;
  assert.ok(holed < full, `${holed} of ${full} blocks`);
  try {
    fallocate(fd, "zeroRange", 4 * 65536, 65536);
  } catch (error) {
    // tmpfs has no such operation; then nothing is zeroed, and the error says so.
    assert.ok(error instanceof Error && "errno" in error && error.errno === errno.EOPNOTSUPP);
    fallocate(fd, "punchHole", 4 * 65536, 65536);
  }
  const data = readFileSync(path);
  assert.equal(data.length, 1 << 20);
  for (let block = 0; block < 16; block++) {
    const expected = block === 1 || block === 2 || block === 4 ? 0 : 0xaa;
    assert.ok(
      data.subarray(block * 65536, (block + 1) * 65536).every((byte) => byte === expected),
      `block ${block}`,
    );
  }
  fallocate(fd, "allocate", 1 << 20, 4096);
  assert.equal(fstatSync(fd).size, (1 << 20) + 4096);
  closeSync(fd);
  rmSync(folder, { recursive: true });
});

test("fallocate punches holes into shared memory", () => {
  const fd = createMemfd("holes", 8192);
  const buffer = mapShared(fd, 8192);
  const bytes = new Uint8Array(buffer).fill(1);
  fallocate(fd, "punchHole", 4096, 4096);
  assert.equal(bytes[4095], 1);
  assert.equal(bytes[4096], 0);
  assert.throws(() => fallocate(fd, "allocate", 8192, 4096), { code: "ERR_VIRTIO_PERMISSION", errno: errno.EPERM });
  unmapShared(buffer);
  closeFd(fd);
});

test("fallocate refuses what cannot be", () => {
  const fd = createMemfd("refused", 4096);
  const refused = { code: "ERR_VIRTIO_ARGUMENT" };
  assert.throws(() => fallocate(fd, "punch" as "punchHole", 0, 1), refused);
  assert.throws(() => fallocate(fd, "toString" as "punchHole", 0, 1), refused);
  assert.throws(() => fallocate(fd, "punchHole", -1, 1), refused);
  assert.throws(() => fallocate(fd, "punchHole", 0, 0), refused);
  closeFd(fd);
  assert.throws(() => fallocate(fd, "punchHole", 0, 1), { errno: errno.EBADF, syscall: "fallocate" });
});

test("fallocate on a thread does the same, and rejects with what it throws", async () => {
  const fd = createMemfd("later", 8192);
  const buffer = mapShared(fd, 8192);
  const bytes = new Uint8Array(buffer).fill(1);
  await fallocateLater(fd, "punchHole", 4096, 4096);
  assert.deepEqual([bytes[4095], bytes[4096]], [1, 0]);
  await assert.rejects(fallocateLater(fd, "allocate", 8192, 4096), { errno: errno.EPERM, syscall: "fallocate" });
  await assert.rejects(fallocateLater(fd, "punchHole", 0, 0), { code: "ERR_VIRTIO_ARGUMENT" });
  unmapShared(buffer);
  closeFd(fd);
});
