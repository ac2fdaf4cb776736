/**
 * The record of requests in flight, against death at every store: after each one, and before it, another back-end goes
 * on with a copy of the memory, and must carry out what is not done yet, in order, nothing twice, nothing lost.
 */

import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import {
  type InflightRecord,
  type InflightViews,
  inflightPartBytes,
  inflightViews,
} from "../../src/backend/inflight.js";
import { PackedInflightRecord } from "../../src/backend/inflight-packed.js";
import { SplitInflightRecord } from "../../src/backend/inflight-split.js";
import { BackendQueueStats } from "../../src/backend/stats.js";
import { TrackedQueue } from "../../src/backend/tracked-queue.js";
import { DescriptorChain, DeviceMemory, DeviceVirtqueue, VirtioFeature } from "../../src/virtqueue/index.js";
import {
  areasOf,
  type DriverPlace,
  type Element,
  PackedDriver,
  placeRing,
  SplitDriver,
} from "../virtqueue/device-driver.js";

const { INDIRECT_DESC, RING_PACKED, EVENT_IDX } = VirtioFeature;
const DATA = 0x1000n;
const FRESH = { split: 0, packed: 0x8000_8000 };

type Format = keyof typeof FRESH;
type Driver = SplitDriver | PackedDriver;

/** A back-end on the memory of a ring and on a region; `watch` hands on views that see each store. */
class BackEnd {
  readonly record: InflightRecord;
  readonly counts = new BackendQueueStats(0);
  readonly queue: TrackedQueue;
  readonly memory = new DeviceMemory();

  constructor(
    format: Format,
    place: DriverPlace,
    region: ArrayBuffer,
    room: number,
    watch: (views: InflightViews) => InflightViews = (views) => views,
  ) {
    const areas = areasOf(place);
    const views = watch(inflightViews(region, 0, region.byteLength));
    if (format === "packed") {
      this.record = new PackedInflightRecord(views, place.size, room, areas.descriptorArea, FRESH.packed);
    } else {
      const usedIdx = new DataView(place.buffer).getUint16(place.device + 2, true);
      this.record = new SplitInflightRecord(views, place.size, room, usedIdx, FRESH.split);
    }
    this.memory.add(place.address, place.buffer);
    this.memory.add(DATA, new ArrayBuffer(0x1000));
    const features = INDIRECT_DESC | EVENT_IDX | (format === "packed" ? RING_PACKED : 0n);
    const options = { queueSize: place.size, features, memory: this.memory, ...areas, base: this.record.base };
    this.queue = new TrackedQueue(new DeviceVirtqueue(options), this.record, this.counts);
  }
}

/** The same driver over a copy of its memory. */
function copyOf(driver: Driver): Driver {
  const place = { ...driver.place, buffer: driver.place.buffer.slice(0) };
  const state = structuredClone(
    Object.fromEntries(Object.entries(driver).filter(([key]) => key !== "view" && key !== "place")),
  );
  const prototype: object = Object.getPrototypeOf(driver) as object;
  return Object.assign(Object.create(prototype) as Driver, state, { place, view: new DataView(place.buffer) });
}

/** Thrown where a back-end dies. */
const DEAD = new Error("dead");

/** A driver, its back-end, and what is true of the requests. */
class World {
  readonly driver: Driver;
  backEnd: BackEnd;
  /** Requests in the order they became available: what names them, and the length of their first element. */
  readonly order: { id: number; length: number; elements: number }[] = [];
  readonly taken: { id: number; ringCount: number }[] = [];
  /** Stores until the back-end dies in earnest; below 0 never. */
  fuse = -1;
  /** How often somebody died here. */
  deaths = 0;

  private readonly format: Format;
  private readonly room: number;
  private readonly region: ArrayBuffer;
  private nextLength = 1;
  /** Requests given back and not collected: they are before those taken. */
  private missing = 0;

  constructor(format: Format, size: number, room: number) {
    this.format = format;
    this.room = room;
    this.driver = format === "packed" ? new PackedDriver(placeRing(size)) : new SplitDriver(placeRing(size));
    this.region = new ArrayBuffer(inflightPartBytes(room, format === "packed"));
    this.backEnd = this.begin();
  }

  /** A back-end that dies at each of its stores. */
  begin(): BackEnd {
    return new BackEnd(this.format, this.driver.place, this.region, this.room, (views) => ({
      bytes: this.watched(views.bytes),
      halves: this.watched(views.halves),
      words: this.watched(views.words),
    }));
  }

  add(elements: number, indirect: boolean): void {
    const length = this.nextLength++;
    const list: Element[] = [];
    for (let i = 0; i < elements; i++) list.push({ address: DATA, length, writable: i > 0 });
    const id = this.driver.add(list, indirect ? elements : 0);
    if (id < 0) return;
    this.order.push({ id, length, elements });
    this.driver.publish();
  }

  pop(): void {
    const chain = new DescriptorChain(this.driver.place.size);
    if (!this.backEnd.queue.pop(chain)) return;
    this.check(chain, this.order[this.taken.length + this.missing]);
    this.taken.push({ id: chain.id, ringCount: chain.ringCount });
  }

