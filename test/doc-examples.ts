/**
 * Finds the examples in doc comments and Markdown, and makes programs of them.
 *
 * An example is a block fenced by ```ts: after `@example` in a doc comment of src, or anywhere in README.md,
 * CONTRIBUTING.md and docs. Each must compile against the package by its own name. Each is run, unless its fence
 * says ```ts no-run. `/run/disk.sock` is a real back-end there, `disk.img` a file of 64 MiB; a `vhost-vdpa:` or
 * `pci:` address becomes `ram:64M`. The comment behind a `console.log(…);` is what it must print, quotes and
 * spaces aside; after a colon it may say why.
 */

import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

/** The root of the package. */
export const ROOT = fileURLToPath(new URL("../../", import.meta.url));

const FOLDER = join(ROOT, "dist", "doc-examples");

/** A fenced block of TypeScript. */
export interface DocExample {
  /** File below the root. */
  readonly file: string;
  /** Line of the fence. */
  readonly line: number;
  readonly code: string;
  readonly isRun: boolean;
}

/** Every example of the project. */
export function findExamples(): DocExample[] {
  const below = (folder: string, extension: string): string[] =>
    readdirSync(join(ROOT, folder), { recursive: true, encoding: "utf8" })
      .filter((name) => name.endsWith(extension))
      .map((name) => join(folder, name))
      .sort();
  const read = (file: string): string => readFileSync(join(ROOT, file), "utf8");
  return [
    ...below("src", ".ts").flatMap((file) => examplesOf(file, docComments(read(file)))),
    ...["README.md", "CONTRIBUTING.md", ...below("docs", ".md")].flatMap((file) => examplesOf(file, read(file))),
  ];
}

/** The examples in `text`, which is Markdown. */
export function examplesOf(file: string, text: string): DocExample[] {
  const examples: DocExample[] = [];
  for (const match of text.matchAll(/^( *)```ts\b([^\n]*)\n([\s\S]*?)^ *```/gm)) {
    const line = text.slice(0, match.index).split("\n").length;
    examples.push({ file, line, code: match[3], isRun: !match[2].includes("no-run") });
  }
  return examples;
}

/** `source` with everything blank that is no doc comment, and the stars gone; lines stay where they are. */
function docComments(source: string): string {
  const blank = (text: string): string => text.replaceAll(/[^\n]/g, "");
  let out = "";
  let end = 0;
  for (const match of source.matchAll(/\/\*\*[\s\S]*?\*\//g)) {
    out += blank(source.slice(end, match.index)) + match[0].replaceAll(/^ *(\/\*\*|\*\/|\* ?)/gm, "");
    end = match.index + match[0].length;
  }
  return out;
}

/** The lines that the example says it prints, in order. */
export function expectedOutput(code: string): string[] {
  return [...code.matchAll(/console\.log\(.*\);[ \t]*(?:\n[ \t]*)?\/\/ (.*)$/gm)].map((match) => match[1]);
}

/** Whether `stdout` has these lines in this order, others between them. Returns the first that is missing. */
export function missingOutput(stdout: string, expected: readonly string[]): string | undefined {
  const lines = stdout.split("\n").map(normal);
  let from = 0;
  for (const line of expected) {
    const wanted = [normal(line), normal(line.replace(/: .*/, ""))];
    const at = lines.findIndex((printed, i) => i >= from && wanted.includes(printed));
    if (at === -1) return line;
    from = at + 1;
  }
  return undefined;
}

function normal(line: string): string {
  return line.replaceAll(/["'\s]/g, "");
}

/** The name of the program made of an example, without extension. */
function programName({ file, line }: DocExample): string {
  return `${file.replaceAll(/[^a-zA-Z0-9-]+/g, "_")}.line${line}`;
}

/** Write the examples as programs with a tsconfig, and return its path. Line numbers are those of the source. */
export function writePrograms(examples: readonly DocExample[]): string {
  rmSync(FOLDER, { recursive: true, force: true });
  mkdirSync(FOLDER, { recursive: true });
  for (const example of examples) {
    const code = `${"\n".repeat(example.line)}${example.code}\nexport {};\n`;
    writeFileSync(join(FOLDER, `${programName(example)}.ts`), code);
  }
  const config = join(FOLDER, "tsconfig.json");
  const compilerOptions = { rootDir: ".", outDir: "out", noUnusedLocals: false, declaration: false, sourceMap: false };
  writeFileSync(config, JSON.stringify({ extends: "../../tsconfig.json", compilerOptions, include: ["*.ts"] }));
  return config;
}

/** Point the addresses of a compiled example at what the test provides, and return the path of the program. */
export function preparedProgram(example: DocExample, socketPath: string): string {
  const path = join(FOLDER, "out", `${programName(example)}.js`);
  const code = readFileSync(path, "utf8");
  const prepared = code
    .replaceAll("/run/disk.sock", socketPath)
    .replaceAll(/(["'`])(?:vhost-vdpa|pci):[^"'`]*\1/g, "$1ram:64M$1");
  writeFileSync(path, prepared);
  return path;
}

/** Whether the example connects to the back-end at `/run/disk.sock`. */
export function wantsBackend({ code }: DocExample): boolean {
  return code.includes("/run/disk.sock");
}
