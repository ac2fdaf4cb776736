/** virtio-blk seen from the device, for tests: requests that are answered as a test says. */

import { BLK_HEADER_SIZE, BLK_STATUS_SIZE, BlkStatus } from "../protocol/blk.js";
import type { FakeRequest } from "./fake-device.js";
import type { FakeQueue } from "./fake-transport.js";

/** How a {@link FakeBlkRequest} is answered. */
export interface FakeBlkAnswer {
  /** The status byte; `"unwritten"` leaves it as the driver set it. Default 0, OK. */
  readonly status?: number | "unwritten";
  /** Data for the driver, from the start. Default: none. */
  readonly data?: Uint8Array;
  /** The length to report. Default: the data and, when it was written, the status. */
  readonly written?: number;
}

/** A virtio-blk request that a fake device holds (virtio 1.3, 5.2.6). */
export class FakeBlkRequest {
  /** `virtio_blk_req.type`. */
  readonly type: number;
  /** `virtio_blk_req.reserved`. */
  readonly reserved: number;
  /** `virtio_blk_req.sector`. */
  readonly sector: number;
  /** What the driver sent behind the header. */
  readonly data: Uint8Array;
  /** Bytes that the device may write before the status. */
  readonly room: number;
  /** The request as the ring has it. */
  readonly raw: FakeRequest;

  private readonly queue: FakeQueue;

  constructor(queue: FakeQueue, raw: FakeRequest) {
    const sent = raw.read();
    const view = new DataView(sent.buffer);
    this.queue = queue;
    this.raw = raw;
    this.type = view.getUint32(0, true);
    this.reserved = view.getUint32(4, true);
    this.sector = Number(view.getBigUint64(8, true));
    this.data = sent.subarray(BLK_HEADER_SIZE);
    this.room = raw.writableLengths.reduce((sum, length) => sum + length, 0) - BLK_STATUS_SIZE;
  }

  /**
   * Answer the request, make the answer visible, and notify the driver if it wants that.
   *
   * @throws RangeError for data that do not fit, or a second answer.
   */
  answer({ status = BlkStatus.OK, data = new Uint8Array(0), written }: FakeBlkAnswer = {}): void {
    const { device } = this.queue;
    if (data.length > 0) this.raw.write(data);
    if (status !== "unwritten") this.raw.write(Uint8Array.of(status), this.room);
    const reported = data.length + (status === "unwritten" ? 0 : BLK_STATUS_SIZE);
    device.complete(this.raw, written ?? reported);
    this.queue.publish();
  }
}

/**
 * Take the available requests of a queue as virtio-blk requests, and hold them.
 *
 * @param max - at most so many. Default: all there are.
 * @example
 * ```ts
 * import { BlockDevice } from "virtio-driver";
 * import { encodeBlkConfig } from "virtio-driver/protocol";
 * import { FakeTransport, takeBlk } from "virtio-driver/testing";
 *
 * const transport = new FakeTransport({ config: encodeBlkConfig({ capacity: 8n }) });
 * const disk = await BlockDevice.open(transport);
 * const calls = [disk.read(new Uint8Array(512)), disk.write(new Uint8Array(512))];
 * await new Promise((resolve) => setImmediate(resolve)); // until the driver has submitted them
 * const [read, write] = takeBlk(transport.queues[0]);
 * write.answer({ status: 1 }); // the later one first, and with an error
 * read.answer({ data: new Uint8Array(512) });
 * console.log((await Promise.allSettled(calls)).map(({ status }) => status)); // [ 'fulfilled', 'rejected' ]
 * await disk.close();
 * ```
 */
export function takeBlk(queue: FakeQueue, max?: number): FakeBlkRequest[] {
  return queue.take(max).map((request) => new FakeBlkRequest(queue, request));
}
