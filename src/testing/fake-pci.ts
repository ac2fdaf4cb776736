/** A virtio device on a PCI function that exists in this process only, register by register: what tests drive instead of VFIO. */

import { checkInteger, checkOptions, rangeError, typeError, VirtioError } from "../errors.js";
import type { IovaRange, MemoryRegion } from "../memory/index.js";
import { VirtioStatus } from "../protocol/device-status.js";
import { PciCommand, PciConfigField, VirtioPciIsr } from "../protocol/virtio-pci.js";
import type { EventFd, RegisterWidth } from "../sys/index.js";
import type { PciFunction, PciRegisters } from "../transports/pci/function.js";
import { DeviceMemory } from "../virtqueue/device-memory.js";
import { VirtioFeature } from "../virtqueue/features.js";
import { VIRTQUEUE_MAX_SIZE } from "../virtqueue/defs.js";
import { checkQueueSize, VirtqueueLayout } from "../virtqueue/layout.js";
import { FakeDevice } from "./fake-device.js";
import { FakeCommon, type FakeCommonHost, FakeQueueRegisters } from "./fake-pci-common.js";
import {
  buildConfigSpace,
  type FakePciCapability,
  type FakeStructure,
  readField,
  standardCapabilities,
  structuresOf,
  writeField,
} from "./fake-pci-space.js";
import { FakeQueue } from "./fake-transport.js";

/** A call of {@link PciFunction} that is neither a register nor config space. */
export type FakePciCall =
  | "openRegisters"
  | "setMsix"
  | "setIntx"
  | "unmaskIntx"
  | "setRelease"
  | "mapDma"
  | "unmapDma"
  | "reset"
  | "close";

/** One thing that a driver did to a {@link FakePciFunction}; see `FakePciFunction.log`. */
export interface FakePciAccess {
  /** What was done. */
  readonly kind: "read" | "write" | "call";
  /** Config space, one of the virtio structures, or the function as a whole. */
  readonly target: "config" | FakeStructure["target"] | "function";
  /** The register of the common configuration, the call; else empty. */
  readonly name: string;
  /** Bytes from the start of the structure or config space; for a call 0. */
  readonly offset: number;
  /** Bytes; for a call 0. */
  readonly width: number;
  /** What was written or read; for calls the number of vectors, the IOVA, or the BAR. */
  readonly value: number;
}

/** What a {@link FakePciFunction} is made from. */
export interface FakePciOptions {
  /** PCI device id. Default 0x1042: virtio-blk. */
  readonly deviceId?: number;
  /** Default 1. */
  readonly revision?: number;
  /** Feature bits that the device offers. Default: VERSION_1 and ACCESS_PLATFORM. */
  readonly features?: bigint;
  /** The device's config space; copied. Default: it has none. */
  readonly config?: Uint8Array;
  /** The largest size of each queue, a power of two, or 0 for one that is not there. Default: one queue of 256. */
  readonly queueSizes?: readonly number[];
  /** `notify_off_multiplier`. Default 4. */
  readonly notifyMultiplier?: number;
  /** `queue_notify_off` of each queue. Default: its index. */
  readonly notifyOffsets?: readonly number[];
  /** Vectors of MSI-X, 0 for none. Default: one for each queue and one for the config. */
  readonly msixVectors?: number;
  /** Whether it can raise INTx. Default true. */
  readonly hasIntx?: boolean;
  /** Whether the function can be reset as a whole. Default true. */
  readonly canReset?: boolean;
  /** What stands in config space, given what would by default. */
  readonly capabilities?: (standard: readonly FakePciCapability[]) => readonly FakePciCapability[];
  /** Bytes of the BARs, by number. Default: BAR 4 with 64 KiB. */
  readonly bars?: Readonly<Record<number, number>>;
  /** Those of the BARs that are of I/O ports. Default: none. */
  readonly ioBars?: readonly number[];
  /** Regions that can be mapped at the same time. Default 64. */
  readonly maxRegions?: number;
  /**
   * What the device does when the driver notifies a queue. Called in a microtask; afterwards the device asks for the
   * next notification. Default: nothing.
   */
  readonly onNotify?: (queue: FakeQueue) => void;
}

