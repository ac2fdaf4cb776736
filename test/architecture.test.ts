/** Tests of the house itself: who may import whom, no circles, small files that say what lives in them. */

import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { join, posix } from "node:path";
import { test } from "node:test";
import { fileURLToPath } from "node:url";

const SRC = fileURLToPath(new URL("../../src/", import.meta.url));
const MAX_LINES = 600;

const PURE = ["errors", "size"];
const DRIVER_FLOORS = [...PURE, "diagnostics", "sys", "memory", "virtqueue", "protocol"];

/** What each room may import beside itself; a lower floor never imports a higher one. */
const MAY_IMPORT: Readonly<Record<string, readonly string[]>> = {
  errors: [],
  size: ["errors"],
  diagnostics: ["errors"],
  sys: PURE,
  memory: [...PURE, "sys"],
  virtqueue: PURE,
  protocol: PURE,
  transports: DRIVER_FLOORS,
  // A device class never knows how the device is reached: it sees the interface, no transport.
  devices: [...DRIVER_FLOORS, "transports/transport.ts"],
  // Both sides meet only on the wire.
  backend: DRIVER_FLOORS,
  // A fake takes the place of a kernel or a device at the seam of its transport.
  testing: [
    ...DRIVER_FLOORS,
    "transports/transport.ts",
    "transports/vhost-vdpa/node.ts",
    "transports/pci/function.ts",
    "backend",
  ],
  address: [...DRIVER_FLOORS, "transports", "devices", "backend"],
  index: [...DRIVER_FLOORS, "transports", "devices", "backend", "address"],
  cli: [...DRIVER_FLOORS, "transports", "devices", "backend", "address", "index"],
};

/** Rooms that run in a browser: no Node module, no global of Node. */
const BROWSER_ROOMS = ["errors", "size", "virtqueue", "protocol"];

interface Import {
  readonly specifier: string;
  /** Path below src of what is imported; undefined for packages. */
  readonly target: string | undefined;
}

const files = readdirSync(SRC, { recursive: true, encoding: "utf8" })
  .map((name) => name.replaceAll("\\", "/"))
  .filter((name) => name.endsWith(".ts"))
  .sort();
const texts = new Map(files.map((file) => [file, readFileSync(join(SRC, file), "utf8")]));
const imports = new Map(files.map((file) => [file, importsOf(file)]));

for (const file of files) {
  test(`src/${file} imports lower floors only`, () => {
    const allowed = MAY_IMPORT[roomOf(file)];
    assert.ok(allowed !== undefined, `"${roomOf(file)}" has no floor yet: give it one in MAY_IMPORT`);
    for (const { specifier, target } of imports.get(file) ?? []) {
      if (target === undefined) {
        assert.ok(packageAllowed(roomOf(file), specifier), `"${specifier}"`);
        continue;
      }
      assert.ok(texts.has(target), `"${specifier}" is not a file of ours`);
      const isAllowed = roomOf(target) === roomOf(file) || allowed.includes(roomOf(target)) || allowed.includes(target);
      assert.ok(isAllowed, `"${specifier}" is not below ${roomOf(file)}, which may import ${allowed.join(", ")}`);
    }
  });

  test(`src/${file} is below ${MAX_LINES} lines and opens with a sentence on what lives there`, () => {
    const lines = (texts.get(file) ?? "").split("\n");
    assert.ok(lines.length <= MAX_LINES, `${lines.length} lines: two things may live here`);
    const opening = lines.filter((line) => !line.startsWith("#!")).join("\n");
    const comment = /^\/\*\*\s+([\s\S]*?)\s*\*\//.exec(opening);
    assert.match(comment?.[1] ?? "", /^\S.*\.$/s, "the first lines must be a /** doc comment. */");
  });
}

test("no circle of imports", () => {
  const done = new Set<string>();
  const visit = (file: string, path: readonly string[]): void => {
    assert.ok(!path.includes(file), `circle: ${[...path.slice(path.indexOf(file)), file].join(" -> ")}`);
    if (done.has(file)) return;
    for (const { target } of imports.get(file) ?? []) if (target !== undefined) visit(target, [...path, file]);
    done.add(file);
  };
  for (const file of files) visit(file, []);
});

test("the reader of imports sees every form", () => {
  const seen = specifiersOf(`
    /** import { no } from "./comment.js"; */
    import a from "./a.js"; import type { B } from './b.js';
    import {
      c,
      type D,
    } from "./c.js";
    import * as e from "./e.js";
    import "./f.js";
    export { g } from "./g.js";
    export type * from "./h.js";
    const i = await import("./i.js"); // import "./no.js"
    type J = import("./j.js").J;
    const text = "from here"; const from = 1;`);
  assert.deepEqual(
    seen,
    "abcefghij".split("").map((letter) => `./${letter}.js`),
  );
});

/** The room of a file below src: its folder, or for a file on its own its name. */
function roomOf(file: string): string {
  return file.replace(/\/.*/, "").replace(/\.ts$/, "");
}

/** Packages that the command needs: words of the command line, scales of charts, the format of metrics. */
const CLI_PACKAGES = ["commander", "d3-scale", "prom-client"];

/** The library has no dependency; the pure rooms not even Node. */
function packageAllowed(room: string, specifier: string): boolean {
  if (specifier.startsWith("node:")) return !BROWSER_ROOMS.includes(room);
  return room === "cli" && CLI_PACKAGES.includes(specifier);
}

function importsOf(file: string): Import[] {
  return specifiersOf(texts.get(file) ?? "").map((specifier) => ({
    specifier,
    target: specifier.startsWith(".") ? posix.join(posix.dirname(file), specifier).replace(/\.js$/, ".ts") : undefined,
  }));
}

/** The module names of all imports and re-exports in a source. */
function specifiersOf(source: string): string[] {
  const code = source.replaceAll(/\/\*[\s\S]*?\*\//g, "").replaceAll(/(^|\s)\/\/.*$/gm, "");
  const pattern =
    /\b(?:import|export)\s+(?:type\s+)?(?:[\w*\s{},$]+?\s+from\s+)?["']([^"']+)["']|\bimport\(\s*["']([^"']+)["']/g;
  return [...code.matchAll(pattern)].map((match) => match[1] ?? match[2]);
}
