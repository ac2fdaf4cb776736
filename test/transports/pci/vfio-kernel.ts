/**
 * A model of VFIO in the kernel: sysfs and nodes in a folder, the answers to requests, and a function whose registers
 * are a memory file. It is as strict as Linux, keeps a log, and fails what a test wants to fail.
 */

import { mkdirSync, mkdtempSync, readdirSync, readlinkSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { constants, endianness, tmpdir } from "node:os";
import { join } from "node:path";
import { createMemfd } from "../../../src/sys/index.js";

const { errno } = constants;
const LE = endianness() === "LE";

/** Names of the requests that the model knows, by number. */
const NAMES: Readonly<Record<number, string>> = {
  0x3b64: "GET_API_VERSION",
  0x3b65: "CHECK_EXTENSION",
  0x3b66: "SET_IOMMU",
  0x3b67: "GROUP_GET_STATUS",
  0x3b68: "GROUP_SET_CONTAINER",
  0x3b69: "GROUP_UNSET_CONTAINER",
  0x3b6a: "GROUP_GET_DEVICE_FD",
  0x3b6b: "DEVICE_GET_INFO",
  0x3b6c: "DEVICE_GET_REGION_INFO",
  0x3b6d: "DEVICE_GET_IRQ_INFO",
  0x3b6e: "DEVICE_SET_IRQS",
  0x3b6f: "DEVICE_RESET",
  0x3b70: "IOMMU_GET_INFO",
  0x3b71: "IOMMU_MAP_DMA",
  0x3b72: "IOMMU_UNMAP_DMA",
};

/** Bytes of the model's file between the beginnings of two regions. */
const REGION_STRIDE = 2 ** 20;

/** A region of the function; index 7 is config space. */
export interface ModelRegion {
  flags: number;
  size: number;
  /** Parts that can be mapped, for SPARSE_MMAP. */
  sparse?: readonly (readonly [offset: number, size: number])[];
}

/** What the model's kernel offers; a test changes it before it opens the function. */
export interface ModelFacts {
  address: string;
  vendor: string;
  device: string;
  driver: string | undefined;
  group: number | undefined;
  groupName: string | undefined;
  /** Others in the group, with their drivers. */
  others: Readonly<Record<string, string>>;
  viable: boolean;
  version: number;
  hasType1v2: boolean;
  iovaRanges: readonly (readonly [start: bigint, end: bigint])[] | undefined;
  pageSizes: bigint;
  dmaAvail: number | undefined;
  deviceFlags: number;
  regions: Readonly<Record<number, ModelRegion>>;
  /** Interrupts by index: flags, count. */
  irqs: Readonly<Record<number, readonly [flags: number, count: number]>>;
  numRegions: number;
  numIrqs: number;
}

/** A virtio-blk function as QEMU makes it. */
export const USUAL: ModelFacts = {
  address: "0000:00:04.0",
  vendor: "0x1af4",
  device: "0x1042",
  driver: "vfio-pci",
  group: 7,
  groupName: undefined,
  others: {},
  viable: true,
  version: 0,
  hasType1v2: true,
  iovaRanges: [
    [0n, 0xfedf_ffffn],
    [0xfef0_0000n, 0x7f_ffff_ffffn],
  ],
  pageSizes: 0x4020_1000n,
  dmaAvail: 65_535,
  deviceFlags: 0x3,
  regions: {
    0: { flags: 3, size: 128 },
    1: { flags: 7, size: 4096 },
    4: {
      flags: 0xf,
      size: 0x4000,
      sparse: [
        [0, 0x1000],
        [0x2000, 0x2000],
      ],
    },
    5: { flags: 1, size: 4096 },
    7: { flags: 3, size: 4096 },
  },
  irqs: { 0: [7, 1], 1: [9, 0], 2: [9, 3], 3: [9, 1], 4: [9, 1] },
  numRegions: 9,
  numIrqs: 5,
};

/** What the kernel does instead of answering: a negative errno, or an answer of a test's own. */
export type Interception = (name: string, argument: number | Uint8Array) => number | undefined;

export class VfioKernel {
  readonly facts: ModelFacts;
  readonly folder = mkdtempSync(join(tmpdir(), "virtio-vfio-"));
  readonly sysfs = join(this.folder, "sys");
  readonly devices = join(this.folder, "vfio");
  /** Requests and closed descriptors, in order. */
  readonly log: string[] = [];
  /** Mapped memory: size by IOVA. */
  readonly dma = new Map<number, number>();
  /** Enabled interrupts: descriptors by index. */
  readonly enabled = new Map<number, readonly number[]>();
  /** What is masked: INTx, after it has signalled. */
  masked = false;
  resets = 0;
  intercept: Interception = () => undefined;
  /** The memory file with the regions. */
  deviceFd = -1;
  #attached = false;
  #iommu = false;

  constructor(facts: Partial<ModelFacts> = {}) {
    this.facts = { ...USUAL, ...facts };
    const { address, vendor, device, driver, group, groupName, others } = this.facts;
    const functions = join(this.sysfs, "bus/pci/devices");
    const drivers = join(this.sysfs, "bus/pci/drivers");
    const put = (name: string, bound: string | undefined) => {
      const folder = join(functions, name);
      mkdirSync(folder, { recursive: true });
      writeFileSync(join(folder, "vendor"), `${vendor}\n`);
      writeFileSync(join(folder, "device"), `${device}\n`);
      writeFileSync(join(folder, "class"), "0x010000\n");
      if (bound !== undefined) {
        mkdirSync(join(drivers, bound), { recursive: true });
        symlinkSync(join(drivers, bound), join(folder, "driver"));
      }
      if (group === undefined) return;
      const members = join(this.sysfs, "kernel/iommu_groups", String(group), "devices");
      mkdirSync(members, { recursive: true });
      symlinkSync(join(members, ".."), join(folder, "iommu_group"));
      symlinkSync(folder, join(members, name));
      if (groupName !== undefined) writeFileSync(join(members, "..", "name"), `${groupName}\n`);
    };
    put(address, driver);
    for (const [name, bound] of Object.entries(others)) put(name, bound);
    mkdirSync(this.devices);
    writeFileSync(join(this.devices, "vfio"), "");
    if (group !== undefined) writeFileSync(join(this.devices, String(group)), "");
  }

  /** What `openVfio` is told of this machine. */
  get roots(): { sysfs: string; devices: string } {
    return { sysfs: this.sysfs, devices: this.devices };
  }

  /** Remove the folder. */
  remove(): void {
    rmSync(this.folder, { recursive: true });
  }

  /** Answer a request; undefined when the descriptor is none of the model's. */
  ioctl(fd: number, request: number, argument: number | Uint8Array): number | undefined {
    const node = this.#nodeOf(fd);
    if (node === undefined) return undefined;
    const name = NAMES[request] ?? `request ${request}`;
    this.log.push(name);
    const replaced = this.intercept(name, argument);
    if (replaced !== undefined) return replaced;
    if (typeof argument === "number") return this.#plain(node, name, argument);
    return this.#withStruct(node, name, argument, new DataView(argument.buffer, argument.byteOffset, argument.length));
  }

  /** A descriptor is closed: the model forgets what hung on it. */
  onClose(fd: number): void {
    const node = this.#nodeOf(fd);
    if (node === undefined) return;
    this.log.push(`close ${node}`);
    if (node === "device") {
      this.enabled.clear();
      this.deviceFd = -1;
    } else if (node === "group") this.#attached = false;
    else this.dma.clear();
  }

  /** Which of the model's files this process has open. */
  get open(): string[] {
    return readdirSync("/proc/self/fd").flatMap((fd) => this.#nodeOf(Number(fd)) ?? []);
  }

  /** Which of the model's files a descriptor is of. */
  #nodeOf(fd: number): "container" | "group" | "device" | undefined {
    if (fd >= 0 && fd === this.deviceFd) return "device";
    let path: string;
    try {
      path = readlinkSync(`/proc/self/fd/${fd}`);
    } catch {
      return undefined;
    }
    if (path === join(this.devices, "vfio")) return "container";
    return path === join(this.devices, String(this.facts.group)) ? "group" : undefined;
  }

  #plain(node: string, name: string, argument: number): number {
    const { version, hasType1v2, deviceFlags } = this.facts;
    switch (`${node} ${name}`) {
      case "container GET_API_VERSION":
        return version;
      case "container CHECK_EXTENSION":
        return hasType1v2 && argument === 3 ? 1 : 0;
      case "container SET_IOMMU":
        if (!this.#attached || this.#iommu || argument !== 3) return -errno.EINVAL;
        this.#iommu = true;
        return 0;
      case "group GROUP_UNSET_CONTAINER":
        if (this.deviceFd >= 0) return -errno.EBUSY;
        if (!this.#attached) return -errno.EINVAL;
        this.#attached = false;
        this.#iommu = false;
        return 0;
      case "device DEVICE_RESET":
        if ((deviceFlags & 1) === 0) return -errno.EINVAL;
        this.resets++;
        return 0;
      default:
        return -errno.ENOTTY;
    }
  }

  #withStruct(node: string, name: string, bytes: Uint8Array, view: DataView): number {
    const { facts } = this;
    const argsz = bytes.length < 4 ? 0 : view.getUint32(0, LE);
    switch (`${node} ${name}`) {
      case "group GROUP_GET_STATUS":
        if (argsz < 8) return -errno.EINVAL;
        view.setUint32(4, (facts.viable ? 1 : 0) | (this.#attached ? 2 : 0), LE);
        return 0;
      case "group GROUP_SET_CONTAINER":
        if (this.#attached || this.#nodeOf(view.getInt32(0, LE)) !== "container") return -errno.EINVAL;
        this.#attached = true;
        return 0;
      case "group GROUP_GET_DEVICE_FD":
        if (!this.#iommu) return -errno.EINVAL;
        if (Buffer.from(bytes).toString("latin1") !== `${facts.address}\0`) return -errno.ENODEV;
        this.deviceFd = createMemfd("vfio-model", 9 * REGION_STRIDE);
        return this.deviceFd;
      case "container IOMMU_GET_INFO":
        return this.#iommu ? this.#answer(bytes, argsz, this.#type1Info(), 24, 16) : -errno.EINVAL;
      case "container IOMMU_MAP_DMA":
        return this.#mapDma(view);
      case "container IOMMU_UNMAP_DMA":
        return this.#unmapDma(view);
      case "device DEVICE_GET_INFO":
        view.setUint32(4, facts.deviceFlags, LE);
        view.setUint32(8, facts.numRegions, LE);
        view.setUint32(12, facts.numIrqs, LE);
        return argsz < 20 ? -errno.EINVAL : 0;
      case "device DEVICE_GET_REGION_INFO":
        if (argsz < 32 || view.getUint32(8, LE) >= facts.numRegions) return -errno.EINVAL;
        return this.#answer(bytes, argsz, this.#regionInfo(view.getUint32(8, LE)), 32, 12);
      case "device DEVICE_GET_IRQ_INFO": {
        const index = view.getUint32(8, LE);
        if (argsz < 16 || index >= facts.numIrqs) return -errno.EINVAL;
        const [flags, count] = facts.irqs[index] ?? [0, 0];
        view.setUint32(4, flags, LE);
        view.setUint32(12, count, LE);
        return 0;
      }
      case "device DEVICE_SET_IRQS":
        return argsz === bytes.length ? this.#setIrqs(view) : -errno.EINVAL;
      default:
        return -errno.ENOTTY;
    }
  }

  /** Give a struct as Linux does: without its capabilities, and with their size, when there is no room for them. */
  #answer(into: Uint8Array, argsz: number, answer: Uint8Array, size: number, capOffset: number): number {
    if (argsz < size || argsz !== into.length) return -errno.EINVAL;
    const fits = answer.length <= argsz;
    into.set(fits ? answer : answer.subarray(0, size));
    const view = new DataView(into.buffer, into.byteOffset);
    view.setUint32(0, fits ? argsz : answer.length, LE);
    if (!fits) view.setUint32(capOffset, 0, LE);
    return 0;
  }

  #type1Info(): Uint8Array {
    const { iovaRanges, pageSizes, dmaAvail } = this.facts;
    const ranges = iovaRanges === undefined ? 0 : 16 + 16 * iovaRanges.length;
    const view = new DataView(new ArrayBuffer(24 + ranges + (dmaAvail === undefined ? 0 : 16)));
    const hasCaps = view.byteLength > 24;
    view.setUint32(4, hasCaps ? 3 : 1, LE);
    view.setBigUint64(8, pageSizes, LE);
    view.setUint32(16, hasCaps ? 24 : 0, LE);
    if (iovaRanges !== undefined) {
      view.setUint16(24, 1, LE);
      view.setUint32(28, dmaAvail === undefined ? 0 : 24 + ranges, LE);
      view.setUint32(32, iovaRanges.length, LE);
      iovaRanges.forEach(([start, end], index) => {
        view.setBigUint64(40 + 16 * index, start, LE);
        view.setBigUint64(48 + 16 * index, end, LE);
      });
    }
    if (dmaAvail !== undefined) {
      view.setUint16(24 + ranges, 3, LE);
      view.setUint32(32 + ranges, dmaAvail, LE);
    }
    return new Uint8Array(view.buffer);
  }

  #regionInfo(index: number): Uint8Array {
    const { flags, size, sparse } = this.facts.regions[index] ?? { flags: 0, size: 0 };
    const view = new DataView(new ArrayBuffer(sparse === undefined ? 32 : 48 + 16 * sparse.length));
    view.setUint32(4, flags, LE);
    view.setUint32(8, index, LE);
    view.setBigUint64(16, BigInt(size), LE);
    view.setBigUint64(24, BigInt(index * REGION_STRIDE), LE);
    if (sparse !== undefined) {
      view.setUint32(12, 32, LE);
      view.setUint16(32, 1, LE);
      view.setUint32(40, sparse.length, LE);
      sparse.forEach(([offset, length], at) => {
        view.setBigUint64(48 + 16 * at, BigInt(offset), LE);
        view.setBigUint64(56 + 16 * at, BigInt(length), LE);
      });
    }
    return new Uint8Array(view.buffer);
  }

  #mapDma(view: DataView): number {
    const [vaddr, iova, size] = [8, 16, 24].map((at) => Number(view.getBigUint64(at, LE)));
    const ranges = this.facts.iovaRanges ?? [];
    if (view.getUint32(0, LE) !== 32 || view.getUint32(4, LE) !== 3 || !this.#iommu) return -errno.EINVAL;
    if (vaddr === 0 || [vaddr, iova, size].some((value) => value % 4096 !== 0)) return -errno.EINVAL;
    if (!ranges.some(([start, end]) => iova >= start && iova + size - 1 <= end)) return -errno.EINVAL;
    if ([...this.dma].some(([at, length]) => at < iova + size && iova < at + length)) return -errno.EEXIST;
    this.dma.set(iova, size);
    return 0;
  }

  #unmapDma(view: DataView): number {
    const [iova, size] = [8, 16].map((at) => Number(view.getBigUint64(at, LE)));
    if (view.getUint32(0, LE) !== 24 || view.getUint32(4, LE) !== 0) return -errno.EINVAL;
    const mapped = this.dma.get(iova);
    view.setBigUint64(16, BigInt(mapped === size ? size : 0), LE);
    if (mapped === size) this.dma.delete(iova);
    return 0;
  }

  #setIrqs(view: DataView): number {
    const [flags, index, start, count] = [4, 8, 12, 16].map((at) => view.getUint32(at, LE));
    const [, available] = this.facts.irqs[index] ?? [0, 0];
    if (start !== 0 || count > available || index >= this.facts.numIrqs) return -errno.EINVAL;
    if (flags === 0x21 && count === 0) {
      if (!this.enabled.delete(index)) return -errno.EINVAL;
      return 0;
    }
    if (flags === 0x11 && index === 0 && count === 1) {
      this.masked = false;
      return this.enabled.has(0) ? 0 : -errno.EINVAL;
    }
    // One vector more cannot be added: NORESIZE. INTx and MSI-X exclude each other.
    const excluded = { 0: 2, 2: 0 }[index];
    if (flags !== 0x24 || count === 0 || this.enabled.has(index)) return -errno.EINVAL;
    if (excluded !== undefined && this.enabled.has(excluded)) return -errno.EINVAL;
    this.enabled.set(
      index,
      Array.from({ length: count }, (_, at) => view.getInt32(20 + 4 * at, LE)),
    );
    return 0;
  }
}
