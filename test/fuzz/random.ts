/** Random numbers that a seed names. */

/** A small fast generator (xorshift32 behind a hash of the seed); never for secrets. */
export class Random {
  private state: number;

  constructor(seed: number) {
    // Neighbouring seeds must not give neighbouring numbers.
    let hash = Math.imul(seed ^ (seed >>> 16), 0x45d9f3b);
    hash = Math.imul(hash ^ (hash >>> 16), 0x45d9f3b);
    this.state = (hash ^ (hash >>> 16)) | 0 || 0x9e3779b9;
  }

  /** Any 32 bits, unsigned. */
  u32(): number {
    let x = this.state;
    x ^= x << 13;
    x ^= x >>> 17;
    x ^= x << 5;
    this.state = x;
    return x >>> 0;
  }

  /** 0 to `count - 1`. */
  below(count: number): number {
    return this.u32() % count;
  }

  /** True once in `times`. */
  oneIn(times: number): boolean {
    return this.u32() % times === 0;
  }
}
