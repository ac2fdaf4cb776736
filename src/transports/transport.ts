/** What every transport offers to the device drivers above it: features, config space, memory, queues. */

import type { MemoryRegion } from "../memory/region.js";
import type { EventFd } from "../sys/index.js";

/** Where one virtqueue lies, in addresses of the device, and how it starts. */
export interface QueueSetup {
  /** Queue index on the device. */
  readonly index: number;
  /** Descriptors. */
  readonly size: number;
  /** IOVA of the descriptor area. */
  readonly descriptorArea: number;
  /** IOVA of the driver area. */
  readonly driverArea: number;
  /** IOVA of the device area. */
  readonly deviceArea: number;
}

/** A started queue, as its driver sees it. */
export interface QueueNotifier {
  /** Queue index on the device. */
  readonly index: number;
  /** The device signals this when it has used buffers; owned by the transport. */
  readonly completion: EventFd;
  /**
   * What `notify` signals, where that is all it does: another thread can notify by it, too. Owned by the transport.
   */
  readonly kick?: EventFd;
  /**
   * Send an available buffer notification. `data` is the 32-bit value of `VIRTIO_F_NOTIFICATION_DATA`
   * (virtio 1.3, 2.9); transports whose notifications carry nothing ignore it. Never called before
   * DRIVER_OK.
   */
  notify(data: number): void;
}

/** Bounds of one waiting operation. */
export interface WaitOptions {
  /** Milliseconds until the wait fails with `ERR_VIRTIO_TIMEOUT`. Default: the transport's. */
  readonly timeout?: number;
  /** Gives the wait up; it rejects with `signal.reason`. */
  readonly signal?: AbortSignal;
}

/** The bounds of a wait out of larger options, to be handed on to one that takes nothing else. */
export function waitOptions({ timeout, signal }: WaitOptions): WaitOptions {
  return { ...(timeout !== undefined && { timeout }), ...(signal !== undefined && { signal }) };
}

/**
 * A way to reach a virtio device. The order of use is that of virtio 1.3, 3.1.1: connect (reset,
 * ACKNOWLEDGE, DRIVER), `negotiate` (FEATURES_OK), `readConfig`, `mapMemory`, `startQueues` (DRIVER_OK),
 * `close` (stops the queues, then withdraws the memory).
 */
export interface VirtioTransport {
  /** The address the transport was opened by, for messages. */
  readonly address: string;
  /** Device type (virtio 1.3, clause 5), or undefined where the transport cannot tell. */
  readonly deviceType: number | undefined;
  /** Feature bits the device offers, transport-private bits removed. */
  readonly offeredFeatures: bigint;
  /** Feature bits in force; 0 before `negotiate`. */
  readonly features: bigint;
  /** How many queues the device has at most. */
  readonly maxQueues: number;
  /** Largest queue size the transport can set up. */
  readonly maxQueueSize: number;
  /** How many memory regions can be mapped at the same time. */
  readonly maxRegions: number;
  /** Whether `readConfig` works at all. */
  readonly hasConfig: boolean;

  /**
   * Accept those of the `wanted` features that are offered and that this transport can carry, and finish
   * the negotiation.
   *
   * @returns the accepted features.
   * @throws VirtioError ERR_VIRTIO_FEATURES when VERSION_1 is missing or the device refuses the set.
   */
  negotiate(wanted: bigint, options?: WaitOptions): Promise<bigint>;

  /**
   * Read `length` bytes of the device's config space from `offset`, consistently.
   *
   * @throws VirtioError ERR_VIRTIO_CONFIG when there is no config space or it is shorter.
   */
  readConfig(offset: number, length: number, options?: WaitOptions): Promise<Uint8Array>;

  /** Write bytes of the device's config space. Only after `negotiate`. */
  writeConfig(offset: number, bytes: Uint8Array, options?: WaitOptions): Promise<void>;

  /**
   * Make new memory that the device can reach: a sealed memfd of at least `size` bytes, mapped here and
   * at an IOVA for the device. It lives until `unmapMemory` or `close`.
   *
   * @throws VirtioError ERR_VIRTIO_MEMORY when no region is left.
   */
  mapMemory(size: number, options?: WaitOptions): Promise<MemoryRegion>;

  /** Withdraw memory from the device and free it. No descriptor in flight may point into it. */
  unmapMemory(region: MemoryRegion, options?: WaitOptions): Promise<void>;

  /**
   * Configure and start all queues at once, and tell the device that the driver is ready.
   *
   * @throws VirtioError ERR_VIRTIO_QUEUES when there are more queues than the device has.
   */
  startQueues(queues: readonly QueueSetup[], options?: WaitOptions): Promise<QueueNotifier[]>;

  /** Called once when the device is gone: the connection broke, the peer lied, or `close` ran. */
  onLost: ((error: Error) => void) | undefined;

  /** Called when the device says that its config space changed. */
  onConfigChange: (() => void) | undefined;

  /**
   * Stop the queues, withdraw the memory, release everything. Idempotent. Rejects only with what a back-end that
   * was started for this transport alone has to say of its end, after everything was released.
   */
  close(): Promise<void>;
}
