/** Every example in the documentation compiles and does what it says. */

import assert from "node:assert/strict";
import { spawn, spawnSync } from "node:child_process";
import { mkdtempSync, readdirSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, describe, test } from "node:test";
import { spawnBackend } from "../src/backend/index.js";
import {
  type DocExample,
  examplesOf,
  expectedOutput,
  findExamples,
  missingOutput,
  preparedProgram,
  ROOT,
  wantsBackend,
  writePrograms,
} from "./doc-examples.js";

const TIMEOUT_MS = 30_000;
const DISK_SIZE = 64 << 20;

const examples = findExamples();
const folder = mkdtempSync(join(tmpdir(), "virtio-examples-"));
after(() => rmSync(folder, { recursive: true }));

describe("examples in the documentation", { concurrency: 2 }, () => {
  const tsc = join(ROOT, "node_modules", "typescript", "bin", "tsc");
  const compiled = spawnSync(process.execPath, [tsc, "-p", writePrograms(examples)], { encoding: "utf8" });

  test(`all ${examples.length} compile against the package`, () => {
    assert.ok(examples.length > 0);
    assert.equal(compiled.stdout + compiled.stderr, "");
  });

  for (const example of examples.filter(({ isRun }) => isRun)) {
    test(`${example.file}:${example.line} runs and prints what it says`, async () => {
      await runExample(example);
    });
  }
});

describe("programs in examples/", { concurrency: 2 }, () => {
  const programs = readdirSync(join(ROOT, "dist", "examples")).filter((name) => name.endsWith(".js"));
  for (const name of programs) {
    test(`examples/${name.replace(/js$/, "ts")} runs`, async () => {
      await runProgram(join(ROOT, "dist", "examples", name));
    });
  }
});

test("examples are found in Markdown, with the line of their fence", () => {
  const fence = "```";
  const text = `# A\n\n${fence}ts\nlet a;\n${fence}\n\n${fence}sh\nls\n${fence}\n${fence}ts no-run\nlet b;\n${fence}\n`;
  assert.deepEqual(examplesOf("a.md", text), [
    { file: "a.md", line: 3, code: "let a;\n", isRun: true },
    { file: "a.md", line: 10, code: "let b;\n", isRun: false },
  ]);
});

test("the output an example promises is compared line by line", () => {
  const code =
    'console.log(1, "a"); // 1 "a"\nconsole.log(f());\n// true: because\nconsole.log(2);\nlet x; // no output';
  assert.deepEqual(expectedOutput(code), ['1 "a"', "true: because"]);
  assert.equal(missingOutput("1 a\nother\ntrue\n2\n", expectedOutput(code)), undefined);
  assert.equal(missingOutput("1 a\nfalse\n", expectedOutput(code)), "true: because");
  assert.equal(missingOutput("true\n1 a\n", expectedOutput(code)), "true: because");
  assert.equal(missingOutput("11 a\ntrue\n", expectedOutput(code)), '1 "a"');
});

async function runExample(example: DocExample): Promise<void> {
  const backend = wantsBackend(example) ? await spawnBackend({ kind: "ram", size: DISK_SIZE }) : undefined;
  try {
    const stdout = await runProgram(preparedProgram(example, backend?.path ?? ""));
    const missing = missingOutput(stdout, expectedOutput(example.code));
    assert.ok(missing === undefined, `it says that it prints\n  ${missing}\nbut it printed\n${stdout}`);
  } finally {
    await backend?.close();
  }
}

/** Run a program in a folder of its own with a disk.img, and return what it printed. */
async function runProgram(path: string): Promise<string> {
  const cwd = mkdtempSync(join(folder, "run-"));
  writeFileSync(join(cwd, "disk.img"), "");
  truncateSync(join(cwd, "disk.img"), DISK_SIZE);
  const child = spawn(process.execPath, [path], { cwd, stdio: ["ignore", "pipe", "pipe"], timeout: TIMEOUT_MS });
  let stdout = "";
  let stderr = "";
  child.stdout.setEncoding("utf8").on("data", (text: string) => (stdout += text));
  child.stderr.setEncoding("utf8").on("data", (text: string) => (stderr += text));
  const [code, signal] = await new Promise<[number | null, NodeJS.Signals | null]>((resolve, reject) => {
    child.on("error", reject);
    child.on("close", (...ended) => resolve(ended));
  });
  assert.deepEqual([code, signal], [0, null], `${path} failed:\n${stderr}`);
  return stdout;
}
