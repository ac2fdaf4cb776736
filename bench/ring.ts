/** What the driver's half of a ring costs a request, without a device: `npm run bench:ring`. */

import { execFileSync } from "node:child_process";
import { PerformanceObserver } from "node:perf_hooks";
import { setTimeout } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import type * as ringCase from "./ring-case.js";
import { median, spread, writeResult } from "./report.js";

const REQUESTS = 2_000_000;
const ROUNDS = 5;
const WARM_UP = 2;
const GARBAGE_REQUESTS = 10_000_000;
const SCATTER = 10;

interface Case {
  readonly packed: boolean;
  readonly indirect: boolean;
  readonly batch: number;
  /** Data elements; 1 is a 4 KiB read by `addFramed`, more by `beginFramed`. */
  readonly segments: number;
}

type CaseModule = typeof ringCase;

async function load({ packed, indirect, batch, segments }: Case): Promise<CaseModule> {
  const query = new URLSearchParams({
    packed: `${packed}`,
    indirect: `${indirect}`,
    batch: `${batch}`,
    segments: `${segments}`,
  });
  return (await import(`./ring-case.js?${query.toString()}`)) as CaseModule;
}

interface Cost {
  /** Nanoseconds of the driver a request, one figure a round. */
  readonly driver: readonly number[];
  readonly device: readonly number[];
}

/** Every case once in turn, then all of them again: a slow phase of the machine hits all alike. */
async function measure(cases: readonly Case[]): Promise<readonly Cost[]> {
  const modules = await Promise.all(cases.map(load));
  const costs = cases.map(() => ({ driver: new Array<number>(), device: new Array<number>() }));
  for (let round = -WARM_UP; round < ROUNDS; round++) {
    for (const [i, { run, runDevice }] of modules.entries()) {
      const total = run(REQUESTS);
      const device = runDevice(REQUESTS);
      if (round < 0) continue;
      costs[i].driver.push(total - device);
      costs[i].device.push(device);
    }
  }
  return costs;
}

function row({ packed, indirect, batch, segments }: Case, alone: Cost, together: Cost): string[] {
  return [
    packed ? "packed" : "split",
    indirect ? "indirect" : "direct",
    segments === 1 ? "read of 3 elements" : `scatter of ${segments} segments`,
    String(batch),
    median(alone.driver).toFixed(1),
    spread(alone.driver),
    median(together.driver).toFixed(1),
    spread(together.driver),
    median(alone.device).toFixed(1),
  ];
}

/** Run without a pause and watch the collector. */
async function garbage(packed: boolean): Promise<string> {
  const { run } = await load({ packed, indirect: true, batch: 32, segments: 1 });
  run(REQUESTS);
  let major = 0;
  let minor = 0;
  const observer = new PerformanceObserver((list) => {
    for (const { detail } of list.getEntries() as unknown as { detail: { kind: number } }[]) {
      if (detail.kind === MAJOR) major++;
      else minor++;
    }
  });
  observer.observe({ entryTypes: ["gc"] });
  // The observer is told in later turns of the event loop, also of what was before.
  await setTimeout(100);
  major = 0;
  minor = 0;
  const before = process.memoryUsage().heapUsed;
  run(GARBAGE_REQUESTS);
  const grown = process.memoryUsage().heapUsed - before;
  await setTimeout(100);
  observer.disconnect();
  const what = `${GARBAGE_REQUESTS / 1e6} million requests, ${packed ? "packed" : "split"}`;
  return `${what}: ${major} major and ${minor} minor collections, heap ${(grown / 1024).toFixed(0)} KiB larger`;
}

/** `NODE_PERFORMANCE_GC_MAJOR`. */
const MAJOR = 4;

const cases: Case[] = [];
for (const packed of [false, true]) {
  for (const indirect of [false, true]) {
    for (const batch of [32, 1]) cases.push({ packed, indirect, batch, segments: 1 });
    cases.push({ packed, indirect, batch: 8, segments: SCATTER });
  }
}
/** Run this file in a process of its own. */
function own(...args: readonly string[]): unknown {
  return JSON.parse(execFileSync(process.execPath, [fileURLToPath(import.meta.url), ...args], { encoding: "utf8" }));
}

const [what, which] = process.argv.slice(2);
if (what === "case") {
  const [cost] = await measure([cases[Number(which)]]);
  console.log(JSON.stringify(cost));
} else if (what === "garbage") {
  console.log(JSON.stringify(await garbage(which === "packed")));
} else {
  // In a process of its own the engine sees one kind of ring only.
  const alone = cases.map((_, i) => own("case", String(i)) as Cost);
  const together = await measure(cases);
  writeResult("ring", {
    title: "Cost of the driver's half of a ring",
    command: "npm run bench:ring",
    text: `Nanoseconds of driver per request (submit, publish, reap) on a ring of 256, median and spread of ${ROUNDS} rounds: in a process that uses one kind of ring, and in one that uses all of them in turn. The cost of the minimal device, measured alone, is subtracted and shown.`,
    columns: [
      "format",
      "descriptors",
      "request",
      "batch",
      "driver ns",
      "min to max",
      "all kinds",
      "min to max",
      "device ns",
    ],
    rows: cases.map((each, i) => row(each, alone[i], together[i])),
    notes: [String(own("garbage", "split")), String(own("garbage", "packed"))],
  });
}
