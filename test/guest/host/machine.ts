/** One QEMU with the guest in it: its disks, its console, and its two lines to the host. */

import { type ChildProcess, spawn } from "node:child_process";
import { createHash } from "node:crypto";
import { createReadStream, mkdirSync, truncateSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import type { Duplex } from "node:stream";
import { fileURLToPath } from "node:url";
import {
  type Answer,
  type FromGuest,
  GUEST_DISK_BYTES,
  GUEST_FUNCTION_NAMES,
  GUEST_FUNCTIONS,
  GUEST_MEMORY_MIB,
  type HostQuestion,
  type Job,
  JOB_FOLDER,
  Lines,
  PORT_NAME,
  portSlot,
} from "../protocol.js";
import type { GuestFiles } from "./build.js";

/** How much of the console is kept for an error. */
const CONSOLE_CHARACTERS = 16_000;

/** The program that the guest runs. */
const AGENT = fileURLToPath(new URL("../agent.js", import.meta.url));

/** File descriptors of QEMU for its monitor and for the port to the agent. */
const MONITOR_FD = 3;
const PORT_FD = 4;

/** What a machine is started with. */
export interface MachineOptions {
  readonly files: GuestFiles;
  /** An empty folder for the images and the job; the caller removes it. */
  readonly folder: string;
  /** The working tree whose compiled tests are run. */
  readonly root: string;
  readonly job: Job;
  /** The environment of the tests, beside what the guest adds. */
  readonly environment: Readonly<Record<string, string>>;
  /** Folders of the host that the guest may write to, at the same path. */
  readonly writable: readonly string[];
  /** Hears what the console and QEMU say, as it comes. */
  readonly onConsole?: ((text: string) => void) | undefined;
  /** A person sits at the console: it is the terminal, with a shell on it. */
  readonly shell: boolean;
}

/** A running QEMU. The kernel kills it when this process ends. */
export class Machine {
  readonly #child: ChildProcess;
  readonly #folder: string;
  readonly #ended: Promise<string>;
  readonly #monitor: Monitor;
  readonly #port: Duplex;
  #console = "";
  #consoleNews = "";

  /** Start QEMU. */
  constructor(options: MachineOptions) {
    this.#folder = options.folder;
    const job = join(options.folder, "job");
    mkdirSync(job);
    writeFileSync(join(job, "job.json"), JSON.stringify(options.job));
    writeFileSync(join(job, "start.sh"), startScript(options));
    for (const name of GUEST_FUNCTION_NAMES) {
      if (!GUEST_FUNCTIONS[name].disk) continue;
      writeFileSync(this.#image(name), "");
      truncateSync(this.#image(name), GUEST_DISK_BYTES);
    }
    const console = options.shell ? "inherit" : "pipe";
    const program = ["setpriv", "--pdeathsig", "KILL", "--", "qemu-system-x86_64", ...this.#arguments(options, job)];
    this.#child = spawn(program[0], program.slice(1), {
      stdio: [options.shell ? "inherit" : "ignore", console, console, "pipe", "pipe"],
    });
    for (const stream of [this.#child.stdout, this.#child.stderr]) {
      stream?.setEncoding("utf8").on("data", (text: string) => {
        this.#console = (this.#console + text).slice(-CONSOLE_CHARACTERS);
        this.#consoleNews = (this.#consoleNews + text).slice(-CONSOLE_CHARACTERS);
        options.onConsole?.(text);
      });
    }
    this.#ended = new Promise((resolve) => {
      this.#child.once("error", (error) => resolve(`QEMU did not start: ${error.message}`));
      // Not "close", which waits until somebody has read all that is left in the sockets.
      this.#child.once("exit", (code, signal) => resolve(`QEMU ended with ${signal ?? `status ${code}`}`));
    });
    this.#port = duplex(this.#child, PORT_FD);
    this.#monitor = new Monitor(duplex(this.#child, MONITOR_FD), this.#ended);
  }

  /** Resolves with how QEMU ended. */
  get ended(): Promise<string> {
    return this.#ended;
  }

  /** The last lines of the console and of QEMU's errors. */
  get console(): string {
    return this.#console.replaceAll("\r", "").trimEnd();
  }

  /** What the console and QEMU have said since the last call. */
  takeConsole(): string {
    const news = this.#consoleNews.replaceAll("\r", "");
    this.#consoleNews = "";
    return news;
  }

  /** Lines of the guest, until QEMU ends. */
  async *lines(): AsyncGenerator<FromGuest, void> {
    const lines = new Lines();
    try {
      for await (const text of this.#port) {
        for (const line of lines.push(String(text))) yield JSON.parse(line) as FromGuest;
      }
    } catch (error) {
      if (error !== this.#port.errored) throw error; // the socket's own: QEMU has ended
    }
  }

  /** Answer a question of the guest. */
  async answer(id: number, question: HostQuestion): Promise<void> {
    const answer = await this.#find(question).then(
      (result): Answer => ({ id, result }),
      (error: unknown): Answer => ({ id, error: error instanceof Error ? error.message : String(error) }),
    );
    this.#port.write(`${JSON.stringify(answer)}\n`);
  }

  /** End QEMU. Idempotent. */
  async stop(): Promise<void> {
    this.#child.kill("SIGKILL");
    await this.#ended;
    this.#port.destroy();
    this.#monitor.close();
  }

  async #find(question: HostQuestion): Promise<unknown> {
    if (question.ask === "qmp") return await this.#monitor.execute(question.command, question.arguments);
    const { disk, position, length } = question;
    const name = GUEST_FUNCTION_NAMES.find((known) => known === disk && GUEST_FUNCTIONS[known].disk);
    if (name === undefined) throw new RangeError(`the guest has no disk "${disk}"`);
    const hash = createHash("sha256");
    let bytes = 0;
    if (length > 0) {
      for await (const piece of createReadStream(this.#image(name), { start: position, end: position + length - 1 })) {
        hash.update(piece as Buffer);
        bytes += (piece as Buffer).length;
      }
    }
    if (bytes !== length) throw new RangeError(`the image of ${disk} ends at ${position + bytes}`);
    return hash.digest("hex");
  }

  #image(name: string): string {
    return join(this.#folder, `${name}.img`);
  }

  #arguments({ files, shell, writable }: MachineOptions, job: string): string[] {
    const list = ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-m", String(GUEST_MEMORY_MIB)];
    // Without "rep movsb" for copies, which the emulator does byte by byte, nor guards against a processor's leaks.
    list.push("-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max,-erms", "-smp", "2");
    list.push("-kernel", files.kernel, "-initrd", files.initramfs);
    list.push("-append", "console=ttyS0 panic=-1 loglevel=5 intel_iommu=on mitigations=off");
    // With signal=off and a mux, keys like Ctrl-C go to the guest, and Ctrl-A X ends QEMU.
    list.push(
      "-chardev",
      shell ? "stdio,id=console,mux=on,signal=off" : "stdio,id=console",
      "-serial",
      "chardev:console",
    );
    if (shell) list.push("-mon", "chardev=console,mode=readline");
    list.push("-chardev", `socket,id=monitor,fd=${MONITOR_FD}`, "-mon", "chardev=monitor,mode=control");
    // Before all others: an IOMMU serves the devices that come after it.
    list.push("-device", "intel-iommu,intremap=on,caching-mode=on,device-iotlb=on");
    list.push("-chardev", `socket,id=port,fd=${PORT_FD}`, "-device", "virtio-serial-pci,addr=0x2");
    list.push("-device", `virtserialport,chardev=port,name=${PORT_NAME}`);
    list.push("-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap");
    list.push("-virtfs", `local,path=${comma(job)},mount_tag=job,security_model=none,multidevs=remap`);
    for (const [index, path] of writable.entries()) {
      list.push("-virtfs", `local,path=${comma(path)},mount_tag=rw${index},security_model=none,multidevs=remap`);
    }
    list.push("-object", "rng-builtin,id=entropy");
    for (const [index, name] of GUEST_FUNCTION_NAMES.entries()) {
      const { device, disk } = GUEST_FUNCTIONS[name];
      if (disk) {
        const file = `driver=file,filename=${comma(this.#image(name))},node-name=${name}-file`;
        list.push("-blockdev", file, "-blockdev", `driver=raw,file=${name}-file,node-name=${name},discard=unmap`);
      }
      const port = `port-${name}`;
      list.push("-device", `pcie-root-port,id=${port},chassis=${index + 1},addr=${portSlot(name).addr}`);
      list.push("-device", `${device.replaceAll("#", name)},id=${name},bus=${port},addr=0x0`);
    }
    // The second function of SHARED's slot: without ACS the two are one IOMMU group.
    const { device } = GUEST_FUNCTIONS.OTHER;
    list.push("-device", `${device},bus=port-SHARED,addr=0x0.0x1`);
    return list;
  }
}

