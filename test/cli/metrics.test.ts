/** Tests of --metrics: what `virtio serve` and `virtio bench` tell Prometheus, and that nobody is disturbed by it. */

import assert from "node:assert/strict";
import type { ChildProcessWithoutNullStreams } from "node:child_process";
import { on, once } from "node:events";
import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { type AddressInfo, connect, createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, describe, test, type TestContext } from "node:test";
import { openBlock } from "../../src/index.js";
import { FrontEnd } from "../backend/front-end.js";
import { type Finished, finished, start, virtio } from "./command.js";
import { type Page, readPage } from "./prometheus.js";

const folder = mkdtempSync(join(tmpdir(), "virtio-metrics-"));
after(() => rmSync(folder, { recursive: true }));

const MIB = 1 << 20;
const SERVE_BY_QUEUE = [
  ...["requests_in_flight", "read_bytes_total", "written_bytes_total", "kicks_total", "notifications_total"],
  "replayed_requests_total",
];

/** A running command with a page. */
interface Told {
  readonly child: ChildProcessWithoutNullStreams;
  readonly url: string;
  readonly ended: Promise<Finished>;
  readonly scrape: () => Promise<Page>;
  /** Scrape until the page says so. */
  readonly until: (condition: (page: Page) => boolean) => Promise<Page>;
}

/** No wait of a test is longer. */
const PATIENCE_MS = 20_000;

/** Start a command with --metrics and wait until it says where the page is, and then `line`. */
async function startTold(t: TestContext, words: readonly string[], line: RegExp, port = "0"): Promise<Told> {
  const child = start([...words, "--metrics", port]);
  t.after(() => child.kill("SIGKILL"));
  const ended = finished(child);
  let said = "";
  for await (const [chunk] of on(child.stderr, "data", { close: ["end"] }) as AsyncIterable<[Buffer]>) {
    said += chunk.toString();
    if (line.test(said)) break;
  }
  const [, url] = /^metrics at (http:\S+\/metrics)$/m.exec(said) ?? assert.fail(`it said: ${said}`);
  const scrape = async (): Promise<Page> => {
    const response = await fetch(url);
    assert.equal(response.status, 200);
    assert.equal(response.headers.get("content-type"), "text/plain; version=0.0.4; charset=utf-8");
    return readPage(await response.text());
  };
  const until = async (condition: (page: Page) => boolean): Promise<Page> => {
    for (const begin = performance.now(); performance.now() < begin + PATIENCE_MS; ) {
      const page = await scrape();
      if (condition(page)) return page;
    }
    return assert.fail(`the page never said ${String(condition)}`);
  };
  return { child, url, ended, scrape, until };
}

let sockets = 0;

/** Start `virtio serve` with a page. */
async function serveTold(t: TestContext, words: readonly string[] = []): Promise<Told & { socket: string }> {
  const socket = join(folder, `disk${sockets++}.sock`);
  const told = await startTold(t, ["serve", "ram:64M", "--socket", socket, ...words], /^serving .*\n/m);
  return { ...told, socket };
}

