/** The virtio-blk driver. */

export { BlockDevice } from "./device.js";
export type { BlockEvents, ReconnectAttempt, ReconnectOutcome } from "./events.js";
export type { BlockInfo, CacheMode } from "./info.js";
export type { BlkLimits } from "./limits.js";
export type { Memory } from "./operation.js";
export type {
  AdoptOptions,
  BlockRange,
  CallOptions,
  CloseOptions,
  HandOverOptions,
  OpenBlockOptions,
} from "./options.js";
export type { TransferOptions, VectorOptions, WriteZeroesOptions } from "./options.js";
export type { CompletionMode } from "../completion.js";
export { type DataSegment, VirtioBlkQueue, type VirtioBlkQueueOptions } from "./queue.js";
export type { ReadResult, WriteResult } from "./scheduler.js";
export type { BlockStats, QueueStats } from "./stats.js";
export type { ErrorCounts } from "./tally.js";
