/** Which feature bits a transport can carry, and the choice among those that a device offers. */

import { VirtioError } from "../errors.js";
import { VirtioFeature } from "../virtqueue/features.js";

/** Bits `from` to `to`, both included. */
function bits(from: bigint, to: bigint): bigint {
  return (1n << (to + 1n)) - (1n << from);
}

/**
 * What every transport carries: the features of the device type (virtio 1.3, clause 2.2: bits 0 to 23 and 50 to
 * 127), of which the device class chooses, and those of the rings. All other bits are the transport's own affair and
 * none is accepted unless it is implemented there.
 */
export const COMMON_FEATURES =
  bits(0n, 23n) |
  bits(50n, 127n) |
  VirtioFeature.INDIRECT_DESC |
  VirtioFeature.EVENT_IDX |
  VirtioFeature.VERSION_1 |
  VirtioFeature.RING_PACKED |
  VirtioFeature.IN_ORDER;

/**
 * The features to accept of those that a driver wants.
 *
 * @param carried what the transport can carry.
 * @param required what the transport adds to the driver's wish, as far as it is offered; VERSION_1 always.
 * @param peer the device, for the message.
 * @throws VirtioError ERR_VIRTIO_FEATURES when the device does not offer VERSION_1.
 */
export function chooseFeatures(
  offered: bigint,
  wanted: bigint,
  { carried, required = 0n, peer }: { carried: bigint; required?: bigint; peer: string },
): bigint {
  if ((offered & VirtioFeature.VERSION_1) === 0n) {
    throw new VirtioError(
      "ERR_VIRTIO_FEATURES",
      `${peer} offers features 0x${offered.toString(16)} without VERSION_1; ` +
        "legacy devices are not supported, configure it as a modern one",
    );
  }
  return (wanted | required | VirtioFeature.VERSION_1) & offered & carried;
}
