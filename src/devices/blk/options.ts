/** What can be asked for when a block device is opened, and what its calls accept. */

import { checkInteger, checkOptions, rangeError, typeError } from "../../errors.js";
import type { ReconnectOptions, WaitOptions } from "../../transports/transport.js";
import type { CompletionMode } from "../completion.js";

/** What a call without options is called with. */
export const NO_OPTIONS = {};

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
}

/** Names of all options, so that a misspelled one is refused. */
export const OPEN_BLOCK_OPTIONS = [
  ...["queues", "queueSize", "mode", "packed", "indirect", "eventIdx", "inOrder"],
  ...["readOnly", "reconnect", "capacity", "timeout", "signal"],
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
export interface TransferOptions {
  /** First byte on the disk, a multiple of the block size. Default 0. */
  readonly position?: number;
  /** First byte in the buffer. Default 0. */
  readonly offset?: number;
  /** Bytes, a multiple of the block size. Default: to the end of the buffer. */
  readonly length?: number;
  /** Gives the wait up: the call rejects with `signal.reason`, the request goes on. */
  readonly signal?: AbortSignal;
}

/** A stretch of the disk. */
export interface BlockRange {
  /** First byte on the disk, a multiple of the block size. */
  readonly position: number;
  /** Bytes, a multiple of the block size. */
  readonly length: number;
}

const TRANSFER_OPTIONS = ["position", "offset", "length", "signal"];

/** A misspelled `position` must not write to the start of the disk. Cheap: nothing is allocated. */
export function checkTransferOptions(options: TransferOptions): void {
  for (const key in options) {
    if (key === "position" || key === "offset" || key === "length" || key === "signal") continue;
    checkOptions("options", options, TRANSFER_OPTIONS);
  }
}

/** Refuse what is no signal. */
export function checkSignal(signal: unknown): void {
  if (signal !== undefined && !(signal instanceof AbortSignal)) throw typeError("signal", "an AbortSignal", signal);
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
  const { mode, queues = 1, queueSize, capacity } = options;
  checkMode(mode);
  checkInteger("queues", queues, 1, 65536);
  if (queueSize !== undefined) checkInteger("queueSize", queueSize, 3, 32768);
  if (capacity !== undefined) checkInteger("capacity", capacity, 0);
}

/** Refuse what is no way of learning of completions; undefined is the default. */
export function checkMode(mode: CompletionMode | undefined): void {
  if (mode === undefined || mode === "hybrid" || mode === "event" || mode === "poll") return;
  throw rangeError("mode", '"hybrid", "event" or "poll"', mode);
}
