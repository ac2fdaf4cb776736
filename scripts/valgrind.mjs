/**
 * Runs tests of the system calls and of a whole device on the addon under valgrind. Fails on a failed test, and on every
 * error in whose stack the addon comes before any JavaScript: what V8 does by itself does not count.
 */

import { spawn } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { availableParallelism, tmpdir } from "node:os";
import { dirname, join } from "node:path";
import process from "node:process";
import { fileURLToPath, pathToFileURL } from "node:url";
import { compile } from "./build-native.mjs";

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const folder = mkdtempSync(join(tmpdir(), "virtio-valgrind-"));
const addon = join(folder, "syscalls.node");
const TIMEOUT_MS = 180_000;

/** The test files, a process each group: starting Node.js under valgrind takes as long as most of them. */
const GROUPS = [
  ["sys/watcher", "sys/eventfd", "sys/memfd", "sys/registers"],
  ["sys/file", "sys/mapping", "sys/socket", "sys/descriptor"],
  ["leaks/vhost-user"],
];
/** Of the calls of a device's life, so many go well for one that is refused. */
const REFUSE_EVERY = 20;

/** Run test files in one process; what was wrong. */
function runGroup(files, number) {
  const entry = join(folder, `group-${number}.mjs`);
  const report = join(folder, `group-${number}.xml`);
  const urls = files.map((file) => pathToFileURL(join(root, "dist", "test", `${file}.test.js`)).href);
  writeFileSync(entry, urls.map((url) => `import ${JSON.stringify(url)};\n`).join(""));
  const options = [
    ...["--smc-check=all-non-file", "--num-callers=40", "--leak-check=full", "--show-leak-kinds=definite"],
    ...["--child-silent-after-fork=yes", "--xml=yes", `--xml-file=${report}`],
    `--suppressions=${join(root, "scripts", "valgrind.supp")}`,
  ];
  return new Promise((resolve) => {
    const child = spawn("valgrind", [...options, process.execPath, "--test-reporter=dot", entry], {
      stdio: ["ignore", "pipe", "pipe"],
      timeout: TIMEOUT_MS,
      killSignal: "SIGKILL",
      env: { ...process.env, VIRTIO_NATIVE_PATH: addon, VIRTIO_REFUSE_EVERY: String(REFUSE_EVERY) },
    });
    let output = "";
    for (const stream of [child.stdout, child.stderr])
      stream.setEncoding("utf8").on("data", (text) => (output += text));
    child.once("error", ({ code }) => {
      resolve([`valgrind does not start (${code}); install it (Debian: apt-get install valgrind)`]);
    });
    child.once("close", (status, signal) => {
      const failed = status === 0 ? [] : [`${files.join(", ")}: ended with ${signal ?? status}\n${output}`];
      resolve([...failed, ...faultsOf(readFileSync(report, "utf8"))]);
    });
  });
}

/** The errors of a report that are the addon's, as text. */
function faultsOf(xml) {
  const faults = all(xml, "error").filter(isOurs).map(describe);
  // A process that was killed leaves a report without its end, and perhaps without the errors.
  return xml.includes("</valgrindoutput>") ? faults : [...faults, "a report without an end"];
}

/** Whether the addon is to blame: it is on the stack, and no JavaScript that it called is above it. */
function isOurs(error) {
  const frames = all(all(error, "stack")[0] ?? "", "frame");
  const isAddon = (frame) => first(frame, "obj") === addon;
  // Node.js leaves memory behind at exit, also some that it allocated for us; ours is what the addon allocated itself.
  if (first(error, "kind").startsWith("Leak_")) {
    return isAddon(frames.find((frame) => !first(frame, "obj").includes("vgpreload")) ?? "");
  }
  const script = frames.findIndex((frame) => first(frame, "fn").startsWith("Builtins_") || first(frame, "obj") === "");
  return frames.slice(0, script < 0 ? frames.length : script).some(isAddon);
}

function describe(error) {
  const what = first(error, "what") || first(error, "text");
  const lines = all(error, "frame").map((frame) => {
    const file = first(frame, "file");
    return `    at ${first(frame, "fn") || "?"} (${file === "" ? first(frame, "obj") : `${file}:${first(frame, "line")}`})`;
  });
  return `${what}\n${lines.slice(0, 12).join("\n")}`;
}

/** The contents of each element of that name, which never holds another of its kind. */
function all(xml, name) {
  return [...xml.matchAll(new RegExp(`<${name}>(.*?)</${name}>`, "gs"))].map(([, inner]) => inner);
}

function first(xml, name) {
  return all(xml, name)[0] ?? "";
}

async function main() {
  const built = compile(addon, ["-g", "-O1", "-fno-omit-frame-pointer"]);
  if (built.status !== "built") {
    console.error(`valgrind: ${built.reason}`);
    return 1;
  }
  const faults = [];
  const queue = [...GROUPS.entries()];
  const work = async () => {
    for (let next = queue.shift(); next !== undefined; next = queue.shift()) {
      faults.push(...(await runGroup(next[1], next[0])));
    }
  };
  await Promise.all(Array.from({ length: availableParallelism() }, work));
  for (const fault of faults) console.error(fault);
  console.error(`valgrind: ${faults.length} faults`);
  return faults.length === 0 ? 0 : 1;
}

try {
  process.exitCode = await main();
} finally {
  rmSync(folder, { recursive: true });
}