/** QEMU's monitor (QMP): JSON lines, one answer a command, events in between. */
class Monitor {
  readonly #socket: Duplex;
  readonly #waiting = new Map<number, (answer: QmpAnswer) => void>();
  #nextId = 1;
  readonly #ended: Promise<string>;

  constructor(socket: Duplex, ended: Promise<string>) {
    this.#socket = socket;
    this.#ended = ended;
    const lines = new Lines();
    socket.on("data", (text: string) => {
      for (const line of lines.push(text)) {
        const answer = JSON.parse(line) as QmpAnswer;
        if (answer.id !== undefined) this.#waiting.get(answer.id)?.(answer);
      }
    });
    void this.execute("qmp_capabilities", {}).catch(() => undefined); // the next command says what is wrong
  }

  /** Let go of the socket, which would keep this process alive. */
  close(): void {
    this.#socket.destroy();
  }

  /** Carry out a command. */
  async execute(command: string, parameters: Readonly<Record<string, unknown>>): Promise<unknown> {
    const id = this.#nextId++;
    const answered = new Promise<QmpAnswer>((resolve) => this.#waiting.set(id, resolve));
    this.#socket.write(`${JSON.stringify({ execute: command, arguments: parameters, id })}\n`);
    const answer = await Promise.race([answered, this.#ended]);
    this.#waiting.delete(id);
    if (typeof answer === "string") throw new Error(`${command}: ${answer}`);
    if (answer.error !== undefined) throw new Error(`${command}: ${answer.error.desc}`);
    return answer.return;
  }
}

interface QmpAnswer {
  readonly id?: number;
  readonly return?: unknown;
  readonly error?: { readonly desc: string };
}

/** A socket between us and a child's descriptor. */
function duplex(child: ChildProcess, fd: number): Duplex {
  const socket = child.stdio[fd] as Duplex;
  socket.setEncoding("utf8");
  socket.on("error", () => undefined); // that QEMU has ended is seen at the process
  return socket;
}

/** What init runs once the host's files are mounted: the tests' file system, then the agent in it. */
function startScript({ root, environment, shell, writable }: MachineOptions): string {
  // What the host has below /tmp and the like has to be seen in the guest's own.
  const needed = [root, dirname(dirname(dirname(dirname(AGENT)))), dirname(process.execPath)];
  const visible = [...new Set(needed)].filter((path) => /^\/(tmp|run|dev)\//.test(path));
  const variables = Object.entries({ ...environment, TMPDIR: "/tmp", HOME: "/tmp" });
  const exports = variables.map(([name, value]) => `export ${name}=${quote(value)}`);
  const agent = `chroot /root ${[process.execPath, AGENT, `${JOB_FOLDER}/job.json`].map(quote).join(" ")}`;
  return `mkdir -p /root
mount --bind /host /root || fail "cannot bind the host's files"
for name in dev proc sys; do mount --bind /$name /root/$name; done
for name in tmp run; do mount -t tmpfs tmpfs /root/$name; done
mkdir -p /root${JOB_FOLDER} && mount --bind /job /root${JOB_FOLDER}
for path in ${visible.map(quote).join(" ")}; do mkdir -p "/root$path"; mount --bind "/host$path" "/root$path"; done
${writable.map((path, index) => `mkdir -p ${quote(`/root${path}`)}; share rw${index} ${quote(`/root${path}`)} rw`).join("\n")}
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin; ln -s fd/1 /dev/stdout; ln -s fd/2 /dev/stderr
ip link set lo up
${exports.join("\n")}
${shell ? atShell(agent) : agent}
fail "the agent ended with status $?"
`;
}

/** Keep the agent in the background, where it goes on serving questions to the host, and sit down at the console. */
function atShell(agent: string): string {
  return `${agent} &
while kill -0 $! 2>/dev/null && [ ! -e /root/run/guest.env ]; do sleep 1; done
set -a
. /root/run/guest.env
setsid cttyhack chroot /root /bin/sh`;
}

/** A word for the shell. */
function quote(word: string): string {
  return `'${word.replaceAll("'", `'\\''`)}'`;
}

/** A value in a list of QEMU's options. */
function comma(value: string): string {
  return value.replaceAll(",", ",,");
}
