/** A virtqueue's areas side by side in a row of boxes, for terminals. */

import type { VirtqueueLayout } from "../virtqueue/layout.js";

const WRITERS = { driver: "driver writes", device: "device writes", both: "both write" } as const;

/** The areas of one queue as lines: offsets above, a box for each area with its size and who writes it. */
export function layoutBand(layout: VirtqueueLayout): string[] {
  const boxes = layout.areas.map((area) => {
    const texts = [
      area.name.replace(/:.*/, ""),
      area.name.replace(/^.*: /, ""),
      `${area.size} bytes`,
      WRITERS[area.writer],
    ];
    const width = Math.max(...texts.map((text) => text.length)) + 2;
    return { offset: area.offset, width, texts };
  });
  const rule = (left: string, middle: string, right: string): string =>
    left + boxes.map(({ width }) => "─".repeat(width)).join(middle) + right;
  const offsets = boxes.map(({ offset, width }) => String(offset).padEnd(width + 1)).join("") + layout.deviceAreaEnd;
  const lines = [0, 1, 2, 3].map(
    (line) => `│${boxes.map(({ texts, width }) => ` ${texts[line]}`.padEnd(width)).join("│")}│`,
  );
  return [offsets, rule("┌", "┬", "┐"), ...lines, rule("└", "┴", "┘")];
}