describe("virtio serve --metrics", { concurrency: 2 }, () => {
  test("counts clients, requests by queue and type, bytes and memory, exactly", async (t) => {
    const { socket, scrape, until, child, ended } = await serveTold(t, ["--queues", "2"]);
    const before = await scrape();
    assert.equal(before.get("virtio_backend_capacity_bytes"), 64 * MIB);
    assert.deepEqual(
      Object.entries(before.all("virtio_backend_")).filter(([, value]) => value !== 0),
      [["virtio_backend_capacity_bytes", 64 * MIB]],
    );
    for (const name of SERVE_BY_QUEUE) {
      assert.deepEqual(Object.keys(before.all(`virtio_backend_${name}{`)), [
        `virtio_backend_${name}{queue="0"}`,
        `virtio_backend_${name}{queue="1"}`,
      ]);
    }

    const disk = await openBlock(`vhost-user:${socket}`, { queues: 1 });
    for (let i = 0; i < 3; i++) await disk.write(new Uint8Array(8192), { position: i * 8192 });
    for (let i = 0; i < 5; i++) await disk.read(new Uint8Array(4096), { position: i * 4096 });
    await disk.flush();
    await disk.flush();
    await disk.discard({ position: 0, length: 4096 });
    await disk.writeZeroes([{ position: 4096, length: 512 }]);
    await disk.getId();
    const during = await scrape();
    assert.deepEqual(during.all('virtio_backend_requests_total{queue="0"'), {
      'virtio_backend_requests_total{queue="0",type="read"}': 5,
      'virtio_backend_requests_total{queue="0",type="write"}': 3,
      'virtio_backend_requests_total{queue="0",type="flush"}': 2,
      'virtio_backend_requests_total{queue="0",type="get_id"}': 1,
      'virtio_backend_requests_total{queue="0",type="discard"}': 1,
      'virtio_backend_requests_total{queue="0",type="write_zeroes"}': 1,
      'virtio_backend_requests_total{queue="0",type="secure_erase"}': 0,
      'virtio_backend_requests_total{queue="0",type="other"}': 0,
    });
    assert.equal(during.sum("virtio_backend_requests_total", 'queue="1"'), 0);
    assert.equal(during.get('virtio_backend_answers_total{queue="0",status="ok"}'), 13);
    assert.equal(during.sum("virtio_backend_answers_total"), 13);
    assert.equal(during.sum("virtio_backend_requests_in_flight"), 0);
    assert.equal(during.get('virtio_backend_read_bytes_total{queue="0"}'), 5 * 4096);
    assert.equal(during.get('virtio_backend_written_bytes_total{queue="0"}'), 3 * 8192);
    assert.equal(during.get("virtio_backend_connections_total"), 1);
    assert.equal(during.get("virtio_backend_clients"), 1);
    assert.ok(during.get("virtio_backend_memory_regions") >= 1);
    assert.ok(during.get("virtio_backend_memory_bytes") >= 4 * MIB);
    assert.equal(during.sum("virtio_backend_errors_total"), 0);
    await disk.close();

    const other = await openBlock(`vhost-user:${socket}`);
    await other.read(new Uint8Array(512));
    await other.close();
    const later = await until((page) => page.get("virtio_backend_clients") === 0);
    assert.equal(later.get("virtio_backend_connections_total"), 2);
    assert.equal(later.get("virtio_backend_memory_bytes"), 0);
    assert.equal(later.sum("virtio_backend_requests_total", 'type="read"'), 6);
    assert.equal(later.sum("virtio_backend_read_bytes_total"), 5 * 4096 + 512);

    child.kill("SIGTERM");
    const { code, stderr } = await ended;
    assert.equal(code, 0);
    assert.match(stderr, /\nSIGTERM: flushed and stopped; 2 clients, 14 requests, 0 errors\n$/);
  });

  test("counts answers by status, errors by place, and notifications both ways", async (t) => {
    const { socket, scrape, until } = await serveTold(t, ["--split"]);
    const front = new FrontEnd(socket);
    t.after(() => front.close());
    const ring = await front.start();
    assert.equal((await ring.read(0n, 512)).status, 0);
    assert.equal((await ring.read(1n << 40n, 512)).status, 1); // beyond the end
    assert.equal((await ring.run(77, 0n)).status, 2);
    assert.equal((await ring.run(5, 0n)).status, 2);
    const page = await scrape();
    assert.deepEqual(page.all("virtio_backend_answers_total"), {
      'virtio_backend_answers_total{queue="0",status="ok"}': 1,
      'virtio_backend_answers_total{queue="0",status="ioerr"}': 1,
      'virtio_backend_answers_total{queue="0",status="unsupp"}': 2,
      'virtio_backend_answers_total{queue="0",status="none"}': 0,
    });
    assert.equal(page.get('virtio_backend_requests_total{queue="0",type="other"}'), 2);
    assert.equal(page.get('virtio_backend_requests_total{queue="0",type="read"}'), 2);
    assert.equal(page.get('virtio_backend_notifications_total{queue="0"}'), 4);
    // A notification may be heard when its request is long done, for it was polled for.
    await until((now) => now.get('virtio_backend_kicks_total{queue="0"}') > 0);
    assert.equal(page.sum("virtio_backend_errors_total"), 0);

    // A ring that makes no sense, and a message that makes none.
    ring.driver.add([{ address: 1n << 60n, length: 512, writable: true }], 0);
    ring.driver.publish();
    ring.kick.signal();
    await until((now) => now.get('virtio_backend_errors_total{place="ring"}') === 1);
    front.send(9999);
    await front.hungUp();
    await until((now) => now.get('virtio_backend_errors_total{place="connection"}') === 1);
  });

  test("tells of its own process", async (t) => {
    const { scrape, child } = await serveTold(t);
    const page = await scrape();
    assert.ok(page.get("process_cpu_seconds_total") > 0);
    assert.ok(page.get("process_resident_memory_bytes") > MIB);
    assert.equal(page.types.get("process_cpu_seconds_total"), "counter");
    assert.ok(child.pid !== undefined);
  });

  test("answers GET and HEAD of /metrics, and refuses the rest", async (t) => {
    const { url } = await serveTold(t);
    const root = url.replace(/metrics$/, "");
    const status = async (address: string, method = "GET"): Promise<number> => {
      const response = await fetch(address, { method });
      await response.text();
      return response.status;
    };
    assert.equal(await status(`${url}?name=value`), 200);
    const head = await fetch(url, { method: "HEAD" });
    assert.deepEqual([head.status, await head.text()], [200, ""]);
    assert.ok(Number(head.headers.get("content-length")) > 1000);
    for (const path of ["", "metrics/", "metricsx", "favicon.ico", "%6Detrics/.."]) {
      assert.equal(await status(`${root}${path}`), 404, path);
    }
    for (const method of ["POST", "PUT", "DELETE", "OPTIONS"]) {
      const response = await fetch(url, { method });
      assert.deepEqual([response.status, response.headers.get("allow")], [405, "GET, HEAD"], method);
      await response.text();
    }
    assert.equal(await status(url), 200);
  });

  test("stops at a signal while somebody is connected to the page and says nothing", async (t) => {
    const { url, child, ended, scrape } = await serveTold(t);
    const silent = connect(Number(new URL(url).port), "127.0.0.1");
    silent.on("error", () => undefined);
    await once(silent, "connect");
    silent.write("GET /metrics HTTP/1.1\r\n");
    await scrape(); // its connection is kept alive
    child.kill("SIGTERM");
    assert.deepEqual([(await ended).code, (await ended).signal], [0, null]);
    silent.destroy();
  });

  test("listens where it is told", async (t) => {
    for (const [where, expected] of [
      ["localhost:0", /^http:\/\/localhost:\d+\/metrics$/],
      ["127.0.0.2:0", /^http:\/\/127\.0\.0\.2:\d+\/metrics$/],
    ] as const) {
      const socket = join(folder, `where${sockets++}.sock`);
      const told = await startTold(t, ["serve", "ram:1M", "--socket", socket], /^serving .*\n/m, where);
      assert.match(told.url, expected);
      await told.scrape();
      told.child.kill("SIGTERM");
      await told.ended;
    }
  });
});

