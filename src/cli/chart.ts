/** Charts as SVG: panels one below the other with axes, lines or bars, and a legend. d3-scale finds the ticks. */

import { scaleLinear, scaleLog } from "d3-scale";
import { element, escapeText, polygon, polyline, rect, text } from "./svg.js";

/** One axis of a panel. */
export interface Axis {
  /** What it shows, with the unit. */
  readonly label: string;
  readonly scale: "linear" | "log";
  /** Least and greatest value that must fit; a logarithmic or a vertical axis is rounded outwards, unless `ticks` are given. */
  readonly domain: readonly [number, number];
  /** Text of a tick. */
  readonly format: (value: number) => string;
  /** The ticks, where the usual round numbers would not do. */
  readonly ticks?: readonly number[];
}

/** A point of a line, with the bounds between which it varied. */
export interface Point {
  readonly x: number;
  readonly y: number;
  readonly low?: number;
  readonly high?: number;
}

/** A line with its name in the legend. */
export interface Series {
  readonly name: string;
  readonly points: readonly Point[];
  readonly colour?: keyof typeof COLOURS;
  readonly mark?: "circle" | "square" | "triangle" | "diamond";
  readonly isDashed?: boolean;
}

/** A rectangle from the x axis up to `y`. */
export interface Bar {
  readonly from: number;
  readonly to: number;
  readonly y: number;
}

/** A vertical line with a text at its top. */
export interface Marker {
  readonly x: number;
  readonly label: string;
}

/** Axes and what is drawn between them. */
export interface Panel {
  readonly x: Axis;
  readonly y: Axis;
  readonly series?: readonly Series[];
  readonly bars?: readonly Bar[];
  readonly markers?: readonly Marker[];
}

/** What a chart is made from. */
export interface Chart {
  readonly title: string;
  /** Lines below the title. */
  readonly facts: readonly string[];
  readonly panels: readonly Panel[];
  /** A line at the foot. */
  readonly note?: string;
}

const MARGIN = 24;
const PLOT_LEFT = 84;
const PLOT_MIN_WIDTH = 560;
const PLOT_HEIGHT = 260;
const TITLE_BASE = 38;
const FACTS_ROW = 21;
const PANEL_HEAD = 30; // above a plot: the label of its y axis
const PANEL_FOOT = 54; // below a plot: ticks and label of its x axis
const MARKER_ROW = 17;
const MARKER_GAP = 5; // between its line and its text
const LEGEND_GAP = 22;
const LEGEND_ROW = 22;
const LEGEND_SAMPLE = 40;
const LEGEND_SPACE = 8; // between a sample of the line and its name
// Widths of letters on average, in the widest of the usual fonts.
const LETTER = 7.8;
const SMALL_LETTER = 7.2;
const TITLE_LETTER = 12.6;
/** Lines with more points than this get no mark at each. */
const MOST_MARKS = 20;
/** About so many ticks on a linear axis. */
const TICKS = 5;
/** An axis of more decades than this has none of the usual ticks. */
const MOST_DECADES = 15;
/** From so many decades on, an axis names powers of ten only. */
const MANY_DECADES = 3;

/** Distinguishable by people who see no red or no green (after Okabe and Ito), dark enough for white paper. */
const COLOURS = {
  ...{ blue: "#0072b2", orange: "#d55e00", green: "#009e73", purple: "#a3478a", grey: "#4a4a4a", gold: "#b8860b" },
} as const;

/** From a value to a place in the drawing. */
type Place = (value: number) => number;

/** A laid-out axis. */
interface Laid {
  readonly place: Place;
  readonly ticks: readonly number[];
}

/** Where the plots are, from left to right. */
interface Extent {
  readonly left: number;
  readonly right: number;
}

