/** Memory that was handed out cannot be taken away from under us. */

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { constants } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import test from "node:test";
import { VhostUser } from "../../../src/transports/index.js";
import { ALL_PROTOCOL, MEM_SLOTS } from "../scripted-peer.js";

test("a back-end that truncates the memory it was given is refused by the kernel, and the driver lives on", async (t) => {
  assert.notEqual(ALL_PROTOCOL & MEM_SLOTS, 0n);
  const backend = spawn(process.execPath, [join(import.meta.dirname, "..", "truncating-peer.js")], {
    stdio: ["pipe", "pipe", "inherit"],
  });
  t.after(() => backend.kill());
  const lines = createInterface({ input: backend.stdout })[Symbol.asyncIterator]();
  const next = async (): Promise<readonly [what: string, outcome: string]> => {
    const line: unknown = (await lines.next()).value;
    if (typeof line !== "string") throw new Error("the back-end said no more");
    const at = line.indexOf(": ");
    return [line.slice(0, at), line.slice(at + 2)];
  };
  const [, path] = await next();
  const device = await VhostUser.connect(path);
  await device.negotiate(0n);
  const region = await device.mapMemory(2 ** 21);
  for (let tries = 0; tries < 4; tries++) {
    const [what, outcome] = await next();
    assert.equal(outcome, `refused ${constants.errno.EPERM}`, what);
  }
  // Every page is there: an access beyond the end of a file would be the end of this process (SIGBUS).
  const bytes = new Uint8Array(region.buffer);
  for (let at = 0; at < bytes.length; at += 4096) bytes[at]++;
  assert.equal(
    bytes.reduce((sum, byte) => sum + byte, 0),
    bytes.length / 4096,
  );
  await device.unmapMemory(region);
  await device.close();
  backend.stdin.end();
  assert.deepEqual(await once(backend, "exit"), [0, null]);
});
