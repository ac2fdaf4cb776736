/** What a drawing of the command must be: well-formed, its texts inside and none over another. */

import assert from "node:assert/strict";

/** Every element that is opened is closed, in order, and nothing else looks like markup. */
export function assertWellFormed(svg: string): void {
  const open: string[] = [];
  const rest = svg.replaceAll(
    /<(\/?)([a-z]+)((?: [a-zA-Z0-9]+="[^"<>&]*(?:&[a-z]+;[^"<>&]*)*")*)(\/?)>/g,
    (_, end, name, __, empty) => {
      if (end === "/") assert.equal(open.pop(), name);
      else if (empty === "") open.push(String(name));
      return "";
    },
  );
  assert.deepEqual(open, []);
  assert.doesNotMatch(rest, /[<>]|&(?!amp;|lt;|gt;|quot;)/);
}

/** Where a text stands. */
export interface TextBox {
  readonly content: string;
  readonly left: number;
  readonly right: number;
  readonly top: number;
  readonly bottom: number;
}

/** All texts are inside the drawing, and none is over another. */
export function assertTextsApart(svg: string, texts: readonly TextBox[]): void {
  const [, width, height] = /^<svg [^>]*width="(\d+)" height="(\d+)"/.exec(svg) ?? [];
  for (const [i, a] of texts.entries()) {
    assert.ok(a.left >= 8 && a.right <= Number(width) - 8, `"${a.content}" ends outside`);
    assert.ok(a.top >= 8 && a.bottom <= Number(height) - 8, `"${a.content}" ends outside`);
    for (const b of texts.slice(i + 1)) {
      const apart = a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
      assert.ok(apart, `"${a.content}" overlaps "${b.content}"`);
    }
  }
}

/** Where the texts stand, by the usual width of letters in their size. */
export function textBoxes(svg: string): TextBox[] {
  const sizes: Readonly<Record<string, number>> = {
    title: 21,
    heading: 14,
    facts: 13,
    legend: 12,
    note: 12,
    name: 11.5,
    label: 13,
    tick: 12,
  };
  return [...svg.matchAll(/<text x="([\d.]+)" y="([\d.]+)" class="([a-z]+)(?: (end|middle))?">(.*?)<\/text>/g)].map(
    (match) => {
      const [, x, y, className, anchor, markup] = match;
      const content = markup
        .replaceAll(/<[^>]*>/g, "  ")
        .trim()
        .replaceAll(/&[a-z]+;/g, "&");
      const size = sizes[className] ?? 11;
      const width = content.length * size * 0.6;
      const isMiddle = anchor === "middle" || ["name", "member", "size", "offset"].includes(className);
      const left = Number(x) - (anchor === "end" ? width : isMiddle ? width / 2 : 0);
      return { content, left, right: left + width, top: Number(y) - size * 0.75, bottom: Number(y) + size * 0.2 };
    },
  );
}
