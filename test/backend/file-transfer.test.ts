/** Reads and writes of files: at once when the kernel need not wait, and on a thread from where it would have to. */

import assert from "node:assert/strict";
import { constants } from "node:os";
import { describe, it, type TestContext } from "node:test";
import fc from "fast-check";
import { FileTransfer, READ, type TransferCalls, WRITE } from "../../src/backend/file-transfer.js";
import { type BlockStorage, MemoryParts } from "../../src/backend/index.js";
import { openBlock } from "../../src/index.js";
import { closeFd, createMemfd, MAX_PARTS, mapShared, RWF_NOWAIT, unmapShared } from "../../src/sys/index.js";
import { backendFor, pattern } from "./support.js";

const { EAGAIN, EIO, ENOSPC, ENOSYS, EOPNOTSUPP } = constants.errno;
const KIB = 1024;

/** A call as the kernel saw it. */
interface Call {
  readonly on: "at once" | "thread";
  readonly position: number;
  readonly count: number;
  readonly flags: number;
}

/** A kernel with one file, which the test tells how much of each call it does: so many bytes, or an errno below 0. */
class FakeKernel implements TransferCalls {
  readonly name: string;
  readonly calls: Call[] = [];
  /** What the next calls at once do, and those on threads; all that is asked for when there is nothing more. */
  readonly atOnceDoes: number[] = [];
  readonly threadDoes: number[] = [];
  /** Runs before each call on a thread. */
  before: () => Promise<void> = () => Promise.resolve();
  private readonly file: Uint8Array;

  constructor(file: Uint8Array, name: "read" | "write" = "read") {
    this.file = file;
    this.name = name;
  }

  readonly atOnce: TransferCalls["atOnce"] = (_fd, memory, places, count, position, flags) => {
    this.calls.push({ on: "at once", position, count, flags });
    return this.transfer(memory, places, count, position, this.atOnceDoes.shift());
  };

  readonly later: TransferCalls["later"] = async (_fd, memory, places, count, position) => {
    this.calls.push({ on: "thread", position, count, flags: 0 });
    const does = this.threadDoes.shift();
    await this.before();
    return this.transfer(memory, places, count, position, does);
  };

  private transfer(
    memory: Uint8Array,
    places: Float64Array,
    count: number,
    position: number,
    does = Number.POSITIVE_INFINITY,
  ): number {
    assert.ok(count > 0 && count <= MAX_PARTS, `${count} parts`);
    if (does < 0) return does;
    let done = 0;
    for (let i = 0; i < count; i++) {
      const take = Math.min(places[2 * i + 1], does - done, this.file.length - position - done);
      const part = memory.subarray(places[2 * i], places[2 * i] + take);
      const there = this.file.subarray(position + done, position + done + take);
      if (this.name === "read") part.set(there);
      else there.set(part);
      done += take;
    }
    return done;
  }
}

function partsOf(...parts: readonly (readonly [memory: Uint8Array, offset: number, length: number])[]): MemoryParts {
  const all = new MemoryParts();
  for (const [memory, offset, length] of parts) all.add(memory, offset, length);
  return all;
}

