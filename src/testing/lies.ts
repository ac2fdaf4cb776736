/** The table of lies that a hostile device can tell, and what a driver has to make of each. */

import { VIRTQ_DESC_F_AVAIL, VIRTQ_DESC_F_USED, VIRTQ_DESC_F_WRITE } from "../virtqueue/defs.js";
import type { FakeRequest } from "./fake-device.js";
import type { HostileRing } from "./hostile-ring.js";

/**
 * What a driver has to do when it looks next:
 * `"breaks"`: break the queue with ERR_VIRTIO_QUEUE_BROKEN, no request of it succeeds any more;
 * `"fails"`: return the request; a virtio-blk driver fails it with ERR_VIRTIO_STATUS, and no other;
 * `"short"`: return the request as one into which nothing, or less than asked for, was written;
 * `"whole"`: return the request as answered rightly, the length clamped to what the device may write;
 * `"nothing"`: see nothing; the request stays in flight, and can be answered rightly afterwards.
 */
export type LieOutcome = "breaks" | "fails" | "short" | "whole" | "nothing";

/** A lie of {@link LIES}. */
export interface Lie {
  /** Its name, for `HostileDevice.tell`. */
  readonly name: string;
  /** What the device writes. */
  readonly what: string;
  /** The format that it can be told on; both when undefined. */
  readonly format?: "split" | "packed";
  /** What a driver has to do. */
  readonly outcome: LieOutcome;
  /** A lie only where IN_ORDER was negotiated. */
  readonly inOrder?: true;
  /** Tell it; see `HostileDevice.tell`. */
  readonly tell: (hostile: HostileRing, request: FakeRequest) => (() => void) | void;
}

const ALL_ONES = 0xffff_ffff;

/** Answer a request as an honest device does whose data are `request.written` bytes long, the status last. */
function answer({ device }: HostileRing, request: FakeRequest, length?: number): void {
  writeStatus(request, 0);
  device.complete(request, length);
  device.publish();
}

/** Write the last byte that the device may write: the status of a virtio-blk request. */
function writeStatus(request: FakeRequest, status: number): void {
  const room = roomOf(request);
  if (room > 0) request.write(Uint8Array.of(status), room - 1);
}

function roomOf({ writableLengths }: FakeRequest): number {
  return writableLengths.reduce((sum, length) => sum + length, 0);
}

/** An id that no request which the device holds has. */
function freeId({ device, size }: HostileRing): number {
  let id = size - 1;
  while (device.held.some((request) => request.id === id)) id--;
  return id;
}

