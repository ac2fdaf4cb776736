/** What a test in the guest can ask of the host: QEMU's monitor, and what an image holds. */

import { connect } from "node:net";
import type { Answer, GuestFunctionName, HostQuestion } from "../protocol.js";

/**
 * Carry out a command of QEMU's monitor (QMP), and return what it returns.
 *
 * @throws Error when QEMU refuses it.
 */
export function qmp(command: string, parameters: Readonly<Record<string, unknown>> = {}): Promise<unknown> {
  return ask({ ask: "qmp", command, arguments: parameters });
}

/** Change the size of a PCI disk. The device says so by a change of its configuration. */
export async function resizeDisk(disk: GuestFunctionName, bytes: number): Promise<void> {
  await qmp("block_resize", { "node-name": disk, size: bytes });
}

/**
 * The SHA-256 (hex) of a stretch of a PCI disk's image, as the host reads it from its file.
 *
 * @throws Error when the image is shorter.
 */
export async function imageSha256(disk: GuestFunctionName, position: number, length: number): Promise<string> {
  return String(await ask({ ask: "sha256", disk, position, length }));
}

async function ask(question: HostQuestion): Promise<unknown> {
  const path = process.env["VIRTIO_GUEST_SOCKET"];
  if (path === undefined) throw new Error("VIRTIO_GUEST_SOCKET is not set: this runs in the guest only");
  const socket = connect(path).setEncoding("utf8");
  socket.write(`${JSON.stringify(question)}\n`);
  let text = "";
  for await (const piece of socket) text += String(piece);
  if (text === "") throw new Error(`no answer from the host to ${JSON.stringify(question)}`);
  const { result, error } = JSON.parse(text) as Answer;
  if (error !== undefined) throw new Error(`the host: ${error}`);
  return result;
}
