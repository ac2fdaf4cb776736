/** The watcher: when it calls, how it treats exceptions and promises, and how it ends. */

import assert from "node:assert/strict";
import { AsyncLocalStorage } from "node:async_hooks";
import { spawn } from "node:child_process";
import { openSync, writeSync } from "node:fs";
import { constants } from "node:os";
import process from "node:process";
import test, { type TestContext } from "node:test";
import { Worker } from "node:worker_threads";
import { closeFd, EventFd, FdWatcher, receiveMessage, sendMessage, socketPair } from "../../src/sys/index.js";
import { openFds, runChild, SYS, turn, turnUntil } from "./helpers.js";

const IMPORT = `import { EventFd, FdWatcher, receiveMessage } from ${JSON.stringify(SYS)};`;

/** Code for a worker that has the wrapper as `sys` and says what it likes to its parent. */
function startWorker(t: TestContext, code: string): Worker {
  const worker = new Worker(
    `const { parentPort } = require("node:worker_threads");
     import(${JSON.stringify(SYS)}).then((sys) => { ${code} });`,
    { eval: true },
  );
  t.after(() => worker.terminate());
  return worker;
}

/** A watcher that is closed after its test, so that one that fails ends. */
function watch(
  t: TestContext,
  fd: number,
  options: { drain: boolean; writable?: boolean },
  onReady: () => void,
): FdWatcher {
  const watcher = new FdWatcher(fd, options, onReady);
  t.after(() => watcher.close());
  return watcher;
}

function nextMessage(worker: Worker): Promise<unknown> {
  return new Promise((resolve, reject) => {
    worker.once("message", resolve);
    worker.once("error", reject);
  });
}

test("a draining watcher calls once per signal and leaves the counter at 0", async (t) => {
  const event = EventFd.create();
  const left: boolean[] = [];
  const watcher = watch(t, event.fd, { drain: true }, () => left.push(event.drain()));
  event.signal();
  event.signal();
  assert.deepEqual(left, []);
  assert.ok(await turnUntil(() => left.length > 0));
  for (let i = 0; i < 5; i++) await turn();
  assert.deepEqual(left, [false]);
  event.signal();
  assert.ok(await turnUntil(() => left.length > 1));
  assert.deepEqual(left, [false, false]);
  watcher.close();
  event.close();
});

test("a watcher that does not drain calls until the descriptor is read", async (t) => {
  const event = EventFd.create();
  let calls = 0;
  const watcher = watch(t, event.fd, { drain: false }, () => {
    if (++calls === 3) event.drain();
  });
  event.signal();
  assert.ok(await turnUntil(() => calls === 3));
  for (let i = 0; i < 5; i++) await turn();
  assert.equal(calls, 3);
  watcher.close();
  event.close();
});

test("promises and ticks of one callback run before the next callback", async (t) => {
  const events = [EventFd.create(), EventFd.create()];
  const log: string[] = [];
  const watchers = events.map((event, index) =>
    watch(t, event.fd, { drain: true }, () => {
      void Promise.resolve().then(() => log.push(`promise ${index}`));
      process.nextTick(() => log.push(`tick ${index}`));
      log.push(`callback ${index}`);
    }),
  );
  for (const event of events) event.signal();
  assert.ok(await turnUntil(() => log.length === 6));
  assert.deepEqual(log, ["callback 0", "tick 0", "promise 0", "callback 1", "tick 1", "promise 1"]);
  for (const watcher of watchers) watcher.close();
  for (const event of events) event.close();
});

test("the callback runs in the asynchronous context of the constructor", async (t) => {
  const storage = new AsyncLocalStorage<string>();
  const event = EventFd.create();
  let seen: string | undefined;
  const watcher = storage.run("constructor", () => {
    return watch(t, event.fd, { drain: true }, () => {
      seen = storage.getStore();
    });
  });
  storage.run("signal", () => event.signal());
  assert.ok(await turnUntil(() => seen !== undefined));
  assert.equal(seen, "constructor");
  watcher.close();
  event.close();
});

