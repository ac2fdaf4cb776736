/** Tests of `virtio pci`: what it lists, refuses, writes and undoes, on made-up machines; and the real command. */

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { closeSync, constants, openSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, afterEach, beforeEach, describe, test } from "node:test";
import { openErrno, openersOf, THIS_MACHINE } from "../../src/cli/machine.js";
import { carryOut, planBind, planUnbind, shellCommand } from "../../src/cli/pci-bind.js";
import { describeFunctions, describeGroup, listFunctions } from "../../src/cli/pci-list.js";
import { FakeMachine } from "../support/fake-machine.js";
import { TemporaryFolder } from "../support/peers.js";
import { virtio } from "./command.js";

const DISK = "0000:00:04.0";
const NET = "0000:00:05.0";

let machine: FakeMachine;
beforeEach(() => {
  machine = new FakeMachine();
  machine.addDriver("vfio-pci");
  machine.file("dev/vfio/4", "");
});
afterEach(() => machine.close());

/** A disk of the kernel with two partitions, in a group of its own. */
function addDisk(): void {
  machine.addFunction({ address: DISK, group: 4 });
  machine.addDisk(DISK, "vda", ["vda1", "vda2"]);
}

describe("binding", () => {
  test("lays the driver down, unbinds, probes, and looks", () => {
    addDisk();
    const move = planBind(machine, `pci:${DISK}`, "vfio-pci");
    assert.deepEqual(machine.written, []);
    assert.deepEqual(move.steps.map(shellCommand), [
      `echo vfio-pci > ${machine.sys}/bus/pci/devices/${DISK}/driver_override`,
      `echo ${DISK} > ${machine.sys}/bus/pci/devices/${DISK}/driver/unbind`,
      `echo ${DISK} > ${machine.sys}/bus/pci/drivers_probe`,
    ]);
    const moved = carryOut(machine, move);
    assert.deepEqual(machine.written, [`driver_override = vfio-pci`, `unbind = ${DISK}`, `drivers_probe = ${DISK}`]);
    assert.deepEqual([moved.driver, moved.driverOverride], ["vfio-pci", "vfio-pci"]);
    assert.equal(
      describeGroup(machine, moved),
      `group 4 is viable, by ${machine.dev}/vfio/4; try: virtio info pci:${DISK}`,
    );
  });

  test("a function that has the driver already is left alone, even when it is in use", () => {
    machine.addFunction({ address: DISK, driver: "vfio-pci", driverOverride: "vfio-pci", group: 4 });
    machine.closed.set("vfio/4", "EBUSY");
    assert.deepEqual(planBind(machine, DISK, "vfio-pci").steps, []);
  });

  test("a function without driver is not unbound", () => {
    machine.addFunction({ address: DISK, driver: null, group: 4 });
    carryOut(machine, planBind(machine, DISK, "vfio-pci"));
    assert.deepEqual(machine.written, ["driver_override = vfio-pci", `drivers_probe = ${DISK}`]);
    assert.equal(machine.driverOf(DISK), "vfio-pci");
  });

  test("there and back leaves it as it was", () => {
    addDisk();
    carryOut(machine, planBind(machine, DISK, "vfio-pci"));
    const moved = carryOut(machine, planUnbind(machine, DISK));
    assert.deepEqual([moved.driver, moved.driverOverride], ["virtio-pci", undefined]);
    assert.deepEqual(planUnbind(machine, DISK).steps, []);
    assert.equal(shellCommand({ path: "/driver_override", text: "" }), "echo > /driver_override");
  });

  test("a driver that was laid down for later is taken back, whoever uses the function", () => {
    machine.addFunction({ address: DISK, driverOverride: "vfio-pci", group: 4 });
    machine.addDisk(DISK, "vda");
    machine.file("proc/swaps", "/dev/vda partition 1 0 -2\n");
    const moved = carryOut(machine, planUnbind(machine, DISK));
    assert.deepEqual([moved.driver, moved.driverOverride], ["virtio-pci", undefined]);
    assert.deepEqual(machine.written, ["driver_override = "]);
  });

  test("the group is told when the kernel uses others of it", () => {
    addDisk();
    machine.addFunction({ address: NET, device: 0x1041, group: 4 });
    const moved = carryOut(machine, planBind(machine, DISK, "vfio-pci"));
    assert.match(
      describeGroup(machine, moved),
      /^group 4 is not viable: the kernel uses 0000:00:05\.0 \(virtio-pci\): when nothing needs that, echo 0000:00:05\.0 > \S+unbind$/,
    );
  });
});

