/** The back-end's side of the vhost-user protocol with one front-end. */

import { VirtioError } from "../errors.js";
import { BLK_CONFIG_WRITEBACK_OFFSET, BlkFeature } from "../protocol/blk.js";
import {
  configCodec,
  inflightCodec,
  memoryTableCodec,
  singleRegionCodec,
  u64Codec,
  VHOST_USER_F_PROTOCOL_FEATURES,
  VHOST_USER_FLAG_NEED_REPLY,
  VHOST_USER_FLAGS_REQUEST,
  VhostUserProtocolFeature,
  VhostUserRequest,
  vhostUserRequestName,
  vringAddressCodec,
  vringFdCodec,
  vringStateCodec,
} from "../protocol/vhost-user.js";
import { closeFd, jammedBy } from "../sys/index.js";
import { MAX_DEVICE_REGIONS } from "../virtqueue/device-memory.js";
import { VirtioFeature } from "../virtqueue/features.js";
import { BackChannel } from "./back-channel.js";
import type { BlkDevice } from "./blk-device.js";
import { BlkExecutor } from "./blk-executor.js";
import { Connection, type Message } from "./connection.js";
import { InflightRegion } from "./inflight.js";
import { MemoryTable } from "./memory-table.js";
import { Poller } from "./poller.js";
import type { BackendStats } from "./stats.js";
import { type RingContext, Vring, type VringEvents } from "./vring.js";

const PROTOCOL_FEATURES =
  VhostUserProtocolFeature.MQ |
  VhostUserProtocolFeature.REPLY_ACK |
  VhostUserProtocolFeature.BACKEND_REQ |
  VhostUserProtocolFeature.CONFIG |
  VhostUserProtocolFeature.INFLIGHT_SHMFD |
  VhostUserProtocolFeature.RESET_DEVICE |
  VhostUserProtocolFeature.CONFIGURE_MEM_SLOTS |
  VhostUserProtocolFeature.STATUS;

/** Device status bits (virtio 1.3, 2.1). */
const STATUS_DRIVER_OK = 4;
const STATUS_FEATURES_OK = 8;
const STATUS_NEEDS_RESET = 64;

/** Requests whose reply is their own: they are never acknowledged, so a bad one ends the connection. */
const REPLYING: ReadonlySet<number> = new Set([
  VhostUserRequest.GET_FEATURES,
  VhostUserRequest.SET_LOG_BASE,
  VhostUserRequest.GET_VRING_BASE,
  VhostUserRequest.GET_PROTOCOL_FEATURES,
  VhostUserRequest.GET_QUEUE_NUM,
  VhostUserRequest.IOTLB_MSG,
  VhostUserRequest.GET_CONFIG,
  VhostUserRequest.CREATE_CRYPTO_SESSION,
  VhostUserRequest.POSTCOPY_ADVISE,
  VhostUserRequest.POSTCOPY_END,
  VhostUserRequest.GET_INFLIGHT_FD,
  VhostUserRequest.GET_MAX_MEM_SLOTS,
  VhostUserRequest.GET_STATUS,
  VhostUserRequest.GET_SHARED_OBJECT,
  VhostUserRequest.SET_DEVICE_STATE_FD,
  VhostUserRequest.CHECK_DEVICE_STATE,
  VhostUserRequest.GET_SHMEM_CONFIG,
  VhostUserRequest.GET_VRING_BASE_SKIP_DRAIN,
]);

/** A reply of its own that a message has: the payload, and a descriptor to go with it, closed when it is sent. */
type Reply = Uint8Array | { readonly payload: Uint8Array; readonly fd: number };

/** How much memory a front-end shares. */
export interface SharedMemory {
  readonly regions: number;
  readonly bytes: number;
}

/** What a {@link Session} is made from. */
export interface SessionOptions {
  /** The connected socket; closed with the session. */
  readonly fd: number;
  /** The device behind it. */
  readonly device: BlkDevice;
  /** Queues. */
  readonly queues: number;
  /** Refuse memory that is not sealed against shrinking. */
  readonly sealedMemory: boolean;
  /** Offer INFLIGHT_SHMFD. */
  readonly inflight: boolean;
  /** Counters. */
  readonly stats: BackendStats;
}

