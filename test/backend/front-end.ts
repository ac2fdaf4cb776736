/** A front-end for tests of the back-end: message by message, descriptor by descriptor, right or wrong. */

import assert from "node:assert/strict";
import {
  BlkRequestType,
  decodeVhostUserHeader,
  encodeVhostUserMessage,
  singleRegionCodec,
  u64Codec,
  VHOST_USER_F_PROTOCOL_FEATURES,
  VHOST_USER_FLAG_NEED_REPLY,
  VHOST_USER_FLAGS_REPLY,
  VHOST_USER_FLAGS_REQUEST,
  VHOST_USER_HEADER_SIZE,
  VhostUserProtocolFeature,
  VhostUserRequest,
  vhostUserRequestName,
  vringAddressCodec,
  vringFdCodec,
  vringStateCodec,
} from "../../src/protocol/index.js";
import {
  closeFd,
  connectUnix,
  createMemfd,
  EventFd,
  FdWatcher,
  mapShared,
  receiveMessage,
  sendMessage,
  unmapShared,
} from "../../src/sys/index.js";
import { VirtioFeature } from "../../src/virtqueue/index.js";
import { type Element, PackedDriver, placeRing, SplitDriver } from "../virtqueue/device-driver.js";

/** No wait of a test is longer; what does not come by then is missing. */
const PATIENCE_MS = 10_000;

/** Addresses of the shared memory: different in both address spaces, so that mixing them up shows. */
export const GUEST = 0x10_0000_0000n;
export const USER = 0x7f00_0000_0000n;
export const MEMORY_BYTES = 8 * 1024 * 1024;
/** Ring `i` begins at `i * RING_BYTES`; data from {@link DATA} on. */
const RING_BYTES = 256 * 1024;
export const DATA = 4 * 1024 * 1024;

export const ALL_PROTOCOL_FEATURES =
  VhostUserProtocolFeature.MQ |
  VhostUserProtocolFeature.REPLY_ACK |
  VhostUserProtocolFeature.CONFIG |
  VhostUserProtocolFeature.RESET_DEVICE |
  VhostUserProtocolFeature.CONFIGURE_MEM_SLOTS;

/** Wait for `promise`, but not for ever. */
export async function soon<T>(promise: Promise<T>, what: string): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`${what}: nothing after ${PATIENCE_MS} ms`)), PATIENCE_MS);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** Resolves when `fd` can be read. */
async function readable(fd: number, what: string): Promise<void> {
  let watcher: FdWatcher | undefined;
  try {
    await soon(
      new Promise<void>((resolve) => {
        watcher = new FdWatcher(fd, { drain: false }, resolve);
      }),
      what,
    );
  } finally {
    watcher?.close();
  }
}

/** One connection to a back-end. */
export class FrontEnd {
  fd: number;
  readonly memfd: number;
  readonly buffer: ArrayBuffer;
  readonly bytes: Uint8Array;
  features = 0n;
  private readonly rings: Ring[] = [];
  private closed = false;
  /** Where descriptors go that come with a reply; undefined when none may. */
  private expected: number[] | undefined = undefined;

  constructor(path: string, memfd = createMemfd("test-front-end", MEMORY_BYTES)) {
    this.fd = connectUnix(path);
    this.memfd = memfd;
    this.buffer = mapShared(memfd, MEMORY_BYTES);
    this.bytes = new Uint8Array(this.buffer);
  }

  /** Hang up, and connect to another back-end with the same memory. */
  reconnect(path: string): void {
    closeFd(this.fd);
    this.fd = connectUnix(path);
  }

  /** Send a message as it is. */
  send(
    request: number,
    payload: Uint8Array = new Uint8Array(0),
    fds: readonly number[] = [],
    flags = VHOST_USER_FLAGS_REQUEST,
  ): void {
    const bytes = encodeVhostUserMessage(request, flags, payload);
    assert.equal(sendMessage(this.fd, bytes, fds), bytes.length);
  }

  /** Send raw bytes. */
  sendBytes(bytes: Uint8Array, fds: readonly number[] = []): void {
    assert.equal(sendMessage(this.fd, bytes, fds), bytes.length);
  }

