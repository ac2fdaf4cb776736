/** Finds and loads the addon built from `native/*.c`, on first use, and types what it offers. */

import { existsSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { VirtioError } from "../errors.js";

/** A running watch; an opaque handle of the addon. */
export interface NativeWatch {
  readonly __opaque: unique symbol;
}

/** An eventfd that is looked after; an opaque handle of the addon. */
export interface NativeJam {
  readonly __opaqueJam: unique symbol;
}

/**
 * Reads or writes a file; `places` has pairs of offset and length in `memory`. With a callback it is done on another
 * thread: the callback has the result, and what is returned is 0, or `-errno` when it could not begin.
 */
export type NativeTransfer = (
  fd: number,
  memory: Uint8Array,
  places: Float64Array,
  count: number,
  position: number,
  flags: number,
  callback?: (result: number) => void,
) => number;

/** The functions of `native/*.c`. Each returns its value, or `-errno` when the kernel refused. */
export interface NativeBinding {
  memfdCreate(name: string, flags: number): number;
  ftruncate(fd: number, size: number): number;
  fcntl(fd: number, command: number, argument: number): number;
  fallocate(fd: number, mode: number, offset: number, length: number, callback?: (result: number) => void): number;
  preadv: NativeTransfer;
  pwritev: NativeTransfer;
  mmap(
    fd: number,
    length: number,
    span: number,
    offset: number,
    align: number,
    writable: boolean,
    granule: number,
  ): ArrayBuffer | number;
  munmap(buffer: ArrayBuffer): number;
  isLost(buffer: ArrayBuffer): number;
  faultCounter(): ArrayBuffer | number;
  eventfd(): number;
  signal(fd: number): number | undefined;
  drain(fd: number): number;
  jamWatch(event: number, report: number): NativeJam | number;
  jamEnd(jam: NativeJam): void;
  watch(fd: number, drains: boolean, writable: boolean, callback: () => void): NativeWatch | number;
  watchRef(watch: NativeWatch, keepsAlive: boolean): void;
  watchClose(watch: NativeWatch): void;
  connect(path: string): number;
  listen(path: string, backlog: number): number;
  accept(fd: number): number;
  socketpair(into: Int32Array): number;
  sendmsg(fd: number, bytes: Uint8Array, fds: Int32Array, count: number): number;
  recvmsg(fd: number, into: Uint8Array, fds: Int32Array): number;
  close(fd: number): number;
  ioctl(fd: number, request: number, argument: number | Uint8Array): number;
  address(buffer: ArrayBuffer): number;
  registerRead(bytes: Uint8Array, offset: number, width: number): number;
  registerWrite(bytes: Uint8Array, offset: number, width: number, value: number): number;
}

/** The package's root, seen from dist/src/sys/native.js. */
const root = fileURLToPath(new URL("../../../", import.meta.url));

let loaded: NativeBinding | undefined;

/**
 * The addon, loaded when it is first needed. `VIRTIO_NATIVE_PATH` names another file to load it from.
 *
 * @throws VirtioError ERR_VIRTIO_NATIVE_UNAVAILABLE when it was not built or does not load.
 */
export function native(): NativeBinding {
  loaded ??= load();
  return loaded;
}

function load(): NativeBinding {
  const path = process.env["VIRTIO_NATIVE_PATH"] ?? join(root, "prebuilds", `${process.platform}-${process.arch}.node`);
  const remedy =
    process.platform === "linux"
      ? `build it with: node ${join(root, "scripts", "build-native.mjs")}`
      : `devices can be reached on Linux only; layouts, rings and codecs work on ${process.platform}, too`;
  if (!existsSync(path)) throw unavailable(`the native part is missing (${path}); ${remedy}`);
  try {
    return createRequire(import.meta.url)(path) as NativeBinding;
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw unavailable(`the native part does not load (${reason}); ${remedy}`, cause);
  }
}

function unavailable(message: string, cause?: unknown): VirtioError {
  return new VirtioError("ERR_VIRTIO_NATIVE_UNAVAILABLE", message, cause === undefined ? {} : { cause });
}
