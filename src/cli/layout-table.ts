/** A virtqueue's layout as text: a table of its areas and fields. */

import type { LayoutArea, LayoutField, VirtqueueLayout } from "../virtqueue/layout.js";
import { columns } from "./table.js";
import { styled } from "./terminal.js";

const WRITER_STYLE = { driver: "blue", device: "yellow", both: "magenta" } as const;

/** One line: format, descriptors, bytes. */
export function layoutSummary(layout: VirtqueueLayout): string {
  const format = layout.packed ? "packed" : "split";
  const queue = `${format} virtqueue of ${counted(layout.queueSize, "descriptor")}, ${counted(layout.endOffset, "byte")}`;
  if (layout.numQueues === 1) return queue;
  return `${queue}; ${layout.numQueues} queues, the next every ${layout.endOffset} bytes, ${layout.totalSize} bytes in all`;
}

/** Offset, size and alignment of each area of one queue, and with `fields` of each field, as lines. */
export function layoutTable(layout: VirtqueueLayout, { fields }: { fields: boolean }): string[] {
  const rows: string[][] = [["offset", "size", "align", "written by", ""]];
  let end = 0;
  for (const area of layout.areas) {
    rows.push(...padding(end, area.offset, ""), areaRow(area));
    end = area.offset + area.size;
    if (!fields) continue;
    for (const field of area.fields) rows.push(...fieldRows(field));
    const last = area.fields[area.fields.length - 1];
    rows.push(...padding(last.offset + sizeOf(last), end, "  "));
  }
  rows.push(...padding(end, layout.endOffset, ""), [String(layout.endOffset), "", "", "", "end"]);
  return columns("rrrll", rows);
}

function areaRow(area: LayoutArea): string[] {
  const writer = area.writer === "both" ? "both" : `the ${area.writer}`;
  return [
    String(area.offset),
    String(area.size),
    String(area.align),
    styled(process.stdout, WRITER_STYLE[area.writer], writer),
    styled(process.stdout, "bold", area.name),
  ];
}

/** The field, and below it the members of one element with their offsets in it. */
function fieldRows(field: LayoutField): string[][] {
  const count = field.count === undefined ? "" : `[${field.count}]`;
  const row = (offset: string, size: number, align: number, what: string): string[] => [
    ...[offset, String(size), String(align), "", what],
  ];
  return [
    row(String(field.offset), sizeOf(field), field.align, `  ${field.type} ${field.name}${count}`),
    ...field.members.map((m) => row(`+${m.offset}`, m.size, m.size, `    ${m.type} ${m.name}`)),
  ];
}

function padding(from: number, to: number, indent: string): string[][] {
  return from < to ? [[String(from), String(to - from), "", "", `${indent}padding`]] : [];
}

function sizeOf(field: LayoutField): number {
  return field.elementSize * (field.count ?? 1);
}

function counted(count: number, what: string): string {
  return `${count} ${what}${count === 1 ? "" : "s"}`;
}
