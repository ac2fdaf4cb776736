/** How devices end that were lost, or that nobody closed: these are noticed by the collector, told, and closed. */

import { publish } from "../../diagnostics.js";
import { VirtioError } from "../../errors.js";
import type { BlkConfig } from "../../protocol/blk.js";
import type { ReconnectAttempt, ReconnectOutcome } from "./events.js";
import type { BlkControl } from "./negotiate.js";
import type { VirtioBlkQueue } from "./queue.js";
import type { Scheduler } from "./scheduler.js";

/** Code of the warning that `process` emits. */
const WARNING = "WARN_VIRTIO_DROPPED";
/** Milliseconds that the end of a device waits for requests in flight. */
export const DRAIN_TIMEOUT = 5000;

/** What is left of a device when nobody has it any more. Nothing of {@link keepFor} but queues. */
export interface Remains {
  readonly transport: Pick<BlkControl, "address" | "close">;
  readonly scheduler: Scheduler;
  readonly queues: readonly VirtioBlkQueue[];
}

/** What the transport, the scheduler and another thread tell a device `D`. */
export interface DeviceCalls<D> {
  readonly lose: (device: D, error: unknown, queue?: number) => void;
  readonly refresh: (device: D) => void;
  readonly look: (device: D) => Promise<void>;
  readonly configure: (device: D, latest: BlkConfig, isChanged: boolean) => void;
  readonly closing: (device: D, error: VirtioError, timeout: number) => void;
  readonly disconnected: (device: D, error: VirtioError) => boolean;
  readonly reconnecting: (device: D, attempt: ReconnectAttempt) => void;
  readonly reconnected: (device: D, config: BlkConfig, outcome: ReconnectOutcome) => void;
}

const registry = new FinalizationRegistry<Remains>((remains) => void closeRemains(remains));
/** Whoever has the key needs the device. */
const needed = new WeakMap<object, object>();

/** Close what is left of `device` when it was collected, unless {@link forgetDrop} comes first. */
export function watchForDrop(device: object, remains: Remains): void {
  registry.register(device, remains, device);
}

/** The device is being closed, as it should be. */
export function forgetDrop(device: object): void {
  registry.unregister(device);
}

/** Keep `device` for as long as somebody has `part` of it: a queue that was taken, the pool of a buffer. */
export function keepFor(part: object, device: object): void {
  needed.set(part, device);
}

/**
 * A callback that does not keep `target` from being collected, and calls `gone` when it was. `call` must not stand in
 * a function that has closures over the target: closures of one function share what they keep.
 */
export function weakly<T extends object, A extends unknown[], R>(
  target: T,
  call: (target: T, ...rest: A) => R,
  gone: () => void = () => {},
): (...rest: A) => R | undefined {
  const reference = new WeakRef(target);
  return (...rest) => {
    const found = reference.deref();
    if (found !== undefined) return call(found, ...rest);
    gone();
    return undefined;
  };
}

/** The error of a device that is gone because of `cause`. */
export function lostError(address: string, cause: unknown): VirtioError {
  if (cause instanceof VirtioError) return cause;
  return new VirtioError("ERR_VIRTIO_DISCONNECTED", `${address} is lost: ${String(cause)}`, { cause });
}

async function closeRemains({ transport, scheduler, queues }: Remains): Promise<void> {
  const { address } = transport;
  warn(`${address} was dropped without close(), and is closed now; use "await using", or close it yourself`);
  const closed = new VirtioError("ERR_VIRTIO_CLOSED", `${address} was dropped and is closed; open it again`);
  try {
    if (scheduler.failure === undefined) {
      scheduler.setMode("event");
      await scheduler.idle(DRAIN_TIMEOUT);
    }
  } catch (error) {
    // There was no descriptor left to wait with.
    warn(`${address} was dropped and could not wait for what is in flight: ${String(error)}`);
  }
  for (const queue of queues) queue.fail(closed);
  try {
    await transport.close();
  } catch (error) {
    warn(`${address} was dropped and could not be closed well: ${String(error)}`);
  }
  scheduler.fail(closed);
  publish("virtio:device:close", { address, dropped: true });
}

function warn(message: string): void {
  process.emitWarning(message, { type: "VirtioWarning", code: WARNING });
}
