/** What the rounds of `npm run bench` measured: medians, and what they varied between. */

import { type Case, keyOf } from "./cases.js";
import { median } from "./report.js";
import type { Round } from "./round.js";

/** A figure of a case over all rounds. */
export interface Figure {
  readonly median: number;
  readonly low: number;
  readonly high: number;
}

/** The rounds of all cases. */
export class Results {
  private readonly rounds = new Map<string, Round[]>();

  /** Keep what one round of a case measured. */
  add(each: Case, round: Round): void {
    const key = keyOf(each);
    const before = this.rounds.get(key);
    if (before === undefined) this.rounds.set(key, [round]);
    else before.push(round);
  }

  /** A figure of a case; undefined when it was not measured. */
  figure(each: Case, name: keyof Round): Figure | undefined {
    const values = this.rounds.get(keyOf(each))?.map((round) => round[name]);
    if (values === undefined) return undefined;
    return { median: median(values), low: Math.min(...values), high: Math.max(...values) };
  }
}
