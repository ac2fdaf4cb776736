/** Measures block devices by every way, beside what there is without this package: `npm run bench [-- --quick]`. */

import { execFile } from "node:child_process";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { parseArgs, promisify } from "node:util";
import { formatCount } from "../src/cli/format.js";
import { rangeError } from "../src/errors.js";
import { blkPictures, blkReport, type Measurement } from "./blk-report.js";
import { allCases, type Case, keyOf, quickCases } from "./cases.js";
import { runFio } from "./fio.js";
import { Peers } from "./peers.js";
import { provenance, RESULTS, writeReport } from "./report.js";
import { Results } from "./results.js";
import type { Round, RoundOrder } from "./round.js";

const HELP = `Usage: npm run bench -- [--quick] [--rounds N] [--out FOLDER]

Measures for some twelve minutes, on an otherwise idle machine, into bench/results/.
  --quick       one short round of a few cases, into .bench-tmp/: whether everything runs, no figures to keep
  --rounds N    so many rounds instead of 5
  --out FOLDER  write there`;

/** How long each round is. */
const FULL = { rounds: 5, rampMs: 500, runMs: 500 };
const QUICK = { rounds: 1, rampMs: 100, runMs: 200 };

const ROUND_TIMEOUT_MS = 60_000;

const { values: flags } = parseArgs({
  options: {
    ...{ quick: { type: "boolean" }, rounds: { type: "string" } },
    ...{ out: { type: "string" }, help: { type: "boolean" } },
  },
});

/** How one round is measured. */
interface Shape {
  readonly rampMs: number;
  readonly runMs: number;
  readonly signal: AbortSignal;
}

async function main(): Promise<void> {
  const isQuick = flags.quick === true;
  const { rampMs, runMs, ...usual } = isQuick ? QUICK : FULL;
  const rounds = Number(flags.rounds ?? usual.rounds);
  if (!(Number.isSafeInteger(rounds) && rounds > 0))
    throw rangeError("--rounds", "a whole number from 1", flags.rounds);
  const folder = flags.out ?? (isQuick ? ".bench-tmp" : RESULTS);
  const abort = new AbortController();
  const interrupted = (): void => abort.abort(new Error("interrupted"));
  process.once("SIGINT", interrupted).once("SIGTERM", interrupted);
  const peers = await Peers.start();
  try {
    const cases = (isQuick ? quickCases() : allCases()).filter((each) => peers.has(each));
    const { results, failures } = await measureAll(peers, cases, rounds, { rampMs, runMs, signal: abort.signal });
    const measurement = { results, rounds, runMs, rampMs, missing: [...peers.missing, ...failures] };
    writeAll(folder, measurement, peers.versions());
    if (failures.length > 0) process.exitCode = 1;
  } finally {
    await peers.close();
  }
}

/** Round after round of everything, so that a slow while of the machine hits all alike. */
async function measureAll(
  peers: Peers,
  cases: readonly Case[],
  rounds: number,
  shape: Shape,
): Promise<{ results: Results; failures: string[] }> {
  const results = new Results();
  const failures: string[] = [];
  for (let round = 1; round <= rounds; round++) {
    for (const [i, each] of cases.entries()) {
      shape.signal.throwIfAborted();
      const where = `round ${round} of ${rounds}, case ${i + 1} of ${cases.length}: ${keyOf(each)}`;
      try {
        const measured = await measure(peers, each, shape);
        results.add(each, measured);
        process.stderr.write(`${where}: ${formatCount(measured.iops)}\n`);
      } catch (error) {
        failures.push(`failed: ${where}: ${reasonOf(error)}`);
      }
    }
  }
  return { results, failures };
}

/** Keep the report and the pictures in `folder`. */
function writeAll(folder: string, measurement: Measurement, versions: readonly string[]): void {
  const words = process.argv.slice(2);
  const command = ["npm run bench", ...(words.length > 0 ? ["--", ...words] : [])].join(" ");
  const pictures = blkPictures(measurement, new Date().toISOString().slice(0, 10));
  writeReport(folder, "blk", [
    ...["# Reading a block device", "", provenance(command, versions), ""],
    ...blkReport(measurement, Object.keys(pictures)),
  ]);
  for (const [name, svg] of Object.entries(pictures)) writeFileSync(join(folder, `${name}.svg`), svg);
}

/** One round of one case. */
async function measure(
  peers: Peers,
  { disk, way, size, depth }: Case,
  { rampMs, runMs, signal }: Shape,
): Promise<Round> {
  const shape = { size, depth, rampMs, runMs };
  if (way.by === "nbd") return runFio({ socket: peers.nbdSocket, name: disk, ...shape, signal });
  const order: RoundOrder = { target: way.by === "fs" ? peers.file : peers.address(disk), way, ...shape };
  const program = join(import.meta.dirname, "round.js");
  const { stdout } = await promisify(execFile)(process.execPath, [program, JSON.stringify(order)], {
    timeout: ROUND_TIMEOUT_MS,
    signal,
  });
  return JSON.parse(stdout) as Round;
}

/** The line that says why; a program that failed has put it behind the line of the command. */
function reasonOf(error: unknown): string {
  const [first, ...more] = String(error).split("\n");
  return more.find((line) => line.includes("Error")) ?? more[0] ?? first;
}

if (flags.help === true) process.stdout.write(`${HELP}\n`);
else await main();
