/** The region in which a back-end remembers what it has in flight; kept here for the next one ("Inflight I/O tracking"). */

import { VirtioError } from "../../errors.js";
import { inflightCodec, type InflightPayload, VhostUserRequest } from "../../protocol/vhost-user.js";
import { closeFd } from "../../sys/index.js";
import type { QueueSetup } from "../transport.js";
import type { Message, Reply } from "./channel.js";

/** A region that a back-end has made. It is never mapped here, so nothing that stands in it matters to this side. */
export class InflightRegion {
  readonly #fd: number;
  readonly #description: InflightPayload;

  /** @param fd owned from now on. */
  constructor(fd: number, description: InflightPayload) {
    this.#fd = fd;
    this.#description = description;
  }

  /** `SET_INFLIGHT_FD`. */
  get handedOver(): Message {
    const payload = inflightCodec.encode(this.#description);
    return { request: VhostUserRequest.SET_INFLIGHT_FD, payload, fds: [this.#fd] };
  }

  /** Close the descriptor. */
  close(): void {
    closeFd(this.#fd);
  }
}

/** `GET_INFLIGHT_FD`: ask for a region with room for these queues. */
export function inflightRequest(queues: readonly QueueSetup[]): Message {
  const numQueues = Math.max(...queues.map(({ index }) => index + 1));
  const queueSize = Math.max(...queues.map(({ size }) => size));
  const payload = inflightCodec.encode({ mmapSize: 0, mmapOffset: 0, numQueues, queueSize });
  return { request: VhostUserRequest.GET_INFLIGHT_FD, payload };
}

/** Its reply: a region, or undefined when the back-end has none after all. */
export const INFLIGHT_REPLY: Reply<InflightRegion | undefined> = {
  sizes: [inflightCodec.encode({ mmapSize: 0, mmapOffset: 0, numQueues: 0, queueSize: 0 }).length],
  mayCarry: true,
  decode(payload, fd) {
    const description = inflightCodec.decode(payload);
    if (description.mmapSize !== 0n && fd !== undefined) return new InflightRegion(fd, description);
    if (fd !== undefined) closeFd(fd);
    if (description.mmapSize === 0n) return undefined;
    throw new VirtioError(
      "ERR_VIRTIO_PROTOCOL",
      `GET_INFLIGHT_FD was answered by a region of ${description.mmapSize} bytes without its descriptor`,
    );
  },
};
