/** What is agreed on when the connection begins: which features, which messages, how many queues and regions. */

import { VirtioError } from "../../errors.js";
import {
  u64Codec,
  VHOST_F_LOG_ALL,
  VHOST_USER_F_PROTOCOL_FEATURES,
  VHOST_USER_MAX_QUEUES,
  VHOST_USER_MAX_REGIONS,
  VhostUserProtocolFeature,
  VhostUserRequest,
} from "../../protocol/vhost-user.js";
import { BackChannel } from "./back-channel.js";
import type { Reply, RequestChannel } from "./channel.js";
import { U64_REPLY } from "./channel.js";

/** The protocol features that are implemented here; no other is ever accepted. */
const PROTOCOL_FEATURES =
  VhostUserProtocolFeature.MQ |
  VhostUserProtocolFeature.REPLY_ACK |
  VhostUserProtocolFeature.BACKEND_REQ |
  VhostUserProtocolFeature.CONFIG |
  VhostUserProtocolFeature.CONFIGURE_MEM_SLOTS;

/** More regions than anybody makes; a larger answer to `GET_MAX_MEM_SLOTS` says no more. */
const ENOUGH_REGIONS = 0xffff;

/** What the first messages of a connection tell. */
export interface Introduction {
  /** Virtio features, without the two bits that belong to the protocol. */
  readonly offeredFeatures: bigint;
  /** Whether bit 30 was offered, and so is accepted. */
  readonly hasProtocolFeatures: boolean;
  /** Protocol features in force. */
  readonly protocolFeatures: bigint;
  /** Queues of the device. */
  readonly maxQueues: number;
  /** Memory regions at the same time. */
  readonly maxRegions: number;
  /** The channel on which the back-end asks, when it wanted one. */
  readonly backChannel: BackChannel | undefined;
}

/**
 * Begin the conversation: owner, features, protocol features and what hangs on them. Three round trips.
 *
 * @throws VirtioError ERR_VIRTIO_PROTOCOL when an answer makes no sense.
 */
export async function introduce(channel: RequestChannel, peer: string): Promise<Introduction> {
  channel.post({ request: VhostUserRequest.SET_OWNER });
  const offered = await channel.call({ request: VhostUserRequest.GET_FEATURES }, U64_REPLY);
  const offeredFeatures = offered & ~(VHOST_USER_F_PROTOCOL_FEATURES | VHOST_F_LOG_ALL);
  if ((offered & VHOST_USER_F_PROTOCOL_FEATURES) === 0n) {
    return {
      offeredFeatures,
      hasProtocolFeatures: false,
      protocolFeatures: 0n,
      maxQueues: 1,
      maxRegions: VHOST_USER_MAX_REGIONS,
      backChannel: undefined,
    };
  }

  const protocolFeatures = chooseProtocolFeatures(
    await channel.call({ request: VhostUserRequest.GET_PROTOCOL_FEATURES }, U64_REPLY),
  );
  const has = (feature: bigint) => (protocolFeatures & feature) !== 0n;
  channel.post({ request: VhostUserRequest.SET_PROTOCOL_FEATURES, payload: u64Codec.encode(protocolFeatures) });
  // REPLY_ACK is in force from here on: the acknowledgement of the message that agrees on it may not be relied on.
  channel.acknowledges = has(VhostUserProtocolFeature.REPLY_ACK);
  const backChannel = has(VhostUserProtocolFeature.BACKEND_REQ)
    ? new BackChannel(peer, channel.acknowledges)
    : undefined;
  try {
    const [maxQueues, maxRegions] = await Promise.all([
      has(VhostUserProtocolFeature.MQ)
        ? channel.call({ request: VhostUserRequest.GET_QUEUE_NUM }, countReply("queues", VHOST_USER_MAX_QUEUES))
        : 1,
      has(VhostUserProtocolFeature.CONFIGURE_MEM_SLOTS)
        ? channel.call({ request: VhostUserRequest.GET_MAX_MEM_SLOTS }, countReply("memory slots", ENOUGH_REGIONS))
        : VHOST_USER_MAX_REGIONS,
      backChannel?.offer(channel),
    ]);
    return { offeredFeatures, hasProtocolFeatures: true, protocolFeatures, maxQueues, maxRegions, backChannel };
  } catch (error) {
    backChannel?.close();
    throw error;
  }
}

function chooseProtocolFeatures(offered: bigint): bigint {
  const accepted = offered & PROTOCOL_FEATURES;
  // Config changes are all that the back-channel is for, and they belong to CONFIG.
  const useful = (accepted & VhostUserProtocolFeature.CONFIG) !== 0n;
  return useful ? accepted : accepted & ~VhostUserProtocolFeature.BACKEND_REQ;
}

function countReply(what: string, most: number): Reply<number> {
  return {
    sizes: U64_REPLY.sizes,
    decode(payload) {
      const value = U64_REPLY.decode(payload);
      if (value === 0n) throw new VirtioError("ERR_VIRTIO_PROTOCOL", `it has 0 ${what}`);
      return value > BigInt(most) ? most : Number(value);
    },
  };
}
