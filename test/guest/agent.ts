/**
 * The guest's own program: binds the functions, makes the vDPA device, runs the test files one by one, and says what
 * happened to the host. Asks the host what tests want to know of it.
 */

import { execFileSync, spawn } from "node:child_process";
import {
  createReadStream,
  existsSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { createServer, type Socket } from "node:net";
import { basename, join } from "node:path";
import { setTimeout as wait } from "node:timers/promises";
import {
  type Answer,
  type Asks,
  type FromGuest,
  GUEST_DISK_BYTES,
  GUEST_FUNCTION_NAMES,
  GUEST_FUNCTIONS,
  type GuestFunctionName,
  type Job,
  Lines,
  PORT_NAME,
  portSlot,
} from "./protocol.js";
import { runTestFile } from "./support/runner.js";

/** How long something that the kernel does may take. */
const PATIENCE_MS = 60_000;
const VDPA_NAME = "vduse0";
const VDPA_IMAGE = "/tmp/vdpa.img";
const VDPA_NODE = "/dev/vhost-vdpa-0";
const SOCKET = "/run/lab.sock";

/** The line to the host. */
class Host {
  readonly #fd = openSync(findPort(), "r+");
  readonly #asking = new Map<number, Socket>();
  #nextId = 1;

  /** Say something. Blocks until QEMU has taken it. */
  say(message: FromGuest): void {
    let bytes = Buffer.from(`${JSON.stringify(message)}\n`);
    while (bytes.length > 0) bytes = bytes.subarray(writeSync(this.#fd, bytes));
  }

  /** Serve the tests' questions on a socket, and hand back the host's answers. */
  serve(): void {
    // Only now: before the first line has been written, the kernel may not know that the host listens, and says EOF.
    const answers = new Lines();
    createReadStream("", { fd: this.#fd, encoding: "utf8" }).on("data", (text) => {
      for (const line of answers.push(String(text))) {
        const answer = JSON.parse(line) as Answer;
        this.#asking.get(answer.id)?.end(`${line}\n`);
        this.#asking.delete(answer.id);
      }
    });
    createServer((socket) => {
      const lines = new Lines();
      socket.setEncoding("utf8").on("error", () => undefined); // the test has ended before its answer
      socket.on("data", (text: string) => {
        for (const line of lines.push(text)) {
          const id = this.#nextId++;
          this.#asking.set(id, socket);
          this.say({ type: "ask", id, question: JSON.parse(line) as Asks["question"] });
        }
      });
    }).listen(SOCKET);
  }
}

/** The character device of the virtio-serial port to the host. */
function findPort(): string {
  const ports = "/sys/class/virtio-ports";
  const name = readdirSync(ports).find((port) => readFileSync(join(ports, port, "name"), "utf8").trim() === PORT_NAME);
  if (name === undefined) throw new Error(`no port in ${ports} has the name ${PORT_NAME}`);
  return join("/dev", name);
}

/** Wait until `done`, which the kernel brings about. */
async function until(what: string, done: () => boolean): Promise<void> {
  const end = performance.now() + PATIENCE_MS;
  while (!done()) {
    if (performance.now() > end) throw new Error(`${what}: not in ${PATIENCE_MS / 1000} s`);
    await wait(10);
  }
}

/** The PCI address of a function, bound to its driver. */
async function prepareFunction(name: GuestFunctionName): Promise<string> {
  const port = join("/sys/bus/pci/devices", portSlot(name).address);
  const address = readdirSync(port).find((entry) => /^[\da-f]{4}:[\da-f]{2}:[\da-f]{2}\.0$/.test(entry));
  if (address === undefined) throw new Error(`${name}: nothing behind the root port ${portSlot(name).address}`);
  const device = join("/sys/bus/pci/devices", address);
  const { driver } = GUEST_FUNCTIONS[name];
  const bound = () => existsSync(join(device, "driver")) && basename(readlinkSync(join(device, "driver"))) === driver;
  if (!bound()) {
    if (existsSync(join(device, "driver"))) writeFileSync(join(device, "driver", "unbind"), address);
    writeFileSync(join(device, "driver_override"), driver);
    writeFileSync("/sys/bus/pci/drivers_probe", address);
  }
  await until(`${name}: ${address} bound to ${driver}`, bound);
  if (driver === "vfio-pci") {
    const group = basename(readlinkSync(join(device, "iommu_group")));
    await until(`${name}: /dev/vfio/${group}`, () => existsSync(`/dev/vfio/${group}`));
  }
  return address;
}

/** A vDPA block device in user space (VDUSE), which the kernel offers as a vhost-vdpa node. */
async function prepareVdpa(): Promise<void> {
  writeFileSync(VDPA_IMAGE, "");
  truncateSync(VDPA_IMAGE, GUEST_DISK_BYTES);
  const backend = `driver=file,node-name=disk,filename=${VDPA_IMAGE},discard=unmap`;
  const node = `type=vduse-blk,id=export,node-name=disk,name=${VDPA_NAME},writable=on,num-queues=2,queue-size=128`;
  const daemon = spawn("qemu-storage-daemon", ["--blockdev", backend, "--export", node], { stdio: "inherit" });
  let ended: string | undefined;
  daemon.once("error", (error) => (ended = error.message));
  daemon.once("exit", (code, signal) => (ended = `it ended with ${signal ?? `status ${code}`}`));
  await until("qemu-storage-daemon offers its device", () => {
    if (ended !== undefined) throw new Error(`qemu-storage-daemon: ${ended}`);
    return existsSync(`/dev/vduse/${VDPA_NAME}`);
  });
  execFileSync("vdpa", ["dev", "add", "name", VDPA_NAME, "mgmtdev", "vduse"], { stdio: "inherit" });
  await until(VDPA_NODE, () => existsSync(VDPA_NODE));
}

const job = JSON.parse(readFileSync(process.argv[2] ?? "", "utf8")) as Job;
const host = new Host();
try {
  const environment: Record<string, string> = {
    VIRTIO_GUEST_SOCKET: SOCKET,
    VIRTIO_GUEST_VDPA: VDPA_NODE,
    VIRTIO_GUEST_VDPA_IMAGE: VDPA_IMAGE,
  };
  for (const name of GUEST_FUNCTION_NAMES) environment[`VIRTIO_GUEST_PCI_${name}`] = await prepareFunction(name);
  await prepareVdpa();
  const lines = Object.entries(environment).map(([name, value]) => `${name}=${value}\n`);
  writeFileSync("/run/guest.env", lines.join(""));
  host.say({ type: "ready" });
  host.serve();
  Object.assign(process.env, environment);
  for (const file of job.files) await runTestFile(file, job.silenceMs, (news) => host.say(news));
  host.say({ type: "done" });
} catch (error) {
  host.say({ type: "broken", error: error instanceof Error ? (error.stack ?? error.message) : String(error) });
  // A plain exit would wait for the thread that reads the port.
  process.kill(process.pid, "SIGKILL");
}
