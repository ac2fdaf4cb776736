/** Vectors that both halves of the rings are checked with. */

/**
 * Split rings with EVENT_IDX, either direction: the other side's event field, the own index after and before
 * publishing, whether to notify.
 */
export const EVENT_VECTORS = [
  [0, 1, 0, true],
  [0, 0, 0, false],
  [1, 1, 0, false],
  [0, 2, 1, false],
  [5, 6, 5, true],
  [5, 8, 3, true],
  [5, 5, 3, false],
  [5, 6, 6, false],
  [65535, 0, 65535, true],
  [65535, 0, 65534, true],
  [65535, 65535, 65534, false],
  [0, 1, 65535, true],
  [65534, 1, 65533, true],
  [32767, 32768, 0, true],
] as const;
