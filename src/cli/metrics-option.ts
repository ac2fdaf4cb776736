/** The option --metrics of the commands that count: where a page for Prometheus is to be. */

import { type Command, InvalidArgumentError } from "commander";
import type { MetricsPage } from "./metrics.js";

/** Where to listen for TCP connections. */
export interface HostPort {
  readonly host: string;
  /** 0: any free one. */
  readonly port: number;
}

/** Parser of a port on this machine, with the address to listen at or without: `9100`, `0.0.0.0:9100`, `[::1]:9100`. */
function hostPort(word: string): HostPort {
  const [, inBrackets, plain, port] = /^(?:(?:\[([0-9A-Fa-f:.]+)\]|([^\s:[\]/]+)):)?([0-9]{1,5})$/.exec(word) ?? [];
  if (port === undefined || Number(port) > 65535) {
    throw new InvalidArgumentError("It is no PORT or HOST:PORT, such as 9100, 0.0.0.0:9100 or [::1]:9100.");
  }
  return { host: inBrackets ?? plain ?? "127.0.0.1", port: Number(port) };
}

/** What a command with the option finds among its flags. */
export interface MetricsFlags {
  readonly metrics?: HostPort;
}

/** Add the option. */
export function withMetricsOption(command: Command): Command {
  return command.option("--metrics <[host:]port>", "tell Prometheus, at http://HOST:PORT/metrics", hostPort);
}

/** The page that the flags want, to be closed with the command; the library behind it is loaded for it only. */
export async function openMetrics({ metrics }: MetricsFlags): Promise<MetricsPage | undefined> {
  if (metrics === undefined) return undefined;
  const { MetricsPage } = await import("./metrics.js");
  return await MetricsPage.open(metrics);
}
