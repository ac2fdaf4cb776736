/** Latencies counted in buckets: recording one allocates nothing, and every percentile is at most 1.6 % off. */

/** log2 of the buckets per power of two. */
const STEP_BITS = 6;
const STEPS = 1 << STEP_BITS;
/** Values of 31 bits and less; what is longer than 2.1 seconds counts as that. */
const MAX_NS = 2 ** 31 - 1;

/** So many durations lay between two bounds. */
export interface Bin {
  /** Shortest and longest duration that belongs here, in nanoseconds. */
  readonly from: number;
  readonly to: number;
  readonly count: number;
}

/** Counts of durations in nanoseconds. */
export class LatencyHistogram {
  private readonly counts = new Float64Array((32 - STEP_BITS + 1) * STEPS);
  private sum = 0;
  private recorded = 0;
  private longest = 0;
  private shortest = Number.POSITIVE_INFINITY;

  /** Count a duration of `ns` nanoseconds. */
  record(ns: number): void {
    const value = ns > MAX_NS ? MAX_NS : ns | 0;
    this.counts[bucketOf(value)]++;
    this.recorded++;
    this.sum += ns;
    if (ns > this.longest) this.longest = ns;
    if (ns < this.shortest) this.shortest = ns;
  }

  /** Forget everything. */
  clear(): void {
    this.counts.fill(0);
    this.sum = 0;
    this.recorded = 0;
    this.longest = 0;
    this.shortest = Number.POSITIVE_INFINITY;
  }

  /** The counts of several together, as they are now. */
  static sum(parts: readonly LatencyHistogram[]): LatencyHistogram {
    const sum = new LatencyHistogram();
    for (const part of parts) {
      for (let bucket = 0; bucket < sum.counts.length; bucket++) sum.counts[bucket] += part.counts[bucket];
      sum.sum += part.sum;
      sum.recorded += part.recorded;
      sum.longest = Math.max(sum.longest, part.longest);
      sum.shortest = Math.min(sum.shortest, part.shortest);
    }
    return sum;
  }

  /** What was recorded after `earlier`, a {@link sum} of these counts; its shortest and longest are of all. */
  since(earlier: LatencyHistogram): LatencyHistogram {
    const rest = LatencyHistogram.sum([this]);
    for (const [bucket, count] of earlier.counts.entries()) rest.counts[bucket] -= count;
    rest.sum -= earlier.sum;
    rest.recorded -= earlier.recorded;
    return rest;
  }

  /** How many were recorded. */
  get count(): number {
    return this.recorded;
  }

  /** Mean in nanoseconds, exact; 0 when nothing was recorded. */
  get mean(): number {
    return this.recorded === 0 ? 0 : this.sum / this.recorded;
  }

  /** Shortest and longest in nanoseconds, exact; 0 when nothing was recorded. */
  get min(): number {
    return this.recorded === 0 ? 0 : this.shortest;
  }

  /** The longest in nanoseconds, exact. */
  get max(): number {
    return this.longest;
  }

  /** The duration in nanoseconds that the share `p` (0 to 1) does not exceed; 0 when nothing was recorded. */
  percentile(p: number): number {
    let rest = Math.max(1, Math.ceil(p * this.recorded));
    for (const [bucket, count] of this.counts.entries()) {
      rest -= count;
      if (rest <= 0) return Math.min(endOfBucket(bucket), this.longest);
    }
    return 0;
  }

  /** Nanoseconds of all together. */
  get total(): number {
    return this.sum;
  }

  /** How many were not longer than each of `bounds`, nanoseconds in rising order; a bound may be 1.6 % lower in truth. */
  upTo(bounds: readonly number[]): number[] {
    let bucket = 0;
    let count = 0;
    return bounds.map((bound) => {
      for (; bucket < this.counts.length && endOfBucket(bucket) <= bound; bucket++) count += this.counts[bucket];
      return count;
    });
  }

  /**
   * The counts in `perOctave` bins for each power of two, from the first bin that is not empty to the last.
   *
   * @param perOctave - a power of two, at most 64. Below 64 ns an octave may have fewer bins than that.
   */
  bins(perOctave: number): Bin[] {
    const width = STEPS / perOctave;
    const bins: Bin[] = [];
    for (let first = 0; first < this.counts.length; first += width) {
      const count = this.counts.subarray(first, first + width).reduce((sum, each) => sum + each, 0);
      bins.push({ from: endOfBucket(first - 1) + 1, to: endOfBucket(first + width - 1), count });
    }
    const isFilled = ({ count }: Bin): boolean => count > 0;
    return bins.slice(Math.max(0, bins.findIndex(isFilled)), bins.findLastIndex(isFilled) + 1);
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
