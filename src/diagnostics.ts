/** What the library tells those who watch it: channels of node:diagnostics_channel, and lines of NODE_DEBUG=virtio. */

import { type Channel, channel } from "node:diagnostics_channel";
import { debuglog } from "node:util";
import type { VirtioError } from "./errors.js";

/** A call that sends requests to a device, from the moment when its arguments are found to be right. */
export interface RequestMessage {
  /** Counts the calls of this thread: the same in all messages about one call. */
  readonly id: number;
  /** The address of the device. */
  readonly address: string;
  /** Name of the method of `BlockDevice`. */
  readonly operation: string;
  /** First byte on the disk; undefined where the call is about no bytes of it. */
  readonly position: number | undefined;
  /** Bytes, of all ranges together. */
  readonly length: number;
}

/** How a call went that sent requests to a device. */
export interface RequestOutcome extends RequestMessage {
  /** Milliseconds from the call to its end. */
  readonly duration: number;
}

/** What all messages about a device say. */
export interface DeviceMessage {
  /** The address it was opened by. */
  readonly address: string;
}

/** What all messages about a queue say. */
export interface QueueMessage extends DeviceMessage {
  /** Queue index on the device. */
  readonly queue: number;
}

/** A device that has been opened, or adopted by a thread. */
export interface OpenMessage extends DeviceMessage {
  /** Whether this thread has adopted queues of a device that another one opened. */
  readonly adopted: boolean;
  /** Size of the disk in bytes, and the unit of reads and writes. */
  readonly capacity: number;
  readonly blockSize: number;
  readonly readOnly: boolean;
  /** Format of the virtqueues, how many there are, and descriptors of each. */
  readonly format: string;
  readonly queues: number;
  readonly queueSize: number;
  /** How completions are learnt of. */
  readonly mode: string;
  /** Names of the features that the device offers, and of those that were accepted. */
  readonly offered: readonly string[];
  readonly features: readonly string[];
  /** Memory that the device can reach, by the device's addresses and in bytes. */
  readonly regions: readonly { readonly iova: number; readonly size: number }[];
}

/**
 * The channels by name, with what is published there. All messages are plain objects.
 *
 * @example
 * ```ts
 * import { subscribe } from "node:diagnostics_channel";
 * import { type DiagnosticMessages, openBlock } from "virtio-driver";
 * subscribe("virtio:request:end", (message) => {
 *   const { operation, length } = message as DiagnosticMessages["virtio:request:end"];
 *   console.log(operation, length); // read 512
 * });
 * await using disk = await openBlock("ram:1M");
 * await disk.read(new Uint8Array(512));
 * ```
 */
export interface DiagnosticMessages {
  /** A call of a device begins; its arguments were right. */
  "virtio:request:start": RequestMessage;
  /** It resolves. `transferred`: bytes read or written; 0 for calls that do neither. */
  "virtio:request:end": RequestOutcome & { readonly transferred: number };
  /** It rejects. */
  "virtio:request:error": RequestOutcome & { readonly error: unknown };
  /** The device wrote something impossible into a queue, which ends the device. */
  "virtio:queue:broken": QueueMessage & { readonly error: VirtioError };
  /** Requests in flight were submitted again: by the driver, or by the back-end when `tracked`. */
  "virtio:queue:replay": QueueMessage & { readonly replayed: number; readonly tracked: boolean };
  "virtio:device:open": OpenMessage;
  /** Everything of the device is released. `dropped`: nobody had called `close`. */
  "virtio:device:close": DeviceMessage & { readonly dropped: boolean };
  /** The back-end is gone; the device tries to reach it again. */
  "virtio:device:disconnect": DeviceMessage & { readonly error: VirtioError };
  /** Before each attempt, which begins after `delay` milliseconds. */
  "virtio:device:reconnecting": DeviceMessage & { readonly attempt: number; readonly delay: number };
  /** The back-end is back; the fields are those of the event `reconnect`. */
  "virtio:device:reconnect": DeviceMessage & {
    readonly attempts: number;
    readonly replayed: number;
    readonly tracked: boolean;
    readonly unflushed: number;
  };
  /** The device changed its config space. */
  "virtio:device:config": DeviceMessage & { readonly config: object };
  /** The disk has another size, in bytes. */
  "virtio:device:resize": DeviceMessage & { readonly capacity: number; readonly previous: number };
  /** The device is gone for good. */
  "virtio:device:lost": DeviceMessage & { readonly error: VirtioError };
}

