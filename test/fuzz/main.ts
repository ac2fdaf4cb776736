/** `npm run fuzz [-- --format split|packed] [--steps N] [--seed S] [--time SECONDS]`: the rings against a lying device. */

import { randomInt } from "node:crypto";
import { performance } from "node:perf_hooks";
import { parseArgs } from "node:util";
import { FuzzFailure, fuzzRing } from "./ring-fuzzer.js";

const DEFAULT_STEPS = 10_000_000;

const { values } = parseArgs({
  options: {
    format: { type: "string" },
    steps: { type: "string" },
    seed: { type: "string" },
    time: { type: "string" },
  },
});

function whole(name: "steps" | "seed" | "time", fallback: number): number {
  const text = values[name];
  if (text === undefined) return fallback;
  const value = Number(text);
  if (Number.isSafeInteger(value) && value >= 0) return value;
  throw new Error(`--${name} expected a whole number, got ${text}`);
}

const formats = values.format === undefined ? ["split", "packed"] : [values.format];
const seconds = whole("time", Number.POSITIVE_INFINITY);
const steps = whole("steps", values.time === undefined ? DEFAULT_STEPS : Number.POSITIVE_INFINITY);
const seed = whole("seed", randomInt(2 ** 32));

for (const format of formats) {
  if (format !== "split" && format !== "packed") throw new Error(`--format expected split or packed, got ${format}`);
  const begin = performance.now();
  const spent = (): number => (performance.now() - begin) / 1000;
  console.log(`${format}: seed ${seed}`);
  try {
    const counts = fuzzRing(format === "packed", seed, (sum) => sum.steps >= steps || spent() >= seconds);
    const rate = Math.round(counts.steps / spent()).toLocaleString("en");
    console.log(
      `${format}: ${counts.steps.toLocaleString("en")} steps in ${spent().toFixed(1)} s (${rate} a second), ` +
        `${counts.histories} histories, ${counts.broken} queues broken, ${counts.lies} lies, ${counts.returned} chains`,
    );
  } catch (error) {
    if (!(error instanceof FuzzFailure)) throw error;
    console.error(`${format}: ${error.message}`);
    process.exitCode = 1;
  }
}