describe("a transfer of a file", () => {
  it("is done within the call when nothing has to be waited for", () => {
    const kernel = new FakeKernel(pattern(8 * KIB));
    const memory = new Uint8Array(8 * KIB);
    const parts = partsOf([memory, 4 * KIB, 100], [memory, 0, 412]);
    assert.equal(new FileTransfer(kernel, "x", false).run(7, 512, parts), undefined);
    assert.deepEqual(kernel.calls, [{ on: "at once", position: 512, count: 2, flags: RWF_NOWAIT }]);
    assert.deepEqual(memory.subarray(4 * KIB, 4 * KIB + 100), pattern(8 * KIB).subarray(512, 612));
    assert.deepEqual(memory.subarray(0, 412), pattern(8 * KIB).subarray(612, 1024));
  });

  it("goes on on a thread from where it would have to wait, and its parts can be used for the next", async () => {
    for (const [does, rest] of [
      [-EAGAIN, 0],
      [0, 0],
      [1, 1],
      [700, 700],
      [1023, 1023],
    ] as const) {
      const kernel = new FakeKernel(pattern(8 * KIB));
      kernel.atOnceDoes.push(does);
      kernel.threadDoes.push(100, 1, 2);
      const memory = new Uint8Array(2 * KIB);
      const parts = partsOf([memory, 1000, 600], [memory, 0, 424]);
      const transfer = new FileTransfer(kernel, "x", false);
      const work = transfer.run(7, 512, parts);
      parts.only(memory, 1990, 10);
      assert.equal(transfer.run(7, 0, parts), undefined, "another is not held up");
      await work;
      const positions = kernel.calls.filter(({ on }) => on === "thread").map(({ position }) => position - 512);
      assert.deepEqual(
        positions,
        [0, 100, 101, 103].map((at) => at + rest).filter((at) => at < 1024),
      );
      assert.deepEqual(memory.subarray(1000, 1600), pattern(8 * KIB).subarray(512, 1112));
      assert.deepEqual(memory.subarray(0, 424), pattern(8 * KIB).subarray(1112, 1536));
    }
  });

  for (const [name, errno] of [
    ["EOPNOTSUPP", EOPNOTSUPP],
    ["ENOSYS", ENOSYS],
  ] as const) {
    it(`is not tried at once again where that is not possible (${name})`, async () => {
      const kernel = new FakeKernel(pattern(4 * KIB));
      kernel.atOnceDoes.push(-errno);
      const memory = new Uint8Array(512);
      const transfer = new FileTransfer(kernel, "x", false);
      for (let i = 0; i < 3; i++) {
        await transfer.run(7, 512 * i, partsOf([memory, 0, 512]));
        assert.deepEqual(memory, pattern(4 * KIB).subarray(512 * i, 512 * i + 512));
      }
      assert.deepEqual(
        kernel.calls.map(({ on }) => on),
        ["at once", "thread", "thread", "thread"],
      );
    });
  }

  it("needs no flag on a file system in memory", () => {
    const kernel = new FakeKernel(pattern(KIB));
    assert.equal(new FileTransfer(kernel, "x", true).run(7, 0, partsOf([new Uint8Array(512), 0, 512])), undefined);
    assert.deepEqual(kernel.calls, [{ on: "at once", position: 0, count: 1, flags: 0 }]);
  });

  it("of more than 1 MiB is a thread's work from the start", async () => {
    const kernel = new FakeKernel(new Uint8Array(2048 * KIB));
    const transfer = new FileTransfer(kernel, "x", false);
    const memory = new Uint8Array(2048 * KIB);
    assert.equal(transfer.run(7, 0, partsOf([memory, 0, 1024 * KIB])), undefined);
    await transfer.run(7, 0, partsOf([memory, 0, 1024 * KIB + 512]));
    assert.deepEqual(
      kernel.calls.map(({ on }) => on),
      ["at once", "thread"],
    );
  });

  it("fails as the kernel does, with its errno, and the next is tried as before", async () => {
    const kernel = new FakeKernel(new Uint8Array(KIB), "write");
    const transfer = new FileTransfer(kernel, "disk.img", false);
    const parts = partsOf([new Uint8Array(512), 0, 512]);
    kernel.atOnceDoes.push(-ENOSPC);
    assert.throws(() => transfer.run(7, 512, parts), {
      ...{ code: "ERR_VIRTIO_SYSCALL", errno: ENOSPC, syscall: "write" },
      message: /write at 512 of disk\.img: ENOSPC/,
    });
    kernel.atOnceDoes.push(100);
    kernel.threadDoes.push(-EIO);
    const work = transfer.run(7, 512, parts);
    await assert.rejects(work ?? Promise.resolve(), { errno: EIO, message: /write at 612 of disk\.img: EIO/ });
    assert.equal(transfer.run(7, 0, parts), undefined);
  });

  it("fails where the file ends", async () => {
    const transfer = new FileTransfer(new FakeKernel(new Uint8Array(KIB)), "disk.img", false);
    const work = transfer.run(7, 512, partsOf([new Uint8Array(1024), 0, 1024]));
    await assert.rejects(work ?? Promise.resolve(), { code: "ERR_VIRTIO_BACKEND", message: /disk\.img ends at 1024/ });
  });

  it("reaches all of its parts, whatever memory they lie in and however little each call does", async () => {
    const memories = 3;
    const memoryBytes = 2 * KIB;
    const part = fc.record({
      memory: fc.nat({ max: memories - 1 }),
      offset: fc.nat({ max: memoryBytes - 1 }),
      length: fc.integer({ min: 1, max: 300 }),
    });
    const does = fc.array(fc.oneof(fc.integer({ min: 1, max: 400 }), fc.constant(-EAGAIN)), { maxLength: 8 });
    const threadDoes = fc.array(fc.integer({ min: 1, max: 400 }), { maxLength: 8 });
    await fc.assert(
      fc.asyncProperty(
        fc.array(part, { minLength: 1, maxLength: 12 }),
        does,
        threadDoes,
        fc.nat({ max: 500 }),
        fc.boolean(),
        async (plan, atOnceDoes, onThread, position, writes) => {
          const file = pattern(8 * KIB, 3);
          const kernel = new FakeKernel(file, writes ? "write" : "read");
          kernel.atOnceDoes.push(...atOnceDoes);
          kernel.threadDoes.push(...onThread);
          const memory = Array.from({ length: memories }, (_, i) => pattern(memoryBytes, 10 + i));
          const expectedMemory = memory.map((bytes) => bytes.slice());
          const expectedFile = file.slice();
          const parts = new MemoryParts();
          let at = position;
          for (const { memory: which, offset, length } of plan) {
            const take = Math.min(length, memoryBytes - offset);
            parts.add(memory[which], offset, take);
            if (writes) expectedFile.set(memory[which].subarray(offset, offset + take), at);
            else expectedMemory[which].set(file.subarray(at, at + take), offset);
            at += take;
          }
          assert.equal(parts.bytes, at - position);
          await new FileTransfer(kernel, "x", false).run(7, position, parts);
          assert.deepEqual(file, expectedFile);
          assert.deepEqual(memory, expectedMemory);
        },
      ),
      { numRuns: 300 },
    );
  });

  it("may have more parts than the kernel takes in one call, and a file of the kernel's", async (t) => {
    const bytes = 4 * MAX_PARTS;
    const fd = createMemfd("transfer", bytes);
    const buffer = mapShared(fd, bytes);
    t.after(() => {
      unmapShared(buffer);
      closeFd(fd);
    });
    const memory = pattern(2 * bytes);
    const parts = new MemoryParts();
    for (let i = 0; i < bytes / 2; i++) parts.add(memory, 4 * i, 2); // they do not touch
    assert.equal(parts.count, 2 * MAX_PARTS);
    for (const inMemory of [true, false]) {
      new Uint8Array(buffer).fill(0);
      await new FileTransfer(WRITE, "x", inMemory).run(fd, 0, parts);
      assert.deepEqual(
        new Uint8Array(buffer),
        Uint8Array.from({ length: bytes }, (_, i) => memory[4 * (i >> 1) + (i & 1)]),
      );
      const back = new Uint8Array(2 * bytes);
      const into = new MemoryParts();
      for (let i = 0; i < bytes / 2; i++) into.add(back, 4 * i, 2);
      await new FileTransfer(READ, "x", inMemory).run(fd, 0, into);
      assert.ok(back.every((byte, i) => byte === ((i & 2) === 0 ? memory[i] : 0)));
    }
  });
});

