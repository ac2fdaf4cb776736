/**
 * A vhost-user back-end for tests: it records every message with its descriptors, notes each breach of the
 * protocol, answers rightly, or as wrongly as it is told to. It shares no code with the front-end.
 */

import { fstatSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import {
  acceptUnix,
  closeFd,
  createMemfd,
  FdWatcher,
  listenUnix,
  receiveMessage,
  sendMessage,
} from "../../src/sys/index.js";

/** Request names by id, typed from the protocol document and not from the code under test. */
const NAMES =
  "GET_FEATURES SET_FEATURES SET_OWNER RESET_OWNER SET_MEM_TABLE SET_LOG_BASE SET_LOG_FD SET_VRING_NUM SET_VRING_ADDR SET_VRING_BASE GET_VRING_BASE SET_VRING_KICK SET_VRING_CALL SET_VRING_ERR GET_PROTOCOL_FEATURES SET_PROTOCOL_FEATURES GET_QUEUE_NUM SET_VRING_ENABLE SEND_RARP NET_SET_MTU SET_BACKEND_REQ_FD IOTLB_MSG SET_VRING_ENDIAN GET_CONFIG SET_CONFIG".split(
    " ",
  );
const LATER_NAMES: Readonly<Record<number, string>> = {
  31: "GET_INFLIGHT_FD",
  32: "SET_INFLIGHT_FD",
  36: "GET_MAX_MEM_SLOTS",
  37: "ADD_MEM_REG",
  38: "REM_MEM_REG",
};

export const MQ = 1n << 0n;
export const REPLY_ACK = 1n << 3n;
export const BACKEND_REQ = 1n << 5n;
export const CONFIG = 1n << 9n;
export const INFLIGHT = 1n << 12n;
export const MEM_SLOTS = 1n << 15n;
/** Everything that the front-end implements. */
export const ALL_PROTOCOL = MQ | REPLY_ACK | BACKEND_REQ | CONFIG | INFLIGHT | MEM_SLOTS;
/** Virtio features of a plain modern device, with bit 30. */
export const VERSION_1 = 1n << 32n;
export const BIT_30 = 1n << 30n;

/** One message as it came. */
export interface Received {
  readonly name: string;
  readonly request: number;
  readonly flags: number;
  readonly payload: Buffer;
  /** Descriptors that came with the first byte; open until the peer is closed. */
  readonly fds: readonly number[];
  /** Inodes behind them, in the same order. */
  readonly inodes: readonly number[];
}

/** What the peer does instead of sending the right reply. */
export interface Deed {
  /** Bytes to send; none: silence. */
  readonly bytes?: Uint8Array;
  /** Descriptors to send with them; they stay the test's. */
  readonly fds?: readonly number[];
  /** Hang up after that. */
  readonly close?: boolean;
}

/** How the peer is set up. */
export interface PeerOptions {
  /** Virtio features; default VERSION_1 and bit 30. */
  readonly features?: bigint;
  /** Protocol features; default all that the front-end knows. */
  readonly protocolFeatures?: bigint;
  readonly queues?: bigint;
  readonly slots?: bigint;
  /** Config space; longer reads are refused by an empty reply. */
  readonly config?: Uint8Array;
  /** Status of the acknowledgement of a message; default 0. */
  readonly status?: (message: Received) => bigint;
  /** Misbehave at a message; undefined: behave. `right` is the reply that would be sent, if any. */
  readonly misbehave?: (message: Received, right: Buffer | undefined) => Deed | undefined;
  /** Send replies one byte at a time, each in its own turn of the event loop. */
  readonly fragmented?: boolean;
  /** Do not read until `resume`. */
  readonly paused?: boolean;
}

/** Timers of tests may be mocked; the peer's patience is real. */
const realSetTimeout = setTimeout;
const realClearTimeout = clearTimeout;

/** Make a message in the layout of the protocol. */
export function message(
  request: number,
  flags: number,
  payload: Uint8Array = new Uint8Array(0),
  size?: number,
): Buffer {
  const header = Buffer.alloc(12);
  header.writeUInt32LE(request, 0);
  header.writeUInt32LE(flags, 4);
  header.writeUInt32LE(size ?? payload.length, 8);
  return Buffer.concat([header, payload]);
}

/** A little-endian u64. */
export function u64(value: bigint): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(value);
  return bytes;
}

