/** What `virtio doctor` finds: the form of a finding, and what findings together say about a transport. */

/** The ways to a device. */
export const TRANSPORTS = ["vhost-user", "vhost-vdpa", "pci"] as const;
/** One of {@link TRANSPORTS}. */
export type TransportName = (typeof TRANSPORTS)[number];

/** One thing that was looked at. */
export interface Finding {
  /** The transport that it is about; `system` for all of them. */
  readonly section: "system" | TransportName;
  /** What was looked at, in a word or two. */
  readonly name: string;
  /** `missing` keeps the section's transports from working, `not needed` does not. */
  readonly status: "ok" | "missing" | "not needed";
  /** What was found, in one sentence. */
  readonly message: string;
  /** The command that would fix it, or what to do where no command can; null when there is nothing to fix. */
  readonly fix: string | null;
}

/** Makes the findings of one section. */
export interface FindingsOf {
  readonly ok: (name: string, message: string) => Finding;
  readonly missing: (name: string, message: string, fix: string | null) => Finding;
  readonly notNeeded: (name: string, message: string, fix?: string) => Finding;
}

/** What makes the findings of a section. */
export function findingsOf(section: Finding["section"]): FindingsOf {
  return {
    ok: (name, message) => ({ section, name, status: "ok", message, fix: null }),
    missing: (name, message, fix) => ({ section, name, status: "missing", message, fix }),
    notNeeded: (name, message, fix) => ({ section, name, status: "not needed", message, fix: fix ?? null }),
  };
}

/** Which transports lack nothing. */
export function workingTransports(findings: readonly Finding[]): Record<TransportName, boolean> {
  const works = (transport: TransportName): boolean =>
    findings.every(({ section, status }) => status !== "missing" || (section !== "system" && section !== transport));
  return { "vhost-user": works("vhost-user"), "vhost-vdpa": works("vhost-vdpa"), pci: works("pci") };
}

/** The findings about several devices, of which one will do: when one is there, the others are not missing. */
export function oneIsEnough(findings: readonly Finding[]): Finding[] {
  const isThere = findings.some(({ status }) => status === "ok");
  return findings.map((each) => (isThere && each.status === "missing" ? { ...each, status: "not needed" } : each));
}