describe("refusing", () => {
  const refusals: readonly (readonly [what: string, code: string, message: RegExp, prepare: () => void])[] = [
    ["a function that is not there", "CONNECT", /there is no PCI function 0000:00:04\.0/, () => undefined],
    [
      "no virtio function",
      "ADDRESS",
      /no virtio function \(vendor 0x8086, device 0x100e\)/,
      () => machine.addFunction({ address: DISK, vendor: 0x8086, device: 0x100e, group: 4 }),
    ],
    [
      "a bridge",
      "ADDRESS",
      /is a bridge/,
      () => machine.addFunction({ address: DISK, vendor: 0x8086, class: 0x060400, driver: "pcieport", group: 4 }),
    ],
    [
      "the IOMMU",
      "ADDRESS",
      /is the IOMMU/,
      () => machine.addFunction({ address: DISK, device: 0x1057, class: 0x080000, group: 4 }),
    ],
    ["no IOMMU group", "CONNECT", /has no IOMMU group.*intel_iommu=on/, () => machine.addFunction({ address: DISK })],
    [
      "a mounted disk",
      "BUSY",
      /vda is mounted on \/a b \(umount \/a b\)/,
      () => (addDisk(), machine.file("proc/self/mountinfo", "27 1 254:0 / /a\\040b rw - ext4 /dev/root rw\n")),
    ],
    [
      "a mounted partition",
      "BUSY",
      /vda2 is mounted on \/data/,
      () => (addDisk(), machine.file("proc/self/mountinfo", "27 1 254:2 / /data rw shared:1 - ext4 /dev/root rw\n")),
    ],
    [
      "a file system with a number of its own",
      "BUSY",
      /vda1 is mounted on \/data/,
      () => (addDisk(), machine.file("proc/self/mountinfo", "27 1 0:40 / /data rw - btrfs /dev/vda1 rw\n")),
    ],
    [
      "swap space",
      "BUSY",
      /vda1 is swap space \(swapoff \/dev\/vda1\)/,
      () => (addDisk(), machine.file("proc/swaps", "Filename Type Size Used Priority\n/dev/vda1 partition 1 0 -2\n")),
    ],
    [
      "a disk below the device mapper",
      "BUSY",
      /vda2 is part of dm-0 \(vg0-root\)/,
      () => {
        addDisk();
        machine.file("sys/class/block/vda2/holders/dm-0", "");
        machine.file("sys/class/block/dm-0/dm/name", "vg0-root\n");
      },
    ],
    [
      "a disk below a loop device",
      "BUSY",
      /vda is behind loop3 \(losetup -d \/dev\/loop3\)/,
      () => (addDisk(), machine.file("sys/class/block/loop3/loop/backing_file", "/dev/vda\n")),
    ],
    [
      "a disk that somebody has for himself",
      "BUSY",
      /vda1 is open in a process that cannot be seen from here/,
      () => (addDisk(), machine.closed.set("vda1", "EBUSY")),
    ],
    [
      "a disk that a process has open",
      "BUSY",
      /vda is open in process 1 \(dd\)/,
      () => (addDisk(), machine.addProcess(1, "dd", ["/dev/null", `${machine.dev}/vda`])),
    ],
    [
      "a network interface that is up",
      "BUSY",
      /eth0 is up \(ip link set eth0 down\)/,
      () => {
        machine.addFunction({ address: DISK, device: 0x1041, group: 4 });
        machine.addInterface(DISK, "eth0", 0x1003);
      },
    ],
    [
      "a mounted 9p",
      "BUSY",
      /"share" is mounted on \/mnt/,
      () => {
        machine.addFunction({ address: DISK, device: 0x1049, group: 4 });
        machine.file(`sys/devices/pci0000:00/${DISK}/virtio0/mount_tag`, "share\0");
        machine.file("proc/self/mountinfo", "27 1 0:40 / /mnt rw - 9p share rw\n");
      },
    ],
    [
      "a mounted virtiofs",
      "BUSY",
      /"share" is mounted on \/mnt/,
      () => {
        machine.addFunction({ address: DISK, device: 0x105a, group: 4 });
        machine.file("proc/self/mountinfo", "27 1 0:40 / /mnt rw - virtiofs share rw\n");
      },
    ],
  ];
  for (const [what, code, message, prepare] of refusals) {
    test(`${what}: ERR_VIRTIO_${code}, and nothing is written`, () => {
      prepare();
      assert.throws(() => planBind(machine, DISK, "vfio-pci"), { code: `ERR_VIRTIO_${code}`, message });
      assert.deepEqual(machine.written, []);
    });
  }

  test("a driver that is not loaded, either way", () => {
    addDisk();
    assert.throws(() => planBind(machine, DISK, "mlx5_vfio_pci"), {
      code: "ERR_VIRTIO_CONNECT",
      message: /try: modprobe mlx5_vfio_pci$/,
    });
    const bare = new FakeMachine();
    try {
      bare.addFunction({ address: DISK, driver: "vfio-pci", group: 4 });
      assert.throws(() => planUnbind(bare, DISK), { code: "ERR_VIRTIO_CONNECT", message: /try: modprobe virtio_pci$/ });
    } finally {
      bare.close();
    }
  });

  test("unbinding a function that a process drives, for the kernel would wait for that process", () => {
    machine.addFunction({ address: DISK, driver: "vfio-pci", driverOverride: "vfio-pci", group: 4 });
    machine.addDriver("virtio-pci");
    machine.closed.set("vfio/4", "EBUSY");
    machine.addProcess(1, "node", [`${machine.dev}/vfio/4`]);
    assert.throws(() => planUnbind(machine, DISK), {
      code: "ERR_VIRTIO_BUSY",
      errno: 16,
      message: /vfio\/4 is open in process 1 \(node\) \(close it there\)/,
    });
  });

  test("what is mounted, up, swapped to or held elsewhere is in nobody's way", () => {
    addDisk();
    machine.addFunction({ address: NET, device: 0x1041, group: 5 });
    machine.addInterface(NET, "eth0", 0x1003);
    machine.file("proc/self/mountinfo", "27 1 254:16 / / rw - ext4 /dev/vdb rw\n28 1 0:9 / /m rw - 9p vda rw\n");
    machine.file("proc/swaps", "Filename Type Size Used Priority\n/dev/vdb1 partition 1 0 -2\n/vda1 file 1 0 -2\n");
    machine.file("sys/class/block/loop0/loop/backing_file", "/images/vda\n");
    machine.addProcess(1, "init", ["/dev/null"]);
    assert.equal(planBind(machine, DISK, "vfio-pci").steps.length, 3);
  });

  test("what cannot be looked at is shown in a dry run, and not carried out", () => {
    addDisk();
    machine.closed.set("vda2", "EACCES");
    const move = planBind(machine, DISK, "vfio-pci");
    assert.deepEqual(move.unknown, [`whether ${machine.dev}/vda2 is in use (EACCES)`]);
    assert.throws(() => carryOut(machine, move), { code: "ERR_VIRTIO_PERMISSION", message: /vda2.*run this as root/ });
    assert.deepEqual(machine.written, []);
  });
});

