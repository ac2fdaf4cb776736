/** What the subcommands that open a device share: its argument, its options, and the question of consent. */

import { Argument, type Command, CommanderError } from "commander";
import type { BlockDevice, OpenBlockOptions } from "../index.js";
import { positiveNumber } from "./options.js";
import { narrate } from "./terminal.js";

/** The address of the device as an argument. */
export const addressArgument = (): Argument =>
  new Argument("<address>", "the device: vhost-user:PATH, vhost-vdpa:PATH, pci:DDDD:BB:DD.F, ram:SIZE or file:PATH");

/** Options of how to reach the device. */
export interface DeviceFlags {
  readonly timeout?: number;
}

/** Add the options of how to reach the device. */
export function withDeviceOptions(command: Command): Command {
  return command.option("--timeout <ms>", "give up on an answer after so many milliseconds", positiveNumber);
}

/** Open the device, run `use`, close it whatever happened. */
export async function withDevice<T>(
  address: string,
  flags: DeviceFlags,
  options: OpenBlockOptions,
  use: (disk: BlockDevice) => Promise<T>,
): Promise<T> {
  // Loaded only now: other subcommands need neither the library nor the addon.
  const { openBlock } = await import("../index.js");
  await using disk = await openBlock(address, {
    ...options,
    ...(flags.timeout !== undefined && { timeout: flags.timeout }),
  });
  disk.on("disconnect", ({ message }) => narrate(`virtio: ${message}; trying to reach it again`));
  disk.on("reconnect", ({ attempts, replayed }) => {
    narrate(`virtio: ${address} is back (attempt ${attempts}); ${replayed} requests in flight go on`);
  });
  return await use(disk);
}

/** Add the option by which the user says that what is on the disk may be lost. */
export function withConsentOption(command: Command): Command {
  return command.option("--yes-overwrite", "write over what is on the disk, without which only ram: is written to");
}

/**
 * Refuse to write over a disk that may hold something.
 *
 * @throws CommanderError, a usage error.
 */
export function checkConsent(address: string, flags: { readonly yesOverwrite?: true }): void {
  if (flags.yesOverwrite === true || address.startsWith("ram:")) return;
  throw usageError(`this writes over what is on ${address}; if that may be lost, add --yes-overwrite`);
}

/** An error in the way the command was used. */
export function usageError(message: string): CommanderError {
  return new CommanderError(2, "virtio.usage", message);
}
