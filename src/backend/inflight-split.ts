/** What a back-end keeps in the region of requests in flight about a split ring (`QueueRegionSplit`). */

import { type DescriptorChain, lyingDriver } from "../virtqueue/device-chain.js";
import type { DeviceVirtqueue } from "../virtqueue/device.js";
import { INFLIGHT_UNUSED, INFLIGHT_VERSION, type InflightRecord, type InflightViews, lyingRegion } from "./inflight.js";

/** `QueueRegionSplit` in 16-bit units: features (64 bits), version, desc_num, last_batch_head, used_idx, desc[]. */
const VERSION = 4;
const DESC_NUM = 5;
const LAST_BATCH_HEAD = 6;
const USED_IDX = 7;

/** `DescStateSplit` of head `i`, 16 bytes: inflight (8 bits) at 0, next (16) at 6, counter (64) at 8. */
const inflightAt = (i: number): number => 16 + 16 * i;
const nextAt = (i: number): number => 8 + 8 * i + 3;
const counterAt = (i: number): number => 4 + 4 * i + 2;

/**
 * What another back-end relies on is stored in the order of the specification; a process that is killed leaves a prefix
 * of it. A request is in flight from `inflight = 1` on. It is done from the store of `used.idx` on, which the ring makes
 * between `publishing` and `published`: until the flags of the batch are cleared, `used_idx` lags behind and tells how
 * many they are, and `last_batch_head` and `next` which.
 */
export class SplitInflightRecord implements InflightRecord {
  readonly base: number;

  private readonly bytes: Uint8Array;
  private readonly halves: Uint16Array;
  private readonly words: Uint32Array;
  /** By head: whether it is in flight. */
  private readonly held: Uint8Array;
  /** Heads that are given back with the next publication. */
  private readonly batch: Uint16Array;
  private batched = 0;
  private lastHead: number;
  private usedIdx: number;
  private counterLo = 0;
  private counterHi = 0;
  /** Heads to be carried out again, oldest first. */
  private readonly again: readonly number[];
  waiting: number;

  /**
   * @param size descriptors of the ring.
   * @param room descriptors that the region has room for.
   * @param usedIdx `used.idx` of the ring.
   * @param base what `SET_VRING_BASE` said; counts when the region is not in use.
   * @throws VirtioError ERR_VIRTIO_PROTOCOL when the region cannot belong to this ring.
   */
  constructor(views: InflightViews, size: number, room: number, usedIdx: number, base: number) {
    const { bytes, halves, words } = views;
    this.bytes = bytes;
    this.halves = halves;
    this.words = words;
    this.held = new Uint8Array(size);
    this.batch = new Uint16Array(size);
    this.usedIdx = usedIdx;
    const version = halves[VERSION];
    if (version === INFLIGHT_UNUSED) {
      for (let i = 0; i < size; i++) bytes[inflightAt(i)] = 0;
      halves[DESC_NUM] = room;
      halves[LAST_BATCH_HEAD] = 0;
      halves[USED_IDX] = usedIdx;
      halves[VERSION] = INFLIGHT_VERSION;
      this.lastHead = 0;
      this.again = [];
      this.waiting = 0;
      this.base = base;
      return;
    }
    if (version !== INFLIGHT_VERSION) throw lyingRegion(`version ${version}, expected ${INFLIGHT_VERSION}`);
    if (halves[DESC_NUM] !== room) throw lyingRegion(`${halves[DESC_NUM]} entries, expected ${room}`);
    this.lastHead = halves[LAST_BATCH_HEAD];
    this.commit(size);
    this.again = this.find(size);
    this.waiting = this.again.length;
    this.base = (usedIdx + this.again.length) & 0xffff;
  }

  refetch(queue: DeviceVirtqueue, chain: DescriptorChain): void {
    queue.refetch(chain, this.again[this.again.length - this.waiting--]);
  }

  fetched(chain: DescriptorChain): void {
    const head = chain.id;
    if (this.held[head] !== 0) throw lyingDriver(`descriptor ${head} twice`);
    this.held[head] = 1;
    const counter = counterAt(head);
    this.words[counter] = this.counterLo;
    this.words[counter + 1] = this.counterHi;
    this.count(this.counterLo, this.counterHi);
    this.bytes[inflightAt(head)] = 1;
  }

  done(id: number): void {
    // Counts from `publishing` on: the ring's store right behind that waits for all stores before it.
    this.halves[nextAt(id)] = this.lastHead;
    this.lastHead = id;
    this.batch[this.batched++] = id;
  }

  publishing(): void {
    this.halves[LAST_BATCH_HEAD] = this.lastHead;
  }

  published(): void {
    for (let i = 0; i < this.batched; i++) {
      const head = this.batch[i];
      this.bytes[inflightAt(head)] = 0;
      this.held[head] = 0;
    }
    this.usedIdx = (this.usedIdx + this.batched) & 0xffff;
    this.halves[USED_IDX] = this.usedIdx;
    this.batched = 0;
  }

  settle(): void {
    if (this.waiting === 0) this.halves[VERSION] = INFLIGHT_UNUSED;
  }

  /** Finish the batch whose publication was the last thing that happened. */
  private commit(size: number): void {
    const { bytes, halves } = this;
    const count = (this.usedIdx - halves[USED_IDX]) & 0xffff;
    if (count > size) throw lyingRegion(`a used index of ${halves[USED_IDX]}, the ring one of ${this.usedIdx}`);
    for (let i = 0, head = this.lastHead; i < count; i++) {
      if (head >= size) throw lyingRegion(`descriptor ${head} in the last batch of a queue of ${size}`);
      bytes[inflightAt(head)] = 0;
      head = halves[nextAt(head)];
    }
    halves[USED_IDX] = this.usedIdx;
  }

  /** The heads in flight, oldest first. */
  private find(size: number): number[] {
    const found: { head: number; lo: number; hi: number }[] = [];
    for (let head = 0; head < size; head++) {
      const state = this.bytes[inflightAt(head)];
      if (state === 0) continue;
      if (state !== 1) throw lyingRegion(`the state ${state} for descriptor ${head}`);
      const lo = this.words[counterAt(head)];
      const hi = this.words[counterAt(head) + 1];
      found.push({ head, lo, hi });
      this.held[head] = 1;
    }
    found.sort((a, b) => a.hi - b.hi || a.lo - b.lo);
    const last = found.at(-1);
    if (last !== undefined) this.count(last.lo, last.hi);
    return found.map(({ head }) => head);
  }

  /** The counter behind one of these halves; 2^64 is never reached, but a front-end may say so. */
  private count(lo: number, hi: number): void {
    this.counterLo = (lo + 1) | 0;
    this.counterHi = this.counterLo === 0 ? (hi + 1) | 0 : hi;
  }
}
