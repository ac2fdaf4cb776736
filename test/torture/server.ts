/**
 * A back-end in a process of its own, as `virtio serve` has none:
 * `server.js SOCKET IMAGE QUEUES split|packed tracking|forgetful own|cached`.
 */

import { FileStorage, VhostUserBackend } from "../../src/backend/index.js";
import { CachedStorage } from "./cached.js";

const [path, image, queues, format, memory, kind] = process.argv.slice(2);

VhostUserBackend.listen({
  ...{ path, storage: kind === "cached" ? new CachedStorage(image) : FileStorage.open(image) },
  ...{ queues: Number(queues), packed: format === "packed", inflight: memory === "tracking" },
  onError: (error) => process.stderr.write(`${String(error)}\n`),
});
