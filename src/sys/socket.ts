/** Unix stream sockets that carry descriptors; nothing here ever waits. */

import { lstatSync, unlinkSync } from "node:fs";
import { checkInteger, rangeError, typeError, VirtioError, type VirtioErrorCode } from "../errors.js";
import { checkFd, closeFd } from "./descriptor.js";
import { errno, errnoName, systemError } from "./errno.js";
import { native } from "./native.js";

/** Descriptors that one message can carry; MAX_FDS of native/syscalls.c. */
export const MAX_MESSAGE_FDS = 32;

/** Bytes of sockaddr_un's path, without the NUL. */
const MAX_PATH_BYTES = 107;

const BLOCKED = -1;

/** Hands descriptors to and from the addon; a call fills and empties it, so one is enough. */
const scratch = new Int32Array(1 + MAX_MESSAGE_FDS);

const CONNECT_ADVICE: ReadonlyMap<number, string> = new Map([
  [errno.ENOENT, "no such socket; start the back-end first, or check the path"],
  [errno.ENOTDIR, "a part of the path is not a directory; check the path"],
  [errno.ECONNREFUSED, "nobody listens there; start the back-end again (a socket file outlives its process)"],
  [errno.EAGAIN, "the back-end has too many clients waiting; it may serve one at a time. Try again later"],
  [errno.EPROTOTYPE, "it is not a stream socket; check the path"],
  [errno.EACCES, "this user may not connect; write permission on the socket and its directories is needed"],
]);

/**
 * Connect to a Unix stream socket. Non-blocking, close-on-exec.
 *
 * @returns the descriptor.
 * @throws RangeError when the path is empty, contains NUL or is too long for a socket (107 bytes).
 * @throws VirtioError ERR_VIRTIO_CONNECT (errno ENOENT, ECONNREFUSED, EAGAIN when the backlog is full, …),
 *   ERR_VIRTIO_PERMISSION (EACCES).
 */
export function connectUnix(path: string): number {
  const fd = native().connect(checkPath(path));
  if (fd >= 0) return fd;
  const advice = CONNECT_ADVICE.get(-fd);
  if (advice === undefined) throw systemError(fd, "connect", `connecting to ${path}`);
  const code: VirtioErrorCode = fd === -errno.EACCES ? "ERR_VIRTIO_PERMISSION" : "ERR_VIRTIO_CONNECT";
  throw new VirtioError(code, `${path}: ${errnoName(-fd)} from connect; ${advice}`, { errno: -fd, syscall: "connect" });
}

/**
 * Listen on a Unix stream socket. A socket file that nobody listens on any more is replaced. Non-blocking,
 * close-on-exec; the file stays when the descriptor is closed.
 *
 * @param backlog how many clients may wait to be accepted.
 * @returns the descriptor.
 * @throws RangeError when the path is empty, contains NUL or is too long for a socket (107 bytes).
 * @throws VirtioError ERR_VIRTIO_SYSCALL (EADDRINUSE: somebody listens there, or it is not a socket),
 *   ERR_VIRTIO_PERMISSION (EACCES).
 */
export function listenUnix(path: string, backlog = 16): number {
  checkPath(path);
  checkInteger("backlog", backlog, 0, 65535);
  let fd = native().listen(path, backlog);
  if (fd === -errno.EADDRINUSE && isStale(path)) {
    unlinkSync(path);
    fd = native().listen(path, backlog);
  }
  if (fd >= 0) return fd;
  const advice =
    fd === -errno.EADDRINUSE
      ? "somebody listens there, or the file is not a socket; stop it, remove it, or take another path"
      : undefined;
  throw systemError(fd, "bind", `listening on ${path}`, advice);
}

/** Whether `path` is a socket that refuses connections. Connecting to a plain file is refused, too, so look first. */
function isStale(path: string): boolean {
  if (lstatSync(path, { throwIfNoEntry: false })?.isSocket() !== true) return false;
  const fd = native().connect(path);
  if (fd >= 0) closeFd(fd);
  return fd === -errno.ECONNREFUSED;
}

/**
 * Take the next client of a listening socket.
 *
 * @returns its descriptor, non-blocking and close-on-exec; undefined when nobody waits.
 * @throws VirtioError ERR_VIRTIO_SYSCALL; errno EMFILE when there are too many descriptors.
 */
