/** The drawing of a virtqueue's memory: all queues, the areas of one, and the fields of each area. */

import type { LayoutArea, LayoutField, VirtqueueLayout } from "../virtqueue/layout.js";
import { element, escapeText, polygon, polyline, rect, text } from "./svg.js";

const MARGIN = 28;
const BODY_TOP = 132;
const ROW_PITCH = 112;
const BAND_TOP = 34; // of a row: below its heading
const BAND_HEIGHT = 40;
const COLUMN_WIDTH = 140;
const ZOOM_WIDTH = 56; // between a column and what it opens into
const QUEUE_WIDTH = 96;
const QUEUE_HEIGHT = 40;
const BREAK_SIZE = 44; // of the torn place that stands for left-out elements
const SEGMENT_MIN_HEIGHT = 60;
const PADDING_HEIGHT = 20;
const DIGIT_WIDTH = 6.7; // of the offset labels
const TORN = "torn"; // class of the strokes of a tear
const HEADING_WIDTH = 720; // room that the heading of a row needs

const WRITERS = {
  driver: "written by the driver",
  device: "written by the device",
  both: "written by driver and device",
} as const;

const SECTION = { split: "virtio 1.3, 2.7", packed: "virtio 1.3, 2.8" } as const;

/** The drawing as a complete SVG document. The same layout gives the same bytes. */
export function layoutSvg(layout: VirtqueueLayout): string {
  const { areas } = layout;
  const several = layout.numQueues > 1;
  const queuesX = MARGIN + labelWidth(layout.totalSize);
  const columnX = several
    ? queuesX + QUEUE_WIDTH + ZOOM_WIDTH + labelWidth(layout.endOffset)
    : MARGIN + labelWidth(layout.endOffset);
  const rowsX = columnX + COLUMN_WIDTH + ZOOM_WIDTH;
  const rows = areas.map((area, i) => drawRow(area, rowsX, BODY_TOP + i * ROW_PITCH));
  const column = drawColumn(layout, areas, columnX, BODY_TOP, areas.length * ROW_PITCH - 24);

  const width = Math.ceil(
    Math.max(rowsX + HEADING_WIDTH, ...rows.map((row) => row.right + labelWidth(layout.endOffset) / 2)) + MARGIN,
  );
  const queues = several ? drawQueues(layout, queuesX, BODY_TOP) : { svg: "", bottom: 0 };
  const bottom = Math.max(column.bottom, queues.bottom, BODY_TOP + areas.length * ROW_PITCH - 24);
  const height = bottom + 52;

  const format = layout.packed ? "packed" : "split";
  const queueCount = several ? `${layout.numQueues} queues of ${bytes(layout.endOffset)}` : bytes(layout.endOffset);
  const facts = `${counted(layout.queueSize, "descriptor")} · ${queueCount} · ${SECTION[format]}`;
  const title = `${format === "packed" ? "Packed" : "Split"} virtqueue`;
  const described = areas.map((area) => `${area.name}, ${WRITERS[area.writer]}, at ${area.offset}`).join("; ");
  const zooms = [
    ...(several
      ? [
          zoom(
            "queue",
            queuesX + QUEUE_WIDTH,
            [BODY_TOP, BODY_TOP + QUEUE_HEIGHT],
            columnX - labelWidth(layout.endOffset) + 4,
            [BODY_TOP, column.bottom],
          ),
        ]
      : []),
    ...areas.map((area, i) => {
      const top = BODY_TOP + i * ROW_PITCH + BAND_TOP;
      return zoom(area.writer, columnX + COLUMN_WIDTH, column.edges[i], rowsX, [top, top + BAND_HEIGHT]);
    }),
  ];

  const body = [queues.svg, column.svg, ...rows.map((row) => row.svg)];
  const isTorn = body.some((part) => part.includes(`class="${TORN}"`));
  const scale = isTorn ? "Not to scale: torn edges stand for what is left out." : "Not to scale.";
  const content = [
    element("title", {}, escapeText(`${title}, ${facts}`)),
    element("desc", {}, escapeText(`Memory of one queue, ${bytes(layout.endOffset)}: ${described}.`)),
    element("style", {}, STYLE),
    HATCH,
    rect(0.5, 0.5, width - 1, height - 1, "card", 10),
    text(MARGIN, 46, "title", title),
    text(MARGIN, 70, "facts", facts),
    legend(MARGIN, 98, areas),
    ...zooms,
    ...body,
    text(MARGIN, height - 20, "note", `Offsets in bytes from the start of a queue. ${scale}`),
  ];
  const root = { xmlns: "http://www.w3.org/2000/svg", width, height, viewBox: `0 0 ${width} ${height}`, role: "img" };
  return `${element("svg", root, `\n${content.filter((line) => line !== "").join("\n")}\n`)}\n`;
}

