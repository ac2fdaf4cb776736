/** Back-ends that the torture kills: each a process on an image file, started again on the same socket. */

import { fileURLToPath } from "node:url";
import { Daemon, startStorageDaemon, type TemporaryFolder } from "../support/peers.js";

/** What is tortured. */
export interface Variant {
  /** `own`: the embedded back-end on a file; `cached`: on one with a cache in its memory; `qsd`: qemu-storage-daemon. */
  readonly peer: "own" | "cached" | "qsd";
  readonly packed: boolean;
  /** Whether the back-end keeps a record of the requests in flight (INFLIGHT_SHMFD). */
  readonly inflight: boolean;
}

/** All there are: qemu-storage-daemon 7.2 has neither packed rings nor INFLIGHT_SHMFD. */
export const VARIANTS: readonly Variant[] = [
  { peer: "own", packed: false, inflight: true },
  { peer: "own", packed: true, inflight: true },
  { peer: "own", packed: false, inflight: false },
  { peer: "own", packed: true, inflight: false },
  { peer: "cached", packed: true, inflight: true },
  { peer: "cached", packed: false, inflight: false },
  { peer: "qsd", packed: false, inflight: false },
];

/** Queues of every back-end. */
export const QUEUES = 2;

const SERVERS: Readonly<Record<Variant["peer"], string>> = {
  own: "own server",
  cached: "own server with a cache",
  qsd: "qemu-storage-daemon",
};

/** A variant for people. */
export function nameOfVariant({ peer, packed, inflight }: Variant): string {
  return `${SERVERS[peer]}, ${packed ? "packed" : "split"}, ${inflight ? "with" : "without"} INFLIGHT_SHMFD`;
}

/** Start a back-end of this variant on `image`, with its socket in `folder`. */
export function startPeer(
  { peer, packed, inflight }: Variant,
  folder: TemporaryFolder,
  image: string,
): Promise<Daemon> {
  const format = packed ? "packed" : "split";
  if (peer === "qsd") {
    const blockdev = `driver=file,filename=${image},cache.direct=off,discard=unmap`;
    return startStorageDaemon(folder, { blockdev, queues: QUEUES });
  }
  const path = folder.file("vhost-user.sock");
  if (!inflight || peer === "cached") {
    const words = [path, image, `${QUEUES}`, format, inflight ? "tracking" : "forgetful", peer];
    return Daemon.start(path, process.execPath, [local("./server.js"), ...words]);
  }
  const command = local("../../src/cli/main.js");
  const flags = ["--socket", path, "--queues", `${QUEUES}`, `--${format}`];
  return Daemon.start(path, process.execPath, [command, "serve", `file:${image}`, ...flags]);
}

function local(path: string): string {
  return fileURLToPath(new URL(path, import.meta.url));
}
