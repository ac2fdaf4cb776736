/** Several threads on one device of qemu-storage-daemon. */

import { truncateSync, writeFileSync } from "node:fs";
import { after } from "node:test";
import { requirePeer, startStorageDaemon, TemporaryFolder } from "../support/peers.js";
import { workerSuite } from "../support/worker-suite.js";

const folders: TemporaryFolder[] = [];
after(() => {
  for (const folder of folders) folder.close();
});

workerSuite(
  "qemu-storage-daemon",
  async (queues) => {
    const folder = new TemporaryFolder();
    folders.push(folder);
    const image = folder.file("disk.raw");
    writeFileSync(image, "");
    truncateSync(image, 24 * 1024 * 1024);
    const daemon = await startStorageDaemon(folder, { blockdev: `driver=file,filename=${image}`, queues });
    return {
      address: `vhost-user:${daemon.path}`,
      kill: () => process.kill(daemon.pid, "SIGKILL"),
      stop: () => daemon.stop(),
    };
  },
  requirePeer("qemu-storage-daemon"),
);
