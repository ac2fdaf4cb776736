/** Orders a fault of the addon, by number: which of the calls from now on is refused, and with what. */

import fs from "node:fs";
import { syncBuiltinESMExports } from "node:module";
import process from "node:process";
import { native, type NativeBinding } from "../../../src/sys/native.js";
import { IOTLB_MESSAGE_SIZE } from "../../../src/protocol/index.js";
import { layerNative } from "../../support/native.js";

/** The calls by which descriptors and mappings are made, and devices are asked. */
const CALLS = [
  "ioctl",
  "mmap",
  "eventfd",
  "memfdCreate",
  "ftruncate",
  "watch",
] as const satisfies readonly (keyof NativeBinding)[];

let calls: string[] = [];
let failAt = -1;
let errno = 0;

/** Count a call; whether it is the one that is to fail. */
function isRefused(name: string): boolean {
  calls.push(name);
  return calls.length - 1 === failAt;
}

/** Have the addon loaded with the means to refuse. Before anything else uses it; children and workers have it as it is. */
export function useFailingNative(): void {
  layerNative((addon) => {
    const layer: Partial<NativeBinding> = {};
    for (const name of CALLS) {
      const real: unknown = addon[name];
      if (typeof real !== "function") throw new Error(`the addon has no ${name}`);
      const call = (...words: unknown[]): unknown => (isRefused(name) ? -errno : Reflect.apply(real, addon, words));
      Object.assign(layer, { [name]: call });
    }
    return layer;
  });
  native();
  delete process.env["VIRTIO_NATIVE_PATH"];
  // Memory is made known by write(2), by messages of a size that nothing else here writes at once.
  const { writeSync } = fs;
  const write = (...words: unknown[]): unknown => {
    const [, bytes] = words;
    if (bytes instanceof Uint8Array && bytes.length === IOTLB_MESSAGE_SIZE && isRefused("write")) {
      throw Object.assign(new Error("ordered"), { errno: -errno, code: "EORDERED", syscall: "write" });
    }
    return Reflect.apply(writeSync, fs, words);
  };
  Object.assign(fs, { writeSync: write });
  syncBuiltinESMExports();
}

/** Refuse call `at` from now on; none when it is negative. */
export function orderFault(at: number, code: number): void {
  calls = [];
  failAt = at;
  errno = code;
}

/** Names of the calls since the last order. */
export function callsMade(): readonly string[] {
  return calls;
}
