/** A back-end that makes notifications wait: the driver is let go, and drops it. */

import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { rmSync } from "node:fs";
import { dirname, join } from "node:path";
import { createInterface } from "node:readline";
import test from "node:test";

const TRANSPORTS = new URL("../../../src/transports/index.js", import.meta.url).href;
const SUPPORT = new URL("../support.js", import.meta.url).href;

/** A driver that starts a queue, which notifies it. */
const DRIVER = `
  import { VhostUser } from ${JSON.stringify(TRANSPORTS)};
  import { place } from ${JSON.stringify(SUPPORT)};
  const device = await VhostUser.connect(process.argv[1]);
  const alive = setInterval(() => {}, 1000); // a connection that nobody waits for does not keep the process
  const lost = new Promise((resolve) => (device.onLost = resolve));
  await device.negotiate(0n);
  const region = await device.mapMemory(1);
  const [queue] = await device.startQueues([place(region, 0, 8)]).catch(() => []);
  queue?.notify(0);
  const { code, message } = await lost;
  await device.close();
  clearInterval(alive);
  console.log(code, message);
`;

function killed(t: { after(end: () => void): void }, child: ChildProcess): void {
  t.after(() => child.kill("SIGKILL"));
}

test("a back-end that clears O_NONBLOCK and fills the counter of a notification holds the driver up for a moment only", async (t) => {
  const peer = spawn(process.execPath, [join(import.meta.dirname, "..", "jamming-peer.js")], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  killed(t, peer);
  const lines = createInterface({ input: peer.stdout })[Symbol.asyncIterator]();
  const path = String((await lines.next()).value);
  t.after(() => rmSync(dirname(path), { recursive: true, force: true }));
  const driver = spawn(process.execPath, ["--input-type=module", "-e", DRIVER, path], {
    stdio: ["ignore", "pipe", "inherit"],
    timeout: 60_000,
    killSignal: "SIGKILL",
  });
  killed(t, driver);
  const said = createInterface({ input: driver.stdout })[Symbol.asyncIterator]();
  assert.equal((await lines.next()).value, "jammed");
  const outcome = String((await said.next()).value);
  assert.match(
    outcome,
    /^ERR_VIRTIO_PROTOCOL the back-end at .* fills the counter of a notification, which makes us wait/,
  );
  assert.deepEqual(await once(driver, "exit"), [0, null]);
});
