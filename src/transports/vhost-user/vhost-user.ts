/** The vhost-user front-end: drives a device that another process serves on a Unix socket. */

import { checkInteger, checkOptions, rangeError, typeError, VirtioError } from "../../errors.js";
import type { MemoryRegion } from "../../memory/index.js";
import { VhostUserProtocolFeature } from "../../protocol/vhost-user.js";
import { connectUnix, jammedBy } from "../../sys/index.js";
import { VIRTQUEUE_MAX_SIZE } from "../../virtqueue/defs.js";
import { VirtioFeature } from "../../virtqueue/features.js";
import { chooseFeatures, COMMON_FEATURES } from "../features.js";
import { Lifetime } from "../lifetime.js";
import { TransportMemory } from "../memory.js";
import { checkQueues } from "../queues.js";
import type { QueueNotifier, QueueSetup, ReconnectOptions, Recovery, VirtioTransport } from "../transport.js";
import type { WaitOptions } from "../transport.js";
import { checkWait, DEFAULT_TIMEOUT, Serial, Waits } from "../wait.js";
import { RequestChannel } from "./channel.js";
import { checkConfigRange, configWrite, readConfig } from "./config.js";
import { mapAgain, regionMapper, removal } from "./memory.js";
import { agreement, checkSame, type Introduction, introduce, wantedProtocolFeatures } from "./negotiation.js";
import { VhostUserQueues } from "./queues.js";
import { Backoff, gaveUp, isPassing, reconnectPolicy, type ReconnectPolicy } from "./reconnect.js";

/** Where a back-end is reached: the path of its socket, or a connected descriptor, which is owned from then on. */
export type VhostUserTarget = string | { readonly path: string } | { readonly fd: number };

/** Options of {@link VhostUser.connect}. */
export interface VhostUserOptions extends WaitOptions {
  /** Milliseconds that this and every later operation waits at most, unless it says otherwise. Default 10000. */
  readonly timeout?: number;
  /**
   * Whether to connect again when the connection breaks while queues run and the driver takes part (see `recovery`),
   * and how often. Default: true for a path; a descriptor cannot be connected again.
   */
  readonly reconnect?: boolean | ReconnectOptions;
  /** Runs once the connection is closed, and `close` waits for it: to stop a back-end that was started for it. */
  readonly afterClose?: () => Promise<void>;
}

const U64_MAX = 0xffff_ffff_ffff_ffffn;

/**
 * A connection to a vhost-user back-end (QEMU `docs/interop/vhost-user.rst`, the front-end's part).
 *
 * Messages are asynchronous and strictly in order. Every wait is bounded by `timeout` and an AbortSignal.
 * Giving up a wait leaves the connection alone: the late reply is consumed, and what the operation did is
 * undone as soon as it ends. A wrong reply closes the connection, and with it everything that waits.
 * A connection that nobody waits for does not keep the process alive.
 *
 * @example
 * ```ts
 * import { VhostUser, VirtioFeature } from "virtio-driver";
 *
 * await using device = await VhostUser.connect("/run/disk.sock", { timeout: 2000 });
 * await device.negotiate(VirtioFeature.VERSION_1);
 * const config = await device.readConfig(0, 8);
 * console.log(new DataView(config.buffer).getBigUint64(0, true)); // 131072n: sectors
 * ```
 */
export class VhostUser implements VirtioTransport {
  readonly address: string;
  readonly deviceType = undefined;
  readonly offeredFeatures: bigint;
  /** Protocol features in force, masks of `VhostUserProtocolFeature`. */
  readonly protocolFeatures: bigint;
  readonly maxQueues: number;
  readonly maxQueueSize = VIRTQUEUE_MAX_SIZE;
  readonly maxRegions: number;
  readonly hasConfig: boolean;
  onConfigChange: (() => void) | undefined;
  recovery: Recovery | undefined = undefined;