/** Every lie, each with what a driver has to make of it. */
export const LIES: readonly Lie[] = [
  // What names the request.
  {
    name: "id-out-of-range",
    what: "a used entry with the queue size as id",
    outcome: "breaks",
    tell: (hostile) => hostile.forge(hostile.size, 0),
  },
  {
    name: "id-all-ones",
    what: "a used entry with all bits of the id set",
    outcome: "breaks",
    tell: (hostile) => hostile.forge(ALL_ONES, 0),
  },
  {
    name: "id-not-in-flight",
    what: "a used entry with an id that names no request in flight",
    outcome: "breaks",
    tell: (hostile) => hostile.forge(freeId(hostile), 0),
  },
  {
    name: "id-high-bits",
    what: "a used entry whose id is right in its lower 16 bits only",
    format: "split",
    outcome: "breaks",
    tell: (hostile, request) => hostile.forge(0x1_0000 + request.id, 0),
  },
  {
    name: "id-twice",
    what: "a second used entry for the same request",
    outcome: "breaks",
    tell(hostile, request) {
      answer(hostile, request);
      hostile.forge(request.id, 0);
    },
  },
  {
    name: "flood",
    what: "a used ring full of entries for the same request",
    outcome: "breaks",
    tell(hostile, request) {
      const { position } = hostile;
      for (let i = 0; i < hostile.size; i++) {
        if (hostile.packed) hostile.setPacked(position + i, request.id, ALL_ONES, hostile.flagsAhead(i));
        else hostile.setUsed(position + i, request.id, ALL_ONES);
      }
      if (!hostile.packed) hostile.usedIdx = position + hostile.size;
    },
  },
  {
    name: "id-unpublished",
    what: "a used entry for a chain that the driver has written and not yet made available",
    outcome: "breaks",
    tell: (hostile) => hostile.forge(hostile.packed ? freeId(hostile) : hostile.nextHead, 0),
  },
  {
    name: "out-of-order",
    what: "the latest request before all others",
    format: "split",
    inOrder: true,
    outcome: "breaks",
    tell: (hostile) => answer(hostile, hostile.device.held[hostile.device.held.length - 1]),
  },
  {
    name: "batch-unwritten",
    what: "one used entry for all requests, of which only the last has a status",
    inOrder: true,
    outcome: "fails",
    tell({ device }) {
      writeStatus(device.held[device.held.length - 1], 0);
      device.completeBatch(device.held.length);
      device.publish();
    },
  },
  // Where the used entries are.
  {
    name: "index-ahead",
    what: "used.idx beyond everything that was made available",
    format: "split",
    outcome: "breaks",
    tell: (hostile) => {
      hostile.usedIdx += hostile.device.held.length + 1;
    },
  },
  {
    name: "index-back",
    what: "used.idx one back",
    format: "split",
    outcome: "breaks",
    tell: (hostile) => {
      hostile.usedIdx--;
    },
  },
  {
    name: "index-half",
    what: "used.idx moved by half of its range",
    format: "split",
    outcome: "breaks",
    tell: (hostile) => {
      hostile.usedIdx += 0x8000;
    },
  },
  {
    name: "index-withdrawn",
    what: "used.idx taken back after the driver has looked",
    format: "split",
    outcome: "whole",
    tell(hostile, request) {
      answer(hostile, request);
      return () => {
        hostile.usedIdx--;
        hostile.usedIdx++;
      };
    },
  },
  {
    name: "position-skipped",
    what: "a used entry one descriptor behind where it belongs",
    format: "packed",
    outcome: "nothing",
    tell(hostile, request) {
      hostile.setPacked(hostile.position + 1, request.id, 0, hostile.flagsAhead(1));
    },
  },
  {
    name: "wrap-flipped",
    what: "a used entry with the wrap bits of the other round",
    format: "packed",
    outcome: "nothing",
    tell: (hostile, request) =>
      hostile.setPacked(hostile.position, request.id, 0, hostile.flagsAhead(hostile.size) | VIRTQ_DESC_F_WRITE),
  },
  {
    name: "avail-flipped",
    what: "a used entry whose AVAIL bit is wrong",
    format: "packed",
    outcome: "nothing",
    tell: (hostile, request) =>
      hostile.setPacked(hostile.position, request.id, 0, hostile.usedFlags ^ VIRTQ_DESC_F_AVAIL),
  },
  {
    name: "used-flipped",
    what: "a used entry whose USED bit is wrong",
    format: "packed",
    outcome: "nothing",
    tell: (hostile, request) =>
      hostile.setPacked(hostile.position, request.id, 0, hostile.usedFlags ^ VIRTQ_DESC_F_USED),
  },
  {
    name: "flags-noise",
    what: "a right used entry with every other flag set",
    format: "packed",
    outcome: "whole",
    tell(hostile, request) {
      const { position, usedFlags } = hostile;
      const length = Math.max(request.written, roomOf(request));
      answer(hostile, request);
      hostile.setPacked(position, request.id, length, usedFlags | 0x7f7f);
    },
  },
  {
    name: "write-missing",
    what: "a length of 2^32-1 in a used entry without WRITE; some devices never set it",
    format: "packed",
    outcome: "whole",
    tell(hostile, request) {
      const { position, usedFlags } = hostile;
      answer(hostile, request);
      hostile.setPacked(position, request.id, ALL_ONES, usedFlags);
    },
  },
  // What was written.
  {
    name: "length-all-ones",
    what: "a length of 2^32-1",
    outcome: "whole",
    tell: (hostile, request) => answer(hostile, request, ALL_ONES),
  },
  {
    name: "length-one-more",
    what: "a length of one byte more than the device may write",
    outcome: "whole",
    tell: (hostile, request) => answer(hostile, request, roomOf(request) + 1),
  },
  {
    name: "length-zero",
    what: "a length of 0",
    outcome: "short",
    tell: (hostile, request) => answer(hostile, request, 0),
  },
  {
    name: "length-one",
    what: "a length of 1",
    outcome: "short",
    tell: (hostile, request) => answer(hostile, request, 1),
  },
  {
    name: "status-unwritten",
    what: "a request returned without a status",
    outcome: "fails",
    tell({ device }, request) {
      device.complete(request, roomOf(request));
      device.publish();
    },
  },
  {
    name: "status-unknown",
    what: "a status that means nothing",
    outcome: "fails",
    tell({ device }, request) {
      writeStatus(request, 0x7f);
      device.complete(request, roomOf(request));
      device.publish();
    },
  },
  {
    name: "status-late",
    what: "a status and data that come when the request was returned already",
    outcome: "fails",
    tell({ device }, request) {
      device.complete(request, roomOf(request));
      device.publish();
      return () => {
        request.write(new Uint8Array(roomOf(request)));
      };
    },
  },
  // Memory that is the driver's alone.
  {
    name: "descriptors-rewritten",
    what: "every descriptor and indirect table rewritten while requests are in flight",
    outcome: "whole",
    tell(hostile, request) {
      hostile.rewriteDescriptors();
      answer(hostile, request, roomOf(request));
    },
  },
  {
    name: "next-cyclic",
    what: "`next` of all descriptors changed into one circle",
    format: "split",
    outcome: "whole",
    tell(hostile, request) {
      hostile.linkInCircle();
      answer(hostile, request, roomOf(request));
    },
  },
  {
    name: "avail-rewritten",
    what: "the driver area rewritten",
    outcome: "whole",
    tell(hostile, request) {
      hostile.rewriteDriverArea(0xff);
      answer(hostile, request, roomOf(request));
    },
  },
  {
    name: "header-rewritten",
    what: "what the driver sent rewritten: memory that the device may only read",
    outcome: "whole",
    tell(hostile, request) {
      request.scribble(0x5a);
      answer(hostile, request, roomOf(request));
    },
  },
  // Notifications.
  {
    name: "event-nonsense",
    what: "an event position outside of the ring",
    outcome: "whole",
    tell(hostile, request) {
      hostile.setEvent(0x7fff, 2);
      answer(hostile, request, roomOf(request));
    },
  },
  {
    name: "event-flags-nonsense",
    what: "reserved bits in used.flags, or the reserved value of the event flags",
    outcome: "whole",
    tell(hostile, request) {
      hostile.setEvent(0xffff, 0xffff);
      answer(hostile, request, roomOf(request));
    },
  },
  {
    name: "storm",
    what: "a thousand notifications without a reason",
    outcome: "nothing",
    tell(hostile) {
      for (let i = 0; i < 1000; i++) hostile.interrupt();
    },
  },
  {
    name: "silence",
    what: "nothing at all",
    outcome: "nothing",
    tell: () => {},
  },
];
