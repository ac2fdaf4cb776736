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

export interface StressSetup {
  readonly fd: number;
  readonly features: bigint;
  readonly queueSize: number;
  readonly inOrder: boolean;
  readonly doorbells: SharedArrayBuffer;
}

/** No honest wait is longer: each ends with the next step of the other thread. */
const LOST_AFTER_MS = 5_000;

/** Sleep until the bell rings after it was seen at `seen`; a bell that never rings is a lost wake-up. */
export function waitFor(bells: Int32Array, bell: number, seen: number, lost: string): void {
  if (Atomics.wait(bells, bell, seen, LOST_AFTER_MS) === "timed-out") throw new Error(lost);
}
