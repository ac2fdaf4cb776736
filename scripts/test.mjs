/**
 * Runs the compiled tests with Node's own runner: `npm test [-- [--without-guest] WORD…]`, where a word picks the
 * test files whose path contains it. Builds first when a source is newer than its output. With
 * VIRTIO_REQUIRE_PEERS=1 a skipped test is a failure.
 */
import { spawnSync } from "node:child_process";
import { existsSync, readdirSync, statSync } from "node:fs";
import { availableParallelism } from "node:os";
import { join } from "node:path";
import { finished } from "node:stream/promises";
import { run } from "node:test";
import { spec } from "node:test/reporters";

/** No test file may take longer than this; a hang is a failure, not a wait. */
const FILE_TIMEOUT_MS = 240_000;
/** The test files that run virtual machines; they watch over their time themselves. */
const GUEST = ["test/system/guest.test.ts", "test/system/qemu-front-end.test.ts"];
const GUEST_TIMEOUT_MS = 30 * 60_000;

process.chdir(join(import.meta.dirname, ".."));

const words = process.argv.slice(2).filter((word) => word !== "--without-guest");
const withGuest = !process.argv.includes("--without-guest");
const sources = ["src", "test", "bench", "examples"].filter(existsSync).flatMap(typescriptFiles);
if (sources.some((source) => modified(compiled(source)) < modified(source)) || nativeIsStale()) {
  const build = spawnSync("npm", ["run", "--silent", "build"], { stdio: "inherit" });
  if (build.status !== 0) process.exit(build.status ?? 1);
}

const files = sources
  .filter((source) => source.endsWith(".test.ts") && source.startsWith("test/") && !source.startsWith("test/guest/"))
  .filter((source) => words.length === 0 || words.some((word) => source.includes(word)))
  .filter((source) => withGuest || !GUEST.includes(source));
if (files.length === 0) {
  console.error(`no test file has ${words.join(" or ")} in its path`);
  process.exit(2);
}

const skipped = [];
const concurrency = Math.max(2, availableParallelism());
await runFiles(
  files.filter((source) => !GUEST.includes(source)),
  { concurrency, timeout: FILE_TIMEOUT_MS },
);
// By themselves: a machine has as many processors as we have, and would take them from the others.
await runFiles(
  files.filter((source) => GUEST.includes(source)),
  { concurrency: 1, timeout: GUEST_TIMEOUT_MS },
);

if (process.env.VIRTIO_REQUIRE_PEERS === "1" && skipped.length > 0) {
  console.error(`\nVIRTIO_REQUIRE_PEERS=1 allows no skipped test, and ${skipped.length} were skipped:`);
  for (const line of skipped) console.error(`  ${line}`);
  process.exitCode = 1;
}

/** Run test files and print the report; failures go to the exit code, what was skipped to `skipped`. */
async function runFiles(list, options) {
  if (list.length === 0) return;
  const events = run({ files: list.map(compiled), ...options });
  events.on("test:fail", () => {
    process.exitCode = 1;
  });
  events.on("test:pass", ({ name, skip }) => {
    if (skip !== undefined) skipped.push(`${name}: ${skip === true ? "no reason given" : skip}`);
  });
  const report = events.compose(new spec());
  report.pipe(process.stdout, { end: false });
  await finished(report);
}

/** All .ts files below `folder`, sorted. */
function typescriptFiles(folder) {
  return readdirSync(folder, { recursive: true })
    .filter((name) => name.endsWith(".ts") && !name.endsWith(".d.ts"))
    .map((name) => join(folder, name))
    .sort();
}

/** Where the compiler puts the output of `source`. */
function compiled(source) {
  return join("dist", source.replace(/\.ts$/, ".js"));
}

/** Modification time in milliseconds; 0 for a file that is not there. */
function modified(path) {
  return statSync(path, { throwIfNoEntry: false })?.mtimeMs ?? 0;
}

/** Whether the addon is older than its source. Where no compiler is installed there is no addon to wait for. */
function nativeIsStale() {
  const newest = Math.max(...readdirSync("native").map((name) => modified(join("native", name))));
  const addons = existsSync("prebuilds") ? readdirSync("prebuilds", { recursive: true }) : [];
  return !addons.some((name) => name.endsWith(".node") && modified(join("prebuilds", name)) >= newest);
}