const KNOWN_OPTIONS = [
  ...["deviceId", "revision", "features", "config", "queueSizes", "notifyMultiplier", "notifyOffsets", "msixVectors"],
  ...["hasIntx", "canReset", "capabilities", "bars", "ioBars", "maxRegions", "onNotify"],
];

/** Addresses that the IOMMU takes; the upper half is not 0, so that mixing halves up shows. */
const IOVA_RANGES: readonly IovaRange[] = [{ start: 0x5_4000_0000, end: 2 ** 39 - 1 }];
/** What `queue_notif_config_data` of queue 0 is; the others follow. */
const NOTIF_CONFIG_DATA = 0x4a00;
const MAX_REGIONS = 64;

/**
 * A model of a virtio PCI device behind the interface that VFIO is behind, with rings in real shared memory and real
 * event descriptors. It keeps a log of every access, and insists on the rules: an access of the wrong width or out of
 * order, to a register that is read-only, with memory decode off, a DMA without bus mastering or to memory that is not
 * mapped, is written down in `violations`, and throws. Requests are answered as a test tells it.
 *
 * The queues of this device want their three areas one behind the other, as `VirtqueueLayout` has them.
 *
 * @throws RangeError or TypeError for a wrong option.
 * @example
 * ```ts
 * import { BlockDevice, Pci } from "virtio-driver";
 * import { encodeBlkConfig } from "virtio-driver/protocol";
 * import { FakePciFunction, takeBlk } from "virtio-driver/testing";
 *
 * const fn = new FakePciFunction({
 *   config: encodeBlkConfig({ capacity: 2048n }),
 *   onNotify: (queue) => {
 *     for (const request of takeBlk(queue)) request.answer({ data: new Uint8Array(request.room).fill(7) });
 *   },
 * });
 * const disk = await BlockDevice.open(await Pci.attach(fn));
 * const { buffer, bytesRead } = await disk.read(new Uint8Array(512));
 * console.log(bytesRead, buffer[511]); // 512 7
 * await disk.close();
 * console.log(fn.written("DEVICE_STATUS").join(" ")); // 0 1 3 11 15 0
 * console.log(fn.violations.length); // 0
 * ```
 */
export class FakePciFunction implements PciFunction {
  readonly address = "0000:00:04.0";
  readonly configSize = 256;
  readonly msixVectors: number;
  readonly hasIntx: boolean;
  readonly canReset: boolean;
  readonly iovaRanges = IOVA_RANGES;
  readonly maxRegions: number;

  /** Everything that the driver did, in order. */
  readonly log: FakePciAccess[] = [];
  /** Rules that the driver broke. */
  readonly violations: string[] = [];
  /** Called before each access; what it throws is what the access fails with. */
  onAccess: ((access: FakePciAccess) => void) | undefined = undefined;
  /** The 256 bytes of config space; a test may damage them. */
  readonly space: Uint8Array;
  /** The device's config as it is now; see {@link changeConfig}. */
  readonly config: Uint8Array;
  /** All memory that the device can reach, as its IOMMU has it. */
  readonly memory = new DeviceMemory();
  /** Stretches of BARs that were made reachable, and whether they are still. */
  readonly opened: { readonly bar: number; readonly offset: number; readonly length: number; isOpen: boolean }[] = [];

  /** Status reads that still show the old status after a reset began; infinity for a device that is stuck. */
  resetReads = 0;
  /** The same for reads of `queue_reset`. */
  queueResetReads = 0;
  /** Whether FEATURES_OK reads back as 0. */
  refusesFeatures = false;
  /** Whether the device takes a vector for a queue, or for the config (undefined); others read back as NO_VECTOR. */
  takesVector: (vector: number, queue: number | undefined) => boolean = () => true;

