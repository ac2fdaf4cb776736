/** The embedded back-end in a child process: its start, its end, and the end of its parent. */

import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { closeSync, existsSync, ftruncateSync, openSync, readdirSync, readFileSync, statSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { describe, it, type TestContext } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { spawnBackend } from "../../src/backend/index.js";
import { BlkFeature, BlkRequestType } from "../../src/protocol/index.js";
import { FrontEnd, soon } from "./front-end.js";
import { folderFor, pattern } from "./support.js";

const MIB = 1024 * 1024;
const MODULE = new URL("../../src/backend/index.js", import.meta.url).href;

/** Whether the process is there and no zombie. */
function isAlive(pid: number): boolean {
  try {
    return !/^\d+ \(.*\) [ZX]/s.test(readFileSync(`/proc/${pid}/stat`, "utf8"));
  } catch {
    return false;
  }
}

/** Wait until `condition` holds; processes give no event when they are not one's own. */
async function until(condition: () => boolean, what: string): Promise<void> {
  for (let i = 0; i < 1000 && !condition(); i++) await sleep(10);
  assert.ok(condition(), what);
}

function imageFor(t: TestContext): string {
  const path = join(folderFor(t), "disk.img");
  const fd = openSync(path, "w");
  ftruncateSync(fd, MIB);
  closeSync(fd);
  return path;
}

/** Another process that runs `script`, and the first line that it prints. */
async function scriptFor(
  t: TestContext,
  script: string,
  temp = tmpdir(),
): Promise<{ child: ChildProcess; line: string }> {
  const child = spawn(process.execPath, ["--input-type=module", "-e", script], {
    stdio: ["ignore", "pipe", "ignore"],
    env: { ...process.env, TMPDIR: temp },
  });
  t.after(() => child.kill("SIGKILL"));
  assert.ok(child.stdout !== null);
  const [chunk] = (await soon(once(child.stdout, "data"), "a line of the script")) as [Buffer];
  return { child, line: chunk.toString().trim() };
}

describe("spawnBackend", () => {
  it("serves a disk in memory from a folder of its own, until it is closed", async () => {
    const backend = await spawnBackend({ kind: "ram", size: MIB }, { queues: 2, packed: false, blockSize: 4096 });
    assert.equal(statSync(dirname(backend.path)).mode & 0o777, 0o700);
    assert.ok(isAlive(backend.pid));
    const front = new FrontEnd(backend.path);
    const ring = await front.start(BlkFeature.FLUSH | BlkFeature.CONFIG_WCE);
    await ring.write(0n, pattern(4096));
    assert.deepEqual((await ring.read(0n, 4096)).data, pattern(4096));
    const offered = await front.askU64(1);
    assert.equal(offered & (1n << 34n), 0n);
    front.close();
    await Promise.all([backend.close(), backend.close()]);
    assert.equal(isAlive(backend.pid), false);
    assert.equal(existsSync(dirname(backend.path)), false);
  });

  it("serves a file, and what was written is there after close", async (t) => {
    const path = imageFor(t);
    const backend = await spawnBackend({ kind: "file", path });
    const front = new FrontEnd(backend.path);
    const ring = await front.start(BlkFeature.FLUSH | BlkFeature.CONFIG_WCE);
    assert.equal((await ring.write(8n, pattern(8192))).status, 0);
    assert.equal((await ring.run(BlkRequestType.FLUSH, 0n)).status, 0);
    assert.deepEqual((await ring.read(8n, 8192)).data, pattern(8192));
    await backend.close();
    front.close();
    assert.deepEqual(new Uint8Array(readFileSync(path).subarray(4096, 4096 + 8192)), pattern(8192));
  });

  it("tells why it does not start, and leaves nothing", async (t) => {
    const folder = folderFor(t);
    const before = process.env["TMPDIR"];
    process.env["TMPDIR"] = folder;
    t.after(() => {
      if (before === undefined) delete process.env["TMPDIR"];
      else process.env["TMPDIR"] = before;
    });
    const missing = { kind: "file", path: join(folder, "none") } as const;
    await assert.rejects(spawnBackend(missing), {
      code: "ERR_VIRTIO_BACKEND",
      errno: 2,
      message: /did not start.*no such file/,
    });
    await assert.rejects(spawnBackend({ kind: "ram", size: 100 }), {
      code: "ERR_VIRTIO_BACKEND",
      message: /multiple of 512|from 512/,
    });
    await assert.rejects(spawnBackend({ kind: "ram", size: MIB }, { queues: 0 }), { code: "ERR_VIRTIO_BACKEND" });
    await assert.rejects(spawnBackend({ kind: "ram", size: MIB }, { Queues: 1 } as object), { name: "TypeError" });
    assert.deepEqual(readdirSync(folder), []);
  });

  it("close says so when the process has ended by itself, and the folder is gone", async () => {
    const backend = await spawnBackend({ kind: "ram", size: MIB });
    process.kill(backend.pid, "SIGKILL");
    await until(() => !isAlive(backend.pid), "the child is killed");
    await assert.rejects(backend.close(), { code: "ERR_VIRTIO_BACKEND", message: /SIGKILL; writes may be lost/ });
    await until(() => !existsSync(dirname(backend.path)), "the folder is removed by the parent");
  });

  it("ends at once on SIGTERM, and not on the SIGINT of a terminal", async () => {
    const backend = await spawnBackend({ kind: "ram", size: MIB });
    process.kill(backend.pid, "SIGINT");
    const front = new FrontEnd(backend.path);
    assert.equal((await (await front.start()).read(0n, 512)).status, 0);
    front.close();
    process.kill(backend.pid, "SIGTERM");
    await until(() => !isAlive(backend.pid), "SIGTERM ends it");
    await until(() => !existsSync(dirname(backend.path)), "the folder is removed");
    await backend.close(); // it has flushed
  });

  const ends = [
    ["is killed", "SIGKILL", "setInterval(() => 0, 1000);"],
    ["is interrupted", "SIGINT", "setInterval(() => 0, 1000);"],
    ["exits without close", undefined, "setTimeout(() => process.exit(3), 100);"],
    ["throws", undefined, "setTimeout(() => { throw new Error('on purpose') }, 100);"],
    ["has nothing more to do", undefined, ""],
  ] as const;
  for (const [name, signal, rest] of ends) {
    it(`does not outlive a parent that ${name}, and removes its folder`, async (t) => {
      const folder = folderFor(t);
      const script = `
        import { spawnBackend } from ${JSON.stringify(MODULE)};
        const backend = await spawnBackend({ kind: "ram", size: ${MIB} });
        console.log(JSON.stringify(backend));
        ${rest}`;
      const { child, line } = await scriptFor(t, script, folder);
      const { pid, path } = JSON.parse(line) as { pid: number; path: string };
      if (signal !== undefined) child.kill(signal);
      await until(() => !isAlive(child.pid ?? 0), "the parent ends");
      await until(() => !isAlive(pid), "the child ends");
      assert.equal(existsSync(path), false);
      assert.deepEqual(readdirSync(folder), []);
    });
  }
});

describe("a back-end without descriptors left", () => {
  it("tells it, and accepts its client when there are some again", async (t) => {
    const socket = join(folderFor(t), "disk.sock");
    // The limit is that of the shell that starts the script.
    const script = `
      import { closeSync, openSync } from "node:fs";
      import { RamStorage, VhostUserBackend } from ${JSON.stringify(MODULE)};
      const storage = new RamStorage(${MIB});
      let fds = [];
      const onError = (error) => {
        console.log(error.message);
        for (const fd of fds.splice(0)) closeSync(fd);
      };
      VhostUserBackend.listen({ path: ${JSON.stringify(socket)}, storage, onError });
      try {
        for (;;) fds.push(openSync("/dev/null"));
      } catch {
        console.log("full");
      }`;
    const child = spawn(
      "sh",
      ["-c", `ulimit -n 100 && exec "$0" --input-type=module -e "$1"`, process.execPath, script],
      {
        stdio: ["ignore", "pipe", "ignore"],
      },
    );
    t.after(() => child.kill("SIGKILL"));
    assert.ok(child.stdout !== null);
    const { stdout } = child;
    const said = async (what: string): Promise<string> =>
      String(((await soon(once(stdout, "data"), what)) as [Buffer])[0]).trim();
    assert.equal(await said("the script"), "full");
    const failure = said("the failure");
    const front = new FrontEnd(socket);
    t.after(() => front.close());
    assert.match(await failure, /EMFILE/);
    assert.equal((await (await front.start()).read(0n, 512)).status, 0);
  });
});

describe("serveUntilSignal", () => {
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    it(`VHU-BE-34 ends on ${signal} with the data flushed and the socket removed`, async (t) => {
      const path = imageFor(t);
      const socket = `${path}.sock`;
      const script = `
        import { openStorage, serveUntilSignal, VhostUserBackend } from ${JSON.stringify(MODULE)};
        const storage = openStorage({ kind: "file", path: ${JSON.stringify(path)} });
        const backend = VhostUserBackend.listen({ path: ${JSON.stringify(socket)}, storage });
        console.log("ready");
        console.log(await serveUntilSignal(backend));`;
      const { child, line } = await scriptFor(t, script);
      assert.equal(line, "ready");
      const front = new FrontEnd(socket);
      const ring = await front.start(BlkFeature.FLUSH | BlkFeature.CONFIG_WCE);
      await ring.write(0n, pattern(512));
      assert.ok(child.stdout !== null);
      const said = once(child.stdout, "data") as Promise<[Buffer]>;
      child.kill(signal);
      assert.equal((await soon(said, "the end"))[0].toString().trim(), signal);
      await soon(once(child, "exit"), "the exit");
      assert.equal(child.exitCode, 0);
      assert.equal(existsSync(socket), false);
      assert.deepEqual(new Uint8Array(readFileSync(path).subarray(0, 512)), pattern(512));
      front.close();
    });
  }
});