/**
 * One front-end, from its connection to its end. Messages are checked completely before anything is changed: a bad
 * one is answered with a non-zero acknowledgement when one was asked for, and otherwise ends the connection.
 */
export class Session implements VringEvents {
  /** Resolves when the connection has ended, nothing is in flight, and everything is released. */
  readonly closed: Promise<void>;

  private readonly device: BlkDevice;
  private readonly stats: BackendStats;
  private readonly sealedMemory: boolean;
  private readonly offeredProtocol: bigint;
  private readonly connection: Connection;
  private readonly poller = new Poller();
  private readonly rings: readonly Vring[];
  /** Rings that take nothing for now, because they are being stopped or their memory changes. */
  private readonly held = new Set<Vring>();
  private context: RingContext;
  private inflight: InflightRegion | undefined = undefined;
  private channel: BackChannel | undefined = undefined;
  /** Whether the config space changed and the front-end does not know. */
  private unknownChange = false;
  /** What changes the state of the session, one after the other. */
  private work: Promise<unknown> = Promise.resolve();
  private protocolFeatures = 0n;
  private status = 0;
  private owned = false;

  constructor(options: SessionOptions) {
    const { fd, device, queues, stats } = options;
    this.device = device;
    this.stats = stats;
    this.sealedMemory = options.sealedMemory;
    this.offeredProtocol = PROTOCOL_FEATURES & (options.inflight ? ~0n : ~VhostUserProtocolFeature.INFLIGHT_SHMFD);
    this.device.begin();
    this.rings = Array.from({ length: queues }, (_, i) => new Vring(i, stats, this));
    this.context = this.contextOf(new MemoryTable(this.sealedMemory));
    let ended: (error: unknown) => void = () => undefined;
    const end = new Promise<unknown>((resolve) => {
      ended = resolve;
    });
    this.connection = new Connection(fd, (message) => this.alone(() => this.handle(message)), ended);
    this.closed = end.then((error) => this.release(error));
  }

  /** The memory that the front-end shares. */
  get memory(): SharedMemory {
    const { count, bytes } = this.context.memory;
    return { regions: count, bytes };
  }

  /** Let `change` the capacity while nothing is in flight, and tell the driver. */
  resize(change: () => Promise<void>): Promise<void> {
    return this.alone(async () => {
      await this.hold(this.rings);
      try {
        await change();
        this.configChanged();
      } finally {
        this.resume(this.rings);
      }
    });
  }

  /** Run `task` when no other one does. */
  private alone(task: () => Promise<void>): Promise<void> {
    const turn = this.work.then(task);
    this.work = turn.catch(() => undefined); // Whoever waits for the turn hears of it.
    return turn;
  }

  /** Tell the front-end as soon as it may be told: a device whose rings are all stopped is silent. */
  private configChanged(): void {
    this.unknownChange = true;
    if (this.channel === undefined || !this.rings.some((ring) => ring.started)) return;
    this.unknownChange = false;
    this.channel.configChanged();
  }

  /** End the connection; requests in flight are finished first. */
  async close(): Promise<void> {
    await this.hold(this.rings);
    this.connection.end(undefined);
    await this.closed;
  }

  private async release(error: unknown): Promise<void> {
    if (error !== undefined) this.stats.failed("connection", error);
    await this.hold(this.rings);
    for (const ring of this.rings) ring.reset();
    this.channel?.close();
    this.inflight?.close();
    this.context.memory.close();
  }

  private async handle(message: Message): Promise<void> {
    const { request, flags } = message;
    if ((flags & ~VHOST_USER_FLAG_NEED_REPLY) !== VHOST_USER_FLAGS_REQUEST) {
      throw refuse(`${vhostUserRequestName(request)} has the flags 0x${flags.toString(16)}, expected 0x1 or 0x9`);
    }
    let reply: Reply | undefined;
    let refused = false;
    try {
      reply = await this.dispatch(message);
    } catch (error) {
      if (REPLYING.has(request) || !this.wantsAck(flags)) throw error;
      this.stats.failed("connection", error);
      refused = true;
    }
    if (reply instanceof Uint8Array) await this.connection.reply(request, reply);
    else if (reply !== undefined) await this.hand(request, reply);
    else if (this.wantsAck(flags)) await this.connection.reply(request, u64Codec.encode(refused ? 1 : 0));
  }

