/**
 * The front-end's conversation: requests in order, each reply matched to the oldest request that waits for
 * one, and checked. Requests may be pipelined: the socket keeps the order, the peer answers in that order.
 */

import { VirtioError } from "../../errors.js";
import {
  encodeVhostUserMessage,
  u64Codec,
  VHOST_USER_FLAG_NEED_REPLY,
  VHOST_USER_FLAGS_REPLY,
  VHOST_USER_FLAGS_REQUEST,
  VhostUserRequest,
  vhostUserRequestName,
  vringStateCodec,
} from "../../protocol/vhost-user.js";
import type { VhostUserHeader } from "../../protocol/vhost-user.js";
import { closeFd } from "../../sys/index.js";
import { MessageSocket } from "./socket.js";

/** One request as it is sent. */
export interface Message {
  /** {@link VhostUserRequest}. */
  readonly request: number;
  /** Payload, when there is one. */
  readonly payload?: Uint8Array;
  /** Descriptors to pass; lent until the message is confirmed. */
  readonly fds?: readonly number[];
}

/** What a right reply looks like. */
export interface Reply<T> {
  /** Payload sizes that are right. */
  readonly sizes: readonly number[];
  /** Whether a descriptor may come with it. To be asked for alone: descriptors do not say which reply they belong to. */
  readonly mayCarry?: true;
  /**
   * Read the payload. A descriptor that came with it belongs to this function. Throws VirtioError ERR_VIRTIO_PROTOCOL
   * when it contradicts the request.
   */
  decode(payload: Uint8Array, fd?: number): T;
}

/** The reply that is a single u64. */
export const U64_REPLY: Reply<bigint> = { sizes: [8], decode: (payload) => u64Codec.decode(payload) };

/** The reply to `GET_VRING_BASE` of queue `index`: where the back-end stopped. */
export function vringBaseReply(index: number): Reply<number> {
  return {
    sizes: [8],
    decode(payload) {
      const state = vringStateCodec.decode(payload);
      if (state.index !== index)
        throw protocolError(`GET_VRING_BASE of queue ${index} was answered for ${state.index}`);
      return state.num;
    },
  };
}

interface PendingReply {
  readonly request: number;
  readonly sizes: readonly number[];
  readonly mayCarry: boolean;
  /** Reads the payload and hands it to who waits; throws when it is wrong, and nobody has been told then. */
  readonly accept: (payload: Uint8Array, fd: number | undefined) => void;
  readonly reject: (error: Error) => void;
}

/** The main channel of one connection. */
export class RequestChannel {
  /** Whether REPLY_ACK is in force: requests without a reply of their own ask for an acknowledgement. */
  acknowledges = false;
  /** Called once when the connection broke, after every pending request was rejected. */
  onBroken: ((error: VirtioError) => void) | undefined;
  readonly #socket: MessageSocket;
  readonly #peer: string;
  readonly #pending: PendingReply[] = [];
  /** Came with the reply that is being received. */
  #received: number | undefined = undefined;
  #ended: VirtioError | undefined;

