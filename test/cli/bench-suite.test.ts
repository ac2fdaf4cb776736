/** Tests of `npm run bench` in its quick form: everything runs, and what is not there is named. */

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, describe, test } from "node:test";
import { promisify } from "node:util";
import { missingPeers } from "../support/peers.js";
import { assertTextsApart, assertWellFormed, textBoxes } from "./svg.js";

const SUITE = join(import.meta.dirname, "..", "..", "bench", "suite.js");
const TIMEOUT_MS = 200_000;

const folder = mkdtempSync(join(tmpdir(), "virtio-suite-"));
after(() => rmSync(folder, { recursive: true }));

/** Run the suite into a folder of its own; returns its report and its pictures. */
async function runSuite(
  name: string,
  env: NodeJS.ProcessEnv,
): Promise<{ report: string; pictures: Map<string, string> }> {
  const out = join(folder, name);
  await promisify(execFile)(process.execPath, [SUITE, "--quick", "--out", out], {
    env: { ...process.env, ...env },
    timeout: TIMEOUT_MS,
  });
  const names = readdirSync(out).filter((file) => file.endsWith(".svg"));
  return {
    report: readFileSync(join(out, "blk.md"), "utf8"),
    pictures: new Map(names.map((file) => [file, readFileSync(join(out, file), "utf8")])),
  };
}

/** The first cells of the rows of a section that have a figure. */
function measured(report: string, heading: string): string[] {
  const section = report.split("\n## ").find((text) => text.startsWith(heading)) ?? "";
  return [...section.matchAll(/^\| ([^|]+) \|.*\d.*$/gm)].map(([, name]) => name).filter((name) => name.trim() !== "");
}

describe("npm run bench -- --quick", { concurrency: 1 }, () => {
  test("measures all that is there, names what is not, and draws it", async () => {
    const { report, pictures } = await runSuite("all", {});
    assert.doesNotMatch(report, /failed:|NaN|Infinity|undefined/);
    const hasDaemon = missingPeers(["qemu-storage-daemon"]) === undefined;
    const hasFio = missingPeers(["fio"]) === undefined;
    assert.equal(/^- qemu-storage-daemon is not installed .*: nothing/m.test(report), !hasDaemon);
    assert.equal(/^- fio is not installed .*: nothing/m.test(report), !hasFio);
    assert.equal(/^Nothing is missing\.$/m.test(report), hasDaemon && hasFio);
    const ways = ["callbacks, polling", "promises, polling", "callbacks, hybrid", "promises, hybrid"];
    const nbd = hasDaemon && hasFio ? ["NBD, by fio"] : [];
    assert.deepEqual(measured(report, "Requests a second"), [...(hasDaemon ? ways : []), ...nbd]);
    assert.deepEqual(measured(report, "Embedded back-end").slice(0, 4), ways);
    for (const [name, svg] of pictures) {
      assert.ok(report.includes(`](${name})`), `${name} is not shown`);
      assertWellFormed(svg);
      assertTextsApart(svg, textBoxes(svg));
    }
    assert.equal(report.split("](blk-").length - 1, pictures.size, "a picture is shown that was not drawn");
  });

  test("without any other program, the embedded back-end and the file are measured", async () => {
    const { report, pictures } = await runSuite("alone", { PATH: folder });
    assert.match(
      report,
      /^- qemu-storage-daemon is not installed \(qemu-system-common\): nothing was measured through it$/m,
    );
    assert.match(report, /^- fio is not installed \(fio\): nothing was measured over NBD$/m);
    assert.deepEqual(measured(report, "Requests a second"), []);
    assert.deepEqual(measured(report, "A file in shared memory"), ["FileHandle.read", "fs.readSync"]);
    assert.deepEqual(
      [...pictures.keys()].toSorted((a, b) => a.localeCompare(b)),
      ["blk-embedded.svg", "blk-file.svg", "blk-size.svg"],
    );
  });
});