test("closing ends the calls, at once and for others that are due in the same round", async (t) => {
  const events = [EventFd.create(), EventFd.create()];
  let calls = 0;
  const watchers = events.map((event) =>
    watch(t, event.fd, { drain: true }, () => {
      calls++;
      for (const watcher of watchers) watcher.close();
    }),
  );
  for (const event of events) event.signal();
  assert.ok(await turnUntil(() => calls > 0));
  for (let i = 0; i < 5; i++) await turn();
  assert.equal(calls, 1);
  for (const watcher of watchers) {
    watcher.close();
    watcher.ref();
    watcher.unref();
  }
  for (const event of events) event.close();
});

test("one descriptor can be watched twice", async (t) => {
  const event = EventFd.create();
  let one = 0;
  let other = 0;
  const watchers = [
    watch(t, event.fd, { drain: false }, () => one++),
    watch(t, event.fd, { drain: false }, () => other++),
  ];
  event.signal();
  assert.ok(await turnUntil(() => one > 0 && other > 0));
  for (const watcher of watchers) watcher.close();
  event.close();
});

test("a watcher for writing calls when there is room, and not while there is none", async (t) => {
  const [near, far] = socketPair();
  const block = new Uint8Array(65536);
  let room = 0;
  const watcher = watch(t, near, { drain: false, writable: true }, () => {
    room++;
    while (sendMessage(near, block, []) !== -1);
  });
  assert.ok(await turnUntil(() => room === 1));
  for (let i = 0; i < 5; i++) await turn();
  assert.equal(room, 1);
  while (receiveMessage(far, block, []) !== -1);
  assert.ok(await turnUntil(() => room === 2));
  watcher.close();
  closeFd(near);
  closeFd(far);
});

test("the end of a connection is told", async (t) => {
  const [near, far] = socketPair();
  let ended = false;
  const watcher = watch(t, near, { drain: false }, () => {
    ended = receiveMessage(near, new Uint8Array(8), []) === 0;
    watcher.close();
  });
  closeFd(far);
  assert.ok(await turnUntil(() => ended));
  closeFd(near);
});

test("an error of a connection is told, and the watch goes on", async (t) => {
  const [near, far] = socketPair();
  const results: unknown[] = [];
  const watcher = watch(t, near, { drain: false }, () => {
    try {
      results.push(receiveMessage(near, new Uint8Array(8), []));
    } catch (error) {
      results.push(error instanceof Error && "errno" in error ? error.errno : error);
    }
    if (results.length === 2) watcher.close();
  });
  // Closing with bytes unread resets the connection: the socket reports an error first, its end afterwards.
  sendMessage(near, new Uint8Array(8), []);
  closeFd(far);
  assert.ok(await turnUntil(() => results.length === 2));
  assert.deepEqual(results, [constants.errno.ECONNRESET, 0]);
  closeFd(near);
});

test("what cannot be watched is refused, and leaves no descriptor behind", () => {
  const before = openFds();
  const file = openSync("/proc/self/exe", "r");
  const callback = () => {};
  assert.throws(() => new FdWatcher(file, { drain: false }, callback), {
    code: "ERR_VIRTIO_PERMISSION",
    errno: constants.errno.EPERM,
    message: /regular files cannot be watched/,
  });
  closeFd(file);
  assert.throws(() => new FdWatcher(file, { drain: false }, callback), {
    code: "ERR_VIRTIO_SYSCALL",
    errno: constants.errno.EBADF,
  });
  const refused = { code: "ERR_VIRTIO_ARGUMENT" };
  assert.throws(() => new FdWatcher(-1, { drain: false }, callback), refused);
  assert.throws(() => new FdWatcher(0, {} as { drain: boolean }, callback), refused);
  assert.throws(() => new FdWatcher(0, { drain: true, once: true } as { drain: boolean }, callback), refused);
  assert.throws(() => new FdWatcher(0, { drain: true, writable: 1 as unknown as boolean }, callback), refused);
  assert.throws(() => new FdWatcher(0, { drain: true }, "callback" as unknown as () => void), refused);
  assert.equal(openFds(), before);
});