  private readonly features: bigint;
  private readonly common: FakeCommon;
  private readonly structures: readonly FakeStructure[];
  private readonly bars: Readonly<Record<number, number>>;
  private readonly ioBars: readonly number[];
  private readonly onNotify: (queue: FakeQueue) => void;
  private readonly regions = new Set<MemoryRegion>();
  private readonly running = new Map<number, FakeQueue>();
  private vectors: readonly EventFd[] = [];
  private intx: EventFd | undefined = undefined;
  private isIntxMasked = false;
  private isr = 0;
  private release: EventFd | undefined = undefined;
  private isRemoved = false;
  private isClosed = false;

  constructor(options: FakePciOptions = {}) {
    checkOptions("FakePciFunction", options, KNOWN_OPTIONS);
    const { deviceId = 0x1042, revision = 1, bars = { 4: 0x1_0000 }, ioBars = [], onNotify = () => {} } = options;
    const { features = VirtioFeature.VERSION_1 | VirtioFeature.ACCESS_PLATFORM, queueSizes = [256] } = options;
    const { notifyMultiplier = 4, notifyOffsets = [], config = new Uint8Array(0), capabilities } = options;
    if (typeof features !== "bigint") throw typeError("features", "a bigint", features);
    if (typeof onNotify !== "function") throw typeError("onNotify", "a function", onNotify);
    if (!(config instanceof Uint8Array)) throw typeError("config", "a Uint8Array", config);
    for (const size of queueSizes) {
      // A device that presented another would refuse drivers without RING_PACKED.
      if (checkInteger("queueSizes", size, 0, VIRTQUEUE_MAX_SIZE) > 0) checkQueueSize(size, false);
    }
    this.msixVectors = checkInteger("msixVectors", options.msixVectors ?? queueSizes.length + 1, 0, 2048);
    this.maxRegions = checkInteger("maxRegions", options.maxRegions ?? MAX_REGIONS, 1, MAX_REGIONS);
    this.hasIntx = options.hasIntx ?? true;
    this.canReset = options.canReset ?? true;
    this.features = features;
    this.bars = bars;
    this.ioBars = ioBars;
    this.onNotify = onNotify;
    this.config = config.slice();
    const standard = standardCapabilities(queueSizes.length, config.length, notifyMultiplier);
    const present = capabilities?.(standard) ?? standard;
    this.space = buildConfigSpace({ deviceId, revision, msixVectors: this.msixVectors, capabilities: present, ioBars });
    this.structures = structuresOf(present, (bar) => this.barSize(bar));
    this.common = new FakeCommon(
      this.host(),
      queueSizes.map((size, i) => new FakeQueueRegisters(i, size, notifyOffsets[i] ?? i, NOTIF_CONFIG_DATA + i)),
    );
  }

  /** The status byte as the device has it. */
  get status(): number {
    return this.common.status;
  }

  /** Features that the driver has written. */
  get driverFeatures(): bigint {
    return this.common.driverFeatures;
  }

  /** The queues that run, by index. */
  get queues(): FakeQueue[] {
    return [...this.running.values()].sort((a, b) => a.index - b.index);
  }

  /** Regions that are mapped. */
  get regionsMapped(): number {
    return this.regions.size;
  }

  /** Whether the driver has given the function back. */
  get closed(): boolean {
    return this.isClosed;
  }

  /** The values written to a register of the common configuration, in order. */
  written(name: string): number[] {
    return this.log.filter((access) => access.kind === "write" && access.name === name).map(({ value }) => value);
  }

  /** The device changes its config from byte `offset` on, and says so. */
  changeConfig(bytes: Uint8Array, offset = 0): void {
    this.config.set(bytes, offset);
    this.common.generation++;
    this.interruptConfig();
  }

  /** The device meets an error and says DEVICE_NEEDS_RESET. */
  breakDown(): void {
    this.common.breakDown();
    this.interruptConfig();
  }

