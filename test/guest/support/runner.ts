/** Runs one test file in a process of its own and says of each test when it begins and how it ends. */

import { existsSync } from "node:fs";
import { finished } from "node:stream/promises";
import { type EventData, run } from "node:test";
import { inspect } from "node:util";
import type { TestNews } from "../protocol.js";

/** A test that has begun. */
interface Open {
  readonly id: number;
  readonly nesting: number;
  readonly title: string;
}

let nextId = 1;

/**
 * Run the file; it is killed when nothing is heard from it for `silenceMs` milliseconds.
 *
 * @param say Hears the news: the file, each test, what they print, the file's end.
 */
export async function runTestFile(file: string, silenceMs: number, say: (news: TestNews) => void): Promise<void> {
  say({ type: "file", file });
  if (!existsSync(file)) {
    say({ type: "file-end", file, error: "there is no such file: is it built?" });
    return;
  }
  const silence = new AbortController();
  const timer = setTimeout(() => silence.abort(), silenceMs);
  const open: Open[] = [];
  let error: string | undefined;
  let tests = 0;
  const events = run({ files: [file], signal: silence.signal });
  const print = ({ message }: { readonly message: string }): void => say({ type: "output", text: message });
  events.on("test:stdout", print).on("test:stderr", print);
  events.on("test:dequeue", ({ name, nesting }) => {
    if (name === file) return;
    tests++;
    const around = open.filter((test) => test.nesting < nesting).map((test) => test.title);
    const test: Open = { id: nextId++, nesting, title: name };
    open.push(test);
    say({ type: "begin", id: test.id, file, name: [...around, name].join(" > ") });
  });
  const end = ({ name, nesting, skip, todo, details }: EventData.TestPass | EventData.TestFail): void => {
    const failure = "error" in details ? describe(details.error) : undefined;
    if (name === file) {
      // Only when the process itself failed, not for a test in it.
      error = failure;
      return;
    }
    const index = open.findIndex((test) => test.nesting === nesting && test.title === name);
    if (index < 0) throw new Error(`"${name}" ended and never began`);
    const [{ id }] = open.splice(index, 1);
    const reason = skip ?? todo ?? false;
    say({
      type: "end",
      id,
      outcome: failure === undefined ? "pass" : "fail",
      skip: reason === false ? undefined : reason === true ? "no reason given" : reason,
      error: failure,
      durationMs: details.duration_ms,
    });
  };
  events.on("test:pass", end).on("test:fail", end);
  events.on("data", () => timer.refresh());
  await finished(events);
  clearTimeout(timer);
  if (silence.signal.aborted) error = `nothing heard for ${silenceMs / 1000} s, then killed`;
  else if (error === undefined && tests === 0) error = "it has no tests";
  for (const { id } of open) {
    say({ type: "end", id, outcome: "fail", skip: undefined, error: error ?? "its file ended first", durationMs: 0 });
  }
  say({ type: "file-end", file, error });
}

/** The error of a test as text; Node wraps what was thrown, and the end of a process. */
function describe(error: Error & { readonly exitCode?: number | null; readonly signal?: string | null }): string {
  if (error.cause instanceof Error) return inspect(error.cause);
  if (error.exitCode === undefined) return error.message;
  return `its process ended with ${error.signal ?? `status ${error.exitCode}`}`;
}
