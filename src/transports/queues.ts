/** What `startQueues` of every transport is given, and what of it is refused. */

import { checkInteger, rangeError, typeError, VirtioError } from "../errors.js";
import {
  AVAIL_ALIGN,
  AVAIL_RING_OFFSET,
  DESC_ALIGN,
  DESC_SIZE,
  EVENT_SUPPRESS_ALIGN,
  EVENT_SUPPRESS_SIZE,
  USED_ALIGN,
  USED_ELEM_SIZE,
  USED_RING_OFFSET,
} from "../virtqueue/defs.js";
import { checkQueueSize } from "../virtqueue/layout.js";
import type { TransportMemory } from "./memory.js";
import type { QueueSetup } from "./transport.js";

/** Bytes of the event field that ends both split rings. */
const EVENT_FIELD_SIZE = 2;

/**
 * Check what `startQueues` was given.
 *
 * @throws VirtioError ERR_VIRTIO_QUEUES for an index that the device does not have; RangeError for two of the
 *   same index, a size that the format does not allow, or an area that is misaligned or outside the memory.
 */
export function checkQueues(
  setups: readonly QueueSetup[],
  limits: { maxQueues: number; packed: boolean; memory: TransportMemory },
): void {
  const { maxQueues, packed, memory } = limits;
  const given: unknown = setups;
  if (!Array.isArray(given)) throw typeError("queues", "an array of queue setups", setups);
  if (setups.length === 0) throw rangeError("queues", "at least one queue", 0);
  const seen = new Set<number>();
  for (const { index, size, descriptorArea, driverArea, deviceArea } of setups) {
    checkInteger("index", index, 0);
    if (index >= maxQueues) {
      throw new VirtioError(
        "ERR_VIRTIO_QUEUES",
        `the device has ${maxQueues} queues, there is no queue ${index}; start fewer, or give the device more`,
      );
    }
    if (seen.has(index)) throw rangeError("index", "each queue once", index);
    seen.add(index);
    checkQueueSize(size, packed);
    const area = (name: string, address: number, align: number, length: number) => {
      if (checkInteger(name, address, 0) % align !== 0) throw rangeError(name, `a multiple of ${align}`, address);
      if (!memory.contains(address, length)) throw rangeError(name, `${length} bytes in memory of mapMemory`, address);
    };
    area("descriptorArea", descriptorArea, DESC_ALIGN, DESC_SIZE * size);
    if (packed) {
      area("driverArea", driverArea, EVENT_SUPPRESS_ALIGN, EVENT_SUPPRESS_SIZE);
      area("deviceArea", deviceArea, EVENT_SUPPRESS_ALIGN, EVENT_SUPPRESS_SIZE);
    } else {
      area("driverArea", driverArea, AVAIL_ALIGN, AVAIL_RING_OFFSET + 2 * size + EVENT_FIELD_SIZE);
      area("deviceArea", deviceArea, USED_ALIGN, USED_RING_OFFSET + USED_ELEM_SIZE * size + EVENT_FIELD_SIZE);
    }
  }
}