/** The queues one behind the other, the first of which the rest of the drawing opens. */
function drawQueues(layout: VirtqueueLayout, x: number, top: number): { svg: string; bottom: number } {
  const out: string[] = [];
  let y = top;
  for (const i of shownIndices(layout.numQueues)) {
    if (i === undefined) {
      out.push(rect(x, y, QUEUE_WIDTH, BREAK_SIZE, "queue-fill"), tornAcross(x, y, QUEUE_WIDTH));
      y += BREAK_SIZE;
      continue;
    }
    out.push(
      rect(x, y, QUEUE_WIDTH, QUEUE_HEIGHT, "cell queue"),
      text(x + QUEUE_WIDTH / 2, y + 25, "name", `queue ${i}`),
    );
    out.push(offsetLeft(x, y, i * layout.endOffset));
    y += QUEUE_HEIGHT;
  }
  out.push(offsetLeft(x, y, layout.totalSize));
  return { svg: out.join("\n"), bottom: y };
}

/** One queue as a column of areas; `edges` are the top and bottom of each area. */
function drawColumn(
  layout: VirtqueueLayout,
  areas: readonly LayoutArea[],
  x: number,
  top: number,
  height: number,
): { svg: string; edges: readonly (readonly [number, number])[]; bottom: number } {
  const gaps = areas.map((area, i) => (areas[i + 1]?.offset ?? layout.endOffset) - area.offset - area.size);
  const spare = height - SEGMENT_MIN_HEIGHT * areas.length - PADDING_HEIGHT * gaps.filter((gap) => gap > 0).length;
  const weights = areas.map((area) => Math.sqrt(area.size));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  const heights = weights.map((weight) => SEGMENT_MIN_HEIGHT + (spare * weight) / total);
  const finest = Math.min(...areas.map((area, i) => area.size / heights[i]));

  const out: string[] = [];
  const edges: (readonly [number, number])[] = [];
  let y = top;
  for (const [i, area] of areas.entries()) {
    const bottom = y + heights[i];
    out.push(rect(x, y, COLUMN_WIDTH, heights[i], `cell ${area.writer}`), offsetLeft(x, y, area.offset));
    const isTorn = area.size / heights[i] > 2 * finest;
    const middle = y + heights[i] / 2 - (isTorn ? 6 : 0);
    out.push(text(x + COLUMN_WIDTH / 2, middle - 2, "name", area.name.replace(/:.*/, "")));
    out.push(text(x + COLUMN_WIDTH / 2, middle + 14, "size", bytes(area.size)));
    if (isTorn) out.push(tornEdge(x, bottom - 14, COLUMN_WIDTH));
    edges.push([y, bottom]);
    y = bottom;
    if (gaps[i] > 0) {
      out.push(rect(x, y, COLUMN_WIDTH, PADDING_HEIGHT, "cell padding"), offsetLeft(x, y, area.offset + area.size));
      y += PADDING_HEIGHT;
    }
  }
  out.push(offsetLeft(x, y, layout.endOffset));
  return { svg: out.join("\n"), edges, bottom: y };
}

/** One area with its fields side by side. */
function drawRow(area: LayoutArea, x: number, top: number): { svg: string; right: number } {
  const y = top + BAND_TOP;
  const out: string[] = [];
  const facts = `${bytes(area.size)}, aligned to ${area.align}, ${WRITERS[area.writer]}`;
  out.push(
    element(
      "text",
      { x, y: top + 22, class: "heading" },
      `${escapeText(capital(area.name))}${element("tspan", { class: "facts", dx: 12 }, escapeText(facts))}`,
    ),
  );
  let left = x;
  let end = area.offset;
  for (const field of area.fields) {
    const label = field.name.replace(/^.*\./, "");
    if (field.count === undefined) {
      out.push(cell(left, y, cellWidth(field.elementSize), area.writer, label), offsetBelow(left, y, field.offset));
      left += cellWidth(field.elementSize);
    } else {
      for (const i of shownIndices(field.count)) {
        if (i === undefined) {
          const resumes = field.offset + (field.count - 1) * field.elementSize;
          const width = Math.max(BREAK_SIZE, labelWidth(resumes));
          out.push(rect(left, y, width, BAND_HEIGHT, `fill ${area.writer}`), torn(left, y, width));
          out.push(offsetBelow(left, y, field.offset + 2 * field.elementSize));
          left += width;
        } else {
          const drawn = drawElement(field, label, i, left, y, area.writer);
          out.push(drawn.svg);
          left = drawn.right;
        }
      }
    }
    end = field.offset + field.elementSize * (field.count ?? 1);
  }
  if (end < area.offset + area.size) {
    out.push(rect(left, y, cellWidth(2), BAND_HEIGHT, "cell padding"), offsetBelow(left, y, end));
    left += cellWidth(2);
  }
  out.push(offsetBelow(left, y, area.offset + area.size));
  return { svg: out.join("\n"), right: left };
}

