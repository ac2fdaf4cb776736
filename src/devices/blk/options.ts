/** What can be asked for when a block device is opened, and what its calls accept. */

import { checkInteger, checkOptions, rangeError, typeError } from "../../errors.js";
import type { ReconnectOptions, WaitOptions } from "../../transports/transport.js";
import type { CompletionMode } from "../completion.js";

/** What a call without options is called with. */
export const NO_OPTIONS = {};

/** Bounds of one call. */
export interface CallOptions {
  /**
   * Milliseconds until the call rejects with `ERR_VIRTIO_TIMEOUT`, 1 to 2^31 - 1. Default: it waits. Requests that were
   * sent go on, and their memory stays lent to the device until it returns it.
   */
  readonly timeout?: number;
  /** Gives the wait up: the call rejects with `signal.reason`, requests that were sent go on as after `timeout`. */
  readonly signal?: AbortSignal;
}

/** Options of `openBlock` and `BlockDevice.open`. */
export interface OpenBlockOptions extends WaitOptions {
  /** Request queues to use, 1 to what the device has. Default 1. */
  readonly queues?: number;
  /** Descriptors per queue. Default 256, or what the transport can set up. */
  readonly queueSize?: number;
  /** How completions are learnt of; `BlockDevice.mode` switches later. Default `"hybrid"`. */
  readonly mode?: CompletionMode;
  /** Accept packed virtqueues when offered. Default true. */
  readonly packed?: boolean;
  /** Accept indirect descriptors when offered. Default true. */
  readonly indirect?: boolean;
  /** Accept EVENT_IDX when offered. Default true. */
  readonly eventIdx?: boolean;
  /** Accept IN_ORDER when offered. Default true. */
  readonly inOrder?: boolean;
  /** Refuse all requests that change the disk, whatever the device says. Default false. */
  readonly readOnly?: boolean;
  /**
   * Whether to go on when the device is gone and comes back: calls wait meanwhile, and what was in flight is submitted
   * again. `openBlock` takes bounds for it, too. Default: where the transport can connect again, which is vhost-user
   * over a named socket. `false`: every call rejects with ERR_VIRTIO_DISCONNECTED when the device is gone.
   */
  readonly reconnect?: boolean | ReconnectOptions;
  /** Size in bytes of a disk whose back-end has no config space to read it from. */
  readonly capacity?: number;
  /**
   * Milliseconds between two looks at the config space, for a back-end that does not tell of its changes. Default: none.
   * Looks that fail are a process warning, code WARN_VIRTIO_CONFIG_POLL.
   */
  readonly configPoll?: number;
}

/** Names of all options, so that a misspelled one is refused. */
export const OPEN_BLOCK_OPTIONS = [
  ...["queues", "queueSize", "mode", "packed", "indirect", "eventIdx", "inOrder"],
  ...["readOnly", "reconnect", "capacity", "configPoll", "timeout", "signal"],
] as const satisfies readonly string[];

/** Options of `BlockDevice.handOver`. */
export interface HandOverOptions {
  /** Queues to give away, the last ones first. Default 1. */
  readonly queues?: number;
  /** Bytes that the other thread can lend by `allocate`: it cannot get more later. Default 16 MiB. */
  readonly memory?: number;
}

/** Options of `BlockDevice.adopt`. */
export interface AdoptOptions {
  /** How completions are learnt of in this thread. Default: as in the thread that opened the device. */
  readonly mode?: CompletionMode;
}

/** Options of `read` and `write`. */
export interface TransferOptions extends CallOptions {
  /** First byte on the disk, a multiple of the block size. Default 0. */
  readonly position?: number;
  /** First byte in the buffer. Default 0. */
  readonly offset?: number;
  /** Bytes, a multiple of the block size. Default: to the end of the buffer. */
  readonly length?: number;
}

/** Options of `readv` and `writev`. */
export type VectorOptions = Omit<TransferOptions, "offset" | "length">;

/** Options of `writeZeroes`. */
export interface WriteZeroesOptions extends CallOptions {
  /** The device may deallocate the ranges; they read as zeroes all the same. Default false. */
  readonly unmap?: boolean;
}

/** Options of `BlockDevice.close`. */
export interface CloseOptions {
  /** Milliseconds that what is pending has to end by itself, 0 to 2^31 - 1. Default 5000. */
  readonly timeout?: number;
}

/** A stretch of the disk. */
export interface BlockRange {
  /** First byte on the disk, a multiple of the block size. */
  readonly position: number;
  /** Bytes, a multiple of the block size. */
  readonly length: number;
}

const TRANSFER_OPTIONS = ["position", "offset", "length", "signal", "timeout"];
/** The longest delay that a timer of Node takes. */
const MAX_TIMEOUT = 0x7fff_ffff;

/** A misspelled `position` must not write to the start of the disk. Cheap: nothing is allocated. */
export function checkTransferOptions(options: TransferOptions): void {
  for (const key in options) {
    if (key === "position" || key === "offset" || key === "length" || key === "signal" || key === "timeout") continue;
    checkOptions("options", options, TRANSFER_OPTIONS);
  }
}

/** Refuse options of a call that nobody reads, and bounds that are none. */
export function checkCallOptions(options: CallOptions, ...more: readonly string[]): void {
  if (typeof options !== "object" || options === null) throw typeError("options", "an object", options);
  checkOptions("options", options, [...more, "signal", "timeout"]);
  checkBounds(options.timeout, options.signal);
}

/** Refuse what is no time limit or no signal. */
export function checkBounds(timeout: unknown, signal: unknown): void {
  if (timeout !== undefined) checkInteger("timeout", timeout, 1, MAX_TIMEOUT);
  if (signal !== undefined && !(signal instanceof AbortSignal)) throw typeError("signal", "an AbortSignal", signal);
}

/** The time limit of a `close`. */
export function closeTimeout(options: CloseOptions, fallback: number): number {
  if (typeof options !== "object" || options === null) throw typeError("options", "an object", options);
  checkOptions("options", options, ["timeout"]);
  return checkInteger("timeout", options.timeout ?? fallback, 0, MAX_TIMEOUT);
}

/** The ranges as a list, each checked for its form. */
export function rangeList(ranges: BlockRange | readonly BlockRange[]): readonly BlockRange[] {
  const list: readonly unknown[] = Array.isArray(ranges) ? ranges : [ranges];
  for (const range of list) {
    if (typeof range !== "object" || range === null)
      throw typeError("ranges", "{ position, length } or several", range);
    checkOptions("range", range, ["position", "length"]);
  }
  return list as readonly BlockRange[];
}

/** Refuse what cannot be asked for when a device is opened. */
export function checkOpenOptions(options: OpenBlockOptions): void {
  if (typeof options !== "object" || options === null) throw typeError("options", "an object", options);
  checkOptions("openBlock", options, OPEN_BLOCK_OPTIONS);
  const { mode, queues = 1, queueSize, capacity, configPoll } = options;
  checkMode(mode);
  checkInteger("queues", queues, 1, 65536);
  if (queueSize !== undefined) checkInteger("queueSize", queueSize, 3, 32768);
  if (capacity !== undefined) checkInteger("capacity", capacity, 0);
  if (configPoll !== undefined) checkInteger("configPoll", configPoll, 1, MAX_TIMEOUT);
}

/** Refuse what is no way of learning of completions; undefined is the default. */
export function checkMode(mode: CompletionMode | undefined): void {
  if (mode === undefined || mode === "hybrid" || mode === "event" || mode === "poll") return;
  throw rangeError("mode", '"hybrid", "event" or "poll"', mode);
}
