/** The one error class of the project, its stable codes, and the checks of arguments at the public edge. */

/**
 * What went wrong, as a stable string. Match on `error.code`, never on the message.
 * `docs/errors.md` has a paragraph for each.
 */
export type VirtioErrorCode =
  | "ERR_VIRTIO_ADDRESS"
  | "ERR_VIRTIO_BACKEND"
  | "ERR_VIRTIO_BUSY"
  | "ERR_VIRTIO_CLOSED"
  | "ERR_VIRTIO_CONFIG"
  | "ERR_VIRTIO_CONNECT"
  | "ERR_VIRTIO_DISCONNECTED"
  | "ERR_VIRTIO_FEATURES"
  | "ERR_VIRTIO_IO"
  | "ERR_VIRTIO_MEMORY"
  | "ERR_VIRTIO_NATIVE_UNAVAILABLE"
  | "ERR_VIRTIO_PERMISSION"
  | "ERR_VIRTIO_PROTOCOL"
  | "ERR_VIRTIO_QUEUE_BROKEN"
  | "ERR_VIRTIO_QUEUES"
  | "ERR_VIRTIO_READ_ONLY"
  | "ERR_VIRTIO_REJECTED"
  | "ERR_VIRTIO_STATUS"
  | "ERR_VIRTIO_SYSCALL"
  | "ERR_VIRTIO_TIMEOUT"
  | "ERR_VIRTIO_UNSUPPORTED";

/** The details that a {@link VirtioError} may carry beside its code and message. */
export interface VirtioErrorDetails {
  /** The positive `errno` value, when the kernel said it. */
  readonly errno?: number;
  /** The system call that failed, when one did. */
  readonly syscall?: string;
  /** The error that led to this one. */
  readonly cause?: unknown;
}

/**
 * Every failure that is not a wrong argument. The message says what was refused, the value, and what to
 * try next. Wrong arguments are a `TypeError` or `RangeError` with the code `ERR_VIRTIO_ARGUMENT`.
 *
 * @example
 * ```ts
 * import { VirtioError } from "virtio-driver";
 * const error = new VirtioError("ERR_VIRTIO_CLOSED", "the device is closed; open it again");
 * console.log(error.code); // "ERR_VIRTIO_CLOSED"
 * ```
 */
export class VirtioError extends Error {
  /** The stable code. */
  readonly code: VirtioErrorCode;
  /** The positive `errno` value, when the kernel said it. */
  readonly errno: number | undefined;
  /** The system call that failed, when one did. */
  readonly syscall: string | undefined;

  constructor(code: VirtioErrorCode, message: string, details: VirtioErrorDetails = {}) {
    super(message, "cause" in details ? { cause: details.cause } : undefined);
    this.name = "VirtioError";
    this.code = code;
    this.errno = details.errno;
    this.syscall = details.syscall;
  }
}

/** Code carried by the `TypeError` and `RangeError` that refuse a wrong argument. */
export const ERR_VIRTIO_ARGUMENT = "ERR_VIRTIO_ARGUMENT";

/** Make the `RangeError` for an argument whose value is refused: `"name" expected X, got Y`. */
export function rangeError(name: string, expected: string, got: unknown): RangeError {
  return withArgumentCode(new RangeError(`"${name}" expected ${expected}, got ${show(got)}`));
}

/** Make the `TypeError` for an argument of the wrong kind: `"name" expected X, got Y`. */
export function typeError(name: string, expected: string, got: unknown): TypeError {
  return withArgumentCode(new TypeError(`"${name}" expected ${expected}, got ${show(got)}`));
}

/**
 * Return `value` when it is a whole number from `min` to `max`.
 *
 * @throws TypeError when it is not a number, RangeError when it is outside.
 */
export function checkInteger(name: string, value: unknown, min: number, max = Number.MAX_SAFE_INTEGER): number {
  if (typeof value !== "number") throw typeError(name, "a number", value);
  if (!Number.isSafeInteger(value) || value < min || value > max) {
    throw rangeError(name, `a whole number from ${min} to ${max}`, value);
  }
  return value;
}

/**
 * Refuse an option that nobody reads, and name the one that was probably meant.
 *
 * @throws TypeError when `options` has a key that is not in `known`.
 */
export function checkOptions(where: string, options: object, known: readonly string[]): void {
  for (const key of Object.keys(options)) {
    if (known.includes(key)) continue;
    const near = known.find((name) => name.toLowerCase() === key.toLowerCase());
    throw typeError(where, near === undefined ? `options among ${known.join(", ")}` : `option "${near}"`, key);
  }
}

function withArgumentCode<E extends Error>(error: E): E {
  return Object.assign(error, { code: ERR_VIRTIO_ARGUMENT });
}

function show(value: unknown): string {
  switch (typeof value) {
    case "string":
      return JSON.stringify(value);
    case "bigint":
      return `${value}n`;
    case "number":
    case "boolean":
    case "undefined":
      return String(value);
    default:
      return value === null ? "null" : Object.prototype.toString.call(value).slice(8, -1);
  }
}
