/**
 * Builds the addon with AddressSanitizer and UndefinedBehaviorSanitizer and runs the tests of the system calls, of
 * memory and of threads on it. Fails on a failed test, on any report, also of a child or worker whose end no test looks
 * at, and on memory that the addon leaks.
 */

import { spawnSync } from "node:child_process";
import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, dirname, isAbsolute, join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { compile, sources } from "./build-native.mjs";

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const folder = mkdtempSync(join(tmpdir(), "virtio-asan-"));
const TIMEOUT_MS = 180_000;

/** The sanitizer's runtime, which has to be there before Node.js starts. */
function findRuntime() {
  const run = spawnSync("gcc", ["-print-file-name=libasan.so"], { encoding: "utf8" });
  const path = run.stdout?.trim() ?? "";
  return isAbsolute(path) ? path : undefined;
}

/** Every test file of a folder, or a single one. */
function testFiles(name) {
  const path = join(root, "dist", "test", name);
  if (name.endsWith(".js")) return [path];
  return readdirSync(path)
    .filter((file) => file.endsWith(".test.js"))
    .map((file) => join(path, file));
}

/** What is run: all that calls the addon directly, and threads that end in the midst of its calls. */
const TESTS = [
  "sys",
  "memory",
  "backend/withdrawn.test.js",
  "devices/blk/handover.test.js",
  "system/workers-embedded.test.js",
];

/** The frame of a source file of the addon, right after malloc's. */
const ALLOCATED = new RegExp(`#0 .*\\n\\s+#1 .*\\b(${sources.map((path) => basename(path, ".c")).join("|")})\\.c:`);

/** Whether a report is an error, or a leak of memory that the addon allocated: its frame is right after malloc's. */
function isOurs(report) {
  return !report.includes("LeakSanitizer") || ALLOCATED.test(report);
}

function main() {
  const runtime = findRuntime();
  if (runtime === undefined) {
    console.error("asan: gcc or its libasan is missing; install them (Debian: apt-get install gcc libc6-dev)");
    return 1;
  }
  const addon = join(folder, "syscalls.node");
  const built = compile(addon, [
    ...["-g", "-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined,float-cast-overflow"],
    "-fno-sanitize-recover=all", // undefined behaviour ends the process, so its test fails, too
    // Of its own and bound here: otherwise it takes functions of the other one's runtime, and reports go nowhere.
    ...["-static-libubsan", "-Wl,-Bsymbolic"],
  ]);
  if (built.status !== "built") {
    console.error(`asan: ${built.reason}`);
    return 1;
  }
  const log = join(folder, "report");
  const tests = spawnSync(process.execPath, ["--test", ...TESTS.flatMap(testFiles)], {
    stdio: ["ignore", "inherit", "inherit"],
    timeout: TIMEOUT_MS,
    killSignal: "SIGKILL",
    env: {
      ...process.env,
      LD_PRELOAD: runtime,
      VIRTIO_NATIVE_PATH: addon,
      // Reports go to files, so that none is lost in a child's output. Node.js leaves memory behind at exit, as do
      // compilers and shells that the tests start: a leak does not change a process's exit status here, and only
      // what the addon itself allocated counts (see isOurs).
      ASAN_OPTIONS: `detect_leaks=1:log_path=${log}`,
      LSAN_OPTIONS: "exitcode=0",
      UBSAN_OPTIONS: `print_stacktrace=1:log_path=${log}`,
    },
  });
  const reports = readdirSync(folder)
    .filter((file) => file.startsWith("report"))
    .map((file) => readFileSync(join(folder, file), "utf8"))
    .filter(isOurs);
  for (const report of reports) console.error(report);
  if (tests.error !== undefined) console.error(`asan: the tests did not end: ${tests.error.message}`);
  console.error(`asan: ${reports.length} reports, tests ${tests.status === 0 ? "passed" : "failed"}`);
  return reports.length === 0 && tests.status === 0 ? 0 : 1;
}

try {
  process.exitCode = main();
} finally {
  rmSync(folder, { recursive: true });
}
