/** A driver of a fake PCI function that does what it is told, rule or no rule, register by register. */

import { MemoryRegion } from "../../src/memory/index.js";
import { VirtioPciCommon } from "../../src/protocol/index.js";
import { EventFd } from "../../src/sys/index.js";
import { FakePciFunction, type FakePciOptions } from "../../src/testing/index.js";
import { VirtioFeature, VirtqueueLayout } from "../../src/virtqueue/index.js";

/** What every device here offers. */
export const BASE = VirtioFeature.VERSION_1 | VirtioFeature.ACCESS_PLATFORM;
type Register = keyof typeof VirtioPciCommon;

/** The driver. */
export class Hand {
  readonly fn: FakePciFunction;
  readonly common;
  readonly bar;

  constructor(options: FakePciOptions = {}) {
    this.fn = new FakePciFunction({ queueSizes: [16, 16], config: new Uint8Array(8), ...options });
    this.fn.writeConfig(4, 2, 2);
    this.common = this.fn.openRegisters(4, 0, 0x3c);
    this.bar = this.fn.openRegisters(4, 0x1000, 0x3000);
  }

  write(name: Register, value: number): this {
    const { offset, width } = VirtioPciCommon[name];
    this.common.write(offset, width, value);
    return this;
  }

  read(name: Register): number {
    const { offset, width } = VirtioPciCommon[name];
    return this.common.read(offset, width);
  }

  /** Up to FEATURES_OK, with these features. */
  agree(features = BASE): this {
    this.write("DEVICE_STATUS", 1).write("DEVICE_STATUS", 3);
    for (const [select, shift] of [
      [0, 0n],
      [1, 32n],
    ] as const) {
      this.write("DRIVER_FEATURE_SELECT", select);
      this.write("DRIVER_FEATURE", Number((features >> shift) & 0xffff_ffffn));
    }
    return this.write("DEVICE_STATUS", 11);
  }

  /** Set queue 0 up at an address. */
  place(iova: number, size = 16): this {
    const layout = new VirtqueueLayout({ queueSize: size });
    this.write("QUEUE_SELECT", 0);
    const areas = [iova, iova + layout.driverAreaOffset, iova + layout.deviceAreaOffset];
    const names = ["DESC", "DRIVER", "DEVICE"] as const;
    names.forEach((name, i) => {
      this.write(`QUEUE_${name}_LO`, areas[i] % 2 ** 32);
      this.write(`QUEUE_${name}_HI`, Math.floor(areas[i] / 2 ** 32));
    });
    return this.write("QUEUE_ENABLE", 1);
  }
}

/** Where the memory of a running queue lies. */
export const IOVA = 0x5_4000_0000;

/** A driver whose queue 0 runs. */
export function running(t: { after(close: () => void): void }, options: FakePciOptions = {}, features = BASE) {
  const hand = new Hand(options);
  const region = MemoryRegion.create({ name: "fake-pci-test", size: 1, iova: IOVA });
  const event = EventFd.create();
  t.after(() => {
    region.close();
    event.close();
  });
  hand.fn.mapDma(region);
  if (hand.fn.msixVectors > 0) hand.fn.setMsix([event]);
  hand.fn.writeConfig(4, 2, 6);
  hand.agree(features).place(IOVA).write("DEVICE_STATUS", 15);
  return { hand, region, event };
}
