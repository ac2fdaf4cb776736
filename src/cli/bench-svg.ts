/** The picture of `virtio bench --svg`: requests a second over time, and how the latencies are distributed. */

import { describeWay, type Measured, PERCENTILES, summarize } from "./bench-report.js";
import type { Stretch } from "./bench-timeline.js";
import { type Bar, chartSvg, type Panel } from "./chart.js";
import { formatBytes, formatNs, formatTick } from "./format.js";
import type { LatencyHistogram } from "./histogram.js";

/** Bars for each power of two of the latency. */
const BARS_PER_OCTAVE = 8;
/** The finest bins of a histogram. */
const BINS_PER_OCTAVE = 64;

/** The picture as a complete SVG document; `stretches` are the run in the order of time. */
export function benchSvg(measured: Measured, stretches: readonly Stretch[]): string {
  const { address, rw, plan, result } = measured;
  return chartSvg({
    title: `${rw} of ${formatBytes(plan.blockSize)} on ${address}`,
    facts: [describeWay(measured), summarize(measured)],
    panels: [overTime(stretches, plan.runMs), ...(result.latency.count === 0 ? [] : [distribution(result.latency)])],
    note: "Each bar is an eighth of a doubling of the latency wide.",
  });
}

function overTime(stretches: readonly Stretch[], runMs: number): Panel {
  const most = Math.max(...stretches.map(({ iops }) => iops));
  return {
    x: { label: "seconds", scale: "linear", domain: [0, runMs / 1000], format: String },
    y: { label: "requests a second", scale: "linear", domain: [0, most], format: formatTick },
    series: [{ name: "all", points: stretches.map(({ seconds, iops }) => ({ x: seconds, y: iops })) }],
  };
}

function distribution(latency: LatencyHistogram): Panel {
  const bars = latencyBars(latency);
  const percent = (share: number): string => `${formatTick(share * 100)} %`;
  return {
    x: {
      ...{ label: "latency", scale: "log" },
      ...{ domain: [bars[0].from, bars[bars.length - 1].to], format: (ns) => formatNs(ns).replace(/\.0+ /, " ") },
    },
    y: {
      ...{ label: "share of requests", scale: "linear" },
      ...{ domain: [0, Math.max(...bars.map(({ y }) => y))], format: percent },
    },
    bars,
    markers: PERCENTILES.map(([name, p]) => {
      const ns = latency.percentile(p);
      return { x: ns, label: `${name} ${formatNs(ns)}` };
    }),
  };
}

/** Bars of the same width on a logarithmic axis, each with its share of all requests. */
function latencyBars(latency: LatencyHistogram): Bar[] {
  const place = (ns: number): number => Math.log2(ns) * BARS_PER_OCTAVE;
  const bins = latency.bins(BINS_PER_OCTAVE).map(({ from, to, count }) => {
    const begin = place(Math.max(1, from));
    return { begin, end: Math.max(place(to + 1), begin + Number.EPSILON), count };
  });
  const first = Math.floor(bins[0].begin);
  const counts = new Float64Array(Math.ceil(bins[bins.length - 1].end) - first);
  for (const { begin, end, count } of bins) {
    // A bin that lies across the edges of bars is divided among them.
    for (let bar = Math.floor(begin); bar < end; bar++) {
      counts[bar - first] += (count * (Math.min(end, bar + 1) - Math.max(begin, bar))) / (end - begin);
    }
  }
  return Array.from(counts, (count, i) => ({
    from: 2 ** ((first + i) / BARS_PER_OCTAVE),
    to: 2 ** ((first + i + 1) / BARS_PER_OCTAVE),
    y: count / latency.count,
  }));
}