  private async hand(request: number, { payload, fd }: Exclude<Reply, Uint8Array>): Promise<void> {
    try {
      await this.connection.reply(request, payload, [fd]);
    } finally {
      closeFd(fd);
    }
  }

  private wantsAck(flags: number): boolean {
    return (flags & VHOST_USER_FLAG_NEED_REPLY) !== 0 && this.has(VhostUserProtocolFeature.REPLY_ACK);
  }

  private has(feature: bigint): boolean {
    return (this.protocolFeatures & feature) !== 0n;
  }

  /** Carry out one message; returns its own reply, if it has one. */
  private dispatch(message: Message): Reply | undefined | Promise<Reply | undefined> {
    const { request, payload } = message;
    if (!TAKES_FDS.has(request)) expectFds(message, 0);
    const gate = GATES.get(request);
    if (gate !== undefined && !this.has(gate)) {
      throw refuse(`${vhostUserRequestName(request)} was sent without the protocol feature it belongs to`);
    }
    switch (request) {
      case VhostUserRequest.GET_FEATURES:
        expectEmpty(message);
        return u64Codec.encode(this.device.offered | VHOST_USER_F_PROTOCOL_FEATURES);
      case VhostUserRequest.SET_FEATURES:
        return this.setFeatures(u64Codec.decode(payload));
      case VhostUserRequest.SET_OWNER:
        expectEmpty(message);
        if (this.owned) throw refuse("SET_OWNER was sent twice");
        this.owned = true;
        return undefined;
      case VhostUserRequest.RESET_OWNER:
        // Deprecated; the protocol recommends to ignore it.
        return expectEmpty(message);
      case VhostUserRequest.GET_PROTOCOL_FEATURES:
        expectEmpty(message);
        return u64Codec.encode(this.offeredProtocol);
      case VhostUserRequest.SET_PROTOCOL_FEATURES:
        return this.setProtocolFeatures(u64Codec.decode(payload));
      case VhostUserRequest.GET_QUEUE_NUM:
        expectEmpty(message);
        return u64Codec.encode(this.rings.length);
      case VhostUserRequest.GET_MAX_MEM_SLOTS:
        expectEmpty(message);
        return u64Codec.encode(MAX_DEVICE_REGIONS);
      case VhostUserRequest.SET_MEM_TABLE:
        return this.setMemoryTable(message);
      case VhostUserRequest.ADD_MEM_REG:
        expectFds(message, 1);
        this.context.memory.add(singleRegionCodec.decode(payload), message.fds[0]);
        return undefined;
      case VhostUserRequest.REM_MEM_REG:
        return this.removeRegion(message);
      case VhostUserRequest.SET_BACKEND_REQ_FD:
        return this.setChannel(message);
      case VhostUserRequest.GET_INFLIGHT_FD:
        return this.makeInflight(payload);
      case VhostUserRequest.SET_INFLIGHT_FD:
        return this.setInflight(message);
      case VhostUserRequest.GET_CONFIG:
        return this.getConfig(payload);
      case VhostUserRequest.SET_CONFIG:
        return this.setConfig(payload);
      case VhostUserRequest.RESET_DEVICE:
        expectEmpty(message);
        return this.resetDevice();
      case VhostUserRequest.GET_STATUS:
        expectEmpty(message);
        return u64Codec.encode(this.status | (this.rings.some((ring) => ring.isBroken) ? STATUS_NEEDS_RESET : 0));
      case VhostUserRequest.SET_STATUS:
        return this.setStatus(u64Codec.decode(payload));
      default:
        return this.dispatchRing(message);
    }
  }

