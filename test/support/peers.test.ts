/** The helper that starts the programs of the system tests: reasons to skip, failures to start, and the end. */

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { Daemon, requirePeer, TemporaryFolder } from "./peers.js";

/** A server that listens on the path in its argument, and tells nobody. */
const SERVER = 'require("net").createServer().listen(process.argv[1])';

test("a missing program is a reason to skip, or a failure where nothing may be skipped", (t) => {
  const before = process.env["VIRTIO_REQUIRE_PEERS"];
  t.after(() => {
    if (before === undefined) delete process.env["VIRTIO_REQUIRE_PEERS"];
    else process.env["VIRTIO_REQUIRE_PEERS"] = before;
  });
  delete process.env["VIRTIO_REQUIRE_PEERS"];
  assert.equal(requirePeer("sh"), false);
  assert.equal(requirePeer("sh", "no-such-program"), "no-such-program is not installed (no-such-program)");
  process.env["VIRTIO_REQUIRE_PEERS"] = "1";
  assert.equal(requirePeer("sh"), false);
  assert.throws(() => requirePeer("no-such-program"), /VIRTIO_REQUIRE_PEERS=1, but no-such-program/);
});

test("a program that ends instead of listening fails with its output", async (t) => {
  const folder = new TemporaryFolder();
  t.after(() => folder.close());
  await assert.rejects(Daemon.start(folder.file("s"), "sh", ["-c", "echo why >&2; exit 3"]), /sh has ended:\nwhy/);
  await assert.rejects(Daemon.start(folder.file("s"), "no-such-program", []), /no-such-program has ended/);
});

test("a program listens when start returns, and is gone when stop does", async (t) => {
  const folder = new TemporaryFolder();
  t.after(() => folder.close());
  const daemon = await Daemon.start(folder.file("s"), process.execPath, ["-e", SERVER, folder.file("s")]);
  assert.match(readFileSync(`/proc/${daemon.pid}/cmdline`, "utf8"), /createServer/);
  await daemon.stop();
  assert.throws(() => process.kill(daemon.pid, 0), { code: "ESRCH" });
  await daemon.stop();
});

test("a program does not outlive the process that started it, even when that is killed", async (t) => {
  const folder = new TemporaryFolder();
  t.after(() => folder.close());
  const program = `import { Daemon } from ${JSON.stringify(new URL("./peers.js", import.meta.url).href)};
    const daemon = await Daemon.start(process.argv[1], process.execPath, ["-e", ${JSON.stringify(SERVER)}, process.argv[1]]);
    console.log(daemon.pid);`;
  const parent = spawn(process.execPath, ["--input-type=module", "-e", program, folder.file("s")], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  const [chunk] = (await once(parent.stdout, "data")) as [Buffer];
  const pid = Number(chunk.toString());
  assert.match(readFileSync(`/proc/${pid}/cmdline`, "utf8"), /createServer/);
  parent.kill("SIGKILL");
  await once(parent, "close");
  while (isAlive(pid)) await new Promise((resolve) => setImmediate(resolve));
});

/** Whether a process runs; one that nobody has waited for yet does not. */
function isAlive(pid: number): boolean {
  try {
    return !/^State:\s+Z/m.test(readFileSync(`/proc/${pid}/status`, "utf8"));
  } catch {
    return false;
  }
}
