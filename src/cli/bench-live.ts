/** The line that `virtio bench` shows while it measures: what happened in the last second. */

import { formatCount, formatNs } from "./format.js";
import type { Progress } from "./bench-plan.js";
import type { LatencyHistogram } from "./histogram.js";
import { TransientLine } from "./terminal.js";

/** Milliseconds between two looks at the counts, and how many of them make the second that is shown. */
const TICK_MS = 200;
const TICKS = 5;

/**
 * Show how a run of requests of `blockSize` bytes goes, until the returned function is called.
 * It looks at the counts from outside: the measuring loop does not know of it. Without a terminal it does nothing.
 */
export function showLive(progress: Progress, blockSize: number): () => void {
  const line = new TransientLine(process.stderr);
  if (!line.isShown) return () => undefined;
  const seen: { readonly ms: number; readonly counts: LatencyHistogram }[] = [];
  const look = (): void => {
    const now = { ms: progress.countedMs, counts: progress.counts() };
    if (now.ms === 0) return; // the ramp
    seen.push(now);
    if (seen.length > TICKS + 1) seen.shift();
    const [{ ms, counts }] = seen;
    if (now.ms > ms) line.show(liveText(now.counts.since(counts), now.ms - ms, blockSize));
  };
  const timer = setInterval(look, TICK_MS);
  return () => {
    clearInterval(timer);
    line.erase();
  };
}

/** What `latency` says of `ms` milliseconds, in one short line. */
function liveText(latency: LatencyHistogram, ms: number, blockSize: number): string {
  const iops = (latency.count / ms) * 1000;
  return [
    `${formatCount(iops)} IOPS`,
    `${((iops * blockSize) / 1e6).toFixed(0)} MB/s`,
    `p50 ${formatNs(latency.percentile(0.5))}`,
    `p99 ${formatNs(latency.percentile(0.99))}`,
  ].join("  ");
}
