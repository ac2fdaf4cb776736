/** Shared mappings: alignment, bounds, the one munmap, and that none is left over. */

import assert from "node:assert/strict";
import { mkdtempSync, openSync, rmSync, writeFileSync } from "node:fs";
import { constants, tmpdir } from "node:os";
import { join } from "node:path";
import test from "node:test";
import { Worker } from "node:worker_threads";
import { closeFd, createMemfd, mapShared, unmapShared } from "../../src/sys/index.js";
import { collectGarbage, mappings, NATIVE, runChild, SYS, turn, turnUntil } from "./helpers.js";

const MIB = 2 ** 20;

/** First address of the only mapping of that name. */
function addressOf(name: string): bigint {
  const [line = "", ...others] = mappings(name);
  assert.equal(others.length, 0);
  return BigInt(`0x${line.split("-")[0] ?? ""}`);
}

test("two mappings of one file show the same memory, to Atomics as well", () => {
  const fd = createMemfd("twice", 8192);
  const one = mapShared(fd, 8192);
  const other = mapShared(fd, 4096, { offset: 4096 });
  closeFd(fd);
  Atomics.store(new Uint16Array(one), 2048, 0xbeef);
  assert.equal(Atomics.load(new Uint16Array(other), 0), 0xbeef);
  assert.equal(one.byteLength, 8192);
  assert.equal(other.byteLength, 4096);
  unmapShared(one);
  unmapShared(other);
});

test("mappings are aligned as asked: pages, 2 MiB from 2 MiB on, anything on demand", () => {
  const fd = createMemfd("aligned", 4 * MIB);
  const cases: [length: number, align: number | undefined, expected: bigint][] = [
    [4096, undefined, 4096n],
    [2 * MIB, undefined, BigInt(2 * MIB)],
    [3 * MIB, undefined, BigInt(2 * MIB)],
    [4096, 64 * 1024, 65536n],
    [4096, 2 ** 30, 2n ** 30n],
    [3 * MIB, 1, 4096n],
  ];
  for (const [length, align, expected] of cases) {
    const buffer = mapShared(fd, length, align === undefined ? {} : { align });
    assert.equal(addressOf("aligned") % expected, 0n, `${length} at ${align}`);
    unmapShared(buffer);
  }
  closeFd(fd);
});

test("a mapping of part of a page is unmapped whole", () => {
  const fd = createMemfd("part", 5000);
  const buffer = mapShared(fd, 5000);
  assert.equal(buffer.byteLength, 5000);
  unmapShared(buffer);
  assert.deepEqual(mappings("part"), []);
  closeFd(fd);
});

test("unmapping detaches: views have length 0, and a second time is refused", () => {
  const fd = createMemfd("gone", 4096);
  const buffer = mapShared(fd, 4096);
  const view = new Uint8Array(buffer, 16, 32);
  view.fill(1);
  unmapShared(buffer);
  assert.equal(view.length, 0);
  assert.equal(buffer.byteLength, 0);
  assert.deepEqual(mappings("gone"), []);
  const refused = { code: "ERR_VIRTIO_SYSCALL", errno: constants.errno.EINVAL, syscall: "munmap" };
  assert.throws(() => unmapShared(buffer), refused);
  assert.throws(() => unmapShared(new ArrayBuffer(4096)), refused);
  assert.throws(() => unmapShared(new Uint8Array(8) as unknown as ArrayBuffer), { code: "ERR_VIRTIO_ARGUMENT" });
  closeFd(fd);
});

test("a mapping cannot be moved to another thread, and one moved within this thread is not unmapped under it", () => {
  const fd = createMemfd("fixed", 4096);
  const buffer = mapShared(fd, 4096);
  let clone: ArrayBuffer | undefined;
  try {
    clone = structuredClone(buffer, { transfer: [buffer] }); // some versions of Node.js copy, some refuse
  } catch (error) {
    assert.equal(error instanceof Error && error.name, "DataCloneError");
  }
  new Uint8Array(buffer)[0] = 1;
  assert.equal(new Uint8Array(clone ?? new ArrayBuffer(1))[0], 0);
  assert.equal(buffer.byteLength, 4096);
  const transfer: unknown = Reflect.get(buffer, "transfer"); // from Node.js 21 on
  if (typeof transfer === "function") {
    const moved: unknown = Reflect.apply(transfer, buffer, []);
    assert.ok(moved instanceof ArrayBuffer);
    assert.throws(() => unmapShared(buffer), { errno: constants.errno.EINVAL });
    assert.throws(() => unmapShared(moved), { errno: constants.errno.EINVAL });
    assert.equal(new Uint8Array(moved)[0], 1);
  } else {
    unmapShared(buffer);
  }
  closeFd(fd);
});

test("what is not within the file, or cannot be mapped so, is refused", () => {
  const fd = createMemfd("bounds", 8192);
  const refused = { code: "ERR_VIRTIO_ARGUMENT" };
  for (const length of [0, -4096, 0.5, 8193, 2 ** 33]) assert.throws(() => mapShared(fd, length), refused);
  assert.throws(() => mapShared(fd, 8192, { offset: 4096 }), /at most 4096/);
  assert.throws(() => mapShared(fd, 4096, { offset: 512 }), /multiple of 4096/);
  assert.throws(() => mapShared(fd, 4096, { align: 3 * 4096 }), /power of two/);
  assert.throws(() => mapShared(fd, 4096, { writable: 1 as unknown as boolean }), refused);
  assert.throws(() => mapShared(fd, 4096, { alignment: 4096 } as object), refused);
  assert.deepEqual(mappings("bounds"), []);
  closeFd(fd);
  assert.throws(() => mapShared(fd, 4096), { code: "ERR_VIRTIO_SYSCALL", errno: constants.errno.EBADF });
});

