/** `virtio doctor`: what this machine offers for each transport, what is missing, and what would fix that. */

import { Command } from "commander";
import { type Finding, TRANSPORTS, type TransportName, workingTransports } from "./doctor-findings.js";
import { pciFindings } from "./doctor-pci.js";
import { systemFindings, vhostUserFindings } from "./doctor-system.js";
import { vdpaFindings } from "./doctor-vdpa.js";
import { type Machine, THIS_MACHINE } from "./machine.js";
import { columns } from "./table.js";
import { styled } from "./terminal.js";

/** The subcommand. */
export const command = new Command("doctor")
  .description("Tell what this machine offers for each transport, what is missing, and the command that would fix it.")
  .option("--json", "print it as JSON")
  .addHelpText(
    "after",
    `
It changes nothing, and opens no device that could be in use. Exit code 0 when vhost-user works, whatever the others
lack; otherwise 1.

Examples:
  virtio doctor
  virtio doctor --json`,
  )
  .action(run);

async function run(flags: { readonly json?: true }): Promise<void> {
  const findings = await examine(THIS_MACHINE);
  const transports = workingTransports(findings);
  const text =
    flags.json === true
      ? JSON.stringify({ transports, findings }, undefined, 2)
      : describe(findings, transports).join("\n");
  process.stdout.write(`${text}\n`);
  if (!transports["vhost-user"]) process.exitCode = 1;
}

/** All findings, section by section. */
async function examine(machine: Machine): Promise<Finding[]> {
  return [
    ...systemFindings(machine),
    ...(await vhostUserFindings()),
    ...vdpaFindings(machine),
    ...pciFindings(machine),
  ];
}

const COLOURS = { ok: "green", missing: "red", "not needed": "dim" } as const;

/** The findings as lines of text. */
export function describe(findings: readonly Finding[], transports: Readonly<Record<TransportName, boolean>>): string[] {
  const bold = (text: string): string => styled(process.stdout, "bold", text);
  const rows = findings.map(({ status, name, message }) => [
    styled(process.stdout, COLOURS[status], status),
    name,
    message,
  ]);
  const lines = columns("lll", rows);
  const of = (section: Finding["section"]): string[] =>
    findings.flatMap((finding, index) => {
      if (finding.section !== section) return [];
      const isWanted = finding.status === "missing" && finding.fix !== null;
      return [`  ${lines[index]}`, ...(isWanted ? [`${" ".repeat(14)}fix: ${finding.fix}`] : [])];
    });
  return [
    bold("system"),
    ...of("system"),
    ...TRANSPORTS.flatMap((name) => [
      bold(`${name}: ${transports[name] ? "works" : "does not work yet"}`),
      ...of(name),
    ]),
  ];
}
