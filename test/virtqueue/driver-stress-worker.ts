/** The device of the stress test, in a thread of its own: really concurrent with the driver, really sleeping. */

import { parentPort, workerData } from "node:worker_threads";
import { mapShared } from "../../src/sys/index.js";
import { DescriptorChain, DeviceMemory, DeviceVirtqueue, VirtqueueLayout } from "../../src/virtqueue/index.js";
import {
  Aim,
  BELL_DEVICE,
  BELL_DRIVER,
  BELLS_STOP,
  DEVICE_SLEEPS,
  type StressSetup,
  STRESS_BASE,
  STRESS_BYTES,
  STRESS_FRAME,
  STRESS_REQUEST,
  waitFor,
} from "./driver-stress-shared.js";

const { fd, features, queueSize, doorbells, inOrder } = workerData as StressSetup;
const bells = new Int32Array(doorbells);
const layout = new VirtqueueLayout({ queueSize, features, request: STRESS_REQUEST });
const buffer = mapShared(fd, STRESS_BYTES);
const memory = new DeviceMemory();
memory.add(BigInt(STRESS_BASE), buffer);
const device = new DeviceVirtqueue({
  ...{ queueSize, features, memory },
  descriptorArea: { buffer, offset: 0 },
  driverArea: { buffer, offset: layout.driverAreaOffset },
  deviceArea: { buffer, offset: layout.deviceAreaOffset },
});
const chain = new DescriptorChain(queueSize);
const header = new Uint8Array(STRESS_FRAME.headerLength);
const words = new Uint32Array(header.buffer);
const answer = new Uint8Array(5);
const ids = new Uint32Array(queueSize);
const counts = new Uint32Array(queueSize);

/** Do one request: what the driver sent must be whole and new, else the answer is not the expected one. */
function serve(): void {
  chain.read(memory, 0, header);
  const isWhole = words[1] === (words[0] ^ 0x5a5a_5a5a) >>> 0 && words[2] === words[0] && words[3] === words[0];
  new DataView(answer.buffer).setUint32(0, isWhole ? ~words[0] >>> 0 : words[0], true);
  answer[4] = words[0] & 0x7f;
  chain.write(memory, 0, answer);
}

function run(): void {
  const aim = new Aim();
  let random = 12345;
  parentPort?.postMessage("ready");
  for (;;) {
    // Before the search, so that no ring of the bell is missed.
    const bell = Atomics.load(bells, BELL_DEVICE);
    let taken = 0;
    random = (random * 1103515245 + 12345) & 0x7fffffff;
    const most = 1 + (random % 7);
    while (taken < most && device.pop(chain)) {
      serve();
      ids[taken] = chain.id;
      counts[taken] = chain.ringCount;
      taken++;
    }
    if (taken > 0) {
      if (inOrder) {
        let ringCount = 0;
        for (let i = 0; i < taken; i++) ringCount += counts[i];
        device.pushBatch(ids[taken - 1], taken, ringCount, 5);
      } else {
        for (let i = taken - 1; i >= 0; i--) device.push(ids[i], counts[i], 5);
      }
      if (device.publish()) {
        Atomics.add(bells, BELL_DRIVER, 1);
        Atomics.notify(bells, BELL_DRIVER);
      }
      continue;
    }
    if (Atomics.load(bells, BELLS_STOP) !== 0) return;
    if (Atomics.load(bells, DEVICE_SLEEPS) === 0) continue;
    aim.wait(bells);
    const isLate = device.enableNotifications();
    aim.adjust(isLate);
    if (!isLate) waitFor(bells, BELL_DEVICE, bell, "the device waits for a notification that never comes");
    device.disableNotifications();
  }
}

try {
  run();
} catch (error) {
  Atomics.store(bells, BELLS_STOP, 2);
  Atomics.add(bells, BELL_DRIVER, 1);
  Atomics.notify(bells, BELL_DRIVER);
  parentPort?.postMessage(error);
}
