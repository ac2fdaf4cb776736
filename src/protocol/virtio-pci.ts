/** virtio over PCI as both sides see it: capabilities and the common configuration (virtio 1.3, 4.1). */

/** A register or field: where it is, and by how many bytes at once it is accessed. */
export interface PciField {
  readonly offset: number;
  readonly width: 1 | 2 | 4;
}

/** Fields of the PCI config space, `PCI_…` in `<linux/pci_regs.h>`. */
export const PciConfigField = {
  VENDOR_ID: { offset: 0x00, width: 2 },
  DEVICE_ID: { offset: 0x02, width: 2 },
  COMMAND: { offset: 0x04, width: 2 },
  STATUS: { offset: 0x06, width: 2 },
  REVISION_ID: { offset: 0x08, width: 1 },
  /** `PCI_BASE_ADDRESS_0`, of six in a row; bit 0 is set when it is of I/O ports. */
  BASE_ADDRESS_0: { offset: 0x10, width: 4 },
  SUBSYSTEM_ID: { offset: 0x2e, width: 2 },
  CAPABILITY_LIST: { offset: 0x34, width: 1 },
} as const satisfies Record<string, PciField>;

/** Bits of the PCI command register. */
export const PciCommand = {
  /** Bit 0: answers in its I/O port BARs. */
  IO: 1,
  /** Bit 1: answers in its memory BARs. */
  MEMORY: 2,
  /** Bit 2: may access memory and send MSI-X messages. */
  MASTER: 4,
} as const;

/** `PCI_STATUS_CAP_LIST`: there is a list of capabilities. */
export const PCI_STATUS_CAP_LIST = 0x10;
/** Bytes of config space that capabilities can lie in. */
export const PCI_CONFIG_SPACE_SIZE = 256;
/** End of the standard header: no capability lies before it. */
export const PCI_STD_HEADER_SIZE = 64;
/** BARs of a function. */
export const PCI_BARS = 6;
/** `PCI_BASE_ADDRESS_SPACE_IO`. */
export const PCI_BASE_ADDRESS_SPACE_IO = 1;

/** Capability ids, `PCI_CAP_ID_…`. */
export const PciCapabilityId = {
  /** Vendor-specific: the virtio structures. */
  VNDR: 0x09,
  MSIX: 0x11,
} as const;

/** MSI-X message control, from the start of the capability: bits 0 to 10 hold the number of vectors - 1. */
export const PCI_MSIX_FLAGS = { offset: 2, width: 2 } as const;
export const PCI_MSIX_FLAGS_QSIZE = 0x7ff;
/** Bytes of the MSI-X capability. */
export const PCI_MSIX_CAP_SIZE = 12;

/** Fields of `struct virtio_pci_cap` and what follows it in some types (4.1.4), from the start of the capability. */
export const VirtioPciCap = {
  CAP_VNDR: { offset: 0, width: 1 },
  CAP_NEXT: { offset: 1, width: 1 },
  CAP_LEN: { offset: 2, width: 1 },
  CFG_TYPE: { offset: 3, width: 1 },
  BAR: { offset: 4, width: 1 },
  ID: { offset: 5, width: 1 },
  OFFSET: { offset: 8, width: 4 },
  LENGTH: { offset: 12, width: 4 },
  /** `struct virtio_pci_notify_cap` (4.1.4.4). */
  NOTIFY_OFF_MULTIPLIER: { offset: 16, width: 4 },
  /** `struct virtio_pci_cap64`, SHARED_MEMORY_CFG (4.1.4.7). */
  OFFSET_HI: { offset: 16, width: 4 },
  LENGTH_HI: { offset: 20, width: 4 },
} as const satisfies Record<string, PciField>;

/** Bytes of `struct virtio_pci_cap`, `virtio_pci_notify_cap` and `virtio_pci_cap64`. */
export const VIRTIO_PCI_CAP_SIZE = 16;
export const VIRTIO_PCI_NOTIFY_CAP_SIZE = 20;
export const VIRTIO_PCI_CAP64_SIZE = 24;

/** `virtio_pci_cap.cfg_type`, C names `VIRTIO_PCI_CAP_…` (4.1.4). All others are reserved. */
export const VirtioPciCapType = {
  COMMON_CFG: 1,
  NOTIFY_CFG: 2,
  ISR_CFG: 3,
  DEVICE_CFG: 4,
  PCI_CFG: 5,
  SHARED_MEMORY_CFG: 8,
  VENDOR_CFG: 9,
} as const;

/** Registers of `struct virtio_pci_common_cfg` (4.1.4.3). 64-bit addresses are two registers each. */
export const VirtioPciCommon = {
  DEVICE_FEATURE_SELECT: { offset: 0x00, width: 4 },
  /** Read-only. */
  DEVICE_FEATURE: { offset: 0x04, width: 4 },
  DRIVER_FEATURE_SELECT: { offset: 0x08, width: 4 },
  DRIVER_FEATURE: { offset: 0x0c, width: 4 },
  CONFIG_MSIX_VECTOR: { offset: 0x10, width: 2 },
  /** Read-only. */
  NUM_QUEUES: { offset: 0x12, width: 2 },
  DEVICE_STATUS: { offset: 0x14, width: 1 },
  /** Read-only. */
  CONFIG_GENERATION: { offset: 0x15, width: 1 },
  QUEUE_SELECT: { offset: 0x16, width: 2 },
  /** The largest size after a reset; 0 when there is no such queue. */
  QUEUE_SIZE: { offset: 0x18, width: 2 },
  QUEUE_MSIX_VECTOR: { offset: 0x1a, width: 2 },
  /** 1 may be written, never 0. */
  QUEUE_ENABLE: { offset: 0x1c, width: 2 },
  /** Read-only; in units of the capability's `notify_off_multiplier`. */
  QUEUE_NOTIFY_OFF: { offset: 0x1e, width: 2 },
  QUEUE_DESC_LO: { offset: 0x20, width: 4 },
  QUEUE_DESC_HI: { offset: 0x24, width: 4 },
  QUEUE_DRIVER_LO: { offset: 0x28, width: 4 },
  QUEUE_DRIVER_HI: { offset: 0x2c, width: 4 },
  QUEUE_DEVICE_LO: { offset: 0x30, width: 4 },
  QUEUE_DEVICE_HI: { offset: 0x34, width: 4 },
  /** Read-only; there with NOTIF_CONFIG_DATA only. */
  QUEUE_NOTIF_CONFIG_DATA: { offset: 0x38, width: 2 },
  /** There with RING_RESET only. */
  QUEUE_RESET: { offset: 0x3a, width: 2 },
} as const satisfies Record<string, PciField>;

/** Bytes of the common configuration that every device has. */
export const VIRTIO_PCI_COMMON_SIZE = 0x38;
/** Bytes up to the end of the last register in {@link VirtioPciCommon}. */
export const VIRTIO_PCI_COMMON_FULL_SIZE = 0x3c;

/** `VIRTIO_MSI_NO_VECTOR`: an event without an interrupt; read back, a mapping that failed (4.1.5.1.2). */
export const VIRTIO_MSI_NO_VECTOR = 0xffff;

/** Bits of the ISR status byte (4.1.4.5). Reading it clears it. */
export const VirtioPciIsr = {
  /** A queue has used buffers. */
  QUEUE: 1,
  /** The device config changed, or the device needs a reset. */
  CONFIG: 2,
} as const;