  /** The messages about one ring. */
  private dispatchRing(message: Message): Uint8Array | undefined | Promise<Uint8Array | undefined> {
    const { request, payload } = message;
    switch (request) {
      case VhostUserRequest.SET_VRING_NUM: {
        const { index, num } = vringStateCodec.decode(payload);
        this.ring(index).setSize(num);
        return undefined;
      }
      case VhostUserRequest.SET_VRING_BASE: {
        const { index, num } = vringStateCodec.decode(payload);
        this.ring(index).setBase(num);
        return undefined;
      }
      case VhostUserRequest.SET_VRING_ADDR: {
        const address = vringAddressCodec.decode(payload);
        if (address.flags !== 0) throw refuse("SET_VRING_ADDR asks for logging, which was not offered");
        this.ring(address.index).setAddress(address);
        return undefined;
      }
      case VhostUserRequest.SET_VRING_ENABLE:
        return this.enable(payload);
      case VhostUserRequest.SET_VRING_KICK: {
        const { ring, fd } = this.ringFd(message);
        if (fd === undefined)
          throw refuse("SET_VRING_KICK came without a descriptor; this back-end does not only poll");
        ring.start(fd, this.context);
        if (this.unknownChange) this.configChanged();
        this.wake(ring);
        return undefined;
      }
      case VhostUserRequest.SET_VRING_CALL: {
        const { ring, fd } = this.ringFd(message);
        ring.setCall(fd);
        return undefined;
      }
      case VhostUserRequest.SET_VRING_ERR: {
        const { ring, fd } = this.ringFd(message);
        ring.setError(fd);
        return undefined;
      }
      case VhostUserRequest.GET_VRING_BASE:
        return this.stopRing(payload);
      default:
        throw new VirtioError("ERR_VIRTIO_UNSUPPORTED", `${vhostUserRequestName(request)} is not supported`);
    }
  }

  private setFeatures(features: bigint): undefined {
    const virtio = features & ~VHOST_USER_F_PROTOCOL_FEATURES;
    if ((virtio & ~this.device.offered) !== 0n || (virtio & VirtioFeature.VERSION_1) === 0n) {
      throw new VirtioError(
        "ERR_VIRTIO_FEATURES",
        `the features 0x${virtio.toString(16)} have bits that were not offered, or not VERSION_1`,
      );
    }
    if (virtio !== this.device.features) {
      if (this.rings.some((ring) => ring.started))
        throw refuse("SET_FEATURES changes features while rings are started");
      this.device.negotiate(virtio);
      this.context = this.contextOf(this.context.memory);
    }
    if (virtio === features) for (const ring of this.rings) ring.enabled = true;
    return undefined;
  }

  private setProtocolFeatures(features: bigint): undefined {
    if ((features & ~this.offeredProtocol) !== 0n) {
      // No acknowledgement could be relied on here: the front-end means another protocol than this back-end.
      this.protocolFeatures = 0n;
      throw refuse(`the protocol features 0x${features.toString(16)} were not all offered`);
    }
    this.protocolFeatures = features;
    return undefined;
  }

  private async setMemoryTable(message: Message): Promise<undefined> {
    const regions = memoryTableCodec.decode(message.payload);
    expectFds(message, regions.length);
    const next = new MemoryTable(this.sealedMemory);
    try {
      regions.forEach((region, i) => next.add(region, message.fds[i]));
      for (const ring of this.rings) ring.checkAreas(next, this.device.features);
      await this.hold(this.rings);
      const old = this.context.memory;
      this.context = this.contextOf(next);
      for (const ring of this.rings) ring.rebuild(this.context);
      old.close();
    } catch (error) {
      if (this.context.memory !== next) next.close();
      throw error;
    } finally {
      this.resume(this.rings);
    }
  }

  private async removeRegion(message: Message): Promise<undefined> {
    // One descriptor may come along; it is closed unused.
    if (message.fds.length > 1) expectFds(message, 1);
    const buffer = this.context.memory.find(singleRegionCodec.decode(message.payload));
    if (this.rings.some((ring) => ring.liesIn(buffer))) throw refuse("a started ring lies in the region to be removed");
    await this.hold(this.rings);
    this.context.memory.remove(buffer);
    this.resume(this.rings);
  }

  private setChannel(message: Message): undefined {
    expectFds(message, 1);
    const acknowledged = this.has(VhostUserProtocolFeature.REPLY_ACK);
    const channel = new BackChannel(message.fds[0], acknowledged, (error) => this.stats.failed("connection", error));
    message.fds.pop();
    this.channel?.close();
    this.channel = channel;
  }

  private makeInflight(payload: Uint8Array): Reply {
    const { rings, isPacked } = this;
    const { fd, description } = InflightRegion.create(inflightCodec.decode(payload), rings.length, isPacked);
    return { payload: inflightCodec.encode(description), fd };
  }

