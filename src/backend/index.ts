/** The device side: virtual disks that vhost-user front-ends connect to. The subpath `virtio-driver/backend`. */

export { FileStorage } from "./file-storage.js";
export { MemoryParts } from "./memory-parts.js";
export { serveUntilSignal } from "./serve.js";
export { type SpawnBackendOptions, type SpawnedBackend, spawnBackend } from "./spawn.js";
export { openStorage, type StorageSpec } from "./spec.js";
export type { SharedMemory } from "./session.js";
export type { AnswerCounts, BackendQueueStats, BackendStats, FailurePlace, RequestCounts } from "./stats.js";
export { type BlockStorage, RamStorage } from "./storage.js";
export { VhostUserBackend, type VhostUserBackendOptions } from "./vhost-user-backend.js";
