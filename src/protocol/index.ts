/** What both sides of a boundary agree on, as pure codecs: the subpath `virtio-driver/protocol`. */

export * from "./blk.js";
export * from "./device-status.js";
export * from "./pci-ids.js";
export * from "./vhost-user.js";
export * from "./vhost-vdpa.js";
export * from "./virtio-pci.js";