export class ScriptedPeer {
  readonly messages: Received[] = [];
  /** Breaches of the protocol by the front-end. */
  readonly violations: string[] = [];
  /** How many clients connected so far. */
  connections = 0;
  #options: PeerOptions;
  readonly #folder: string | undefined;
  readonly #listener: number | undefined;
  readonly #listenWatcher: FdWatcher | undefined;
  #client: number | undefined;
  #watcher: FdWatcher | undefined;
  #buffer = Buffer.alloc(0);
  #bufferFds: number[] = [];
  readonly #outgoing: { bytes: Uint8Array; fds: readonly number[] }[] = [];
  #sending = false;
  #closed = false;
  #closeAfterSending = false;
  #accepted = 0n;
  #features = 0n;
  #seen = new Set<string>();
  readonly #owned: number[] = [];
  readonly #waiting: { test: () => boolean; resolve: () => void }[] = [];

  /** Listen on a fresh socket, or serve the connected descriptor `fd`. */
  constructor(options: PeerOptions = {}, fd?: number) {
    this.#options = options;
    if (fd !== undefined) {
      this.#serve(fd);
      return;
    }
    this.#folder = mkdtempSync(join(tmpdir(), "virtio-peer-"));
    const listener = listenUnix(this.path);
    this.#listener = listener;
    this.#listenWatcher = new FdWatcher(listener, { drain: false }, () => {
      const client = acceptUnix(listener);
      if (client !== undefined) this.#serve(client);
    });
  }

  get path(): string {
    return join(this.#folder ?? "", "socket");
  }

  /** Names of the messages so far. */
  get names(): string[] {
    return this.messages.map(({ name }) => name);
  }

  /** Whether a client is connected. */
  get connected(): boolean {
    return this.#client !== undefined;
  }

  /** The messages of one name. */
  all(name: string): Received[] {
    return this.messages.filter((each) => each.name === name);
  }

  /** The last message of a name. */
  last(name: string): Received {
    const found = this.all(name).at(-1);
    if (found === undefined) throw new Error(`no ${name} among ${this.names.join(", ")}`);
    return found;
  }

  /** Wait until `test` holds; it is asked after each message and each disconnection. */
  until(test: () => boolean): Promise<void> {
    if (test()) return Promise.resolve();
    return new Promise((resolve, reject) => {
      const patience = realSetTimeout(() => {
        reject(
          new Error(
            `the peer waited in vain; it is ${this.connected ? "" : "dis"}connected, and got ${this.names.join(", ")}`,
          ),
        );
      }, 5000);
      this.#waiting.push({
        test,
        resolve: () => {
          realClearTimeout(patience);
          resolve();
        },
      });
    });
  }

  /** Wait until a message of this name has come. */
  async received(name: string): Promise<Received> {
    await this.until(() => this.names.includes(name));
    return this.last(name);
  }

  /** Begin to read, when the peer was made `paused`. */
  resume(): void {
    if (this.#client !== undefined && this.#watcher === undefined) this.#watch(this.#client);
  }

  /** Be another peer from the next message on. */
  reconfigure(options: PeerOptions): void {
    this.#options = options;
  }

  /** Send whatever it is. */
  send(bytes: Uint8Array, fds: readonly number[] = []): void {
    const step = this.#options.fragmented === true ? 1 : bytes.length;
    for (let at = 0; at < bytes.length; at += step) {
      this.#outgoing.push({ bytes: bytes.subarray(at, at + step), fds: at === 0 ? fds : [] });
    }
    if (!this.#sending) this.#sendNext();
  }

  /** Leave the closing of a received descriptor to the caller. */
  take(fd: number): number {
    const at = this.#owned.indexOf(fd);
    if (at < 0) throw new Error(`descriptor ${fd} is not the peer's`);
    this.#owned.splice(at, 1);
    return fd;
  }

  /** Drop the client. */
  hangUp(): void {
    if (this.#client === undefined) return;
    this.#watcher?.close();
    this.#watcher = undefined;
    closeFd(this.#client);
    this.#client = undefined;
    this.#outgoing.length = 0;
    this.#notice();
  }

  /** Drop everything, with each descriptor that was received. Idempotent. */
  close(): void {
    this.hangUp();
    if (this.#closed) return;
    this.#closed = true;
    this.#listenWatcher?.close();
    if (this.#listener !== undefined) closeFd(this.#listener);
    for (const fd of this.#owned.splice(0)) closeFd(fd);
    if (this.#folder !== undefined) rmSync(this.#folder, { recursive: true });
  }

  #serve(fd: number): void {
    this.hangUp();
    this.connections++;
    this.#client = fd;
    this.#buffer = Buffer.alloc(0);
    this.#accepted = 0n;
    this.#features = 0n;
    this.#seen = new Set();
    this.#closeAfterSending = false;
    if (this.#options.paused !== true) this.#watch(fd);
  }

  #watch(fd: number): void {
    this.#watcher = new FdWatcher(fd, { drain: false }, () => this.#read(fd));
  }

  /** First the header alone, then the payload: descriptors must come with the header ("Communication"). */
  #read(fd: number): void {
    while (this.#client === fd) {
      const need = this.#buffer.length < 12 ? 12 : 12 + this.#buffer.readUInt32LE(8);
      if (this.#buffer.length < need) {
        const chunk = Buffer.alloc(need - this.#buffer.length);
        const fds: number[] = [];
        let count: number;
        try {
          count = receiveMessage(fd, chunk, fds);
        } catch {
          count = 0; // the front-end closed with replies unread: ECONNRESET
        }
        if (count < 0) return;
        if (count === 0) {
          this.hangUp();
          return;
        }
        this.#owned.push(...fds);
        if (fds.length > 0 && this.#buffer.length > 0) this.violations.push("descriptors behind the first byte");
        this.#bufferFds.push(...fds);
        this.#buffer = Buffer.concat([this.#buffer, chunk.subarray(0, count)]);
        continue;
      }
      this.#take();
    }
  }

  #take(): void {
    const request = this.#buffer.readUInt32LE(0);
    const fds = this.#bufferFds;
    const received: Received = {
      name: NAMES[request - 1] ?? LATER_NAMES[request] ?? `request ${request}`,
      request,
      flags: this.#buffer.readUInt32LE(4),
      payload: this.#buffer.subarray(12),
      fds,
      inodes: fds.map((fd) => fstatSync(fd).ino),
    };
    this.#buffer = Buffer.alloc(0);
    this.#bufferFds = [];
    this.messages.push(received);
    this.#check(received);
    this.#seen.add(received.name);
    if (received.name === "GET_VRING_BASE") this.#seen.delete("SET_VRING_KICK");
    if (received.name === "SET_FEATURES") this.#features = received.payload.readBigUInt64LE();
    if (received.name === "SET_PROTOCOL_FEATURES") this.#accepted = received.payload.readBigUInt64LE();
    this.#answer(received);
    this.#notice();
  }

  #answer(received: Received): void {
    const right = this.#rightReply(received);
    const behaved: Deed = right === undefined ? {} : { bytes: right };
    const deed = this.#options.misbehave?.(received, right) ?? this.#describeInflight(received, behaved);
    if (deed.bytes !== undefined) this.send(deed.bytes, deed.fds);
    if (deed.close !== true) return;
    if (this.#sending) this.#closeAfterSending = true;
    else this.hangUp();
  }

  /** `GET_INFLIGHT_FD` is answered by a descriptor, too. */
  #describeInflight({ name }: Received, behaved: Deed): Deed {
    if (name !== "GET_INFLIGHT_FD") return behaved;
    const fd = createMemfd("inflight of a test", 4096);
    this.#owned.push(fd);
    return { ...behaved, fds: [fd] };
  }

  #rightReply(received: Received): Buffer | undefined {
    const { name, request, flags, payload } = received;
    const { features = VERSION_1 | BIT_30, protocolFeatures = ALL_PROTOCOL, queues = 4n, slots = 32n } = this.#options;
    const reply = (bytes: Uint8Array) => message(request, 5, bytes);
    switch (name) {
      case "GET_FEATURES":
        return reply(u64(features));
      case "GET_PROTOCOL_FEATURES":
        return reply(u64(protocolFeatures));
      case "GET_QUEUE_NUM":
        return reply(u64(queues));
      case "GET_MAX_MEM_SLOTS":
        return reply(u64(slots));
      case "GET_VRING_BASE":
        return reply(payload);
      case "GET_INFLIGHT_FD":
        return reply(Buffer.concat([u64(4096n), u64(0n), payload.subarray(16)]));
      case "GET_CONFIG": {
        const { config = Buffer.from(Array.from({ length: 60 }, (_, i) => i)) } = this.#options;
        const offset = payload.readUInt32LE(0);
        const size = payload.readUInt32LE(4);
        if (offset + size > config.length) return reply(new Uint8Array(0));
        return reply(Buffer.concat([payload.subarray(0, 12), config.subarray(offset, offset + size)]));
      }
    }
    if ((flags & 8) === 0) return undefined;
    return reply(u64(this.#options.status?.(received) ?? 0n));
  }

  /** The rules of the document that hold for every message of a front-end. */
  #check({ name, flags, payload, fds }: Received): void {
    const breach = (what: string) => this.violations.push(`${name}: ${what}`);
    const wants = (feature: bigint) => (this.#accepted & feature) !== 0n;
    const gate = (feature: bigint) => wants(feature) || breach("its protocol feature was not accepted");
    const sized = (size: number) => payload.length === size || breach(`${payload.length} bytes, not ${size}`);
    let expectedFds = 0;
    if (flags !== 1 && flags !== 9) breach(`flags ${flags}`);
    if (flags === 9 && !wants(REPLY_ACK)) breach("need_reply without REPLY_ACK");
    switch (name) {
      case "SET_OWNER":
        if (this.#seen.has(name)) breach("twice on one connection");
        sized(0);
        break;
      case "GET_FEATURES":
        sized(0);
        break;
      case "SET_FEATURES":
        if (this.#seen.has(name)) breach("twice on one connection");
        sized(8);
        break;
      case "GET_PROTOCOL_FEATURES":
      case "SET_PROTOCOL_FEATURES":
        sized(name.startsWith("GET") ? 0 : 8);
        if (((this.#options.features ?? BIT_30) & BIT_30) === 0n) breach("bit 30 was not offered");
        break;
      case "GET_QUEUE_NUM":
        sized(0);
        gate(MQ);
        break;
      case "GET_MAX_MEM_SLOTS":
        sized(0);
        gate(MEM_SLOTS);
        break;
      case "SET_BACKEND_REQ_FD":
        sized(0);
        gate(BACKEND_REQ);
        expectedFds = 1;
        break;
      case "GET_CONFIG":
      case "SET_CONFIG":
        sized(12 + payload.readUInt32LE(4));
        if (payload.readUInt32LE(8) !== 0) breach("flags of the config are not 0");
        gate(CONFIG);
        break;
      case "SET_MEM_TABLE":
        expectedFds = payload.readUInt32LE(0);
        if (payload.readUInt32LE(4) !== 0) breach("padding is not 0");
        if (expectedFds > 8) breach(`${expectedFds} regions`);
        if (wants(MEM_SLOTS)) breach("although CONFIGURE_MEM_SLOTS was accepted");
        sized(8 + 32 * expectedFds);
        break;
      case "ADD_MEM_REG":
        expectedFds = 1;
        sized(40);
        gate(MEM_SLOTS);
        break;
      case "REM_MEM_REG":
        sized(40);
        gate(MEM_SLOTS);
        break;
      case "SET_VRING_NUM":
      case "SET_VRING_BASE":
        sized(8);
        break;
      case "GET_VRING_BASE":
        sized(8);
        if (payload.readUInt32LE(4) !== 0) breach("num is not 0");
        break;
      case "SET_VRING_ENABLE":
        sized(8);
        if (payload.readUInt32LE(4) > 1) breach("neither 0 nor 1");
        if ((this.#features & BIT_30) === 0n) breach("bit 30 was not negotiated");
        break;
      case "GET_INFLIGHT_FD":
      case "SET_INFLIGHT_FD":
        sized(24);
        gate(INFLIGHT);
        expectedFds = name === "SET_INFLIGHT_FD" ? 1 : 0;
        if (this.#seen.has("SET_VRING_KICK")) breach("after a ring was started");
        if (!this.#seen.has("SET_FEATURES")) breach("before SET_FEATURES, which says how the rings look");
        break;
      case "SET_VRING_ADDR":
        sized(40);
        break;
      case "SET_VRING_KICK":
      case "SET_VRING_CALL":
      case "SET_VRING_ERR":
        sized(8);
        expectedFds = (payload.readUInt32LE(0) & 0x100) === 0 ? 1 : 0;
        break;
      default:
        breach("not a message that this front-end may send");
    }
    if (fds.length !== expectedFds) breach(`${fds.length} descriptors, not ${expectedFds}`);
  }

  #sendNext(): void {
    const next = this.#outgoing.shift();
    this.#sending = next !== undefined;
    if (next === undefined || this.#client === undefined) {
      if (this.#closeAfterSending) this.hangUp();
      return;
    }
    try {
      sendMessage(this.#client, next.bytes, next.fds);
    } catch {
      this.hangUp(); // the front-end did not want to hear it
      return;
    }
    if (this.#options.fragmented === true) setImmediate(() => this.#sendNext());
    else this.#sendNext();
  }

  #notice(): void {
    for (const waiting of this.#waiting.filter(({ test }) => test())) {
      this.#waiting.splice(this.#waiting.indexOf(waiting), 1);
      waiting.resolve();
    }
  }
}
