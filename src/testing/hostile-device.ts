/** A device that lies: it writes into ring memory what no device may write, one named lie at a time. */

import { rangeError } from "../errors.js";
import { VirtioFeature } from "../virtqueue/features.js";
import type { FakeRequest } from "./fake-device.js";
import { HostileRing } from "./hostile-ring.js";
import { LIES, type Lie } from "./lies.js";

/**
 * Tells lies on the ring of a {@link FakeDevice}, which stays the honest half: take requests with it first, let one of
 * them be lied about, answer the others honestly. {@link LIES} lists what it can tell and what a driver has to do.
 * Besides, every field of the ring can be written as it is.
 *
 * @example
 * ```ts
 * import { VirtioError, Virtqueue, VirtqueueLayout } from "virtio-driver";
 * import { FakeDevice, HostileDevice } from "virtio-driver/testing";
 *
 * const layout = new VirtqueueLayout({ queueSize: 4 });
 * const buffer = new ArrayBuffer(4096);
 * const queue = new Virtqueue({ layout, buffer, iova: 0x10000, features: 0n });
 * const device = new FakeDevice({ layout, buffer, iova: 0x10000 });
 * queue.begin(1);
 * queue.push(0x10800, 0, 16, true);
 * queue.commit();
 * queue.publish();
 * device.take();
 * new HostileDevice(device).tell("id-out-of-range");
 * try {
 *   queue.poll();
 * } catch (error) {
 *   if (error instanceof VirtioError) console.log(error.code); // ERR_VIRTIO_QUEUE_BROKEN
 * }
 * ```
 */
export class HostileDevice extends HostileRing {
  /** The lies that can be told on this ring: those of its format, some with IN_ORDER only. */
  get lies(): readonly Lie[] {
    const own = this.packed ? "packed" : "split";
    const hasOrder = (this.device.features & VirtioFeature.IN_ORDER) !== 0n;
    return LIES.filter(({ format = own, inOrder = false }) => format === own && (hasOrder || !inOrder));
  }

  /**
   * Tell a lie, and notify the driver.
   *
   * @param request - whom it concerns; default the oldest that is held.
   * @returns the rest of the lie, when it has two parts: to be called when the driver has looked.
   * @throws RangeError for a name that is not one of {@link lies}, or when no request is held.
   */
  tell(name: string, request: FakeRequest | undefined = this.device.held[0]): () => void {
    const lie = this.lies.find((each) => each.name === name);
    if (lie === undefined) throw rangeError("name", "a lie of LIES for this format", name);
    if (request === undefined) throw rangeError("request", "a held request to lie about", request);
    const rest = lie.tell(this, request);
    this.interrupt();
    return rest ?? (() => {});
  }
}
