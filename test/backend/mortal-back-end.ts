/**
 * A back-end in a process of its own that kills itself at a write: `mortal-back-end.js SOCKET IMAGE WRITES HOLD`. It
 * dies at the given write, before it is done; every HOLDth write is begun and never finished (0: none is).
 */

import { closeSync, fdatasyncSync, fstatSync, openSync, readSync, writeSync } from "node:fs";
import { type BlockStorage, VhostUserBackend } from "../../src/backend/index.js";

const [path, image, last, hold] = process.argv.slice(2);
const file = openSync(image, "r+");
let writes = 0;

const storage: BlockStorage = {
  capacity: fstatSync(file).size,
  read: (offset, into) => void readSync(file, into, 0, into.length, offset),
  write: (offset, from) => {
    writes++;
    if (writes === Number(last)) process.kill(process.pid, "SIGKILL");
    writeSync(file, from, 0, from.length, offset);
    return Number(hold) > 0 && writes % Number(hold) === 0 ? new Promise(() => undefined) : undefined;
  },
  flush: () => fdatasyncSync(file),
  // Not to be used, but offered: a front-end finds the features of the back-end before in the next one.
  discard: () => undefined,
  writeZeroes: (offset, length) => void writeSync(file, new Uint8Array(length), 0, length, offset),
  close: () => closeSync(file),
};

VhostUserBackend.listen({ path, storage });
process.stdout.write("listening\n");
