/** Tests of the subcommands that open a device: info, read, write, demo; and of serve. */

import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { once } from "node:events";
import { closeSync, existsSync, mkdtempSync, openSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, describe, test } from "node:test";
import { type Finished, finished, start, virtio } from "./command.js";

const folder = mkdtempSync(join(tmpdir(), "virtio-device-"));
after(() => rmSync(folder, { recursive: true }));

const MIB = 1 << 20;
const image = randomBytes(5 * MIB + 512);
let images = 0;

/** A fresh image file, and its address. */
function makeImage(bytes: Uint8Array = image): { path: string; address: string } {
  const path = join(folder, `disk${images++}.img`);
  writeFileSync(path, bytes);
  return { path, address: `file:${path}` };
}

describe("virtio info", { concurrency: 2 }, () => {
  test("prints a table with features by name", async () => {
    const { code, stdout, stderr } = await virtio(["info", "ram:64M"]);
    assert.deepEqual([code, stderr], [0, ""]);
    const table = stdout.toString();
    for (const line of [
      /capacity +64 MiB \(67108864 bytes\)/,
      /format +packed/,
      /EVENT_IDX +in use/,
      /cache +writeback: /,
    ]) {
      assert.match(table, line);
    }
  });

  test("--json names every part", async () => {
    const { address } = makeImage();
    const { code, stdout } = await virtio(["info", address, "--json"]);
    assert.equal(code, 0);
    const info = JSON.parse(stdout.toString()) as Record<string, unknown>;
    assert.deepEqual(Object.keys(info).sort(), [
      ...["address", "blockSize", "cache", "capacity", "config", "features", "format", "id", "limits", "maxQueues"],
      ...["offered", "queueSize", "queues", "readOnly"],
    ]);
    assert.deepEqual([info["capacity"], info["blockSize"], info["id"]], [image.length, 512, "virtio-driver file"]);
  });
});

describe("virtio read", { concurrency: 2 }, () => {
  const disk = makeImage();

  test("prints the whole disk", async () => {
    const { code, stdout, stderr } = await virtio(["read", disk.address]);
    assert.deepEqual([code, stderr], [0, ""]);
    assert.ok(stdout.equals(image));
  });

  for (const [offset, length] of [
    [0, 1],
    [511, 2],
    [512, 512],
    [1000, 2 * MIB],
    [image.length - 1, 1],
    [image.length, 0],
    [MIB, 0],
  ]) {
    test(`prints ${length} bytes from ${offset}`, async () => {
      const { code, stdout } = await virtio(["read", disk.address, "--offset", `${offset}`, "--length", `${length}`]);
      assert.equal(code, 0);
      assert.ok(stdout.equals(image.subarray(offset, offset + length)));
    });
  }

  test("refuses what lies behind the end", async () => {
    const beyond = await virtio(["read", disk.address, "--offset", "8M"]);
    assert.equal(beyond.code, 2);
    assert.match(
      beyond.stderr,
      /^virtio: ERR_VIRTIO_ARGUMENT: "--offset" expected at most the 5243392 bytes of the disk/,
    );
    const tooLong = await virtio(["read", disk.address, "--offset", "5M", "--length", "513"]);
    assert.equal(tooLong.code, 2);
    assert.match(
      tooLong.stderr,
      /^virtio: ERR_VIRTIO_ARGUMENT: "--length" expected at most 512, the disk ends there, got 513/,
    );
  });

  test("ends quietly when the reader goes away", async () => {
    const child = start(["read", "ram:256M"]);
    child.stdout.once("data", () => child.stdout.destroy());
    const { code, signal, stderr } = await finished(child);
    assert.deepEqual([code, signal, stderr], [0, null, ""]);
  });
});