export function acceptUnix(fd: number): number | undefined {
  const client = native().accept(checkFd("fd", fd));
  if (client >= 0) return client;
  if (client === -errno.EAGAIN || client === -errno.ECONNABORTED) return undefined;
  throw systemError(client, "accept4", `accepting a client on descriptor ${fd}`);
}

/**
 * Make two connected Unix stream sockets, non-blocking and close-on-exec.
 *
 * @throws VirtioError ERR_VIRTIO_SYSCALL; errno EMFILE when there are too many descriptors.
 */
export function socketPair(): [number, number] {
  const pair = new Int32Array(2);
  const result = native().socketpair(pair);
  if (result < 0) throw systemError(result, "socketpair", "making a pair of sockets");
  const [left = BLOCKED, right = BLOCKED] = pair;
  return [left, right];
}

/**
 * Send bytes, and with the first of them descriptors (SCM_RIGHTS), which stay open here. When fewer bytes are sent
 * than given, the descriptors went with them: send the rest without.
 *
 * @returns how many bytes were sent; -1 when nothing can be sent now.
 * @throws RangeError when there are no bytes, or more than 32 descriptors.
 * @throws VirtioError ERR_VIRTIO_SYSCALL; errno EPIPE or ECONNRESET when the peer is gone, EBADF when one of
 *   the descriptors is not open.
 */
export function sendMessage(fd: number, bytes: Uint8Array, fds: readonly number[]): number {
  checkFd("fd", fd);
  checkBytes("bytes", bytes);
  if (fds.length > MAX_MESSAGE_FDS) throw rangeError("fds", `at most ${MAX_MESSAGE_FDS} descriptors`, fds.length);
  for (const [index, passed] of fds.entries()) scratch[index] = checkFd(`fds[${index}]`, passed);
  const result = native().sendmsg(fd, bytes, scratch, fds.length);
  if (result >= 0) return result;
  if (result === -errno.EAGAIN) return BLOCKED;
  throw systemError(result, "sendmsg", `sending ${bytes.length} bytes and ${fds.length} descriptors on ${fd}`);
}

/**
 * Receive bytes and the descriptors that came with them, which are close-on-exec and now this process's to close.
 *
 * @param fds the descriptors are appended to this.
 * @returns how many bytes came; 0 when the peer has closed; -1 when there is nothing now.
 * @throws RangeError when `into` has no room.
 * @throws VirtioError ERR_VIRTIO_PROTOCOL when not all descriptors could be received: more than 32 came at once, or
 *   this process may not open as many. Those that came are closed. ERR_VIRTIO_SYSCALL; errno ECONNRESET when the
 *   peer is gone.
 */
export function receiveMessage(fd: number, into: Uint8Array, fds: number[]): number {
  checkFd("fd", fd);
  checkBytes("into", into);
  const result = native().recvmsg(fd, into, scratch);
  if (result >= 0) {
    const count = scratch[0] ?? 0;
    for (let index = 1; index <= count; index++) fds.push(scratch[index] ?? BLOCKED);
    return result;
  }
  if (result === -errno.EAGAIN) return BLOCKED;
  if (result === -errno.EPROTO) {
    throw new VirtioError(
      "ERR_VIRTIO_PROTOCOL",
      `descriptors that came on descriptor ${fd} were cut off and are closed: the peer sent more than ` +
        `${MAX_MESSAGE_FDS} in one message, or this process may open no more; raise \`ulimit -n\` or check the peer`,
      { syscall: "recvmsg" },
    );
  }
  throw systemError(result, "recvmsg", `receiving on descriptor ${fd}`);
}

function checkBytes(name: string, bytes: Uint8Array): void {
  if (!(bytes instanceof Uint8Array)) throw typeError(name, "a Uint8Array", bytes);
  if (bytes.length === 0) throw rangeError(name, "at least 1 byte", 0);
}

function checkPath(path: string): string {
  if (typeof path !== "string") throw typeError("path", "a string", path);
  const length = Buffer.byteLength(path);
  if (length === 0 || length > MAX_PATH_BYTES || path.includes("\0")) {
    throw rangeError("path", `1 to ${MAX_PATH_BYTES} bytes without NUL (a shorter or relative path may do)`, path);
  }
  return path;
}
