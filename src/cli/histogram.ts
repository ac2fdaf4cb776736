/** Latencies counted in buckets: recording one allocates nothing, and every percentile is at most 1.6 % off. */

/** log2 of the buckets per power of two. */
const STEP_BITS = 6;
const STEPS = 1 << STEP_BITS;
/** Values of 31 bits and less; what is longer than 2.1 seconds counts as that. */
const MAX_NS = 2 ** 31 - 1;

/** So many durations lay between two powers of two. */
export interface Octave {
  /** Shortest and longest duration that belongs here, in nanoseconds. */
  readonly from: number;
  readonly to: number;
  readonly count: number;
}

/** Counts of durations in nanoseconds. */
export class LatencyHistogram {
  private readonly counts = new Float64Array((32 - STEP_BITS + 1) * STEPS);
  private sum = 0;
  private total = 0;
  private longest = 0;
  private shortest = Number.POSITIVE_INFINITY;

  /** Count a duration of `ns` nanoseconds. */
  record(ns: number): void {
    const value = ns > MAX_NS ? MAX_NS : ns | 0;
    this.counts[bucketOf(value)]++;
    this.total++;
    this.sum += ns;
    if (ns > this.longest) this.longest = ns;
    if (ns < this.shortest) this.shortest = ns;
  }

  /** The counts as they are now. */
  copy(): LatencyHistogram {
    const copy = new LatencyHistogram();
    copy.counts.set(this.counts);
    copy.sum = this.sum;
    copy.total = this.total;
    copy.longest = this.longest;
    copy.shortest = this.shortest;
    return copy;
  }

  /** What was recorded after `earlier`, a {@link copy} of these counts; its shortest and longest are of all. */
  since(earlier: LatencyHistogram): LatencyHistogram {
    const rest = this.copy();
    for (const [bucket, count] of earlier.counts.entries()) rest.counts[bucket] -= count;
    rest.sum -= earlier.sum;
    rest.total -= earlier.total;
    return rest;
  }

  /** How many were recorded. */
  get count(): number {
    return this.total;
  }

  /** Mean in nanoseconds, exact; 0 when nothing was recorded. */
  get mean(): number {
    return this.total === 0 ? 0 : this.sum / this.total;
  }

  /** Shortest and longest in nanoseconds, exact; 0 when nothing was recorded. */
  get min(): number {
    return this.total === 0 ? 0 : this.shortest;
  }

  /** The longest in nanoseconds, exact. */
  get max(): number {
    return this.longest;
  }

  /** The duration in nanoseconds that the share `p` (0 to 1) does not exceed; 0 when nothing was recorded. */
  percentile(p: number): number {
    let rest = Math.max(1, Math.ceil(p * this.total));
    for (const [bucket, count] of this.counts.entries()) {
      rest -= count;
      if (rest <= 0) return Math.min(endOfBucket(bucket), this.longest);
    }
    return 0;
  }

  /** The counts by powers of two, from the first octave that is not empty to the last. */
  octaves(): Octave[] {
    const octaves: Octave[] = [];
    for (let first = 0; first < this.counts.length; first += STEPS) {
      const count = this.counts.subarray(first, first + STEPS).reduce((sum, each) => sum + each, 0);
      octaves.push({ from: endOfBucket(first - 1) + 1, to: endOfBucket(first + STEPS - 1), count });
    }
    const isFilled = ({ count }: Octave): boolean => count > 0;
    return octaves.slice(Math.max(0, octaves.findIndex(isFilled)), octaves.findLastIndex(isFilled) + 1);
  }
}

/** Buckets are one nanosecond wide below STEPS, then STEPS for each power of two. */
function bucketOf(value: number): number {
  const shift = Math.max(0, 31 - Math.clz32(value | 1) - STEP_BITS);
  return (shift << STEP_BITS) + (value >>> shift);
}

/** Largest value that falls into `bucket`. */
function endOfBucket(bucket: number): number {
  const shift = Math.max(0, (bucket >> STEP_BITS) - 1);
  return (bucket - (shift << STEP_BITS) + 1) * 2 ** shift - 1;
}