describe("virtio write", { concurrency: 2 }, () => {
  const input = randomBytes(2 * MIB + 1024);

  test("copies stdin to the disk and flushes", async () => {
    const { path, address } = makeImage();
    const { code, stdout, stderr } = await virtio(["write", address, "--offset", "1K"], input);
    assert.deepEqual([code, stdout.length], [0, 0]);
    assert.equal(stderr, `wrote 2.0 MiB at 1024 of ${address} and flushed\n`);
    const expected = Buffer.from(image);
    input.copy(expected, 1024);
    assert.ok(readFileSync(path).equals(expected));
  });

  test("refuses an odd end; what comes before it in a pipe is written", async () => {
    const { path, address } = makeImage();
    const { code, stderr } = await virtio(["write", address], input.subarray(0, 1100));
    assert.equal(code, 2);
    assert.match(
      stderr,
      /"stdin" expected whole blocks of 512 bytes, or --pad \(what fits in whole blocks is written\), got 1100\n$/,
    );
    const expected = Buffer.from(image);
    input.copy(expected, 0, 0, 1024);
    assert.ok(readFileSync(path).equals(expected));
  });

  test("refuses an odd end of a file before anything is written", async () => {
    const { path, address } = makeImage();
    const { code, stderr } = await writeFromFile(address, input.subarray(0, 1100));
    assert.equal(code, 2);
    assert.match(stderr, /or --pad \(nothing was written\), got 1100\n$/);
    assert.ok(readFileSync(path).equals(image));
  });

  test("--pad fills the last block with zeroes", async () => {
    const { path, address } = makeImage();
    const length = 4 * MIB + 1100;
    const { code } = await virtio(["write", address, "--pad"], Buffer.alloc(length, 0xa5));
    assert.equal(code, 0);
    const expected = Buffer.from(image)
      .fill(0xa5, 0, length)
      .fill(0, length, 4 * MIB + 1536);
    assert.ok(readFileSync(path).equals(expected));
  });

  test("refuses what does not fit; what fits is written", async () => {
    const { path, address } = makeImage();
    const { code, stderr } = await virtio(["write", address, "--offset", "5M"], input.subarray(0, 1024));
    assert.equal(code, 2);
    assert.match(stderr, /"stdin" expected at most 512 bytes up to the end of the disk/);
    const expected = Buffer.from(image);
    input.copy(expected, 5 * MIB, 0, 512);
    assert.ok(readFileSync(path).equals(expected));
  });

  test("refuses a file that does not fit before anything is written", async () => {
    const { path, address } = makeImage();
    const { code, stderr } = await writeFromFile(address, Buffer.alloc(6 * MIB));
    assert.equal(code, 2);
    assert.match(stderr, /"stdin" expected at most 5243392 bytes up to the end of the disk \(nothing was written\)/);
    assert.ok(readFileSync(path).equals(image));
  });

  test("refuses an odd offset", async () => {
    const { code, stderr } = await virtio(["write", "ram:1M", "--offset", "100"], input);
    assert.equal(code, 2);
    assert.match(stderr, /"--offset" expected a multiple of the block size 512, got 100\n$/);
  });

  test("of nothing is fine", async () => {
    assert.equal((await virtio(["write", "ram:1M"])).stderr, "wrote 0 bytes at 0 of ram:1M and flushed\n");
  });
});

describe("virtio demo", { concurrency: 1 }, () => {
  for (const words of [["demo"], ["demo", "ram:1M"], ["demo", makeImage().address, "--yes-overwrite"]]) {
    test(`${words.slice(0, 2).join(" ").replace(folder, "…")} tells the story to its end and leaves nothing behind`, async () => {
      const { code, stdout, stderr } = await virtio(words);
      assert.deepEqual([code, stderr], [0, ""]);
      const story = stdout.toString();
      for (const part of [/^found .*virtio-blk/m, /^features .*agreed/m, /^virtqueue /m, /^write /m, /^flush /m]) {
        assert.match(story, part);
      }
      const [, written] = /written ([0-9a-f]{32})/.exec(story) ?? [];
      assert.ok(written !== undefined && story.includes(`read    ${written}`));
      assert.match(story, /^verified +they are the same$/m);
      assert.match(story, /^speed +[\d.]+[kM]? a second/m);
      const [, socket] = / at vhost-user:(\S+)/.exec(story) ?? [];
      assert.ok(socket !== undefined && !existsSync(socket));
    });
  }
});

