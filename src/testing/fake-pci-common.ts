/** The common configuration of a fake PCI device: every register, and every rule for using it. */

import { statusNames, VirtioStatus } from "../protocol/device-status.js";
import { type PciField, VIRTIO_MSI_NO_VECTOR, VirtioPciCommon } from "../protocol/virtio-pci.js";
import { VirtioFeature } from "../virtqueue/features.js";

/** A register of `struct virtio_pci_common_cfg`. */
export type FakePciRegister = keyof typeof VirtioPciCommon;

const REGISTERS = Object.entries(VirtioPciCommon) as [FakePciRegister, PciField][];

/** Registers that no driver may write. */
const READ_ONLY: readonly FakePciRegister[] = [
  "DEVICE_FEATURE",
  "NUM_QUEUES",
  "CONFIG_GENERATION",
  "QUEUE_NOTIFY_OFF",
  "QUEUE_NOTIF_CONFIG_DATA",
];

/** Registers that hold a part of an address. */
const ADDRESSES: readonly FakePciRegister[] = [
  ...(["QUEUE_DESC_LO", "QUEUE_DESC_HI", "QUEUE_DRIVER_LO"] as const),
  ...(["QUEUE_DRIVER_HI", "QUEUE_DEVICE_LO", "QUEUE_DEVICE_HI"] as const),
];

/** A queue as its registers have it. */
export class FakeQueueRegisters {
  readonly index: number;
  readonly maxSize: number;
  readonly notifyOff: number;
  readonly notifConfigData: number;
  size: number;
  vector = VIRTIO_MSI_NO_VECTOR;
  isEnabled = false;
  /** Reads of `queue_reset` until a reset is done; -1 when there is none. */
  resetReads = -1;
  /** Address halves in the order of the registers. */
  readonly addresses = new Uint32Array(ADDRESSES.length);

  constructor(index: number, maxSize: number, notifyOff: number, notifConfigData: number) {
    this.index = index;
    this.maxSize = maxSize;
    this.notifyOff = notifyOff;
    this.notifConfigData = notifConfigData;
    this.size = maxSize;
  }

  /** Address of the descriptor area (0), driver area (1) or device area (2). */
  address(area: number): number {
    return this.addresses[2 * area + 1] * 2 ** 32 + this.addresses[2 * area];
  }

  reset(): void {
    this.size = this.maxSize;
    this.vector = VIRTIO_MSI_NO_VECTOR;
    this.isEnabled = false;
    this.resetReads = -1;
    this.addresses.fill(0);
  }
}

/** What the registers do to the rest of the device. */
export interface FakeCommonHost {
  readonly features: bigint;
  refusesFeatures(): boolean;
  resetReads(): number;
  queueResetReads(): number;
  /** Vectors that MSI-X was enabled with; 0 when it is not. */
  vectorsEnabled(): number;
  /** Whether the device takes a vector, for a queue or, undefined, the config. */
  takesVector(vector: number, queue: number | undefined): boolean;
  /** The driver broke a rule. */
  violation(rule: string): never;
  /** A queue is live from now on. */
  startQueue(queue: FakeQueueRegisters): void;
  /** A queue is no longer live. */
  stopQueue(index: number): void;
}

/** The registers. */
export class FakeCommon {
  readonly queues: readonly FakeQueueRegisters[];
  generation = 0;
  configVector = VIRTIO_MSI_NO_VECTOR;
  /** Features that the driver has written. */
  driverFeatures = 0n;

  private readonly host: FakeCommonHost;
  /** Bits that the driver has written, as far as they were taken. */
  private written = 0;
  /** The last value that the driver wrote, whatever was taken of it. */
  private asked = 0;
  private needsReset = false;
  private pendingReset = -1;
  private deviceSelect = 0;
  private driverSelect = 0;
  private queueSelect = 0;

  constructor(host: FakeCommonHost, queues: readonly FakeQueueRegisters[]) {
    this.host = host;
    this.queues = queues;
  }

  /** The status byte, without side effects. */
  get status(): number {
    return this.written | (this.needsReset ? VirtioStatus.DEVICE_NEEDS_RESET : 0);
  }

  has(feature: bigint): boolean {
    return (this.driverFeatures & feature) !== 0n;
  }

  /** Set DEVICE_NEEDS_RESET. */
  breakDown(): void {
    this.needsReset = true;
  }