describe("virtio bench --metrics", { concurrency: 1 }, () => {
  test("is scraped while it runs, and again, with counts that only rise", async (t) => {
    const words = ["bench", "ram:64M", "--numjobs", "2", "--iodepth", "8", "--bs", "8K", "--runtime", "60"];
    const { scrape, until, child, ended } = await startTold(t, words, /in flight/);
    const first = await until(
      (page) => page.values.has("virtio_bench_requests_total") && page.get("virtio_bench_requests_total") > 0,
    );
    assert.equal(first.types.get("virtio_bench_request_duration_seconds"), "histogram");
    const requests = first.get("virtio_bench_requests_total");
    assert.equal(first.get("virtio_bench_bytes_total"), requests * 8192);
    assert.equal(first.get("virtio_bench_request_duration_seconds_count"), requests);
    assert.ok(first.get("virtio_bench_request_duration_seconds_sum") > 0);
    const les = Object.keys(first.all("virtio_bench_request_duration_seconds_bucket"));
    assert.equal(les.length, 21);
    assert.ok(les[0]?.includes('le="0.000001"') && les[19]?.includes('le="2"'));
    for (const queue of [0, 1]) {
      const of = (name: string): number => first.get(`virtio_queue_${name}{queue="${queue}"}`);
      assert.ok(of("submitted_requests_total") >= of("completed_requests_total"));
      assert.ok(of("completed_requests_total") > 0);
      assert.ok(of("requests_in_flight") <= 8);
      assert.ok(of("kicks_total") > 0);
      assert.equal(of("abandoned_requests") + of("replayed_requests_total"), 0);
    }
    assert.ok(first.sum("virtio_queue_completed_requests_total") >= requests);
    assert.equal(first.get("virtio_device_reconnects_total"), 0);
    assert.ok(first.get("virtio_device_lent_bytes") >= 2 * 8 * 8192);
    const second = await scrape();
    for (const [series, value] of first.values) {
      const type = first.types.get(series.replace(/\{.*|_(bucket|sum|count)(\{.*)?$/, ""));
      if (!series.startsWith("virtio_") || type === "gauge") continue;
      assert.ok(second.get(series) >= value, series);
    }
    child.kill("SIGKILL");
    await ended;
  });

  test("ends when the measurement ends, though a reader is connected; the result is on stdout alone", async (t) => {
    const { url, ended } = await startTold(t, ["bench", "ram:16M", "--runtime", "0.1", "--json"], /metrics at .*\n/);
    const reader = connect(Number(new URL(url).port), "127.0.0.1");
    reader.on("error", () => undefined);
    const { code, stdout, stderr } = await ended;
    reader.destroy();
    assert.deepEqual([code, stderr.trim()], [0, `metrics at ${url}`]);
    assert.ok((JSON.parse(stdout.toString()) as { requests: number }).requests > 0);
  });
});

describe("--metrics that cannot be", { concurrency: 2 }, () => {
  const socket = join(folder, "never.sock");
  for (const command of [
    ["serve", "ram:1M", "--socket", socket],
    ["bench", "ram:1M"],
  ]) {
    for (const word of [
      "here",
      "65536",
      "-1",
      ":9100",
      "::1:9100",
      "[::1]",
      "127.0.0.1",
      "http://127.0.0.1:9100",
      "",
    ]) {
      test(`${command[0]} --metrics ${JSON.stringify(word)}: usage error`, async () => {
        const { code, stdout, stderr } = await virtio([...command, `--metrics=${word}`]);
        assert.deepEqual([code, stdout.length], [2, 0]);
        assert.match(stderr, /^virtio: ERR_VIRTIO_ARGUMENT: [^\n]*9100[^\n]*; try: virtio help (serve|bench)\n$/);
      });
    }

    test(`${command[0]} at a port that is taken says so, and leaves nothing behind`, async (t) => {
      const server = createServer();
      server.listen(0, "127.0.0.1");
      await once(server, "listening");
      t.after(() => server.close());
      const { port } = server.address() as AddressInfo;
      const { code, stdout, stderr } = await virtio([...command, "--metrics", String(port)]);
      assert.deepEqual([code, stdout.length], [1, 0]);
      assert.equal(
        stderr,
        `virtio: ERR_VIRTIO_SYSCALL: offering metrics at 127.0.0.1:${port}: EADDRINUSE from listen; ` +
          "another program listens there; take another port, or 0 for any free one\n",
      );
      assert.equal(readdirSync(folder).includes("never.sock"), false);
    });

    test(`${command[0]} at an address of another machine says so`, async () => {
      const { code, stderr } = await virtio([...command, "--metrics", "203.0.113.1:9100"]);
      assert.equal(code, 1);
      assert.match(
        stderr,
        /^virtio: ERR_VIRTIO_SYSCALL: [^\n]*203\.0\.113\.1:9100: EADDRNOTAVAIL[^\n]*127\.0\.0\.1[^\n]*\n$/,
      );
    });
  }
});

test("without --metrics nothing of it is loaded", async () => {
  const coverage = mkdtempSync(join(folder, "loaded-"));
  const child = start(["bench", "ram:1M", "--runtime", "0.1"], { NODE_V8_COVERAGE: coverage });
  child.stdin.end();
  assert.equal((await finished(child)).code, 0);
  const loaded = readdirSync(coverage).flatMap((name) => {
    const { result } = JSON.parse(readFileSync(join(coverage, name), "utf8")) as { result: { url: string }[] };
    return result.map(({ url }) => url);
  });
  assert.ok(loaded.some((url) => url.endsWith("/cli/metrics-option.js")));
  assert.deepEqual(
    loaded.filter((url) => /prom-client|\/cli\/metrics\.js|\/cli\/metrics-bench\.js|^node:http$/.test(url)),
    [],
  );
});
