/** Opening a block device on a fake transport, and a disk behind it that checks what it is asked. */

import type { TestContext } from "node:test";
import { BlockDevice, type OpenBlockOptions } from "../../../src/devices/blk/index.js";
import { VirtioError, type VirtioErrorCode } from "../../../src/errors.js";
import { type BlkConfig, BlkFeature, BlkRequestType, encodeBlkConfig } from "../../../src/protocol/blk.js";
import {
  type FakeBlkRequest,
  type FakeQueue,
  FakeTransport,
  type FakeTransportOptions,
  takeBlk,
} from "../../../src/testing/index.js";
import { VirtioFeature } from "../../../src/virtqueue/index.js";

/** Kinds of rings by their features. */
export const RINGS = {
  split: 0n,
  "split with everything": VirtioFeature.EVENT_IDX | VirtioFeature.INDIRECT_DESC,
  "split in order": VirtioFeature.EVENT_IDX | VirtioFeature.IN_ORDER,
  packed: VirtioFeature.RING_PACKED,
  "packed with everything": VirtioFeature.RING_PACKED | VirtioFeature.EVENT_IDX | VirtioFeature.INDIRECT_DESC,
  "packed in order": VirtioFeature.RING_PACKED | VirtioFeature.INDIRECT_DESC | VirtioFeature.IN_ORDER,
} as const;

export interface FakeOptions extends Omit<FakeTransportOptions, "config"> {
  /** Fields of the config space; `null` for a device without one. The capacity is 2048 sectors by default. */
  readonly config?: Partial<BlkConfig> | null;
  readonly open?: OpenBlockOptions;
}

/** An open block device, and the device behind it. */
export class Bench {
  readonly transport: FakeTransport;
  readonly disk: BlockDevice;

  constructor(transport: FakeTransport, disk: BlockDevice) {
    this.transport = transport;
    this.disk = disk;
  }

  get queue(): FakeQueue {
    return this.transport.queues[0];
  }

  /** What the driver has submitted by now, on all queues. */
  async take(): Promise<FakeBlkRequest[]> {
    await turn();
    return this.transport.queues.flatMap((queue) => takeBlk(queue));
  }

  /** The one request that the driver has submitted by now. */
  async takeOne(): Promise<FakeBlkRequest> {
    const taken = await this.take();
    if (taken.length !== 1) throw new Error(`the driver submitted ${taken.length} requests, expected 1`);
    return taken[0];
  }
}

export function makeTransport(options: FakeOptions = {}): FakeTransport {
  const { config = {}, features = 0n, open, ...rest } = options;
  void open;
  return new FakeTransport({
    features: VirtioFeature.VERSION_1 | features,
    ...(config !== null && { config: encodeBlkConfig({ capacity: 2048n, ...config }) }),
    ...rest,
  });
}

/** Open a block device that is closed at the end of the test, whatever is in flight then. */
export async function openFake(t: TestContext, options: FakeOptions = {}): Promise<Bench> {
  const transport = makeTransport(options);
  const disk = await BlockDevice.open(transport, options.open ?? {});
  t.after(async () => {
    if (disk.pending > 0) transport.lose(new VirtioError("ERR_VIRTIO_DISCONNECTED", "the test is over"));
    await disk.close();
  });
  return new Bench(transport, disk);
}

/** Let everything that was begun get as far as it can without anybody else. */
export function turn(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve));
}

/** `length` bytes that differ from those of other seeds and at other offsets. */
export function pattern(length: number, seed = 1): Uint8Array {
  return Uint8Array.from({ length }, (_, i) => (seed * 101 + i * 7 + (i >> 8) * 13) & 0xff);
}

/** For `assert.rejects`: a VirtioError of this code, whose message has `words` in it. */
export function failure(code: VirtioErrorCode, words: string | RegExp = ""): (error: unknown) => boolean {
  return (error) => {
    if (!(error instanceof VirtioError)) throw new Error("not a VirtioError", { cause: error });
    if (error.code !== code) throw new Error(`expected ${code}, got ${error.code}: ${error.message}`);
    if (typeof words === "string" ? error.message.includes(words) : words.test(error.message)) return true;
    throw new Error(`${String(words)} is not in: ${error.message}`);
  };
}

/** For `assert.rejects`: a refused argument of this name. */
export function refused(name: string): (error: unknown) => boolean {
  return (error) => {
    if (!(error instanceof RangeError || error instanceof TypeError)) throw new Error("not refused", { cause: error });
    if (!("code" in error && error.code === "ERR_VIRTIO_ARGUMENT")) throw new Error("no code", { cause: error });
    if (error.message.startsWith(`"${name}" expected `)) return true;
    throw new Error(`"${name}" is not what is refused by: ${error.message}`);
  };
}

/** The segments of a DISCARD, WRITE_ZEROES or SECURE_ERASE request. */
export function segmentsOf({ data }: FakeBlkRequest): { sector: number; count: number; flags: number }[] {
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  return Array.from({ length: data.length / 16 }, (_, i) => ({
    sector: Number(view.getBigUint64(16 * i, true)),
    count: view.getUint32(16 * i + 8, true),
    flags: view.getUint32(16 * i + 12, true),
  }));
}

