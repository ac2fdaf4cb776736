/**
 * The channel on which the back-end asks (protocol feature BACKEND_REQ). Only the config-change message is
 * agreed on; everything else is answered by a failure where an answer is due.
 */

import { VirtioError } from "../../errors.js";
import {
  encodeVhostUserMessage,
  u64Codec,
  VHOST_USER_FLAG_NEED_REPLY,
  VHOST_USER_FLAG_REPLY,
  VHOST_USER_FLAGS_REPLY,
  VHOST_USER_FLAGS_REQUEST,
  VHOST_USER_VERSION_MASK,
  VhostUserBackendRequest,
  vhostUserBackendRequestName,
  VhostUserRequest,
} from "../../protocol/vhost-user.js";
import type { VhostUserHeader } from "../../protocol/vhost-user.js";
import { closeFd, socketPair } from "../../sys/index.js";
import type { RequestChannel } from "./channel.js";
import { MessageSocket } from "./socket.js";

const DONE = 0;
const REFUSED = 1;
/** Answers that a back-end may leave unread; what fits into the socket does not count. */
const MAX_UNREAD_ANSWERS = 64;

/** The front-end's end of the back-channel. */
export class BackChannel {
  /** The back-end says that its config space changed. */
  onConfigChange: (() => void) | undefined;
  /** The back-end broke the protocol here; its connection is not to be trusted. */
  onBroken: ((error: VirtioError) => void) | undefined;
  readonly #socket: MessageSocket;
  readonly #acknowledges: boolean;
  /** The back-end's end, until it has been handed over. */
  #theirs: number | undefined;

  /** @param acknowledges whether REPLY_ACK is in force; without it requests are not answered but one. */
  constructor(peer: string, acknowledges: boolean) {
    this.#acknowledges = acknowledges;
    const [ours, theirs] = socketPair();
    this.#theirs = theirs;
    try {
      this.#socket = new MessageSocket(ours, peer, {
        begin: () => undefined,
        // Nothing that is agreed on sends any.
        descriptors: (fds) => fds.forEach(closeFd),
        header: checkRequest,
        message: (header) => this.#serve(header),
        doing: () => "its own requests were served",
        broken: (error) => {
          // A back-end may well close this channel alone, or before the main one, which then tells.
          if (error.code !== "ERR_VIRTIO_DISCONNECTED") this.onBroken?.(error);
        },
      });
    } catch (error) {
      this.#closeTheirs();
      throw error;
    }
  }

  /** Hand the other end to the back-end. */
  async offer(channel: RequestChannel): Promise<void> {
    if (this.#theirs === undefined) return;
    await channel.confirm([{ request: VhostUserRequest.SET_BACKEND_REQ_FD, fds: [this.#theirs] }]);
    this.#closeTheirs();
  }

  /** Close this end, and the other one when it is still here. Idempotent. */
  close(): void {
    this.#socket.close();
    this.#closeTheirs();
  }

  #closeTheirs(): void {
    if (this.#theirs === undefined) return;
    closeFd(this.#theirs);
    this.#theirs = undefined;
  }

  #serve(header: VhostUserHeader): void {
    const changed = header.request === VhostUserBackendRequest.CONFIG_CHANGE_MSG && header.size === 0;
    if (changed) queueMicrotask(() => this.onConfigChange?.());
    // SHARED_OBJECT_LOOKUP has a reply of its own, whether asked for or not.
    const own = header.request === VhostUserBackendRequest.SHARED_OBJECT_LOOKUP;
    if (!own && !(this.#acknowledges && (header.flags & VHOST_USER_FLAG_NEED_REPLY) !== 0)) return;
    if (this.#socket.unsent >= MAX_UNREAD_ANSWERS) {
      throw new VirtioError("ERR_VIRTIO_PROTOCOL", `it leaves ${MAX_UNREAD_ANSWERS} answers unread`);
    }
    const status = u64Codec.encode(changed ? DONE : REFUSED);
    this.#socket.send(encodeVhostUserMessage(header.request, VHOST_USER_FLAGS_REPLY, status));
  }
}

function checkRequest(header: VhostUserHeader): void {
  const version = header.flags & VHOST_USER_VERSION_MASK;
  if (version === VHOST_USER_FLAGS_REQUEST && (header.flags & VHOST_USER_FLAG_REPLY) === 0) return;
  throw new VirtioError(
    "ERR_VIRTIO_PROTOCOL",
    `${vhostUserBackendRequestName(header.request)} has flags 0x${header.flags.toString(16)}, which is no request`,
  );
}
