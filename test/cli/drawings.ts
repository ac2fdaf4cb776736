/** The pictures of README and docs, as their files must be. */

import { layoutSvg } from "../../src/cli/layout-svg.js";
import { VirtioFeature } from "../../src/virtqueue/features.js";
import { VirtqueueLayout } from "../../src/virtqueue/layout.js";

/** File name in docs/images to content. */
export function drawings(): Record<string, string> {
  const request = { size: 33 };
  return {
    "virtqueue-split.svg": layoutSvg(new VirtqueueLayout({ queueSize: 8 })),
    "virtqueue-packed.svg": layoutSvg(new VirtqueueLayout({ queueSize: 8, features: VirtioFeature.RING_PACKED })),
    "virtqueues-requests.svg": layoutSvg(new VirtqueueLayout({ queueSize: 128, numQueues: 4, request })),
  };
}
