/** Reports what happens in the guest to Node's runner out here: a test for each file, and in it one for each test. */

import { basename } from "node:path";
import type { TestContext } from "node:test";
import type { TestEnds, TestNews } from "../protocol.js";

/**
 * Report until the guest has nothing more to tell.
 *
 * @returns How many files there were.
 */
export async function reportGuest(t: TestContext, news: AsyncGenerator<TestNews>): Promise<number> {
  let files = 0;
  // Not for await: when the guest dies within a file, the file's test has failed with the reason already.
  for (let next = await news.next(); next.done !== true; next = await news.next()) {
    const item = next.value;
    if (item.type !== "file") throw new Error(`the guest says "${item.type}" outside of a file`);
    files++;
    // Side by side, because a test is open while those within it run: all are at one level here.
    await t.test(basename(item.file), { concurrency: true }, (file) => reportFile(file, news));
  }
  return files;
}

/** Report the tests of one file, until its end. */
async function reportFile(t: TestContext, news: AsyncGenerator<TestNews>): Promise<void> {
  const open = new Map<number, (end: TestEnds) => void>();
  const reported: Promise<void>[] = [];
  for (;;) {
    const next = await news.next();
    if (next.done === true) throw new Error("the guest has ended in the middle of the file");
    const item = next.value;
    if (item.type === "begin") {
      const ended = new Promise<TestEnds>((resolve) => open.set(item.id, resolve));
      reported.push(t.test(item.name, (inner) => ended.then((end) => report(inner, end))));
    } else if (item.type === "end") {
      open.get(item.id)?.(item);
    } else if (item.type === "output") {
      process.stdout.write(item.text);
    } else if (item.type === "file-end") {
      await Promise.all(reported);
      if (item.error !== undefined) throw inGuest(item.error);
      return;
    }
  }
}

function report(t: TestContext, { outcome, skip, error }: TestEnds): void {
  if (skip !== undefined) t.skip(skip);
  if (outcome === "fail") throw inGuest(error ?? "no reason given");
}

/** An error whose text has the stack of the guest; ours would say nothing. */
function inGuest(text: string): Error {
  const error = new Error(text);
  error.stack = `In the guest: ${text}`;
  return error;
}
