/** Output of the command: data on stdout, narration on stderr, colour only where a terminal wants it. */

import type { WriteStream } from "node:tty";
import { styleText } from "node:util";

type Format = Parameters<typeof styleText>[0];

/** `text` in `format`, where `stream` is a terminal with colours; NO_COLOR and FORCE_COLOR are heeded by Node. */
export function styled(stream: WriteStream, format: Format, text: string): string {
  return stream.isTTY && stream.hasColors() ? styleText(format, text) : text;
}

/** A line about what is going on, for people; it never mixes with the data on stdout. */
export function narrate(line: string): void {
  process.stderr.write(`${line}\n`);
}
