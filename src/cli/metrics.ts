/** The page of --metrics: an HTTP server on which Prometheus finds what a command has counted. */

import { once } from "node:events";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import { collectDefaultMetrics, Counter, Gauge, Registry } from "prom-client";
import { fileError } from "../sys/errno.js";
import type { HostPort } from "./options.js";
import { narrate } from "./terminal.js";

const PATH = "/metrics";
/** Connections at a time, and how long a request may be under way: nobody can make this one his web server. */
const MAX_CONNECTIONS = 16;
const REQUEST_MS = 5000;
const MAX_HEADER_BYTES = 8192;

/** What to try when a page cannot be offered, by errno name. */
const ADVICE: Readonly<Record<string, string>> = {
  EADDRINUSE: "another program listens there; take another port, or 0 for any free one",
  EACCES: "ports below 1024 are for root; take another, or 0 for any free one",
};
const NO_SUCH_HOST = "name an address of this machine, such as 127.0.0.1 or 0.0.0.0";

/** One value of a metric with its labels. */
export interface Sample {
  readonly labels?: Readonly<Record<string, string | number>>;
  readonly value: number;
}

/** The page, from its opening to its end. `await using` closes it. */
export class MetricsPage {
  /** What is on it; the process is there from the start. */
  readonly registry: Registry;
  /** Its address. */
  readonly url: string;
  private readonly server: Server;

  private constructor(server: Server, registry: Registry, url: string) {
    this.server = server;
    this.registry = registry;
    this.url = url;
  }

  /**
   * Offer a page that tells of this process, and say where it is.
   *
   * @throws VirtioError ERR_VIRTIO_SYSCALL, ERR_VIRTIO_PERMISSION when nobody can listen there.
   */
  static async open({ host, port }: HostPort): Promise<MetricsPage> {
    const registry = new Registry();
    const limits = { maxHeaderSize: MAX_HEADER_BYTES, headersTimeout: REQUEST_MS, requestTimeout: REQUEST_MS };
    const server = createServer(limits, (request, response) => void answer(registry, request, response));
    server.maxConnections = MAX_CONNECTIONS;
    const where = `${host.includes(":") ? `[${host}]` : host}:`;
    server.listen(port, host);
    try {
      await once(server, "listening");
    } catch (error) {
      const name = error instanceof Error && "code" in error ? String(error.code) : "";
      throw fileError(error, `offering metrics at ${where}${port}`, ADVICE[name] ?? NO_SUCH_HOST);
    }
    // Without descriptors, for example, no more connections are accepted; the command goes on.
    server.on("error", (error) => narrate(`metrics: ${error.message}`));
    collectDefaultMetrics({ register: registry });
    const address = server.address();
    const taken = typeof address === "object" && address !== null ? address.port : port;
    const page = new MetricsPage(server, registry, `http://${where}${taken}${PATH}`);
    narrate(`metrics at ${page.url}`);
    return page;
  }

  /** Have a counter on the page; its values are asked for when somebody looks. */
  counter(name: string, help: string, samples: () => Iterable<Sample>, labelNames: readonly string[] = []): void {
    const metric = new Counter({
      ...{ name, help, labelNames, registers: [] },
      collect() {
        this.reset();
        for (const { labels = {}, value } of samples()) this.inc(labels, value);
      },
    });
    this.registry.registerMetric(metric);
  }

  /** Have a value on the page that may fall as well as rise. */
  gauge(name: string, help: string, samples: () => Iterable<Sample>, labelNames: readonly string[] = []): void {
    const metric = new Gauge({
      ...{ name, help, labelNames, registers: [] },
      collect() {
        this.reset();
        for (const { labels = {}, value } of samples()) this.set(labels, value);
      },
    });
    this.registry.registerMetric(metric);
  }

  /** Hang up on everybody. What is being sent is cut off: a command that has ended does not wait for its readers. */
  async [Symbol.asyncDispose](): Promise<void> {
    const closed = once(this.server, "close");
    this.server.close();
    this.server.closeAllConnections();
    await closed;
  }
}

async function answer(registry: Registry, request: IncomingMessage, response: ServerResponse): Promise<void> {
  response.on("error", () => undefined); // whoever asked has gone
  const { method = "", url = "" } = request;
  if (url.replace(/\?.*/s, "") !== PATH) return refuse(response, 404, `there is nothing here but ${PATH}`);
  if (method !== "GET" && method !== "HEAD") {
    response.setHeader("allow", "GET, HEAD");
    return refuse(response, 405, `${PATH} can be read with GET, and nothing else`);
  }
  try {
    const text = await registry.metrics();
    response.setHeader("content-type", registry.contentType);
    response.setHeader("content-length", Buffer.byteLength(text));
    response.end(method === "HEAD" ? undefined : text);
  } catch (error) {
    refuse(response, 500, error instanceof Error ? error.message : String(error));
  }
}

function refuse(response: ServerResponse, status: number, why: string): void {
  response.writeHead(status, { "content-type": "text/plain; charset=utf-8" });
  response.end(`${why}\n`);
}