  private setInflight(message: Message): undefined {
    expectFds(message, 1);
    if (this.rings.some((ring) => ring.started)) throw refuse("SET_INFLIGHT_FD came while rings are started");
    const options = { queues: this.rings.length, packed: this.isPacked, sealed: this.sealedMemory };
    const inflight = new InflightRegion(inflightCodec.decode(message.payload), message.fds[0], options);
    this.inflight?.close();
    this.inflight = inflight;
    this.context = { ...this.context, inflight };
  }

  private get isPacked(): boolean {
    return (this.device.features & VirtioFeature.RING_PACKED) !== 0n;
  }

  private getConfig(payload: Uint8Array): Uint8Array {
    const { offset, flags, data } = configCodec.decode(payload);
    const { config } = this.device;
    // A reply of length 0 says that the request failed ("VHOST_USER_GET_CONFIG").
    if (data.length === 0 || offset + data.length > config.length) return new Uint8Array(0);
    this.unknownChange = false;
    const end = offset + data.length;
    if (offset <= BLK_CONFIG_WRITEBACK_OFFSET && BLK_CONFIG_WRITEBACK_OFFSET < end) this.device.told();
    return configCodec.encode({ offset, flags, data: config.subarray(offset, end) });
  }

  private setConfig(payload: Uint8Array): undefined {
    const { offset, flags, data } = configCodec.decode(payload);
    const writable = offset === BLK_CONFIG_WRITEBACK_OFFSET && data.length === 1 && data[0] <= 1;
    if (flags > 1 || !writable || (this.device.features & BlkFeature.CONFIG_WCE) === 0n) {
      throw refuse(`SET_CONFIG of ${data.length} bytes at ${offset}; only writeback can be written, after CONFIG_WCE`);
    }
    this.device.setWriteback(data[0] === 1);
    return undefined;
  }

  private async resetDevice(): Promise<undefined> {
    await this.hold(this.rings);
    for (const ring of this.rings) {
      ring.settle();
      ring.reset();
    }
    this.held.clear();
    this.status = 0;
    this.device.negotiate(0n);
    this.context = this.contextOf(this.context.memory);
  }

  private setStatus(value: bigint): undefined | Promise<undefined> {
    if (value > 0xffn) throw refuse(`a device status has 8 bits, got 0x${value.toString(16)}`);
    if (value === 0n) return this.resetDevice();
    const accepted = (this.device.features & VirtioFeature.VERSION_1) !== 0n;
    this.status = accepted ? Number(value) : Number(value) & ~STATUS_FEATURES_OK;
    for (const ring of this.rings) this.wake(ring);
    return undefined;
  }

  private enable(payload: Uint8Array): undefined {
    const { index, num } = vringStateCodec.decode(payload);
    const ring = this.ring(index);
    if (num > 1) throw refuse(`SET_VRING_ENABLE is 0 or 1, got ${num}`);
    ring.enabled = num === 1;
    this.wake(ring);
    return undefined;
  }

  private async stopRing(payload: Uint8Array): Promise<Uint8Array> {
    const { index } = vringStateCodec.decode(payload);
    const ring = this.ring(index);
    await this.hold([ring]);
    ring.settle();
    const num = ring.stop();
    this.held.delete(ring);
    return vringStateCodec.encode({ index, num });
  }

  notified(ring: Vring): void {
    if (this.mayRun(ring)) this.poller.notified(ring);
  }

  answered(ring: Vring): void {
    this.wake(ring);
  }

  broke(): void {
    // A driver that runs is told that its device needs a reset (virtio 1.3, 2.1.2).
    if (this.has(VhostUserProtocolFeature.STATUS) && (this.status & STATUS_DRIVER_OK) !== 0) this.configChanged();
  }

  jammed(): void {
    this.connection.end(jammedBy("the front-end"));
  }

  lost(): boolean {
    if (!this.context.memory.isLost && this.inflight?.isLost !== true) return false;
    for (const ring of this.rings) ring.abandon();
    const why =
      "the front-end took memory away that it shares (its file was truncated, or there are no huge pages left)";
    this.connection.end(new VirtioError("ERR_VIRTIO_MEMORY", `${why}; nothing more can be done for it`));
    return true;
  }

  /** Have a ring looked at, when it may run now. */
  private wake(ring: Vring): void {
    if (this.mayRun(ring)) this.poller.wake(ring);
  }

