/** What the PCI transport needs of one PCI function, whoever gives it: VFIO, or a model of a device in a test. */

import type { IovaRange, MemoryRegion } from "../../memory/index.js";
import type { EventFd, RegisterWidth } from "../../sys/index.js";

/**
 * A stretch of a BAR. Each call is one access of exactly that width, at a multiple of it. What is written to memory
 * before a `write` is visible to the device when it sees the write.
 */
export interface PciRegisters {
  /** Bytes. */
  readonly length: number;
  /** Read 1, 2 or 4 bytes, little-endian. */
  read(offset: number, width: RegisterWidth): number;
  /** Write 1, 2 or 4 bytes, little-endian. */
  write(offset: number, width: RegisterWidth, value: number): void;
  /** Unmap it. Idempotent. */
  close(): void;
}

/** A PCI function that this process owns. */
export interface PciFunction {
  /** Where it is: `0000:00:04.0`. */
  readonly address: string;
  /** Bytes of config space: 256, or 4096 for PCI Express. */
  readonly configSize: number;
  /** Read 1, 2 or 4 bytes of config space, aligned, little-endian. */
  readConfig(offset: number, width: RegisterWidth): number;
  /** Write 1, 2 or 4 bytes of config space. */
  writeConfig(offset: number, width: RegisterWidth, value: number): void;
  /** Bytes of BAR 0 to 5; 0 where there is none, or where its registers cannot be reached. */
  barSize(bar: number): number;
  /** Reach a stretch of a BAR, mapped where that is possible. Memory decode must be on before the first access. */
  openRegisters(bar: number, offset: number, length: number): PciRegisters;
  /** Vectors of MSI-X; 0 without MSI-X. */
  readonly msixVectors: number;
  /** Whether the function can raise INTx. */
  readonly hasIntx: boolean;
  /** Enable MSI-X with one event a vector, from vector 0 on; an empty list disables it. */
  setMsix(events: readonly EventFd[]): void;
  /** Let INTx signal `event`; undefined disables it. The interrupt is masked when it has signalled. */
  setIntx(event: EventFd | undefined): void;
  /** Let INTx signal again, after the device was asked why it did (ISR read). */
  unmaskIntx(): void;
  /** The device wants to be given back (VFIO's request interrupt): signals `event`; undefined disables it. */
  setRelease(event: EventFd | undefined): void;
  /** Addresses that the function can be given for memory. */
  readonly iovaRanges: readonly IovaRange[];
  /** Regions that can be mapped at the same time. */
  readonly maxRegions: number;
  /** Let the function reach a region at its IOVA. */
  mapDma(region: MemoryRegion): void;
  /** Take a region from the function. No access of it can follow. */
  unmapDma(region: MemoryRegion): void;
  /** Whether `reset` works. */
  readonly canReset: boolean;
  /** Reset the whole function, as if it had been switched off and on. */
  reset(): void;
  /** Disable interrupts, unmap what is mapped, give the function back. Idempotent. */
  close(): void;
}
