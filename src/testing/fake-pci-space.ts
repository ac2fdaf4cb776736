/** The config space of a fake PCI function, with capabilities of any shape, and where they put the structures. */

import { rangeError } from "../errors.js";
import { VIRTIO_PCI_VENDOR } from "../protocol/pci-ids.js";
import {
  PCI_BARS,
  PCI_CONFIG_SPACE_SIZE,
  PCI_MSIX_CAP_SIZE,
  PCI_STATUS_CAP_LIST,
  PCI_STD_HEADER_SIZE,
  PciCapabilityId,
  PciConfigField,
  type PciField,
  VIRTIO_PCI_CAP64_SIZE,
  VIRTIO_PCI_CAP_SIZE,
  VIRTIO_PCI_COMMON_FULL_SIZE,
  VIRTIO_PCI_NOTIFY_CAP_SIZE,
  VirtioPciCap,
  VirtioPciCapType,
} from "../protocol/virtio-pci.js";

/** A vendor-specific capability of a {@link FakePciFunction}, as it is to be written into config space. */
export interface FakePciCapability {
  /** `cfg_type`. */
  readonly type: number;
  /** BAR, also an impossible one. */
  readonly bar: number;
  /** Bytes from the start of the BAR; of more than 32 bits in SHARED_MEMORY_CFG only. */
  readonly offset: number;
  /** Bytes; as `offset`. */
  readonly length: number;
  /** `id`. Default 0. */
  readonly id?: number;
  /** `cap_len`. Default: that of the type. */
  readonly size?: number;
  /** `notify_off_multiplier`, NOTIFY_CFG only. Default 0. */
  readonly multiplier?: number;
}

/** What the config space of a fake is made from. */
export interface FakeSpaceOptions {
  readonly deviceId: number;
  readonly revision: number;
  readonly msixVectors: number;
  readonly capabilities: readonly FakePciCapability[];
  /** BARs of I/O ports. */
  readonly ioBars: readonly number[];
}

/** The virtio structure at a place of a BAR. */
export interface FakeStructure {
  readonly target: "common" | "notify" | "isr" | "device";
  readonly bar: number;
  readonly offset: number;
  readonly length: number;
  readonly multiplier: number;
}

const TARGETS = new Map<number, FakeStructure["target"]>([
  [VirtioPciCapType.COMMON_CFG, "common"],
  [VirtioPciCapType.NOTIFY_CFG, "notify"],
  [VirtioPciCapType.ISR_CFG, "isr"],
  [VirtioPciCapType.DEVICE_CFG, "device"],
]);

/** Where a fake keeps its structures unless told otherwise: BAR 4, a page each, as QEMU does. */
export function standardCapabilities(
  queues: number,
  configLength: number,
  notifyMultiplier: number,
): FakePciCapability[] {
  const bar = 4;
  const notifyLength = Math.max(0, queues - 1) * notifyMultiplier + 4; // with NOTIFICATION_DATA 4 bytes are written
  const config = { type: VirtioPciCapType.DEVICE_CFG, bar, offset: 0x2000, length: configLength };
  return [
    { type: VirtioPciCapType.COMMON_CFG, bar, offset: 0, length: VIRTIO_PCI_COMMON_FULL_SIZE },
    { type: VirtioPciCapType.ISR_CFG, bar, offset: 0x1000, length: 1 },
    ...(configLength > 0 ? [config] : []),
    {
      ...{ type: VirtioPciCapType.NOTIFY_CFG, bar, offset: 0x3000, length: notifyLength },
      multiplier: notifyMultiplier,
    },
  ];
}

/**
 * Write a config space.
 *
 * @throws RangeError when the capabilities do not fit.
 */
