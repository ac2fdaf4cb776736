/** Output of the command: data on stdout, narration on stderr, colour only where a terminal wants it. */

import type { WriteStream } from "node:tty";
import { styleText } from "node:util";

/** To the first column, and away with all that is in the line. */
const ERASE = "\r\x1b[2K";

type Format = Parameters<typeof styleText>[0];

/** `text` in `format`, where `stream` is a terminal with colours; NO_COLOR and FORCE_COLOR are heeded by Node. */
export function styled(stream: WriteStream, format: Format, text: string): string {
  return stream.isTTY && stream.hasColors() ? styleText(format, text) : text;
}

/** A line about what is going on, for people; it never mixes with the data on stdout. */
export function narrate(line: string): void {
  process.stderr.write(`${line}\n`);
}

/** A line at the end of a terminal that is overwritten again and again, and erased in the end; nothing elsewhere. */
export class TransientLine {
  private readonly stream: WriteStream;

  constructor(stream: WriteStream) {
    this.stream = stream;
  }

  /** Whether there is a terminal to show it. */
  get isShown(): boolean {
    return this.stream.isTTY;
  }

  /** Replace the line; what does not fit is cut off, for a line that wraps cannot be erased. */
  show(text: string): void {
    if (this.isShown) this.stream.write(`${ERASE}${text.slice(0, (this.stream.columns || 80) - 1)}`);
  }

  /** Leave nothing. */
  erase(): void {
    if (this.isShown) this.stream.write(ERASE);
  }
}