  private mayRun(ring: Vring): boolean {
    const ready = !this.has(VhostUserProtocolFeature.STATUS) || (this.status & STATUS_DRIVER_OK) !== 0;
    return ready && ring.runnable && !this.held.has(ring);
  }

  /** Take nothing more from `rings`, and wait until nothing of them is in flight. */
  private async hold(rings: readonly Vring[]): Promise<void> {
    for (const ring of rings) {
      this.held.add(ring);
      this.poller.drop(ring);
    }
    await Promise.all(rings.map((ring) => ring.drained()));
  }

  private resume(rings: readonly Vring[]): void {
    for (const ring of rings) {
      this.held.delete(ring);
      this.wake(ring);
    }
  }

  private contextOf(memory: MemoryTable): RingContext {
    const { features } = this.device;
    const executor = new BlkExecutor(this.device, memory.guest, this.stats);
    return { memory, features, executor, inflight: this.inflight };
  }

  private ring(index: number): Vring {
    const ring = this.rings[index];
    if (ring === undefined) throw refuse(`there is no ring ${index}; this device has ${this.rings.length}`);
    return ring;
  }

  /** The ring and the descriptor of SET_VRING_KICK, CALL or ERR; the descriptor is the caller's from here on. */
  private ringFd(message: Message): { ring: Vring; fd: number | undefined } {
    const { index, noFd } = vringFdCodec.decode(message.payload);
    const ring = this.ring(index);
    expectFds(message, noFd ? 0 : 1);
    return { ring, fd: message.fds.pop() };
  }
}

/** Requests that carry descriptors. */
const TAKES_FDS: ReadonlySet<number> = new Set([
  VhostUserRequest.SET_MEM_TABLE,
  VhostUserRequest.ADD_MEM_REG,
  VhostUserRequest.REM_MEM_REG,
  VhostUserRequest.SET_BACKEND_REQ_FD,
  VhostUserRequest.SET_INFLIGHT_FD,
  VhostUserRequest.SET_VRING_KICK,
  VhostUserRequest.SET_VRING_CALL,
  VhostUserRequest.SET_VRING_ERR,
]);

/** The protocol feature that each of these requests needs. */
const GATES: ReadonlyMap<number, bigint> = new Map([
  [VhostUserRequest.GET_QUEUE_NUM, VhostUserProtocolFeature.MQ],
  [VhostUserRequest.GET_CONFIG, VhostUserProtocolFeature.CONFIG],
  [VhostUserRequest.SET_CONFIG, VhostUserProtocolFeature.CONFIG],
  [VhostUserRequest.SET_BACKEND_REQ_FD, VhostUserProtocolFeature.BACKEND_REQ],
  [VhostUserRequest.GET_INFLIGHT_FD, VhostUserProtocolFeature.INFLIGHT_SHMFD],
  [VhostUserRequest.SET_INFLIGHT_FD, VhostUserProtocolFeature.INFLIGHT_SHMFD],
  [VhostUserRequest.RESET_DEVICE, VhostUserProtocolFeature.RESET_DEVICE],
  [VhostUserRequest.GET_MAX_MEM_SLOTS, VhostUserProtocolFeature.CONFIGURE_MEM_SLOTS],
  [VhostUserRequest.ADD_MEM_REG, VhostUserProtocolFeature.CONFIGURE_MEM_SLOTS],
  [VhostUserRequest.REM_MEM_REG, VhostUserProtocolFeature.CONFIGURE_MEM_SLOTS],
  [VhostUserRequest.SET_STATUS, VhostUserProtocolFeature.STATUS],
  [VhostUserRequest.GET_STATUS, VhostUserProtocolFeature.STATUS],
]);

function expectFds(message: Message, count: number): void {
  if (message.fds.length === count) return;
  throw refuse(`${vhostUserRequestName(message.request)} takes ${count} descriptors, got ${message.fds.length}`);
}

function expectEmpty(message: Message): undefined {
  if (message.payload.length === 0) return undefined;
  throw refuse(`${vhostUserRequestName(message.request)} has no payload, got ${message.payload.length} bytes`);
}

function refuse(why: string): VirtioError {
  return new VirtioError("ERR_VIRTIO_PROTOCOL", why);
}
