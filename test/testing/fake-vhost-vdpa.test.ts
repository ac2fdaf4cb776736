/** FakeVhostVdpa itself: it keeps the kernel's rules, which a driver that breaks them learns from it. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { VirtioError } from "../../src/errors.js";
import { MemoryRegion } from "../../src/memory/index.js";
import {
  type IotlbMessage,
  iotlbMessageCodec,
  u64Codec,
  vdpaConfigCodec,
  VhostVdpaRequest as R,
  vringAddressCodec,
  vringFileCodec,
  vringStateCodec,
} from "../../src/protocol/index.js";
import { addressOf, EventFd } from "../../src/sys/index.js";
import { FakeVhostVdpa, type FakeVhostVdpaOptions } from "../../src/testing/index.js";
import { VirtioFeature } from "../../src/virtqueue/index.js";
import { openFds } from "../sys/helpers.js";

/** The errno by its name that a call is refused with; undefined when it is not. */
function refusal(call: () => void): string | undefined {
  try {
    call();
    return undefined;
  } catch (error) {
    if (!(error instanceof VirtioError)) throw error;
    return /: (E\w+) from (?:ioctl|write|open|close)/.exec(error.message)?.[1];
  }
}

function opened(options: FakeVhostVdpaOptions = {}, isOwner = true) {
  const kernel = new FakeVhostVdpa(options);
  const node = kernel.open();
  if (isOwner) node.ioctl(R.SET_OWNER);
  const ioctl = (request: number, argument?: Uint8Array) => refusal(() => node.ioctl(request, argument));
  const status = (value: number) => ioctl(R.SET_STATUS, Uint8Array.of(value));
  const iotlb = (message: Partial<IotlbMessage<number | bigint>>) =>
    refusal(() =>
      node.write(
        iotlbMessageCodec.encode({
          ...{ version: 2, asid: 0, type: 2, iova: 0x20_0000, size: 4096, uaddr: 0, perm: 3 },
          ...message,
        }),
      ),
    );
  return { kernel, node, ioctl, status, iotlb };
}

describe("the owner", () => {
  test("comes first, and once; whoever has it open keeps others out", () => {
    const { kernel, node, ioctl, iotlb } = opened({}, false);
    const state = vringStateCodec.encode({ index: 0, num: 8 });
    assert.equal(ioctl(R.SET_VRING_NUM, state), "EPERM");
    assert.equal(iotlb({}), "EFAULT");
    assert.equal(ioctl(R.GET_DEVICE_ID, new Uint8Array(4)), undefined);
    assert.equal(ioctl(R.SET_OWNER), undefined);
    assert.equal(ioctl(R.SET_OWNER), "EBUSY");
    assert.equal(ioctl(R.SET_VRING_NUM, state), undefined);
    assert.equal(
      refusal(() => kernel.open()),
      "EBUSY",
    );
    node.close();
    assert.equal(ioctl(R.SET_OWNER), "EBADF");
    assert.equal(
      refusal(() => kernel.open().close()),
      undefined,
    );
    assert.deepEqual(kernel.log.slice(0, 3), [
      "SET_VRING_NUM 0 8 -> EPERM",
      "IOTLB_UPDATE 0x200000 4096 -> EFAULT",
      "GET_DEVICE_ID",
    ]);
  });
});

