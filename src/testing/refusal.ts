/** How a fake kernel says no to itself, before it says so to a driver. */

/** A call that is refused with an errno. */
export class Refusal extends Error {
  /** The positive errno. */
  readonly errno: number;

  constructor(errno: number) {
    super(`refused with errno ${errno}`);
    this.errno = errno;
  }
}
