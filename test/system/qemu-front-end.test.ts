/**
 * The embedded back-end with QEMU as its front-end: a guest with vhost-user-blk-pci reads and writes, while back-ends are
 * killed under its hands. QEMU keeps the region of requests in flight, and hands it to the next one.
 */

import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { createHash, randomBytes } from "node:crypto";
import { on, once } from "node:events";
import { mkdirSync, readFileSync, truncateSync, writeFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { describe, type TestContext, test } from "node:test";
import { fileURLToPath } from "node:url";
import { MAIN } from "../cli/command.js";
import { type Page, readPage } from "../cli/prometheus.js";
import { buildGuest } from "../guest/host/build.js";
import { reasonForNoGuest } from "../guest/host/lab.js";
import { Daemon, TemporaryFolder } from "../support/peers.js";

const MIB = 1 << 20;
const DISK_BYTES = 64 * MIB;
const PATTERN_BYTES = 2 * MIB;
/** Where each of the guest's writers writes its pattern. */
const PLACES = [8, 16, 24, 32].map((mib) => mib * MIB);
/** No line of the guest takes longer, on a machine with better things to do. */
const PATIENCE_MS = 120_000;
/** A test takes ten seconds on an idle machine. */
const TEST_MS = 5 * 60_000;
/** The write at which a back-end dies, and every how many it leaves unfinished until then. */
const LAST_WRITE = 10;
const HOLD = 3;

const MORTAL = fileURLToPath(new URL("../backend/mortal-back-end.js", import.meta.url));

/** What the guest does, told line by line; it waits for files that appear in the folder which it shares. */
const SCRIPT = `
say() { echo "test: $*"; }
until_there() { while [ ! -e "/job/$1" ]; do sleep 0.1; done; }
mkdir -p /tmp
cp /job/pattern /tmp/pattern
while [ ! -b /dev/vda ]; do sleep 0.1; done
say cache $(cat /sys/block/vda/queue/write_cache)
say size $(cat /sys/block/vda/size)
say read $(dd if=/dev/vda bs=64k count=128 iflag=direct 2>/dev/null | md5sum)
dd if=/tmp/pattern of=/dev/vda bs=64k oflag=direct conv=fsync 2>/dev/null && say written
until_there write
for place in ${PLACES.map((place) => place / 4096).join(" ")}; do
  (dd if=/tmp/pattern of=/dev/vda bs=4k seek=$place oflag=direct conv=fsync 2>/dev/null || say failed at $place) &
done
until_there more
say going on
for round in 1 2 3; do
  dd if=/tmp/pattern of=/dev/vda bs=4k oflag=direct conv=fsync 2>/dev/null || say failed in round $round
  say round $round
done
wait
for place in ${PLACES.map((place) => place / 4096).join(" ")}; do
  say back $(dd if=/dev/vda bs=4k skip=$place count=${PATTERN_BYTES / 4096} iflag=direct 2>/dev/null | md5sum)
done
while [ $(cat /sys/block/vda/size) = ${DISK_BYTES / 512} ]; do sleep 0.1; done
say resized $(cat /sys/block/vda/size)
poweroff -f
`;

/** QEMU with a disk that somebody else serves, and the guest of the lab in it. */
class Guest {
  readonly #child: ChildProcess;
  readonly #lines: AsyncIterator<string>;
  readonly #job: string;
  #console = "";

  constructor(folder: TemporaryFolder, socket: string, files: { kernel: string; initramfs: string }, packed: boolean) {
    this.#job = folder.file("job");
    mkdirSync(this.#job);
    mkdirSync(folder.file("nothing"));
    writeFileSync(folder.file("job/start.sh"), SCRIPT);
    const share = (tag: string, path: string): string[] => [
      "-virtfs",
      `local,path=${path},mount_tag=${tag},security_model=none,multidevs=remap`,
    ];
    const list = ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-m", "256"];
    list.push("-object", "memory-backend-memfd,id=memory,size=256M,share=on", "-machine", "q35,memory-backend=memory");
    list.push("-accel", "tcg,thread=multi", "-cpu", "max,-erms", "-smp", "2");
    list.push("-kernel", files.kernel, "-initrd", files.initramfs);
    list.push("-append", "console=ttyS0 panic=-1 loglevel=4 mitigations=off");
    list.push("-chardev", "stdio,id=console", "-serial", "chardev:console");
    list.push(...share("host", folder.file("nothing")), ...share("job", this.#job));
    list.push("-chardev", `socket,id=disk,path=${socket},reconnect=1`);
    list.push("-device", `vhost-user-blk-pci,chardev=disk,num-queues=1,packed=${packed ? "on" : "off"}`);
    this.#child = spawn("setpriv", ["--pdeathsig", "KILL", "--", "qemu-system-x86_64", ...list], {
      stdio: ["ignore", "pipe", "pipe"],
    });
    const { stdout, stderr } = this.#child;
    if (stdout === null || stderr === null) throw new Error("QEMU has no output to read");
    stderr.on("data", (chunk: Buffer) => {
      this.#console += chunk.toString();
    });
    this.#lines = this.#read(on(createInterface(stdout), "line", { close: ["close"] }) as AsyncIterable<[string]>);
  }

  /** Let the guest go on that waits for a file of this name. */
  allow(name: string, content: Uint8Array = new Uint8Array(0)): void {
    writeFileSync(`${this.#job}/${name}`, content);
  }

  /** The next line of the guest, which has to begin so; the rest of it. */
  async says(start: string): Promise<string> {
    let timer: NodeJS.Timeout | undefined;
    const late = new Promise<undefined>((resolve) => {
      timer = setTimeout(resolve, PATIENCE_MS, undefined);
    });
    const next = await Promise.race([this.#lines.next(), late]);
    clearTimeout(timer);
    const line = next === undefined || next.done === true ? "nothing more" : next.value;
    assert.ok(line.startsWith(start), `expected "${start}", the guest says "${line}"; its console:\n${this.#console}`);
    return line.slice(start.length).trim();
  }

  /** Resolves when QEMU has ended. */
  async ended(): Promise<void> {
    if (this.#child.exitCode === null && this.#child.signalCode === null) await once(this.#child, "exit");
  }

  /** End QEMU. Idempotent. */
  async stop(): Promise<void> {
    this.#child.kill("SIGKILL");
    await this.ended();
  }

  async *#read(lines: AsyncIterable<[string]>): AsyncGenerator<string, void> {
    for await (const [line] of lines) {
      this.#console += `${line}\n`;
      const [, told] = /^test: (.*?)\r*$/.exec(line) ?? [];
      if (told !== undefined) yield told;
    }
  }
}

/** `virtio serve` on an image, with a page of metrics. */
async function serve(t: TestContext, socket: string, image: string): Promise<Daemon> {
  const words = ["serve", `file:${image}`, "--socket", socket, "--metrics", "0"];
  const daemon = await Daemon.start(socket, process.execPath, [MAIN, ...words]);
  t.after(() => daemon.stop());
  return daemon;
}

async function scrape({ output }: Daemon): Promise<Page> {
  const [, url] = /^metrics at (\S+)$/m.exec(output) ?? assert.fail(output);
  return readPage(await (await fetch(url)).text());
}

async function killed(daemon: Daemon): Promise<void> {
  process.kill(daemon.pid, "SIGKILL");
  await daemon.ended;
}

const md5 = (bytes: Uint8Array): string => createHash("md5").update(bytes).digest("hex");

const skip = reasonForNoGuest("apt-get", "dpkg-deb", "flock", "setpriv", "qemu-system-x86_64");

describe("QEMU as front-end", { skip, concurrency: 1 }, () => {
  for (const format of ["split", "packed"]) {
    test(`VHU-BE-27 ${format}: a guest reads, writes, flushes, survives three deaths of its back-end, and is told of a new size`, {
      timeout: TEST_MS,
    }, async (t) => {
      const folder = new TemporaryFolder();
      t.after(() => folder.close());
      const image = folder.file("disk.img");
      const socket = folder.file("disk.sock");
      const content = randomBytes(DISK_BYTES);
      const pattern = randomBytes(PATTERN_BYTES);
      writeFileSync(image, content);
      const files = await buildGuest((line) => t.diagnostic(line));

      const first = await serve(t, socket, image);
      const guest = new Guest(folder, socket, files, format === "packed");
      t.after(() => guest.stop());
      guest.allow("pattern", pattern);
      assert.equal(await guest.says("cache"), "write back");
      assert.equal(await guest.says("size"), String(DISK_BYTES / 512));
      assert.equal(await guest.says("read"), `${md5(content.subarray(0, 8 * MIB))} -`);
      await guest.says("written");
      assert.ok(readFileSync(image).subarray(0, PATTERN_BYTES).equals(pattern));
      const page = await scrape(first);
      assert.ok(page.get('virtio_backend_requests_total{queue="0",type="flush"}') >= 1);
      assert.equal(page.sum("virtio_backend_errors_total"), 0);
      await killed(first);

      // It leaves three writes of four unfinished, and dies when it has taken a tenth.
      const mortal = await Daemon.start(socket, process.execPath, [
        ...[MORTAL, socket, image, String(LAST_WRITE), String(HOLD)],
      ]);
      t.after(() => mortal.stop());
      guest.allow("write");
      await mortal.ended;

      const second = await serve(t, socket, image);
      guest.allow("more");
      await guest.says("going on");
      await guest.says("round 1");
      const replayed = (await scrape(second)).get('virtio_backend_replayed_requests_total{queue="0"}');
      assert.ok(replayed >= Math.floor(LAST_WRITE / HOLD) + 1, `${replayed} replayed`);
      await killed(second); // in the midst of the second round
      const third = await serve(t, socket, image);
      await guest.says("round 2");
      await guest.says("round 3");
      for (const place of PLACES) {
        assert.equal(await guest.says("back"), `${md5(pattern)} -`);
        assert.ok(
          readFileSync(image)
            .subarray(place, place + PATTERN_BYTES)
            .equals(pattern),
        );
      }

      truncateSync(image, DISK_BYTES + 8 * MIB);
      process.kill(third.pid, "SIGUSR2");
      assert.equal(await guest.says("resized"), String((DISK_BYTES + 8 * MIB) / 512));
      await guest.ended();
      assert.equal((await scrape(third)).sum("virtio_backend_errors_total"), 0);
    });
  }
});
