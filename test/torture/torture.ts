/** One variant of the torture: a disk in use, whose back-end is killed again and again, and what became of it. */

import { readFileSync, truncateSync, writeFileSync } from "node:fs";
import { performance } from "node:perf_hooks";
import { setImmediate } from "node:timers/promises";
import { type BlockDevice, type CompletionMode, openBlock } from "../../src/index.js";
import { Random } from "../fuzz/random.js";
import { type Daemon, hasClient, TemporaryFolder } from "../support/peers.js";
import { Ledger, TortureFailure } from "./ledger.js";
import { Life, type LifeCounts } from "./life.js";
import { nameOfVariant, startPeer, type Variant } from "./peer.js";
import { Watch } from "./watch.js";

/** What {@link torture} is told. */
export interface TortureOptions {
  readonly variant: Variant;
  /** Names the plan: what is asked for, and when the back-end dies. What overtakes what is the machine's. */
  readonly seed: number;
  /** How often the back-end is killed. */
  readonly kills: number;
  /** Kills that one open device survives; then another is opened. */
  readonly killsPerDevice: number;
  /** Calls between two kills at most. */
  readonly calls: number;
}

/** What a run of the torture has seen. */
export interface TortureReport extends LifeCounts {
  kills: number;
  /** Devices that were opened one after the other. */
  devices: number;
  /** Kills right after the new back-end had accepted, in the midst of the handshake. */
  early: number;
  /** Times that the device was back, and the attempts that took. */
  reconnects: number;
  attempts: number;
  /** Requests that were submitted again, by the driver or the back-end. */
  replayed: number;
  /** Changes that a dead back-end had completed without a flush. */
  unflushed: number;
  /** Kills at rest, where it is known how many these are. */
  quiet: number;
  /** Sectors that a read found torn where that may be: beside a write in flight, mostly. */
  torn: number;
  /** Times that the whole image was checked. */
  images: number;
}

const DISK_BYTES = 8 * 2 ** 20;
/** Nothing going on for so long is a failure. Longer than any pause of a busy machine. */
const PATIENCE_MS = 40_000;
/** How long a device that is no more may take to close. */
const CLOSING_MS = 10_000;
const MODES: readonly CompletionMode[] = ["hybrid", "event", "poll"];
const QUEUE_SIZES = [256, 128, 64, 16];
/** One in so many back-ends dies soon after the one before, with most of what was submitted again in flight. */
const SOON = 4;
/** One in so many outages lasts for some attempts to reach the back-end again. */
const LONG_OUTAGES = 4;
const LONGEST_OUTAGE = 4;
/** One in so many new back-ends dies during the handshake, after at most so many turns of the event loop. */
const EARLY_DEATHS = 4;
const HANDSHAKE_TURNS = 60;
/** One in so many kills is followed by a look at the image, and one in so many by a pause of the load. */
const LOOKS = 4;
const PAUSES = 6;
/** One in so many back-ends is stopped before it is killed, for so many turns at most: the driver goes on asking. */
const FREEZES = 3;
const FROZEN_TURNS = 60;
/** A back-end that is killed at rest has completed fewer changes than this since the last flush. */
const MOST_CHANGES = 4;
/** Microseconds at most that the driver looks away before the kill, so that answers lie in the ring unseen. */
const BLIND_US = 300;

/**
 * Run one variant.
 *
 * @throws TortureFailure with all that is known, when a disk did what no disk may do.
 */
export async function torture(options: TortureOptions): Promise<TortureReport> {
  const folder = new TemporaryFolder();
  const run = new Run(options, folder);
  try {
    return await run.all();
  } catch (error) {
    const { message, cause } = run.failed(error);
    throw new TortureFailure(`${nameOfVariant(options.variant)}, seed ${options.seed}: ${message}`, { cause });
  } finally {
    await run.close();
    folder.close();
  }
}

class Run {
  private readonly options: TortureOptions;
  private readonly folder: TemporaryFolder;
  private readonly image: string;
  private readonly random: Random;
  private readonly ledger: Ledger;
  private readonly watch = new Watch(PATIENCE_MS);
  private readonly report: TortureReport;
  private daemon: Daemon | undefined;
  private disk: BlockDevice | undefined;
  /** Whether the device is in touch with its back-end, as far as it told. */
  private isConnected = false;
  /** The last attempt of this outage that was announced. */
  private attempt = 0;
  /** What the device said last of how many changes are not flushed. */
  private unflushed = 0;

