/** Looking at the config space now and then, where nobody tells of its changes. */

import { weakly } from "./dropped.js";

/** Code of the warning that `process` emits when looking fails. */
const WARNING = "WARN_VIRTIO_CONFIG_POLL";

/**
 * Call `look` every `interval` milliseconds, one call at a time, until `device` is collected or the function returned
 * is called. Keeps neither the process nor the device alive. A look that fails is a warning, once until one succeeds:
 * a device that is really gone is told by its transport.
 *
 * @param look - must not stand in a function that has closures over the device; see `weakly`.
 */
export function pollConfig<D extends { readonly address: string }>(
  device: D,
  interval: number,
  look: (device: D) => Promise<void>,
): () => void {
  let isLooking = false;
  let isWarned = false;
  const lookOnce = async (found: D): Promise<void> => {
    isLooking = true;
    try {
      await look(found);
      isWarned = false;
    } catch (error) {
      if (!isWarned) warn(found.address, error);
      isWarned = true;
    } finally {
      isLooking = false;
    }
  };
  const timer: NodeJS.Timeout = setInterval(
    weakly(
      device,
      (found) => {
        if (!isLooking) void lookOnce(found);
      },
      () => clearInterval(timer),
    ),
    interval,
  );
  timer.unref();
  return () => clearInterval(timer);
}

function warn(address: string, error: unknown): void {
  process.emitWarning(`the config space of ${address} cannot be read, and is tried again: ${String(error)}`, {
    ...{ type: "VirtioWarning", code: WARNING },
  });
}
