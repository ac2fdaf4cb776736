/**
 * Hashes a disk in several threads, each with a queue of its own: SHA-256 over the SHA-256 of every megabyte.
 *
 *     node dist/examples/checksum-workers.js [ADDRESS] [THREADS]
 */

import { createHash } from "node:crypto";
import { once } from "node:events";
import { isMainThread, type MessagePort, Worker, workerData } from "node:worker_threads";
import { BlockDevice, openBlock } from "virtio-driver";

const CHUNK = 1 << 20;
const DIGEST = 32;
/** Chunks that one thread has in flight. */
const DEPTH = 4;

/** What a thread is given. */
interface Job {
  /** Its queue. */
  readonly port: MessagePort;
  /** The next chunk that nobody has taken. */
  readonly next: Int32Array;
  /** The digest of every chunk. */
  readonly digests: Uint8Array;
}

if (isMainThread) await hashDisk(process.argv[2] ?? "file:disk.img", Number(process.argv[3] ?? 2));
else await hashChunks(workerData as Job);

async function hashDisk(address: string, threads: number): Promise<void> {
  await using disk = await openBlock(address, { readOnly: true, queues: threads });
  const next = new Int32Array(new SharedArrayBuffer(4));
  const digests = new Uint8Array(new SharedArrayBuffer(Math.ceil(disk.capacity / CHUNK) * DIGEST));
  const ended: Promise<unknown>[] = [];
  for (let i = 0; i < threads; i++) {
    const port = await disk.handOver({ memory: DEPTH * CHUNK });
    const job: Job = { port, next, digests };
    ended.push(once(new Worker(new URL(import.meta.url), { workerData: job, transferList: [port] }), "exit"));
  }
  await Promise.all(ended); // rejects when one of them fails
  console.log(`${createHash("sha256").update(digests).digest("hex")}  ${address}`);
}

async function hashChunks({ port, next, digests }: Job): Promise<void> {
  await using disk = await BlockDevice.adopt(port);
  const loop = async (): Promise<void> => {
    const buffer = await disk.allocate(CHUNK);
    for (;;) {
      const chunk = Atomics.add(next, 0, 1);
      const position = chunk * CHUNK;
      if (position >= disk.capacity) break;
      const { bytesRead } = await disk.read(buffer, { position, length: Math.min(CHUNK, disk.capacity - position) });
      digests.set(createHash("sha256").update(buffer.bytes.subarray(0, bytesRead)).digest(), chunk * DIGEST);
    }
    buffer.release();
  };
  await Promise.all(Array.from({ length: DEPTH }, loop));
}