describe("undoing", () => {
  test("nothing needs undoing when a step cannot be written at all", () => {
    addDisk();
    const move = planBind(machine, DISK, "vfio-pci");
    rmSync(join(machine.sys, "bus/pci/drivers_probe"));
    assert.throws(() => carryOut(machine, move), {
      code: "ERR_VIRTIO_SYSCALL",
      errno: 2,
      syscall: "access",
      message: /drivers_probe: ENOENT from access; run this as root$/,
    });
    assert.deepEqual(machine.written, []);
  });

  for (const [step, written] of [
    ["driver_override", []],
    ["unbind", ["driver_override = "]],
    ["drivers_probe", ["driver_override = ", `drivers_probe = ${DISK}`]],
  ] as const) {
    test(`when the kernel refuses ${step}, what was done before is taken back`, () => {
      addDisk();
      let isFirst = true;
      machine.refuse = (name) => {
        if (name !== step || !isFirst) return undefined;
        isFirst = false;
        return "EIO";
      };
      const move = planBind(machine, DISK, "vfio-pci");
      assert.throws(() => carryOut(machine, move), {
        code: "ERR_VIRTIO_SYSCALL",
        errno: 5,
        syscall: "write",
        message: new RegExp(`${step}: EIO from write\\. Undone: it has virtio-pci again$`),
      });
      const failed = machine.written.findIndex((line) => line.startsWith(`${step} = `));
      assert.deepEqual(machine.written.slice(failed + 1), written);
      assert.deepEqual([machine.driverOf(DISK), planUnbind(machine, DISK).steps], ["virtio-pci", []]);
    });
  }

  test("when the driver does not take the function, it goes back", () => {
    addDisk();
    machine.unwilling.add("vfio-pci");
    const move = planBind(machine, DISK, "vfio-pci");
    assert.throws(() => carryOut(machine, move), {
      code: "ERR_VIRTIO_REJECTED",
      message:
        /vfio-pci did not take 0000:00:04\.0 \(virtio blk\): it has no driver now.*Undone: it has virtio-pci again$/,
    });
    assert.deepEqual([machine.driverOf(DISK), planUnbind(machine, DISK).steps], ["virtio-pci", []]);
  });

  test("when the kernel's driver does not take it back, VFIO has it again, by the same override", () => {
    machine.addFunction({ address: DISK, driver: "vfio-pci", driverOverride: "vfio-pci", group: 4 });
    machine.addDriver("virtio-pci");
    machine.unwilling.add("virtio-pci");
    const move = planUnbind(machine, DISK);
    assert.throws(() => carryOut(machine, move), {
      code: "ERR_VIRTIO_REJECTED",
      message: /Undone: it has vfio-pci again$/,
    });
    assert.deepEqual(planBind(machine, DISK, "vfio-pci").facts.driverOverride, "vfio-pci");
  });

  test("a signal between two steps waits until all are done", () => {
    addDisk();
    machine.refuse = (name) => {
      if (name === "unbind") process.kill(process.pid, "SIGTERM");
      return undefined;
    };
    assert.equal(carryOut(machine, planBind(machine, DISK, "vfio-pci")).driver, "vfio-pci");
    assert.deepEqual([process.listenerCount("SIGTERM"), process.listenerCount("SIGINT")], [0, 0]);
  });

  test("when undoing fails too, the message says where the function is", () => {
    addDisk();
    machine.refuse = (name) => (name === "drivers_probe" ? "EBUSY" : undefined);
    const move = planBind(machine, DISK, "vfio-pci");
    assert.throws(() => carryOut(machine, move), {
      code: "ERR_VIRTIO_SYSCALL",
      errno: 16,
      message: /EBUSY.*Undoing it failed too \(.*EBUSY.*\): it has no driver, and had virtio-pci$/,
    });
  });
});

