/** The socket of one front-end: whole messages in, one at a time, and replies out. */

import { VirtioError } from "../errors.js";
import {
  decodeVhostUserHeader,
  encodeVhostUserMessage,
  VHOST_USER_FLAGS_REPLY,
  VHOST_USER_HEADER_SIZE,
  VHOST_USER_MAX_PAYLOAD,
  type VhostUserHeader,
  vhostUserRequestName,
} from "../protocol/vhost-user.js";
import { closeFd, FdWatcher, receiveMessage, sendMessage } from "../sys/index.js";

/** A request of the front-end. */
export interface Message {
  /** Request id. */
  readonly request: number;
  /** Version and flags, not checked yet. */
  readonly flags: number;
  /** Payload, of the announced size. */
  readonly payload: Uint8Array;
  /** Descriptors that came with it. Those still in it when the handler has finished are closed. */
  readonly fds: number[];
}

/** Messages handled before other work of the event loop has its turn. */
const BURST = 32;

/** Reads messages, hands them on one after the other, and writes replies. */
export class Connection {
  private readonly fd: number;
  private readonly onMessage: (message: Message) => Promise<void>;
  private readonly onEnd: (error: unknown) => void;
  private watcher: FdWatcher | undefined;
  private handling = false;
  private ended = false;
  private reason: unknown;
  private onWritable: (() => void) | undefined;

  private readonly head = new Uint8Array(VHOST_USER_HEADER_SIZE);
  private readonly body = new Uint8Array(VHOST_USER_MAX_PAYLOAD);
  private header: VhostUserHeader | undefined;
  /** Bytes of the header, and then of the payload, received so far. */
  private filled = 0;
  private fds: number[] = [];

  /**
   * @param fd the socket; closed when the connection ends.
   * @param onMessage handles a message; the next one waits for it. A rejection ends the connection.
   * @param onEnd runs once, with undefined when the front-end hung up between two messages.
   */
  constructor(fd: number, onMessage: (message: Message) => Promise<void>, onEnd: (error: unknown) => void) {
    this.fd = fd;
    this.onMessage = onMessage;
    this.onEnd = onEnd;
    this.watch();
  }

  /**
   * Send a reply to `request`, with descriptors, which stay open here.
   *
   * @throws VirtioError ERR_VIRTIO_CLOSED when the connection ends before all of it is sent.
   */
  async reply(request: number, payload: Uint8Array, fds: readonly number[] = []): Promise<void> {
    const bytes = encodeVhostUserMessage(request, VHOST_USER_FLAGS_REPLY, payload);
    for (let done = 0; done < bytes.length; ) {
      if (this.ended) throw new VirtioError("ERR_VIRTIO_CLOSED", "the connection was closed before a reply was sent");
      const sent = sendMessage(this.fd, bytes.subarray(done), done === 0 ? fds : []);
      if (sent > 0) done += sent;
      else await this.writable();
    }
  }

  /** End the connection. `onEnd` runs when the handler has finished, unless the connection ended before. */
  end(reason: unknown): void {
    if (this.ended) return;
    this.ended = true;
    this.reason = reason;
    this.watcher?.close();
    this.onWritable?.();
    if (!this.handling) this.finish();
  }

  private finish(): void {
    closeAll(this.fds);
    closeFd(this.fd);
    this.onEnd(this.reason);
  }

  private watch(): void {
    this.watcher ??= new FdWatcher(this.fd, { drain: false }, () => this.readable());
  }

  private writable(): Promise<void> {
    return new Promise((resolve) => {
      const watcher = new FdWatcher(this.fd, { drain: false, writable: true }, () => this.onWritable?.());
      this.onWritable = () => {
        watcher.close();
        this.onWritable = undefined;
        resolve();
      };
    });
  }

  private readable(): void {
    if (this.handling) {
      // The watch is level-triggered: it would run in each turn until the handler has finished.
      this.watcher?.close();
      this.watcher = undefined;
      return;
    }
    this.handling = true;
    void this.pump();
  }

  private async pump(): Promise<void> {
    try {
      for (let i = 0; i < BURST && !this.ended; i++) {
        const message = this.receive();
        if (message === undefined) break;
        try {
          await this.onMessage(message);
        } finally {
          closeAll(message.fds);
        }
      }
      if (!this.ended) this.watch();
    } catch (error) {
      this.end(error);
    }
    this.handling = false;
    if (this.ended) this.finish();
  }

  /** The next whole message; undefined when the rest has not come, or the connection has ended. */
  private receive(): Message | undefined {
    for (;;) {
      const { header } = this;
      const into = header === undefined ? this.head : this.body.subarray(0, header.size);
      if (this.filled === into.length && header !== undefined) {
        const message = { request: header.request, flags: header.flags, payload: into.slice(), fds: this.fds };
        this.header = undefined;
        this.filled = 0;
        this.fds = [];
        return message;
      }
      // Descriptors belong to the first byte of a header; elsewhere nobody could tell whose they are.
      const stray = header !== undefined || this.filled > 0;
      const before = this.fds.length;
      const count = receiveMessage(this.fd, into.subarray(this.filled), this.fds);
      if (count < 0) return undefined;
      if (count === 0) {
        this.end(stray ? this.cutOff(header) : undefined);
        return undefined;
      }
      if (stray && this.fds.length > before) {
        throw new VirtioError("ERR_VIRTIO_PROTOCOL", "descriptors came in the middle of a message");
      }
      this.filled += count;
      if (header === undefined && this.filled === VHOST_USER_HEADER_SIZE) {
        this.header = decodeVhostUserHeader(this.head);
        this.filled = 0;
      }
    }
  }

  private cutOff(header: VhostUserHeader | undefined): VirtioError {
    const where = header === undefined ? "a header" : vhostUserRequestName(header.request);
    return new VirtioError("ERR_VIRTIO_DISCONNECTED", `the front-end hung up in the middle of ${where}`);
  }
}

function closeAll(fds: number[]): void {
  for (const fd of fds.splice(0)) closeFd(fd);
}
