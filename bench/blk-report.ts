/** The report of `npm run bench`: a table for each question, and pictures. All of it is computed from the rounds. */

import { chartSvg, type Panel, type Series } from "../src/cli/chart.js";
import { formatBytes, formatCount, formatNs, formatTick } from "../src/cli/format.js";
import {
  ALL_WAYS,
  type Case,
  CHOSEN_WAYS,
  DEPTHS,
  type DiskName,
  FILE_WAYS,
  FS_PROMISE,
  FS_SYNC,
  NBD,
  SIZES,
  SMALL,
  SPLIT_WAYS,
  vhostUser,
  type Way,
} from "./cases.js";
import { machine, table } from "./report.js";
import type { Figure, Results } from "./results.js";

/** Bytes a second that large reads from the file shall reach. */
const TARGET = 5e9;
const LARGE = SIZES[SIZES.length - 1];
/** The depth at which ways are compared. */
const COMPARED = 32;
const NOTHING = "–";

/** What the tables and pictures are made from. */
export interface Measurement {
  readonly results: Results;
  readonly rounds: number;
  /** Milliseconds of each round, and of warming up before it. */
  readonly runMs: number;
  readonly rampMs: number;
  /** What was not measured, and why. */
  readonly missing: readonly string[];
}

/** The report in lines of Markdown, below its heading; `drawn` are the names of the pictures that there are. */
export function blkReport(measurement: Measurement, drawn: readonly string[]): string[] {
  const { results, rounds, runMs, rampMs, missing } = measurement;
  const picture = (name: string, what: string): string[] =>
    drawn.includes(name) ? [`![${what}](${name}.svg)`, ""] : [];
  const compared = ["", ...DEPTHS.map(String), `× NBD at ${COMPARED}`];
  return [
    ...["## In short", "", ...inShort(results).map((line) => `- ${line}`), ""],
    `Random reads throughout. Each figure is the median of ${counted(rounds, "round")} of ${runMs / 1000} s, with the least and`,
    "the most in brackets; the rounds of all cases take turns. Every round is a process of its own, warmed up for",
    `${rampMs / 1000} s. The columns are requests in flight.`,
    "",
    ...["## Requests a second", ""],
    "4 KiB, from qemu-storage-daemon with its null-co driver, which has no storage behind it: this is what the way to",
    "the device costs. By vhost-user on one split virtqueue, the only format that it offers; beside it, the same disk",
    "of the same daemon over NBD on a Unix socket, by fio. The last column has the median in times the best round of",
    `NBD, both with ${COMPARED} in flight.`,
    ...["", ...table(compared, withRatio(results, "null", [...ALL_WAYS, NBD]), 1), ""],
    ...picture("blk-depth", "Requests a second over requests in flight"),
    ...["## Latency", ""],
    "From submission to the moment the program sees the completion, in the same runs: median and 99th percentile.",
    ...["", ...latencyTable(results, [...ALL_WAYS, NBD]), ""],
    ...picture("blk-latency", "Latency over requests in flight"),
    ...["## Processor time of a request", ""],
    "Of the process that asks, asleep whenever nothing has completed (mode `event`); fio for NBD. The daemon's own is",
    "not in it.",
    "",
    ...table(
      ["", ...DEPTHS.map(String)],
      [vhostUser("callback", "event"), vhostUser("promise", "event"), NBD].map((way) => [
        nameOf(way),
        ...DEPTHS.map((depth) => cell(results.figure({ disk: "null", way, size: SMALL, depth }, "cpuNs"), formatNs)),
      ]),
      1,
    ),
    ...["", "## A file in shared memory", ""],
    "4 KiB from a raw file in /dev/shm: by the daemon over vhost-user and over NBD, and by Node.js from the file itself,",
    "with as many calls of `FileHandle.read` in flight or one `fs.readSync` after the other.",
    ...["", ...table(compared, withRatio(results, "file", [...FILE_WAYS, NBD, FS_PROMISE, FS_SYNC]), 1), ""],
    ...picture("blk-file", "Requests a second from a file over requests in flight"),
    ...["## Larger and smaller requests", ""],
    "GB a second (10⁹ bytes) from the same file; `fs.readSync` reads one piece after the other.",
    ...["", ...bytesTable(results, "file", [...CHOSEN_WAYS, NBD, FS_PROMISE, FS_SYNC]), ""],
    ...picture("blk-size", "Bytes a second over the size of a request"),
    ...["## Embedded back-end", ""],
    "The device side of this package on memory, in a process of its own: JavaScript at both ends, packed virtqueues",
    "unless it says split. 4 KiB:",
    ...["", ...table(compared.slice(0, -1), byDepth(results, "embedded", [...ALL_WAYS, ...SPLIT_WAYS]), 1), ""],
    ...picture("blk-embedded", "Requests a second from the embedded back-end over requests in flight"),
    ...["GB a second by size:", ""],
    ...[...bytesTable(results, "embedded", CHOSEN_WAYS), ""],
    ...["## Not measured", ""],
    ...(missing.length === 0 ? ["Nothing is missing."] : missing.map((line) => `- ${line}`)),
  ];
}

