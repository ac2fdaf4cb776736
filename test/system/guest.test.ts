/**
 * Runs test/guest/ in a QEMU guest, where there is an IOMMU with VFIO and a vDPA device, and reports each of its
 * tests here.
 */

import assert from "node:assert/strict";
import { dirname } from "node:path";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { GuestUnavailable } from "../guest/host/build.js";
import { GUEST_PROGRAMS, reasonForNoGuest, runInGuest } from "../guest/host/lab.js";
import { reportGuest } from "../guest/host/report.js";

const ROOT = dirname(dirname(dirname(dirname(fileURLToPath(import.meta.url)))));
const NOTHING_SKIPPED = process.env["VIRTIO_REQUIRE_PEERS"] === "1";

test("in the guest", { skip: reasonForNoGuest(...GUEST_PROGRAMS) }, async (t) => {
  try {
    const files = await reportGuest(t, runInGuest({ root: ROOT, log: (line) => t.diagnostic(line) }));
    assert.ok(files > 0, "dist/test/guest has no test files");
  } catch (error) {
    if (!(error instanceof GuestUnavailable) || NOTHING_SKIPPED) throw error;
    t.skip(error.message.trim().replaceAll(/\s*\n\s*/g, "; "));
  }
});
