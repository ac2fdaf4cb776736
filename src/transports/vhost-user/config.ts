/** The config space over vhost-user: `GET_CONFIG` and `SET_CONFIG`. */

import { checkInteger, VirtioError } from "../../errors.js";
import { configCodec, VHOST_USER_MAX_CONFIG_SIZE, VhostUserRequest } from "../../protocol/vhost-user.js";
import { type Message, protocolError, type Reply, type RequestChannel } from "./channel.js";

const U32_MAX = 0xffff_ffff;

/**
 * Check which bytes are asked for.
 *
 * @throws RangeError for more than one message can carry, or none.
 */
export function checkConfigRange(offset: number, length: number): void {
  checkInteger("length", length, 1, VHOST_USER_MAX_CONFIG_SIZE);
  checkInteger("offset", offset, 0, U32_MAX - length);
}

/** Read bytes of the config space by one message. Throws VirtioError ERR_VIRTIO_CONFIG when the back-end refuses. */
export async function readConfig(
  channel: RequestChannel,
  peer: string,
  offset: number,
  length: number,
): Promise<Uint8Array> {
  const payload = configCodec.encode({ offset, flags: 0, data: new Uint8Array(length) });
  const bytes = await channel.call({ request: VhostUserRequest.GET_CONFIG, payload }, configReply(offset, length));
  if (bytes !== undefined) return bytes;
  throw new VirtioError(
    "ERR_VIRTIO_CONFIG",
    `${peer} refused to read ${length} bytes of config space at ${offset}; ` +
      "it is probably shorter, read only the fields that the offered features imply",
  );
}

/** `SET_CONFIG`, by the driver. */
export function configWrite(offset: number, bytes: Uint8Array): Message {
  return { request: VhostUserRequest.SET_CONFIG, payload: configCodec.encode({ offset, flags: 0, data: bytes }) };
}

/**
 * The reply to `GET_CONFIG`: the bytes, or undefined when the back-end refused. It refuses by an empty
 * payload (libvhost-user) or by a config payload without data (rust-vmm).
 */
function configReply(offset: number, length: number): Reply<Uint8Array | undefined> {
  const header = configCodec.encode({ offset: 0, flags: 0, data: new Uint8Array(0) }).length;
  return {
    sizes: [0, header, header + length],
    decode(payload) {
      if (payload.length === 0) return undefined;
      const config = configCodec.decode(payload);
      if (config.data.length === 0) return undefined;
      if (config.offset !== offset) {
        throw protocolError(`GET_CONFIG at offset ${offset} was answered for offset ${config.offset}`);
      }
      return config.data;
    },
  };
}
