/** Text in columns. */

import { stripVTControlCharacters } from "node:util";

/**
 * The rows with their cells padded to columns, two spaces between them, nothing behind the last cell.
 * `alignment` has a letter per column: `l` left, `r` right. Colours do not count as width.
 */
export function columns(alignment: string, rows: readonly (readonly string[])[]): string[] {
  const widths = Array.from(alignment, (_, i) => Math.max(0, ...rows.map((row) => width(row[i] ?? ""))));
  return rows.map((row) =>
    row
      .map((cell, i) => {
        const blanks = " ".repeat(widths[i] - width(cell));
        return alignment[i] === "r" ? blanks + cell : cell + blanks;
      })
      .join("  ")
      .trimEnd(),
  );
}

function width(cell: string): number {
  return stripVTControlCharacters(cell).length;
}