/** The pictures: name to SVG. What was not measured is not drawn; a picture without a line is left out. */
export function blkPictures({ results, rounds }: Measurement, date: string): Record<string, string> {
  const facts = [
    machine(),
    `Median of ${counted(rounds, "round")}; pale: from the least to the most. Made by npm run bench, ${date}.`,
  ];
  const overDepth = (disk: DiskName, ways: readonly Way[], name: "iops" | "p50" | "p99"): Panel | undefined =>
    panel(
      seriesOf(
        results,
        ways,
        name,
        DEPTHS.map((depth) => ({ x: depth, disk, size: SMALL, depth })),
      ),
      { label: "requests in flight", domain: [0.85, 150], ticks: DEPTHS, format: String },
      name === "iops"
        ? { label: "requests a second (more is better)", format: formatTick }
        : { label: `latency, ${name === "p50" ? "median" : "99th percentile"} (less is better)`, format: tickNs },
    );
  const bySize = panel(
    seriesOf(
      results,
      [...CHOSEN_WAYS, NBD, FS_PROMISE],
      "iops",
      SIZES.map(({ size, depth }) => ({ x: size, disk: "file", size, depth })),
      (iops, size) => (iops * size) / 1e9,
    ),
    {
      label: "bytes of a request, 32 in flight; 4 at 1 MiB",
      domain: [420, 1.3 * 2 ** 20],
      ticks: SIZES.map(({ size }) => size),
      format: formatBytes,
    },
    { label: "GB/s (more is better)", format: formatTick },
  );
  const latencyWays = [
    vhostUser("callback", "poll"),
    vhostUser("promise", "hybrid"),
    vhostUser("promise", "event"),
    NBD,
  ];
  const pictures: Readonly<Record<string, readonly [title: string, ...(Panel | undefined)[]]>> = {
    "blk-depth": [
      "Random 4 KiB reads from qemu-storage-daemon, null-co",
      overDepth("null", [...ALL_WAYS, NBD], "iops"),
    ],
    "blk-latency": [
      "Latency of random 4 KiB reads, qemu-storage-daemon, null-co",
      overDepth("null", latencyWays, "p50"),
      overDepth("null", latencyWays, "p99"),
    ],
    "blk-file": [
      "Random 4 KiB reads from a file in shared memory",
      overDepth("file", [...FILE_WAYS, NBD, FS_PROMISE, FS_SYNC], "iops"),
    ],
    "blk-size": ["Random reads from a file in shared memory, by size", bySize],
    "blk-embedded": [
      "Random 4 KiB reads from the embedded back-end",
      overDepth("embedded", [...ALL_WAYS, ...SPLIT_WAYS.slice(0, 1)], "iops"),
    ],
  };
  return Object.fromEntries(
    Object.entries(pictures).flatMap(([name, [title, ...panels]]) => {
      const drawn = panels.filter((each) => each !== undefined);
      return drawn.length === 0 ? [] : [[name, chartSvg({ title, facts, panels: drawn })]];
    }),
  );
}

/** The answers that most people want. */
function inShort(results: Results): string[] {
  const at = (way: Way, disk: DiskName = "null"): Case => ({ disk, way, size: SMALL, depth: COMPARED });
  const speed = (what: string, way: Way): string[] => {
    const figure = results.figure(at(way), "iops");
    if (figure === undefined) return [];
    const ratio = ratioOf(figure, results.figure(at(NBD), "iops"));
    return [
      `${what}, ${COMPARED} in flight, null-co: ${formatCount(figure.median)} reads of 4 KiB a second, ${ratio} × NBD.`,
    ];
  };
  const large = CHOSEN_WAYS.flatMap((way) => {
    const figure = results.figure({ disk: "file", way, ...LARGE }, "iops");
    return figure === undefined ? [] : [{ way, bytes: figure.median * LARGE.size }];
  });
  return [
    ...speed("Callbacks, polling", vhostUser("callback", "poll")),
    ...speed("Promises in the default mode", vhostUser("promise", "hybrid")),
    ...speed("Promises, asleep between completions", vhostUser("promise", "event")),
    ...large.map(
      ({ way, bytes }) =>
        `1 MiB from a file in shared memory, ${LARGE.depth} in flight, ${nameOf(way)}: ${formatGb(bytes)}; the aim of ` +
        `${formatGb(TARGET)} is ${bytes >= TARGET ? "reached" : "missed"}.`,
    ),
  ];
}

/** A row for each way: requests a second by depth. */
function byDepth(results: Results, disk: DiskName, ways: readonly Way[]): string[][] {
  return ways.map((way) => [
    nameOf(way),
    ...DEPTHS.map((depth) => cell(results.figure({ disk, way, size: SMALL, depth }, "iops"), formatCount)),
  ]);
}

