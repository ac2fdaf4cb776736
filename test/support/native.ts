/** A layer between the package and its addon, in which a test counts, fails or answers system calls. */

import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import type { NativeBinding } from "../../src/sys/native.js";

/** The root of the package, seen from dist/test/support. */
const ROOT = fileURLToPath(new URL("../../../", import.meta.url));
const LAYER = Symbol.for("virtio-driver.test.layer");

/**
 * Put a layer over the addon of this process. Call it before anything makes a system call: the addon is loaded at the
 * first one. Children must be given an environment without VIRTIO_NATIVE_PATH.
 *
 * @param replace returns the functions that stand in front of the addon's own.
 * @returns the addon itself.
 */
export function layerNative(replace: (addon: NativeBinding) => Partial<NativeBinding>): NativeBinding {
  const path = process.env["VIRTIO_NATIVE_PATH"] ?? join(ROOT, "prebuilds", `${process.platform}-${process.arch}.node`);
  const addon = createRequire(import.meta.url)(path) as NativeBinding;
  Reflect.set(globalThis, LAYER, { ...addon, ...replace(addon) });
  const folder = mkdtempSync(join(tmpdir(), "virtio-"));
  process.once("exit", () => rmSync(folder, { recursive: true }));
  const layer = join(folder, "layer.cjs");
  writeFileSync(layer, `module.exports = globalThis[Symbol.for(${JSON.stringify(LAYER.description)})];\n`);
  process.env["VIRTIO_NATIVE_PATH"] = layer;
  return addon;
}
