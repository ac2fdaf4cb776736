/** `virtio layout`: where every area and field of a virtqueue lies, as a table, as JSON, or drawn. */

import { writeFileSync } from "node:fs";
import { Command } from "commander";
import { VirtioFeature } from "../virtqueue/features.js";
import { VirtqueueLayout } from "../virtqueue/layout.js";
import { size, wholeNumber } from "./options.js";
import { narrate } from "./terminal.js";

interface LayoutFlags {
  readonly queueSize: number;
  readonly packed?: true;
  readonly queues: number;
  readonly requestSize: number;
  readonly requestAlign: number;
  readonly json?: true;
  readonly svg?: string;
}

/** The subcommand. */
export const command = new Command("layout")
  .description("Show how the memory of a virtqueue is laid out. Needs no device.")
  .requiredOption("-n, --queue-size <n>", "descriptors per queue; on split virtqueues a power of two", wholeNumber)
  .option("--packed", "a packed virtqueue instead of a split one")
  .option("--queues <n>", "queues, one behind the other", wholeNumber, 1)
  .option("--request-size <size>", "bytes shared with the device per request", size, 0)
  .option("--request-align <n>", "alignment of a request: 1, 2, 4, 8 or 16", wholeNumber, 1)
  .option("--json", "print the numbers as JSON")
  .option("--svg <file>", "draw the memory to a file; - draws to stdout")
  .addHelpText(
    "after",
    `
Examples:
  virtio layout --queue-size 8
  virtio layout --queue-size 100 --packed --request-size 33
  virtio layout --queue-size 128 --queues 4 --json
  virtio layout --queue-size 8 --svg layout.svg`,
  )
  .action(run);

async function run(flags: LayoutFlags): Promise<void> {
  const layout = new VirtqueueLayout({
    numQueues: flags.queues,
    queueSize: flags.queueSize,
    features: VirtioFeature.VERSION_1 | (flags.packed === true ? VirtioFeature.RING_PACKED : 0n),
    request: { size: flags.requestSize, align: flags.requestAlign },
  });
  if (flags.svg !== undefined) {
    const { layoutSvg } = await import("./layout-svg.js");
    if (flags.svg === "-") {
      process.stdout.write(layoutSvg(layout));
      return;
    }
    writeFileSync(flags.svg, layoutSvg(layout));
    narrate(`drawn to ${flags.svg}`);
  }
  if (flags.json === true) process.stdout.write(`${JSON.stringify(layoutJson(layout), undefined, 2)}\n`);
  if (flags.json === true || flags.svg !== undefined) return;
  const { layoutSummary, layoutTable } = await import("./layout-table.js");
  process.stdout.write(`${[layoutSummary(layout), "", ...layoutTable(layout, { fields: true })].join("\n")}\n`);
}

/** The numbers of a layout under the names that the library gives them. */
function layoutJson(layout: VirtqueueLayout): Record<string, unknown> {
  const { numQueues, queueSize, packed, driverAreaOffset, deviceAreaOffset, deviceAreaEnd } = layout;
  const { reqOffset, requestSize, requestAlign, endOffset, totalSize, areas } = layout;
  return {
    ...{ numQueues, queueSize, packed, driverAreaOffset, deviceAreaOffset, deviceAreaEnd },
    ...{ reqOffset, requestSize, requestAlign, endOffset, totalSize, areas },
  };
}
