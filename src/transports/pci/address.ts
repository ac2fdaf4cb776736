/** The address of a PCI function as text. */

import { typeError, VirtioError } from "../../errors.js";

/**
 * The address of a PCI function as the kernel writes it: domain, bus, device and function, `0000:00:04.0`. The domain
 * may be left out, as `lspci` does.
 *
 * @throws TypeError when `text` is no string, VirtioError ERR_VIRTIO_ADDRESS when it is no address.
 */
export function parsePciAddress(text: string): string {
  if (typeof text !== "string") throw typeError("address", "a string", text);
  const match = /^(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}:[01][0-9a-f]\.[0-7])$/.exec(text.toLowerCase());
  if (match === null) {
    throw new VirtioError(
      "ERR_VIRTIO_ADDRESS",
      `"${text}" is not the address of a PCI function, expected DDDD:BB:DD.F as in 0000:00:04.0; ` +
        "`virtio pci list` shows those of the virtio functions",
    );
  }
  return `${match[1] ?? "0000"}:${match[2]}`;
}