test("500 watchers leave no descriptor", async () => {
  const event = EventFd.create();
  const before = openFds();
  for (let i = 0; i < 500; i++) {
    const watcher = new FdWatcher(event.fd, { drain: true }, () => {});
    if (i % 2 === 0) await turn();
    watcher.close();
  }
  assert.equal(openFds(), before);
  await turn();
  event.close();
});

test("a watch goes on when its FdWatcher is collected", () => {
  const child = runChild(
    `${IMPORT}
    const event = EventFd.create();
    new FdWatcher(event.fd, { drain: true }, () => { console.log("called"); process.exit(); });
    for (let i = 0; i < 5; i++) {
      gc();
      await new Promise((resolve) => setImmediate(resolve));
    }
    event.signal();
  `,
    { args: ["--expose-gc"] },
  );
  assert.equal(child.stdout, "called\n", child.stderr);
});

test("closing the descriptor before its watcher neither aborts nor deafens", () => {
  const child = runChild(`${IMPORT}
    const event = EventFd.create();
    const fd = event.fd;
    const watcher = new FdWatcher(fd, { drain: true }, () => { console.log("called"); watcher.close(); });
    event.signal();
    event.close();
  `);
  assert.equal(child.stdout, "called\n", child.stderr);
  assert.equal(child.status, 0, child.stderr);
});

test("an exception in the callback becomes an uncaughtException, and the watch goes on", () => {
  const child = runChild(`${IMPORT}
    const event = EventFd.create();
    let calls = 0;
    const watcher = new FdWatcher(event.fd, { drain: true }, () => {
      if (++calls === 3) return watcher.close();
      throw new Error("call " + calls);
    });
    process.on("uncaughtException", (error, origin) => {
      console.log(origin, error.message);
      event.signal();
    });
    event.signal();
  `);
  assert.equal(child.stdout, "uncaughtException call 1\nuncaughtException call 2\n", child.stderr);
  assert.equal(child.status, 0, child.stderr);
});

test("an exception nobody handles ends the process with its stack", () => {
  const child = runChild(`${IMPORT}
    const event = EventFd.create();
    new FdWatcher(event.fd, { drain: true }, function onReadable() { throw new RangeError("nobody handles"); });
    event.signal();
  `);
  assert.equal(child.status, 1);
  assert.match(child.stderr, /RangeError: nobody handles\n\s+at .*onReadable/);
});

test("a rejection nobody handles ends the process as well", () => {
  const child = runChild(`${IMPORT}
    const event = EventFd.create();
    new FdWatcher(event.fd, { drain: true }, async () => { throw new RangeError("nobody awaits"); });
    event.signal();
  `);
  assert.equal(child.status, 1);
  assert.match(child.stderr, /RangeError: nobody awaits/);
});

test("watchers work in a worker; exceptions go to its handler, or end it with an error", {
  timeout: 30_000,
}, async (t) => {
  const event = EventFd.create();
  const worker = startWorker(
    t,
    `
    new sys.FdWatcher(${event.fd}, { drain: true }, () => { throw new RangeError("from a worker"); });
    process.once("uncaughtException", (error) => parentPort.postMessage(error.message));
    parentPort.postMessage("ready");
  `,
  );
  assert.equal(await nextMessage(worker), "ready");
  event.signal();
  assert.equal(await nextMessage(worker), "from a worker");
  const failed = new Promise<Error>((resolve) => {
    worker.once("error", resolve);
  });
  event.signal();
  const { name, message } = await failed;
  assert.deepEqual({ name, message }, { name: "RangeError", message: "from a worker" });
  event.close();
});

