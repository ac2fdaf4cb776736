/** What a back-end counts of each queue: by type and status, and while requests are in flight. */

import assert from "node:assert/strict";
import { describe, it } from "node:test";
import { BlkRequestType } from "../../src/protocol/index.js";
import { GUEST } from "./front-end.js";
import { SlowStorage, until } from "./slow-storage.js";
import { backendFor, frontEndFor, pattern } from "./support.js";

describe("the counts of a back-end", () => {
  it("tell requests that take their time from those that are answered, and good answers from bad ones", async (t) => {
    const storage = new SlowStorage();
    t.after(() => storage.release());
    const { backend } = backendFor(t, storage);
    const ring = await frontEndFor(t, backend).start();
    const [queue] = backend.stats.queues;
    const good = ring.request(BlkRequestType.IN, 0n, { into: 512 });
    const bad = ring.request(BlkRequestType.IN, 1n, { into: 1024 });
    ring.kick.signal();
    await until(() => storage.calls.length === 2);
    assert.deepEqual([queue.requests, queue.inFlight, queue.bytesRead], [2, 2, 1536]);
    storage.finish("read");
    await ring.finished(good);
    assert.deepEqual([queue.inFlight, queue.answersByStatus], [1, { ok: 1, ioerr: 0, unsupp: 0, none: 0 }]);
    storage.finish("read", new Error("on purpose"));
    await ring.finished(bad);
    assert.deepEqual([queue.inFlight, queue.answersByStatus], [0, { ok: 1, ioerr: 1, unsupp: 0, none: 0 }]);
    assert.deepEqual(backend.stats.errorsByPlace, { storage: 1, ring: 0, connection: 0 });
    assert.equal(backend.stats.errors, 1);
  });

  it("have a place for requests without a header, without a status, and of types that nobody knows", async (t) => {
    const { backend } = backendFor(t);
    const ring = await frontEndFor(t, backend).start();
    const [queue] = backend.stats.queues;
    assert.equal((await ring.run(0xffff_ffff, 0n)).status, 2);
    assert.equal((await ring.run(15, 0n)).status, 2);
    const at = GUEST + BigInt(ring.room(16));
    for (const writable of [true, false]) ring.driver.add([{ address: at, length: 16, writable }], 0);
    ring.driver.publish();
    ring.kick.signal();
    await until(() => queue.requests === 4);
    assert.equal(queue.requestsByType.other, 4);
    assert.deepEqual(queue.answersByStatus, { ok: 0, ioerr: 1, unsupp: 2, none: 1 });
    assert.equal(queue.inFlight, 0);
  });

  it("are those of the queue, and the sums of all of them", async (t) => {
    const { backend } = backendFor(t, undefined, { queues: 2 });
    const front = frontEndFor(t, backend);
    const first = await front.start();
    const second = front.ring(1);
    await second.start();
    await second.enable(1);
    await first.write(0n, pattern(1024));
    await second.read(0n, 512);
    await second.read(0n, 512);
    const { stats } = backend;
    assert.deepEqual(
      stats.queues.map(({ index, requests, bytesRead, bytesWritten }) => [index, requests, bytesRead, bytesWritten]),
      [
        [0, 1, 0, 1024],
        [1, 2, 1024, 0],
      ],
    );
    assert.deepEqual([stats.requests, stats.bytesRead, stats.bytesWritten, stats.notifications], [3, 1024, 1024, 3]);
    assert.ok((backend.clientMemory?.regions ?? 0) === 1 && backend.capacity === 1024 * 1024);
  });
});
