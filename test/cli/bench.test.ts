/** Tests of `virtio bench`: where its requests go, what it refuses, what it prints. */

import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, describe, test } from "node:test";
import { partOfDisk, Targets, type WriteShare } from "../../src/cli/bench-targets.js";
import { VerifiedTargets } from "../../src/cli/bench-verify.js";
import { RamStorage, VhostUserBackend } from "../../src/backend/index.js";
import { onTerminal, virtio } from "./command.js";
import { assertTextsApart, assertWellFormed, textBoxes } from "./svg.js";

const folder = mkdtempSync(join(tmpdir(), "virtio-bench-"));
after(() => rmSync(folder, { recursive: true }));

const KIB = 1 << 10;
const MIB = 1 << 20;

test("random targets reach every block of their part of the disk, and no other; half of a mixture writes", () => {
  const shares: readonly (readonly [WriteShare, number])[] = [
    ["none", 0],
    ["half", 0.5],
    ["all", 1],
  ];
  for (const [writes, expected] of shares) {
    const targets = new Targets({ writes, isRandom: true, blockSize: 4096 }, partOfDisk(400 * 4096 + 512, 4096, 2, 4));
    const reached = { reads: new Set<number>(), writes: new Set<number>() };
    let written = 0;
    for (let i = 0; i < 10_000; i++) {
      const block = targets.take(0);
      reached[targets.isWrite ? "writes" : "reads"].add(block);
      if (targets.isWrite) written++;
    }
    assert.ok(Math.abs(written / 10_000 - expected) < 0.02, `${written} writes`);
    const all = Array.from({ length: 100 }, (_, i) => 200 + i);
    const sorted = (blocks: Set<number>): number[] => [...blocks].sort((a, b) => a - b);
    assert.deepEqual(sorted(reached.reads), writes === "all" ? [] : all);
    assert.deepEqual(sorted(reached.writes), writes === "none" ? [] : all);
  }
});

/** Verified targets of `blocks` blocks of 1 KiB, with memory for `depth` requests, and a disk that does them. */
function verified(blocks: number, depth: number, writes: WriteShare = "half", firstBlock = 0) {
  const memory = Array.from({ length: depth }, () => new Uint8Array(KIB));
  const disk = new Uint8Array((firstBlock + blocks) * KIB);
  const options = { writes, isRandom: writes === "half", blockSize: KIB, depth };
  const targets = new VerifiedTargets(options, { firstBlock, blocks }, memory);
  const transfer = (part: number, block: number): void => {
    const ofMemory = memory[part];
    const ofDisk = disk.subarray(block * KIB, (block + 1) * KIB);
    if (targets.isWrite) ofDisk.set(ofMemory);
    else ofMemory.set(ofDisk);
  };
  return { disk, targets, transfer };
}

/** Read back all that was written, one request at a time, until something is wrong. */
function readBack({ targets, transfer }: ReturnType<typeof verified>): number {
  assert.ok(targets.readBack());
  let reads = 0;
  for (let block = targets.take(0); block >= 0; block = targets.take(0)) {
    transfer(0, block);
    reads++;
    if (!targets.completed(0)) break;
  }
  return reads;
}