  push(which: number): void {
    if (this.taken.length === 0) return;
    const [{ id, ringCount }] = this.taken.splice(which % this.taken.length, 1);
    this.backEnd.queue.push(id, ringCount, 1);
    // What is done keeps its place in the order until the driver has it.
    const at = this.order.findIndex((request) => request.id === id);
    this.order.splice(this.missing, 0, ...this.order.splice(at, 1));
    this.missing++;
  }

  publish(): void {
    this.backEnd.queue.publish();
  }

  collect(): void {
    for (const { id } of this.driver.collect()) {
      const at = this.order.findIndex((request) => request.id === id);
      assert.ok(at >= 0 && at < this.missing, `request ${id} is done and was not`);
      this.order.splice(at, 1);
      this.missing--;
    }
  }

  /** Go on with another back-end, after the death of the one before. */
  replace(): void {
    const done = new Set(
      copyOf(this.driver)
        .collect()
        .map(({ id }) => id),
    );
    // What was pushed and not published is to be done again, at its old place.
    this.order.sort((a, b) => Number(done.has(b.id)) - Number(done.has(a.id)) || a.length - b.length);
    this.missing = done.size;
    this.taken.length = 0;
    this.backEnd = this.begin();
  }

  /** Somebody dies right now: another back-end goes on with what there is. */
  private succeed(): void {
    this.deaths++;
    const driver = copyOf(this.driver);
    const done = new Set(driver.collect().map(({ id }) => id));
    const left = this.order.filter(({ id }) => !done.has(id)).sort((a, b) => a.length - b.length);
    const { queue, record, counts } = new BackEnd(this.format, driver.place, this.region.slice(0), this.room);
    const { waiting } = record;
    const chains: DescriptorChain[] = [];
    for (let chain = new DescriptorChain(driver.place.size); queue.pop(chain); ) {
      this.check(chain, left[chains.length]);
      chains.push(chain);
      chain = new DescriptorChain(driver.place.size);
    }
    assert.equal(chains.length, left.length, "requests were lost");
    assert.equal(counts.replayed, waiting);
    const odd = chains.filter((_, i) => i % 2 === 1);
    const even = chains.filter((_, i) => i % 2 === 0);
    for (const chain of [...odd, ...even]) {
      queue.push(chain.id, chain.ringCount, 1);
      queue.publish();
      assert.deepEqual(
        driver.collect().map(({ id }) => id),
        [chain.id],
      );
    }
    assert.equal(driver.chains.size, 0);
  }

  private check(chain: DescriptorChain, request: { id: number; length: number; elements: number } | undefined): void {
    assert.ok(request !== undefined, `request ${chain.id} came twice`);
    assert.deepEqual(
      { id: chain.id, length: chain.length[0], elements: chain.count },
      { id: request.id, length: request.length, elements: request.elements },
    );
  }

  private watched<T extends Uint8Array | Uint16Array | Uint32Array>(view: T): T {
    return new Proxy(view, {
      get: (target, key) => Reflect.get(target, key) as unknown,
      set: (target, key, value) => {
        if (this.fuse-- === 0) throw DEAD;
        if (this.backEnd !== undefined) this.succeed();
        Reflect.set(target, key, value);
        this.succeed();
        return true;
      },
    });
  }
}

const step = fc.oneof(
  { weight: 4, arbitrary: fc.record({ kind: fc.constant("add" as const), n: fc.integer({ min: 1, max: 3 }) }) },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant("table" as const), n: fc.integer({ min: 1, max: 4 }) }) },
  { weight: 5, arbitrary: fc.record({ kind: fc.constant("pop" as const), n: fc.constant(0) }) },
  { weight: 4, arbitrary: fc.record({ kind: fc.constant("push" as const), n: fc.nat(7) }) },
  { weight: 2, arbitrary: fc.record({ kind: fc.constant("publish" as const), n: fc.constant(0) }) },
  { weight: 2, arbitrary: fc.record({ kind: fc.constant("collect" as const), n: fc.constant(0) }) },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant("die" as const), n: fc.nat(12) }) },
);

for (const format of ["split", "packed"] as const) {
  describe(`requests in flight of a ${format} ring`, () => {
    it("VHU-BE-27 are carried out again in order after death at any store, none twice, none lost", () => {
      let deaths = 0;
      fc.assert(
        fc.property(
          fc.array(step, { minLength: 20, maxLength: 60 }),
          fc.constantFrom([8, 8], [8, 16], [4, 4]),
          (steps, [size, room]) => {
            const world = new World(format, size, room);
            for (const { kind, n } of steps) {
              try {
                if (kind === "add") world.add(n, false);
                else if (kind === "table") world.add(n, true);
                else if (kind === "push") world.push(n);
                else if (kind === "die") world.fuse = n;
                else world[kind]();
              } catch (error) {
                if (error !== DEAD) throw error;
                world.replace();
              }
            }
            deaths += world.deaths;
          },
        ),
        { numRuns: 150 },
      );
      assert.ok(deaths > 1000, `${deaths} deaths prove little`);
    });
  });
}
