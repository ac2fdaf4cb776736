/** Config space, BARs, interrupts, memory and reset of a function by VFIO, beside a model of the kernel. */

import assert from "node:assert/strict";
import { readFileSync, readSync as pread, writeSync as pwrite } from "node:fs";
import { constants } from "node:os";
import test from "node:test";
import { MemoryRegion } from "../../../src/memory/index.js";
import { EventFd, type RegisterWidth } from "../../../src/sys/index.js";
import { mappings } from "../../sys/helpers.js";
import { machine, open, refusal, withFs, withoutMmap } from "./vfio-support.js";

const { errno } = constants;
const argument = { name: "RangeError", code: "ERR_VIRTIO_ARGUMENT" };
const MIB = 2 ** 20;

/** Where a region of the model begins in its file. */
const REGION = (index: number) => index * MIB;

/** Bytes of the file of the model's function. */
function peek(fd: number, position: number, length: number): number[] {
  const bytes = new Uint8Array(length);
  pread(fd, bytes, 0, length, position);
  return [...bytes];
}

function poke(fd: number, position: number, ...bytes: number[]): void {
  pwrite(fd, Uint8Array.from(bytes), 0, bytes.length, position);
}

/** Page numbers of the model's file that are mapped, with their count: `[first, pages]`. */
function mappedPages(): number[][] {
  return mappings("vfio-model").map((line) => {
    const [, from, to, offset] = /^(\w+)-(\w+) \S+ (\w+)/.exec(line)?.map((text) => Number.parseInt(text, 16)) ?? [];
    return [offset / 4096, (to - from) / 4096];
  });
}

test("PCI-DRV-04 config space is accessed at the width that is asked for, little-endian", (t) => {
  const kernel = machine(t);
  const opened = open(kernel);
  poke(kernel.deviceFd, REGION(7), 0xf4, 0x1a, 0x42, 0x90);
  const accesses: unknown[] = [];
  const note = (kind: string, fd: number, length: number, position: number) =>
    accesses.push([kind, fd === kernel.deviceFd, length, position - REGION(7)]);
  withFs(
    "readSync",
    (real) => (fd: number, into: DataView, at: number, length: number, position: number) => {
      note("read", fd, length, position);
      return real(fd, into, at, length, position);
    },
    () => {
      assert.equal(opened.readConfig(0, 1), 0xf4);
      assert.equal(opened.readConfig(2, 2), 0x9042);
      assert.equal(opened.readConfig(0, 4), 0x90421af4);
    },
  );
  withFs(
    "writeSync",
    (real) => (fd: number, from: DataView, at: number, length: number, position: number) => {
      note("write", fd, length, position);
      return real(fd, from, at, length, position);
    },
    () => {
      opened.writeConfig(5, 1, 0x1ff);
      opened.writeConfig(6, 2, 0x0506);
      opened.writeConfig(4092, 4, 0xf1020304);
    },
  );
  assert.deepEqual(accesses, [
    ["read", true, 1, 0],
    ["read", true, 2, 2],
    ["read", true, 4, 0],
    ["write", true, 1, 5],
    ["write", true, 2, 6],
    ["write", true, 4, 4092],
  ]);
  assert.deepEqual(peek(kernel.deviceFd, REGION(7) + 4, 4), [0, 0xff, 0x06, 0x05]);
  assert.deepEqual(peek(kernel.deviceFd, REGION(7) + 4092, 4), [4, 3, 2, 0xf1]);
});

test("what is not within config space, or across its width, is refused", (t) => {
  const opened = open(machine(t));
  const wrong: readonly (readonly [number, number])[] = [
    ...([
      [4096, 1],
      [4095, 2],
      [4094, 4],
      [-4, 4],
      [2, 4],
      [1, 2],
      [0, 3],
      [0, 8],
      [0.5, 1],
    ] as const),
  ];
  for (const [offset, width] of wrong) {
    assert.throws(() => opened.readConfig(offset, width as RegisterWidth), argument, `${width} at ${offset}`);
    assert.throws(() => opened.writeConfig(offset, width as RegisterWidth, 0), argument, `${width} at ${offset}`);
  }
});

