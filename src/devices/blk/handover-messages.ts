/** What the thread that opened a block device and one that drives queues of it say to each other, by a MessagePort. */

import { VirtioError, type VirtioErrorCode } from "../../errors.js";
import type { BlkConfig } from "../../protocol/blk.js";
import type { CompletionMode } from "../completion.js";
import type { BlkLimits } from "./limits.js";
import type { OpenBlockOptions } from "./options.js";

/** Marks a {@link Setup}; its form changes with the number. */
export const SETUP_KIND = "virtio-driver: queues of a block device, 1";

/** A queue that is handed over, idle. Descriptors stay the opener's, which keeps them open until the port closes. */
export interface HandedQueue {
  /** Queue index on the device. */
  readonly index: number;
  /** The device's address of its first byte. */
  readonly iova: number;
  /** `Virtqueue.position`. */
  readonly position: number;
  /** Eventfds: what the driver signals, and what the device signals. */
  readonly kick: number;
  readonly completion: number;
}

/** A stretch of memory by the device's address. */
export interface HandedMemory {
  readonly iova: number;
  readonly length: number;
}

/** The first message on the port, which waits there until somebody adopts what it describes. */
export interface Setup {
  readonly kind: typeof SETUP_KIND;
  readonly address: string;
  readonly features: bigint;
  readonly offeredFeatures: bigint;
  readonly maxQueues: number;
  readonly hasConfig: boolean;
  readonly config: BlkConfig;
  readonly mode: CompletionMode;
  readonly options: Pick<OpenBlockOptions, "readOnly" | "capacity" | "timeout">;
  readonly queueSize: number;
  readonly limits: BlkLimits;
  readonly queues: readonly HandedQueue[];
  /** Memory files with all that the stretches and queues lie in. */
  readonly regions: readonly { readonly fd: number; readonly size: number; readonly iova: number }[];
  /** Memory to be lent. */
  readonly lent: HandedMemory;
  /** Memory for callers whose own the device cannot reach. */
  readonly bounce: HandedMemory;
}

/** An error, as far as it survives the way to another thread. */
export interface PlainError {
  readonly code: VirtioErrorCode;
  readonly message: string;
  readonly errno: number | undefined;
  readonly syscall: string | undefined;
}

/** What the opener says. */
export type OpenerMessage =
  /** The config space as the opener has read it just now, and whether the device had changed it. */
  | { readonly type: "config"; readonly config: BlkConfig; readonly isChanged: boolean }
  /** The opener closes the device: end what is in flight within so many milliseconds, and give everything back. */
  | { readonly type: "closing"; readonly timeout: number }
  /** The device is no more. */
  | { readonly type: "lost"; readonly error: PlainError }
  /** Answers an `ask`: with bytes when it was a read, with an error when it failed. */
  | { readonly type: "answer"; readonly id: number; readonly bytes?: Uint8Array; readonly error?: PlainError }
  /** Answers `returned`. */
  | { readonly type: "taken" };

/** What the adopter wants of the control channel, which is the opener's. */
export type Question =
  | { readonly what: "readConfig"; readonly offset: number; readonly length: number }
  | { readonly what: "writeConfig"; readonly offset: number; readonly bytes: Uint8Array };

/** What the adopter says. */
export type AdopterMessage =
  /** From now on the queues may be in use. */
  | { readonly type: "adopted" }
  | { readonly type: "ask"; readonly id: number; readonly question: Question; readonly timeout: number | undefined }
  /** The device broke a rule here. */
  | { readonly type: "lost"; readonly error: PlainError }
  /** It touches nothing any more. Positions of the queues, in order; undefined for one that is not idle. */
  | { readonly type: "returned"; readonly positions: readonly (number | undefined)[] };

/** Make an error fit for a message. */
export function plainError(error: unknown): PlainError {
  if (!(error instanceof VirtioError)) {
    return { code: "ERR_VIRTIO_DISCONNECTED", message: String(error), errno: undefined, syscall: undefined };
  }
  const { code, message, errno, syscall } = error;
  return { code, message, errno, syscall };
}

/** Make an error of what came in a message. */
export function virtioError({ code, message, errno, syscall }: PlainError): VirtioError {
  return new VirtioError(code, message, {
    ...(errno !== undefined && { errno }),
    ...(syscall !== undefined && { syscall }),
  });
}
