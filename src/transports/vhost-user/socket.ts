/** Whole vhost-user messages over a stream socket: framing, partial writes, descriptors, end of stream. */

import { VirtioError } from "../../errors.js";
import { decodeVhostUserHeader, VHOST_USER_HEADER_SIZE, VHOST_USER_MAX_PAYLOAD } from "../../protocol/vhost-user.js";
import type { VhostUserHeader } from "../../protocol/vhost-user.js";
import { closeFd, FdWatcher, receiveMessage, sendMessage } from "../../sys/index.js";

/** What the owner of a socket does with what arrives. Each may throw a VirtioError, which breaks the socket. */
export interface MessageHandlers {
  /** Bytes arrived: may there be any now? */
  begin(): void;
  /** Descriptors arrived, which are the owner's to close from now on. */
  descriptors(fds: readonly number[]): void;
  /** A header is complete, its payload perhaps not. */
  header(header: VhostUserHeader): void;
  /** A message is complete; `payload` is valid during the call only. */
  message(header: VhostUserHeader, payload: Uint8Array): void;
  /** What goes on, as words after "while", for error messages. */
  doing(): string;
  /** The socket was closed because of `error`. Not called by `close`. */
  broken(error: VirtioError): void;
}

interface Outgoing {
  readonly bytes: Uint8Array;
  readonly fds: readonly number[];
  sent: number;
}

const NO_FDS: readonly number[] = [];
/** Reads in one wake-up, so that a flood of messages cannot hold the event loop; the rest wakes it again. */
const MAX_READS = 16;

/** One end of a connection. Owns its descriptor; never keeps the process alive. */
export class MessageSocket {
  readonly #fd: number;
  readonly #peer: string;
  readonly #handlers: MessageHandlers;
  readonly #readable: FdWatcher;
  #writable: FdWatcher | undefined;
  readonly #in = new Uint8Array(VHOST_USER_HEADER_SIZE + VHOST_USER_MAX_PAYLOAD);
  readonly #out: Outgoing[] = [];
  #have = 0;
  #open = true;

  /**
   * @param peer names the other end in messages.
   * @throws VirtioError ERR_VIRTIO_SYSCALL when it cannot be watched; it is closed then.
   */
  constructor(fd: number, peer: string, handlers: MessageHandlers) {
    this.#fd = fd;
    this.#peer = peer;
    this.#handlers = handlers;
    try {
      this.#readable = new FdWatcher(fd, { drain: false }, () => this.#onReady());
    } catch (error) {
      closeFd(fd);
      throw error;
    }
    this.#readable.unref();
  }

  /** Messages not wholly handed to the kernel yet. */
  get unsent(): number {
    return this.#out.length;
  }

  /**
   * Send one message after those before it. The descriptors go with its first byte and are only lent: they
   * must stay open until the message has left, which its reply proves.
   */
  send(bytes: Uint8Array, fds: readonly number[] = NO_FDS): void {
    this.#out.push({ bytes, fds, sent: 0 });
    if (this.#out.length > 1) return;
    this.#guarded(() => this.#flush());
  }

  /** See now what has arrived, without waiting for the event loop. */
  look(): void {
    this.#onReady();
  }

  /** Close the socket; nothing is called any more. Idempotent. */
  close(): void {
    if (!this.#open) return;
    this.#open = false;
    this.#out.length = 0;
    this.#readable.close();
    this.#writable?.close();
    closeFd(this.#fd);
  }

  #onReady(): void {
    this.#guarded(() => {
      this.#flush();
      this.#receive();
    });
  }

  #guarded(work: () => void): void {
    if (!this.#open) return;
    try {
      work();
    } catch (error) {
      if (!(error instanceof VirtioError)) throw error;
      this.close();
      this.#handlers.broken(this.#explain(error));
    }
  }

  #flush(): void {
    for (let first = this.#out[0]; first !== undefined; first = this.#out[0]) {
      const rest = first.sent === 0 ? first.bytes : first.bytes.subarray(first.sent);
      const count = sendMessage(this.#fd, rest, first.sent === 0 ? first.fds : NO_FDS);
      if (count > 0) first.sent += count;
      if (first.sent < first.bytes.length) break;
      this.#out.shift();
    }
    this.#watchWritable(this.#out.length > 0);
  }

  /** A socket can nearly always be written, so that is watched only while something waits to be. */
  #watchWritable(wanted: boolean): void {
    if (wanted === (this.#writable !== undefined)) return;
    this.#writable?.close();
    this.#writable = undefined;
    if (!wanted) return;
    this.#writable = new FdWatcher(this.#fd, { drain: false, writable: true }, () => this.#onReady());
    this.#writable.unref();
  }

  #receive(): void {
    const fds: number[] = [];
    for (let i = 0; i < MAX_READS && this.#open; i++) {
      const count = receiveMessage(this.#fd, this.#in.subarray(this.#have), fds);
      if (count < 0) return;
      if (fds.length > 0) this.#handlers.descriptors(fds.splice(0));
      if (count === 0) throw new VirtioError("ERR_VIRTIO_DISCONNECTED", "the other side has closed it");
      this.#have += count;
      this.#take();
    }
  }

  #take(): void {
    let at = 0;
    while (this.#open && at < this.#have) {
      this.#handlers.begin();
      if (this.#have - at < VHOST_USER_HEADER_SIZE) break;
      const header = decodeVhostUserHeader(this.#in.subarray(at, this.#have));
      this.#handlers.header(header);
      const payload = at + VHOST_USER_HEADER_SIZE;
      const end = payload + header.size;
      if (end > this.#have) break;
      this.#handlers.message(header, this.#in.subarray(payload, end));
      at = end;
    }
    this.#in.copyWithin(0, at, this.#have);
    this.#have -= at;
  }

  /** What a caller is told. */
  #explain(error: VirtioError): VirtioError {
    const doing = this.#handlers.doing();
    if (error.code === "ERR_VIRTIO_PROTOCOL") {
      const message = `${this.#peer} broke the vhost-user protocol while ${doing}: ${error.message}`;
      return new VirtioError("ERR_VIRTIO_PROTOCOL", `${message}; the connection was closed`, { cause: error });
    }
    const where = this.#have > 0 ? " in the middle of a message" : "";
    return new VirtioError(
      "ERR_VIRTIO_DISCONNECTED",
      `the connection to ${this.#peer} broke${where} while ${doing} (${error.message}); ` +
        "see the back-end's log for the reason, then connect again",
      {
        cause: error,
        ...(error.errno === undefined ? {} : { errno: error.errno }),
        ...(error.syscall === undefined ? {} : { syscall: error.syscall }),
      },
    );
  }
}