/** One element of an array: a cell, or a name over the cells of its members. */
function drawElement(
  field: LayoutField,
  label: string,
  index: number,
  left: number,
  y: number,
  writer: string,
): { svg: string; right: number } {
  const offset = field.offset + index * field.elementSize;
  const name = `${label}[${index}]`;
  if (field.members.length === 0) {
    const isRequest = field.type.startsWith("u8");
    const width = isRequest ? 120 : Math.max(cellWidth(field.elementSize), 12 + name.length * 7);
    const size = isRequest ? bytes(field.elementSize) : undefined;
    return { svg: cell(left, y, width, writer, name, size) + offsetBelow(left, y, offset), right: left + width };
  }
  const out: string[] = [];
  let x = left;
  for (const member of field.members) {
    const width = cellWidth(member.size);
    out.push(rect(x, y + BAND_HEIGHT / 2, width, BAND_HEIGHT / 2, `cell ${writer}`));
    out.push(text(x + width / 2, y + BAND_HEIGHT - 6, "member", member.name));
    out.push(offsetBelow(x, y, offset + member.offset));
    x += width;
  }
  out.unshift(rect(left, y, x - left, BAND_HEIGHT / 2, `cell ${writer}`));
  out.push(text((left + x) / 2, y + 14.5, "name", name));
  return { svg: out.join("\n"), right: x };
}

/** A field; a name that is too long for the cell is broken after its underscore. */
function cell(x: number, y: number, width: number, writer: string, name: string, second?: string): string {
  const box = rect(x, y, width, BAND_HEIGHT, `cell ${writer}`);
  const middle = x + width / 2;
  const [upper, lower] =
    second !== undefined ? [name, second] : name.length * 7 > width ? name.split(/(?<=_)/) : [name];
  if (lower === undefined) return box + text(middle, y + 24.5, "name", upper);
  const lowerClass = second === undefined ? "name" : "size";
  return box + text(middle, y + 17.5, "name", upper) + text(middle, y + 32, lowerClass, lower);
}

function legend(x: number, y: number, areas: readonly LayoutArea[]): string {
  const out: string[] = [];
  let left = x;
  const writers = (["driver", "device", "both"] as const).filter((who) => areas.some((area) => area.writer === who));
  const entries = [...writers.map((who) => [who, WRITERS[who]] as const), ["padding", "padding"] as const];
  for (const [className, label] of entries) {
    out.push(rect(left, y - 11, 22, 14, `cell ${className}`, 2), text(left + 30, y, "legend", label));
    left += 30 + label.length * 6.9 + 26;
  }
  return out.join("\n");
}

/** Which elements of an array to draw; undefined is the place where the others are left out. */
function shownIndices(count: number): (number | undefined)[] {
  return count <= 3 ? Array.from({ length: count }, (_, i) => i) : [0, 1, undefined, count - 1];
}

/** The faint shape between a piece and its enlargement. */
function zoom(
  className: string,
  fromX: number,
  [fromTop, fromBottom]: readonly [number, number],
  toX: number,
  [toTop, toBottom]: readonly [number, number],
): string {
  const corners = [
    [fromX, fromTop] as const,
    [toX, toTop] as const,
    [toX, toBottom] as const,
    [fromX, fromBottom] as const,
  ];
  return polygon(corners, `zoom ${className}`);
}

/** A place of a band where elements are left out: dots between two tears. */
function torn(x: number, y: number, width: number): string {
  const tear = (left: number): string =>
    tornStrip(
      zigzag(y - 1, BAND_HEIGHT + 2, 6).map(([along, across]) => [left + across, along] as const),
      [4, 0],
    );
  return tear(x + 6) + tear(x + width - 15) + text(x + width / 2, y + 23, "name", "…");
}

