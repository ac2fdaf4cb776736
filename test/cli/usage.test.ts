/** Tests of the command as such: help, exit codes, errors as one line, broken pipes, what it loads. */

import assert from "node:assert/strict";
import { mkdtempSync, readdirSync, readFileSync, renameSync, rmSync } from "node:fs";
import { createServer, type Server, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, describe, test } from "node:test";
import { requirePeer } from "../support/peers.js";
import { finished, onTerminal, start, virtio } from "./command.js";

const COMMANDS = ["demo", "info", "read", "write", "bench", "serve", "layout", "pci", "doctor"];

const folder = mkdtempSync(join(tmpdir(), "virtio-usage-"));
after(() => rmSync(folder, { recursive: true }));

describe("virtio", { concurrency: 2 }, () => {
  test("without words prints help on stdout", async () => {
    const { code, stdout, stderr } = await virtio([]);
    assert.deepEqual([code, stderr], [0, ""]);
    const listed = [...stdout.toString().matchAll(/^ {2}(\w+) .*/gm)].map((match) => match[1]);
    assert.deepEqual(
      COMMANDS.filter((name) => !listed.includes(name)),
      [],
    );
    assert.match(stdout.toString(), /Exit codes: .*\n[\s\S]*Examples:\n {2}virtio /);
  });

  test("--version prints that of the package", async () => {
    const { version } = JSON.parse(readFileSync(new URL("../../../package.json", import.meta.url), "utf8")) as {
      version: string;
    };
    const { code, stdout } = await virtio(["--version"]);
    assert.deepEqual([code, stdout.toString()], [0, `${version}\n`]);
  });

  for (const name of COMMANDS) {
    test(`${name} --help has examples, and so has help ${name}`, async () => {
      const { code, stdout, stderr } = await virtio([name, "--help"]);
      assert.deepEqual([code, stderr], [0, ""]);
      assert.match(stdout.toString(), new RegExp(`Usage: virtio ${name} [\\s\\S]*Examples:\n {2}virtio ${name}`));
      assert.deepEqual((await virtio(["help", name])).stdout, stdout);
    });
  }

  const ARGUMENT = "virtio: ERR_VIRTIO_ARGUMENT: ";
  const refused: readonly (readonly [words: string, stderr: string])[] = [
    ["nonsense", `${ARGUMENT}unknown command 'nonsense'; try: virtio --help`],
    ["layuot", `${ARGUMENT}unknown command 'layuot' (Did you mean layout?); try: virtio --help`],
    ["--nonsense", `${ARGUMENT}unknown option '--nonsense'; try: virtio --help`],
    ["layout", `${ARGUMENT}required option '-n, --queue-size <n>' not specified; try: virtio help layout`],
    ["layout -n 8 --pakced", `${ARGUMENT}unknown option '--pakced' (Did you mean --packed?); try: virtio help layout`],
    [
      "layout -n 8 more",
      `${ARGUMENT}too many arguments for 'layout'. Expected 0 arguments but got 1; try: virtio help layout`,
    ],
    [
      "layout -n eight",
      `${ARGUMENT}option '-n, --queue-size <n>' argument 'eight' is invalid. It is no whole number; try: virtio help layout`,
    ],
    [
      "layout -n 8 --request-size 4KB",
      `${ARGUMENT}option '--request-size <size>' argument '4KB' is invalid. Sizes look like 512, 4K, 1M or 2GiB; try: virtio help layout`,
    ],
    ["layout -n 7", `${ARGUMENT}"queueSize" expected a power of two on a split virtqueue, got 7`],
    ["layout -n 99999 --packed", `${ARGUMENT}"queueSize" expected a whole number from 1 to 32768, got 99999`],
    ["layout -n 8 --request-align 3", `${ARGUMENT}"request.align" expected a power of two, got 3`],
    ["layout -n 8 --queues 0", `${ARGUMENT}"numQueues" expected a whole number from 1 to 65536, got 0`],
    ["info", `${ARGUMENT}missing required argument 'address'; try: virtio help info`],
    [
      "read ram:1M --length -1",
      `${ARGUMENT}option '--length <size>' argument '-1' is invalid. Sizes look like 512, 4K, 1M or 2GiB; try: virtio help read`,
    ],
    [
      "bench ram:1M --rw trim",
      `${ARGUMENT}option '--rw <pattern>' argument 'trim' is invalid. Allowed choices are randread, randwrite, randrw, read, write; try: virtio help bench`,
    ],
    [
      "bench ram:1M --iodepth 0",
      `${ARGUMENT}option '--iodepth <n>' argument '0' is invalid. It must be at least 1; try: virtio help bench`,
    ],
    [
      "bench ram:1M --numjobs 0",
      `${ARGUMENT}option '--numjobs <n>' argument '0' is invalid. It must be at least 1; try: virtio help bench`,
    ],
    [
      "bench ram:1M --svg -",
      `${ARGUMENT}--svg - is no file, and stdout has the result; name a file; try: virtio help bench`,
    ],
    [
      "bench ram:1M --runtime 0",
      `${ARGUMENT}option '--runtime <seconds>' argument '0' is invalid. It is no number of seconds above 0 and up to a day; try: virtio help bench`,
    ],
    [
      "bench file:disk.img --rw randwrite",
      `${ARGUMENT}this writes over what is on file:disk.img; if that may be lost, add --yes-overwrite; try: virtio help bench`,
    ],
    [
      "bench file:disk.img --rw randrw",
      `${ARGUMENT}this writes over what is on file:disk.img; if that may be lost, add --yes-overwrite; try: virtio help bench`,
    ],
    [
      "bench ram:1M --verify",
      `${ARGUMENT}--verify checks what was written; add --rw write, randwrite or randrw; try: virtio help bench`,
    ],
    [
      "demo vhost-user:/run/disk.sock",
      `${ARGUMENT}this writes over what is on vhost-user:/run/disk.sock; if that may be lost, add --yes-overwrite; try: virtio help demo`,
    ],
  ];
  for (const [words, expected] of refused) {
    test(`${words}: usage error`, async () => {
      const { code, stdout, stderr } = await virtio(words.split(" "));
      assert.deepEqual([code, stdout.toString(), stderr], [2, "", `${expected}\n`]);
    });
  }

  for (const address of ["nonsense", "", "disk:/x", "/run/disk.sock", "vhost-user:", "ram:", "file:"]) {
    test(`info ${JSON.stringify(address)}: no address`, async () => {
      const { code, stdout, stderr } = await virtio(["info", address]);
      assert.deepEqual([code, stdout.toString()], [2, ""]);
      assert.match(stderr, /^virtio: ERR_VIRTIO_ADDRESS: .*vhost-user:PATH.*\n$/);
    });
  }

  for (const size of ["lots", "1.5M", "4KB", "-512"]) {
    test(`info ram:${size}: no size of a disk`, async () => {
      const { code, stdout, stderr } = await virtio(["info", `ram:${size}`]);
      assert.deepEqual([code, stdout.toString()], [2, ""]);
      assert.match(stderr, /^virtio: ERR_VIRTIO_ARGUMENT: [^\n]*\n$/);
    });
  }

  test("a socket that is not there: exit 4, with what to try", async () => {
    const path = join(folder, "missing.sock");
    const { code, stdout, stderr } = await virtio(["info", `vhost-user:${path}`]);
    assert.deepEqual([code, stdout.toString()], [4, ""]);
    assert.match(stderr, /^virtio: ERR_VIRTIO_CONNECT: [^\n]*missing\.sock[^\n]*ENOENT[^\n]*\n$/);
  });

  test("a socket that nobody listens on: exit 4", async () => {
    const path = join(folder, "stale.sock");
    const server = await listen(`${path}.new`, () => undefined);
    renameSync(`${path}.new`, path);
    await close(server);
    const { code, stderr } = await virtio(["read", `vhost-user:${path}`]);
    assert.equal(code, 4);
    assert.match(stderr, /^virtio: ERR_VIRTIO_CONNECT: [^\n]*stale\.sock[^\n]*ECONNREFUSED[^\n]*\n$/);
  });

  test("a back-end that hangs up: exit 4", async () => {
    const server = await listen(join(folder, "rude.sock"), (socket) => socket.destroy());
    const { code, stderr } = await virtio(["info", `vhost-user:${join(folder, "rude.sock")}`]);
    await close(server);
    assert.equal(code, 4);
    assert.match(stderr, /^virtio: ERR_VIRTIO_DISCONNECTED: [^\n]*\n$/);
  });

  test("a back-end that is silent: exit 4 after --timeout", async () => {
    const server = await listen(join(folder, "silent.sock"), () => undefined);
    const { code, stderr } = await virtio(["info", `vhost-user:${join(folder, "silent.sock")}`, "--timeout", "200"]);
    await close(server);
    assert.equal(code, 4);
    assert.match(stderr, /^virtio: ERR_VIRTIO_TIMEOUT: [^\n]*200 ms[^\n]*\n$/);
  });

  test("--debug adds the stack", async () => {
    const { code, stderr } = await virtio(["info", `vhost-user:${join(folder, "missing.sock")}`, "--debug"]);
    assert.equal(code, 4);
    assert.match(stderr, /^virtio: ERR_VIRTIO_CONNECT: .*\nVirtioError: .*\n {4}at /);
  });

  test("a file that cannot be written: one line, exit 1", async () => {
    const { code, stdout, stderr } = await virtio(["layout", "-n", "8", "--svg", join(folder, "no", "where.svg")]);
    assert.deepEqual([code, stdout.toString()], [1, ""]);
    assert.match(stderr, /^virtio: ENOENT: no such file or directory, open [^\n]*\n$/);
  });

  test("a reader that has gone away is no error", async () => {
    const child = start(["layout", "--queue-size", "8", "--json"]);
    child.stdout.destroy();
    const { code, stderr } = await finished(child);
    assert.deepEqual([code, stderr], [0, ""]);
  });

  test("pipes get no colours", async () => {
    const child = start(["layout", "-n", "8"], { NO_COLOR: undefined });
    child.stdin.end();
    assert.ok(!(await finished(child)).stdout.includes("\x1b"));
  });

  const skip = requirePeer("script");
  test("terminals get colours, unless NO_COLOR is set", { skip }, async () => {
    const layout = ["layout", "-n", "8"];
    const terminal = { TERM: "xterm", CI: undefined }; // where CI is set Node takes terminals for colourless
    assert.ok((await onTerminal(layout, { ...terminal, NO_COLOR: undefined })).stdout.includes("\x1b["));
    assert.ok(!(await onTerminal(layout, { ...terminal, NO_COLOR: "1" })).stdout.includes("\x1b["));
  });

  test("the bytes of a disk neither come from nor go to a terminal", { skip }, async () => {
    const read = await onTerminal(["read", "ram:1M"]);
    assert.equal(read.code, 2);
    assert.match(read.stdout.toString(), /^virtio: ERR_VIRTIO_ARGUMENT: the bytes of a disk would upset a terminal/);
    const written = await onTerminal(["write", "ram:1M"]);
    assert.equal(written.code, 2);
    assert.match(written.stdout.toString(), /^virtio: ERR_VIRTIO_ARGUMENT: stdin is a terminal; add < FILE/);
  });

  test("layout loads neither the addon nor any part that opens devices", async () => {
    const coverage = mkdtempSync(join(folder, "loaded-"));
    const child = start(["layout", "-n", "8"], { NODE_V8_COVERAGE: coverage });
    child.stdin.end();
    assert.equal((await finished(child)).code, 0);
    const loaded = readdirSync(coverage).flatMap((name) => {
      const { result } = JSON.parse(readFileSync(join(coverage, name), "utf8")) as { result: { url: string }[] };
      return result.map(({ url }) => url).filter((url) => url.includes("/dist/src/"));
    });
    assert.ok(loaded.some((url) => url.endsWith("/virtqueue/layout.js")));
    assert.deepEqual(
      loaded.filter((url) => /\/dist\/src\/(sys|memory|transports|devices|backend|index\.js|address\.js)/.test(url)),
      [],
    );
  });
});

function listen(path: string, onConnection: (socket: Socket) => void): Promise<Server & { sockets: Set<Socket> }> {
  const sockets = new Set<Socket>();
  const server = Object.assign(
    createServer((socket) => {
      sockets.add(socket);
      socket.on("error", () => undefined);
      onConnection(socket);
    }),
    { sockets },
  );
  return new Promise((resolve, reject) => {
    server.once("error", reject);
    server.listen(path, () => resolve(server));
  });
}

function close(server: Server & { sockets: Set<Socket> }): Promise<void> {
  for (const socket of server.sockets) socket.destroy();
  return new Promise((resolve) => server.close(() => resolve()));
}
