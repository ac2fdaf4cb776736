/** What the kernel offers and Node.js does not: shared memory, event descriptors, descriptors over sockets. */

export { closeFd, duplicateFd, ioctl } from "./descriptor.js";
export { errno, errnoName, fileError, systemError } from "./errno.js";
export { EventFd } from "./eventfd.js";
export { jammedBy, JamGuard } from "./jam.js";
export {
  fallocate,
  fallocateLater,
  MAX_PARTS,
  RWF_NOWAIT,
  readParts,
  readPartsLater,
  writeParts,
  writePartsLater,
} from "./file.js";
export { entries, readBytes, readLink, readText } from "./kernel-files.js";
export { addressOf, faultCounter, isLost, type MapOptions, mapShared, unmapShared } from "./mapping.js";
export {
  createMemfd,
  fileSize,
  growMemfd,
  HUGE_PAGE_BYTES,
  type HugePageSize,
  MemfdSeal,
  memfdSeals,
} from "./memfd.js";
export { registerRead, registerWrite, type RegisterWidth } from "./registers.js";
export {
  acceptUnix,
  connectUnix,
  listenUnix,
  MAX_MESSAGE_FDS,
  receiveMessage,
  sendMessage,
  socketPair,
} from "./socket.js";
export { FdWatcher } from "./watcher.js";