/** The same across a column. */
function tornAcross(x: number, y: number, width: number): string {
  return tornEdge(x, y + 6, width) + tornEdge(x, y + BREAK_SIZE - 15, width) + text(x + width / 2, y + 26, "name", "…");
}

/** A tear across a column that is drawn shorter than its neighbours. */
function tornEdge(x: number, y: number, width: number): string {
  return tornStrip(
    zigzag(x - 1, width + 2, 12).map(([along, across]) => [along, y + across] as const),
    [0, 4],
  );
}

/** Both sides of a tear along `points`, and the paper that shows between them. */
function tornStrip(points: readonly (readonly [number, number])[], [dx, dy]: readonly [number, number]): string {
  const other = points.map(([x, y]) => [x + dx, y + dy] as const);
  return polygon([...points, ...other.toReversed()], "paper") + polyline(points, TORN) + polyline(other, TORN);
}

/** Points of a zigzag that runs from `start` over `length` in so many teeth. */
function zigzag(start: number, length: number, teeth: number): (readonly [along: number, across: number])[] {
  return Array.from({ length: teeth + 1 }, (_, i) => [start + (i * length) / teeth, i % 2 === 0 ? 0 : 5] as const);
}

function offsetLeft(x: number, y: number, offset: number): string {
  return polyline([[x - 6, y] as const, [x, y] as const], "tick") + text(x - 10, y + 4, "offset end", String(offset));
}

function offsetBelow(x: number, y: number, offset: number): string {
  const bottom = y + BAND_HEIGHT;
  return (
    polyline([[x, bottom] as const, [x, bottom + 5] as const], "tick") + text(x, bottom + 17, "offset", String(offset))
  );
}

function cellWidth(size: number): number {
  return 36 + 6 * size;
}

function labelWidth(offset: number): number {
  return 14 + String(offset).length * DIGIT_WIDTH;
}

function bytes(count: number): string {
  return counted(count, "byte");
}

function counted(count: number, what: string): string {
  return `${count} ${what}${count === 1 ? "" : "s"}`;
}

function capital(words: string): string {
  return words.slice(0, 1).toUpperCase() + words.slice(1);
}

const HATCH =
  '<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">' +
  '<rect class="hatch-ground" width="6" height="6"/><rect class="hatch-line" width="1.5" height="6"/></pattern></defs>';

// Classes, not custom properties: the tools that print SVG know no var(). Each drawing brings its own ground, so
// that it reads on a light and on a dark page.
const STYLE = `
text { font-family: ui-sans-serif, system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; }
.title { font-size: 21px; font-weight: 700; }
.heading { font-size: 14px; font-weight: 600; }
.facts { font-size: 13px; font-weight: 400; fill: #59636e; }
.legend, .note { font-size: 12px; fill: #59636e; }
.name, .member { font-size: 11.5px; text-anchor: middle; font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.member { font-size: 11px; }
.size { font-size: 11.5px; text-anchor: middle; fill: #59636e; }
.offset { font-size: 10.5px; text-anchor: middle; fill: #59636e; font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.end { text-anchor: end; }
.card { stroke: #d1d9e0; }
.cell { stroke-width: 1.2; }
.driver { fill: #dbe9fb; stroke: #2f6fbd; }
.device { fill: #fde5cc; stroke: #b8621b; }
.both { fill: #e8def8; stroke: #7350b0; }
.queue, .queue-fill { fill: #eef1f4; stroke: #6e7781; }
.padding { fill: url(#hatch); stroke: #8c959f; }
.fill, .queue-fill, .zoom { stroke: none; }
.zoom { opacity: 0.42; }
.tick { fill: none; stroke: #8c959f; }
.torn { fill: none; stroke: #59636e; }
.card, .paper { fill: #ffffff; }
.hatch-ground { fill: #f6f8fa; } .hatch-line { fill: #b7c0c9; }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3; }
.facts, .legend, .note, .size, .offset { fill: #9da7b3; }
.card, .paper { fill: #0d1117; } .card { stroke: #3d444d; }
.driver { fill: #12355b; stroke: #6cb0ff; }
.device { fill: #55330f; stroke: #f0a35e; }
.both { fill: #3a2a63; stroke: #b79af5; }
.queue, .queue-fill { fill: #21262d; stroke: #8b949e; }
.fill, .queue-fill, .zoom { stroke: none; }
.tick { stroke: #6e7681; } .torn { stroke: #9da7b3; }
.hatch-ground { fill: #161b22; } .hatch-line { fill: #4b535d; }
}
`;