describe("verification", () => {
  test("an honest disk passes; no two requests in flight share a block", () => {
    const run = verified(16, 16);
    const { targets, transfer } = run;
    const inFlight = new Set<number>();
    const blockOf: number[] = [];
    for (let part = 0; part < 16; part++) {
      blockOf[part] = targets.take(part);
      transfer(part, blockOf[part]);
      inFlight.add(blockOf[part]);
    }
    assert.equal(inFlight.size, 16);
    for (let i = 0; i < 5000; i++) {
      const part = (i * 7) % 16;
      assert.ok(targets.completed(part));
      inFlight.delete(blockOf[part]);
      blockOf[part] = targets.take(part);
      assert.ok(!inFlight.has(blockOf[part]));
      inFlight.add(blockOf[part]);
      transfer(part, blockOf[part]);
    }
    for (let part = 0; part < 16; part++) assert.ok(targets.completed(part));
    const before = targets.checked;
    assert.ok(before > 1000);
    assert.equal(readBack(run), 16);
    assert.deepEqual([targets.checked, targets.failure], [before + 16, undefined]);
  });

  test("only blocks that the run has written are read back", () => {
    const run = verified(8, 1, "all");
    assert.ok(!run.targets.readBack());
    const other = verified(8, 1, "all");
    for (let i = 0; i < 3; i++) {
      other.transfer(0, other.targets.take(0));
      other.targets.completed(0);
    }
    assert.equal(readBack(other), 3);
  });

  const lies: readonly (readonly [string, number, (disk: Uint8Array) => void, RegExp])[] = [
    [
      "a changed byte",
      8,
      (disk) => disk[3 * KIB + 517]++,
      /offset 3584: expected block 3, generation 1, found something/,
    ],
    ["a last byte", 8, (disk) => disk[8 * KIB - 1]++, /offset 8176: expected block 7, generation 1, found something/],
    [
      "a block in the place of another",
      8,
      (disk) => disk.copyWithin(2 * KIB, 5 * KIB, 6 * KIB),
      /offset 2048: expected block 2, generation 1, found block 5, generation 1, which this run wrote too$/,
    ],
    [
      "a block of zeroes",
      8,
      (disk) => disk.fill(0, KIB, 2 * KIB),
      /offset 1024: .* found something that this run never/,
    ],
  ];
  for (const [lie, writes, tell, expected] of lies) {
    test(`${lie} is found`, () => {
      const run = verified(8, 1, "all");
      for (let i = 0; i < writes; i++) {
        run.transfer(0, run.targets.take(0));
        run.targets.completed(0);
      }
      tell(run.disk);
      readBack(run);
      assert.match(run.targets.failure?.message ?? "", expected);
    });
  }

  test("in a part of the disk that begins elsewhere, blocks and offsets are those of the disk", () => {
    const run = verified(8, 1, "all", 100);
    for (let i = 0; i < 8; i++) {
      const block = run.targets.take(0);
      assert.equal(block, 100 + i);
      run.transfer(0, block);
      run.targets.completed(0);
    }
    run.disk.copyWithin(103 * KIB, 105 * KIB, 106 * KIB);
    assert.equal(readBack(run), 4);
    const expected =
      /offset 105472: expected block 103, generation 1, found block 105, generation 1, which this run wrote too$/;
    assert.match(run.targets.failure?.message ?? "", expected);
  });

  test("a lost write is found", () => {
    const run = verified(4, 1, "all");
    for (let i = 0; i < 7; i++) {
      const block = run.targets.take(0);
      if (i !== 5) run.transfer(0, block); // the second one to block 1
      run.targets.completed(0);
    }
    readBack(run);
    const expected =
      /offset 1024: expected block 1, generation 2, found block 1, generation 1, which this run wrote too$/;
    assert.match(run.targets.failure?.message ?? "", expected);
  });
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
        const { min, mean, ...percentiles } = result.latencyNs;
        assert.deepEqual(Object.keys(percentiles), ["p50", "p90", "p99", "p99.9", "p99.99", "max"]);
        const rising = [min, ...Object.values(percentiles)];
        assert.deepEqual(
          rising.toSorted((a, b) => a - b),
          rising,
        );
        assert.ok(0 < min && min <= mean && mean <= percentiles.max);
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
      assert.match(
        stdout.toString(),
        /^requests a second +\d[^]*latency, p99 +\d[^]*latency, p99\.99 +\d[^]*processor time a request +\d.*\n\n( *\d.* to +\d.* %.*\n)+$/,
      );
    });
  }

  for (const [rw, mode, api] of [
    ["randrw", "poll", "callback"],
    ["randrw", "poll", "promise"],
    ["randwrite", "event", "callback"],
    ["write", "hybrid", "promise"],
  ]) {
    const words = `bench ram:1M --runtime 0.05 --iodepth 8 --verify --rw ${rw} --mode ${mode} --api ${api}`.split(" ");
    test(`${words.slice(6).join(" ")} passes on an honest disk, and is caught by one that is not`, async () => {
      const honest = await virtio([...words, "--json"]);
      assert.deepEqual([honest.code, honest.stderr], [0, ""]);
      assert.ok((JSON.parse(honest.stdout.toString()) as BenchJson).verified > 0);

      const storage = new RamStorage(MIB);
      const path = join(folder, "liar.sock");
      const liar = {
        capacity: storage.capacity,
        read: (offset: number, into: Uint8Array) => storage.read(offset, into),
        write: () => undefined, // lost
        flush: () => undefined,
      };
      const backend = VhostUserBackend.listen({ path, storage: liar });
      try {
        const lied = await virtio([words[0], `vhost-user:${path}`, ...words.slice(2), "--yes-overwrite"]);
        assert.deepEqual([lied.code, lied.stdout.toString()], [1, ""]);
        const told =
          /virtio: ERR_VIRTIO_IO: verification failed at offset (\d+): expected block (\d+), gen.* never wrote\n$/;
        assert.match(lied.stderr, told);
        const [, offset, block] = told.exec(lied.stderr) ?? [];
        assert.equal(Number(offset), Number(block) * 4096);
      } finally {
        await backend.close();
      }
    });
  }

  for (const [mode, api] of [
    ["poll", "callback"],
    ["hybrid", "callback"],
    ["event", "callback"],
    ["poll", "promise"],
    ["hybrid", "promise"],
  ]) {
    test(`--numjobs 3 --mode ${mode} --api ${api}: each job has a third of the disk, and all are summed up`, async () => {
      const { path, close, reads } = await recording("jobs.sock", 3);
      try {
        const options = `--numjobs 3 --iodepth 4 --runtime 0.1 --mode ${mode} --api ${api} --json`.split(" ");
        const { code, stdout, stderr } = await virtio(["bench", `vhost-user:${path}`, ...options]);
        assert.deepEqual([code, stderr], [0, ""]);
        const { numjobs, iodepth, requests, iops, jobs } = JSON.parse(stdout.toString()) as BenchJson;
        assert.deepEqual([numjobs, iodepth, jobs.length], [3, 4, 3]);
        const sum = (values: readonly number[]): number => values.reduce((all, value) => all + value, 0);
        assert.equal(sum(jobs.map((job) => job.requests)), requests);
        assert.ok(Math.abs(sum(jobs.map((job) => job.iops)) - iops) <= 3);
        for (const job of jobs) assert.ok(job.requests === 0 || job.latencyNs.p50 > 0);
        // 85 blocks are a third, one is left over. What a job has done at the start and no more is no job.
        const thirds = [0, 0, 0];
        for (const offset of reads) thirds[Math.floor(offset / 4096 / 85)]++;
        assert.equal(thirds.length, 3);
        for (const count of thirds) assert.ok(count > 4, `${thirds.join(", ")} reads`);
      } finally {
        await close();
      }
    });
  }

  test("--numjobs: the table has the slowest and the fastest job, and --verify checks the part of each", async () => {
    const words = "bench ram:1M --numjobs 2 --iodepth 8 --runtime 0.05 --rw randrw --verify".split(" ");
    const { code, stdout, stderr } = await virtio(words);
    assert.deepEqual(
      [code, stderr.trimEnd()],
      [0, `ram:1M: randrw of 4 KiB, 8 in flight, poll, callback, 2 jobs on packed queues`],
    );
    assert.match(
      stdout.toString(),
      /^requests a second +\d.*\nslowest job +\d.*\nfastest job +\d[^]*\nreads verified +\d/,
    );
  });

  test("--numjobs beyond the queues of the device is a usage error that says how many there are", async () => {
    const { path, close } = await recording("one.sock", 1);
    try {
      const { code, stdout, stderr } = await virtio(["bench", `vhost-user:${path}`, "--numjobs", "2"]);
      assert.deepEqual([code, stdout.toString()], [2, ""]);
      const expected = `vhost-user:${path} has 1 request queue(s), 2 were asked for; pass --numjobs 1; try: virtio help bench`;
      assert.equal(stderr, `virtio: ERR_VIRTIO_ARGUMENT: ${expected}\n`);
    } finally {
      await close();
    }
  });

  test("--numjobs that leave less than a request for each are refused", async () => {
    const { code, stderr } = await virtio("bench ram:1M --numjobs 4 --bs 512K".split(" "));
    assert.equal(code, 2);
    assert.match(stderr, /"--bs" expected a multiple of 512, at most 262144, got 524288\n$/);
  });

  test("--svg draws the run to a file, beside the result on stdout", async () => {
    const file = join(folder, "bench.svg");
    const { code, stdout, stderr } = await virtio(`bench ram:1M --runtime 0.2 --json --svg ${file}`.split(" "));
    assert.deepEqual([code, stderr], [0, `drawn to ${file}\n`]);
    assert.ok((JSON.parse(stdout.toString()) as BenchJson).requests > 0);
    const svg = readFileSync(file, "utf8");
    assertWellFormed(svg);
    const texts = textBoxes(svg);
    assertTextsApart(svg, texts);
    const contents = texts.map(({ content }) => content);
    for (const expected of [
      "randread of 4 KiB on ram:1M",
      "32 in flight, poll, callback, packed queue",
      "requests a second",
      "share of requests",
    ]) {
      assert.ok(contents.includes(expected), expected);
    }
    for (const name of ["p50", "p90", "p99", "p99.9", "p99.99"]) {
      assert.equal(contents.filter((content) => content.startsWith(`${name} `)).length, 1, name);
    }
  });

  test("--svg to where no file can be: the result is printed all the same, exit 1", async () => {
    const file = join(folder, "no", "bench.svg");
    const { code, stdout, stderr } = await virtio(`bench ram:1M --runtime 0.05 --json --svg ${file}`.split(" "));
    assert.equal(code, 1);
    assert.ok((JSON.parse(stdout.toString()) as BenchJson).seconds > 0);
    assert.match(stderr, /^virtio: ENOENT: no such file or directory, open [^\n]*bench\.svg'\n$/);
  });

  test("on a terminal a live line is shown and erased; without one there is none", async () => {
    const words = "bench ram:1M --numjobs 2 --runtime 2 --json".split(" ");
    const shown = await onTerminal(words);
    assert.equal(shown.code, 0);
    const [before, result] = shown.stdout.toString().split("{\r\n");
    const lines = before.split("\r\x1b[2K");
    assert.ok(lines.length >= 3, before);
    for (const line of lines.slice(1, -1)) {
      assert.match(line, /^\d[\d.]*[kM]? IOPS {2}\d+ MB\/s {2}p50 \d[\d.]* [nµm]?s {2}p99 \d[\d.]* [nµm]?s$/);
    }
    assert.deepEqual([lines[0], lines.at(-1)], ["", ""]);
    assert.ok(!result.includes("\x1b"));
  });

  test("--verify refuses more requests in flight than the disk has blocks", async () => {
    const { code, stderr } = await virtio("bench ram:1M --rw write --verify --bs 64K --iodepth 17".split(" "));
    assert.equal(code, 2);
    assert.match(
      stderr,
      /"--iodepth" expected at most 16 with --verify, one request for each block of the disk, got 17\n$/,
    );
  });

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

/** A disk of 1 MiB with so many queues, and the offsets that are read. */
async function recording(name: string, queues: number) {
  const storage = new RamStorage(MIB);
  const reads: number[] = [];
  const path = join(folder, name);
  const recorder = {
    capacity: storage.capacity,
    read: (offset: number, into: Uint8Array) => {
      reads.push(offset);
      storage.read(offset, into);
    },
    write: () => undefined,
    flush: () => undefined,
  };
  const backend = VhostUserBackend.listen({ path, storage: recorder, queues });
  return { path, reads, close: () => backend.close() };
}

interface BenchJson {
  readonly rw: string;
  readonly bs: number;
  readonly iodepth: number;
  readonly numjobs: number;
  readonly mode: string;
  readonly api: string;
  readonly requests: number;
  readonly seconds: number;
  readonly iops: number;
  readonly bytesPerSecond: number;
  readonly latencyNs: LatencyJson;
  readonly cpuNsPerRequest: number;
  readonly verified: number;
  readonly jobs: readonly { readonly requests: number; readonly iops: number; readonly latencyNs: LatencyJson }[];
}

type LatencyJson = Readonly<Record<"min" | "mean" | "p50" | "p90" | "p99" | "p99.9" | "p99.99" | "max", number>>;
