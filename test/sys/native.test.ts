/** Building and loading the addon: with and without a compiler, fresh, broken, missing. */

import assert from "node:assert/strict";
import { type SpawnSyncReturns, spawnSync } from "node:child_process";
import {
  appendFileSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import test, { after } from "node:test";
import { fileURLToPath } from "node:url";
import { errnoName } from "../../src/sys/index.js";
import { LAYOUT, runChild, SYS } from "./helpers.js";

const root = fileURLToPath(new URL("../../../", import.meta.url));
const folder = mkdtempSync(join(tmpdir(), "virtio-"));
after(() => rmSync(folder, { recursive: true }));

/** A copy of what the build needs, as in an installation without development dependencies. */
function copyPackage(name: string): string {
  const copy = join(folder, name);
  mkdirSync(join(copy, "scripts"), { recursive: true });
  cpSync(join(root, "native"), join(copy, "native"), { recursive: true });
  cpSync(join(root, "scripts", "build-native.mjs"), join(copy, "scripts", "build-native.mjs"));
  return copy;
}

function build(copy: string, env: NodeJS.ProcessEnv = {}): SpawnSyncReturns<string> {
  return spawnSync(process.execPath, [join(copy, "scripts", "build-native.mjs")], {
    encoding: "utf8",
    env: { PATH: process.env["PATH"], ...env },
    timeout: 60_000,
  });
}

test("the addon is built once, again when its source is newer, and leaves nothing else", () => {
  const copy = copyPackage("build");
  const first = build(copy);
  assert.equal(first.status, 0, first.stderr);
  const name = `${process.platform}-${process.arch}.node`;
  const output = join(copy, "prebuilds", name);
  const { mtimeMs } = statSync(output);
  assert.deepEqual(readdirSync(join(copy, "prebuilds")), [name]);

  const second = build(copy);
  assert.deepEqual([second.status, second.stdout, second.stderr], [0, "", ""]);
  assert.equal(statSync(output).mtimeMs, mtimeMs);

  appendFileSync(join(copy, "native", "syscalls.c"), "/* newer */\n");
  assert.equal(build(copy).status, 0);
  assert.notEqual(statSync(output).mtimeMs, mtimeMs);

  const child = runChild(`import { EventFd } from ${JSON.stringify(SYS)}; console.log(EventFd.create().drain());`, {
    env: { ...process.env, VIRTIO_NATIVE_PATH: output },
  });
  assert.equal(child.stdout, "false\n", child.stderr);
});

test("without a compiler one sentence says what works, what does not, and what to do", () => {
  const copy = copyPackage("no-compiler");
  for (const env of [{ PATH: "" }, { CC: "no-such-compiler" }, { PATH: "", CC: "" }]) {
    const result = build(copy, env);
    assert.equal(result.status, 0);
    assert.equal(result.stdout, "");
    assert.match(
      result.stderr,
      /^virtio-driver: .*layouts, rings and codecs work but devices cannot be opened: there is no C compiler .*install one .*\n$/,
    );
    assert.equal(result.stderr.split("\n").length, 2);
  }
  assert.ok(!existsSync(join(copy, "prebuilds", `${process.platform}-${process.arch}.node`)));
});

test("the compiler is $CC, which may have arguments", () => {
  const copy = copyPackage("cc");
  const result = build(copy, { CC: "cc -DNAPI_EXTRA" });
  assert.equal(result.status, 0, result.stderr);
  assert.match(result.stderr, /^built /);
});

test("an error of the compiler is shown, fails the build, and leaves nothing", () => {
  const copy = copyPackage("broken");
  appendFileSync(join(copy, "native", "syscalls.c"), "this is not C\n");
  const result = build(copy);
  assert.equal(result.status, 1);
  assert.match(result.stderr, /syscalls\.c:\d+:\d+: error/);
  assert.deepEqual(readdirSync(join(copy, "prebuilds")), []);
});

test("the script works through a symbolic link, as package managers make them", () => {
  const copy = copyPackage("linked");
  const link = join(folder, "link");
  symlinkSync(copy, link);
  assert.match(build(link).stderr, /^built /);
});

test("without the addon layouts work, and system calls name the command that builds it", () => {
  const missing = join(folder, "missing.node");
  const garbage = join(folder, "garbage.node");
  writeFileSync(garbage, "not an addon");
  const code = `
    import { VirtqueueLayout } from ${JSON.stringify(LAYOUT)};
    import { EventFd } from ${JSON.stringify(SYS)};
    console.log(new VirtqueueLayout({ queueSize: 8 }).endOffset > 0);
    try { EventFd.create(); } catch (error) { console.log(error.code, error.cause !== undefined, error.message); }
  `;
  for (const [path, reason, cause] of [
    [missing, "missing", false],
    [garbage, "does not load", true],
  ] as const) {
    const child = runChild(code, { env: { ...process.env, VIRTIO_NATIVE_PATH: path } });
    const [layout, error = ""] = child.stdout.split("\n");
    assert.equal(layout, "true", child.stderr);
    assert.ok(
      error.startsWith(
        `ERR_VIRTIO_NATIVE_UNAVAILABLE ${cause} the native part ${reason === "missing" ? "is missing" : reason}`,
      ),
      error,
    );
    assert.ok(error.endsWith(`build it with: node ${join(root, "scripts", "build-native.mjs")}`), error);
  }
});

test("errno values have names", () => {
  assert.equal(errnoName(2), "ENOENT");
  assert.equal(errnoName(9999), "errno 9999");
});
