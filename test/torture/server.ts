/** A back-end in a process of its own, without INFLIGHT_SHMFD: `server.js SOCKET IMAGE QUEUES split|packed`. */

import { FileStorage, VhostUserBackend } from "../../src/backend/index.js";

const [path, image, queues, format] = process.argv.slice(2);

VhostUserBackend.listen({
  ...{ path, storage: FileStorage.open(image), queues: Number(queues), packed: format === "packed", inflight: false },
  onError: (error) => process.stderr.write(`${String(error)}\n`),
});
