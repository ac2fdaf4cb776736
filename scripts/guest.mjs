/**
 * Boots the guest and runs test files in it: `node scripts/guest.mjs [--root DIR] [--console] [--shell] [FILE…]`. FILE
 * is a compiled test, below --root (default: this working tree); without any, all of dist/test/guest. With --console
 * it prints what the kernel and QEMU say, as it comes. With --shell it
 * gives a shell in the guest instead, with the devices ready and the tests' variables set; Ctrl-A X ends it.
 */

import { existsSync, realpathSync } from "node:fs";
import { dirname, isAbsolute, relative, resolve } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

const here = dirname(dirname(fileURLToPath(import.meta.url)));
const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { root: { type: "string" }, shell: { type: "boolean" }, console: { type: "boolean" } },
});
const root = realpathSync(values.root ?? here);
const files = positionals.map((file) => (isAbsolute(file) ? file : resolve(root, file)));
for (const file of files) if (!existsSync(file)) fail(`${file} is not there: is it built?`);

const lab = new URL("../dist/test/guest/host/lab.js", import.meta.url);
if (!existsSync(lab)) fail("the lab is not compiled; run: npm run build");
const { GUEST_PROGRAMS, openShell, runInGuest } = await import(lab.href);
const { missingPeers } = await import(new URL("../dist/test/support/peers.js", import.meta.url).href);
const missing = missingPeers(GUEST_PROGRAMS);
if (missing !== undefined) fail(missing);

const log = (line) => console.error(`guest: ${line}`);
if (values.shell) {
  await openShell(root, log);
} else {
  const names = new Map();
  const counts = { pass: 0, fail: 0, skip: 0 };
  const onConsole = values.console ? (text) => process.stderr.write(text) : undefined;
  for await (const news of runInGuest({ root, files: files.length > 0 ? files : undefined, log, onConsole })) {
    if (news.type === "file") console.log(relative(root, news.file));
    if (news.type === "output") process.stdout.write(news.text);
    if (news.type === "begin") names.set(news.id, news.name);
    if (news.type === "end") {
      const outcome = news.skip === undefined ? news.outcome : "skip";
      counts[outcome]++;
      console.log(`  ${outcome} ${names.get(news.id)} (${Math.round(news.durationMs)} ms) ${news.skip ?? ""}`);
    }
    if ((news.type === "end" || news.type === "file-end") && news.error !== undefined) {
      console.log(news.error.replaceAll(/^/gm, "    "));
      process.exitCode = 1;
    }
  }
  console.log(`${counts.pass} passed, ${counts.fail} failed, ${counts.skip} skipped`);
}

function fail(reason) {
  console.error(`guest: ${reason}`);
  process.exit(2);
}