  readonly #peer: string;
  readonly #timeout: number;
  /** Where to connect again, and how. */
  readonly #path: string | undefined;
  readonly #policy: ReconnectPolicy | undefined;
  readonly #backoff: Backoff | undefined;
  /** The present connection. */
  readonly #link: { channel: RequestChannel };
  readonly #waits: Waits;
  #introduction: Introduction;
  readonly #memory: TransportMemory;
  readonly #queues: VhostUserQueues;
  readonly #afterClose: (() => Promise<void>) | undefined;
  /** Changes of memory and queues, one after the other. */
  readonly #changes = new Serial();
  #features = 0n;
  #negotiation: "open" | "begun" | "done" = "open";
  readonly #lifetime: Lifetime;
  /** Why the connection broke, until there is another one. */
  #broken: VirtioError | undefined = undefined;
  /** Ends with the outage: by another connection, or by the error that ends the device. */
  #outage: Promise<void> | undefined = undefined;
  /** Ends a pause between two attempts. */
  #endPause: (() => void) | undefined = undefined;
  /** A look found the device gone, and the event loop has had no turn since. */
  #isUnheard = false;

  /**
   * Connect to a back-end and ask what it has: up to four round trips.
   *
   * @throws VirtioError ERR_VIRTIO_CONNECT or ERR_VIRTIO_PERMISSION when there is no way to the socket,
   *   ERR_VIRTIO_TIMEOUT when the back-end does not answer in time, ERR_VIRTIO_DISCONNECTED when it hangs up,
   *   ERR_VIRTIO_PROTOCOL when it answers wrongly, ERR_VIRTIO_REJECTED when it refuses a message;
   *   `signal.reason` when aborted; TypeError or RangeError for a wrong argument.
   */
  static async connect(target: VhostUserTarget, options: VhostUserOptions = {}): Promise<VhostUser> {
    const where = checkTarget(target);
    const { afterClose, reconnect, ...wait } = options;
    const policy = reconnectPolicy(reconnect ?? "path" in where);
    if (policy !== undefined && !("path" in where))
      throw rangeError("reconnect", "a path to connect to", "a descriptor");
    const { timeout, signal } = checkWait(wait, DEFAULT_TIMEOUT);
    signal?.throwIfAborted();
    const peer = `the back-end at ${"path" in where ? where.path : `descriptor ${where.fd}`}`;
    const channel = new RequestChannel("path" in where ? connectUnix(where.path) : where.fd, peer);
    try {
      const link = { channel };
      const waits = new Waits(timeout, () => link.channel.waitingFor);
      const introduction = await waits.during(
        () => introduce(channel, peer, wantedProtocolFeatures(policy !== undefined)),
        wait,
      );
      if (channel.ended !== undefined) {
        introduction.backChannel?.close();
        throw channel.ended;
      }
      return new VhostUser(where, { peer, timeout, link, waits, introduction, policy, afterClose });
    } catch (error) {
      channel.close(new VirtioError("ERR_VIRTIO_CLOSED", "the connection was given up", { cause: error }));
      throw error;
    }
  }

