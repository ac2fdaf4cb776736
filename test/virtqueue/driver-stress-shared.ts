/** What both threads of the stress test agree on. */

/** Address of the first byte of the shared memory. */
export const STRESS_BASE = 0x3_0020_0000;
/** Bytes of the shared memory. */
export const STRESS_BYTES = 65536;
export const STRESS_REQUEST = { size: 32, align: 16 } as const;
/** Header of four words, one byte of trailer; the data are four bytes at 20. */
export const STRESS_FRAME = { headerLength: 16, trailerOffset: 16, trailerLength: 1 } as const;
export const STRESS_DATA_OFFSET = 20;

// Words of the shared doorbells: counters that only grow, and the end.
export const BELL_DEVICE = 0;
export const BELL_DRIVER = 1;
export const BELLS_STOP = 2;
/** 1: the device sleeps when it has nothing to do, and the driver does not; 0: the other way round. */
export const DEVICE_SLEEPS = 3;
export const BELLS_BYTES = 16;

export interface StressSetup {
  readonly fd: number;
  readonly features: bigint;
  readonly queueSize: number;
  readonly inOrder: boolean;
  readonly doorbells: SharedArrayBuffer;
}

/** No honest wait is longer: each ends with the next step of the other thread. */
const LOST_AFTER_MS = 5_000;
/** Looks at a bell before sleeping: most rings come at once, and sleeping costs as much as ten rounds. */
const LOOKS = 400;

/** Longer than the other side takes for a step, when both run at once; on a busy machine nothing is long enough. */
const MAX_DELAY = 400;

/** A delay that grows when the side that wants to sleep was too early and shrinks when it was too late. */
export class Aim {
  private delay = 0;

  /** Do nothing for the delay. */
  wait(bells: Int32Array): void {
    for (let i = this.delay; i > 0; i--) Atomics.load(bells, BELLS_STOP);
  }

  /** `late`: the other side had done its next step already. Small steps: the aim is to meet it. */
  adjust(late: boolean): void {
    this.delay = late ? Math.max(0, this.delay - 3) : Math.min(MAX_DELAY, this.delay + 3);
  }
}

/** Wait until the bell rings after it was seen at `seen`; a bell that never rings is a lost wake-up. */
export function waitFor(bells: Int32Array, bell: number, seen: number, lost: string): void {
  for (let i = 0; i < LOOKS; i++) if (Atomics.load(bells, bell) !== seen) return;
  if (Atomics.wait(bells, bell, seen, LOST_AFTER_MS) === "timed-out") throw new Error(lost);
}