describe("listing", () => {
  test("every function with what it is, has, shares and lacks", () => {
    addDisk();
    machine.file("proc/self/mountinfo", "27 1 254:0 / / rw - ext4 /dev/root rw\n");
    machine.addFunction({ address: NET, device: 0x1000, group: 5 });
    machine.addInterface(NET, "eth0", 0x1002);
    machine.addFunction({ address: "0000:00:06.0" });
    machine.addFunction({ address: "0000:00:07.0", group: 7 });
    machine.addFunction({ address: "0000:00:08.0", driver: "vfio-pci", driverOverride: "vfio-pci", group: 8 });
    machine.file("dev/vfio/8", "");
    machine.addFunction({ address: "0000:00:09.0", driver: "vfio-pci", group: 9 });
    machine.addFunction({ address: "0000:00:09.1", vendor: 0x8086, driver: "e1000", group: 9 });
    const functions = listFunctions(machine);
    assert.deepEqual(functions[0], {
      ...{
        address: DISK,
        type: "blk",
        typeId: 2,
        transitional: false,
        legacyOnly: false,
        vendorId: 0x1af4,
        deviceId: 0x1042,
      },
      ...{ driver: "virtio-pci", driverOverride: null, group: 4, groupMembers: [], groupViable: true },
      ...{ blockDevices: ["vda", "vda1", "vda2"], interfaces: [], inUse: ["vda is mounted on /"] },
      ...{ ready: false, advice: "in use: vda is mounted on /" },
    });
    assert.deepEqual(describeFunctions(functions), [
      "address       type                driver      group  shared with           is",
      "0000:00:04.0  blk                 virtio-pci      4  nobody                vda, vda1, vda2  in use: vda is mounted on /",
      "0000:00:05.0  net (transitional)  virtio-pci      5  nobody                eth0             no driver for it here: virtio-blk only, so far",
      "0000:00:06.0  blk                 virtio-pci   none  nobody                -                no IOMMU group: see `virtio doctor`",
      "0000:00:07.0  blk                 virtio-pci      7  nobody                -                virtio pci bind 0000:00:07.0",
      "0000:00:08.0  blk                 vfio-pci        8  nobody                -                ready: virtio info pci:0000:00:08.0",
      "0000:00:09.0  blk                 vfio-pci        9  0000:00:09.1 (e1000)  -                group 9 is not viable: the kernel uses 0000:00:09.1 (e1000): when nothing needs that, echo 0000:00:09.1 > /sys/bus/pci/devices/0000:00:09.1/driver/unbind",
    ]);
  });

  test("a group whose node is not there or not for this user is not ready", () => {
    machine.addFunction({ address: DISK, driver: "vfio-pci", group: 12 });
    const [disk] = listFunctions(machine);
    assert.deepEqual([disk?.ready, disk?.groupViable], [false, true]);
    assert.match(disk?.advice ?? "", /^this user may not use \S+vfio\/12: sudo chown \$USER /);
  });

  test("a machine without any says so", () => {
    assert.deepEqual(listFunctions(machine), []);
    assert.match(describeFunctions([]).join("\n"), /^no virtio function on PCI here/);
  });
});

