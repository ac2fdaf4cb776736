/** Memory and files as disks. */

import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import {
  closeSync,
  ftruncateSync,
  mkdirSync,
  openSync,
  readFileSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { constants } from "node:os";
import { join } from "node:path";
import { describe, it, type TestContext } from "node:test";
import fc from "fast-check";
import { FileStorage, MemoryParts, openStorage, RamStorage } from "../../src/backend/index.js";
import { folderFor, mappings, openFds, pattern } from "./support.js";

const MIB = 1024 * 1024;

function imageFor(t: TestContext, size: number): string {
  const path = join(folderFor(t), "disk.img");
  const fd = openSync(path, "w");
  ftruncateSync(fd, size);
  closeSync(fd);
  return path;
}

function openFor(t: TestContext, size: number, options: { readOnly?: boolean } = {}): FileStorage {
  const disk = FileStorage.open(imageFor(t, size), options);
  t.after(() => disk.close());
  return disk;
}

/** A stretch of memory, cut in two at a place that `seed` picks; the second part is named by a view of its own. */
function partsOf(memory: Uint8Array, at: number, length: number, seed: number): MemoryParts {
  const parts = new MemoryParts();
  const first = (seed * 7919) % (length + 1);
  if (first > 0) parts.add(memory, at, first);
  if (first < length) parts.add(memory.subarray(at + first), 0, length - first);
  return parts;
}

/** Bytes that a file takes on its disk. */
function allocated(path: string): number {
  return statSync(path).blocks * 512;
}

describe("RamStorage", () => {
  it("keeps what was written, and reads zeroes elsewhere and after discard, writeZeroes and secureErase", async () => {
    const disk = new RamStorage(MIB);
    disk.write(512 * 3, pattern(5000));
    const bytes = new Uint8Array(6000).fill(9);
    disk.read(512 * 3, bytes);
    assert.deepEqual(bytes.subarray(0, 5000), pattern(5000));
    assert.deepEqual(bytes.subarray(5000), new Uint8Array(1000));
    for (const zero of ["discard", "writeZeroes", "secureErase"] as const) {
      disk.write(0, pattern(16384));
      await disk[zero](512, 8192 + 512);
      const now = new Uint8Array(16384);
      disk.read(0, now);
      assert.deepEqual(now, pattern(16384).fill(0, 512, 512 + 8192 + 512), zero);
      await disk[zero](512, 0);
    }
    disk.flush();
    disk.close();
  });

  it("is a plain array of bytes, whatever the order of calls", async () => {
    const size = 64 * 1024;
    const call = fc.record({
      kind: fc.constantFrom("write", "discard", "read"),
      at: fc.nat({ max: size / 512 - 1 }),
      count: fc.integer({ min: 1, max: 40 }),
      lead: fc.nat({ max: 100 }),
    });
    await fc.assert(
      fc.asyncProperty(fc.array(call, { maxLength: 30 }), async (calls) => {
        const disk = new RamStorage(size);
        const model = new Uint8Array(size);
        for (const [i, { kind, at, count, lead }] of calls.entries()) {
          const offset = at * 512;
          const length = Math.min(count * 512, size - offset);
          const memory = new Uint8Array(lead + length + 7).fill(0xaa);
          if (kind === "write") {
            memory.set(pattern(length, i), lead);
            disk.writeFrom(offset, partsOf(memory, lead, length, i));
            model.set(pattern(length, i), offset);
          } else if (kind === "discard") {
            await disk.discard(offset, length);
            model.fill(0, offset, offset + length);
          } else {
            disk.readInto(offset, partsOf(memory, lead, length, i));
            assert.deepEqual(memory.subarray(lead, lead + length), model.subarray(offset, offset + length));
            assert.ok(memory.subarray(0, lead).every((byte) => byte === 0xaa));
            assert.ok(memory.subarray(lead + length).every((byte) => byte === 0xaa));
          }
        }
        disk.close();
      }),
      { numRuns: 50 },
    );
  });

  it("can be larger than memory, and requests may cross its windows of 1 GiB", async () => {
    const disk = new RamStorage(64 * 1024 ** 3);
    assert.equal(disk.capacity, 64 * 1024 ** 3);
    for (const offset of [1024 ** 3 - 512, 5 * 1024 ** 3 - 2048, 64 * 1024 ** 3 - 4096]) {
      disk.write(offset, pattern(4096));
      const bytes = new Uint8Array(4096);
      disk.read(offset, bytes);
      assert.deepEqual(bytes, pattern(4096));
    }
    await disk.discard(1024 ** 3 - 512, 4096);
    const bytes = new Uint8Array(4096).fill(1);
    disk.read(1024 ** 3 - 512, bytes);
    assert.deepEqual(bytes, new Uint8Array(4096));
    disk.close();
  });

  it("zeroes large ranges on another thread, small ones at once", async () => {
    const disk = new RamStorage(8 * MIB);
    for (const zero of ["discard", "writeZeroes", "secureErase"] as const) {
      disk.write(0, new Uint8Array(8 * MIB).fill(7));
      assert.equal(disk[zero](512, MIB), undefined);
      const work = disk[zero](2 * MIB, 5 * MIB + 512);
      assert.ok(work instanceof Promise);
      await work;
      const bytes = new Uint8Array(8 * MIB);
      disk.read(0, bytes);
      const expected = new Uint8Array(8 * MIB).fill(7);
      assert.deepEqual(bytes, expected.fill(0, 512, 512 + MIB).fill(0, 2 * MIB, 7 * MIB + 512));
    }
    disk.close();
  });

  it("gives discarded memory back to the system", async () => {
    const disk = new RamStorage(32 * MIB);
    const used = (): number => {
      const line = readFileSync("/proc/self/smaps", "utf8").split("\n");
      const at = line.findIndex((text) => text.includes("memfd:virtio-ram"));
      return Number(/Pss:\s+(\d+) kB/.exec(line.slice(at, at + 10).join("\n"))?.[1]);
    };
    for (let i = 0; i < 32; i++) disk.write(i * MIB, pattern(MIB));
    assert.ok(used() >= 32 * 1024);
    await disk.discard(0, 32 * MIB);
    assert.ok(used() < 1024);
    disk.close();
  });

  it("refuses sizes that no disk has, and works no more when closed", () => {
    for (const size of [0, -512, 511, 1000, 512.5, Number.NaN, 2 ** 60]) {
      assert.throws(() => new RamStorage(size), { name: "RangeError" }, String(size));
    }
    assert.throws(() => new RamStorage("1M" as unknown as number), { name: "TypeError" });
    assert.throws(() => new RamStorage(512, { ID: "x" } as object), { name: "TypeError", message: /"id"/ });
    const before = { fds: openFds(), maps: mappings() };
    const disk = new RamStorage(1536);
    disk.write(1024, pattern(512));
    disk.close();
    disk.close();
    assert.deepEqual({ fds: openFds(), maps: mappings() }, before);
    assert.throws(() => disk.read(0, new Uint8Array(512)), { code: "ERR_VIRTIO_CLOSED" });
    assert.throws(() => disk.write(0, new Uint8Array(512)), { code: "ERR_VIRTIO_CLOSED" });
    assert.throws(() => disk.discard(0, 512), { code: "ERR_VIRTIO_CLOSED" });
  });
});

describe("FileStorage", () => {
  it("keeps in the file what was written, at its place", async (t) => {
    const disk = openFor(t, MIB);
    await Promise.all([disk.write(0, pattern(4096, 1)), disk.write(MIB - 512, pattern(512, 2))]);
    await disk.flush();
    const file = readFileSync(disk.path);
    assert.deepEqual(new Uint8Array(file.subarray(0, 4096)), pattern(4096, 1));
    assert.deepEqual(new Uint8Array(file.subarray(MIB - 512)), pattern(512, 2));
    const bytes = new Uint8Array(4096);
    await disk.read(0, bytes);
    assert.deepEqual(bytes, pattern(4096, 1));
    assert.equal(file.length, MIB);
  });

  it("punches holes for discards, and makes zeroes with and without unmap", async (t) => {
    const disk = openFor(t, MIB);
    const full = async (): Promise<void> => {
      await disk.write(0, pattern(MIB));
      await disk.flush();
    };
    await full();
    assert.ok(allocated(disk.path) >= MIB);
    await disk.discard(0, MIB / 2);
    await disk.flush();
    assert.ok(allocated(disk.path) <= MIB / 2 + 65536, "the file system here cannot punch holes");
    await full();
    for (const mayUnmap of [true, false]) {
      await full();
      await disk.writeZeroes(512, MIB - 1024, mayUnmap);
      const bytes = new Uint8Array(MIB);
      await disk.read(0, bytes);
      assert.deepEqual(bytes, pattern(MIB).fill(0, 512, MIB - 512));
      await disk.flush();
      assert.equal(allocated(disk.path) >= MIB, !mayUnmap);
    }
    assert.equal(statSync(disk.path).size, MIB);
  });

  it("writes zeroes itself where the file system cannot make them", async (t) => {
    // /dev/shm is tmpfs: it can punch holes, and has no zero range.
    const path = `/dev/shm/virtio-test-${process.pid}.img`;
    writeFileSync(path, pattern(3 * MIB));
    t.after(() => rmSync(path, { force: true }));
    const disk = FileStorage.open(path);
    await disk.writeZeroes(512, 2 * MIB + 512, false);
    await disk.close();
    assert.deepEqual(new Uint8Array(readFileSync(path)), pattern(3 * MIB).fill(0, 512, 2 * MIB + 1024));
    assert.ok(allocated(path) >= 3 * MIB);
  });

  it("fails a read behind the end of a file that was cut off", async (t) => {
    const disk = openFor(t, MIB);
    truncateSync(disk.path, 4096 + 100);
    await disk.read(0, new Uint8Array(4096));
    await assert.rejects(disk.read(4096, new Uint8Array(512)), { code: "ERR_VIRTIO_BACKEND", message: /ends at 4196/ });
  });

  it("opened read-only it refuses to be written", async (t) => {
    const disk = openFor(t, MIB, { readOnly: true });
    assert.equal(disk.readOnly, true);
    await disk.read(0, new Uint8Array(512));
    await assert.rejects(disk.write(0, new Uint8Array(512)), { code: "ERR_VIRTIO_SYSCALL", errno: 9 });
    await assert.rejects(disk.discard(0, 512), { code: "ERR_VIRTIO_SYSCALL", errno: 9 });
  });

  it("says what is wrong with a file, and what to try", (t) => {
    const folder = folderFor(t);
    const path = join(folder, "x");
    const before = openFds();
    assert.throws(() => FileStorage.open(path), {
      code: "ERR_VIRTIO_BACKEND",
      errno: 2,
      message: /no such file.*truncate -s/,
    });
    assert.throws(() => FileStorage.open(folder), { code: "ERR_VIRTIO_BACKEND" });
    assert.throws(() => FileStorage.open(folder, { readOnly: true }), {
      code: "ERR_VIRTIO_BACKEND",
      message: /no file and no block/,
    });
    mkdirSync(join(folder, "d"));
    assert.throws(() => FileStorage.open("/dev/null"), { code: "ERR_VIRTIO_BACKEND", message: /no file and no block/ });
    writeFileSync(path, "");
    assert.throws(() => FileStorage.open(path), { code: "ERR_VIRTIO_BACKEND", message: /empty/ });
    writeFileSync(path, new Uint8Array(1000));
    assert.throws(() => FileStorage.open(path), {
      code: "ERR_VIRTIO_BACKEND",
      message: /1000 bytes.*truncate -s 1024/,
    });
    assert.throws(() => FileStorage.open(path, { readonly: true } as object), {
      name: "TypeError",
      message: /"readOnly"/,
    });
    assert.equal(openFds(), before);
  });

  it("transfers all parts of a request, whatever memory they lie in, small and large", async (t) => {
    const disk = openFor(t, 4 * MIB);
    for (const size of [512, 4096, 100_000, MIB, 3 * MIB + 512]) {
      const from = pattern(size + 100, size);
      await disk.writeFrom(512, partsOf(from, 100, size, 3));
      const into = new Uint8Array(size + 100).fill(0xaa);
      await disk.readInto(512, partsOf(into, 7, size, 5));
      assert.deepEqual(into.subarray(7, 7 + size), from.subarray(100));
      assert.deepEqual([into[6], into[7 + size]], [0xaa, 0xaa]);
    }
    assert.equal(statSync(disk.path).size, 4 * MIB);
  });

  it("reads holes as zeroes, and leaves them holes", async (t) => {
    const disk = openFor(t, 64 * MIB);
    await disk.write(32 * MIB, pattern(512));
    for (const offset of [0, 16 * MIB, 32 * MIB + 65536]) {
      for (const length of [512, 2 * MIB]) {
        const bytes = new Uint8Array(length).fill(1);
        await disk.read(offset, bytes);
        assert.ok(bytes.every((byte) => byte === 0));
      }
    }
    assert.ok(allocated(disk.path) <= MIB);
  });

  it("survives a write that may not be, at once or on a thread, and says which error it was", (t) => {
    const path = imageFor(t, 4 * MIB);
    // Beyond the limit of file sizes the kernel refuses with EFBIG, after a signal that would end most programs.
    const script = `
      import { FileStorage } from ${JSON.stringify(new URL("../../src/backend/index.js", import.meta.url).href)};
      const disk = FileStorage.open(${JSON.stringify(path)});
      for (const size of [512, ${2 * MIB}]) {
        await disk.write(${MIB}, new Uint8Array(size)).catch(({ errno }) => console.log(errno));
      }
      await disk.read(${MIB}, new Uint8Array(512));
      await disk.flush();
      await disk.close();
      console.log("alive");`;
    const command = `ulimit -f 1 && exec "$0" --input-type=module -e "$1"`;
    const { stdout, stderr } = spawnSync("sh", ["-c", command, process.execPath, script], { encoding: "utf8" });
    assert.equal(stdout, `${constants.errno.EFBIG}\n${constants.errno.EFBIG}\nalive\n`, stderr);
  });

  it("closes when nothing is done with it any more", async (t) => {
    const disk = openFor(t, 8 * MIB);
    const bytes = pattern(6 * MIB);
    // Two steps on threads, because the parts lie in different memory.
    const parts = new MemoryParts();
    parts.add(bytes, 0, 3 * MIB);
    parts.add(bytes.subarray(3 * MIB), 0, 3 * MIB);
    const writing = disk.writeFrom(0, parts);
    const closing = disk.close();
    await writing;
    await closing;
    assert.deepEqual(new Uint8Array(readFileSync(disk.path).subarray(0, 6 * MIB)), bytes);
  });

  it("closes once, and works no more", async (t) => {
    const before = openFds();
    const disk = openFor(t, MIB);
    await disk.close();
    await disk.close();
    assert.equal(openFds(), before);
    await assert.rejects(disk.read(0, new Uint8Array(512)), { code: "ERR_VIRTIO_CLOSED" });
    assert.throws(() => disk.flush(), { code: "ERR_VIRTIO_CLOSED" });
    await assert.rejects(disk.discard(0, 512), { code: "ERR_VIRTIO_CLOSED" });
  });
});

describe("openStorage", () => {
  it("makes what is described, and refuses other descriptions", async (t) => {
    const ram = openStorage({ kind: "ram", size: MIB });
    assert.equal(ram.capacity, MIB);
    await ram.close?.();
    const file = openStorage({ kind: "file", path: imageFor(t, MIB), readOnly: true });
    assert.deepEqual([file.capacity, file.readOnly], [MIB, true]);
    await file.close?.();
    assert.throws(() => openStorage({ kind: "tape" } as never), { name: "RangeError", message: /"ram" or "file"/ });
    assert.throws(() => openStorage({ kind: "ram", size: MIB, path: "x" } as never), { name: "TypeError" });
    assert.throws(() => openStorage(null as never), { name: "TypeError" });
  });
});