  /** Signal a config interrupt without a reason, as any device may. */
  interruptConfig(): void {
    this.raise(this.common.configVector, VirtioPciIsr.CONFIG);
  }

  /** The function is pulled out: everything reads as ones, and nothing that is written arrives. */
  remove(): void {
    this.isRemoved = true;
  }

  /** The system wants the function back. */
  requestRelease(): void {
    this.release?.signal();
  }

  readConfig(offset: number, width: RegisterWidth): number {
    this.checkConfigAccess(offset, width);
    const value = this.isRemoved ? ones(width) : readField(this.space, offset, width);
    this.note({ kind: "read", target: "config", name: "", offset, width, value });
    return value;
  }

  writeConfig(offset: number, width: RegisterWidth, value: number): void {
    this.checkConfigAccess(offset, width);
    this.note({ kind: "write", target: "config", name: "", offset, width, value });
    const { COMMAND } = PciConfigField;
    if (offset !== COMMAND.offset || width !== COMMAND.width) {
      this.violation(`${width} bytes at ${offset} of config space are not for a driver to write`);
    }
    if (!this.isRemoved) writeField(this.space, offset, { width }, value);
  }

  barSize(bar: number): number {
    return this.bars[bar] ?? 0;
  }

  openRegisters(bar: number, offset: number, length: number): PciRegisters {
    this.call("openRegisters", bar);
    const isInside = offset >= 0 && length > 0 && offset + length <= this.barSize(bar);
    if (!isInside) this.violation(`${length} bytes at ${offset} are not in BAR ${bar}`);
    const stretch = { bar, offset, length, isOpen: true };
    this.opened.push(stretch);
    const check = (at: number, width: number): number => {
      if (!stretch.isOpen) this.violation(`an access to BAR ${bar} after close`);
      if (at < 0 || at + width > length) this.violation(`an access to ${at}, beyond ${length} bytes`);
      return offset + at;
    };
    return {
      length,
      read: (at, width) => this.readRegister(bar, check(at, width), width),
      write: (at, width, value) => this.writeRegister(bar, check(at, width), width, truncate(value, width)),
      close: () => {
        stretch.isOpen = false;
      },
    };
  }

  setMsix(events: readonly EventFd[]): void {
    this.call("setMsix", events.length);
    if (events.length > this.msixVectors) this.violation(`${events.length} of ${this.msixVectors} vectors`);
    this.vectors = [...events];
  }

  setIntx(event: EventFd | undefined): void {
    this.call("setIntx", event === undefined ? 0 : 1);
    if (!this.hasIntx) this.violation("INTx of a function without it");
    this.intx = event;
    this.isIntxMasked = false;
  }

  unmaskIntx(): void {
    this.call("unmaskIntx", 0);
    this.isIntxMasked = false;
    this.signalIntx();
  }

  setRelease(event: EventFd | undefined): void {
    this.call("setRelease", event === undefined ? 0 : 1);
    this.release = event;
  }

  mapDma(region: MemoryRegion): void {
    this.call("mapDma", region.iova);
    if (this.regions.size === this.maxRegions) {
      throw new VirtioError("ERR_VIRTIO_MEMORY", `the IOMMU takes ${this.maxRegions} regions, and all are mapped`);
    }
    const [{ start, end }] = IOVA_RANGES;
    if (region.iova < start || region.iova + region.size - 1 > end) this.violation(`IOVA ${region.iova}`);
    this.memory.add(BigInt(region.iova), region.buffer);
    this.regions.add(region);
  }

  unmapDma(region: MemoryRegion): void {
    this.call("unmapDma", region.iova);
    if (!this.regions.has(region)) throw rangeError("region", "one that is mapped", region.iova);
    for (const { setup } of this.running.values()) {
      const isInside = setup.descriptorArea >= region.iova && setup.descriptorArea < region.iova + region.size;
      // One that may not access memory any more can be left alone.
      if (isInside && this.isMaster && !this.isRemoved)
        this.violation(`the memory of queue ${setup.index} was unmapped while it ran`);
    }
    this.regions.delete(region);
    this.memory.remove(region.buffer);
  }

