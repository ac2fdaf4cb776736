/** The outcome of a virtio-blk request as a number, and the error that it means. */

import { VirtioError } from "../../errors.js";
import { BLK_STATUS_UNWRITTEN, BlkRequestType, BlkStatus } from "../../protocol/blk.js";

/**
 * Make the error for a status byte other than OK.
 *
 * @param type - request type, for the message.
 * @param status - the byte that the device wrote, or 0xff when it wrote none.
 */
export function blkError(type: number, status: number): VirtioError {
  const name = Object.entries(BlkRequestType).find(([, value]) => value === type)?.[0] ?? `type ${type}`;
  switch (status) {
    case BlkStatus.IOERR:
      return new VirtioError(
        "ERR_VIRTIO_IO",
        `${name}: the device answered IOERR; look at its log, nothing is known about the data`,
      );
    case BlkStatus.UNSUPP:
      return new VirtioError(
        "ERR_VIRTIO_UNSUPPORTED",
        `${name}: the device answered UNSUPP; it does not do this request`,
      );
    case BLK_STATUS_UNWRITTEN:
      return new VirtioError(
        "ERR_VIRTIO_STATUS",
        `${name}: the device returned the request without a status; it is broken, trust none of its answers`,
      );
    default:
      return new VirtioError(
        "ERR_VIRTIO_STATUS",
        `${name}: the device answered the unknown status ${status}, expected 0, 1 or 2`,
      );
  }
}
