/** Nothing stays behind when a call fails in the child process of a back-end: no process, no folder, no descriptor. */

import assert from "node:assert/strict";
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { constants } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { after, test } from "node:test";
import { fileURLToPath } from "node:url";
import { openBlock } from "../../src/address.js";
import { VirtioError } from "../../src/errors.js";
import { native } from "../../src/sys/native.js";
import { turnUntil } from "../sys/helpers.js";
import { TIMEOUT, workFolder } from "./embedded.js";
import { held } from "./held.js";

const { EIO, EMFILE } = constants.errno;
const folder = workFolder();
after(() => folder.remove());
const temp = join(folder.path, "tmp");
mkdirSync(temp);
const reached = join(folder.path, "reached");
const layer = join(folder.path, "layer.cjs");
const addon =
  process.env["VIRTIO_NATIVE_PATH"] ??
  fileURLToPath(new URL(`../../../prebuilds/${process.platform}-${process.arch}.node`, import.meta.url));
native(); // this process has it as it is

/** The addon of the child: call number VIRTIO_REFUSED is refused, and a file tells that it was made. */
writeFileSync(
  layer,
  `const addon = require(${JSON.stringify(addon)});
   const refused = Number(process.env.VIRTIO_REFUSED);
   const makes = new Set(["memfdCreate", "eventfd", "watch", "listen", "accept", "socketpair", "mmap", "fcntl"]);
   const does = new Set([...makes, "sendmsg", "recvmsg", "preadv", "pwritev", "ftruncate"]);
   let count = 0;
   for (const [name, real] of Object.entries(addon)) {
     if (!does.has(name)) continue;
     exports[name] = (...words) => {
       if (count++ !== refused) return real(...words);
       require("node:fs").writeFileSync(${JSON.stringify(reached)}, name);
       return makes.has(name) ? -${EMFILE} : -${EIO};
     };
   }
   module.exports = { ...addon, ...exports };`,
);

function children(): string[] {
  return readdirSync("/proc/self/task").flatMap((task) =>
    readFileSync(`/proc/self/task/${task}/children`, "utf8")
      .split(" ")
      .filter((pid) => pid !== ""),
  );
}

/** What there is of processes, descriptors and folders. */
function present(): string[] {
  return [...held(), ...children().map((pid) => `process ${pid}`), ...readdirSync(temp)];
}

/** Open a disk of a child, use and close it; with call `refused` of the child refused. */
async function run(refused: number): Promise<unknown> {
  const ours = process.env;
  process.env = { ...ours, VIRTIO_NATIVE_PATH: layer, VIRTIO_REFUSED: String(refused), TMPDIR: temp };
  const opening = openBlock("ram:1M", { timeout: TIMEOUT, mode: "event" });
  process.env = ours; // the child is started by now
  try {
    const disk = await opening;
    try {
      await disk.write(new Uint8Array(512));
    } finally {
      await disk.close();
    }
    return undefined;
  } catch (error) {
    return error;
  }
}

test("every call of a child refused in turn leaves no process, folder or descriptor", async () => {
  assert.equal(await run(-1), undefined);
  const before = present();
  for (let at = 0; ; at++) {
    rmSync(reached, { force: true });
    const error = await run(at);
    const what = `call ${at} of the child refused: ${String(error)}`;
    if (error !== undefined && !(error instanceof VirtioError)) throw new Error(what, { cause: error });
    await turnUntil(() => present().join() === before.join(), 1000);
    assert.deepEqual(present(), before, what);
    if (existsSync(reached)) continue;
    assert.equal(error, undefined, what);
    assert.ok(at > 30, `${at} calls`);
    return;
  }
});