  /** The payload of the next reply, which must be to `request`. */
  async reply(request: number): Promise<Uint8Array> {
    const header = decodeVhostUserHeader(await this.receive(VHOST_USER_HEADER_SIZE));
    assert.equal(vhostUserRequestName(header.request), vhostUserRequestName(request));
    assert.equal(header.flags, VHOST_USER_FLAGS_REPLY);
    return this.receive(header.size);
  }

  /** Read a message, whatever it is; returns its request. */
  async anyReply(): Promise<number> {
    const header = decodeVhostUserHeader(await this.receive(VHOST_USER_HEADER_SIZE));
    if (header.size > 0) await this.receive(header.size);
    return header.request;
  }

  /** Send a request that has a reply of its own, and return that. */
  ask(request: number, payload?: Uint8Array, fds?: readonly number[]): Promise<Uint8Array> {
    this.send(request, payload, fds);
    return this.reply(request);
  }

  /** As `ask`, for a reply that comes with a descriptor, which is the caller's. */
  async askFd(request: number, payload?: Uint8Array): Promise<{ payload: Uint8Array; fd: number }> {
    this.send(request, payload);
    this.expected = [];
    const reply = await this.reply(request);
    const [fd] = this.expected;
    this.expected = undefined;
    assert.ok(fd !== undefined, `${vhostUserRequestName(request)} came without a descriptor`);
    return { payload: reply, fd };
  }

  async askU64(request: number): Promise<bigint> {
    return u64Codec.decode(await this.ask(request));
  }

  /** Send a request with need_reply; 0 when the back-end did it. */
  async ack(request: number, payload?: Uint8Array, fds?: readonly number[]): Promise<bigint> {
    this.send(request, payload, fds, VHOST_USER_FLAGS_REQUEST | VHOST_USER_FLAG_NEED_REPLY);
    return u64Codec.decode(await this.reply(request));
  }

  /** As `ack`, and it must work. */
  async must(request: number, payload?: Uint8Array, fds?: readonly number[]): Promise<void> {
    assert.equal(await this.ack(request, payload, fds), 0n, vhostUserRequestName(request));
  }

  /** Resolves when the back-end has hung up without sending anything more. */
  async hungUp(): Promise<void> {
    await readable(this.fd, "the end of the connection");
    try {
      assert.equal(receiveMessage(this.fd, new Uint8Array(1), []), 0);
    } catch (error) {
      assert.equal((error as { code?: string }).code, "ERR_VIRTIO_SYSCALL"); // ECONNRESET: it had not read everything
    }
  }

  /** Whether something came from the back-end and was not received. */
  get silent(): boolean {
    return receiveMessage(this.fd, new Uint8Array(1), []) === -1;
  }

  /** Owner, protocol features and features, as most front-ends do it. */
  async handshake(features: bigint, protocolFeatures = ALL_PROTOCOL_FEATURES): Promise<void> {
    this.features = features | VirtioFeature.VERSION_1;
    this.send(VhostUserRequest.SET_OWNER);
    await this.askU64(VhostUserRequest.GET_FEATURES);
    await this.askU64(VhostUserRequest.GET_PROTOCOL_FEATURES);
    this.send(VhostUserRequest.SET_PROTOCOL_FEATURES, u64Codec.encode(protocolFeatures));
    await this.must(VhostUserRequest.SET_FEATURES, u64Codec.encode(this.features | VHOST_USER_F_PROTOCOL_FEATURES));
  }

  /** Share the memory. */
  async share(): Promise<void> {
    await this.must(VhostUserRequest.ADD_MEM_REG, singleRegionCodec.encode(REGION), [this.memfd]);
  }

  /** Make a ring, known to nobody yet. */
  ring(index = 0, size = 64): Ring {
    const ring = new Ring(this, index, size);
    this.rings.push(ring);
    return ring;
  }

  /** All of it: handshake, memory, one started and enabled ring. */
  async start(features = 0n, size = 64): Promise<Ring> {
    await this.handshake(features);
    await this.share();
    const ring = this.ring(0, size);
    await ring.start();
    await ring.enable(1);
    return ring;
  }

  /** Hang up and release everything. Idempotent. */
  close(): void {
    if (this.closed) return;
    this.closed = true;
    for (const ring of this.rings) ring.close();
    closeFd(this.fd);
    unmapShared(this.buffer);
    closeFd(this.memfd);
  }

