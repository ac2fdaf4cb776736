/** How a block device goes on when another back-end has taken the place of the one that it was opened on. */

import { publish } from "../../diagnostics.js";
import { VirtioError } from "../../errors.js";
import { BLK_CONFIG_WRITEBACK_OFFSET, type BlkConfig, BlkFeature } from "../../protocol/blk.js";
import type { Recovery, ReturnedDevice, VirtioTransport } from "../../transports/transport.js";
import type { ReconnectAttempt, ReconnectOutcome } from "./events.js";
import { blkLimits } from "./limits.js";
import { readBlkConfig } from "./negotiate.js";
import type { OpenBlockOptions } from "./options.js";
import type { VirtioBlkQueue } from "./queue.js";
import type { Scheduler } from "./scheduler.js";

/**
 * Refuse to promise what the transport cannot do.
 *
 * @throws VirtioError ERR_VIRTIO_UNSUPPORTED.
 */
export function checkReconnect(
  { address, reconnects }: VirtioTransport,
  { reconnect = false }: OpenBlockOptions,
): void {
  if (reconnect === false || reconnects === true) return;
  throw new VirtioError(
    "ERR_VIRTIO_UNSUPPORTED",
    `${address} cannot be reached again when it is gone; only vhost-user over a named socket can: leave "reconnect" out`,
  );
}

/** What a device is told. Nothing of it keeps the device. */
export interface RecoveryCalls {
  /** The back-end is gone. Returns whether the device can go on with another one. */
  disconnected(error: VirtioError): boolean | undefined;
  /** Another attempt is made. */
  reconnecting(attempt: ReconnectAttempt): void;
  /** The back-end is back, with this config space. */
  reconnected(config: BlkConfig, outcome: ReconnectOutcome): void;
}

/** What a {@link BlkRecovery} works on. */
export interface RecoveryParts {
  readonly address: string;
  readonly features: bigint;
  readonly options: OpenBlockOptions;
  readonly queues: readonly VirtioBlkQueue[];
  readonly scheduler: Scheduler;
  readonly calls: RecoveryCalls;
}

/**
 * What completed in the memory of the rings is taken before anything else: after the death of its back-end a request is
 * either there or not. What is left is in flight. A back-end with the region of the one before (INFLIGHT_SHMFD) carries
 * it out again by itself, in the order in which that one had taken it. For any other the rings begin anew, and the
 * requests are submitted again in the order of their submission.
 */
export class BlkRecovery implements Recovery {
  /** Whether the back-end is gone, and tried to be reached. */
  isAway = false;
  /** The config space as the device has it. */
  config: BlkConfig;
  private readonly parts: RecoveryParts;
  private outcome: Omit<ReconnectOutcome, "attempts"> = { replayed: 0, tracked: false, unflushed: 0 };
  private replayed: readonly number[] = [];
  private latest: BlkConfig;

  constructor(config: BlkConfig, parts: RecoveryParts) {
    this.config = config;
    this.latest = config;
    this.parts = parts;
  }

  get completed(): number {
    return this.parts.queues.reduce((sum, { counters }) => sum + counters.completed, 0);
  }

  disconnected(error: VirtioError): boolean {
    this.isAway = this.parts.calls.disconnected(error) === true;
    return this.isAway;
  }

  reconnecting(attempt: number, delay: number): void {
    this.parts.calls.reconnecting({ attempt, delay });
  }

  async restart(device: ReturnedDevice): Promise<readonly (number | undefined)[]> {
    const { features, options, queues, scheduler } = this.parts;
    let config = await readBlkConfig(device, features, options);
    this.check(device.address, config);
    const { writeback } = this.config;
    if (writeback !== undefined && writeback !== config.writeback) {
      // It was switched since the device was opened.
      await device.writeConfig(BLK_CONFIG_WRITEBACK_OFFSET, Uint8Array.of(writeback ? 1 : 0));
      config = await readBlkConfig(device, features, options);
    }
    this.latest = config;
    const bases = queues.map((queue) => queue.settle());
    const { tracked } = device;
    this.replayed = queues.map((queue) => (tracked ? queue.inFlight : scheduler.replay(queue)));
    const replayed = this.replayed.reduce((sum, count) => sum + count, 0);
    const isCached = (features & BlkFeature.FLUSH) !== 0n && config.writeback !== false;
    this.outcome = { replayed, tracked, unflushed: isCached ? scheduler.unflushed : 0 };
    return tracked ? bases : bases.map(() => undefined);
  }

  reconnected(attempts: number): void {
    this.isAway = false;
    const { address, calls, queues } = this.parts;
    const { tracked } = this.outcome;
    queues.forEach(({ index }, i) => {
      const replayed = this.replayed[i];
      if (replayed > 0) publish("virtio:queue:replay", { address, queue: index, replayed, tracked });
    });
    calls.reconnected(this.latest, { ...this.outcome, attempts });
    for (const queue of queues) queue.goOn();
  }

  /** Requests in flight were made for the bounds that the device had. */
  private check(address: string, config: BlkConfig): void {
    const { queues } = this.parts;
    const { limits, queueSize } = queues[0];
    const found = blkLimits(config, queueSize);
    const isSmaller =
      found.maxSegmentBytes < limits.maxSegmentBytes ||
      found.maxSegments < limits.maxSegments ||
      found.maxRequestBytes < limits.maxRequestBytes ||
      (config.numQueues !== undefined && config.numQueues < queues.length);
    if (!isSmaller && config.blkSize === this.config.blkSize) return;
    throw new VirtioError(
      "ERR_VIRTIO_CONFIG",
      `${address} came back as another disk: another block size, smaller requests or fewer queues; open it again`,
    );
  }
}