  /**
   * @param fd a connected stream socket; owned from now on.
   * @param peer names the other end in messages.
   */
  constructor(fd: number, peer: string) {
    this.#peer = peer;
    this.#socket = new MessageSocket(fd, peer, {
      begin: () => this.#begin(),
      descriptors: (fds) => this.#descriptors(fds),
      header: (header) => this.#header(header),
      message: (_header, payload) => this.#message(payload),
      doing: () => `${this.#awaited} was awaited`,
      broken: (error) => {
        this.#end(error);
        this.onBroken?.(error);
      },
    });
  }

  /** Why the channel can no longer be used, or undefined. */
  get ended(): VirtioError | undefined {
    return this.#ended;
  }

  /** What the next step of the conversation hangs on, and on whom, for messages to people. */
  get waitingFor(): string {
    if (this.#ended !== undefined) return `another connection to ${this.#peer}`;
    return `${this.#awaited} from ${this.#peer}`;
  }

  /** Send a request that always has a reply, and return what the reply says. */
  call<T>(message: Message, reply: Reply<T>): Promise<T> {
    return this.#exchange(message, VHOST_USER_FLAGS_REQUEST, reply);
  }

  /**
   * Send requests that have no reply of their own, in order, and wait until the peer has processed them all:
   * by an acknowledgement each, or, without REPLY_ACK, by the reply to a `GET_FEATURES` behind them.
   *
   * @throws VirtioError ERR_VIRTIO_REJECTED when the peer refused one; all have been processed then.
   */
  async confirm(messages: readonly Message[]): Promise<void> {
    if (!this.acknowledges) {
      for (const message of messages) this.post(message);
      await this.call({ request: VhostUserRequest.GET_FEATURES }, U64_REPLY);
      return;
    }
    const results = await Promise.allSettled(messages.map((message) => this.#acknowledged(message)));
    const failed = results.find((result) => result.status === "rejected");
    if (failed !== undefined) throw failed.reason;
  }

  /** Send a request that nothing confirms; a later reply does. */
  post(message: Message): void {
    if (this.#ended !== undefined) return;
    this.#socket.send(encodeVhostUserMessage(message.request, VHOST_USER_FLAGS_REQUEST, message.payload), message.fds);
  }

  /** See now what has arrived, without waiting for the event loop: also that the other side has closed it. */
  look(): void {
    this.#socket.look();
  }

  /** Close the connection; pending requests reject with `error`. Idempotent. */
  close(error: VirtioError): void {
    this.#socket.close();
    this.#end(error);
  }

  async #acknowledged(message: Message): Promise<void> {
    const status = await this.#exchange(message, VHOST_USER_FLAGS_REQUEST | VHOST_USER_FLAG_NEED_REPLY, U64_REPLY);
    if (status === 0n) return;
    throw new VirtioError(
      "ERR_VIRTIO_REJECTED",
      `${this.#peer} refused ${vhostUserRequestName(message.request)} (status ${status}); its log has the reason`,
    );
  }

  #exchange<T>(message: Message, flags: number, reply: Reply<T>): Promise<T> {
    return new Promise<T>((resolve, reject) => {
      if (this.#ended !== undefined) {
        reject(this.#ended);
        return;
      }
      this.#pending.push({
        request: message.request,
        sizes: reply.sizes,
        mayCarry: reply.mayCarry === true,
        accept: (payload, fd) => resolve(reply.decode(payload, fd)),
        reject,
      });
      this.#socket.send(encodeVhostUserMessage(message.request, flags, message.payload), message.fds);
    });
  }

  get #awaited(): string {
    const oldest = this.#pending[0];
    return oldest === undefined ? "nothing" : `the reply to ${vhostUserRequestName(oldest.request)}`;
  }

  #begin(): void {
    if (this.#pending.length === 0) throw protocolError("it sent a message that nobody asked for");
  }

  #descriptors(fds: readonly number[]): void {
    if (this.#pending[0]?.mayCarry && fds.length === 1 && this.#received === undefined) {
      [this.#received] = fds;
      return;
    }
    fds.forEach(closeFd);
    throw protocolError(`it sent ${fds.length} descriptors that nobody asked for`);
  }

  #header(header: VhostUserHeader): void {
    const expected = this.#pending[0];
    if (expected === undefined) return;
    const name = vhostUserRequestName(expected.request);
    if (header.request !== expected.request) {
      throw protocolError(`${name} was answered by ${vhostUserRequestName(header.request)}`);
    }
    if (header.flags !== VHOST_USER_FLAGS_REPLY) {
      throw protocolError(
        `the reply to ${name} has flags 0x${header.flags.toString(16)}, not 0x${VHOST_USER_FLAGS_REPLY.toString(16)}`,
      );
    }
    if (!expected.sizes.includes(header.size)) {
      throw protocolError(`the reply to ${name} has ${header.size} bytes, not ${expected.sizes.join(" or ")}`);
    }
  }

  #message(payload: Uint8Array): void {
    const fd = this.#received;
    this.#received = undefined;
    this.#pending[0]?.accept(payload, fd);
    this.#pending.shift();
  }

  #end(error: VirtioError): void {
    this.#ended ??= error;
    if (this.#received !== undefined) closeFd(this.#received);
    this.#received = undefined;
    for (const pending of this.#pending.splice(0)) pending.reject(this.#ended);
  }
}

/** The error for a peer that answers wrongly. */
export function protocolError(message: string): VirtioError {
  return new VirtioError("ERR_VIRTIO_PROTOCOL", message);
}
