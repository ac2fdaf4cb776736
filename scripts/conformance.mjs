// Writes docs/conformance.md: every requirement of the specifications, and the tests whose titles carry its id.
// With --check it writes nothing and fails when the page is not up to date. What deviations.json says of a requirement:
//   "why"                 it does not apply here
//   { "open": "why" }     there is no test yet
//   { "review": "what" }  no test can show it; somebody read the code
//   { "deviates": "how" } a test shows what is done instead

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
  const code = readFileSync(file, "utf8").replace(/\/\*[\s\S]*?\*\/|(?<=^|[\s;])\/\/.*$/gm, "");
  for (const [id] of code.matchAll(/\b[A-Z0-9]+-(?:DRV|DEV|FE|BE)-\d{2}\b/g)) {
    if (known.has(id)) testsOf.get(id).add(relative(root, file));
    else strays.push(`${relative(root, file)}: ${id} is no requirement`);
  }
}
for (const [id, words] of Object.entries(deviations)) {
  if (!known.has(id)) strays.push(`deviations.json: ${id} is no requirement`);
  else if (testsOf.get(id).size > 0 !== (words.deviates !== undefined)) {
    strays.push(`deviations.json: ${id} has ${words.deviates === undefined ? "a" : "no"} test`);
  }
}
for (const id of known) {
  if (testsOf.get(id).size === 0 && deviations[id] === undefined) {
    strays.push(`${id} has no test, and deviations.json does not say why`);
  }
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
  const count = (kind) => Object.values(deviations).filter((words) => kindOf(words) === kind).length;
  const tested = [...testsOf.values()].filter((files) => files.size > 0).length - count("deviates");
  const lines = [
    "# Conformance",
    "",
    "Every requirement that virtio 1.3 and vhost-user put on a driver or front-end (`-DRV`, `-FE`) and on a device",
    "or back-end (`-DEV`, `-BE`), paraphrased, with the test files in which a test carries its id. Written by",
    "`npm run conformance` from the titles of the tests; not edited by hand.",
    "",
    `${known.size} requirements: ${tested} tested ✅, ${count("deviates")} tested to deviate on purpose ⚠️, ` +
      `${count("review")} reviewed 🔎, ${count("inapplicable")} not applicable ➖, ${count("open")} open ❌.`,
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

/** What an entry of deviations.json says: "inapplicable", or its one key. */
function kindOf(words) {
  return typeof words === "string" ? "inapplicable" : Object.keys(words)[0];
}

function state(id) {
  const words = deviations[id];
  const tests = [...testsOf.get(id)].map((file) => `[${file.replace(/^test\//, "")}](../${file})`).join(", ");
  if (words === undefined) return `✅ ${tests}`;
  switch (kindOf(words)) {
    case "deviates":
      return `⚠️ ${words.deviates}: ${tests}`;
    case "review":
      return `🔎 ${words.review}`;
    case "open":
      return `❌ ${words.open}`;
    default:
      return `➖ ${words}`;
  }
}
