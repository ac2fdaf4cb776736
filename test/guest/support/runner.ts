/** Runs one test file in a process of its own and says of each test when it begins and how it ends. */

import { existsSync } from "node:fs";
import { run } from "node:test";
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
  for await (const event of run({ files: [file], signal: silence.signal })) {
    timer.refresh();
    if (event.type === "test:stdout" || event.type === "test:stderr") {
      say({ type: "output", text: event.data.message });
    } else if (event.type === "test:dequeue") {
      const { name, nesting } = event.data;
      if (name === file) continue;
      tests++;
      const around = open.filter((test) => test.nesting < nesting).map((test) => test.title);
      const test: Open = { id: nextId++, nesting, title: name };
      open.push(test);
      say({ type: "begin", id: test.id, file, name: [...around, name].join(" > ") });
    } else if (event.type === "test:pass" || event.type === "test:fail") {
      const { name, nesting, skip, todo, details } = event.data;
      const failure = event.type === "test:fail" ? describe(event.data.details.error) : undefined;
      if (name === file) {
        // The process itself failed; of a file whose tests failed Node says so too, and that is known by then.
        error = failure;
        continue;
      }
      const index = open.findIndex((test) => test.nesting === nesting && test.title === name);
      if (index < 0) throw new Error(`"${name}" ended and never began`);
      const [{ id }] = open.splice(index, 1);
      const reason = skip === undefined ? todo : skip;
      say({
        type: "end",
        id,
        outcome: failure === undefined ? "pass" : "fail",
        skip: reason === undefined || reason === false ? undefined : reason === true ? "no reason given" : reason,
        error: failure,
        durationMs: details.duration_ms,
      });
    }
  }
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
