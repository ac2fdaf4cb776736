#!/usr/bin/env node
/** The command `virtio`: finds the subcommand, loads only that, and turns what goes wrong into an exit code. */

import { readFileSync } from "node:fs";
import { Command } from "commander";
import { reportFailure } from "./failure.js";

/** The subcommands, in the order in which the help lists them. A new one is a line here and a file. */
const COMMANDS: Readonly<Record<string, () => Promise<{ readonly command: Command }>>> = {
  demo: () => import("./demo.js"),
  info: () => import("./info.js"),
  read: () => import("./read.js"),
  write: () => import("./write.js"),
  bench: () => import("./bench.js"),
  serve: () => import("./serve.js"),
  layout: () => import("./layout.js"),
  pci: () => import("./pci.js"),
  doctor: () => import("./doctor.js"),
};

const HELP = `
Devices are named by address: vhost-user:PATH, vhost-vdpa:PATH, pci:DDDD:BB:DD.F, ram:SIZE, file:PATH.
Sizes: 512, 4K, 1M, 2G, 1GiB.
Exit codes: 0 done, 1 failed, 2 wrong usage, 4 device or permission.

Examples:
  virtio demo                                          see a disk written, read back and verified
  virtio info vhost-user:/run/disk.sock                what a device offers
  virtio read vhost-user:/run/disk.sock > disk.img     copy a disk
  virtio serve file:disk.img --socket /run/disk.sock   be the disk
  virtio layout --queue-size 8                         where every field of a virtqueue lies
  virtio doctor                                        what this machine can do, and what it lacks`;

async function main(words: readonly string[]): Promise<void> {
  const program = new Command("virtio")
    .description("Drive virtio devices from userspace, and serve them.")
    .version(packageVersion(), "-V, --version")
    .configureOutput({ outputError: () => undefined })
    .exitOverride()
    .addHelpText("after", HELP);
  const named = words.find((word) => !word.startsWith("-"));
  const wanted = named !== undefined && Object.hasOwn(COMMANDS, named) ? [named] : Object.keys(COMMANDS);
  for (const name of wanted) {
    const { command } = await COMMANDS[name]();
    program.addCommand(adopted(command, program));
  }
  if (words.length === 0) program.help();
  await program.parseAsync(words, { from: "user" });
}

/** `command` and its subcommands with the settings of `parent`. */
function adopted(command: Command, parent: Command): Command {
  command.copyInheritedSettings(parent).option("--debug", "show the stack of an error");
  for (const each of command.commands) adopted(each, command);
  return command;
}

function packageVersion(): string {
  const text = readFileSync(new URL("../../../package.json", import.meta.url), "utf8");
  return (JSON.parse(text) as { version: string }).version;
}

// Whoever reads our output may stop reading: `virtio layout --json | head -c 1`. Nothing is left to do then.
process.stdout.on("error", (error: NodeJS.ErrnoException) => {
  if (error.code !== "EPIPE") throw error;
  process.exit(0);
});

const words = process.argv.slice(2);
try {
  await main(words);
} catch (error) {
  process.exitCode = reportFailure(error, words);
}