  constructor(options: TortureOptions, folder: TemporaryFolder) {
    this.options = options;
    this.folder = folder;
    this.image = folder.file("disk.img");
    writeFileSync(this.image, "");
    truncateSync(this.image, DISK_BYTES);
    this.random = new Random(options.seed);
    this.ledger = new Ledger(DISK_BYTES, options.seed, this.isCached);
    this.watch.details = () => this.describe();
    const counts = { requests: 0, abandoned: 0, flushes: 0, lowLevel: 0 };
    const outages = { early: 0, reconnects: 0, attempts: 0, replayed: 0, unflushed: 0, quiet: 0 };
    this.report = { ...counts, ...outages, kills: 0, devices: 0, torn: 0, images: 0 };
  }

  /** Whether the back-end takes with it what was not flushed. */
  private get isCached(): boolean {
    return this.options.variant.peer === "cached";
  }

  async all(): Promise<TortureReport> {
    const { report, options } = this;
    await this.startPeer();
    while (report.kills < options.kills) await this.life();
    await this.daemon?.stop();
    this.checkImage("the image after the last back-end has ended");
    report.torn = this.ledger.torn;
    return report;
  }

  /** End everything that is still going on; returns what failed first. */
  failed(error: unknown): Error {
    return this.watch.fail(error);
  }

  async close(): Promise<void> {
    this.watch.close();
    // Beside the failure that is reported already, what ends badly is not of interest.
    const closed = this.disk?.close().catch(() => undefined);
    await Promise.race([closed, new Promise((resolve) => setTimeout(resolve, CLOSING_MS).unref())]);
    await this.daemon?.stop();
  }

  /** Open a device, kill its back-end so many times, look at every byte. */
  private async life(): Promise<void> {
    const { options, report, ledger, watch } = this;
    const until = Math.min(options.kills, report.kills + options.killsPerDevice);
    const before = report.reconnects;
    // In turn, so that a run has seen all of them.
    const turn = options.seed + report.devices;
    const disk = await this.open(MODES[turn % 3], 1 + (turn % 2));
    const queue = turn % 4 === 3 ? disk.takeQueue() : undefined;
    if (queue !== undefined) queue.mode = disk.mode;
    const life = new Life({ disk, ledger, random: this.random, watch }, queue);
    life.start();
    while (report.kills < until) await this.death(disk, life);
    await life.drain();
    await life.end();
    if (disk.stats().reconnects !== report.reconnects - before) throw new TortureFailure("a reconnect is missing");
    this.checkImage("the image under a device at rest");
    await watch.wait(disk.close());
    this.disk = undefined;
    for (const key of Object.keys(life.counts) as (keyof LifeCounts)[]) report[key] += life.counts[key];
  }

  private async open(mode: CompletionMode, queues: number): Promise<BlockDevice> {
    const { random, report, options } = this;
    const packed = options.variant.packed;
    const disk = await openBlock(`vhost-user:${this.folder.file("vhost-user.sock")}`, {
      ...{
        mode,
        queues,
        queueSize: QUEUE_SIZES[random.below(4)],
        indirect: !random.oneIn(4),
        eventIdx: !random.oneIn(4),
        packed,
      },
      reconnect: { minDelay: 2, maxDelay: 40, timeout: PATIENCE_MS },
    });
    this.disk = disk;
    report.devices++;
    if ((disk.info.format === "packed") !== packed) throw new TortureFailure(`the ring is ${disk.info.format}`);
    this.isConnected = true;
    disk.on("disconnect", () => {
      this.isConnected = false;
      this.attempt = 0;
      this.watch.progress();
    });
    disk.on("reconnecting", ({ attempt }) => {
      this.attempt = attempt;
      this.watch.look();
    });
    disk.on("reconnect", ({ attempts, replayed, tracked, unflushed }) => {
      this.isConnected = true;
      // All that the dead one had acknowledged has been told by now.
      this.ledger.crash();
      this.unflushed = unflushed;
      report.reconnects++;
      report.attempts += attempts;
      report.replayed += replayed;
      report.unflushed += unflushed;
      if (tracked !== options.variant.inflight) this.watch.fail(new Error(`tracked is ${tracked}`));
      this.watch.progress();
    });
    disk.on("lost", (error) => this.watch.fail(error));
    return disk;
  }

