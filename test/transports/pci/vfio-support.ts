/** What the tests of VFIO share: a model of the kernel below the package, and counts of what is open and mapped. */

import assert from "node:assert/strict";
import fs from "node:fs";
import { syncBuiltinESMExports } from "node:module";
import type { TestContext } from "node:test";
import type { PciFunction } from "../../../src/transports/pci/function.js";
import { openVfio } from "../../../src/transports/pci/vfio.js";
import { layerNative } from "../../support/native.js";
import { mappings, openFds } from "../../sys/helpers.js";
import { type ModelFacts, VfioKernel } from "./vfio-kernel.js";

/** The machines of the running test. */
const kernels = new Set<VfioKernel>();
const openedBy = new WeakMap<VfioKernel, PciFunction[]>();
/** Descriptors that were open before the first of them. */
let openBefore = 0;
/** What mmap is to answer instead; a negative errno. */
let mmapAnswer: number | undefined;

layerNative((addon) => ({
  ioctl(fd, request, argument) {
    for (const kernel of kernels) {
      const answer = kernel.ioctl(fd, request, argument);
      if (answer !== undefined) return answer;
    }
    return addon.ioctl(fd, request, argument);
  },
  close(fd) {
    for (const kernel of kernels) kernel.onClose(fd);
    return addon.close(fd);
  },
  mmap: (...args) => mmapAnswer ?? addon.mmap(...args),
}));

/** Let every mmap fail while `work` runs. */
export function withoutMmap(answer: number, work: () => void): void {
  mmapAnswer = answer;
  try {
    work();
  } finally {
    mmapAnswer = undefined;
  }
}

/** A machine for one test. When the test ends nothing may be open or mapped that was not before. */
export function machine(t: TestContext, facts: Partial<ModelFacts> = {}): VfioKernel {
  const kernel = new VfioKernel(facts);
  if (kernels.size === 0) openBefore = openFds();
  kernels.add(kernel);
  t.after(() => {
    for (const opened of openedBy.get(kernel) ?? []) opened.close();
    kernels.delete(kernel);
    kernel.remove();
    assert.deepEqual(kernel.open, [], "descriptors of VFIO that stayed open");
    if (kernels.size === 0) {
      assert.equal(openFds(), openBefore, "descriptors that stayed open");
      assert.deepEqual(mappings("vfio-model"), []);
    }
  });
  return kernel;
}

/** Open the function of a machine, closed at the end of the test at the latest. */
export function open(kernel: VfioKernel): PciFunction {
  const opened = openVfio(kernel.facts.address, kernel.roots);
  openedBy.set(kernel, [...(openedBy.get(kernel) ?? []), opened]);
  return opened;
}

/** Put a function in the place of one of node:fs while `work` runs. */
export function withFs<K extends "openSync" | "readSync" | "writeSync">(
  name: K,
  replacement: (real: (typeof fs)[K]) => unknown,
  work: () => void,
): void {
  const real = fs[name];
  Reflect.set(fs, name, replacement(real));
  syncBuiltinESMExports();
  try {
    work();
  } finally {
    Reflect.set(fs, name, real);
    syncBuiltinESMExports();
  }
}

/** The error that Node.js throws when the kernel refuses. */
export function refusal(code: string, errno: number, syscall: string): Error {
  return Object.assign(new Error(`${code}: refused, ${syscall}`), { code, errno: -errno, syscall });
}
