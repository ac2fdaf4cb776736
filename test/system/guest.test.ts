/**
 * Runs test/guest/ in a QEMU guest, where there is an IOMMU with VFIO and a vDPA device, and reports each of its
 * tests here.
 */

import assert from "node:assert/strict";
import { basename, dirname } from "node:path";
import { type TestContext, test } from "node:test";
import { fileURLToPath } from "node:url";
import { builtGuest, GuestUnavailable } from "../guest/host/build.js";
import { GUEST_PROGRAMS, runInGuest } from "../guest/host/lab.js";
import type { TestEnds, TestNews } from "../guest/protocol.js";
import { requirePeer } from "../support/peers.js";

const ROOT = dirname(dirname(dirname(dirname(fileURLToPath(import.meta.url)))));
const NOTHING_SKIPPED = process.env["VIRTIO_REQUIRE_PEERS"] === "1";

/** The guest is a download of 100 MB: not made by the way. */
function reasonToSkip(): false | string {
  const missing = requirePeer(...GUEST_PROGRAMS);
  if (missing !== false) return missing;
  const mayBuild = NOTHING_SKIPPED || process.env["VIRTIO_BUILD_GUEST"] === "1";
  return builtGuest() !== undefined || mayBuild ? false : "the guest is not built yet; npm run test:system builds it";
}

test("in the guest", { skip: reasonToSkip() }, async (t) => {
  const news = runInGuest({ root: ROOT, log: (line) => t.diagnostic(line) });
  try {
    let files = 0;
    for await (const item of news) {
      assert.equal(item.type, "file");
      files++;
      if (item.type === "file") await t.test(basename(item.file), { concurrency: true }, (f) => reportFile(f, news));
    }
    assert.ok(files > 0, "dist/test/guest has no test files");
  } catch (error) {
    if (!(error instanceof GuestUnavailable) || NOTHING_SKIPPED) throw error;
    t.skip(error.message);
  }
});

/** Report the tests of one file, until its end. */
async function reportFile(t: TestContext, news: AsyncGenerator<TestNews>): Promise<void> {
  const open = new Map<number, (end: TestEnds) => void>();
  const reported: Promise<void>[] = [];
  for (;;) {
    const { value: item, done } = await news.next();
    assert.ok(done !== true, "the guest has ended in the middle of the file");
    if (item.type === "begin") {
      const ended = new Promise<TestEnds>((resolve) => open.set(item.id, resolve));
      reported.push(t.test(item.name, (inner) => ended.then((end) => report(inner, end))));
    } else if (item.type === "end") {
      open.get(item.id)?.(item);
    } else if (item.type === "output") {
      process.stdout.write(item.text);
    } else if (item.type === "file-end") {
      await Promise.all(reported);
      assert.equal(item.error, undefined, item.error);
      return;
    }
  }
}

function report(t: TestContext, { outcome, skip, error }: TestEnds): void {
  if (skip !== undefined) t.skip(skip);
  if (outcome === "pass") return;
  const failure = new Error(error);
  // The text has the stack of the guest; ours would say nothing.
  failure.stack = `In the guest: ${error}`;
  throw failure;
}