/** How a message reads in NODE_DEBUG=virtio; requests are not printed. */
type Lines = {
  readonly [N in keyof DiagnosticMessages]: ((message: DiagnosticMessages[N]) => readonly string[]) | undefined;
};

const LINES: Lines = {
  "virtio:request:start": undefined,
  "virtio:request:end": undefined,
  "virtio:request:error": undefined,
  "virtio:queue:broken": ({ queue, error }) => [`queue ${queue} is broken: ${error.message}`],
  "virtio:queue:replay": ({ queue, replayed, tracked }) => [
    `queue ${queue}: ${replayed} requests in flight are submitted again by the ${tracked ? "back-end" : "driver"}`,
  ],
  "virtio:device:open": openLines,
  "virtio:device:close": ({ dropped }) => [dropped ? "is closed, after it was dropped" : "is closed"],
  "virtio:device:disconnect": ({ error }) => [`is disconnected: ${shortly(error)}`],
  "virtio:device:reconnecting": ({ attempt, delay }) => [`attempt ${attempt} to reconnect begins in ${delay} ms`],
  "virtio:device:reconnect": ({ attempts, replayed, unflushed }) => [
    `is connected again after ${attempts} attempts: ${replayed} requests submitted again, ${unflushed} changes unflushed`,
  ],
  "virtio:device:config": () => ["changed its config space"],
  "virtio:device:resize": ({ capacity, previous }) => [`has ${capacity} bytes now, ${previous} before`],
  "virtio:device:lost": ({ error }) => [`is lost: ${shortly(error)}`],
};

function openLines(message: OpenMessage): readonly string[] {
  const { adopted, capacity, blockSize, readOnly, format, queues, queueSize, mode, offered, features } = message;
  const left = offered.filter((name) => !features.includes(name));
  const shared = message.regions.map(({ iova, size }) => `${size} bytes at 0x${iova.toString(16)}`);
  return [
    `is ${adopted ? "adopted" : "open"}: ${capacity} bytes, blocks of ${blockSize}${readOnly ? ", read-only" : ""}`,
    `features: ${features.join(" ")}; offered, not accepted: ${left.length === 0 ? "none" : left.join(" ")}`,
    `queues: ${queues} ${format}, ${queueSize} descriptors each, mode ${mode}`,
    `memory: ${shared.join(", ")}`,
  ];
}

// Kept here: a channel that nobody holds is collected, and made anew without its subscribers.
const CHANNELS = Object.fromEntries(Object.keys(LINES).map((name) => [name, channel(name)])) as Readonly<
  Record<keyof DiagnosticMessages, Channel>
>;
const START = CHANNELS["virtio:request:start"];
const END = CHANNELS["virtio:request:end"];
const ERROR = CHANNELS["virtio:request:error"];
const debug = debuglog("virtio");

/** Tell whoever subscribed to a channel of a device or queue, and print it when NODE_DEBUG has `virtio`. */
export function publish<N extends keyof DiagnosticMessages>(name: N, message: DiagnosticMessages[N]): void {
  const target = CHANNELS[name];
  if (target.hasSubscribers) target.publish(message);
  if (!debug.enabled) return;
  const { address } = message;
  for (const line of LINES[name]?.(message) ?? []) debug("%s %s", address, line);
}

/** Whether anybody wants to hear of requests. */
export function requestsWatched(): boolean {
  return START.hasSubscribers || END.hasSubscribers || ERROR.hasSubscribers;
}

let lastId = 0;

/**
 * Carry a call out and tell those who watch of its start and its end.
 *
 * @param transferred - bytes read or written, of what the call resolves to.
 */
export async function watchRequest<T>(
  request: Omit<RequestMessage, "id">,
  call: () => Promise<T>,
  transferred: (result: T) => number,
): Promise<T> {
  const message: RequestMessage = { id: ++lastId, ...request };
  const begin = performance.now();
  publish("virtio:request:start", message);
  try {
    const result = await call();
    const duration = performance.now() - begin;
    publish("virtio:request:end", { ...message, duration, transferred: transferred(result) });
    return result;
  } catch (error) {
    publish("virtio:request:error", { ...message, duration: performance.now() - begin, error });
    throw error;
  }
}

function shortly(error: VirtioError): string {
  return `${error.code}: ${error.message}`;
}
