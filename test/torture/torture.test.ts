/** A short run of the torture, with a seed that nobody has seen before: `npm run torture` kills 200 times each. */

import assert from "node:assert/strict";
import { randomInt } from "node:crypto";
import { test } from "node:test";
import { requirePeer } from "../support/peers.js";
import { nameOfVariant, VARIANTS } from "./peer.js";
import { torture } from "./torture.js";

const KILLS = 5;
const CALLS = 600;

for (const variant of VARIANTS) {
  const skip = variant.peer === "qsd" ? requirePeer("qemu-storage-daemon") : false;
  test(`a back-end that is killed under load loses nothing: ${nameOfVariant(variant)}`, { skip }, async (t) => {
    const seed = randomInt(2 ** 32);
    t.diagnostic(`seed ${seed}: npm run torture -- --seed ${seed} tries the like`);
    const report = await torture({ variant, seed, kills: KILLS, killsPerDevice: 3, calls: CALLS });
    t.diagnostic(JSON.stringify(report));
    assert.equal(report.kills, KILLS);
    assert.ok(report.reconnects > 0 && report.requests > 0);
  });
}
