/** Builds native/*.c into prebuilds/ with one call of the C compiler; says so in one sentence when it cannot. */

import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, readdirSync, realpathSync, renameSync, statSync } from "node:fs";
import { dirname, join, relative } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";

const script = fileURLToPath(import.meta.url);
const root = dirname(dirname(script));
const folder = join(root, "native");
const files = readdirSync(folder).map((name) => join(folder, name));
/** The addon's C files. */
export const sources = files.filter((path) => path.endsWith(".c"));
// Never unloaded, as the last worker thread that used it would have it: the handler of SIGBUS and a thread stay in it.
const flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-Wl,-z,nodelete"];

/** Where the addon of this platform belongs; src/sys/native.ts looks there. */
export const addonPath = join(root, "prebuilds", `${process.platform}-${process.arch}.node`);

/**
 * Compile the addon to `output` with `extraFlags` added.
 *
 * @returns `{ status: "built" }`, `{ status: "unavailable", reason }` when something to build with is missing, or
 *   `{ status: "failed", reason }` with the compiler's output.
 */
export function compile(output, extraFlags = []) {
  if (process.platform !== "linux") return unavailable("the virtio transports need Linux, and this is not");
  const headers = [
    join(root, "node_modules", "node-api-headers", "include"),
    join(root, "..", "node-api-headers", "include"),
    join(dirname(dirname(process.execPath)), "include", "node"),
  ].find((path) => existsSync(join(path, "node_api.h")));
  if (headers === undefined) {
    return unavailable("node_api.h was not found; run `npm install node-api-headers`, then `npm run build`");
  }
  const [cc = "cc", ...ccFlags] = (process.env.CC ?? "").split(" ").filter((word) => word !== "");
  // Built beside its place and renamed into it, so that a process that has the old one loaded keeps it whole.
  const temporary = `${output}.${process.pid}`;
  mkdirSync(dirname(output), { recursive: true });
  const run = spawnSync(cc, [...ccFlags, ...flags, ...extraFlags, `-I${headers}`, "-o", temporary, ...sources], {
    encoding: "utf8",
  });
  if (run.error !== undefined) {
    return unavailable(
      `there is no C compiler (${cc}: ${run.error.code}); install one (Debian: apt-get install gcc libc6-dev) ` +
        `or name it in $CC, then run: node ${script}`,
    );
  }
  if (run.status !== 0) return { status: "failed", reason: run.stderr };
  renameSync(temporary, output);
  return { status: "built" };
}

function unavailable(reason) {
  return { status: "unavailable", reason };
}

function isFresh(output) {
  if (!existsSync(output)) return false;
  const built = statSync(output).mtimeMs;
  return [script, ...files].every((path) => built > statSync(path).mtimeMs);
}

function main() {
  if (isFresh(addonPath)) return;
  const result = compile(addonPath);
  if (result.status === "built") {
    console.error(`built ${relative(process.cwd(), addonPath)}`);
  } else if (result.status === "unavailable") {
    console.error(
      `virtio-driver: the native part was not built, so layouts, rings and codecs work but devices cannot be ` +
        `opened: ${result.reason}.`,
    );
  } else {
    console.error(result.reason);
    process.exitCode = 1;
  }
}

if (process.argv[1] !== undefined && realpathSync(process.argv[1]) === script) main();
