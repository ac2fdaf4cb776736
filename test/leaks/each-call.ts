/** Runs something again and again, each time with another of its system calls refused, and looks what stays behind. */

import assert from "node:assert/strict";
import process from "node:process";
import { inspect, isDeepStrictEqual } from "node:util";
import { VirtioError } from "../../src/errors.js";
import { turnUntil } from "../sys/helpers.js";
import { callsMade, refuseCall, refusedCall } from "./calls.js";
import { held } from "./held.js";

/** No run takes longer; what does hangs. */
const PATIENCE_MS = 20_000;
/** Calls that no scenario should need; one that counts up for ever is wrong itself. */
const MOST_CALLS = 2000;

/** Refuse only one call of so many: where a run takes very long, as under valgrind. */
const STEP = Number(process.env["VIRTIO_REFUSE_EVERY"] ?? 1);

/** What is done and ended in one run. Everything is closed when it ends, however it ends. */
export interface Scenario {
  run(): Promise<void>;
  /** Errors that were reported elsewhere than by the end of `run`; emptied. */
  reported?(): unknown[];
}

/**
 * Do it once as it should go, then once for every call that this makes, with that call refused. Each run ends in time,
 * well or by a VirtioError, and leaves nothing open or mapped.
 *
 * @returns how many calls there were to refuse.
 */
export async function refuseEachCall(scenario: Scenario): Promise<number> {
  // What is loaded and made once is no leak.
  await well(scenario);
  await well(scenario);
  let before = held();
  await well(scenario);
  assert.deepEqual(await settled(before), before, "after a run in which nothing was refused");
  const faults: string[] = [];
  let at = 0;
  for (; at < MOST_CALLS; at += STEP) {
    refuseCall(at);
    const error = await outcome(scenario);
    const name = callsMade()[at];
    refuseCall(-1);
    const errors = [...(error === undefined ? [] : [error]), ...(scenario.reported?.() ?? [])];
    if (name === undefined) {
      assert.deepEqual(errors, [], "nothing was refused");
      break;
    }
    const what = `call ${at}, ${name}, refused (${errors.map(String).join("; ") || "it went well"})`;
    faults.push(...errors.filter((each) => !(each instanceof VirtioError)).map((each) => `${what}: ${inspect(each)}`));
    const after = await settled(before);
    if (!isDeepStrictEqual(after, before)) faults.push(`${what} leaves ${difference(before, after)}`);
    before = after;
  }
  assert.deepEqual(faults, []);
  assert.ok(at < MOST_CALLS, "too many calls");
  return at;
}

/** What is held now that was not before, and the other way round. */
function difference(before: readonly string[], after: readonly string[]): string {
  const more = after.filter((line) => !before.includes(line));
  const less = before.filter((line) => !after.includes(line));
  return `${more.join(", ") || "less"}; before: ${less.join(", ") || "nothing of it"}`;
}

async function well(scenario: Scenario): Promise<void> {
  refuseCall(-1);
  const error = await outcome(scenario);
  if (error !== undefined) throw new Error("nothing was refused, and it failed", { cause: error });
  assert.deepEqual(scenario.reported?.() ?? [], []);
}

/** How a run ends. One that hangs ends the test: what it holds and does would spoil all others. */
async function outcome(scenario: Scenario): Promise<unknown> {
  let timer: NodeJS.Timeout | undefined;
  const hangs = new Promise<boolean>((resolve) => {
    timer = setTimeout(resolve, PATIENCE_MS, true);
  });
  let result: unknown;
  const ended = scenario.run().catch((error: unknown) => {
    result = error;
  });
  const isHanging = await Promise.race([hangs, ended]);
  clearTimeout(timer);
  assert.notEqual(isHanging, true, `it hangs: call ${refusedCall()} was refused, ${callsMade().length} were made`);
  return result;
}

/** What is held when it is what it was before, or when it does not become that. */
async function settled(before: readonly string[]): Promise<string[]> {
  await turnUntil(() => isDeepStrictEqual(held(), before), 200);
  return held();
}