  reset(): void {
    this.call("reset", 0);
    this.resetReads = 0;
    this.common.reset();
    writeField(this.space, PciConfigField.COMMAND.offset, PciConfigField.COMMAND, 0);
  }

  close(): void {
    if (this.isClosed) return;
    this.call("close", 0);
    this.isClosed = true;
    this.vectors = [];
    this.intx = undefined;
    this.release = undefined;
    for (const stretch of this.opened) stretch.isOpen = false;
    for (const region of this.regions) this.memory.remove(region.buffer);
    this.regions.clear();
  }

  private host(): FakeCommonHost {
    return {
      features: this.features,
      refusesFeatures: () => this.refusesFeatures,
      resetReads: () => this.resetReads,
      queueResetReads: () => this.queueResetReads,
      vectorsEnabled: () => this.vectors.length,
      takesVector: (vector, queue) => this.takesVector(vector, queue),
      violation: (rule) => this.violation(rule),
      startQueue: (queue) => this.startQueue(queue),
      stopQueue: (index) => this.running.delete(index),
    };
  }

  private readRegister(bar: number, address: number, width: RegisterWidth): number {
    const { target, at, name } = this.locate(bar, address, width);
    const value = this.isRemoved ? ones(width) : undefined;
    const access = { kind: "read", target, name: name ?? "", offset: at, width, value: value ?? 0 } as const;
    this.onAccess?.(access);
    const result = value ?? this.valueAt(target, name, at, width);
    this.log.push({ ...access, value: result });
    return result;
  }

  private valueAt(
    target: FakeStructure["target"],
    name: ReturnType<FakeCommon["find"]> | undefined,
    at: number,
    width: number,
  ): number {
    if (target === "common" && name !== undefined) return this.common.read(name);
    if (target === "device") return readField(this.config, at, width);
    if (target === "notify") return this.violation("the notification structure is not for reading");
    if (this.vectors.length > 0) this.violation("the ISR status was read while MSI-X is enabled");
    const { isr } = this;
    this.isr = 0;
    return isr;
  }

  private writeRegister(bar: number, address: number, width: RegisterWidth, value: number): void {
    const { target, at, name, multiplier } = this.locate(bar, address, width);
    this.note({ kind: "write", target, name: name ?? "", offset: at, width, value });
    if (this.isRemoved) return;
    if (target === "common" && name !== undefined) {
      this.common.write(name, value);
    } else if (target === "device") {
      const isAgreed = (this.status & VirtioStatus.FEATURES_OK) !== 0;
      if (!isAgreed) this.violation("the config was written before FEATURES_OK");
      writeField(this.config, at, { width }, value);
    } else if (target === "notify") {
      this.notified(at, width, value, multiplier);
    } else {
      this.violation("the ISR status is read-only");
    }
  }

  /** The structure and register at an address of a BAR. */
  private locate(bar: number, address: number, width: number) {
    const { MEMORY, IO } = PciCommand;
    if ((this.command & (this.ioBars.includes(bar) ? IO : MEMORY)) === 0 && !this.isRemoved) {
      this.violation(`an access to BAR ${bar} while it does not decode`);
    }
    if (address % width !== 0) this.violation(`${width} bytes at ${address} of BAR ${bar} are not aligned`);
    const found = this.structures.find(({ bar: in_, offset, length }) => {
      return in_ === bar && address >= offset && address + width <= offset + length;
    });
    if (found === undefined) return this.violation(`there is no virtio structure at ${address} of BAR ${bar}`);
    const { target, offset, multiplier } = found;
    const at = address - offset;
    return { target, at, multiplier, name: target === "common" ? this.common.find(at, width) : undefined };
  }