/** A disk over a fake kernel: what lies in the first 4 KiB is not in the page cache. */
function halfCached(t: TestContext): { storage: BlockStorage; release: () => void } {
  const file = pattern(1024 * KIB);
  let release: () => void = () => undefined;
  const held = new Promise<void>((resolve) => {
    release = resolve;
  });
  t.after(() => release());
  const transferOf = (name: "read" | "write"): FileTransfer => {
    const kernel = new FakeKernel(file, name);
    kernel.before = () => held;
    const { later, atOnce } = kernel;
    return new FileTransfer(
      {
        ...{ name, later },
        atOnce: (fd, memory, places, count, position, flags) =>
          position < 4 * KIB ? -EAGAIN : atOnce(fd, memory, places, count, position, flags),
      },
      "x",
      false,
    );
  };
  const reads = transferOf("read");
  const writes = transferOf("write");
  return {
    release: () => release(),
    storage: {
      capacity: file.length,
      read: () => assert.fail("it is asked for parts"),
      write: () => assert.fail("it is asked for parts"),
      readInto: (offset, into) => reads.run(7, offset, into),
      writeFrom: (offset, from) => writes.run(7, offset, from),
      flush: () => undefined,
    },
  };
}

describe("a disk that stalls", () => {
  for (const packed of [false, true]) {
    it(`holds up only the requests that need it, ${packed ? "packed" : "split"}`, async (t) => {
      const { storage, release } = halfCached(t);
      const { backend } = backendFor(t, storage);
      const disk = await openBlock(`vhost-user:${backend.path}`, { packed, queueSize: 64 });
      try {
        assert.equal(disk.info.format, packed ? "packed" : "split");
        let stalled = 3;
        const slow = [
          disk.read(new Uint8Array(512), { position: 0 }),
          disk.write(pattern(512, 9), { position: 1024 }),
          // It begins on the disk that stalls and is given to a thread as a whole.
          disk.read(new Uint8Array(8 * KIB), { position: 2048 }),
        ].map(async (request) => {
          const { buffer } = await request;
          stalled--;
          return buffer;
        });
        for (let i = 0; i < 100; i++) {
          const position = 4 * KIB + ((i * 7919) % 1000) * 512;
          const { buffer } = await disk.read(new Uint8Array(1024), { position });
          assert.deepEqual(buffer, pattern(1024 * KIB).subarray(position, position + 1024));
        }
        await disk.write(pattern(512, 5), { position: 64 * KIB });
        await disk.flush();
        assert.equal(stalled, 3);
        release();
        const [first] = await Promise.all(slow);
        assert.deepEqual(first, pattern(1024 * KIB).subarray(0, 512));
        assert.deepEqual((await disk.read(new Uint8Array(512), { position: 64 * KIB })).buffer, pattern(512, 5));
      } finally {
        release();
        await disk.close();
      }
    });
  }
});