  /** The register at `offset`, to be accessed by `width` bytes. */
  find(offset: number, width: number): FakePciRegister {
    const found = REGISTERS.find(([, field]) => offset >= field.offset && offset < field.offset + field.width);
    if (found === undefined) return this.host.violation(`there is no common register at ${offset}`);
    const [name, field] = found;
    if (field.offset === offset && field.width === width) return name;
    return this.host.violation(
      `${width} bytes at ${offset} are no access to ${name}, ${field.width} at ${field.offset}`,
    );
  }

  read(name: FakePciRegister): number {
    const queue = this.queues[this.queueSelect];
    const half = ADDRESSES.indexOf(name);
    if (half >= 0) return queue?.addresses[half] ?? 0;
    switch (name) {
      case "DEVICE_FEATURE_SELECT":
        return this.deviceSelect;
      case "DEVICE_FEATURE":
        return window(this.host.features, this.deviceSelect);
      case "DRIVER_FEATURE_SELECT":
        return this.driverSelect;
      case "DRIVER_FEATURE":
        return window(this.driverFeatures, this.driverSelect);
      case "CONFIG_MSIX_VECTOR":
        return this.configVector;
      case "NUM_QUEUES":
        return this.queues.length;
      case "DEVICE_STATUS":
        return this.readStatus();
      case "CONFIG_GENERATION":
        return this.generation & 0xff;
      case "QUEUE_SELECT":
        return this.queueSelect;
      case "QUEUE_SIZE":
        return queue?.size ?? 0;
      case "QUEUE_MSIX_VECTOR":
        return queue?.vector ?? VIRTIO_MSI_NO_VECTOR;
      case "QUEUE_ENABLE":
        return queue?.isEnabled ? 1 : 0;
      case "QUEUE_NOTIFY_OFF":
        return queue?.notifyOff ?? 0;
      case "QUEUE_NOTIF_CONFIG_DATA":
        this.must(this.has(VirtioFeature.NOTIF_CONFIG_DATA), `${name} is there with its feature only`);
        return queue?.notifConfigData ?? 0;
      case "QUEUE_RESET":
        this.must(this.has(VirtioFeature.RING_RESET), `${name} is there with its feature only`);
        return this.readQueueReset(queue);
      default:
        return this.host.violation(`no value of ${name}`);
    }
  }

  write(name: FakePciRegister, value: number): void {
    this.must(!READ_ONLY.includes(name), `${name} is read-only`);
    if (name === "DEVICE_STATUS") {
      this.writeStatus(value);
      return;
    }
    this.must(this.pendingReset < 0, `${name} was written before the reset was complete`);
    const isGivenUp = (this.asked & VirtioStatus.FAILED) !== 0;
    this.must(!isGivenUp, `${name} was written after FAILED`);
    switch (name) {
      case "DEVICE_FEATURE_SELECT":
        this.deviceSelect = value;
        break;
      case "DRIVER_FEATURE_SELECT":
        this.driverSelect = value;
        break;
      case "DRIVER_FEATURE":
        this.writeFeature(value);
        break;
      case "QUEUE_SELECT":
        this.queueSelect = value;
        break;
      case "CONFIG_MSIX_VECTOR":
        this.checkVector(name, value);
        this.configVector = this.taken(value, undefined);
        break;
      default:
        this.writeQueue(name, value);
    }
  }

  /** Everything as after switching on. */
  reset(): void {
    this.pendingReset = -1;
    this.written = 0;
    this.asked = 0;
    this.needsReset = false;
    this.driverFeatures = 0n;
    this.configVector = VIRTIO_MSI_NO_VECTOR;
    for (const queue of this.queues) {
      queue.reset();
      this.host.stopQueue(queue.index);
    }
  }

  private readStatus(): number {
    if (this.pendingReset === 0) this.reset();
    if (this.pendingReset < 0) return this.status;
    this.pendingReset--;
    // Anything but 0, also when it was 0 before.
    return this.status === 0 ? VirtioStatus.ACKNOWLEDGE : this.status;
  }

