/** Which bytes of a buffer are lent to requests in flight: refuses what two of them must not have together. */

/** Ranges that there is room for at first. */
const FIRST_ROOM = 16;

// What a range is lent for; above: so many requests whose data the device reads.
const FREE = 0;
const DEVICE_WRITES = -1;

/** A range in use that stands in the way of another. */
export interface Lending {
  /** First byte in the buffer. */
  readonly start: number;
  /** First byte behind it. */
  readonly end: number;
  /** Whether the device writes it, or reads it only. */
  readonly deviceWrites: boolean;
}

/**
 * Ranges of bytes in use. Two may overlap only if the device reads both.
 *
 * Requests on a large buffer tend to use the same parts of it again and again. So ranges are kept in order of address,
 * none overlapping another, and stay there when they are given back, until something else needs their bytes: whoever
 * wants such a range again finds it with a look or two, and has nothing to compare it with. The rare reading ranges
 * that overlap others in part are apart.
 */
export class Lendings {
  private starts = new Float64Array(FIRST_ROOM);
  private ends = new Float64Array(FIRST_ROOM);
  private uses = new Int32Array(FIRST_ROOM);
  private size = 0;
  /** Where the last range was found: the next one is often the same, or its neighbour. */
  private last = 0;
  private readonly overlapping: Lending[] = [];

  /**
   * Lend [start, end).
   *
   * @returns what stands in the way; nothing was lent then.
   */
  lend(start: number, end: number, deviceWrites: boolean): Lending | undefined {
    const index = this.firstBehind(start);
    if (index === this.size || this.starts[index] !== start || this.ends[index] !== end) {
      return this.lendAnew(index, start, end, deviceWrites);
    }
    const use = this.uses[index];
    if (use !== FREE && (deviceWrites || use === DEVICE_WRITES)) return this.at(index);
    const obstacle = deviceWrites ? this.readApart(start, end) : undefined;
    if (obstacle !== undefined) return obstacle;
    this.uses[index] = deviceWrites ? DEVICE_WRITES : use + 1;
    return undefined;
  }

  /**
   * Take back what was lent.
   *
   * @returns false when it was not.
   */
  giveBack(start: number, end: number): boolean {
    const index = this.firstBehind(start);
    if (index < this.size && this.starts[index] === start && this.ends[index] === end) {
      const use = this.uses[index];
      if (use !== FREE) {
        this.uses[index] = use === DEVICE_WRITES ? FREE : use - 1;
        return true;
      }
    }
    const apart = this.overlapping.findIndex((other) => other.start === start && other.end === end);
    if (apart < 0) return false;
    this.overlapping.splice(apart, 1);
    return true;
  }

  /** Lend a range that is not among those kept; `first` is the first of these that ends behind `start`. */
  private lendAnew(first: number, start: number, end: number, deviceWrites: boolean): Lending | undefined {
    let behind = first;
    let isShared = false;
    for (; behind < this.size && this.starts[behind] < end; behind++) {
      const use = this.uses[behind];
      if (use === FREE) continue;
      if (deviceWrites || use === DEVICE_WRITES) return this.at(behind);
      isShared = true;
    }
    const obstacle = deviceWrites ? this.readApart(start, end) : undefined;
    if (obstacle !== undefined) return obstacle;
    if (isShared) this.overlapping.push({ start, end, deviceWrites });
    else this.replace(first, behind, start, end, deviceWrites ? DEVICE_WRITES : 1);
    return undefined;
  }

  /** A range apart that the device reads, with bytes of [start, end). */
  private readApart(start: number, end: number): Lending | undefined {
    if (this.overlapping.length === 0) return undefined;
    return this.overlapping.find((other) => other.start < end && other.end > start);
  }

  /** Keep a range in the place of those from `first` to before `behind`, which are free, or of a free neighbour. */
  private replace(first: number, behind: number, start: number, end: number, use: number): void {
    const { uses } = this;
    let index = first;
    if (behind - first > 1) this.move(behind, first + 1);
    else if (behind === first && !(first < this.size && uses[first] === FREE)) {
      if (first > 0 && uses[first - 1] === FREE) index = first - 1;
      else {
        if (this.size === this.starts.length) index = this.makeRoom(first);
        this.move(index, index + 1);
      }
    }
    this.starts[index] = start;
    this.ends[index] = end;
    this.uses[index] = use;
    this.last = index;
  }

  /** Forget the ranges that are free; more room when that is not enough. Returns where `index` is then. */
  private makeRoom(index: number): number {
    const { starts, ends, uses } = this;
    let kept = 0;
    let moved = 0;
    for (let from = 0; from < this.size; from++) {
      if (from === index) moved = kept;
      if (uses[from] === FREE) continue;
      starts[kept] = starts[from];
      ends[kept] = ends[from];
      uses[kept++] = uses[from];
    }
    if (index === this.size) moved = kept;
    this.size = kept;
    // At most half full, or it would be done again soon.
    if (kept * 2 > starts.length) {
      this.starts = new Float64Array(starts.length * 2);
      this.ends = new Float64Array(starts.length * 2);
      this.uses = new Int32Array(starts.length * 2);
      this.starts.set(starts);
      this.ends.set(ends);
      this.uses.set(uses);
    }
    return moved;
  }

  /** Move the ranges from `from` on to `to`. */
  private move(from: number, to: number): void {
    const { size } = this;
    this.starts.copyWithin(to, from, size);
    this.ends.copyWithin(to, from, size);
    this.uses.copyWithin(to, from, size);
    this.size = size + to - from;
  }

  /** The first range that ends behind `start`; `size` when none does. */
  private firstBehind(start: number): number {
    const { starts, ends, size, last } = this;
    if (last < size && starts[last] === start) return last;
    if (last + 1 < size && starts[last + 1] === start) return (this.last = last + 1);
    let low = 0;
    let high = size;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if (ends[middle] > start) high = middle;
      else low = middle + 1;
    }
    this.last = low;
    return low;
  }

  private at(index: number): Lending {
    const deviceWrites = this.uses[index] === DEVICE_WRITES;
    return { start: this.starts[index], end: this.ends[index], deviceWrites };
  }
}
