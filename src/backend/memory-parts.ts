/** The parts of a driver's memory that the data of one request come from or go to. */

/**
 * Stretches of the driver's memory, in the order of the data. The back-end uses one object for request after request:
 * a storage that finishes later keeps a copy, as `rest(0)` makes it.
 *
 * @example
 * ```ts
 * import { MemoryParts } from "virtio-driver/backend";
 * const memory = new Uint8Array(4096);
 * const parts = new MemoryParts();
 * parts.add(memory, 0, 512);
 * parts.add(memory, 1024, 100);
 * console.log(parts.count, parts.bytes, parts.rest(600).bytes); // 2 612 12
 * ```
 */
export class MemoryParts {
  /** The memory that each part lies in. */
  readonly memory: Uint8Array[] = [];
  /** Of each part the offset in its memory, and the length, in bytes: pairs. */
  places = new Float64Array(2);
  /** How many parts. */
  count = 0;
  /** Bytes of all of them. */
  bytes = 0;

  /** Forget all parts. */
  clear(): void {
    this.count = 0;
    this.bytes = 0;
  }

  /** Have one part: `length` bytes of `memory` from `offset` on. */
  only(memory: Uint8Array, offset: number, length: number): void {
    this.memory[0] = memory;
    this.places[0] = offset;
    this.places[1] = length;
    this.count = 1;
    this.bytes = length;
  }

  /** Add `length` bytes of `memory` from `offset` on. Parts that touch become one. */
  add(memory: Uint8Array, offset: number, length: number): void {
    const { count, places } = this;
    this.bytes += length;
    if (count > 0 && this.memory[count - 1] === memory) {
      const last = 2 * count - 2;
      if (places[last] + places[last + 1] === offset) {
        places[last + 1] += length;
        return;
      }
    }
    if (2 * count === places.length) this.grow();
    this.memory[count] = memory;
    this.places[2 * count] = offset;
    this.places[2 * count + 1] = length;
    this.count = count + 1;
  }

  /** A copy without the first `skip` bytes. */
  rest(skip: number): MemoryParts {
    const rest = new MemoryParts();
    let lead = skip;
    for (let i = 0; i < this.count; i++) {
      const length = this.places[2 * i + 1];
      if (lead < length) rest.add(this.memory[i], this.places[2 * i] + lead, length - lead);
      lead = Math.max(0, lead - length);
    }
    return rest;
  }

  private grow(): void {
    const { places } = this;
    this.places = new Float64Array(2 * places.length);
    this.places.set(places);
  }

  /** A view of each part. */
  views(): Uint8Array[] {
    const views: Uint8Array[] = [];
    for (let i = 0; i < this.count; i++) {
      const offset = this.places[2 * i];
      views.push(this.memory[i].subarray(offset, offset + this.places[2 * i + 1]));
    }
    return views;
  }
}
