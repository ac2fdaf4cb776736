/** How requests of VFIO are made and refused, and how what was acquired on the way is given back. */

import type { VirtioErrorCode } from "../../errors.js";
import { VirtioError } from "../../errors.js";
import { decodeVfioArgsz, encodeVfioQuery, VfioRequest } from "../../protocol/vfio.js";
import { errnoName, ioctl, systemError } from "../../sys/index.js";

/** Bytes that an answer of the kernel may have; the longest real ones have some hundred. */
const MAX_ANSWER_SIZE = 65_536;

/** What a refusal by one errno means here. */
export interface Refusal {
  /** Default: that of the errno. */
  readonly code?: VirtioErrorCode;
  /** What to try. */
  readonly advice: string;
}

/**
 * Make a request.
 *
 * @param what what is attempted, with its values.
 * @param refusals what to say by name of the errno, where the general advice does not help.
 * @throws VirtioError with errno and syscall.
 */
export function vfioRequest(
  fd: number,
  request: keyof typeof VfioRequest,
  argument: number | Uint8Array,
  what: string,
  refusals: Readonly<Record<string, Refusal>> = {},
): number {
  try {
    return ioctl(fd, VfioRequest[request], argument);
  } catch (cause) {
    if (!(cause instanceof VirtioError) || cause.errno === undefined) throw cause;
    const refusal = refusals[errnoName(cause.errno)];
    const error = systemError(-cause.errno, "ioctl", `${what} (VFIO_${request})`, refusal?.advice);
    if (refusal?.code === undefined) throw error;
    throw new VirtioError(refusal.code, error.message, { errno: cause.errno, syscall: "ioctl" });
  }
}

/**
 * Ask for a struct, again with more room when its capabilities need it.
 *
 * @param size bytes of the struct without them.
 * @param index of what, where there are several.
 * @throws VirtioError with errno and syscall; ERR_VIRTIO_PROTOCOL when the answer has no reasonable size.
 */
export function vfioQuery(
  fd: number,
  request: keyof typeof VfioRequest,
  { size, index, what }: { size: number; index?: number; what: string },
): Uint8Array {
  let room = size;
  for (let attempt = 0; attempt < 2; attempt++) {
    const bytes = encodeVfioQuery(room, index);
    vfioRequest(fd, request, bytes, what);
    const wanted = decodeVfioArgsz(bytes);
    if (wanted <= room) return bytes;
    room = wanted;
    if (room > MAX_ANSWER_SIZE) break;
  }
  throw new VirtioError(
    "ERR_VIRTIO_PROTOCOL",
    `${what} (VFIO_${request}): the kernel wants to answer with ${room} bytes, at most ${MAX_ANSWER_SIZE} at the ` +
      "second attempt are taken",
  );
}

/** What has to be given back, in the order in which it was acquired. */
export class Holdings {
  readonly #steps: (() => void)[] = [];

  /** Something was acquired; `release` gives it back. */
  add(release: () => void): void {
    this.#steps.push(release);
  }

  /**
   * Give everything back, the newest first, whatever fails on the way.
   *
   * @throws the first failure, when everything else was given back.
   */
  release(): void {
    const failures: unknown[] = [];
    for (const step of this.#steps.splice(0).reverse()) {
      try {
        step();
      } catch (error) {
        failures.push(error);
      }
    }
    if (failures.length > 0) throw failures[0];
  }

  /** Give everything back because of `error`, and throw it; a failure on the way is a consequence of it at most. */
  abandon(error: unknown): never {
    try {
      this.release();
    } catch {
      // The first error tells more.
    }
    throw error;
  }
}