test("config space that fails, or gives less than was asked for, is an error", (t) => {
  const opened = open(machine(t));
  const failing = () => () => {
    throw refusal("EIO", errno.EIO, "read");
  };
  const told = {
    code: "ERR_VIRTIO_SYSCALL",
    errno: errno.EIO,
    message: /2 bytes at 4 of config space of 0000:00:04\.0/,
  };
  withFs("readSync", failing, () => assert.throws(() => opened.readConfig(4, 2), { ...told, syscall: "pread" }));
  withFs("writeSync", failing, () => assert.throws(() => opened.writeConfig(4, 2, 1), { ...told, syscall: "pwrite" }));
  const short = { code: "ERR_VIRTIO_PROTOCOL", syscall: "pread" };
  withFs(
    "readSync",
    () => () => 1,
    () => assert.throws(() => opened.readConfig(4, 2), short),
  );
});

test("PCI-DRV-09 registers of a BAR are mapped where the kernel allows it, in no more pages than they have", (t) => {
  const kernel = machine(t);
  const opened = open(kernel);
  const page = REGION(4) / 4096;
  // BAR 4 can be mapped in its pages 0, 2 and 3.
  const cases: readonly (readonly [number, number, number, number[][]])[] = [
    [4, 0x40, 0x38, [[page, 1]]],
    [4, 0, 0x1000, [[page, 1]]],
    [4, 0x2ffc, 8, [[page + 2, 2]]],
    [4, 0x3fff, 1, [[page + 3, 1]]],
    [4, 0xffc, 8, []],
    [4, 0x1000, 4, []],
    [4, 0x1ffc, 8, []],
    [1, 0, 4096, [[REGION(1) / 4096, 1]]],
    [0, 0, 128, []],
  ];
  for (const [bar, offset, length, pages] of cases) {
    const registers = opened.openRegisters(bar, offset, length);
    assert.equal(registers.length, length);
    assert.deepEqual(mappedPages(), pages, `BAR ${bar} at ${offset}`);
    const [first, last] = [REGION(bar) + offset, REGION(bar) + offset + length - 1];
    poke(kernel.deviceFd, first, 0xa1);
    assert.equal(registers.read(0, 1), 0xa1);
    registers.write(length - 1, 1, 0xb2);
    assert.deepEqual(peek(kernel.deviceFd, last, 1), [0xb2]);
    for (const width of [1, 2, 4] as const) {
      assert.throws(() => registers.read(length, width), argument);
      assert.throws(() => registers.write(-width, width, 0), argument);
    }
    registers.close();
    registers.close();
    assert.deepEqual(mappedPages(), []);
    assert.throws(() => registers.read(0, 1), { code: "ERR_VIRTIO_CLOSED", message: new RegExp(`BAR ${bar} of`) });
    assert.throws(() => registers.write(0, 1, 0), { code: "ERR_VIRTIO_CLOSED" });
  }
});

test("a page of which only a part can be mapped is not mapped", (t) => {
  const kernel = machine(t, {
    regions: { 4: { flags: 0xf, size: 0x4000, sparse: [[0, 0x1800]] }, 7: { flags: 3, size: 256 } },
  });
  const opened = open(kernel);
  opened.openRegisters(4, 0x1000, 0x10);
  assert.deepEqual(mappedPages(), []);
  opened.openRegisters(4, 0xff0, 0x10);
  assert.deepEqual(mappedPages(), [[REGION(4) / 4096, 1]]);
});

test("PCI-DRV-04 registers that cannot be mapped are accessed at their width, aligned in the BAR", (t) => {
  const kernel = machine(t);
  const registers = open(kernel).openRegisters(0, 0x12, 8);
  poke(kernel.deviceFd, REGION(0) + 0x12, 1, 2, 3, 4, 5, 6, 7, 8);
  assert.equal(registers.read(2, 4), 0x06050403);
  assert.equal(registers.read(0, 2), 0x0201);
  assert.throws(() => registers.read(0, 4), { ...argument, message: /multiple of 4/ });
  registers.write(2, 4, 0xfa0b0c0d);
  assert.equal(registers.read(2, 4), 0xfa0b0c0d);
  for (const width of [1, 2, 4] as const) {
    registers.write(2, width, 0xfa0b0c0d | 0); // a number below 0: the same bits
    assert.equal(registers.read(2, width), 0xfa0b0c0d % 2 ** (8 * width));
  }
  assert.deepEqual(peek(kernel.deviceFd, REGION(0) + 0x12, 8), [1, 2, 0x0d, 0x0c, 0x0b, 0xfa, 7, 8]);
});

