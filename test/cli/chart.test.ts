/** Tests of the charts: axes, lines, legend and markers are where they belong, and no text is over another. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import fc from "fast-check";
import { type Chart, chartSvg, type Panel, type Series } from "../../src/cli/chart.js";
import { formatTick } from "../../src/cli/format.js";
import { assertTextsApart, assertWellFormed, type TextBox, textBoxes } from "./svg.js";

function chartOf(...panels: readonly Panel[]): Chart {
  return { title: "reads of <4 KiB> & more", facts: ["first", "second"], panels, note: "note" };
}

/** A panel of lines over queue depth. */
function linesOf(series: readonly Series[], scale: "linear" | "log", most: number): Panel {
  return {
    x: { label: "in flight", scale: "log", domain: [0.8, 160], ticks: [1, 8, 32, 128], format: String },
    y: { label: "requests a second", scale, domain: [most / 100, most], format: formatTick },
    series,
  };
}

/** The horizontal strokes behind the plots, and the tick that is named at each. */
function gridOf(svg: string, texts: readonly TextBox[]): Map<number, string> {
  const grid = new Map<number, string>();
  for (const [, y1, y2] of svg.matchAll(/<line x1="84" y1="([\d.]+)" x2="[\d.]+" y2="([\d.]+)" class="grid"\/>/g)) {
    assert.equal(y1, y2);
    const label = texts.find(({ right, top, bottom }) => right <= 84 && top < Number(y1) && Number(y1) < bottom);
    grid.set(Number(y1), label?.content ?? "");
  }
  return grid;
}

describe("charts", () => {
  test("of any lines and markers are well-formed, with all text inside and none over another", () => {
    const name = fc.string({ minLength: 1, maxLength: 40, unit: fc.constantFrom(...Array.from("abc<&>\"'8 -")) });
    const value = fc.double({ min: 1, max: 1e7, noNaN: true });
    const series = fc.record({
      name: name.map((text) => `a${text}z`.replaceAll(/ +/g, " ")),
      colour: fc.constantFrom("blue" as const, "grey" as const),
      mark: fc.constantFrom("circle" as const, "square" as const, "diamond" as const),
      isDashed: fc.boolean(),
      points: fc
        .tuple(value, value, value)
        .map((ys) => ys.map((y, i) => ({ x: [1, 8, 128][i], y, low: y / 2, high: y }))),
    });
    const marker = fc.tuple(value, name).map(([x, text]) => ({ x, label: `m${text}m` }));
    fc.assert(
      fc.property(
        fc.array(series, { minLength: 1, maxLength: 10 }),
        fc.constantFrom("linear" as const, "log" as const),
        fc.array(marker, { maxLength: 6 }),
        (lines, scale, markers) => {
          const bars: Panel = {
            x: { label: "latency", scale: "log", domain: [1, 1e7], format: formatTick },
            y: { label: "share", scale: "linear", domain: [0, 0.4], format: formatTick },
            bars: [{ from: 10, to: 20, y: 0.4 }],
            markers,
          };
          const svg = chartSvg(chartOf(linesOf(lines, scale, 1e7), bars));
          assertWellFormed(svg);
          const texts = textBoxes(svg);
          assert.equal(texts.length, svg.split("<text ").length - 1);
          assertTextsApart(svg, texts);
        },
      ),
      { numRuns: 200 },
    );
  });

  test("a linear axis begins where it is told and has round ticks, a value at its place between them", () => {
    const series = [{ name: "a", points: [{ x: 1, y: 250_000 }] }];
    const panel = linesOf(series, "linear", 1_130_000);
    const svg = chartSvg(chartOf({ ...panel, y: { ...panel.y, domain: [0, 1_130_000] } }));
    const grid = gridOf(svg, textBoxes(svg));
    assert.deepEqual([...grid.values()], ["0", "200k", "400k", "600k", "800k", "1M", "1.2M"]);
    const [at] = /cy="([\d.]+)"/.exec(svg)?.slice(1).map(Number) ?? [];
    const place = (text: string): number => [...grid].find(([, label]) => label === text)?.[0] ?? Number.NaN;
    assert.ok(Math.abs(at - (place("200k") - (place("200k") - place("400k")) / 4)) < 0.2);
  });

  test("a logarithmic axis names 1, 2 and 5, over many decades powers of ten only", () => {
    const labels = (most: number, least: number): string[] => {
      const panel = linesOf([{ name: "a", points: [{ x: 8, y: most }] }], "log", most);
      const svg = chartSvg(chartOf({ ...panel, y: { ...panel.y, domain: [least, most] } }));
      return [...gridOf(svg, textBoxes(svg)).values()];
    };
    assert.deepEqual(labels(2.3e6, 13_000), ["10k", "20k", "50k", "100k", "200k", "500k", "1M", "2M", "5M"]);
    assert.deepEqual(labels(2.3e6, 900), ["1k", "10k", "100k", "1M"]);
  });

  test("the legend is in the order in which the lines end; a single line has none", () => {
    const line = (name: string, y: number): Series => ({
      name,

      points: [1, 8].map((x) => ({ x, y: y * x })),
    });
    const legend = (series: readonly Series[]): string[] => {
      const svg = chartSvg(chartOf(linesOf(series, "log", 1e6)));
      return [...svg.matchAll(/class="legend">(.*?)</g)].map(([, name]) => name);
    };
    assert.deepEqual(legend([line("low", 10), line("high", 1000), line("middle", 100)]), ["high", "middle", "low"]);
    assert.deepEqual(legend([line("alone", 10)]), []);
  });
});
