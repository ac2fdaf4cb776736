/** The calls of the addon, numbered: one of them is refused, as the kernel may refuse it. */

import { constants } from "node:os";
import { native, type NativeBinding } from "../../src/sys/native.js";
import { layerNative } from "../support/native.js";

const { errno } = constants;
const F_DUPFD_CLOEXEC = 1030;

/**
 * What each call is refused with. Not here are those that cannot fail on what is open and mapped (`close`, `munmap`,
 * `signal` and `drain` of an eventfd, `address`, `isLost`, registers), and the watch's own, which return nothing.
 */
const REFUSALS = {
  memfdCreate: errno.EMFILE,
  ftruncate: errno.ENOMEM,
  fcntl: errno.EPERM,
  fallocate: errno.ENOSPC,
  preadv: errno.EIO,
  pwritev: errno.ENOSPC,
  mmap: errno.ENOMEM,
  faultCounter: errno.ENOTSUP,
  eventfd: errno.EMFILE,
  watch: errno.EMFILE,
  connect: errno.ECONNREFUSED,
  listen: errno.EACCES,
  accept: errno.EMFILE,
  socketpair: errno.EMFILE,
  sendmsg: errno.EPIPE,
  recvmsg: errno.ECONNRESET,
  ioctl: errno.EIO,
} as const satisfies Partial<Record<keyof NativeBinding, number>>;

type Refusable = keyof typeof REFUSALS;

/** Stands in front of the addon's own function, and is no call of the kernel's; undefined: ask the addon. */
type Stand = (name: Refusable, words: readonly unknown[]) => unknown;

let made: string[] = [];
let refusedAt = -1;

/**
 * Have the addon loaded with a layer that counts and refuses. To be called once, before anything makes a system call.
 *
 * @param stand answers calls in the place of the addon; they are counted and refused as the others.
 * @param onClose hears of each descriptor before it is closed.
 */
export function numberCalls(stand: Stand = () => undefined, onClose: (fd: number) => void = () => undefined): void {
  layerNative((addon) => {
    const layer: Partial<NativeBinding> = {
      close(fd) {
        onClose(fd);
        return addon.close(fd);
      },
    };
    for (const name of Object.keys(REFUSALS) as Refusable[]) {
      const real: unknown = addon[name];
      if (typeof real !== "function") throw new Error(`the addon has no ${name}`);
      const call = (...words: unknown[]): unknown => {
        made.push(name);
        if (made.length - 1 !== refusedAt) return stand(name, words) ?? Reflect.apply(real, addon, words);
        return refuse(name, words);
      };
      Object.assign(layer, { [name]: call });
    }
    return layer;
  });
  native();
  // Children and workers have the addon as it is.
  delete process.env["VIRTIO_NATIVE_PATH"];
}

/** Refuse call number `at` from now on; none when it is negative. */
export function refuseCall(at: number): void {
  made = [];
  refusedAt = at;
}

/** Names of the calls since then. */
export function callsMade(): readonly string[] {
  return made;
}

/** Number and name of the call that was refused, for messages. */
export function refusedCall(): string {
  return `${refusedAt} (${made[refusedAt] ?? "none yet"})`;
}

function refuse(name: Refusable, words: readonly unknown[]): number {
  const duplicates = name === "fcntl" && words[1] === F_DUPFD_CLOEXEC;
  const result = -(duplicates ? errno.EMFILE : REFUSALS[name]);
  const callback = words.at(-1);
  // What a thread does begins, and fails there.
  if (name === "watch" || typeof callback !== "function") return result;
  setImmediate(() => void Reflect.apply(callback, undefined, [result]));
  return 0;
}