test("terminating a worker closes its watchers, idle or in the middle of a callback", {
  timeout: 30_000,
}, async (t) => {
  // The first worker makes the runtime open descriptors that stay.
  await startWorker(t, "").terminate();
  const before = openFds();
  for (const callback of ["{}", `{ parentPort.postMessage("busy"); for (;;); }`]) {
    const [near, far] = socketPair();
    const worker = startWorker(
      t,
      `
      for (let i = 0; i < 10; i++) new sys.FdWatcher(${near}, { drain: false }, () => ${callback});
      parentPort.postMessage("ready");
    `,
    );
    assert.equal(await nextMessage(worker), "ready");
    if (callback !== "{}") {
      sendMessage(far, new Uint8Array(1), []);
      assert.equal(await nextMessage(worker), "busy");
    }
    assert.equal(await worker.terminate(), 1);
    closeFd(near);
    closeFd(far);
  }
  assert.equal(openFds(), before);
});

test("a worker ends by itself although an unref'd watcher goes on", { timeout: 30_000 }, async (t) => {
  const worker = startWorker(
    t,
    `
    const event = sys.EventFd.create();
    new sys.FdWatcher(event.fd, { drain: true }, () => {}).unref();
    event.close();
  `,
  );
  const code = await new Promise((resolve) => {
    worker.once("exit", resolve);
  });
  assert.equal(code, 0);
});

test("the process ends well with a watcher: exit, exit from the callback, nothing else to do", () => {
  const endings: [code: string, status: number][] = [
    ["new FdWatcher(event.fd, { drain: true }, () => {}); process.exit(3);", 3],
    ["new FdWatcher(event.fd, { drain: true }, () => process.exit(4)); event.signal();", 4],
    ["new FdWatcher(event.fd, { drain: true }, () => {}).unref(); process.exitCode = 5;", 5],
    [
      "const watcher = new FdWatcher(event.fd, { drain: true }, () => {}); watcher.unref(); watcher.ref(); " +
        "watcher.unref(); process.exitCode = 6;",
      6,
    ],
    ["new FdWatcher(event.fd, { drain: true }, () => {}).close(); process.exitCode = 7;", 7],
  ];
  for (const [code, status] of endings) {
    const child = runChild(`${IMPORT} const event = EventFd.create(); ${code}`);
    assert.equal(child.signal, null, `${code}: ${child.stderr}`);
    assert.equal(child.status, status, `${code}: ${child.stderr}`);
    assert.equal(child.stderr, "");
  }
});

test("a watcher that is not unref'd keeps the process alive", { timeout: 30_000 }, async () => {
  const code = `${IMPORT}
    const watcher = new FdWatcher(3, { drain: false }, () => {
      console.log("called", receiveMessage(3, new Uint8Array(8), []));
      watcher.close();
    });
    watcher.unref();
    watcher.ref();
    console.log("waiting");
  `;
  const child = spawn(process.execPath, ["--input-type=module", "-e", code], {
    stdio: ["ignore", "pipe", "inherit", "pipe"],
  });
  let output = "";
  const [, , , pipe] = child.stdio;
  assert.ok(child.stdout !== null && pipe !== null && pipe !== undefined && "write" in pipe);
  for await (const chunk of child.stdout) {
    output += String(chunk);
    if (output === "waiting\n") pipe.write("x");
  }
  assert.equal(output, "waiting\ncalled 1\n");
});

test("a descriptor that is no counter can be drained without waiting", async (t) => {
  const [near, far] = socketPair();
  let calls = 0;
  const watcher = watch(t, near, { drain: true }, () => calls++);
  writeSync(far, "12345678");
  assert.ok(await turnUntil(() => calls > 0));
  for (let i = 0; i < 5; i++) await turn();
  assert.equal(calls, 1);
  watcher.close();
  closeFd(near);
  closeFd(far);
});