/** The chart as a complete SVG document on white ground. The same chart gives the same bytes. */
export function chartSvg(chart: Chart): string {
  const { title, facts, panels, note = "" } = chart;
  const beside = Math.max(...panels.map(widthBeside));
  const words = Math.max(
    title.length * TITLE_LETTER,
    note.length * SMALL_LETTER,
    ...facts.map((fact) => fact.length * LETTER),
  );
  const right = Math.max(PLOT_LEFT + PLOT_MIN_WIDTH, MARGIN + words - beside);
  const width = Math.ceil(right + beside + MARGIN);

  let y = TITLE_BASE + facts.length * FACTS_ROW + 20;
  const drawn = panels.map((panel) => {
    const { svg, bottom } = drawPanel(panel, { left: PLOT_LEFT, right }, y);
    y = bottom;
    return svg;
  });
  const height = y + (note === "" ? 4 : 30);
  const content = [
    element("title", {}, escapeText([title, ...facts].join(". "))),
    element("style", {}, STYLE),
    rect(0.5, 0.5, width - 1, height - 1, "card", 10),
    text(MARGIN, TITLE_BASE, "title", title),
    ...facts.map((fact, i) => text(MARGIN, TITLE_BASE + 3 + (i + 1) * FACTS_ROW, "facts", fact)),
    ...drawn.flat(),
    ...(note === "" ? [] : [text(MARGIN, height - 20, "note", note)]),
  ];
  const root = { xmlns: "http://www.w3.org/2000/svg", width, height, viewBox: `0 0 ${width} ${height}`, role: "img" };
  return `${element("svg", root, `\n${content.join("\n")}\n`)}\n`;
}

/** Room that a panel needs at the right of its plot: for the legend, or for the text of the last marker. */
function widthBeside({ series = [], markers = [] }: Panel): number {
  const longest = (names: readonly string[]): number => Math.max(0, ...names.map(({ length }) => length));
  const legend = series.length > 1 ? LEGEND_GAP + LEGEND_SAMPLE + longest(series.map(({ name }) => name)) * LETTER : 0;
  return Math.max(legend, longest(markers.map(({ label }) => label)) * SMALL_LETTER);
}

/** Draw a panel from `top` on. */
function drawPanel(panel: Panel, { left, right }: Extent, top: number): { svg: string[]; bottom: number } {
  const { series = [], bars = [] } = panel;
  const x = layAxis(panel.x, left, right, false);
  const markers = placeMarkers(panel.markers ?? [], x.place);
  const rows = Math.max(0, ...markers.map(({ row }) => row + 1));
  const plotTop = top + PANEL_HEAD + rows * MARKER_ROW;
  const bottom = plotTop + PLOT_HEIGHT;
  const y = layAxis(panel.y, bottom, plotTop, true);
  const svg = [
    text(MARGIN, top + PANEL_HEAD - 14, "label", panel.y.label),
    ...y.ticks.flatMap((tick) => [
      line(left, y.place(tick), right, y.place(tick), "grid"),
      text(left - 8, y.place(tick) + 4, "tick end", panel.y.format(tick)),
    ]),
    ...x.ticks.flatMap((tick) => [
      line(x.place(tick), plotTop, x.place(tick), bottom, "grid"),
      text(x.place(tick), bottom + 19, "tick middle", panel.x.format(tick)),
    ]),
    line(left, bottom, right, bottom, "axis"),
    text((left + right) / 2, bottom + 41, "label middle", panel.x.label),
    ...bars.map(({ from, to, y: value }) =>
      rect(x.place(from), y.place(value), x.place(to) - x.place(from) - 0.5, bottom - y.place(value), "bar"),
    ),
    ...series.flatMap((each) => drawSeries(each, x.place, y.place)),
    ...(series.length > 1 ? drawLegend(series, right + LEGEND_GAP, plotTop) : []),
    ...markers.flatMap(({ at, row, label }) => {
      const labelBase = plotTop - 6 - row * MARKER_ROW;
      return [line(at, labelBase - 10, at, bottom, "marker"), text(at + MARKER_GAP, labelBase, "note", label)];
    }),
  ];
  return { svg, bottom: bottom + PANEL_FOOT };
}

function drawSeries(series: Series, x: Place, y: Place): string[] {
  const { points, colour = "blue" } = series;
  const { stroke, mark } = styleOf(series);
  const spans = points.flatMap(({ x: at, low, high }) =>
    low === undefined || high === undefined ? [] : [line(x(at), y(low), x(at), y(high), `span ${colour}`)],
  );
  const places = points.map((point) => [x(point.x), y(point.y)] as const);
  const marks = points.length > MOST_MARKS ? [] : places.map(([cx, cy]) => mark(cx, cy));
  return [...spans, polyline(places, `line ${stroke}`), ...marks];
}

/** Entries in the order in which the lines end, top to bottom. */
function drawLegend(series: readonly Series[], x: number, top: number): string[] {
  const last = ({ points }: Series): number => points.at(-1)?.y ?? 0;
  return series
    .toSorted((a, b) => last(b) - last(a))
    .flatMap((each, i) => {
      const y = top + 10 + i * LEGEND_ROW;
      const { stroke, mark } = styleOf(each);
      return [
        line(x, y, x + LEGEND_SAMPLE - LEGEND_SPACE, y, `line ${stroke}`),
        mark(x + (LEGEND_SAMPLE - LEGEND_SPACE) / 2, y),
        text(x + LEGEND_SAMPLE, y + 4, "legend", each.name),
      ];
    });
}