describe("this machine", () => {
  const folder = new TemporaryFolder();
  after(() => folder.close());

  test("an attribute is written as it is, and never made", () => {
    writeFileSync(folder.file("attribute"), "before, and longer");
    THIS_MACHINE.write(folder.file("attribute"), "after");
    assert.equal(readFileSync(folder.file("attribute"), "utf8"), "aftere, and longer");
    assert.throws(() => THIS_MACHINE.write(folder.file("missing"), "text"), { code: "ENOENT" });
  });

  test("who has a file open, and that it can be opened", async () => {
    const path = folder.file("node");
    writeFileSync(path, "");
    const fd = openSync(path, "r");
    assert.deepEqual(openersOf(THIS_MACHINE, [path]), [], "this process does not count");
    const child = spawn("cat", { stdio: ["pipe", "ignore", fd] });
    try {
      assert.deepEqual(openersOf(THIS_MACHINE, [path]), [`${child.pid} (cat)`]);
      assert.equal(openErrno(THIS_MACHINE, path, constants.O_RDONLY | constants.O_EXCL), 0);
      assert.equal(openErrno(THIS_MACHINE, folder.file("missing"), constants.O_RDONLY), 2);
    } finally {
      child.stdin?.end();
      await once(child, "close");
      closeSync(fd);
    }
  });
});

