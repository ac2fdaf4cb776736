/** Free runs of an address space: what is left to hand out, in order of address, neighbours joined. */

/** Addresses 4 GiB apart differ in their upper 32 bits. */
const UPPER_HALF = 2 ** 32;

/**
 * The free part of an address space. Addresses and sizes are numbers below 2^53; the caller keeps them multiples of
 * its granule. First fit by address, so the same requests give the same addresses.
 */
export class FreeRuns {
  /** Starts and ends (exclusive) of the runs, ascending; no two touch. */
  readonly #starts: number[] = [];
  readonly #ends: number[] = [];
  #total = 0;

  /** Bytes in all runs. */
  get total(): number {
    return this.#total;
  }

  /**
   * Take `size` bytes at a multiple of `align`. What fits between two multiples of 4 GiB does not cross one, so
   * that the upper half of its addresses is one constant.
   *
   * @returns the address, or -1 when no run has room.
   */
  take(size: number, align: number): number {
    for (let index = 0; index < this.#starts.length; index++) {
      const start = this.#starts[index] ?? 0;
      const end = this.#ends[index] ?? 0;
      let address = Math.ceil(start / align) * align;
      const boundary = Math.ceil((address + 1) / UPPER_HALF) * UPPER_HALF;
      if (size <= UPPER_HALF && address + size > boundary) address = Math.ceil(boundary / align) * align;
      if (address + size > end) continue;
      this.#cut(index, start, address, address + size, end);
      this.#total -= size;
      return address;
    }
    return -1;
  }

  /**
   * Give [start, end) to the free runs.
   *
   * @returns false, with nothing changed, when a part of it is free already.
   */
  give(start: number, end: number): boolean {
    const index = this.#firstFrom(start);
    const joinsPrevious = index > 0 && (this.#ends[index - 1] ?? 0) >= start;
    if ((index > 0 && (this.#ends[index - 1] ?? 0) > start) || (this.#starts[index] ?? Infinity) < end) return false;
    const joinsNext = this.#starts[index] === end;
    if (joinsPrevious && joinsNext) {
      this.#ends.splice(index - 1, 1);
      this.#starts.splice(index, 1);
    } else if (joinsPrevious) {
      this.#ends[index - 1] = end;
    } else if (joinsNext) {
      this.#starts[index] = start;
    } else {
      this.#starts.splice(index, 0, start);
      this.#ends.splice(index, 0, end);
    }
    this.#total += end - start;
    return true;
  }

  /** Replace run `index` = [start, end) by what is left of it around [from, to). */
  #cut(index: number, start: number, from: number, to: number, end: number): void {
    if (start < from && to < end) {
      this.#ends[index] = from;
      this.#starts.splice(index + 1, 0, to);
      this.#ends.splice(index + 1, 0, end);
    } else if (start < from) {
      this.#ends[index] = from;
    } else if (to < end) {
      this.#starts[index] = to;
    } else {
      this.#starts.splice(index, 1);
      this.#ends.splice(index, 1);
    }
  }

  /** Index of the first run that starts at `address` or later. */
  #firstFrom(address: number): number {
    let low = 0;
    let high = this.#starts.length;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if ((this.#starts[middle] ?? 0) < address) low = middle + 1;
      else high = middle;
    }
    return low;
  }
}
