/** The one form in which devices are named, in the API and on the command line, and what opens them. */

import { spawnBackend } from "./backend/index.js";
import { BlockDevice, type OpenBlockOptions } from "./devices/blk/index.js";
import { typeError, VirtioError } from "./errors.js";
import { parseSize } from "./size.js";
import { Pci, VhostUser, VhostVdpa, type VirtioTransport, waitOptions } from "./transports/index.js";

/** Opens what stands behind the scheme of an address. */
type Opener = (rest: string, options: OpenBlockOptions) => Promise<VirtioTransport>;

/** Every form of address: a new transport is one more line here. */
const SCHEMES: Readonly<Record<string, { readonly form: string; readonly open: Opener }>> = {
  "vhost-user": { form: "vhost-user:PATH", open: connectNamed },
  "vhost-vdpa": { form: "vhost-vdpa:PATH", open: (path, options) => VhostVdpa.open(path, waitOptions(options)) },
  pci: { form: "pci:DDDD:BB:DD.F", open: (address, options) => Pci.open(address, waitOptions(options)) },
  ram: {
    form: "ram:SIZE",
    open: (size, options) => embedded({ kind: "ram", size: parseSize(size, "ram:SIZE") }, options),
  },
  file: {
    form: "file:PATH",
    open: (path, options) => embedded({ kind: "file", path, readOnly: options.readOnly === true }, options),
  },
};

function connectNamed(path: string, options: OpenBlockOptions): Promise<VirtioTransport> {
  const { reconnect = true } = options;
  return VhostUser.connect(path, { ...waitOptions(options), reconnect });
}

/**
 * Open the block device that `address` names: `vhost-user:PATH` for a back-end that listens on a Unix socket,
 * `vhost-vdpa:PATH` for a vhost-vdpa character device, `pci:DDDD:BB:DD.F` for a PCI function that is bound to vfio-pci,
 * `ram:SIZE` or `file:PATH` for the embedded back-end, started for this device alone in a child process.
 *
 * @throws VirtioError ERR_VIRTIO_ADDRESS for an address of no known form, and what `BlockDevice.open` and the
 *   transport throw. RangeError or TypeError for a wrong option.
 * @example
 * ```ts
 * import { openBlock } from "virtio-driver";
 * await using disk = await openBlock("ram:1M");
 * console.log(disk.capacity, disk.blockSize); // 1048576 512
 * ```
 */
export async function openBlock(address: string, options: OpenBlockOptions = {}): Promise<BlockDevice> {
  if (typeof address !== "string") throw typeError("address", "a string", address);
  const colon = address.indexOf(":");
  const scheme = Object.hasOwn(SCHEMES, address.slice(0, colon)) ? SCHEMES[address.slice(0, colon)] : undefined;
  const rest = address.slice(colon + 1);
  if (scheme === undefined || rest === "") {
    const forms = Object.values(SCHEMES).map(({ form }) => form);
    const hint = address.startsWith("/")
      ? `; for a socket write vhost-user:${address}, for an image file:${address}, for a vDPA device vhost-vdpa:${address}`
      : "";
    throw new VirtioError(
      "ERR_VIRTIO_ADDRESS",
      `"${address}" is not the address of a device, expected ${forms.slice(0, -1).join(", ")} or ${forms.at(-1)}${hint}`,
    );
  }
  return BlockDevice.open(await scheme.open(rest, options), options);
}

/** Start the embedded back-end in a child process, which ends with the connection to it. */
async function embedded(spec: Parameters<typeof spawnBackend>[0], options: OpenBlockOptions): Promise<VirtioTransport> {
  const backend = await spawnBackend(spec, { queues: options.queues ?? 1 });
  try {
    return await VhostUser.connect(backend.path, {
      ...waitOptions(options),
      // It serves one connection, and ends with it.
      reconnect: false,
      afterClose: () => backend.close(),
    });
  } catch (error) {
    await backend.close();
    throw error;
  }
}
