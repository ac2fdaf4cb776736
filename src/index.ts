/** The public face of virtio-driver: open a device, drive it, or build on its parts. */

export { openBlock } from "./address.js";
export {
  type AdoptOptions,
  BlockDevice,
  type BlockEvents,
  type BlockInfo,
  type BlockRange,
  type BlkLimits,
  type CacheMode,
  type CompletionMode,
  type DataSegment,
  type HandOverOptions,
  type Memory,
  type OpenBlockOptions,
  type ReadResult,
  type ReconnectAttempt,
  type ReconnectOutcome,
  type TransferOptions,
  VirtioBlkQueue,
  type VirtioBlkQueueOptions,
  type WriteResult,
} from "./devices/blk/index.js";
export { ERR_VIRTIO_ARGUMENT, VirtioError, type VirtioErrorCode, type VirtioErrorDetails } from "./errors.js";
export { BufferPool, DeviceBuffer, IovaSpace, MemoryRegion } from "./memory/index.js";
export {
  Pci,
  type PciFunction,
  type PciOptions,
  type PciRegisters,
  type PciSharedMemory,
  type QueueNotifier,
  type QueueSetup,
  type ReconnectOptions,
  type Recovery,
  type ReturnedDevice,
  VhostUser,
  type VhostUserOptions,
  type VhostUserTarget,
  VhostVdpa,
  type VhostVdpaNode,
  type VhostVdpaOptions,
  type VhostVdpaTarget,
  type VirtioTransport,
  type WaitOptions,
} from "./transports/index.js";
export {
  type IndirectTables,
  type LayoutArea,
  type LayoutField,
  type RequestFrame,
  type SegmentSink,
  VirtioFeature,
  Virtqueue,
  VirtqueueLayout,
  type VirtqueueLayoutOptions,
  type VirtqueueOptions,
} from "./virtqueue/index.js";
