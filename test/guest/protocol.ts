/**
 * What host and guest of the lab tell each other: a job in a file when the guest starts, then JSON lines over a
 * virtio-serial port.
 */

/** A PCI function of the guest. */
export interface GuestFunction {
  /** QEMU's `-device`, which gets the function's name as its id; `#` stands for that name, which the disk has too. */
  readonly device: string;
  /** Whether it is a disk, with an image on the host. */
  readonly disk: boolean;
  /** The driver it is bound to when the tests begin. */
  readonly driver: "vfio-pci" | "virtio-pci";
  /** What it is there for. */
  readonly purpose: string;
}

const MODERN_DISK = "virtio-blk-pci,drive=#,serial=#,disable-legacy=on,iommu_platform=on,ats=on,num-queues=2";

/**
 * The functions of the guest, each behind its own root port (only there VFIO_DEVICE_RESET works). Tests find the
 * address of `SPLIT` in the environment variable VIRTIO_GUEST_PCI_SPLIT, and so on.
 */
export const GUEST_FUNCTIONS = {
  SPLIT: { device: MODERN_DISK, disk: true, driver: "vfio-pci", purpose: "split rings, 2 queues, 3 vectors" },
  PACKED: {
    device: `${MODERN_DISK},packed=on`,
    disk: true,
    driver: "vfio-pci",
    purpose: "packed rings, 2 queues, 3 vectors",
  },
  FEW_VECTORS: {
    device: `${MODERN_DISK},vectors=2`,
    disk: true,
    driver: "vfio-pci",
    purpose: "2 queues and 2 MSI-X vectors, of which one is for changes of the configuration",
  },
  INTX: { device: `${MODERN_DISK},vectors=0`, disk: true, driver: "vfio-pci", purpose: "no MSI-X: INTx only" },
  LEGACY: {
    device: "virtio-blk-pci,drive=#,serial=#,disable-legacy=off,disable-modern=on",
    disk: true,
    driver: "vfio-pci",
    purpose: "legacy interface only, to be refused",
  },
  SHARED: {
    device: `${MODERN_DISK},multifunction=on`,
    disk: true,
    driver: "vfio-pci",
    purpose: "its IOMMU group has a second function that the kernel holds: not viable",
  },
  UNBOUND: { device: MODERN_DISK, disk: true, driver: "virtio-pci", purpose: "held by the kernel: /dev/vd*" },
  OTHER: {
    device: "virtio-rng-pci,rng=entropy,disable-legacy=on,iommu_platform=on,ats=on",
    disk: false,
    driver: "vfio-pci",
    purpose: "a device of another class",
  },
} as const satisfies Readonly<Record<string, GuestFunction>>;

/** The name of a function of the guest. */
export type GuestFunctionName = keyof typeof GUEST_FUNCTIONS;

/** All names, in the order of their root ports. */
export const GUEST_FUNCTION_NAMES = Object.keys(GUEST_FUNCTIONS) as readonly GuestFunctionName[];

/** Size of each disk's image. */
export const GUEST_DISK_BYTES = 24 * 1024 * 1024;

/** Memory of the guest. */
export const GUEST_MEMORY_MIB = 1536;

/** Slots below are taken by what has no function of ours: host bridge, virtio-serial, shared folders. */
const FIRST_PORT_SLOT = 8;

/** The slot of a function's root port on bus 0, as QEMU's `addr=` takes it and as the guest's sysfs names it. */
export function portSlot(name: GuestFunctionName): { readonly addr: string; readonly address: string } {
  const slot = (FIRST_PORT_SLOT + GUEST_FUNCTION_NAMES.indexOf(name)).toString(16);
  return { addr: `0x${slot}`, address: `0000:00:${slot.padStart(2, "0")}.0` };
}

/** Name of the virtio-serial port that the lines go over. */
export const PORT_NAME = "virtio.lab";

/** Where the guest finds the job, and shares files with the host. */
export const JOB_FOLDER = "/run/job";

/** What the guest is to do: job.json in the job folder. */
export interface Job {
  /** Test files, as absolute paths. Without any, the guest is only prepared. */
  readonly files: readonly string[];
  /** Milliseconds without any news from a test file after which it is killed. */
  readonly silenceMs: number;
}

/** A test that began or ended. */
export interface TestBegins {
  readonly type: "begin";
  /** A number for the test. */
  readonly id: number;
  readonly file: string;
  /** Its title behind those of the tests around it. */
  readonly name: string;
}

/** How a test ended. */
export interface TestEnds {
  readonly type: "end";
  readonly id: number;
  readonly outcome: "pass" | "fail";
  /** Why it did not run, or that it is still to do. */
  readonly skip: string | undefined;
  /** The error as text, of a test that failed. */
  readonly error: string | undefined;
  readonly durationMs: number;
}

/** A file's process began. */
export interface FileBegins {
  readonly type: "file";
  readonly file: string;
}

/** A file's process ended. */
export interface FileEnds {
  readonly type: "file-end";
  readonly file: string;
  /** What failed outside its tests. */
  readonly error: string | undefined;
}

/** What a test's process printed. */
export interface TestPrints {
  readonly type: "output";
  readonly text: string;
}

/** What the runner of the tests says. */
export type TestNews = TestBegins | TestEnds | FileBegins | FileEnds | TestPrints;

/** What a test asks the host. */
export type HostQuestion =
  | { readonly ask: "qmp"; readonly command: string; readonly arguments: Readonly<Record<string, unknown>> }
  | { readonly ask: "sha256"; readonly disk: string; readonly position: number; readonly length: number };

/** A question with a number for its answer. */
export interface Asks {
  readonly type: "ask";
  readonly id: number;
  readonly question: HostQuestion;
}

/** The answer to a question, or why there is none. */
export interface Answer {
  readonly id: number;
  readonly result?: unknown;
  readonly error?: string;
}

/** Lines from the guest. */
export type FromGuest =
  | { readonly type: "ready" }
  | TestNews
  | Asks
  | { readonly type: "done" }
  | { readonly type: "broken"; readonly error: string };

/** Cut a stream of text into lines; the rest waits for the next piece. */
export class Lines {
  #rest = "";

  /** The lines that `text` completes. */
  push(text: string): string[] {
    const lines = (this.#rest + text).split("\n");
    this.#rest = lines.pop() ?? "";
    return lines;
  }
}
