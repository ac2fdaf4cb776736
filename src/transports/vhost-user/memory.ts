/**
 * How the back-end is told about memory: region by region (CONFIGURE_MEM_SLOTS) or as a whole table. Guest address,
 * user address and IOVA are the same number, so the back-end never learns where this process has mapped anything.
 */

import type { MemoryRegion } from "../../memory/index.js";
import { memoryTableCodec, singleRegionCodec, VhostUserRequest } from "../../protocol/vhost-user.js";
import type { VhostUserRegion } from "../../protocol/vhost-user.js";
import type { RegionMapper } from "../memory.js";
import type { Message, RequestChannel } from "./channel.js";

/**
 * @param channel the present connection.
 * @param slots whether CONFIGURE_MEM_SLOTS is in force; otherwise each change sends the whole table.
 */
export function regionMapper(channel: () => RequestChannel, slots: boolean): RegionMapper {
  return {
    add: (region, all) => channel().confirm([slots ? addition(region) : table(all)]),
    remove: (region, rest) => channel().confirm([slots ? removal(region) : table(rest)]),
  };
}

/** Tell a back-end that has just been connected about all memory there is. */
export async function mapAgain(
  channel: RequestChannel,
  slots: boolean,
  regions: readonly MemoryRegion[],
): Promise<void> {
  if (regions.length > 0) await channel.confirm(slots ? regions.map(addition) : [table(regions)]);
}

function table(regions: readonly MemoryRegion[]): Message {
  return {
    request: VhostUserRequest.SET_MEM_TABLE,
    payload: memoryTableCodec.encode(regions.map(describe)),
    fds: regions.map(({ fd }) => fd),
  };
}

function addition(region: MemoryRegion): Message {
  const payload = singleRegionCodec.encode(describe(region));
  return { request: VhostUserRequest.ADD_MEM_REG, payload, fds: [region.fd] };
}

/** Without a descriptor: the addresses and the size name the region ("VHOST_USER_REM_MEM_REG"). */
export function removal(region: MemoryRegion): Message {
  return { request: VhostUserRequest.REM_MEM_REG, payload: singleRegionCodec.encode(describe(region)) };
}

function describe({ iova, size }: MemoryRegion): VhostUserRegion<number> {
  return { guestAddress: iova, size, userAddress: iova, mmapOffset: 0 };
}
