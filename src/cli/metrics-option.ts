/** The option --metrics of the commands that count: where a page for Prometheus is to be. */

import type { Command } from "commander";
import type { MetricsPage } from "./metrics.js";
import { type HostPort, hostPort } from "./options.js";

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
