/** `virtio info`: what a device is and offers, as a table or as JSON. */

import { Command } from "commander";
import type { BlockDevice, BlockInfo } from "../index.js";
import { addressArgument, type DeviceFlags, withDevice, withDeviceOptions } from "./device.js";
import { formatBytes } from "./format.js";
import { columns } from "./table.js";
import { styled } from "./terminal.js";

interface InfoFlags extends DeviceFlags {
  readonly json?: true;
}

/** The subcommand. */
export const command = withDeviceOptions(
  new Command("info")
    .description("Show what a block device is, offers and is limited to. Changes nothing on it.")
    .addArgument(addressArgument())
    .option("--json", "print it as JSON"),
)
  .addHelpText(
    "after",
    `
Examples:
  virtio info ram:64M
  virtio info file:disk.img
  virtio info vhost-vdpa:/dev/vhost-vdpa-0
  virtio info vhost-user:/run/disk.sock --json`,
  )
  .action(run);

async function run(address: string, flags: InfoFlags): Promise<void> {
  await withDevice(address, flags, { readOnly: true }, async (disk) => {
    const { info } = disk;
    const id = await askId(disk);
    const text = flags.json === true ? JSON.stringify({ ...info, id }, undefined, 2) : describe(info, id).join("\n");
    process.stdout.write(`${text}\n`);
  });
}

/** The identity, or null from a device that does not tell it. */
async function askId(disk: BlockDevice): Promise<string | null> {
  try {
    return await disk.getId();
  } catch (error) {
    if (error instanceof Error && "code" in error && error.code === "ERR_VIRTIO_UNSUPPORTED") return null;
    throw error;
  }
}

const CACHE = {
  writethrough: "writethrough: a completed write is stable",
  writeback: "writeback: a completed write is stable after a flush",
  unknown: "unknown: the device offers no flush",
} as const;

function describe(info: BlockInfo, id: string | null): string[] {
  const { limits } = info;
  return [
    ...section("device", [
      ["address", info.address],
      ["capacity", `${formatBytes(info.capacity)} (${info.capacity} bytes)`],
      ["block size", `${info.blockSize} bytes`],
      ["id", id === null ? "not told" : JSON.stringify(id)],
      ["cache", CACHE[info.cache]],
    ]),
    ...section("queues", [
      ["format", info.format],
      ["in use", `${info.queues} of ${info.maxQueues}, ${info.queueSize} descriptors each`],
      ["segments", `${limits.maxSegments} per request, of at most ${formatBytes(limits.maxSegmentBytes)}`],
      ["request", `at most ${formatBytes(limits.maxRequestBytes)}`],
    ]),
    ...section(
      "features",
      info.offered.map((name) => [name, info.features.includes(name) ? "in use" : "not used"]),
    ),
    ...section("config space", configRows(info.config)),
  ];
}

/** The fields that the accepted features bring; those of nested structs by their path. */
function configRows(fields: object, path = ""): string[][] {
  return Object.entries(fields).flatMap(([name, value]: [string, unknown]) =>
    typeof value === "object" && value !== null
      ? configRows(value, `${path}${name}.`)
      : [[`${path}${name}`, String(value)]],
  );
}

function section(title: string, rows: readonly (readonly string[])[]): string[] {
  return [styled(process.stdout, "bold", title), ...columns("ll", rows).map((line) => `  ${line}`)];
}
