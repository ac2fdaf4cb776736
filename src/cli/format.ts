/** Numbers as people read them. */

const UNITS = ["KiB", "MiB", "GiB", "TiB", "PiB"];

/** Bytes in the largest unit that leaves at least 1, with one decimal when it does not divide: `64 MiB`, `1.5 GiB`. */
export function formatBytes(bytes: number): string {
  if (bytes < 1024) return `${bytes} byte${bytes === 1 ? "" : "s"}`;
  const power = Math.min(Math.floor(Math.log2(bytes) / 10), UNITS.length);
  const value = bytes / 1024 ** power;
  return `${Number.isInteger(value) ? value : value.toFixed(1)} ${UNITS[power - 1]}`;
}

/** A count with three digits that matter: `987`, `12.3k`, `1.23M`. */
export function formatCount(count: number): string {
  if (count < 1000) return String(Math.round(count));
  const [value, unit] = count < 1e6 ? [count / 1e3, "k"] : [count / 1e6, "M"];
  return `${value.toPrecision(Math.max(3, Math.floor(Math.log10(value)) + 1))}${unit}`;
}

/** A count without digits that say nothing, for an axis: `500k`, `2.5M`, `0.02`. */
export function formatTick(count: number): string {
  const [unit, name] = count >= 1e6 ? [1e6, "M"] : count >= 1000 ? [1e3, "k"] : [1, ""];
  return `${Number((count / unit).toPrecision(6))}${name}`;
}

/** Nanoseconds in a unit that fits: `850 ns`, `12.3 µs`, `4.56 ms`. */
export function formatNs(ns: number): string {
  if (ns < 1000) return `${Math.round(ns)} ns`;
  const [value, unit] = ns < 1e6 ? [ns / 1e3, "µs"] : ns < 1e9 ? [ns / 1e6, "ms"] : [ns / 1e9, "s"];
  return `${value.toPrecision(Math.max(3, Math.floor(Math.log10(value)) + 1))} ${unit}`;
}
