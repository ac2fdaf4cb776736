/** A worker thread of the tests: adopts a block device and does with it what it is told. */

import assert from "node:assert/strict";
import { type MessagePort, parentPort } from "node:worker_threads";
import { BlockDevice, type CompletionMode } from "../../src/index.js";
import { inParallel, settle } from "./block-suite.js";

/** A part of the disk, with what it holds: bytes that tell the seed and their position. */
export interface Part {
  readonly from: number;
  readonly to: number;
  readonly seed: number;
}

/** What the worker is told. Each command is answered once, `churn` and `spin` a first time when they are under way. */
export type Command =
  | { readonly do: "adopt"; readonly port: MessagePort; readonly mode: CompletionMode }
  | { readonly do: "fill" | "check"; readonly part: Part }
  /** Read and write until the device ends; then tell how the calls ended. */
  | { readonly do: "churn"; readonly part: Part; readonly depth: number }
  /** Submit and poll without a turn of the event loop until the first word of the memory is not 0. */
  | { readonly do: "spin"; readonly until: SharedArrayBuffer }
  | { readonly do: "close" };

/** An answer: the error, if there was one, or what the command has to say. */
export interface Reply {
  readonly error?: string;
  readonly under?: "way";
  /** `churn`: calls that ended well, and the codes of the errors of the others, one per call. */
  readonly done?: number;
  readonly codes?: readonly string[];
}

const BLOCK = 64 * 1024;
const DEPTH = 8;

/** The bytes of `length` from `position` of a disk of this seed. */
export function partBytes(position: number, length: number, seed: number): Uint8Array {
  const words = new Uint32Array(length / 4);
  for (let i = 0; i < words.length; i++)
    words[i] = Math.imul(position / 4 + i, 0x9e3779b1) ^ Math.imul(seed, 0x85ebca6b);
  return new Uint8Array(words.buffer);
}

function blocksOf({ from, to }: Part): number[] {
  return Array.from({ length: (to - from) / BLOCK }, (_, i) => from + i * BLOCK);
}

/** Write a part, from lent and from plain memory. */
export async function fill(disk: BlockDevice, part: Part): Promise<void> {
  await inParallel(disk, blocksOf(part), DEPTH, async (position) => {
    const bytes = partBytes(position, BLOCK, part.seed);
    if ((position / BLOCK) % 2 === 0) {
      await disk.write(bytes, { position });
      return;
    }
    const buffer = await disk.allocate(BLOCK);
    buffer.bytes.set(bytes);
    await disk.write(buffer, { position });
    buffer.release();
  });
  await settle(disk, disk.flush());
}

/** Read a part and compare. */
export async function check(disk: BlockDevice, part: Part): Promise<void> {
  await inParallel(disk, blocksOf(part), DEPTH, async (position) => {
    const { buffer, bytesRead } = await disk.read(new Uint8Array(BLOCK), { position });
    assert.equal(bytesRead, BLOCK);
    const expected = partBytes(position, BLOCK, part.seed);
    if (Buffer.compare(buffer, expected) === 0) return;
    const at = buffer.findIndex((byte, i) => byte !== expected[i]);
    assert.fail(`byte ${position + at} is ${buffer[at]}, expected ${expected[at]} of seed ${part.seed}`);
  });
}

/** Keep reading and writing a part until the device ends. `underWay` is called once when much has completed. */
export async function churn(
  disk: BlockDevice,
  part: Part,
  depth: number,
  underWay: () => void,
): Promise<{ done: number; codes: string[] }> {
  let done = 0;
  const codes: string[] = [];
  const blocks = blocksOf(part);
  const loop = async (start: number): Promise<void> => {
    const plain = new Uint8Array(BLOCK);
    for (let i = start; ; i++) {
      const position = blocks[i % blocks.length];
      try {
        if (i % 3 === 0) await disk.write(partBytes(position, BLOCK, part.seed), { position });
        else await disk.read(plain, { position });
      } catch (error) {
        codes.push(error instanceof Error && "code" in error ? String(error.code) : String(error));
        return;
      }
      if (++done === 20 * depth) underWay();
    }
  };
  await Promise.all(Array.from({ length: depth }, (_, i) => loop(i)));
  return { done, codes };
}

let disk: BlockDevice | undefined;

/** Requests without end and without a turn of the event loop. */
async function spin(device: BlockDevice, until: Int32Array, underWay: () => void): Promise<void> {
  const buffer = await device.allocate(8 * 4096);
  const queue = device.takeQueue();
  const parts = new Array<number>(queue.queueSize);
  const submit = (part: number): void => {
    parts[queue.submitRead(0, buffer, part * 4096, 4096)] = part;
  };
  queue.mode = "poll";
  queue.onComplete = (slot) => submit(parts[slot]);
  for (let part = 0; part < 8; part++) submit(part);
  underWay();
  while (Atomics.load(until, 0) === 0) {
    queue.kick();
    queue.poll();
  }
}

async function obey(command: Command): Promise<Reply> {
  if (command.do === "adopt") {
    disk = await BlockDevice.adopt(command.port, { mode: command.mode });
    return {};
  }
  assert.ok(disk !== undefined, "there is no device yet");
  const underWay = (): void => parentPort?.postMessage({ under: "way" });
  switch (command.do) {
    case "fill":
      await fill(disk, command.part);
      return {};
    case "check":
      await check(disk, command.part);
      return {};
    case "churn":
      return churn(disk, command.part, command.depth, underWay);
    case "spin":
      await spin(disk, new Int32Array(command.until), underWay);
      return {};
    default:
      await disk.close();
      return {};
  }
}

parentPort?.on("message", (command: Command) => {
  obey(command).then(
    (reply) => parentPort?.postMessage(reply),
    (error: unknown) => parentPort?.postMessage({ error: error instanceof Error ? error.stack : String(error) }),
  );
});
