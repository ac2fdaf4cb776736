/** Nothing stays open or mapped when a call fails: vhost-vdpa and PCI on fake devices, VFIO on a model of the kernel. */

import assert from "node:assert/strict";
import { after, describe, test } from "node:test";
import { FileStorage } from "../../src/backend/index.js";
import { BlockDevice } from "../../src/devices/blk/index.js";
import { MemoryRegion } from "../../src/memory/index.js";
import { VirtioFeature } from "../../src/virtqueue/index.js";
import { encodeBlkConfig } from "../../src/protocol/blk.js";
import { EventFd } from "../../src/sys/index.js";
import { FakePciFunction, FakeVhostVdpa, takeBlk } from "../../src/testing/index.js";
import { openVfio } from "../../src/transports/pci/vfio.js";
import { Pci, VhostVdpa } from "../../src/transports/index.js";
import { VfioKernel } from "../transports/pci/vfio-kernel.js";
import { BASE, CONFIG, live as livePci } from "../transports/pci/support.js";
import { diskKernel, live as liveVdpa } from "../transports/vhost-vdpa/support.js";
import { numberCalls } from "./calls.js";
import { refuseEachCall } from "./each-call.js";
import { workFolder } from "./embedded.js";

/** The kernel of the running test. */
let kernel: VfioKernel | undefined;

numberCalls(
  (name, words) => {
    const [fd, request, argument] = words;
    if (name !== "ioctl" || typeof fd !== "number" || typeof request !== "number") return undefined;
    if (typeof argument !== "number" && !(argument instanceof Uint8Array)) return undefined;
    return kernel?.ioctl(fd, request, argument);
  },
  (fd) => kernel?.onClose(fd),
);
const folder = workFolder();
after(() => folder.remove());

/** Read and write a disk, then close it. */
async function use(disk: BlockDevice): Promise<void> {
  try {
    const buffer = await disk.allocate(4096);
    await disk.write(buffer);
    await disk.read(new Uint8Array(512));
    buffer.release();
  } finally {
    await disk.close();
  }
}

/** Open a function, use each part of it, and close it. */
function useVfio(model: VfioKernel): void {
  const events: EventFd[] = [];
  let region: MemoryRegion | undefined;
  try {
    for (let i = 0; i < 4; i++) events.push(EventFd.create());
    region = MemoryRegion.create({ name: "virtio-leaks", size: 1, iova: 2 ** 32 });
    const opened = openVfio(model.facts.address, model.roots);
    try {
      opened.openRegisters(4, 0x2000, 0x1000).write(0, 4, 1);
      opened.openRegisters(0, 0, 64).read(0, 4);
      opened.setMsix(events.slice(0, 3));
      opened.setRelease(events[3]);
      opened.mapDma(region);
      opened.unmapDma(region);
      opened.setMsix([]);
      opened.reset();
    } finally {
      opened.close();
    }
  } finally {
    region?.close();
    for (const event of events) event.close();
  }
}

describe("every call refused in turn leaves nothing behind:", () => {
  test("a vhost-vdpa transport with memory and queues", async () => {
    const run = (): Promise<void> =>
      liveVdpa(new FakeVhostVdpa({ config: new Uint8Array(60), maxQueues: 2, backendFeatures: 0x30n }));
    assert.ok((await refuseEachCall({ run })) > 10);
  });

  test("a disk on vhost-vdpa", async () => {
    await refuseEachCall({
      run: async () => {
        const node = diskKernel().kernel.open();
        await use(await BlockDevice.open(await VhostVdpa.open({ node }), { queues: 2 }));
      },
    });
  });

  for (const [interrupts, msixVectors] of [
    ["MSI-X", 3],
    ["INTx", 0],
  ] as const) {
    test(`a PCI transport with ${interrupts}`, async () => {
      const run = (): Promise<void> =>
        livePci(
          new FakePciFunction({
            msixVectors,
            queueSizes: [16, 16],
            config: CONFIG,
            features: BASE | VirtioFeature.RING_RESET,
          }),
        );
      assert.ok((await refuseEachCall({ run })) > 10);
    });

    test(`a disk on PCI with ${interrupts}`, async () => {
      await refuseEachCall({
        run: async () => {
          const fn = new FakePciFunction({
            msixVectors,
            config: encodeBlkConfig({ capacity: 2048n }),
            onNotify: (queue) => {
              for (const request of takeBlk(queue)) request.answer({ data: new Uint8Array(request.room) });
            },
          });
          await use(await BlockDevice.open(await Pci.attach(fn)));
        },
      });
    });
  }

  test("a function by VFIO: registers, interrupts, memory", async () => {
    const calls = await refuseEachCall({
      run: async () => {
        const model = new VfioKernel();
        kernel = model;
        try {
          useVfio(model);
        } finally {
          kernel = undefined;
          model.remove();
        }
      },
    });
    assert.ok(calls > 30, `${calls} calls`);
  });

  test("a file as a disk, without a back-end", async () => {
    await refuseEachCall({
      run: async () => {
        const storage = FileStorage.open(folder.image);
        try {
          await storage.write(512, new Uint8Array(4096));
          await storage.read(0, new Uint8Array(65_536));
          await storage.discard(0, 4096);
          await storage.writeZeroes(4096, 4096, true);
          await storage.flush();
        } finally {
          await storage.close();
        }
      },
    });
  });
});