test("what is not within a BAR is refused, and a mapping that fails leaves nothing", (t) => {
  const opened = open(machine(t));
  for (const [bar, offset, length] of [
    ...([
      [4, 0x4000, 1],
      [4, 0x3fff, 2],
      [4, -1, 4],
      [4, 0, 0],
      [4, 0, 0x4001],
      [4, 0, 2 ** 40],
    ] as const),
    ...([
      [2, 0, 1],
      [5, 0, 4],
      [6, 0, 4],
      [-1, 0, 4],
      [0.5, 0, 4],
    ] as const),
  ]) {
    assert.throws(() => opened.openRegisters(bar, offset, length), argument, `BAR ${bar} at ${offset}, ${length}`);
  }
  assert.throws(() => opened.barSize(6), argument);
  withoutMmap(-errno.EINVAL, () => {
    assert.throws(() => opened.openRegisters(4, 0, 64), {
      code: "ERR_VIRTIO_SYSCALL",
      errno: errno.EINVAL,
      syscall: "mmap",
    });
  });
  assert.deepEqual(mappedPages(), []);
});

test("all MSI-X vectors are enabled in one request, and disabled before others are", (t) => {
  const kernel = machine(t);
  const opened = open(kernel);
  const events = [1, 2, 3, 4].map(() => EventFd.create());
  const [a, b, c] = events.map(({ fd }) => fd);
  kernel.log.length = 0;
  opened.setMsix([]);
  assert.deepEqual(kernel.log, []);
  opened.setMsix(events.slice(0, 2));
  assert.deepEqual(kernel.enabled.get(2), [a, b]);
  opened.setMsix(events.slice(0, 3));
  assert.deepEqual(kernel.enabled.get(2), [a, b, c]);
  assert.equal(kernel.log.length, 3);
  assert.throws(() => opened.setMsix(events), { ...argument, message: /from 0 to 3/ });
  assert.deepEqual(kernel.enabled.get(2), [a, b, c]);
  assert.throws(() => opened.setIntx(events[3]), { code: "ERR_VIRTIO_SYSCALL", message: /exclude each other/ });
  opened.setMsix([]);
  opened.setIntx(events[3]);
  assert.deepEqual([...kernel.enabled.keys()], [0]);
  for (const event of events) event.close();
});

test("INTx is unmasked after it signalled, and the request to give the device back is told", (t) => {
  const kernel = machine(t);
  const opened = open(kernel);
  const [intx, release] = [EventFd.create(), EventFd.create()];
  opened.setIntx(intx);
  opened.setRelease(release);
  assert.deepEqual(
    [...kernel.enabled],
    [
      [0, [intx.fd]],
      [4, [release.fd]],
    ],
  );
  kernel.masked = true;
  opened.unmaskIntx();
  assert.equal(kernel.masked, false);
  opened.setIntx(undefined);
  opened.setRelease(undefined);
  assert.equal(kernel.enabled.size, 0);
  intx.close();
  release.close();
});

test("interrupts that a function has not, or that cannot signal an event, are refused", (t) => {
  const kernel = machine(t, { irqs: { 0: [7, 0], 2: [8, 3], 4: [9, 1] }, numIrqs: 4 });
  const opened = open(kernel);
  const event = EventFd.create();
  assert.deepEqual([opened.msixVectors, opened.hasIntx], [0, false]);
  for (const call of [() => opened.setMsix([event]), () => opened.setIntx(event), () => opened.setRelease(event)]) {
    assert.throws(call, argument);
  }
  event.close();
});