  private notified(at: number, width: number, value: number, multiplier: number): void {
    if ((this.status & VirtioStatus.DRIVER_OK) === 0) this.violation("a notification before DRIVER_OK");
    const { common } = this;
    const wide = common.has(VirtioFeature.NOTIFICATION_DATA);
    if (width !== (wide ? 4 : 2)) this.violation(`a notification of ${width} bytes`);
    const hasOwnValue = common.has(VirtioFeature.NOTIF_CONFIG_DATA);
    const target = common.queues.find(({ index, notifyOff, notifConfigData }) => {
      return notifyOff * multiplier === at && (value & 0xffff) === (hasOwnValue ? notifConfigData : index);
    });
    if (target === undefined) return this.violation(`a notification of ${value} at ${at}, which is no queue's`);
    const queue = this.running.get(target.index);
    if (queue === undefined) return this.violation(`a notification of queue ${target.index}, which does not run`);
    queue.notifications.push(value);
    queueMicrotask(() => queue.serve(this.onNotify, () => this.running.get(queue.index) === queue));
  }

  private startQueue(registers: FakeQueueRegisters): void {
    const { index, size } = registers;
    const { memory, driverFeatures: features } = this;
    const layout = new VirtqueueLayout({ queueSize: size, features });
    const [iova, driverArea, deviceArea] = [0, 1, 2].map((area) => registers.address(area));
    if (driverArea !== iova + layout.driverAreaOffset || deviceArea !== iova + layout.deviceAreaOffset) {
      this.violation(`the areas of queue ${index} are not one behind the other, which is all that this model can do`);
    }
    const region = [...this.regions].find((each) => {
      return iova >= each.iova && iova + layout.endOffset <= each.iova + each.size;
    });
    if (region === undefined) return this.violation(`the IOMMU blocks queue ${index} at ${iova}: nothing is mapped`);
    const ring = { layout, buffer: region.buffer, offset: iova - region.iova, iova, features, memory };
    const isLive = (): boolean => this.running.get(index) === queue && !this.isRemoved;
    const queue: FakeQueue = new FakeQueue(
      { index, size, descriptorArea: iova, driverArea, deviceArea },
      new FakeDevice(ring),
      {
        get fd() {
          return isLive() ? index : -1;
        },
        signal: () => {
          if (isLive()) this.raise(registers.vector, VirtioPciIsr.QUEUE);
        },
      },
    );
    this.running.set(index, queue);
    if (!this.isMaster) this.violation(`queue ${index} was started without bus mastering`);
  }

  private raise(vector: number, reason: number): void {
    if (this.isRemoved) return;
    if (this.vectors.length > 0) {
      if (!this.isMaster) this.violation("an MSI-X message without bus mastering");
      this.vectors[vector]?.signal();
      return;
    }
    this.isr |= reason;
    this.signalIntx();
  }

  private signalIntx(): void {
    if (this.isr === 0 || this.isIntxMasked || this.intx === undefined) return;
    this.isIntxMasked = true;
    this.intx.signal();
  }

  private get command(): number {
    return readField(this.space, PciConfigField.COMMAND.offset, PciConfigField.COMMAND.width);
  }

  private get isMaster(): boolean {
    return (this.command & PciCommand.MASTER) !== 0;
  }

  private checkConfigAccess(offset: number, width: number): void {
    if (this.isClosed) this.violation("an access to config space after close");
    if (offset < 0 || offset + width > this.space.length || offset % width !== 0) {
      this.violation(`${width} bytes at ${offset} of config space`);
    }
  }

  private call(name: FakePciCall, value: number): void {
    if (this.isClosed) this.violation(`${name} after close`);
    this.note({ kind: "call", target: "function", name, offset: 0, width: 0, value });
  }

  private note(access: FakePciAccess): void {
    this.onAccess?.(access);
    this.log.push(access);
  }

  private violation(rule: string): never {
    this.violations.push(rule);
    throw new Error(`the driver broke a rule: ${rule}`);
  }
}

function ones(width: number): number {
  return 2 ** (8 * width) - 1;
}

function truncate(value: number, width: number): number {
  return width === 4 ? value >>> 0 : value & ones(width);
}
