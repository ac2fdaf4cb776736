/** What can be asked for when a block device is opened, and what its calls accept. */

import type { WaitOptions } from "../../transports/transport.js";
import type { CompletionMode } from "../completion.js";

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
  /** Size in bytes of a disk whose back-end has no config space to read it from. */
  readonly capacity?: number;
}

/** Names of all options, so that a misspelled one is refused. */
export const OPEN_BLOCK_OPTIONS = [
  ...["queues", "queueSize", "mode", "packed", "indirect", "eventIdx", "inOrder"],
  ...["readOnly", "capacity", "timeout", "signal"],
] as const satisfies readonly string[];

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