describe("status and features", () => {
  test("bits are never taken back but by a reset; features are fixed with FEATURES_OK", () => {
    const { kernel, ioctl, status } = opened();
    const { VERSION_1, ACCESS_PLATFORM, RING_PACKED } = VirtioFeature;
    const features = (bits: bigint) => ioctl(R.SET_FEATURES, u64Codec.encode(bits));
    assert.deepEqual([status(1), status(3), status(1)], [undefined, undefined, "EINVAL"]);
    assert.equal(features(VERSION_1), "EINVAL");
    assert.equal(features(VERSION_1 | ACCESS_PLATFORM | RING_PACKED), "EINVAL");
    assert.equal(features(VERSION_1 | ACCESS_PLATFORM), undefined);
    assert.equal(status(11), undefined);
    assert.equal(features(VERSION_1 | ACCESS_PLATFORM), "EBUSY");
    assert.equal(kernel.features, VERSION_1 | ACCESS_PLATFORM);
    assert.deepEqual([status(0), kernel.status, kernel.features], [undefined, 0, 0n]);
  });

  test("config space has an end, and stretches have a length", () => {
    const { kernel, ioctl } = opened({ config: Uint8Array.of(1, 2, 3, 4) });
    const at = (offset: number, length: number) => vdpaConfigCodec.encode({ offset, data: new Uint8Array(length) });
    const whole = at(0, 4);
    assert.equal(ioctl(R.GET_CONFIG, whole), undefined);
    assert.deepEqual([...whole.subarray(8)], [1, 2, 3, 4]);
    for (const [offset, length] of [
      [0, 5],
      [4, 1],
      [0, 0],
      [0xffff_ffff, 1],
    ]) {
      assert.equal(ioctl(R.GET_CONFIG, at(offset, length)), "EINVAL");
      assert.equal(ioctl(R.SET_CONFIG, at(offset, length)), "EINVAL");
    }
    assert.deepEqual([...kernel.config], [1, 2, 3, 4]);
  });

  test("requests that are too new, features of the interface that were not offered, what is no request", () => {
    const { ioctl } = opened({ unknown: [R.GET_VQS_COUNT], backendFeatures: 2n });
    assert.equal(ioctl(R.GET_VQS_COUNT, new Uint8Array(4)), "ENOTTY");
    assert.equal(ioctl(R.SET_BACKEND_FEATURES, u64Codec.encode(4n)), "ENOTSUP");
    assert.equal(ioctl(R.SUSPEND), "ENOTSUP");
    assert.equal(ioctl(R.RESUME), "ENOTSUP");
    assert.equal(ioctl(0x3b64), "ENOTTY");
    assert.equal(ioctl(0x4008_af99, new Uint8Array(8)), "ENOTTY");
  });
});

describe("queues", () => {
  test("sizes are powers of two, packed or not; indices exist; areas are aligned; a base is the beginning", () => {
    const { ioctl } = opened({ maxQueues: 2 });
    const num = (index: number, value: number) => ioctl(R.SET_VRING_NUM, vringStateCodec.encode({ index, num: value }));
    assert.deepEqual([num(0, 8), num(1, 32_768)], [undefined, undefined]);
    assert.deepEqual([num(0, 0), num(0, 12), num(0, 65_536), num(2, 8)], ["EINVAL", "EINVAL", "EINVAL", "ENOBUFS"]);
    const addr = (desc: number, avail: number, used: number, flags = 0) =>
      ioctl(R.SET_VRING_ADDR, vringAddressCodec.encode({ index: 0, flags, desc, avail, used, log: 0 }));
    assert.equal(addr(16, 2, 4), undefined);
    assert.deepEqual([addr(8, 2, 4), addr(16, 1, 4), addr(16, 2, 6)], ["EINVAL", "EINVAL", "EINVAL"]);
    assert.equal(addr(16, 2, 4, 2), "ENOTSUP");
    assert.equal(ioctl(R.SET_VRING_BASE, vringStateCodec.encode({ index: 0, num: 0x8000_8000 })), "EINVAL");
    assert.equal(ioctl(R.SET_VRING_ENABLE, vringStateCodec.encode({ index: 0, num: 2 })), "EINVAL");
  });

  test("an eventfd is taken over by a reference of its own, let go by -1 and at the end", () => {
    const event = EventFd.create();
    const before = openFds();
    const { node, ioctl } = opened();
    const call = (fd: number) => ioctl(R.SET_VRING_CALL, vringFileCodec.encode({ index: 0, fd }));
    assert.equal(call(0x7fff_fff0), "EBADF");
    assert.equal(call(event.fd), undefined);
    assert.equal(openFds(), before + 1);
    assert.equal(call(-1), undefined);
    assert.equal(openFds(), before);
    assert.equal(call(event.fd), undefined);
    node.close();
    assert.equal(openFds(), before);
    event.close();
  });

  test("a queue where there is none makes the device need a reset", () => {
    const { kernel, ioctl, status } = opened();
    for (const bits of [1, 3]) status(bits);
    ioctl(R.SET_FEATURES, u64Codec.encode(VirtioFeature.VERSION_1 | VirtioFeature.ACCESS_PLATFORM));
    status(11);
    const state = (num: number) => vringStateCodec.encode({ index: 0, num });
    ioctl(R.SET_VRING_NUM, state(8));
    ioctl(
      R.SET_VRING_ADDR,
      vringAddressCodec.encode({ index: 0, flags: 0, desc: 0x1000, avail: 0x1080, used: 0x1098, log: 0 }),
    );
    ioctl(R.SET_VRING_ENABLE, state(1));
    assert.equal(status(15), undefined);
    assert.equal(kernel.status, 0x4f);
    assert.deepEqual(kernel.queues, []);
  });
});

