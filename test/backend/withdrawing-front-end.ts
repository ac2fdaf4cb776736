/**
 * A front-end in a process of its own that takes its memory away under load: `withdrawing-front-end.js SOCKET FORMAT
 * WHAT`. It keeps a ring full of reads and writes; then it truncates the file of its memory (`memory`), of its data
 * alone (`data`), or of the region of requests in flight (`inflight`), and rings once more.
 */

import { ftruncateSync, openSync, rmSync } from "node:fs";
import {
  BlkRequestType,
  inflightCodec,
  singleRegionCodec,
  VhostUserProtocolFeature,
  VhostUserRequest as R,
} from "../../src/protocol/index.js";
import { mapShared, unmapShared } from "../../src/sys/index.js";
import { VirtioFeature } from "../../src/virtqueue/index.js";
import { ALL_PROTOCOL_FEATURES, FrontEnd, GUEST, MEMORY_BYTES, turns, USER } from "./front-end.js";

const [path, format, what] = process.argv.slice(2);

/** A file of tmpfs: like the memory of many virtual machines, it cannot be sealed. */
function unsealed(bytes: number): number {
  const name = `/dev/shm/virtio-test-${process.pid}-${bytes}.mem`;
  const fd = openSync(name, "w+");
  rmSync(name);
  ftruncateSync(fd, bytes);
  return fd;
}

const front = new FrontEnd(path, unsealed(MEMORY_BYTES));
const data = unsealed(MEMORY_BYTES / 2);
// This process must not touch its own memory any more when that is gone.
await front.handshake(
  format === "packed" ? VirtioFeature.RING_PACKED : 0n,
  ALL_PROTOCOL_FEATURES | VhostUserProtocolFeature.INFLIGHT_SHMFD,
);
const half = MEMORY_BYTES / 2;
const ringRegion = { guestAddress: GUEST, size: half, userAddress: USER, mmapOffset: 0 };
const dataRegion = { guestAddress: GUEST + BigInt(half), size: half, userAddress: USER + BigInt(half), mmapOffset: 0 };
await front.must(R.ADD_MEM_REG, singleRegionCodec.encode(ringRegion), [front.memfd]);
await front.must(R.ADD_MEM_REG, singleRegionCodec.encode(dataRegion), [data]);
const size = 128;
const inflight = unsealed(65536);
if (what === "inflight") {
  const description = { mmapSize: 65536, mmapOffset: 0, numQueues: 1, queueSize: size };
  await front.must(R.SET_INFLIGHT_FD, inflightCodec.encode(description), [inflight]);
}
const ring = front.ring(0, size);
await ring.start();
await ring.enable(1);

// The data lie in the second region; the front-end helper writes headers through its own mapping of the first file,
// so they are copied over.
const mapped = mapShared(data, half);
for (let round = 0; round < 20; round++) {
  for (let i = 0; i < 32; i++) {
    const request = { into: 4096 };
    if (i % 2 === 0) ring.request(BlkRequestType.IN, BigInt(i), request);
    else ring.request(BlkRequestType.OUT, BigInt(i), { out: new Uint8Array(4096) });
  }
  new Uint8Array(mapped).set(front.bytes.subarray(half));
  ring.kick.signal();
  if (round === 10) {
    ftruncateSync(what === "inflight" ? inflight : data, 0);
    // All may be done already: one more request meets what is gone.
    if (what !== "memory") ring.request(BlkRequestType.IN, 0n, { into: 512 });
    else ftruncateSync(front.memfd, 0);
    ring.kick.signal();
    await front.hungUp();
    process.stdout.write("hung up\n");
    process.exit(0);
  }
  while (ring.driver.chains.size > 0) {
    ring.driver.collect();
    await turns(1);
  }
  ring.rewind();
}
unmapShared(mapped);