/** A disk in memory that answers at once, and writes down every request that breaks a rule. */
export class CheckedDisk {
  readonly bytes: Uint8Array;
  /** Rules that the driver broke. */
  readonly faults: string[] = [];
  /** Types of the requests served, in order. */
  readonly served: number[] = [];
  private readonly config: BlkConfig;
  private readonly maxElements: number;

  constructor(config: BlkConfig, queueSize: number) {
    this.config = config;
    this.bytes = new Uint8Array(Number(config.capacity) * 512);
    this.bytes.set(pattern(Math.min(this.bytes.length, 1 << 20), 9));
    this.maxElements = queueSize;
  }

  /** Serve one request. */
  serve(request: FakeBlkRequest): void {
    const { type, sector, reserved, data, room, raw } = request;
    const { sizeMax, segMax, capacity } = this.config;
    this.served.push(type);
    const [headerLength, ...sent] = raw.readableLengths;
    const received = raw.writableLengths.slice(0, -1);
    const elements = [...sent, ...received];
    this.check(headerLength === 16, `a header of ${headerLength} bytes`);
    this.check(raw.writableLengths.at(-1) === 1, "no status of one byte at the end");
    this.check(reserved === 0, `reserved ${reserved}`);
    this.check(elements.length + 2 <= this.maxElements, `${elements.length} data elements`);
    const most = segMax === undefined || segMax === 0 ? 1 : segMax;
    this.check(elements.length <= most, `${elements.length} data elements of ${most}`);
    for (const length of elements) {
      this.check(sizeMax === undefined || sizeMax === 0 || length <= sizeMax, `an element of ${length} bytes`);
    }
    switch (type) {
      case BlkRequestType.IN:
      case BlkRequestType.OUT: {
        const length = type === BlkRequestType.IN ? room : data.length;
        this.check(type === BlkRequestType.IN ? data.length === 0 : room === 0, "data in both directions");
        this.check(length > 0 && length % 512 === 0, `${length} bytes of data`);
        this.check(BigInt(sector) + BigInt(length / 512) <= capacity, `sector ${sector} + ${length / 512}`);
        if (type === BlkRequestType.OUT) this.bytes.set(data, sector * 512);
        request.answer(
          type === BlkRequestType.IN ? { data: this.bytes.slice(sector * 512, sector * 512 + length) } : {},
        );
        return;
      }
      case BlkRequestType.FLUSH:
        this.check(sector === 0 && elements.length === 0, `FLUSH of sector ${sector}, ${elements.length} elements`);
        request.answer();
        return;
      case BlkRequestType.DISCARD:
        this.serveSegments(request, this.config.discard, 0, 0xdd);
        return;
      case BlkRequestType.SECURE_ERASE:
        this.serveSegments(request, this.config.secureErase, 0, 0xee);
        return;
      case BlkRequestType.WRITE_ZEROES:
        this.serveSegments(request, this.config.writeZeroes, 1, 0);
        return;
      default:
        this.check(false, `type ${type}`);
        request.answer({ status: 2 });
    }
  }

  private serveSegments(
    request: FakeBlkRequest,
    limits: { readonly maxSectors: number; readonly maxSegments: number } | undefined,
    flagMask: number,
    fill: number,
  ): void {
    const { sector: requestSector, data, room } = request;
    this.check(limits !== undefined, `type ${request.type} without its feature`);
    this.check(requestSector === 0 && room === 0, `sector ${requestSector}, room ${room}`);
    this.check(data.length > 0 && data.length % 16 === 0, `${data.length} bytes of segments`);
    const segments = segmentsOf(request);
    const maxSegments = Math.max(1, limits?.maxSegments ?? 0);
    const maxSectors = (limits?.maxSectors ?? 0) || 0xffff_ffff;
    this.check(segments.length <= maxSegments, `${segments.length} segments of ${maxSegments}`);
    for (const { sector, count, flags } of segments) {
      this.check(count > 0 && count <= maxSectors, `${count} sectors of ${maxSectors}`);
      this.check(BigInt(sector) + BigInt(count) <= this.config.capacity, `segment ${sector} + ${count}`);
      this.check((flags & ~flagMask) === 0, `flags ${flags}`);
      this.bytes.fill(fill, sector * 512, (sector + count) * 512);
    }
    request.answer();
  }

  private check(isRight: boolean, fault: string): void {
    if (!isRight) this.faults.push(fault);
  }
}

/** Every feature of virtio-blk that is not about a limit. */
export const ALL_REQUESTS =
  BlkFeature.FLUSH | BlkFeature.DISCARD | BlkFeature.WRITE_ZEROES | BlkFeature.SECURE_ERASE | BlkFeature.LIFETIME;

/** Answer a read with data that tell its sector. */
export function answerRead(request: FakeBlkRequest): void {
  request.answer({ data: pattern(request.room, request.sector) });
}

/** Take and answer until nothing comes any more; returns the sectors in the order of submission. */
export async function serveAll(bench: Bench): Promise<number[]> {
  const sectors: number[] = [];
  for (let requests = await bench.take(); requests.length > 0; requests = await bench.take()) {
    for (const request of requests) {
      sectors.push(request.sector);
      answerRead(request);
    }
  }
  return sectors;
}
