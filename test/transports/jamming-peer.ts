/**
 * A back-end in a process of its own that makes whoever notifies it wait: it clears O_NONBLOCK of the eventfd that it is
 * given, fills the counter, and has threads that fill it again whenever it is emptied.
 */

import { writeSync } from "node:fs";
import process from "node:process";
import { Worker } from "node:worker_threads";
import { native } from "../../src/sys/native.js";
import { ScriptedPeer } from "./scripted-peer.js";

const F_SETFL = 4;
const O_RDWR = 2;
const THREADS = 4;
const FILLING = `
  const { writeSync } = require("node:fs");
  const { workerData } = require("node:worker_threads");
  for (;;) writeSync(workerData, new BigUint64Array([2n ** 64n - 2n]));
`;

const fillers: Worker[] = [];
const peer = new ScriptedPeer({
  misbehave({ name, fds: [fd] }) {
    if (name !== "SET_VRING_KICK") return undefined;
    if (native().fcntl(fd, F_SETFL, O_RDWR) !== 0) throw new Error("fcntl");
    writeSync(fd, new BigUint64Array([2n ** 64n - 2n]));
    for (let i = 0; i < THREADS; i++) fillers.push(new Worker(FILLING, { eval: true, workerData: fd }));
    process.stdout.write("jammed\n");
    return undefined;
  },
});
process.stdout.write(`${peer.path}\n`);