  private async receive(length: number): Promise<Uint8Array> {
    const bytes = new Uint8Array(length);
    for (let done = 0; done < length; ) {
      const fds: number[] = [];
      const count = receiveMessage(this.fd, bytes.subarray(done), this.expected ?? fds);
      assert.deepEqual(fds, []);
      assert.notEqual(count, 0, "the back-end hung up");
      if (count > 0) done += count;
      else await readable(this.fd, "a reply");
    }
    return bytes;
  }
}

/** The region that holds all the memory. */
export const REGION = { guestAddress: GUEST, size: MEMORY_BYTES, userAddress: USER, mmapOffset: 0 } as const;

/** Sector, number of sectors, flags: one segment of DISCARD and its like. */
export type Segment = readonly [sector: bigint, sectors: number, flags: number];

/** One ring of a {@link FrontEnd} with its driver. */
export class Ring {
  readonly driver: SplitDriver | PackedDriver;
  readonly kick = EventFd.create();
  call = EventFd.create();

  readonly front: FrontEnd;
  readonly index: number;
  readonly size: number;
  private dataAt: number;
  private readonly used = new Map<number, number>();

  constructor(front: FrontEnd, index: number, size: number) {
    this.front = front;
    this.index = index;
    this.size = size;
    const place = placeRing(size, GUEST, index * RING_BYTES, front.buffer);
    this.driver = this.packed ? new PackedDriver(place) : new SplitDriver(place);
    this.dataAt = DATA + index * RING_BYTES;
  }

  get packed(): boolean {
    return (this.front.features & VirtioFeature.RING_PACKED) !== 0n;
  }

  /** NUM, BASE, ADDR, CALL and KICK. */
  async start(base = this.packed ? 0x8000_8000 : 0): Promise<void> {
    const { front, index } = this;
    await front.must(VhostUserRequest.SET_VRING_NUM, vringStateCodec.encode({ index, num: this.size }));
    await front.must(VhostUserRequest.SET_VRING_BASE, vringStateCodec.encode({ index, num: base }));
    await front.must(VhostUserRequest.SET_VRING_ADDR, this.address());
    await front.must(VhostUserRequest.SET_VRING_CALL, vringFdCodec.encode({ index, noFd: false }), [this.call.fd]);
    await front.must(VhostUserRequest.SET_VRING_KICK, vringFdCodec.encode({ index, noFd: false }), [this.kick.fd]);
  }

  /** The payload of SET_VRING_ADDR, moved by `offsets`. */
  address(offsets: { desc?: bigint; avail?: bigint; used?: bigint; flags?: number } = {}): Uint8Array {
    const { descriptors, driver, device } = this.driver.place;
    const { desc = 0n, avail = 0n, used = 0n, flags = 0 } = offsets;
    return vringAddressCodec.encode({
      ...{ index: this.index, flags, log: 0 },
      desc: USER + BigInt(descriptors) + desc,
      avail: USER + BigInt(driver) + avail,
      used: USER + BigInt(device) + used,
    });
  }

  async enable(num: number): Promise<void> {
    await this.front.must(VhostUserRequest.SET_VRING_ENABLE, vringStateCodec.encode({ index: this.index, num }));
  }

  /** Stop it; returns its base. */
  async stop(): Promise<number> {
    const state = vringStateCodec.encode({ index: this.index, num: 0 });
    const reply = vringStateCodec.decode(await this.front.ask(VhostUserRequest.GET_VRING_BASE, state));
    assert.equal(reply.index, this.index);
    return reply.num;
  }

  /** Room of `length` bytes in the shared memory; returns its offset there. */
  room(length: number): number {
    const at = this.dataAt;
    this.dataAt += Math.ceil(length / 16) * 16;
    assert.ok(this.dataAt <= MEMORY_BYTES, "the test needs more memory than it has");
    return at;
  }

  /** Use the room of requests that are finished for others. */
  rewind(): void {
    this.dataAt = DATA + this.index * RING_BYTES;
  }

