/** Writes the results of a benchmark: to the terminal, and as Markdown into bench/results/. */

import { mkdirSync, writeFileSync } from "node:fs";
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

/** The middle of the values. */
export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)];
}

/** Smallest to largest value. */
export function spread(values: readonly number[], digits = 1): string {
  return `${Math.min(...values).toFixed(digits)} to ${Math.max(...values).toFixed(digits)}`;
}

/** Print a result and keep it in `bench/results/NAME.md`. */
export function writeResult(name: string, result: Result): void {
  const { title, command, text, columns, rows, notes = [] } = result;
  const line = (cells: readonly string[]): string => `| ${cells.join(" | ")} |`;
  const machine = `Node.js ${process.version}, ${arch()}, ${cpus().length} × ${cpus()[0].model}, Linux ${release()}.`;
  const markdown = [
    ...[`# ${title}`, "", `Made by \`${command}\`; not edited by hand. ${machine}`, "", text, ""],
    ...[line(columns), line(columns.map(() => "---")), ...rows.map(line)],
    ...notes.flatMap((note) => ["", note]),
    "",
  ].join("\n");
  const folder = join(import.meta.dirname, "..", "..", "bench", "results");
  mkdirSync(folder, { recursive: true });
  writeFileSync(join(folder, `${name}.md`), markdown);
  process.stdout.write(markdown);
}