/** The same, and how many times as much as over NBD. */
function withRatio(results: Results, disk: DiskName, ways: readonly Way[]): string[][] {
  const at = (way: Way): Figure | undefined => results.figure({ disk, way, size: SMALL, depth: COMPARED }, "iops");
  return byDepth(results, disk, ways).map((row, i) => [...row, ratioOf(at(ways[i]), at(NBD))]);
}

function latencyTable(results: Results, ways: readonly Way[]): string[] {
  const rows = ways.map((way) => [
    nameOf(way),
    ...DEPTHS.map((depth) => {
      const each: Case = { disk: "null", way, size: SMALL, depth };
      const half = results.figure(each, "p50");
      const most = results.figure(each, "p99");
      return half === undefined || most === undefined ? NOTHING : `${formatNs(half.median)} / ${formatNs(most.median)}`;
    }),
  ]);
  return table(["", ...DEPTHS.map(String)], rows, 1);
}

function bytesTable(results: Results, disk: DiskName, ways: readonly Way[]): string[] {
  const rows = ways.map((way) => [
    nameOf(way),
    ...SIZES.map(({ size, depth }) => {
      // One call after the other is never more than one in flight.
      const figure = results.figure({ disk, way, size, depth: way === FS_SYNC ? 1 : depth }, "iops");
      return cell(figure, (iops) => ((iops * size) / 1e9).toPrecision(3));
    }),
  ]);
  const columns = SIZES.map(({ size, depth }) => `${formatBytes(size)}, ${depth} in flight`);
  return table(["", ...columns], rows, 1);
}

function cell(figure: Figure | undefined, format: (value: number) => string): string {
  if (figure === undefined) return NOTHING;
  return `${format(figure.median)} (${format(figure.low)}–${format(figure.high)})`;
}

/** How many times as much as the best round of something that goes up and down more. */
function ratioOf(figure: Figure | undefined, base: Figure | undefined): string {
  return figure === undefined || base === undefined ? NOTHING : (figure.median / base.high).toFixed(1);
}

function formatGb(bytes: number): string {
  return `${(bytes / 1e9).toPrecision(3)} GB/s`;
}

function tickNs(ns: number): string {
  return formatNs(ns).replace(/\.0+ /, " ");
}

function counted(count: number, what: string): string {
  return count === 1 ? `1 ${what}` : `${count} ${what}s`;
}

/** A way in words. */
function nameOf(way: Way): string {
  if (way.by === "nbd") return "NBD, by fio";
  if (way.by === "fs") return way.api === "sync" ? "fs.readSync" : "FileHandle.read";
  const mode = way.mode === "poll" ? "polling" : way.mode;
  return `${way.api}s, ${mode}${way.packed ? "" : ", split"}`;
}

/** Colours tell the mode, marks and dashes the interface. */
function styleOf(way: Way): Pick<Series, "colour" | "mark" | "isDashed"> {
  if (way.by === "nbd") return { colour: "grey", mark: "diamond" };
  if (way.by === "fs")
    return way.api === "sync" ? { colour: "gold", mark: "triangle" } : { colour: "purple", mark: "triangle" };
  const colours = { poll: "blue", hybrid: "orange", event: "green" } as const;
  if (!way.packed) return { colour: "gold", mark: "triangle" };
  return way.api === "callback"
    ? { colour: colours[way.mode], mark: "circle" }
    : { colour: colours[way.mode], mark: "square", isDashed: true };
}

/** The places of a line: where on the x axis, and what was measured there. */
type Places = readonly (Omit<Case, "way"> & { readonly x: number })[];

function seriesOf(
  results: Results,
  ways: readonly Way[],
  name: "iops" | "p50" | "p99",
  places: Places,
  convert: (value: number, size: number) => number = (value) => value,
): Series[] {
  return ways.flatMap((way) => {
    const points = places.flatMap(({ x, ...place }) => {
      const figure = results.figure({ ...place, way }, name);
      if (figure === undefined) return [];
      const { median, low, high } = figure;
      return [{ x, y: convert(median, place.size), low: convert(low, place.size), high: convert(high, place.size) }];
    });
    return points.length === 0 ? [] : [{ name: nameOf(way), points, ...styleOf(way) }];
  });
}

/** Lines on logarithmic axes; undefined without any. */
function panel(
  series: readonly Series[],
  x: Omit<Panel["x"], "scale">,
  y: Omit<Panel["y"], "scale" | "domain">,
): Panel | undefined {
  const values = series.flatMap(({ points }) =>
    points.flatMap((point) => [point.low ?? point.y, point.high ?? point.y]),
  );
  if (values.length === 0) return undefined;
  return {
    x: { ...x, scale: "log" },
    y: { ...y, scale: "log", domain: [Math.min(...values), Math.max(...values)] },
    series,
  };
}