  private writeStatus(value: number): void {
    if (value === 0) {
      this.pendingReset = this.host.resetReads();
      if (this.pendingReset === 0) this.reset();
      return;
    }
    const { ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK } = VirtioStatus;
    this.must(this.pendingReset < 0, `status ${statusNames(value)} was written before the reset was complete`);
    this.must(
      (value & this.asked) === this.asked,
      `status ${statusNames(value)} clears bits of ${statusNames(this.asked)}`,
    );
    const order = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];
    order.forEach((bit, i) => {
      if ((value & bit) === 0 || i === 0) return;
      this.must((this.asked & order[i - 1]) !== 0, `status ${statusNames(value)} skips ${statusNames(order[i - 1])}`);
    });
    const isNew = (bit: number): boolean => (value & bit) !== 0 && (this.asked & bit) === 0;
    const wantsFeatures = isNew(FEATURES_OK);
    const goesLive = isNew(DRIVER_OK);
    this.asked = value;
    this.written = value & (this.written | ~FEATURES_OK);
    if (wantsFeatures && this.agrees()) this.written |= FEATURES_OK;
    if (!goesLive) return;
    this.must((this.written & FEATURES_OK) !== 0, "DRIVER_OK although the device refused the features");
    for (const queue of this.queues) if (queue.isEnabled) this.host.startQueue(queue);
  }

  private agrees(): boolean {
    return !this.host.refusesFeatures() && this.has(VirtioFeature.VERSION_1);
  }

  private writeFeature(value: number): void {
    const { DRIVER, FEATURES_OK } = VirtioStatus;
    this.must((this.asked & DRIVER) !== 0, "features were written before DRIVER");
    this.must((this.asked & FEATURES_OK) === 0, "features were written after FEATURES_OK");
    const shift = 32n * BigInt(this.driverSelect);
    const bits = BigInt(value >>> 0) << shift;
    this.must((bits & ~this.host.features) === 0n, `features 0x${bits.toString(16)} are not offered`);
    this.driverFeatures = (this.driverFeatures & ~(0xffff_ffffn << shift)) | bits;
  }

  private writeQueue(name: FakePciRegister, value: number): void {
    const queue = this.queues[this.queueSelect];
    if (queue === undefined || queue.maxSize === 0) {
      this.host.violation(`${name} of queue ${this.queueSelect}, which is not there`);
    }
    this.must((this.written & VirtioStatus.FEATURES_OK) !== 0, `${name} was written before FEATURES_OK`);
    if (name === "QUEUE_RESET") {
      this.must(value === 1 && queue.isEnabled, "queue_reset takes 1, of a queue that runs");
      this.must(this.has(VirtioFeature.RING_RESET), "queue_reset without RING_RESET");
      queue.resetReads = this.host.queueResetReads();
      return;
    }
    this.must(queue.resetReads < 0, `${name} of queue ${queue.index} was written before its reset was complete`);
    this.must(!queue.isEnabled, `${name} of queue ${queue.index} was written while it runs`);
    const half = ADDRESSES.indexOf(name);
    if (half >= 0) {
      queue.addresses[half] = value;
    } else if (name === "QUEUE_SIZE") {
      this.must(value > 0 && value <= queue.maxSize, `queue_size ${value}, at most ${queue.maxSize}`);
      const isPowerOfTwo = (value & (value - 1)) === 0;
      this.must(isPowerOfTwo || this.has(VirtioFeature.RING_PACKED), `queue_size ${value} of a split queue`);
      queue.size = value;
    } else if (name === "QUEUE_MSIX_VECTOR") {
      this.checkVector(name, value);
      queue.vector = this.taken(value, queue.index);
    } else {
      this.must(value === 1, `queue_enable ${value}`);
      this.must(
        [0, 1, 2].every((area) => queue.address(area) !== 0),
        `queue ${queue.index} has no addresses`,
      );
      queue.isEnabled = true;
      if ((this.written & VirtioStatus.DRIVER_OK) !== 0) this.host.startQueue(queue);
    }
  }

  private readQueueReset(queue: FakeQueueRegisters | undefined): number {
    if (queue === undefined || queue.resetReads < 0) return 0;
    if (queue.resetReads-- > 0) return 1;
    queue.reset();
    this.host.stopQueue(queue.index);
    return 0;
  }

  private checkVector(name: FakePciRegister, vector: number): void {
    const vectorsEnabled = this.host.vectorsEnabled();
    const isPossible = vector === VIRTIO_MSI_NO_VECTOR || vector < vectorsEnabled;
    this.must(isPossible, `${name} ${vector}, MSI-X is enabled with ${vectorsEnabled} vectors`);
  }

  private taken(vector: number, queue: number | undefined): number {
    return vector === VIRTIO_MSI_NO_VECTOR || this.host.takesVector(vector, queue) ? vector : VIRTIO_MSI_NO_VECTOR;
  }

  private must(holds: boolean, rule: string): void {
    if (!holds) this.host.violation(rule);
  }
}

function window(features: bigint, select: number): number {
  return Number((features >> (32n * BigInt(select))) & 0xffff_ffffn);
}
