/** The way of a test's result from the guest to Node's runner, without a guest: the runner inside, the report outside. */

import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { finished } from "node:stream/promises";
import { after, run, test } from "node:test";
import { fileURLToPath } from "node:url";
import type { TestNews } from "../guest/protocol.js";
import { runTestFile } from "../guest/support/runner.js";
import { TemporaryFolder } from "./peers.js";

const PATIENT_MS = 120_000;

// Set by the runner that runs this file; with it, run() does nothing.
delete process.env["NODE_TEST_CONTEXT"];

const folder = new TemporaryFolder();
after(() => folder.close());

function write(name: string, code: string): string {
  const file = folder.file(name);
  writeFileSync(file, code);
  return file;
}

interface Outcome {
  readonly name: string;
  readonly outcome: string;
  readonly error: string | undefined;
}

/** Run a file as the guest does. */
async function inGuest(code: string, silenceMs = PATIENT_MS): Promise<{ tests: Outcome[]; error: string | undefined }> {
  const news: TestNews[] = [];
  await runTestFile(write(`inner-${Math.random()}.test.mjs`, code), silenceMs, (item) => news.push(item));
  assert.equal(news.shift()?.type, "file");
  const end = news.pop();
  assert.ok(end?.type === "file-end");
  const names = new Map(news.flatMap((item) => (item.type === "begin" ? [[item.id, item.name]] : [])));
  const tests = news.flatMap((item) =>
    item.type === "end"
      ? [{ name: names.get(item.id) ?? "", outcome: item.skip ?? item.outcome, error: item.error }]
      : [],
  );
  assert.equal(tests.length, names.size, "every test that began has ended");
  return { tests, error: end.error };
}

test("each test is told with its outcome, its title behind those around it", async () => {
  const { tests, error } = await inGuest(`
    import { describe, it, test } from "node:test";
    test("passes", () => {});
    test("around", async (t) => { await t.test("within", () => { throw new Error("boom", { cause: "why" }); }); });
    describe("suite", () => { it("in it", { skip: "not here" }, () => {}); it.todo("later"); });`);
  assert.deepEqual(
    tests.map(({ name, outcome }) => `${name}: ${outcome}`),
    [
      "passes: pass",
      "around > within: fail",
      "around: fail",
      "suite > in it: not here",
      "suite > later: no reason given",
      "suite: pass",
    ],
  );
  assert.match(tests[1].error ?? "", /Error: boom\n.*at .*\n[^]*cause.*why/);
  assert.equal(error, undefined, "a failed test is no failure of the file");
});

test("a file that dies fails the test it was in, and itself", async () => {
  const file = write(
    "dies.test.mjs",
    `import { test } from "node:test";
    console.log(process.pid);
    test("hangs", () => new Promise(() => setInterval(() => {}, 1000)));`,
  );
  const news: TestNews[] = [];
  await runTestFile(file, PATIENT_MS, (item) => {
    news.push(item);
    const pid = news.flatMap((earlier) => (earlier.type === "output" ? [Number(earlier.text)] : []))[0];
    const hangs = news.some((earlier) => earlier.type === "begin");
    if (pid !== undefined && hangs && item.type !== "end" && item.type !== "file-end") process.kill(pid, "SIGKILL");
  });
  const errors = news.flatMap((item) => (item.type === "end" || item.type === "file-end" ? [item.error] : []));
  assert.deepEqual(errors, ["its process ended with SIGKILL", "its process ended with SIGKILL"]);
});

test("a file fails whose process fails after its tests, that has no tests, or that is not there", async () => {
  const late = await inGuest(
    'import { test } from "node:test"; test("x", () => {}); process.on("exit", () => { process.exitCode = 7; });',
  );
  assert.equal(late.error, "its process ended with status 7");
  assert.equal((await inGuest("")).error, "it has no tests");
  const news: TestNews[] = [];
  await runTestFile(folder.file("nothing.test.mjs"), PATIENT_MS, (item) => news.push(item));
  assert.match(JSON.stringify(news), /there is no such file/);
});

test("a file that is silent for too long is killed", async () => {
  const { error } = await inGuest(
    'import { test } from "node:test"; test("hangs", () => new Promise(() => setInterval(() => {}, 1000)));',
    1000,
  );
  assert.equal(error, "nothing heard for 1 s, then killed");
});

/** Report news as test/system/guest.test.ts does, in a runner of its own; returns what that runner says. */
async function outside(news: readonly TestNews[], death?: string): Promise<string[]> {
  const report = fileURLToPath(new URL("../guest/host/report.js", import.meta.url));
  const file = write(
    `outer-${Math.random()}.test.mjs`,
    `import { test } from "node:test";
    import { reportGuest } from ${JSON.stringify(report)};
    async function* news() {
      yield* ${JSON.stringify(news)};
      ${death === undefined ? "" : `throw new Error(${JSON.stringify(death)});`}
    }
    test("guest", (t) => reportGuest(t, news()));`,
  );
  const said: string[] = [];
  const events = run({ files: [file] });
  events.on("test:stdout", ({ message }) => said.push(`prints ${message.trim()}`));
  events.on("test:pass", ({ name, skip }) => said.push(`${name}: ${skip === undefined ? "pass" : `skip ${skip}`}`));
  events.on("test:fail", ({ name, details }) => said.push(`${name}: ${String(details.error.cause)}`));
  await finished(events.resume());
  return said;
}

test("results of the guest become tests outside", async () => {
  const file = "/x/blk.test.js";
  const end = { type: "end", outcome: "pass", skip: undefined, error: undefined, durationMs: 1 } as const;
  const said = await outside([
    { type: "file", file },
    { type: "begin", id: 1, file, name: "good" },
    { ...end, id: 1 },
    { type: "begin", id: 2, file, name: "around" },
    { type: "begin", id: 3, file, name: "around > within" },
    { type: "output", text: "hello\n" },
    { ...end, id: 3, outcome: "fail", error: "the reason" },
    { ...end, id: 2, outcome: "fail", error: "1 subtest failed" },
    { type: "begin", id: 4, file, name: "absent" },
    { ...end, id: 4, skip: "not here" },
    { type: "file-end", file, error: "the process died" },
    { type: "file", file: "/x/next.test.js" },
    { type: "file-end", file: "/x/next.test.js", error: undefined },
  ]);
  assert.deepEqual(said, [
    "prints hello",
    "good: pass",
    "around: Error: 1 subtest failed",
    "around > within: Error: the reason",
    "absent: skip not here",
    "blk.test.js: Error: the process died",
    "next.test.js: pass",
    "guest: 1 subtest failed",
  ]);
});

test("a guest that dies within a test fails it and its file, with the reason", async () => {
  const file = "/x/blk.test.js";
  const said = await outside(
    [
      { type: "file", file },
      { type: "begin", id: 1, file, name: "open" },
    ],
    "QEMU is gone",
  );
  assert.equal(said.length, 3);
  assert.match(said[0], /^open: .*did not finish before its parent/);
  assert.equal(said[1], "blk.test.js: Error: QEMU is gone");
  assert.match(said[2], /^guest: /);
});