describe("virtio serve", { concurrency: 2 }, () => {
  test("serves one client after another, and flushes and removes the socket at SIGTERM", async () => {
    const { path, address } = makeImage();
    const socket = join(folder, "file.sock");
    const server = await serve([address, "--socket", socket]);
    const input = randomBytes(4096); // a write and a flush, then a read
    assert.equal((await virtio(["write", `vhost-user:${socket}`, "--offset", "4K"], input)).code, 0);
    const { stdout } = await virtio(["read", `vhost-user:${socket}`, "--offset", "4K", "--length", "4K"]);
    assert.ok(stdout.equals(input));
    const ended = await server.stop("SIGTERM");
    assert.deepEqual([ended.code, ended.signal, ended.stdout.length], [0, null, 0]);
    assert.match(ended.stderr, /\nSIGTERM: flushed and stopped; 2 clients, 3 requests, 0 errors\n$/);
    assert.ok(!existsSync(socket));
    assert.ok(readFileSync(path).subarray(4096, 8192).equals(input));
  });

  test("SIGINT stops it while a client is connected", async () => {
    const socket = join(folder, "int.sock");
    const server = await serve(["ram:16M", "--socket", socket]);
    const client = start(["bench", `vhost-user:${socket}`, "--runtime", "30", "--mode", "event"]);
    await once(client.stderr, "data"); // it says that it is at work
    const clientEnd = finished(client);
    const ended = await server.stop("SIGINT");
    assert.equal(ended.code, 0);
    const { code, stderr } = await clientEnd;
    assert.deepEqual([code, /ERR_VIRTIO_DISCONNECTED/.test(stderr)], [4, true]);
  });

  test("--read-only, --split, --queues and --block-size reach the driver", async () => {
    const { path, address } = makeImage(image.subarray(0, 2 * MIB));
    const socket = join(folder, "options.sock");
    const server = await serve([
      address,
      "--socket",
      socket,
      "--read-only",
      "--split",
      "--queues",
      "3",
      "--block-size",
      "4K",
    ]);
    const { stdout } = await virtio(["info", `vhost-user:${socket}`, "--json"]);
    const info = JSON.parse(stdout.toString()) as Record<string, unknown>;
    assert.deepEqual([info["format"], info["maxQueues"], info["blockSize"]], ["split", 3, 4096]);
    const written = await virtio(["write", `vhost-user:${socket}`], randomBytes(4096));
    assert.equal(written.code, 1);
    assert.match(written.stderr, /^virtio: ERR_VIRTIO_READ_ONLY: /);
    await server.stop("SIGTERM");
    assert.ok(readFileSync(path).equals(image.subarray(0, 2 * MIB)));
  });

  test("a read-only disk of memory is read-only", async () => {
    const socket = join(folder, "ram.sock");
    const server = await serve(["ram:1M", "--socket", socket, "--read-only", "--packed"]);
    const { stderr } = await virtio(["write", `vhost-user:${socket}`], randomBytes(512));
    assert.match(stderr, /^virtio: ERR_VIRTIO_READ_ONLY: /);
    await server.stop("SIGTERM");
  });

  test("refuses a socket on which somebody listens", async () => {
    const socket = join(folder, "taken.sock");
    const server = await serve(["ram:1M", "--socket", socket]);
    const { code, stderr } = await virtio(["serve", "ram:1M", "--socket", socket]);
    assert.equal(code, 1);
    assert.match(stderr, /^virtio: ERR_VIRTIO_SYSCALL: [^\n]*taken\.sock[^\n]*EADDRINUSE[^\n]*\n$/);
    await server.stop("SIGTERM");
  });

  const socket = join(folder, "never.sock");
  for (const [words, code, message] of [
    [["vhost-user:/x", "--socket", socket], 2, /ERR_VIRTIO_ADDRESS: "vhost-user:\/x" cannot be served/],
    [["ram:0", "--socket", socket], 2, /ERR_VIRTIO_ARGUMENT: "size" expected a whole number from 512/],
    [["ram:1X", "--socket", socket], 2, /ERR_VIRTIO_ARGUMENT: "ram:SIZE" expected a size/],
    [
      ["ram:1M", "--socket", socket, "--block-size", "1000"],
      2,
      /ERR_VIRTIO_ARGUMENT: "blockSize" expected a power of two/,
    ],
    [["ram:1M", "--socket", socket, "--queues", "257"], 2, /ERR_VIRTIO_ARGUMENT: "queues" expected .* 256, got 257/],
    [
      ["ram:1M", "--socket", socket, "--packed", "--split"],
      2,
      /option '--packed' cannot be used with option '--split'/,
    ],
    [["ram:1M"], 2, /required option '--socket <path>' not specified/],
    [[`file:${join(folder, "missing.img")}`, "--socket", socket], 4, /ERR_VIRTIO_BACKEND: .*there is no such file/],
    [["ram:1M", "--socket", join(folder, "no", "where.sock")], 1, /ERR_VIRTIO_SYSCALL: .*ENOENT/],
  ] as const) {
    test(`refuses ${words.join(" ").replaceAll(folder, "…")}`, async () => {
      const ended = await virtio(["serve", ...words]);
      assert.deepEqual([ended.code, ended.stdout.length], [code, 0]);
      assert.match(ended.stderr, message);
      assert.equal(ended.stderr.split("\n").length, 2, "one line");
      assert.ok(!existsSync(socket));
    });
  }
});

/** Start `virtio serve` and wait until it listens. */
async function serve(words: readonly string[]): Promise<{ stop(signal: NodeJS.Signals): Promise<Finished> }> {
  const child = start(["serve", ...words]);
  const end = finished(child);
  const [said] = (await once(child.stderr, "data")) as [Buffer];
  assert.match(said.toString(), /^serving a .*; stop it with Ctrl-C\n$/);
  return {
    stop: (signal) => {
      child.kill(signal);
      return end;
    },
  };
}

/** `virtio write` with a file as stdin. */
async function writeFromFile(address: string, bytes: Uint8Array): Promise<Finished> {
  const fd = openSync(makeImage(bytes).path, "r");
  try {
    return await virtio(["write", address], fd);
  } finally {
    closeSync(fd);
  }
}
