/** A back-end in a process of its own that tries to take away the memory it is given, and says how that went. */

import { ftruncateSync } from "node:fs";
import { native } from "../../src/sys/native.js";
import { ScriptedPeer } from "./scripted-peer.js";

const F_ADD_SEALS = 1033;
const F_SEAL_WRITE = 0x8;

function attempt(what: string, deed: () => number): void {
  let outcome: string;
  try {
    const result = deed();
    outcome = result < 0 ? `refused ${-result}` : "done";
  } catch (error) {
    outcome = error instanceof Error && "errno" in error ? `refused ${-Number(error.errno)}` : String(error);
  }
  console.log(`${what}: ${outcome}`);
}

const peer = new ScriptedPeer({
  misbehave({ name, fds: [fd] }) {
    if (name !== "ADD_MEM_REG" && name !== "SET_MEM_TABLE") return undefined;
    for (const size of [0, 4096, 2 ** 30]) attempt(`ftruncate to ${size}`, () => (ftruncateSync(fd, size), 0));
    attempt("sealing against writes", () => native().fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE));
    return undefined;
  },
});
process.stdin.on("end", () => peer.close()).resume();
console.log(`listening: ${peer.path}`);
