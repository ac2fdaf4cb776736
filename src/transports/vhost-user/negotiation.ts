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
import type { Message, Reply, RequestChannel } from "./channel.js";
import { U64_REPLY } from "./channel.js";

/** The protocol features that are implemented here; no other is ever accepted. */
const PROTOCOL_FEATURES =
  VhostUserProtocolFeature.MQ |
  VhostUserProtocolFeature.REPLY_ACK |
  VhostUserProtocolFeature.BACKEND_REQ |
  VhostUserProtocolFeature.CONFIG |
  VhostUserProtocolFeature.INFLIGHT_SHMFD |
  VhostUserProtocolFeature.CONFIGURE_MEM_SLOTS;

/**
 * Protocol features to accept.
 *
 * @param mayReconnect who will not come back needs nobody to remember what is in flight, which costs the back-end a
 *   little with each request.
 */
export function wantedProtocolFeatures(mayReconnect: boolean): bigint {
  return mayReconnect ? PROTOCOL_FEATURES : PROTOCOL_FEATURES & ~VhostUserProtocolFeature.INFLIGHT_SHMFD;
}

/** `SET_FEATURES`. */
export function agreement(features: bigint, { hasProtocolFeatures }: Introduction): Message {
  // Bit 30 is the protocol's. Left out, the back-end would enable every queue at once and take no
  // SET_VRING_ENABLE any more.
  const bits = hasProtocolFeatures ? features | VHOST_USER_F_PROTOCOL_FEATURES : features;
  return { request: VhostUserRequest.SET_FEATURES, payload: u64Codec.encode(bits) };
}

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
 * @param wanted protocol features to be accepted when offered.
 * @throws VirtioError ERR_VIRTIO_PROTOCOL when an answer makes no sense.
 */
export async function introduce(channel: RequestChannel, peer: string, wanted: bigint): Promise<Introduction> {
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
    wanted & (await channel.call({ request: VhostUserRequest.GET_PROTOCOL_FEATURES }, U64_REPLY)),
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

function chooseProtocolFeatures(accepted: bigint): bigint {
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

/**
 * See that a back-end can take the place of the one before.
 *
 * @param needed what that one had agreed to, and what of it was in use.
 * @throws VirtioError ERR_VIRTIO_FEATURES.
 */
export function checkSame(peer: string, found: Introduction, needed: Omit<Introduction, "backChannel">): void {
  const missing = needed.offeredFeatures & ~found.offeredFeatures;
  const lacks = [
    ...(missing === 0n ? [] : [`the features 0x${missing.toString(16)}`]),
    ...(found.protocolFeatures === needed.protocolFeatures && found.hasProtocolFeatures === needed.hasProtocolFeatures
      ? []
      : [`the protocol features 0x${(needed.protocolFeatures & ~found.protocolFeatures).toString(16)}`]),
    ...(found.maxQueues >= needed.maxQueues ? [] : [`${needed.maxQueues} queues (it has ${found.maxQueues})`]),
    ...(found.maxRegions >= needed.maxRegions
      ? []
      : [`${needed.maxRegions} memory regions (it takes ${found.maxRegions})`]),
  ];
  if (lacks.length === 0) return;
  throw new VirtioError(
    "ERR_VIRTIO_FEATURES",
    `${peer} came back without ${lacks.join(", ")}, which are in use; start it as it was before, or open it again`,
  );
}