describe("memory", () => {
  test("is mapped once, in range, by whole pages, and found where the driver has it", (t) => {
    const { kernel, node, iotlb } = opened({ iovaRange: { first: 0x10_0000n, last: 0xffff_ffffn } });
    const region = MemoryRegion.create({ name: "virtio-driver-test", size: 2 ** 21, iova: 2 ** 21 });
    t.after(() => region.close());
    const uaddr = addressOf(region.buffer);
    assert.deepEqual(
      [
        iotlb({ uaddr, size: 4095 }),
        iotlb({ uaddr, iova: 0x20_0001 }),
        iotlb({ uaddr: uaddr + 1 }),
        iotlb({ uaddr, iova: 0xf_f000 }),
        iotlb({ uaddr, iova: 0xffff_f000, size: 8192 }),
        iotlb({ uaddr, iova: 0xffff_ffff_ffff_f000n, size: 8192 }),
        iotlb({ uaddr, asid: 1 }),
        iotlb({ uaddr, perm: 0 }),
        iotlb({ uaddr, type: 9 }),
        iotlb({ type: 3, uaddr: 0, perm: 0 }),
      ],
      Array.from({ length: 10 }, () => "EFAULT"),
    );
    assert.equal(iotlb({ uaddr, size: 0 }), "EINVAL");
    assert.equal(
      refusal(() => node.write(new Uint8Array(71))),
      "EINVAL",
    );
    assert.equal(iotlb({ uaddr: uaddr + 4096, size: 8192 }), undefined);
    assert.equal(iotlb({ uaddr, iova: 0x20_1000 }), "EFAULT");
    new Uint8Array(region.buffer)[4096 + 5000] = 77;
    assert.equal(kernel.memory.bytes[0][5000], 77);
    assert.equal(iotlb({ version: 1, type: 3, iova: 0x20_1000, uaddr: 0, perm: 0 }), undefined);
    assert.deepEqual([kernel.mappings, kernel.memory.bytes.length], [0, 0]);
  });

  test("that is no shared mapping of a file is taken without a word, and the device does not reach it", () => {
    const { kernel, iotlb, node } = opened();
    const anonymous = addressOf(new ArrayBuffer(1 << 21));
    assert.equal(iotlb({ uaddr: Math.ceil(anonymous / 4096) * 4096 }), undefined);
    assert.deepEqual([kernel.mappings, kernel.memory.bytes.length], [1, 0]);
    node.close();
    assert.equal(kernel.mappings, 0);
  });
});

test("calls are refused by name or by number, as a test wants", () => {
  const { kernel, ioctl } = opened();
  kernel.failures.set("GET_FEATURES", 5);
  assert.deepEqual(
    [ioctl(R.GET_FEATURES, new Uint8Array(8)), ioctl(R.GET_STATUS, new Uint8Array(1))],
    ["EIO", undefined],
  );
  kernel.failures.clear();
  kernel.failures.set(kernel.calls, 19);
  assert.deepEqual(
    [ioctl(R.GET_STATUS, new Uint8Array(1)), ioctl(R.GET_STATUS, new Uint8Array(1))],
    ["ENODEV", undefined],
  );
  assert.equal(kernel.log.filter((line) => line === "GET_STATUS -> ENODEV").length, 1);
});

test("options that cannot be are refused", () => {
  const wrong: Record<string, unknown>[] = [
    { feature: 1n },
    { features: 1 },
    { features: -1n },
    { config: [1] },
    { maxQueueSize: 65_536 },
    { maxQueues: -1 },
    { iovaRange: { first: 0n, last: 1n << 64n } },
    { onNotify: 1 },
  ];
  for (const options of wrong) {
    assert.throws(() => new FakeVhostVdpa(options), { code: "ERR_VIRTIO_ARGUMENT" });
  }
});
