/** What every transport offers to the device drivers above it: features, config space, memory, queues. */

import type { VirtioError } from "../errors.js";
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
  /**
   * For a driver that polls and never gives the event loop a turn to hear that the device is gone: see whether it is
   * still there, which costs a system call.
   *
   * @returns why it is not, when the event loop has had no turn since; undefined otherwise.
   */
  look?(): VirtioError | undefined;
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

/** How often and for how long to try to reach a device again that is gone. */
export interface ReconnectOptions {
  /** Milliseconds before the first attempt, on average three quarters of it; doubles from attempt to attempt. Default 10. */
  readonly minDelay?: number;
  /** Milliseconds between two attempts at most. Default 1000. */
  readonly maxDelay?: number;
  /** Milliseconds after which to give up; Infinity never does. Default 30000. */
  readonly timeout?: number;
}

/** A device that is back, before its queues go on. */
export interface ReturnedDevice extends Pick<VirtioTransport, "address" | "hasConfig" | "readConfig" | "writeConfig"> {
  /** Whether it knows what the one before had in flight. */
  readonly tracked: boolean;
}

/** What a driver does when its device is gone and comes back. Of the methods none but `restart` may throw. */
export interface Recovery {
  /** Requests that have completed since the beginning: a device that dies over and over makes no progress. */
  readonly completed: number;
  /**
   * The device is gone.
   *
   * @returns whether the driver can go on with another one in its place.
   */
  disconnected(error: VirtioError): boolean;
  /** The attempt with this number, from 1, begins after `delay` milliseconds. */
  reconnecting(attempt: number, delay: number): void;
  /**
   * Another device has taken its place: features are as they were, all memory is known to it, no queue runs. Called
   * again for the next one when this one is gone before its queues run.
   *
   * @returns for each queue, in the order of `startQueues`, where it goes on: the value of SET_VRING_BASE, or undefined
   *   for the beginning.
   * @throws VirtioError when the driver cannot use it.
   */
  restart(device: ReturnedDevice): Promise<readonly (number | undefined)[]>;
  /** The queues run again. */
  reconnected(attempts: number): void;
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

  /** Whether it can reach the device again when that is gone, if `recovery` is set. Default false. */
  readonly reconnects?: boolean;

  /**
   * Takes part in reaching the device again after the connection to it broke while queues ran. Without it, the first
   * loss is the end.
   */
  recovery?: Recovery | undefined;

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
