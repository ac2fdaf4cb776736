/** A front-end that makes notifications wait: the server is let go, ends that connection, and serves the next client. */

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { writeSync } from "node:fs";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { test } from "node:test";
import { BlkRequestType } from "../../src/protocol/index.js";
import { native } from "../../src/sys/native.js";
import { FrontEnd, soon } from "./front-end.js";
import { folderFor } from "./support.js";

const F_SETFL = 4;
const O_RDWR = 2;
const BACKEND = new URL("../../src/backend/index.js", import.meta.url).href;

/** A server that says what it complains about. */
const SERVER = `
  import { RamStorage, VhostUserBackend } from ${JSON.stringify(BACKEND)};
  const onError = (error) => console.log(error.code + " " + error.message);
  VhostUserBackend.listen({ path: process.argv[1], storage: new RamStorage(1 << 20), onError });
  console.log("listening");
`;

test("a front-end that clears O_NONBLOCK and fills the counter of a notification holds the server up for a moment only", async (t) => {
  const path = join(folderFor(t), "disk.sock");
  const server = spawn(process.execPath, ["--input-type=module", "-e", SERVER, path], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  t.after(() => server.kill("SIGKILL"));
  const lines = createInterface({ input: server.stdout })[Symbol.asyncIterator]();
  const said = async (): Promise<string> => String((await soon(lines.next(), "a word of the server")).value);
  assert.equal(await said(), "listening");
  const front = new FrontEnd(path);
  t.after(() => front.close());
  const ring = await front.start();
  assert.equal((await ring.read(0n, 512)).status, 0);
  const { fd } = ring.call;
  assert.equal(native().fcntl(fd, F_SETFL, O_RDWR), 0);
  ring.call.drain();
  writeSync(fd, new BigUint64Array([2n ** 64n - 2n]));
  ring.request(BlkRequestType.IN, 0n, { into: 512 });
  ring.kick.signal();
  await front.hungUp();
  assert.match(await said(), /^ERR_VIRTIO_PROTOCOL the front-end fills the counter of a notification/);
  const next = new FrontEnd(path);
  t.after(() => next.close());
  assert.equal((await (await next.start()).read(0n, 512)).status, 0);
  server.kill();
  await once(server, "exit");
});
