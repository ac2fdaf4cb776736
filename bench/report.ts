/** Writes the results of a benchmark: to the terminal, and as Markdown into bench/results/. */

import { spawnSync } from "node:child_process";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { arch, cpus, release } from "node:os";
import { join } from "node:path";

/** A table of results. */
export interface Result {
  readonly title: string;
  /** The command that made it. */
  readonly command: string;
  readonly text: string;
  readonly columns: readonly string[];
  readonly rows: readonly (readonly string[])[];
  readonly notes?: readonly string[];
}

const ROOT = join(import.meta.dirname, "..", "..");

/** Where results are kept. */
export const RESULTS = join(ROOT, "bench", "results");

/** The middle of the values. */
export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)];
}

/** Smallest to largest value. */
export function spread(values: readonly number[], digits = 1): string {
  return `${Math.min(...values).toFixed(digits)} to ${Math.max(...values).toFixed(digits)}`;
}

/** Rows of a table in Markdown, the cells behind the first `words` to the right. */
export function table(
  columns: readonly string[],
  rows: readonly (readonly string[])[],
  words = columns.length,
): string[] {
  const line = (cells: readonly string[]): string => `| ${cells.join(" | ")} |`;
  return [line(columns), line(columns.map((_, i) => (i < words ? "---" : "---:"))), ...rows.map(line)];
}

/** The machine in a few words. */
export function machine(): string {
  const isVirtual = /^flags.*\bhypervisor\b/m.test(readFileSync("/proc/cpuinfo", "utf8"));
  const [{ model }] = cpus();
  return `${cpus().length} × ${model}${isVirtual ? " (virtual machine)" : ""}, ${arch()}, Linux ${release()}`;
}

/** When, by which command, of which version and on which machine something was made; a line. */
export function provenance(command: string, programs: readonly string[] = []): string {
  const date = new Date().toISOString().slice(0, 10);
  const { status, stdout } = spawnSync("git", ["describe", "--always", "--dirty"], { cwd: ROOT, encoding: "utf8" });
  const version = status === 0 ? ` at ${stdout.trim()}` : "";
  const versions = [`Node.js ${process.version}`, ...programs].join(", ");
  return `Made by \`${command}\`${version} on ${date}; not edited by hand. ${machine()}. ${versions}.`;
}

/** Keep a report in `FOLDER/NAME.md`, and print it. */
export function writeReport(folder: string, name: string, lines: readonly string[]): void {
  const markdown = `${lines.join("\n")}\n`;
  mkdirSync(folder, { recursive: true });
  writeFileSync(join(folder, `${name}.md`), markdown);
  process.stdout.write(markdown);
}

/** Print a result and keep it in `bench/results/NAME.md`. */
export function writeResult(name: string, result: Result): void {
  const { title, command, text, columns, rows, notes = [] } = result;
  writeReport(RESULTS, name, [
    ...[`# ${title}`, "", provenance(command), "", text, "", ...table(columns, rows)],
    ...notes.flatMap((note) => ["", note]),
  ]);
}
