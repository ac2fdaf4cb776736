/** Several threads on one device of the embedded back-end, which runs in a process of its own. */

import assert from "node:assert/strict";
import { test } from "node:test";
import { spawnBackend } from "../../src/backend/index.js";
import { runChild } from "../sys/helpers.js";
import { workerSuite } from "../support/worker-suite.js";

const DISK_BYTES = 24 * 1024 * 1024;

for (const packed of [false, true]) {
  workerSuite(`embedded back-end, ${packed ? "packed" : "split"}`, async (queues) => {
    const backend = await spawnBackend({ kind: "ram", size: DISK_BYTES }, { queues });
    return {
      address: `vhost-user:${backend.path}`,
      options: { packed },
      kill: () => process.kill(backend.pid, "SIGKILL"),
      // One that was killed has ended by itself.
      stop: () => backend.close().catch((error: unknown) => assert.ok(String(error).includes("SIGKILL"))),
    };
  });
}

test("the process ends in the midst of the requests of workers, however it ends", () => {
  const index = new URL("../../src/index.js", import.meta.url).href;
  const program = (ending: string, workerEnding: string): string => `
    import { Worker } from "node:worker_threads";
    import { openBlock } from ${JSON.stringify(index)};
    const disk = await openBlock("ram:1M", { queues: 2 });
    const port = await disk.handOver({ memory: 1 << 20 });
    const code = \`
      import { parentPort, workerData } from "node:worker_threads";
      import { BlockDevice } from ${JSON.stringify(index)};
      const disk = await BlockDevice.adopt(workerData);
      const loop = async () => { for (;;) await disk.write(new Uint8Array(4096)); };
      for (let i = 0; i < 8; i++) loop().catch(() => {});
      await disk.flush();
      parentPort.postMessage("busy");
      ${workerEnding}
    \`;
    const worker = new Worker(code, { eval: true, workerData: port, transferList: [port] });
    worker.on("error", (error) => console.log(error.message));
    worker.once("message", async () => { ${ending} });
  `;
  for (const [ending, workerEnding, status, output] of [
    ["process.exit(3)", "", 3, ""],
    ["await disk.close(); process.exitCode = 4; await worker.terminate();", "", 4, ""],
    ["await worker.terminate(); await disk.close(); process.exitCode = 5;", "", 5, ""],
    ["worker.on('exit', async () => { await disk.close(); process.exitCode = 6; });", "process.exit(1);", 6, ""],
    [
      "worker.on('exit', async () => { await disk.close(); process.exitCode = 7; });",
      "throw new Error('no')",
      7,
      "no\n",
    ],
  ] as const) {
    const child = runChild(program(ending, workerEnding));
    const { signal, stdout, stderr } = child;
    assert.deepEqual(
      { signal, status: child.status, stdout, stderr },
      { signal: null, status, stdout: output, stderr: "" },
    );
  }
});