test("a file that is open for reading only maps read-only, and the error says so otherwise", () => {
  const folder = mkdtempSync(join(tmpdir(), "virtio-"));
  const path = join(folder, "file");
  writeFileSync(path, "x".repeat(4096));
  const fd = openSync(path, "r");
  assert.throws(() => mapShared(fd, 4096), { code: "ERR_VIRTIO_PERMISSION", errno: constants.errno.EACCES });
  const buffer = mapShared(fd, 4096, { writable: false });
  assert.equal(new Uint8Array(buffer)[4095], 0x78);
  unmapShared(buffer);
  closeFd(fd);
  rmSync(folder, { recursive: true });
});

test("a mapping that nobody holds is unmapped when it is collected", async () => {
  const fd = createMemfd("garbage", 4096);
  for (let i = 0; i < 8; i++) mapShared(fd, 4096);
  closeFd(fd);
  assert.ok(mappings("garbage").length > 0);
  const gone = await turnUntil(() => {
    collectGarbage();
    return mappings("garbage").length === 0;
  }, 50);
  assert.ok(gone, mappings("garbage").join("\n"));
});

test("an address that was unmapped and mapped anew is not unmapped a second time by the collector", async () => {
  const fd = createMemfd("anew", 4 * MIB);
  const kept: ArrayBuffer[] = [];
  for (let i = 0; i < 20; i++) {
    unmapShared(mapShared(fd, 4 * MIB));
    kept.push(mapShared(fd, 4 * MIB));
  }
  closeFd(fd);
  for (let i = 0; i < 10; i++) {
    collectGarbage();
    await turn();
  }
  for (const buffer of kept) new Uint8Array(buffer)[4 * MIB - 1] = 1;
  assert.equal(mappings("anew").length, kept.length);
  for (const buffer of kept) unmapShared(buffer);
  assert.deepEqual(mappings("anew"), []);
});

test("200 cycles leave no mapping", () => {
  const fd = createMemfd("cycles", 4 * MIB);
  for (let i = 0; i < 200; i++) {
    const buffer = mapShared(fd, 4 * MIB);
    new Uint8Array(buffer)[i] = i;
    unmapShared(buffer);
  }
  assert.deepEqual(mappings("cycles"), []);
  closeFd(fd);
});

test("the mappings of a worker end with it, unmapped before or not", { timeout: 30_000 }, async (t) => {
  const worker = new Worker(
    `const { parentPort } = require("node:worker_threads");
     import(${JSON.stringify(SYS)}).then(({ createMemfd, mapShared, unmapShared }) => {
       const fd = createMemfd("worker", 4096);
       globalThis.kept = [mapShared(fd, 4096), mapShared(fd, 4096)];
       unmapShared(mapShared(fd, 4096));
       parentPort.on("message", () => {});
       parentPort.postMessage(fd);
     });`,
    { eval: true },
  );
  t.after(() => worker.terminate());
  const fd = await new Promise<number>((resolve, reject) => {
    worker.once("message", resolve);
    worker.once("error", reject);
  });
  assert.equal(mappings("worker").length, 2);
  await worker.terminate();
  assert.deepEqual(mappings("worker"), []);
  closeFd(fd);
});

test("a process ends well with memory still mapped", () => {
  const child = runChild(`
    import { createMemfd, mapShared, unmapShared } from ${JSON.stringify(SYS)};
    const fd = createMemfd("exit", 4096);
    globalThis.kept = mapShared(fd, 4096);
    unmapShared(mapShared(fd, 4096));
    process.exitCode = 7;
  `);
  assert.equal(child.signal, null);
  assert.equal(child.status, 7, child.stderr);
});

test("the addon stays loaded when the worker that loaded it ends, and SIGBUS handled", { timeout: 30_000 }, () => {
  const child = runChild(`
    import { readFileSync } from "node:fs";
    import { Worker } from "node:worker_threads";
    const code = \`
      import { ftruncateSync } from "node:fs";
      import { closeFd, mapShared, isLost } from ${JSON.stringify(SYS)};
      import { native } from ${JSON.stringify(NATIVE)};
      const fd = native().memfdCreate("shrunk", 0);
      ftruncateSync(fd, 8192);
      const buffer = mapShared(fd, 8192, { guarded: true });
      ftruncateSync(fd, 0);
      console.log(new Uint8Array(buffer)[4096], isLost(buffer));
      closeFd(fd);
    \`;
    for (let i = 0; i < 2; i++) {
      const worker = new Worker(new URL("data:text/javascript," + encodeURIComponent(code)));
      await new Promise((resolve, reject) => worker.once("exit", resolve).once("error", reject));
      const addon = process.env.VIRTIO_NATIVE_PATH ?? "/prebuilds/";
      console.log(readFileSync("/proc/self/maps", "utf8").includes(addon));
    }
  `);
  assert.equal(child.stdout, "0 true\ntrue\n0 true\ntrue\n", child.stderr);
});