export function buildConfigSpace(options: FakeSpaceOptions): Uint8Array {
  const space = new Uint8Array(PCI_CONFIG_SPACE_SIZE);
  const put = (at: number, field: PciField, value: number): void => writeField(space, at + field.offset, field, value);
  put(0, PciConfigField.VENDOR_ID, VIRTIO_PCI_VENDOR);
  put(0, PciConfigField.DEVICE_ID, options.deviceId);
  put(0, PciConfigField.REVISION_ID, options.revision);
  for (const bar of options.ioBars) put(4 * bar, PciConfigField.BASE_ADDRESS_0, 1);
  let end = PCI_STD_HEADER_SIZE;
  let previous = 0;
  const add = (id: number, size: number): number => {
    const at = end;
    end += Math.ceil(size / 4) * 4;
    if (end > PCI_CONFIG_SPACE_SIZE) throw rangeError("capabilities", "what fits into 192 bytes", end - at);
    put(at, VirtioPciCap.CAP_VNDR, id);
    if (previous === 0) {
      put(0, PciConfigField.STATUS, PCI_STATUS_CAP_LIST);
      put(0, PciConfigField.CAPABILITY_LIST, at);
    } else {
      put(previous, VirtioPciCap.CAP_NEXT, at);
    }
    previous = at;
    return at;
  };
  if (options.msixVectors > 0) {
    const at = add(PciCapabilityId.MSIX, PCI_MSIX_CAP_SIZE);
    writeField(space, at + 2, { width: 2 }, options.msixVectors - 1);
  }
  for (const capability of options.capabilities) {
    const { type, bar, offset, length, id = 0, multiplier = 0, size = capabilitySize(type) } = capability;
    // Fields are written although a `cap_len` that is too small leaves them out.
    const at = add(PciCapabilityId.VNDR, Math.max(size, capabilitySize(type)));
    put(at, VirtioPciCap.CAP_LEN, size);
    put(at, VirtioPciCap.CFG_TYPE, type);
    put(at, VirtioPciCap.BAR, bar);
    put(at, VirtioPciCap.ID, id);
    put(at, VirtioPciCap.OFFSET, offset % 2 ** 32);
    put(at, VirtioPciCap.LENGTH, length % 2 ** 32);
    if (type === VirtioPciCapType.NOTIFY_CFG) put(at, VirtioPciCap.NOTIFY_OFF_MULTIPLIER, multiplier);
    if (type === VirtioPciCapType.SHARED_MEMORY_CFG) {
      put(at, VirtioPciCap.OFFSET_HI, Math.floor(offset / 2 ** 32));
      put(at, VirtioPciCap.LENGTH_HI, Math.floor(length / 2 ** 32));
    }
  }
  return space;
}

/** The structures that the capabilities name, in BARs that exist. */
export function structuresOf(
  capabilities: readonly FakePciCapability[],
  barSize: (bar: number) => number,
): FakeStructure[] {
  const list: FakeStructure[] = [];
  for (const { type, bar, offset, length, multiplier = 0 } of capabilities) {
    const target = TARGETS.get(type);
    if (target === undefined || bar >= PCI_BARS || offset >= barSize(bar)) continue;
    list.push({ target, bar, offset, length: Math.min(length, barSize(bar) - offset), multiplier });
  }
  return list;
}

function capabilitySize(type: number): number {
  if (type === VirtioPciCapType.NOTIFY_CFG || type === VirtioPciCapType.PCI_CFG) return VIRTIO_PCI_NOTIFY_CAP_SIZE;
  return type === VirtioPciCapType.SHARED_MEMORY_CFG ? VIRTIO_PCI_CAP64_SIZE : VIRTIO_PCI_CAP_SIZE;
}

/** Read a little-endian value. */
export function readField(bytes: Uint8Array, at: number, width: number): number {
  let value = 0;
  for (let i = width - 1; i >= 0; i--) value = value * 256 + (bytes[at + i] ?? 0);
  return value;
}

/** Write the lower `width` bytes of a value. */
export function writeField(bytes: Uint8Array, at: number, { width }: Pick<PciField, "width">, value: number): void {
  for (let i = 0; i < width; i++) bytes[at + i] = value >>> (8 * i);
}