  /** Make a request available; the device is not notified. */
  request(type: number, sector: bigint, data: RequestData = {}): Request {
    const { out = new Uint8Array(0), into = 0, cuts = [], indirect = false } = data;
    const header = this.room(16 + out.length);
    const answer = this.room(into + 1);
    const { bytes, buffer } = this.front;
    const view = new DataView(buffer);
    view.setUint32(header, type, true);
    view.setUint32(header + 4, 0, true);
    view.setBigUint64(header + 8, sector, true);
    bytes.set(out, header + 16);
    bytes.fill(0xee, answer, answer + into);
    bytes[answer + into] = 0xff;
    const elements = cut(
      [
        { address: GUEST + BigInt(header), length: 16, writable: false },
        ...(out.length > 0 ? [{ address: GUEST + BigInt(header + 16), length: out.length, writable: false }] : []),
        ...(into > 0 ? [{ address: GUEST + BigInt(answer), length: into, writable: true }] : []),
        { address: GUEST + BigInt(answer + into), length: 1, writable: true },
      ],
      cuts,
    );
    const id = this.driver.add(elements, indirect ? elements.length : 0);
    assert.ok(id >= 0, "the ring is full");
    this.driver.publish();
    return { id, status: () => bytes[answer + into], data: () => bytes.slice(answer, answer + into) };
  }

  /** Make a request available, notify, and wait for its answer. */
  async run(type: number, sector: bigint, data: RequestData = {}): Promise<Answer> {
    const request = this.request(type, sector, data);
    this.kick.signal();
    const length = await this.finished(request);
    return { status: request.status(), length, data: request.data() };
  }

  read(sector: bigint, length: number, more: RequestData = {}): Promise<Answer> {
    return this.run(BlkRequestType.IN, sector, { ...more, into: length });
  }

  write(sector: bigint, out: Uint8Array, more: RequestData = {}): Promise<Answer> {
    return this.run(BlkRequestType.OUT, sector, { ...more, out });
  }

  segments(type: number, ...segments: readonly Segment[]): Promise<Answer> {
    const out = new Uint8Array(16 * segments.length);
    const view = new DataView(out.buffer);
    for (const [i, [sector, sectors, flags]] of segments.entries()) {
      view.setBigUint64(16 * i, sector, true);
      view.setUint32(16 * i + 8, sectors, true);
      view.setUint32(16 * i + 12, flags, true);
    }
    return this.run(type, 0n, { out });
  }

  /** Wait until `request` is used; returns the length of its used entry. */
  async finished(request: Request): Promise<number> {
    for (;;) {
      if (this.driver instanceof SplitDriver) this.driver.arm();
      for (const { id, length } of this.driver.collect()) this.used.set(id, length);
      const length = this.used.get(request.id);
      if (length !== undefined) {
        this.used.delete(request.id);
        return length;
      }
      await readable(this.call.fd, `request ${request.id}`);
      this.call.drain();
    }
  }

  /** Whether `request` is used by now. */
  isFinished(request: Request): boolean {
    for (const { id, length } of this.driver.collect()) this.used.set(id, length);
    return this.used.has(request.id);
  }

  close(): void {
    this.kick.close();
    this.call.close();
  }
}

/** What goes with a request. */
export interface RequestData {
  /** Bytes for the device. */
  readonly out?: Uint8Array;
  /** Bytes wanted from the device. */
  readonly into?: number;
  /** Sizes of the elements that the chain is cut into; what is left is cut as usual. */
  readonly cuts?: readonly number[];
  /** Whether all of it goes into a table. */
  readonly indirect?: boolean;
}

export interface Request {
  readonly id: number;
  readonly status: () => number;
  readonly data: () => Uint8Array;
}

export interface Answer {
  readonly status: number;
  readonly length: number;
  readonly data: Uint8Array;
}

/** Cut elements into smaller ones of the given sizes; elements that touch may be joined by a larger size. */
function cut(elements: readonly Element[], cuts: readonly number[]): Element[] {
  const sizes = [...cuts];
  const result: Element[] = [];
  const rest = [...elements];
  for (let element = rest.shift(); element !== undefined; element = rest.shift()) {
    const size = sizes.shift() ?? element.length;
    const next = rest[0];
    if (size > element.length && next !== undefined && next.writable === element.writable) {
      // The areas of one direction lie one behind the other.
      rest[0] = { address: element.address, length: element.length + next.length, writable: next.writable };
      sizes.unshift(size);
      continue;
    }
    result.push({ ...element, length: Math.min(size, element.length) });
    if (size < element.length) {
      rest.unshift({ ...element, address: element.address + BigInt(size), length: element.length - size });
    }
  }
  return result;
}

/** Resolves after everything that was due in the event loop has run `turns` times. */
export async function turns(count: number): Promise<void> {
  for (let i = 0; i < count; i++) await new Promise((resolve) => setImmediate(resolve));
}
