/** docs/security.md promises nothing without a test: each one that it names is there. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { ROOT } from "./doc-examples.js";

const page = readFileSync(join(ROOT, "docs/security.md"), "utf8");

test("every test that docs/security.md names exists", () => {
  const named = [...page.matchAll(/^ +- `(test\/\S+\.test\.ts)`: "(.+)"$/gm)];
  assert.equal(named.length, page.match(/`test\//g)?.length, 'a test that is not named as `FILE`: "TITLE"');
  assert.ok(named.length >= 20);
  for (const [, file, title] of named) {
    const code = readFileSync(join(ROOT, file), "utf8");
    // The title as it stands in the call of test, it or describe; it may begin with requirement ids or values.
    const titles = [...code.matchAll(/\b(?:test|it|describe)\(\s*(["`])(.*?)\1/g)].map((match) => match[2]);
    assert.ok(
      titles.some((each) => each.includes(title)),
      `${file} has no test "${title}"`,
    );
  }
});

test("every promise to a driver names a test", () => {
  const section = page.split(/^## /m).find((each) => each.startsWith("What a hostile device cannot do"));
  assert.ok(section !== undefined);
  for (const promise of section.split(/^- /m).slice(1)) assert.match(promise, /`test\//, promise.slice(0, 60));
});