  private constructor(where: { path: string } | { fd: number }, parts: Parts) {
    const { peer, link, introduction, policy } = parts;
    this.#afterClose = parts.afterClose;
    this.address = "path" in where ? `vhost-user:${where.path}` : `vhost-user:descriptor ${where.fd}`;
    this.offeredFeatures = introduction.offeredFeatures;
    this.protocolFeatures = introduction.protocolFeatures;
    this.maxQueues = introduction.maxQueues;
    this.maxRegions = introduction.maxRegions;
    this.hasConfig = this.#has(VhostUserProtocolFeature.CONFIG);
    this.#peer = peer;
    this.#timeout = parts.timeout;
    this.#path = "path" in where ? where.path : undefined;
    this.#policy = policy;
    this.#backoff = policy === undefined ? undefined : new Backoff(policy);
    this.#link = link;
    this.#waits = parts.waits;
    this.#introduction = introduction;
    this.#lifetime = new Lifetime(peer);
    this.#memory = new TransportMemory(
      regionMapper(() => this.#link.channel, this.#hasMemorySlots),
      { maxRegions: this.maxRegions, peer },
    );
    this.#queues = new VhostUserQueues(link.channel, {
      switched: introduction.hasProtocolFeatures,
      tracked: this.#has(VhostUserProtocolFeature.INFLIGHT_SHMFD),
      onError: (index) => this.#queueBroke(index),
      onJam: () => this.#end(jammedBy(peer)),
      look: () => this.#look(),
    });
    this.#listen();
  }

  /** Whether it can connect again. */
  get reconnects(): boolean {
    return this.#policy !== undefined;
  }

  /** Features in force; 0 before `negotiate`. */
  get features(): bigint {
    return this.#features;
  }

  /** Called once when the device is gone; at once when it already is. */
  get onLost(): ((error: Error) => void) | undefined {
    return this.#lifetime.onLost;
  }

  set onLost(callback: ((error: Error) => void) | undefined) {
    this.#lifetime.onLost = callback;
  }

  /**
   * Accept those of the `wanted` features that are offered and that vhost-user can carry; VERSION_1 always.
   * Once per connection, also when it fails.
   *
   * @throws VirtioError ERR_VIRTIO_FEATURES when VERSION_1 is not offered, ERR_VIRTIO_REJECTED when the
   *   back-end refuses the set, ERR_VIRTIO_STATUS the second time.
   */
  async negotiate(wanted: bigint, options?: WaitOptions): Promise<bigint> {
    if (typeof wanted !== "bigint") throw typeError("wanted", "a bigint", wanted);
    if (wanted < 0n || wanted > U64_MAX) throw rangeError("wanted", "64 feature bits at most", wanted);
    this.#lifetime.check();
    if (this.#negotiation !== "open") throw this.#wrongOrder("features can be negotiated once; connect again");
    // Not ACCESS_PLATFORM: it would turn every address into one that the back-end looks up by IOTLB messages. Not
    // NOTIFICATION_DATA, RING_RESET: an eventfd carries no data, and the protocol resets no single queue.
    const features = chooseFeatures(this.offeredFeatures, wanted, { carried: COMMON_FEATURES, peer: this.#peer });
    await this.#waits.during(async () => {
      this.#negotiation = "begun";
      await this.#link.channel.confirm([agreement(features, this.#introduction)]);
      this.#negotiation = "done";
      this.#features = features;
    }, options);
    return features;
  }

  /**
   * Read 1 to 256 bytes of the config space by one message, which is what makes them consistent.
   *
   * @throws VirtioError ERR_VIRTIO_CONFIG when there is no config space, or it ends before `offset + length`.
   */
  async readConfig(offset: number, length: number, options?: WaitOptions): Promise<Uint8Array> {
    checkConfigRange(offset, length);
    this.#checkConfig();
    return this.#waits.during(
      () => this.#connected(() => readConfig(this.#link.channel, this.#peer, offset, length)),
      options,
    );
  }

  /**
   * Write 1 to 256 bytes of the config space.
   *
   * @throws VirtioError ERR_VIRTIO_CONFIG when there is no config space, ERR_VIRTIO_REJECTED when the
   *   back-end refuses (known only with REPLY_ACK), ERR_VIRTIO_STATUS before `negotiate`.
   */
  async writeConfig(offset: number, bytes: Uint8Array, options?: WaitOptions): Promise<void> {
    if (!(bytes instanceof Uint8Array)) throw typeError("bytes", "a Uint8Array", bytes);
    checkConfigRange(offset, bytes.length);
    this.#checkConfig();
    this.#checkNegotiated();
    const message = configWrite(offset, bytes);
    await this.#waits.during(() => this.#connected(() => this.#link.channel.confirm([message])), options);
  }

  /**
   * Make memory that the back-end can reach: a sealed memfd at an address of our choice. When a back-end has
   * no CONFIGURE_MEM_SLOTS, a new region makes it map all of them again, under the hands of requests in
   * flight; so map everything before `startQueues` there.
   *
   * @throws VirtioError ERR_VIRTIO_MEMORY when no region is left, or the queues run and all regions would be
   *   mapped again; ERR_VIRTIO_REJECTED when the back-end refuses.
   */
  async mapMemory(size: number, options?: WaitOptions): Promise<MemoryRegion> {
    checkInteger("size", size, 1);
    return this.#change(
      () => {
        this.#checkMemoryChange();
        return this.#memory.map(size);
      },
      options,
      (region) => this.#memory.unmap(region),
    );
  }

  /**
   * Withdraw memory from the back-end, then free it.
   *
   * @throws RangeError when it is not memory of this transport; VirtioError as for `mapMemory`.
   */
  async unmapMemory(region: MemoryRegion, options?: WaitOptions): Promise<void> {
    await this.#change(() => {
      this.#checkMemoryChange();
      return this.#memory.unmap(region);
    }, options);
  }

  /**
   * Configure and start all queues, each with its size, from the beginning of its rings; every queue gets
   * one kick when all are enabled. The memory of the rings must be as a new queue's.
   *
   * @throws VirtioError ERR_VIRTIO_QUEUES for a queue that the device does not have, ERR_VIRTIO_REJECTED when
   *   the back-end refuses a message (nothing runs then), ERR_VIRTIO_STATUS before `negotiate` or when
   *   queues run; RangeError for a wrong size or address.
   */
  async startQueues(queues: readonly QueueSetup[], options?: WaitOptions): Promise<QueueNotifier[]> {
    return this.#change<QueueNotifier[]>(
      () => {
        this.#checkNegotiated();
        if (this.#queues.running) throw this.#wrongOrder("the queues run already; stop them first");
        const packed = (this.#features & VirtioFeature.RING_PACKED) !== 0n;
        checkQueues(queues, { maxQueues: this.maxQueues, packed, memory: this.#memory });
        return this.#queues.start(queues, packed);
      },
      options,
      () => this.#queues.stop(),
    );
  }

  /**
   * Stop all queues and wait until the back-end has let go of their memory. Their notifiers are closed: end
   * every watch of a `completion` first. They may be started again, with fresh rings.
   */
  async stopQueues(options?: WaitOptions): Promise<void> {
    await this.#change(() => this.#queues.stop(), options);
  }

  close(): Promise<void> {
    return this.#lifetime.close(() => this.#shutDown());
  }

  /** The same as `close`. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  async #shutDown(): Promise<void> {
    const closed = this.#lifetime.closedError();
    this.#waits.endAll(closed);
    this.#endPause?.();
    if (this.#lifetime.ended === undefined && this.#broken === undefined) {
      const retreat = async () => {
        await this.#queues.stop();
        // As far as the protocol has words for it.
        if (this.#hasMemorySlots) await this.#link.channel.confirm(this.#memory.regions.map(removal));
      };
      // A peer that does not answer, or not rightly, has had its chance: closing the connection withdraws all.
      await this.#waits.during(() => this.#changes.run(retreat), { timeout: this.#timeout }).catch(() => undefined);
    }
    this.#end(closed);
    this.#queues.close();
    this.#memory.close();
    await this.#afterClose?.();
  }

  /**
   * Run a change of memory or queues after those before it. When the wait for it is over before it ends,
   * `undo` it before the next one begins.
   */
  async #change<T>(job: () => Promise<T>, options?: WaitOptions, undo?: (value: T) => Promise<void>): Promise<T> {
    this.#lifetime.check();
    const wait = this.#waits.begin<T>(options);
    void this.#changes.run(async () => {
      if (wait.over) return;
      try {
        const value = await this.#connected(job);
        // If undoing fails, the connection is broken, which onLost tells, or a region stays until close.
        if (!wait.resolve(value)) await undo?.(value);
      } catch (error) {
        wait.reject(error);
      }
    });
    return wait.promise;
  }

  #has(feature: bigint): boolean {
    return (this.protocolFeatures & feature) !== 0n;
  }

  get #hasMemorySlots(): boolean {
    return this.#has(VhostUserProtocolFeature.CONFIGURE_MEM_SLOTS);
  }

  /** Hear what becomes of the present connection. */
  #listen(): void {
    const { backChannel } = this.#introduction;
    this.#link.channel.onBroken = (error) => this.#breaks(error);
    if (backChannel === undefined) return;
    backChannel.onBroken = (error) => this.#end(error);
    backChannel.onConfigChange = () => this.onConfigChange?.();
  }

  /** The connection broke. A peer that hung up may come back; one that broke the rules is not asked again. */
  #breaks(error: VirtioError): void {
    const { recovery } = this;
    const mayReturn = this.#backoff !== undefined && error.code === "ERR_VIRTIO_DISCONNECTED" && this.#queues.running;
    if (!mayReturn || this.#lifetime.isOver || recovery?.disconnected(error) !== true) {
      this.#end(error);
      return;
    }
    this.#broken = error;
    this.#introduction.backChannel?.close();
    this.#backoff.lost(recovery.completed);
    this.#outage = this.#reconnect(this.#backoff, recovery, error);
    void this.#hush(this.#outage);
  }

  /** Try until there is another connection, or it is time to give up. */
  async #reconnect(backoff: Backoff, recovery: Recovery, lost: VirtioError): Promise<void> {
    let latest: unknown = lost;
    for (let delay = backoff.next(); delay !== undefined; delay = backoff.next()) {
      recovery.reconnecting(backoff.attempts, delay);
      await this.#pause(delay);
      this.#lifetime.check();
      try {
        await this.#tryAgain(recovery);
      } catch (error) {
        this.#lifetime.check();
        latest = error;
        if (isPassing(error)) continue;
        break;
      }
      backoff.returned();
      this.#broken = undefined;
      this.#outage = undefined;
      try {
        recovery.reconnected(backoff.attempts);
      } catch (cause) {
        // Connected again, and the queues cannot be watched here: nobody would hear of what is in flight.
        this.#end(cause instanceof VirtioError ? cause : gaveUp(this.#peer, backoff.attempts, cause));
        throw cause;
      }
      // Whatever happened to the new connection before somebody listened.
      if (this.#link.channel.ended !== undefined) this.#breaks(this.#link.channel.ended);
      return;
    }
    const error = gaveUp(this.#peer, backoff.attempts, latest);
    this.#end(error);
    throw error;
  }

  async #tryAgain(recovery: Recovery): Promise<void> {
    const channel = new RequestChannel(connectUnix(this.#path ?? ""), this.#peer);
    try {
      const introduction = await this.#waits.during(() => this.#takeUp(channel, recovery), { timeout: this.#timeout });
      this.#link.channel = channel;
      this.#introduction = introduction;
      this.#listen();
    } catch (error) {
      channel.close(new VirtioError("ERR_VIRTIO_DISCONNECTED", "the attempt to reconnect failed", { cause: error }));
      throw error;
    }
  }

  /** Bring another back-end to where the one before was. */
  async #takeUp(channel: RequestChannel, recovery: Recovery): Promise<Introduction> {
    const introduction = await introduce(channel, this.#peer, this.protocolFeatures);
    try {
      checkSame(this.#peer, introduction, {
        offeredFeatures: this.#features,
        hasProtocolFeatures: this.#introduction.hasProtocolFeatures,
        protocolFeatures: this.protocolFeatures,
        maxQueues: this.#queues.count,
        maxRegions: this.#memory.regions.length,
      });
      await channel.confirm([agreement(this.#features, introduction)]);
      await mapAgain(channel, this.#hasMemorySlots, this.#memory.regions);
      const bases = await recovery.restart({
        address: this.address,
        hasConfig: this.hasConfig,
        tracked: this.#queues.isTracked,
        readConfig: (offset, length) => readConfig(channel, this.#peer, offset, length),
        writeConfig: (offset, bytes) => channel.confirm([configWrite(offset, bytes)]),
      });
      await this.#queues.startAgain(channel, bases);
      return introduction;
    } catch (error) {
      introduction.backChannel?.close();
      throw error;
    }
  }

  /** Whoever waits for the outage's end hears how it ended, and so does everybody by `onLost`. */
  async #hush(outage: Promise<void>): Promise<void> {
    await outage.catch(() => undefined);
  }

  /** Nothing that waits here keeps the process alive: requests in flight do. */
  async #pause(delay: number): Promise<void> {
    await new Promise<void>((resolve) => {
      const timer = setTimeout(resolve, delay).unref();
      this.#endPause = () => {
        clearTimeout(timer);
        resolve();
      };
    });
    this.#endPause = undefined;
  }

  /** Do what needs a connection, also after an outage, and again when one began meanwhile. */
  async #connected<T>(job: () => Promise<T>): Promise<T> {
    for (;;) {
      await this.#outage;
      try {
        return await job();
      } catch (error) {
        if (this.#outage === undefined || !isPassing(error)) throw error;
      }
    }
  }

  /** See `QueueNotifier.look`. */
  #look(): VirtioError | undefined {
    if (this.#gone === undefined) {
      this.#link.channel.look();
      if (this.#gone === undefined) return undefined;
    } else if (!this.#isUnheard) {
      // Whether there will be turns from now on only the next look can tell.
      this.#awaitTurn();
      return undefined;
    }
    this.#awaitTurn();
    return this.#gone;
  }

  #awaitTurn(): void {
    if (this.#isUnheard) return;
    this.#isUnheard = true;
    setImmediate(() => {
      this.#isUnheard = false;
    }).unref();
  }

  get #gone(): VirtioError | undefined {
    return this.#broken ?? this.#lifetime.ended;
  }

  #queueBroke(index: number): void {
    this.#end(
      new VirtioError(
        "ERR_VIRTIO_QUEUE_BROKEN",
        `${this.#peer} signalled an error on queue ${index} and serves it no more; see its log, then connect again`,
      ),
    );
  }

  #end(error: VirtioError): void {
    if (!this.#lifetime.end(error)) return;
    this.#link.channel.close(error);
    this.#introduction.backChannel?.close();
    this.#waits.endAll(error);
  }

  #checkNegotiated(): void {
    if (this.#negotiation !== "done") throw this.#wrongOrder("features are not negotiated; call negotiate first");
  }

  #checkConfig(): void {
    this.#lifetime.check();
    if (this.hasConfig) return;
    throw new VirtioError(
      "ERR_VIRTIO_CONFIG",
      `${this.#peer} does not offer the protocol feature CONFIG, so its config space cannot be reached; ` +
        "say the values yourself, or use a back-end that has it",
    );
  }

  #checkMemoryChange(): void {
    if (!this.#queues.running || this.#hasMemorySlots) return;
    throw new VirtioError(
      "ERR_VIRTIO_MEMORY",
      `${this.#peer} does not offer CONFIGURE_MEM_SLOTS and would map all memory again while queues use it; ` +
        "map everything before the queues start",
    );
  }

  #wrongOrder(message: string): VirtioError {
    return new VirtioError("ERR_VIRTIO_STATUS", message);
  }
}

/** What a connection is made of. */
interface Parts {
  readonly peer: string;
  readonly timeout: number;
  readonly link: { channel: RequestChannel };
  readonly waits: Waits;
  readonly introduction: Introduction;
  readonly policy: ReconnectPolicy | undefined;
  readonly afterClose: (() => Promise<void>) | undefined;
}

function checkTarget(target: VhostUserTarget): { path: string } | { fd: number } {
  if (typeof target === "string") return { path: target };
  if (typeof target !== "object" || target === null) throw typeError("target", "a path or { path } or { fd }", target);
  checkOptions("target", target, ["path" in target ? "path" : "fd"]);
  if (!("path" in target)) return { fd: checkInteger("fd", target.fd, 0) };
  if (typeof target.path !== "string") throw typeError("path", "a string", target.path);
  return { path: target.path };
}
