/** Sizes as people type them, `4K` or `1GiB`: the one parser of the command line and of `ram:` addresses. */

import { rangeError } from "./errors.js";

const UNITS = ["", "K", "M", "G", "T"];

/**
 * The bytes that `text` stands for: decimal digits, and after them K, M, G or T for a power of 1024, also
 * written out and in lower case (`4k`, `4KiB`). `4KB` is refused, because to some it means 4000 bytes.
 *
 * @throws RangeError when `text` is no size, or one above 2^53 - 1; `name` is what the message calls it.
 */
export function parseSize(text: string, name = "size"): number {
  const match = /^([0-9]+)(?:([KMGT])(?:iB)?)?$/i.exec(text);
  const bytes = match === null ? Number.NaN : Number(match[1]) * 1024 ** UNITS.indexOf((match[2] ?? "").toUpperCase());
  if (!Number.isSafeInteger(bytes)) throw rangeError(name, 'a size such as "512", "4K", "1M" or "2GiB"', text);
  return bytes;
}
