/** A small drawing of how latencies are distributed. */

import { formatNs } from "./format.js";
import type { LatencyHistogram } from "./histogram.js";
import { columns } from "./table.js";

/** Characters of the longest bar. */
const WIDTH = 32;
/** Shares below this at both ends are left out. */
const LEAST_SHARE = 0.001;

/** Lines with a bar for each power of two, from the first that holds a thousandth of all latencies to the last. */
export function drawLatencies(latency: LatencyHistogram): string[] {
  const bins = latency.bins(1);
  const most = Math.max(...bins.map(({ count }) => count));
  const isShown = ({ count }: { readonly count: number }): boolean => count >= latency.count * LEAST_SHARE;
  const shown = bins.slice(bins.findIndex(isShown), bins.findLastIndex(isShown) + 1);
  const rows = shown.map(({ from, to, count }) => {
    const share = `${((count / latency.count) * 100).toFixed(1)} %`;
    return [`${formatNs(from)} to`, formatNs(to + 1), share, "█".repeat(Math.round((count / most) * WIDTH))];
  });
  return columns("rrrl", rows);
}
