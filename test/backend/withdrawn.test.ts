/** Memory that a front-end takes away while the back-end uses it: SIGBUS kills nobody here. */

import assert from "node:assert/strict";
import { spawn, spawnSync } from "node:child_process";
import { ftruncateSync, openSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, it, type TestContext } from "node:test";
import { fileURLToPath } from "node:url";
import { type BlockStorage, FileStorage, RamStorage } from "../../src/backend/index.js";
import { closeFd, createMemfd, faultCounter, isLost, mapShared, unmapShared } from "../../src/sys/index.js";
import { soon } from "./front-end.js";
import { backendFor, folderFor, frontEndFor, mappings, openFds, until } from "./support.js";

const KINDS = {
  memory: () => new RamStorage(1024 * 1024),
  file: (t: TestContext) => {
    const path = join(folderFor(t), "disk.img");
    writeFileSync(path, new Uint8Array(1024 * 1024));
    return FileStorage.open(path);
  },
  slow: (): BlockStorage => ({
    capacity: 1024 * 1024,
    read: async (_offset, into) => {
      await new Promise((resolve) => setImmediate(resolve));
      into.fill(1);
    },
    write: async (_offset, from) => {
      await new Promise((resolve) => setImmediate(resolve));
      from.slice();
    },
    flush: () => undefined,
  }),
};

describe("memory that is truncated under load", () => {
  for (const format of ["split", "packed"] as const) {
    for (const what of ["memory", "data", "inflight"] as const) {
      for (const kind of ["memory", "file", "slow"] as const) {
        it(`${format} ring, ${what} gone, disk of kind "${kind}": the connection ends, the next client is served`, async (t) => {
          const { backend, errors } = backendFor(t, KINDS[kind](t));
          const before = { fds: openFds(), maps: mappings() };
          const program = fileURLToPath(new URL("./withdrawing-front-end.js", import.meta.url));
          const child = spawn(process.execPath, [program, backend.path, format, what], {
            stdio: ["ignore", "ignore", "inherit"],
          });
          t.after(() => child.kill("SIGKILL"));
          const ended = new Promise<number | string | null>((resolve) => {
            child.once("exit", (code, signal) => resolve(signal ?? code));
          });
          assert.equal(await soon(ended, "the end of the front-end"), 0);
          await until(() => errors.some((error) => /took memory away/.test(error.message)));
          const next = frontEndFor(t, backend);
          assert.equal((await (await next.start(0n)).read(0n, 512)).status, 0);
          next.close();
          await until(() => openFds() <= before.fds && mappings() <= before.maps + 1);
        });
      }
    }
  }
});

describe("guarded mappings", () => {
  const file = (bytes: number): number => {
    const path = `/dev/shm/virtio-test-${process.pid}.guard`;
    const fd = openSync(path, "w+");
    rmSync(path);
    ftruncateSync(fd, bytes);
    return fd;
  };

  it("read as zeroes and take writes where their file ends, and say so; others stay as they are", () => {
    const faults = faultCounter();
    const before = faults[0];
    const [fd, other] = [file(16384), file(4096)];
    const [buffer, kept] = [mapShared(fd, 16384, { guarded: true }), mapShared(other, 4096, { guarded: true })];
    const bytes = new Uint8Array(buffer).fill(7);
    ftruncateSync(fd, 8192);
    assert.deepEqual([bytes[0], bytes[8191], isLost(buffer), faults[0]], [7, 7, false, before]);
    assert.deepEqual([bytes[12288], isLost(buffer), isLost(kept), faults[0]], [0, true, false, before + 1]);
    bytes.fill(9);
    assert.deepEqual([bytes[0], bytes[16383], faults[0]], [9, 9, before + 2]);
    unmapShared(buffer);
    unmapShared(kept);
    closeFd(fd);
    closeFd(other);
    assert.equal(isLost(kept), false);
  });

  it("can come and go", () => {
    const fd = createMemfd("test-guard", 4096);
    for (let i = 0; i < 10_000; i++) unmapShared(mapShared(fd, 4096, { guarded: true }));
    closeFd(fd);
  });

  for (const [name, code] of [
    [
      "an access to a mapping that is not guarded",
      "new Uint8Array(mapShared(fd, 4096))[0] = (ftruncateSync(fd, 0), 1);",
    ],
    ["a SIGBUS that somebody sent", 'process.kill(process.pid, "SIGBUS"); setTimeout(() => undefined, 5000);'],
  ] as const) {
    it(`${name} still ends the process`, () => {
      const sys = new URL("../../src/sys/index.js", import.meta.url).href;
      const program = `
        import { ftruncateSync, openSync, rmSync } from "node:fs";
        import { mapShared } from ${JSON.stringify(sys)};
        const open = (name) => { const fd = openSync(name, "w+"); rmSync(name); ftruncateSync(fd, 4096); return fd; };
        const guarded = mapShared(open("/dev/shm/virtio-guard-" + process.pid), 4096, { guarded: true });
        const fd = open("/dev/shm/virtio-plain-" + process.pid);
        ${code}
        console.log(guarded.byteLength);`;
      const run = spawnSync(process.execPath, ["--input-type=module", "-e", program], {
        // A sanitizer would report the fault that is wanted here.
        env: { ...process.env, ASAN_OPTIONS: "detect_leaks=0:handle_sigbus=0" },
      });
      assert.equal(run.signal, "SIGBUS");
    });
  }
});
