/** The channel on which a back-end tells its front-end something (protocol feature BACKEND_REQ). */

import { readlinkSync } from "node:fs";
import { VirtioError } from "../errors.js";
import {
  decodeVhostUserHeader,
  encodeVhostUserMessage,
  u64Codec,
  VHOST_USER_FLAG_NEED_REPLY,
  VHOST_USER_FLAGS_REPLY,
  VHOST_USER_FLAGS_REQUEST,
  VHOST_USER_HEADER_SIZE,
  VhostUserBackendRequest,
} from "../protocol/vhost-user.js";
import { closeFd, FdWatcher, receiveMessage, sendMessage } from "../sys/index.js";

/** How long a front-end may take for its answer. */
const ANSWER_MS = 10_000;
const ANSWER_BYTES = VHOST_USER_HEADER_SIZE + 8;

/**
 * The back-end's end. One message is under way at a time: a change of the config space that comes meanwhile is told
 * behind it, and several of them once.
 */
export class BackChannel {
  private readonly fd: number;
  private readonly acknowledged: boolean;
  private readonly onError: (error: unknown) => void;
  private readonly answer = new Uint8Array(ANSWER_BYTES);
  private filled = 0;
  private watcher: FdWatcher | undefined = undefined;
  private timer: NodeJS.Timeout | undefined = undefined;
  private waiting = false;
  private again = false;
  private closed = false;

  /**
   * @param fd the socket of SET_BACKEND_REQ_FD; closed with this.
   * @param acknowledged whether REPLY_ACK is in force.
   * @param onError told of a front-end that refuses, is silent or is gone.
   * @throws VirtioError ERR_VIRTIO_PROTOCOL when it is no socket: writing to another file of the front-end's choice
   *   could wait for ever, or do harm. The descriptor stays the caller's then.
   */
  constructor(fd: number, acknowledged: boolean, onError: (error: unknown) => void) {
    const target = readlinkSync(`/proc/self/fd/${fd}`);
    if (!target.startsWith("socket:")) {
      throw new VirtioError("ERR_VIRTIO_PROTOCOL", `the channel for the back-end is a socket, got ${target}`);
    }
    this.fd = fd;
    this.acknowledged = acknowledged;
    this.onError = onError;
  }

  /** Say that the config space changed (VHOST_USER_BACKEND_CONFIG_CHANGE_MSG). */
  configChanged(): void {
    if (this.closed) return;
    if (this.waiting) {
      this.again = true;
      return;
    }
    const flags = VHOST_USER_FLAGS_REQUEST | (this.acknowledged ? VHOST_USER_FLAG_NEED_REPLY : 0);
    const bytes = encodeVhostUserMessage(VhostUserBackendRequest.CONFIG_CHANGE_MSG, flags);
    try {
      // 12 bytes into an empty socket; a front-end that lets it fill up does not want to know.
      if (sendMessage(this.fd, bytes, []) !== bytes.length) throw refused("takes no messages on its channel");
      if (!this.acknowledged) return;
      this.waiting = true;
      this.watcher = new FdWatcher(this.fd, { drain: false }, () => this.readable());
      this.timer = setTimeout(() => this.fail(refused(`did not answer in ${ANSWER_MS} ms`)), ANSWER_MS);
    } catch (error) {
      this.fail(error);
    }
  }

  /** Close the socket. Idempotent. */
  close(): void {
    if (this.closed) return;
    this.closed = true;
    this.rest();
    closeFd(this.fd);
  }

  private readable(): void {
    const fds: number[] = [];
    try {
      const count = receiveMessage(this.fd, this.answer.subarray(this.filled), fds);
      if (count < 0) return;
      if (count === 0 || fds.length > 0) throw refused("hung up on the channel, or sent descriptors");
      this.filled += count;
      if (this.filled < ANSWER_BYTES) return;
      const { request, flags, size } = decodeVhostUserHeader(this.answer);
      if (request !== VhostUserBackendRequest.CONFIG_CHANGE_MSG || flags !== VHOST_USER_FLAGS_REPLY || size !== 8) {
        throw refused(`answered with message ${request}, flags 0x${flags.toString(16)}, ${size} bytes`);
      }
      const status = u64Codec.decode(this.answer.subarray(VHOST_USER_HEADER_SIZE));
      if (status !== 0n) this.onError(refused(`answered with ${status}`));
    } catch (error) {
      for (const fd of fds) closeFd(fd);
      this.fail(error);
      return;
    }
    this.rest();
    if (!this.again) return;
    this.again = false;
    this.configChanged();
  }

  private rest(): void {
    this.waiting = false;
    this.filled = 0;
    this.watcher?.close();
    this.watcher = undefined;
    clearTimeout(this.timer);
  }

  /** Give the channel up; the connection goes on without. */
  private fail(error: unknown): void {
    this.close();
    this.onError(error);
  }
}

function refused(what: string): VirtioError {
  return new VirtioError("ERR_VIRTIO_PROTOCOL", `told of a change of the config space, the front-end ${what}`);
}