describe("the command", () => {
  /** What `--json` prints of a function: names and kinds. Changing it breaks programs that read it. */
  const KINDS: Readonly<Record<string, string>> = {
    ...{ address: "string", type: "string", typeId: "number", transitional: "boolean", legacyOnly: "boolean" },
    ...{
      vendorId: "number",
      deviceId: "number",
      driver: "string|null",
      driverOverride: "string|null",
      group: "number|null",
    },
    ...{ groupMembers: "array", groupViable: "boolean|null", blockDevices: "array", interfaces: "array" },
    ...{ inUse: "array", ready: "boolean", advice: "string" },
  };

  test("pci list shows the functions of this machine, as text and as JSON", async () => {
    const text = await virtio(["pci", "list"]);
    assert.deepEqual([text.code, text.stderr], [0, ""]);
    const { code, stdout } = await virtio(["pci", "list", "--json"]);
    assert.equal(code, 0);
    const { functions, ...rest } = JSON.parse(stdout.toString()) as { functions: Record<string, unknown>[] };
    assert.deepEqual(rest, {});
    assert.equal(functions.length, listFunctions(THIS_MACHINE).length);
    for (const each of functions) {
      assert.deepEqual(Object.keys(each), Object.keys(KINDS));
      for (const [name, value] of Object.entries(each))
        assert.ok(KINDS[name]?.split("|").includes(kindOf(value)), name);
      assert.ok(text.stdout.toString().includes(String(each["address"])));
    }
  });

  const refused: readonly (readonly [words: string, stderr: RegExp])[] = [
    ["pci", /^virtio: ERR_VIRTIO_ARGUMENT: pci needs a subcommand: list, bind or unbind; try: virtio help pci\n$/],
    ["pci bnid 0000:00:04.0", /^virtio: ERR_VIRTIO_ARGUMENT: [^\n]*; try: virtio help pci\n$/],
    ["pci bnid", /^virtio: ERR_VIRTIO_ARGUMENT: pci has no 'bnid': list, bind or unbind; try: virtio help pci\n$/],
    ["pci bind", /^virtio: ERR_VIRTIO_ARGUMENT: missing required argument 'address'; try: virtio help pci\n$/],
    ["pci bind sda", /^virtio: ERR_VIRTIO_ADDRESS: "sda" is not the address of a PCI function[^\n]*\n$/],
    [
      "pci bind 00:04.0 --driver e1000",
      /^virtio: ERR_VIRTIO_ARGUMENT: [^\n]*'e1000' is invalid\. It is no name of a VFIO/,
    ],
    ["pci bind 00:04.0 --force", /^virtio: ERR_VIRTIO_ARGUMENT: unknown option '--force'; try: virtio help pci\n$/],
    ["pci unbind 00:04.0 --driver vfio-pci", /^virtio: ERR_VIRTIO_ARGUMENT: unknown option '--driver'/],
    ["pci list --all", /^virtio: ERR_VIRTIO_ARGUMENT: unknown option '--all'/],
  ];
  for (const [words, message] of refused) {
    test(`${words}: usage error`, async () => {
      const { code, stdout, stderr } = await virtio(words.split(" "));
      assert.deepEqual([code, stdout.toString()], [2, ""]);
      assert.match(stderr, message);
    });
  }

  test("a function that is not there: exit 4", async () => {
    const { code, stderr } = await virtio(["pci", "bind", "fffe:00:1f.7", "--dry-run"]);
    assert.equal(code, 4);
    assert.match(
      stderr,
      /^virtio: ERR_VIRTIO_CONNECT: there is no PCI function fffe:00:1f\.7[^\n]*ENOENT from open[^\n]*\n$/,
    );
  });

  for (const name of ["list", "bind", "unbind"]) {
    test(`pci ${name} --help`, async () => {
      const { code, stdout } = await virtio(["pci", name, "--help"]);
      assert.equal(code, 0);
      assert.match(stdout.toString(), new RegExp(`^Usage: virtio pci ${name} `));
    });
  }

  // Where the machine has such a disk; the tests of the guest always have one.
  const mounted = listFunctions(THIS_MACHINE).find(({ inUse }) => inUse.some((use) => use.includes("mounted")));
  if (mounted !== undefined) {
    test("a mounted disk of this machine stays with its driver", async () => {
      const { code, stdout, stderr } = await virtio(["pci", "bind", mounted.address, "--dry-run"]);
      assert.deepEqual([code, stdout.toString()], [4, ""]);
      assert.match(stderr, /^virtio: ERR_VIRTIO_BUSY: [^\n]* is in use: [^\n]*is mounted on [^\n]*\n$/);
    });
  }
});

function kindOf(value: unknown): string {
  return value === null ? "null" : Array.isArray(value) ? "array" : typeof value;
}
