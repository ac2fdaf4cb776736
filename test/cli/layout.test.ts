/** Tests of `virtio layout`: table, JSON and drawing. */

import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { layoutSvg } from "../../src/cli/layout-svg.js";
import { VirtioFeature } from "../../src/virtqueue/features.js";
import { VirtqueueLayout, type VirtqueueLayoutOptions } from "../../src/virtqueue/layout.js";
import { virtio } from "./command.js";
import { drawings } from "./drawings.js";
import { assertTextsApart, assertWellFormed, textBoxes } from "./svg.js";

test("virtio layout prints each area and field with offset, size and alignment", async () => {
  const { code, stdout, stderr } = await virtio(["layout", "--queue-size", "8", "--request-size", "33"]);
  assert.equal(stderr, "");
  assert.equal(code, 0);
  assert.equal(
    stdout.toString(),
    `split virtqueue of 8 descriptors, 496 bytes

offset  size  align  written by
     0   128     16  the driver  descriptor area: descriptor table
     0   128      8                struct virtq_desc desc[8]
    +0     8      8                  le64 addr
    +8     4      4                  le32 len
   +12     2      2                  le16 flags
   +14     2      2                  le16 next
   128    24      2  the driver  driver area: available ring
   128     2      2                le16 avail.flags
   130     2      2                le16 avail.idx
   132    16      2                le16 avail.ring[8]
   148     2      2                le16 avail.used_event
   150     2                       padding
   152    72      4  the device  device area: used ring
   152     2      2                le16 used.flags
   154     2      2                le16 used.idx
   156    64      4                struct virtq_used_elem used.ring[8]
    +0     4      4                  le32 id
    +4     4      4                  le32 len
   220     2      2                le16 used.avail_event
   222     2                       padding
   224   264      1  both        request data
   224   264      1                u8[33] request[8]
   488     8                     padding
   496                           end
`,
  );
});

test("virtio layout --packed prints the event suppression structures", async () => {
  const { code, stdout } = await virtio(["layout", "-n", "3", "--packed", "--queues", "2"]);
  assert.equal(code, 0);
  assert.equal(
    stdout.toString(),
    `packed virtqueue of 3 descriptors, 64 bytes; 2 queues, the next every 64 bytes, 128 bytes in all

offset  size  align  written by
     0    48     16  both        descriptor area: descriptor ring
     0    48      8                struct pvirtq_desc desc[3]
    +0     8      8                  le64 addr
    +8     4      4                  le32 len
   +12     2      2                  le16 id
   +14     2      2                  le16 flags
    48     4      4  the driver  driver area: event suppression
    48     2      2                le16 driver_event.desc
    50     2      2                le16 driver_event.flags
    52     4      4  the device  device area: event suppression
    52     2      2                le16 device_event.desc
    54     2      2                le16 device_event.flags
    56     8                     padding
    64                           end
`,
  );
});

test("virtio layout --json prints the numbers under the library's names", async () => {
  const words = "layout --queue-size 128 --packed --queues 4 --request-size 33 --request-align 8 --json".split(" ");
  const { code, stdout } = await virtio(words);
  assert.equal(code, 0);
  const { areas, ...numbers } = JSON.parse(stdout.toString()) as Record<string, unknown>;
  assert.deepEqual(numbers, {
    ...{ numQueues: 4, queueSize: 128, packed: true },
    ...{ driverAreaOffset: 2048, deviceAreaOffset: 2052, deviceAreaEnd: 2056 },
    ...{ reqOffset: 2056, requestSize: 33, requestAlign: 8, endOffset: 6288, totalSize: 25152 },
  });
  assert.ok(Array.isArray(areas) && areas.length === 4);
});

test("virtio layout --svg draws to a file or to stdout", async () => {
  const folder = mkdtempSync(join(tmpdir(), "virtio-layout-"));
  try {
    const file = join(folder, "layout.svg");
    const toFile = await virtio(["layout", "-n", "8", "--svg", file]);
    assert.deepEqual([toFile.code, toFile.stdout.length, toFile.stderr], [0, 0, `drawn to ${file}\n`]);
    const toStdout = await virtio(["layout", "-n", "8", "--svg", "-"]);
    assert.equal(toStdout.stdout.toString(), readFileSync(file, "utf8"));
    assert.equal(toStdout.stdout.toString(), drawings()["virtqueue-split.svg"]);
  } finally {
    rmSync(folder, { recursive: true });
  }
});

test("the pictures in docs/images are what the code draws; npm run images draws them again", () => {
  for (const [name, svg] of Object.entries(drawings())) {
    const stored = readFileSync(new URL(`../../../docs/images/${name}`, import.meta.url), "utf8");
    assert.ok(stored === svg, `docs/images/${name} differs`);
  }
});

const packed = { features: VirtioFeature.RING_PACKED };
const drawn: readonly VirtqueueLayoutOptions[] = [
  { queueSize: 1 },
  { queueSize: 2, numQueues: 3 },
  { queueSize: 4, request: { size: 1 } },
  { queueSize: 32768, numQueues: 65536, request: { size: 48, align: 16 } },
  { queueSize: 32768, numQueues: 2, request: { size: 2 ** 24 } },
  { queueSize: 1, ...packed },
  { queueSize: 3, ...packed, request: { size: 33 } },
  { queueSize: 1000, ...packed, numQueues: 2, request: { size: 16, align: 16 } },
  { queueSize: 32768, ...packed },
];
for (const options of drawn) {
  const { queueSize, numQueues = 1, features, request } = options;
  const what = `${features === undefined ? "split" : "packed"} queue of ${queueSize}, ${numQueues} queues`;
  test(`drawing of a ${what}, requests of ${request?.size ?? 0}: well-formed, all text inside, none over another`, () => {
    const layout = new VirtqueueLayout(options);
    const svg = layoutSvg(layout);
    assertWellFormed(svg);
    const texts = textBoxes(svg);
    assertTextsApart(svg, texts);
    for (const a of texts) {
      for (const [, points] of svg.matchAll(/<polygon points="([^"]*)" class="paper"/g)) {
        const xs = points.split(" ").map((point) => Number(point.split(",")[0]));
        const ys = points.split(" ").map((point) => Number(point.split(",")[1]));
        const isBeside = Math.max(...xs) <= a.left || a.right <= Math.min(...xs);
        assert.ok(
          isBeside || Math.max(...ys) <= a.top || a.bottom <= Math.min(...ys),
          `a tear runs through "${a.content}"`,
        );
      }
    }
    for (const area of layout.areas) {
      const label = area.name.replace(/:.*/, "");
      assert.ok(
        texts.some((box) => box.content === label),
        label,
      );
      assert.ok(texts.filter((box) => box.content === String(area.offset)).length >= 2, `offset ${area.offset}`);
    }
    assert.ok(texts.some((box) => box.content === String(layout.endOffset)));
  });
}