  /** The back-end dies at some time, and comes back. */
  private async death(disk: BlockDevice, life: Life): Promise<void> {
    const { random, watch, options } = this;
    const calls = watch.completed + random.below(random.oneIn(SOON) ? Math.ceil(options.calls / 40) : options.calls);
    await watch.until(() => watch.completed >= calls);
    if (random.oneIn(FREEZES)) {
      // What it has not taken by now it never takes.
      this.daemon?.freeze();
      for (let turns = random.below(FROZEN_TURNS); turns > 0; turns--) await setImmediate();
    } else {
      lookAway(random.below(BLIND_US));
    }
    await this.kill();
    if (random.oneIn(2)) disk.mode = MODES[random.below(3)];
    if (random.oneIn(LOOKS)) this.checkDead();
    if (random.oneIn(LONG_OUTAGES)) {
      const attempts = 1 + random.below(LONGEST_OUTAGE);
      await watch.until(() => this.attempt >= attempts);
    }
    await this.startPeer();
    while (this.report.kills < options.kills && random.oneIn(EARLY_DEATHS)) await this.dieEarly();
    disk.mode = MODES[random.below(3)];
    if (random.oneIn(PAUSES)) await this.pause(disk, life);
  }

  /** Kill the back-end in the midst of the handshake: some turns after it has accepted. */
  private async dieEarly(): Promise<void> {
    const { watch, daemon, random } = this;
    if (daemon === undefined) return;
    while (!hasClient(daemon.path) && !watch.over) await setImmediate();
    for (let turns = random.below(HANDSHAKE_TURNS); turns > 0; turns--) await setImmediate();
    if (!this.isConnected) this.report.early++;
    await this.kill();
    await this.startPeer();
  }

  private async kill(): Promise<void> {
    const wasConnected = this.isConnected;
    this.report.kills++;
    await this.watch.wait(this.daemon?.kill() ?? Promise.resolve());
    this.ledger.crash();
    this.watch.progress();
    // However it learns of completions, it notices.
    if (wasConnected) await this.watch.until(() => !this.isConnected);
  }

  private async startPeer(): Promise<void> {
    this.daemon = await startPeer(this.options.variant, this.folder, this.image);
    this.watch.progress();
  }

  /** Let everything come to rest, look at the image, kill the back-end once more, and go on. */
  private async pause(disk: BlockDevice, life: Life): Promise<void> {
    await life.drain();
    if (this.isCached) await life.flush();
    this.checkImage("the image while nothing is in flight");
    if (this.report.kills < this.options.kills) await this.dieAtRest(disk, life);
    this.watch.resume();
  }

  /** With nothing in flight it is known what a dead back-end may have lost: what the device says is just that. */
  private async dieAtRest(disk: BlockDevice, life: Life): Promise<void> {
    const { report, ledger, random, watch } = this;
    await life.flush();
    await life.change(random.below(MOST_CHANGES));
    // qemu-storage-daemon answers when a write is stable.
    const expected = disk.info.cache === "writethrough" ? 0 : ledger.unflushed;
    const before = report.reconnects;
    await this.kill();
    this.checkDead();
    await this.startPeer();
    await watch.until(() => report.reconnects > before);
    report.quiet++;
    if (this.unflushed === expected) return;
    throw new TortureFailure(`the device says ${this.unflushed} changes are not flushed, and ${expected} are not`);
  }

  private checkDead(): void {
    // The driver may have learnt by now of what the dead one had completed.
    this.ledger.crash();
    this.checkImage("the image of a dead back-end");
  }

  private checkImage(where: string): void {
    this.report.images++;
    this.ledger.checkImage(readFileSync(this.image), where);
  }

  private describe(): string {
    const { report, disk, daemon } = this;
    const device =
      disk === undefined
        ? "no device is open"
        : `mode ${disk.mode}, ${disk.info.queues} queues of ${disk.info.queueSize}`;
    return (
      `  ${device}, ${this.isConnected ? "connected" : `away, attempt ${this.attempt}`}, ${disk?.pending ?? 0} pending\n` +
      `  after kill ${report.kills} of device ${report.devices}, ${report.reconnects} reconnects, ` +
      `${report.replayed} requests submitted again\n  ${JSON.stringify(disk?.stats())}\n  the back-end has said: ${daemon?.output.trim() ?? "nothing"}`
    );
  }
}

/** Keep this thread from seeing anything for a moment. */
function lookAway(microseconds: number): void {
  const end = performance.now() + microseconds / 1000;
  while (performance.now() < end);
}
