/** How the words of the command line become numbers; what is refused is a usage error. */

import { InvalidArgumentError } from "commander";
import { parseSize } from "../size.js";

/** Parser of a whole number in decimal digits. */
export function wholeNumber(word: string): number {
  const value = Number(word);
  if (!/^[0-9]+$/.test(word) || !Number.isSafeInteger(value)) throw new InvalidArgumentError("It is no whole number.");
  return value;
}

/** Parser of a size: `512`, `4K`, `1M`, `2G`, `1GiB`. */
export function size(word: string): number {
  try {
    return parseSize(word);
  } catch (error) {
    throw error instanceof RangeError ? new InvalidArgumentError("Sizes look like 512, 4K, 1M or 2GiB.") : error;
  }
}

/** Parser of a number of whole units at least 1. */
export function positiveNumber(word: string): number {
  const value = wholeNumber(word);
  if (value === 0) throw new InvalidArgumentError("It must be at least 1.");
  return value;
}

/** Parser of a time in seconds above 0, with a fraction or without: `2`, `0.5`. */
export function seconds(word: string): number {
  const value = Number(word);
  if (!/^[0-9]*\.?[0-9]+$/.test(word) || value <= 0 || value > 86_400) {
    throw new InvalidArgumentError("It is no number of seconds above 0 and up to a day.");
  }
  return value;
}

/** Where to listen for TCP connections. */
export interface HostPort {
  readonly host: string;
  /** 0: any free one. */
  readonly port: number;
}

/** Parser of a port on this machine, with the address to listen at or without: `9100`, `0.0.0.0:9100`, `[::1]:9100`. */
export function hostPort(word: string): HostPort {
  const [, inBrackets, plain, port] = /^(?:(?:\[([0-9A-Fa-f:.]+)\]|([^\s:[\]/]+)):)?([0-9]{1,5})$/.exec(word) ?? [];
  if (port === undefined || Number(port) > 65535) {
    throw new InvalidArgumentError("It is no PORT or HOST:PORT, such as 9100, 0.0.0.0:9100 or [::1]:9100.");
  }
  return { host: inBrackets ?? plain ?? "127.0.0.1", port: Number(port) };
}
