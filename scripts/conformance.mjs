// Writes docs/conformance.md: every requirement of the specifications, and the tests whose titles carry its id.
// With --check it writes nothing and fails when the page is not up to date.

import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join, relative } from "node:path";
import { fileURLToPath } from "node:url";

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const page = join(root, "docs", "conformance.md");
const groups = JSON.parse(readFileSync(join(root, "docs", "conformance", "requirements.json"), "utf8"));
const deviations = JSON.parse(readFileSync(join(root, "docs", "conformance", "deviations.json"), "utf8"));

const known = new Set(groups.flatMap((group) => group.requirements.map(({ id }) => id)));
const testsOf = new Map([...known].map((id) => [id, new Set()]));
const strays = [];
for (const file of testFiles(join(root, "test"))) {
  const code = readFileSync(file, "utf8").replace(/\/\*[\s\S]*?\*\/|^\s*\/\/.*$/gm, "");
  for (const [id] of code.matchAll(/\b[A-Z0-9]+-(?:DRV|DEV|FE|BE)-\d{2}\b/g)) {
    if (known.has(id)) testsOf.get(id).add(relative(root, file));
    else strays.push(`${relative(root, file)}: ${id} is no requirement`);
  }
}
for (const id of Object.keys(deviations)) {
  if (!known.has(id)) strays.push(`deviations.json: ${id} is no requirement`);
  else if (testsOf.get(id).size > 0) strays.push(`deviations.json: ${id} has a test`);
}
if (strays.length > 0) {
  process.stderr.write(`${strays.join("\n")}\n`);
  process.exit(1);
}

const text = render();
if (process.argv.includes("--check")) {
  if (readFileSync(page, "utf8") !== text) {
    process.stderr.write("docs/conformance.md is out of date; run: npm run conformance\n");
    process.exit(1);
  }
} else {
  writeFileSync(page, text);
}

function testFiles(folder) {
  return readdirSync(folder, { recursive: true })
    .filter((name) => name.endsWith(".test.ts"))
    .sort()
    .map((name) => join(folder, name));
}

function render() {
  const tested = [...testsOf.values()].filter((files) => files.size > 0).length;
  const excused = Object.keys(deviations).length;
  const lines = [
    "# Conformance",
    "",
    "Every requirement that virtio 1.3 and vhost-user put on a driver or front-end (`-DRV`, `-FE`) and on a device",
    "or back-end (`-DEV`, `-BE`), paraphrased, with the test files in which a test carries its id. Written by",
    "`npm run conformance` from the titles of the tests; not edited by hand.",
    "",
    `${known.size} requirements: ${tested} tested, ${excused} not applicable, ${known.size - tested - excused} open.`,
    "",
  ];
  for (const group of groups) {
    lines.push(`## ${group.prefix}: ${group.title}`, "", "| id | clause | requirement | state |", "|---|---|---|---|");
    for (const { id, clause, requirement } of group.requirements) {
      lines.push(`| ${id} | ${clause} | ${requirement} | ${state(id)} |`);
    }
    lines.push("");
  }
  return `${lines.join("\n").trimEnd()}\n`;
}

function state(id) {
  const files = [...testsOf.get(id)];
  if (files.length > 0) return `✅ ${files.map((file) => `[${file.replace(/^test\//, "")}](../${file})`).join(", ")}`;
  return deviations[id] === undefined ? "❌ open" : `➖ ${deviations[id]}`;
}
