/** `virtio pci`: the virtio functions of this machine, and which driver has them. */

import { Argument, Command, InvalidArgumentError } from "commander";
import { isVfioDriver } from "../transports/pci/sysfs.js";
import { usageError } from "./device.js";
import { type Machine, THIS_MACHINE } from "./machine.js";
import { carryOut, driverName, type Move, nameOf, planBind, planUnbind, shellCommand } from "./pci-bind.js";
import { describeFunctions, describeGroup, listFunctions } from "./pci-list.js";
import { narrate } from "./terminal.js";

const DEFAULT_DRIVER = "vfio-pci";

interface MoveFlags {
  readonly dryRun?: true;
}

const list = new Command("list")
  .description("List the virtio functions: type, driver, IOMMU group, and what each still needs. Changes nothing.")
  .option("--json", "print it as JSON")
  .action((flags: { readonly json?: true }) => {
    const functions = listFunctions(THIS_MACHINE);
    const text =
      flags.json === true ? JSON.stringify({ functions }, undefined, 2) : describeFunctions(functions).join("\n");
    process.stdout.write(`${text}\n`);
  });

const bind = new Command("bind")
  .description(
    "Take a function from the kernel and give it to VFIO, for programs of users. Refused while it is in use.",
  )
  .addArgument(addressArgument())
  .option("--driver <name>", "the VFIO driver to give it to", vfioDriver, DEFAULT_DRIVER)
  .option("--dry-run", "change nothing, print the steps as commands of a root shell")
  .action((address: string, flags: MoveFlags & { readonly driver: string }) =>
    move(THIS_MACHINE, planBind(THIS_MACHINE, address, flags.driver), flags),
  );

const unbind = new Command("unbind")
  .description("Give a function back to the kernel's driver. Refused while a process drives it.")
  .addArgument(addressArgument())
  .option("--dry-run", "change nothing, print the steps as commands of a root shell")
  .action((address: string, flags: MoveFlags) => move(THIS_MACHINE, planUnbind(THIS_MACHINE, address), flags));

/** The subcommand. */
export const command = new Command("pci")
  .description("List the machine's virtio PCI functions, bind them to VFIO, and give them back.")
  .addArgument(new Argument("[subcommand]").argOptional())
  .usage("list|bind|unbind [options]")
  .helpCommand("help [subcommand]", "show the help of a subcommand")
  .addCommand(list)
  .addCommand(bind)
  .addCommand(unbind)
  .addHelpText(
    "after",
    `
An address is DDDD:BB:DD.F, with pci: before it or not. Changing drivers takes root, and is undone when it fails half-way.

Examples:
  virtio pci list
  virtio pci bind 0000:00:04.0 --dry-run
  virtio pci bind 0000:00:04.0
  virtio pci unbind 0000:00:04.0`,
  )
  .action((word: string | undefined) => {
    throw usageError(`pci ${word === undefined ? "needs a subcommand" : `has no '${word}'`}: list, bind or unbind`);
  });

function addressArgument(): Argument {
  return new Argument("<address>", "the function, as `virtio pci list` shows it");
}

function vfioDriver(word: string): string {
  if (!/^[\w-]+$/.test(word) || !isVfioDriver(word)) throw new InvalidArgumentError("It is no name of a VFIO driver.");
  return word;
}

function move(machine: Machine, planned: Move, flags: MoveFlags): void {
  const { facts, driver, steps, unknown } = planned;
  if (flags.dryRun === true) {
    const lines = [...unknown.map((what) => `# could not tell ${what}: see for yourself`), ...steps.map(shellCommand)];
    process.stdout.write(`${(steps.length === 0 ? [`# ${nothingToDo(planned)}`] : lines).join("\n")}\n`);
    return;
  }
  const after = steps.length === 0 ? facts : carryOut(machine, planned);
  narrate(steps.length === 0 ? nothingToDo(planned) : `${nameOf(facts)} had ${driverName(facts)}, has ${driver} now`);
  if (isVfioDriver(driver)) narrate(describeGroup(machine, after));
}

function nothingToDo({ facts, driver }: Move): string {
  return `${nameOf(facts)} has ${driver} already, nothing to do`;
}