test("interrupts whose enabling fails are not enabled, and can be enabled later", (t) => {
  const kernel = machine(t);
  const opened = open(kernel);
  const event = EventFd.create();
  kernel.intercept = () => -errno.ENOSPC;
  assert.throws(() => opened.setMsix([event]), {
    code: "ERR_VIRTIO_SYSCALL",
    errno: errno.ENOSPC,
    syscall: "ioctl",
    message: /enabling 1 of MSIX of 0000:00:04\.0 .*fewer queues/,
  });
  // What Linux answers when it has one vector for the two that are asked for.
  kernel.intercept = () => 1;
  assert.throws(() => opened.setMsix([event, event]), {
    code: "ERR_VIRTIO_QUEUES",
    message: /1 interrupt vectors left/,
  });
  kernel.intercept = () => undefined;
  kernel.log.length = 0;
  opened.setMsix([event]);
  assert.deepEqual(kernel.log, ["DEVICE_SET_IRQS"]);
  event.close();
});

test("BASIC-DRV-32 memory is mapped at its IOVA for the IOMMU, and unmapped", (t) => {
  const kernel = machine(t);
  const opened = open(kernel);
  const region = MemoryRegion.create({ name: "vfio-region", size: 3 * MIB, iova: 6 * MIB });
  let address = 0;
  kernel.intercept = (name, bytes) => {
    if (name === "IOMMU_MAP_DMA" && typeof bytes !== "number") {
      address = Number(new BigUint64Array(bytes.buffer, bytes.byteOffset, 4)[1]);
    }
    return undefined;
  };
  opened.mapDma(region);
  const maps = readFileSync("/proc/self/maps", "utf8");
  assert.ok(maps.includes(`${address.toString(16)}-`) && maps.includes("/memfd:vfio-region "));
  assert.deepEqual([...kernel.dma], [[6 * MIB, 4 * MIB]]);
  assert.throws(() => opened.mapDma(region), { errno: errno.EEXIST, message: /4194304 bytes at 0x600000/ });
  opened.unmapDma(region);
  assert.equal(kernel.dma.size, 0);
  assert.throws(() => opened.unmapDma(region), argument);
  region.close();
});

test("memory that cannot be mapped or unmapped is told with what to do", (t) => {
  const kernel = machine(t);
  const opened = open(kernel);
  const region = MemoryRegion.create({ name: "vfio-region", size: 1, iova: 2 * MIB });
  const limit = /may lock (\d+ bytes|any amount); raise `ulimit -l` .*LimitMEMLOCK=/;
  for (const [answer, expected] of [
    [errno.ENOMEM, { code: "ERR_VIRTIO_MEMORY", message: limit }],
    [errno.ENOSPC, { code: "ERR_VIRTIO_MEMORY", message: /no more mappings/ }],
    [errno.EPERM, { code: "ERR_VIRTIO_PERMISSION" }],
  ] as const) {
    kernel.intercept = () => -answer;
    assert.throws(() => opened.mapDma(region), { errno: answer, syscall: "ioctl", ...expected });
  }
  kernel.intercept = () => undefined;
  opened.mapDma(region);
  kernel.intercept = () => -errno.EIO;
  assert.throws(() => opened.unmapDma(region), { code: "ERR_VIRTIO_SYSCALL", errno: errno.EIO });
  // The kernel says that it unmapped less than the region.
  kernel.intercept = (_name, bytes) => {
    if (typeof bytes !== "number") new BigUint64Array(bytes.buffer, bytes.byteOffset, 3)[2] = 4096n;
    return 0;
  };
  assert.throws(() => opened.unmapDma(region), { code: "ERR_VIRTIO_PROTOCOL", message: /unmapped 4096 bytes/ });
  kernel.intercept = () => undefined;
  opened.unmapDma(region);
  region.close();
});

test("a function is reset where it has a reset of its own", (t) => {
  const kernel = machine(t);
  const opened = open(kernel);
  opened.reset();
  assert.equal(kernel.resets, 1);
  const fixed = machine(t, { deviceFlags: 2 });
  const other = open(fixed);
  assert.equal(other.canReset, false);
  assert.throws(() => other.reset(), {
    code: "ERR_VIRTIO_UNSUPPORTED",
    errno: errno.EINVAL,
    syscall: "ioctl",
    message: /root port/,
  });
});
