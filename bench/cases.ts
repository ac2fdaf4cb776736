/** What `npm run bench` measures: which disks, by which ways, with which sizes and depths. */

import type { CompletionMode } from "../src/index.js";

/**
 * `null`: qemu-storage-daemon without storage behind it, so that the way to it is all that costs. `file`: the same
 * daemon on a raw file in shared memory. `embedded`: the back-end of this package on memory.
 */
export type DiskName = "null" | "file" | "embedded";

/** By which way requests reach a disk. */
export type Way =
  | {
      readonly by: "vhost-user";
      readonly api: "callback" | "promise";
      readonly mode: CompletionMode;
      readonly packed: boolean;
    }
  /** fio with its NBD engine, to the same daemon's export of the same disk. */
  | { readonly by: "nbd" }
  /** The file itself, by `FileHandle.read` or `fs.readSync`. */
  | { readonly by: "fs"; readonly api: "promise" | "sync" };

/** One thing to measure: random reads. */
export interface Case {
  readonly disk: DiskName;
  readonly way: Way;
  /** Bytes of a request. */
  readonly size: number;
  /** Requests in flight. */
  readonly depth: number;
}

const KIB = 1024;
/** Queue depths at which small requests are measured. */
export const DEPTHS = [1, 8, 32, 128] as const;
/** The size that is measured at all depths. */
export const SMALL = 4 * KIB;
/** Other sizes, each at the one depth that keeps the device busy. */
export const SIZES: readonly { readonly size: number; readonly depth: number }[] = [
  { size: 512, depth: 32 },
  { size: SMALL, depth: 32 },
  { size: 64 * KIB, depth: 32 },
  { size: 1024 * KIB, depth: 4 },
];

const MODES = ["poll", "hybrid", "event"] as const;

/** A way over vhost-user; packed virtqueues where the device offers them. */
export function vhostUser(api: "callback" | "promise", mode: CompletionMode, packed = true): Way {
  return { by: "vhost-user", api, mode, packed };
}

/** Both interfaces in all modes. */
export const ALL_WAYS = MODES.flatMap((mode) => [vhostUser("callback", mode), vhostUser("promise", mode)]);
/** The fastest, and what a program gets that asks for nothing. */
export const CHOSEN_WAYS = [vhostUser("callback", "poll"), vhostUser("promise", "hybrid")];
/** On the file, which costs itself: the chosen ones, and asleep. */
export const FILE_WAYS = [...CHOSEN_WAYS, vhostUser("promise", "event")];
/** The same on split virtqueues, where packed ones are offered too. */
export const SPLIT_WAYS = [
  vhostUser("callback", "poll", false),
  vhostUser("callback", "event", false),
  vhostUser("promise", "hybrid", false),
];
export const NBD: Way = { by: "nbd" };
export const FS_PROMISE: Way = { by: "fs", api: "promise" };
export const FS_SYNC: Way = { by: "fs", api: "sync" };

/**
 * Not the cross product, which would take hours, but what answers the questions of the report: every mode and
 * interface by depth where nothing but the way costs; sizes where copying costs; what users have today beside them.
 */
export function allCases(): Case[] {
  const small = (disk: DiskName, ways: readonly Way[], depths: readonly number[] = DEPTHS): Case[] =>
    ways.flatMap((way) => depths.map((depth) => ({ disk, way, size: SMALL, depth })));
  const sized = (disk: DiskName, ways: readonly Way[]): Case[] =>
    ways.flatMap((way) => SIZES.map(({ size, depth }) => ({ disk, way, size, depth })));
  return distinct([
    ...small("null", [...ALL_WAYS, NBD]),
    ...small("file", [...FILE_WAYS, NBD]),
    ...small("file", [FS_PROMISE], [1, 8, 32]),
    ...small("file", [FS_SYNC], [1]),
    ...sized("file", [...CHOSEN_WAYS, NBD, FS_PROMISE]),
    { disk: "file", way: FS_SYNC, size: 1024 * KIB, depth: 1 },
    ...small("embedded", [...ALL_WAYS, ...SPLIT_WAYS]),
    ...sized("embedded", CHOSEN_WAYS),
  ]);
}

/** A few of them, to see that everything runs: every disk, by every kind of way. */
export function quickCases(): Case[] {
  const isChosen = ({ way, size, depth }: Case): boolean => {
    if (way.by === "vhost-user" && (way.mode === "event" || !way.packed)) return false;
    return size === SMALL ? depth === 32 || way === FS_SYNC : depth === 4;
  };
  return allCases().filter(isChosen);
}

/** The same text for the same case. */
export function keyOf({ disk, way, size, depth }: Case): string {
  const words: string[] = [disk, way.by];
  if (way.by !== "nbd") words.push(way.api);
  if (way.by === "vhost-user") words.push(way.mode, ...(way.packed ? [] : ["split"]));
  return [...words, size, depth].join(" ");
}

function distinct(cases: readonly Case[]): Case[] {
  return [...new Map(cases.map((each) => [keyOf(each), each])).values()];
}
