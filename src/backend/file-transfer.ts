/** Reads of a file, or writes: at once where nothing has to be waited for, otherwise on a thread. */

import { constants } from "node:os";
import { VirtioError } from "../errors.js";
import {
  MAX_PARTS,
  RWF_NOWAIT,
  readParts,
  readPartsLater,
  systemError,
  writeParts,
  writePartsLater,
} from "../sys/index.js";
import type { MemoryParts } from "./memory-parts.js";

const { EAGAIN, EOPNOTSUPP, ENOSYS } = constants.errno;

/** What goes on in {@link FileTransfer}: the calls of the kernel for one direction. Tests bring their own. */
export interface TransferCalls {
  /** Names it in errors. */
  readonly name: string;
  /** See `readParts` of `src/sys`. */
  readonly atOnce: typeof readParts;
  /** See `readPartsLater` of `src/sys`. */
  readonly later: typeof readPartsLater;
}

/** Reading. */
export const READ: TransferCalls = { name: "read", atOnce: readParts, later: readPartsLater };
/** Writing. */
export const WRITE: TransferCalls = { name: "write", atOnce: writeParts, later: writePartsLater };

/** Bytes of the largest request that is done at once: copying more would hold others up longer than a thread costs. */
const MAX_AT_ONCE = 2 ** 20;
/** In the place of flags: nothing is tried at once. */
const NEVER = -1;

/**
 * One direction of a file. What the page cache holds is transferred within the call, straight to or from the driver's
 * memory. Only where the kernel would have to wait for the disk a thread takes over, from where the call stopped; so
 * a slow disk holds up nothing but the requests that need it.
 */
export class FileTransfer {
  private readonly calls: TransferCalls;
  private readonly file: string;
  private flags: number;

  /**
   * @param file names the file in errors.
   * @param inMemory whether its file system lives in memory: then there is nothing to wait for, and no flag for it.
   */
  constructor(calls: TransferCalls, file: string, inMemory: boolean) {
    this.calls = calls;
    this.file = file;
    this.flags = inMemory ? 0 : RWF_NOWAIT;
  }

  /**
   * Transfer all of `parts`, from byte `position` of the file on.
   *
   * @returns undefined when it is done, otherwise a promise; `parts` may be used for something else then.
   * @throws VirtioError ERR_VIRTIO_SYSCALL when the kernel refuses, or the file ends before.
   */
  run(fd: number, position: number, parts: MemoryParts): void | Promise<void> {
    const done = this.flags === NEVER || parts.bytes > MAX_AT_ONCE ? 0 : this.atOnce(fd, position, parts);
    return done === parts.bytes ? undefined : this.later(fd, position + done, parts.rest(done));
  }

  /** Bytes that were transferred without waiting. */
  private atOnce(fd: number, position: number, parts: MemoryParts): number {
    let done = 0;
    for (let i = 0; i < parts.count; ) {
      const end = endOfRun(parts, i);
      const places = i === 0 ? parts.places : parts.places.subarray(2 * i);
      let expected = done;
      for (let part = i; part < end; part++) expected += parts.places[2 * part + 1];
      const result = this.calls.atOnce(fd, parts.memory[i], places, end - i, position + done, this.flags);
      if (result < 0) {
        // The file system has no such way: it never will.
        if (result === -EOPNOTSUPP || result === -ENOSYS) this.flags = NEVER;
        else if (result !== -EAGAIN) throw this.refused(result, position + done);
        return done;
      }
      done += result;
      if (done < expected) return done;
      i = end;
    }
    return done;
  }

  private async later(fd: number, position: number, parts: MemoryParts): Promise<void> {
    let left = parts;
    let at = position;
    while (left.count > 0) {
      const result = await this.calls.later(fd, left.memory[0], left.places, endOfRun(left, 0), at);
      if (result < 0) throw this.refused(result, at);
      if (result === 0) throw this.ended(at);
      at += result;
      left = left.rest(result);
    }
  }

  private refused(result: number, position: number): Error {
    return systemError(result, this.calls.name, `a ${this.calls.name} at ${position} of ${this.file}`);
  }

  private ended(position: number): Error {
    return new VirtioError("ERR_VIRTIO_BACKEND", `${this.file} ends at ${position}, before its capacity does`);
  }
}

/** The end of the parts from `first` on that lie in the same memory and fit into one call. */
function endOfRun(parts: MemoryParts, first: number): number {
  const limit = Math.min(parts.count, first + MAX_PARTS);
  let end = first + 1;
  while (end < limit && parts.memory[end] === parts.memory[first]) end++;
  return end;
}
