/**
 * `npm run torture [-- --seed N] [--kills N] [--peer own|cached|qsd] [--format split|packed] [--inflight | --no-inflight]`: back-ends
 * are killed under load, and nothing that they acknowledged may be lost.
 */

import { randomInt } from "node:crypto";
import { performance } from "node:perf_hooks";
import { parseArgs } from "node:util";
import { missingPeers } from "../support/peers.js";
import { TortureFailure } from "./ledger.js";
import { nameOfVariant, VARIANTS, type Variant } from "./peer.js";
import { torture, type TortureReport } from "./torture.js";

const DEFAULT_KILLS = 200;
/** Kills that one device survives, and calls between two of them at most. */
const KILLS_PER_DEVICE = 20;
const CALLS = 2000;

const { values } = parseArgs({
  options: {
    seed: { type: "string" },
    kills: { type: "string" },
    peer: { type: "string" },
    format: { type: "string" },
    inflight: { type: "boolean" },
    "no-inflight": { type: "boolean" },
  },
});

function whole(name: "seed" | "kills", fallback: number): number {
  const text = values[name];
  if (text === undefined) return fallback;
  const value = Number(text);
  if (Number.isSafeInteger(value) && value >= 0 && value < 2 ** 32) return value;
  throw new Error(`--${name} expected a whole number below 2^32, got ${text}`);
}

function oneOf(name: "peer" | "format", choices: readonly string[]): void {
  const value = values[name];
  if (value === undefined || choices.includes(value)) return;
  throw new Error(`--${name} expected ${choices.join(" or ")}, got ${value}`);
}

function isWanted({ peer, packed, inflight }: Variant): boolean {
  if (values.peer !== undefined && values.peer !== peer) return false;
  if (values.format !== undefined && (values.format === "packed") !== packed) return false;
  if (values.inflight === true && !inflight) return false;
  return !(values["no-inflight"] === true && inflight);
}

function summary(report: TortureReport): string {
  const { kills, early, devices, requests, abandoned, flushes, lowLevel, images } = report;
  const { quiet, reconnects, attempts, replayed, unflushed, torn } = report;
  return (
    `  ${kills} kills (${early} of them during the handshake) of ${devices} devices in turn\n` +
    `  ${requests} requests, ${lowLevel} of them slot by slot, ${flushes} flushes, ${abandoned} to be given up\n` +
    `  ${reconnects} reconnects in ${attempts} attempts, ${replayed} requests submitted again, ` +
    `${unflushed} changes completed by the dead and not flushed (${quiet} kills at rest, where that is known)\n` +
    `  nothing lost, invented, unanswered or answered twice; ${images} images checked, ` +
    `${torn} sectors torn where that may be`
  );
}

oneOf("peer", ["own", "cached", "qsd"]);
oneOf("format", ["split", "packed"]);
const seed = whole("seed", randomInt(2 ** 32));
const kills = whole("kills", DEFAULT_KILLS);
const variants = VARIANTS.filter(isWanted);
if (variants.length === 0) throw new Error(`there is no such variant among: ${VARIANTS.map(nameOfVariant).join("; ")}`);

for (const variant of variants) {
  const begin = performance.now();
  console.log(`${nameOfVariant(variant)}: seed ${seed}`);
  const missing = variant.peer === "qsd" ? missingPeers(["qemu-storage-daemon"]) : undefined;
  if (missing !== undefined) {
    console.log(`  skipped: ${missing}`);
    if (process.env["VIRTIO_REQUIRE_PEERS"] === "1") process.exitCode = 1;
    continue;
  }
  try {
    const report = await torture({ variant, seed, kills, killsPerDevice: KILLS_PER_DEVICE, calls: CALLS });
    console.log(`${summary(report)}; ${((performance.now() - begin) / 1000).toFixed(1)} s`);
  } catch (error) {
    if (!(error instanceof TortureFailure)) throw error;
    console.error(error.message);
    process.exitCode = 1;
  }
}
