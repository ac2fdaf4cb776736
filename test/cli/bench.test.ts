/** Tests of `virtio bench`: where its requests go, what it refuses, what it prints. */

import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, describe, test } from "node:test";
import { Targets, type WriteShare } from "../../src/cli/bench-targets.js";
import { virtio } from "./command.js";

const folder = mkdtempSync(join(tmpdir(), "virtio-bench-"));
after(() => rmSync(folder, { recursive: true }));

const MIB = 1 << 20;

test("random targets reach every block, and no other; half of a mixture writes", () => {
  const shares: readonly (readonly [WriteShare, number])[] = [
    ["none", 0],
    ["half", 0.5],
    ["all", 1],
  ];
  for (const [writes, expected] of shares) {
    const targets = new Targets({ writes, isRandom: true, blockSize: 4096 }, 100 * 4096 + 512);
    const reached = { reads: new Set<number>(), writes: new Set<number>() };
    let written = 0;
    for (let i = 0; i < 10_000; i++) {
      const block = targets.take();
      reached[targets.isWrite ? "writes" : "reads"].add(block);
      if (targets.isWrite) written++;
    }
    assert.ok(Math.abs(written / 10_000 - expected) < 0.02, `${written} writes`);
    const all = Array.from({ length: 100 }, (_, i) => i);
    const sorted = (blocks: Set<number>): number[] => [...blocks].sort((a, b) => a - b);
    assert.deepEqual(sorted(reached.reads), writes === "all" ? [] : all);
    assert.deepEqual(sorted(reached.writes), writes === "none" ? [] : all);
  }
});

describe("virtio bench", { concurrency: 1 }, () => {
  for (const mode of ["poll", "event"]) {
    for (const api of ["callback", "promise"]) {
      test(`--mode ${mode} --api ${api} --json`, async () => {
        const words = `bench ram:16M --runtime 0.1 --iodepth 8 --mode ${mode} --api ${api} --json`.split(" ");
        const { code, stdout, stderr } = await virtio(words);
        assert.deepEqual([code, stderr], [0, ""]);
        const result = JSON.parse(stdout.toString()) as BenchJson;
        assert.deepEqual(
          [result.rw, result.bs, result.iodepth, result.mode, result.api],
          ["randread", 4096, 8, mode, api],
        );
        assert.ok(result.requests > 0 && result.seconds >= 0.1);
        assert.ok(Math.abs(result.iops - result.requests / result.seconds) <= 1);
        assert.ok(Math.abs(result.bytesPerSecond - result.iops * 4096) <= 4096);
        const { min, mean, p50, p99, max } = result.latencyNs;
        assert.ok(0 < min && min <= p50 && p50 <= p99 && p99 <= max && min <= mean && mean <= max);
        assert.ok(result.cpuNsPerRequest > 0);
      });
    }
  }

  for (const rw of ["randread", "randwrite", "randrw", "read", "write"]) {
    test(`--rw ${rw} with large requests prints a table`, async () => {
      const { code, stdout, stderr } = await virtio(
        `bench ram:16M --runtime 0.05 --rw ${rw} --bs 1M --iodepth 3`.split(" "),
      );
      assert.equal(code, 0);
      assert.equal(stderr, `ram:16M: ${rw} of 1 MiB, 3 in flight, poll, callback, packed queue\n`);
      assert.match(stdout.toString(), /^requests a second +\d[^]*latency, p99 +\d[^]*processor time a request +\d/);
    });
  }

  test("writes over a file with consent only", async () => {
    const path = join(folder, "disk.img");
    const address = `file:${path}`;
    const image = randomBytes(MIB);
    writeFileSync(path, image);
    const refused = await virtio(["bench", address, "--rw", "write", "--runtime", "0.05"]);
    assert.equal(refused.code, 2);
    assert.ok(readFileSync(path).equals(image));
    const consented = await virtio(["bench", address, "--rw", "write", "--runtime", "0.05", "--yes-overwrite"]);
    assert.equal(consented.code, 0);
    assert.ok(!readFileSync(path).equals(image));
  });

  test("refuses sizes and depths that cannot be", async () => {
    const odd = await virtio(["bench", "ram:16M", "--bs", "1000"]);
    assert.deepEqual(
      [odd.code, odd.stderr.split("\n").at(-2)],
      [2, 'virtio: ERR_VIRTIO_ARGUMENT: "--bs" expected a multiple of 512, at most 16777216, got 1000'],
    );
    const deep = await virtio(["bench", "ram:16M", "--bs", "512", "--iodepth", "40000"]);
    assert.equal(deep.code, 2);
    assert.match(deep.stderr, /"--iodepth" expected at most \d+, the ring has no room for more, got 40000\n$/);
  });
});

interface BenchJson {
  readonly rw: string;
  readonly bs: number;
  readonly iodepth: number;
  readonly mode: string;
  readonly api: string;
  readonly requests: number;
  readonly seconds: number;
  readonly iops: number;
  readonly bytesPerSecond: number;
  readonly latencyNs: Readonly<Record<"min" | "mean" | "p50" | "p99" | "max", number>>;
  readonly cpuNsPerRequest: number;
}