/**
 * The texts of the markers stand at the right of their lines, in rows above the plot: each so high that its text
 * touches neither the text nor the line of another.
 */
function placeMarkers(markers: readonly Marker[], place: Place): { at: number; row: number; label: string }[] {
  const placed: { at: number; row: number; label: string }[] = [];
  for (const { x, label } of markers.toSorted((a, b) => b.x - a.x)) {
    const at = place(x);
    const end = at + MARKER_GAP + label.length * SMALL_LETTER;
    const row = Math.max(0, ...placed.filter((other) => other.at < end).map((other) => other.row + 1));
    placed.push({ at, row, label });
  }
  return placed;
}

function layAxis(axis: Axis, from: number, to: number, isVertical: boolean): Laid {
  const { ticks, domain } = axis;
  if (axis.scale === "linear") {
    const scale = scaleLinear([...domain], [from, to]);
    // What is highest shall not touch the edge; time shall go on to it.
    if (isVertical) scale.nice(TICKS);
    return { place: scale, ticks: ticks ?? scale.ticks(TICKS) };
  }
  const [least, most] = ticks === undefined ? [roundDown(domain[0]), roundUp(domain[1])] : domain;
  const scale = scaleLog([least, most], [from, to]);
  const isNamed = Math.log10(most / least) >= MANY_DECADES ? /^1e/ : /^[125]e/;
  return {
    place: scale,
    ticks: ticks ?? scale.ticks(MOST_DECADES).filter((value) => isNamed.test(value.toExponential())),
  };
}

/** The next of 1, 2 or 5 times a power of ten that is not above `value`. */
function roundDown(value: number): number {
  const power = 10 ** Math.floor(Math.log10(value));
  return ([5, 2].find((step) => step * power <= value) ?? 1) * power;
}

/** The next of 1, 2 or 5 times a power of ten that is not below `value`. */
function roundUp(value: number): number {
  const power = 10 ** Math.floor(Math.log10(value));
  return ([1, 2, 5].find((step) => step * power >= value) ?? 10) * power;
}

/** How a line and its marks are drawn. */
function styleOf({ colour = "blue", mark = "circle", isDashed = false }: Series): {
  readonly stroke: string;
  readonly mark: (x: number, y: number) => string;
} {
  const className = `mark ${colour}`;
  return {
    stroke: isDashed ? `dashed ${colour}` : colour,
    mark: (x, y) =>
      mark === "circle"
        ? element("circle", { cx: x, cy: y, r: 4.2, class: className })
        : polygon(
            CORNERS[mark].map(([dx, dy]) => [x + dx, y + dy]),
            className,
          ),
  };
}

const CORNERS = {
  square: [
    [-3.7, -3.7],
    [3.7, -3.7],
    [3.7, 3.7],
    [-3.7, 3.7],
  ],
  triangle: [
    [-4.6, 3.4],
    [4.6, 3.4],
    [0, -4.8],
  ],
  diamond: [
    [-5, 0],
    [0, -5],
    [5, 0],
    [0, 5],
  ],
} as const;

function line(x1: number, y1: number, x2: number, y2: number, className: string): string {
  return element("line", { x1, y1, x2, y2, class: className });
}

const STYLE = `
text { font-family: ui-sans-serif, system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; }
.title { font-size: 19px; font-weight: 700; }
.facts { font-size: 13px; fill: #59636e; }
.label { font-size: 13px; font-weight: 600; }
.legend { font-size: 13px; }
.tick, .note { font-size: 12px; fill: #59636e; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.card { fill: #ffffff; stroke: #d1d9e0; }
.grid { stroke: #e4e8ec; } .axis { stroke: #8c959f; }
.line { stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }
.dashed { stroke-dasharray: 6 5; }
.span { stroke-width: 6; stroke-linecap: round; opacity: 0.3; }
.bar { fill: #0072b2; opacity: 0.75; }
.marker { stroke: #d55e00; stroke-width: 1.4; stroke-dasharray: 4 3; }
${Object.entries(COLOURS)
  .map(([name, colour]) => `.${name} { stroke: ${colour}; fill: ${colour}; }`)
  .join("\n")}
.mark { stroke: #ffffff; stroke-width: 1; }
.line { fill: none; }
`;
