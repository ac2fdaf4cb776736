/** Reads the small files and links by which the kernel shows itself, in sysfs and procfs: what is not there is no error. */

import { readdirSync, readFileSync, readlinkSync } from "node:fs";
import { errno, fileError } from "./errno.js";

/**
 * The names in a folder, sorted; none when it is not there.
 *
 * @throws VirtioError ERR_VIRTIO_PERMISSION or ERR_VIRTIO_SYSCALL when it cannot be listed.
 */
export function entries(folder: string): string[] {
  return ifThere(() => readdirSync(folder).sort(), `listing ${folder}`) ?? [];
}

/**
 * The text of a file without what is blank at its end; undefined when it is not there.
 *
 * @throws VirtioError ERR_VIRTIO_PERMISSION or ERR_VIRTIO_SYSCALL when it cannot be read.
 */
export function readText(path: string): string | undefined {
  return ifThere(() => readFileSync(path, "utf8"), `reading ${path}`)?.trimEnd();
}

/**
 * Where a link points; undefined when it is not there.
 *
 * @throws VirtioError ERR_VIRTIO_PERMISSION or ERR_VIRTIO_SYSCALL when it cannot be read.
 */
export function readLink(path: string): string | undefined {
  return ifThere(() => readlinkSync(path), `reading the link ${path}`);
}

/** What `read` returns; undefined when it finds that there is nothing, or that it has just vanished. */
function ifThere<T>(read: () => T, what: string): T | undefined {
  try {
    return read();
  } catch (error) {
    const refused = fileError(error, what);
    if (refused.errno === errno.ENOENT || refused.errno === errno.ENODEV || refused.errno === errno.ESRCH) {
      return undefined;
    }
    throw refused;
  }
}
