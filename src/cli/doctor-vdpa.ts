/** What `virtio doctor` finds about vhost-vdpa. No node is opened: opening one resets its device. */

import { basename, join, sep } from "node:path";
import { entries, readLink } from "../sys/kernel-files.js";
import { type Finding, findingsOf, oneIsEnough } from "./doctor-findings.js";
import { memlockFinding } from "./doctor-pci.js";
import { type Machine, mayUse, moduleFix, openersOf, realPath } from "./machine.js";

const { ok, missing, notNeeded } = findingsOf("vhost-vdpa");

/** Everything on the way to a vDPA device. */
export function vdpaFindings(machine: Machine): Finding[] {
  const folder = join(machine.sys, "bus/vdpa/devices");
  const names = entries(folder);
  // Devices that a process serves (VDUSE) reach memory through that process: nothing is pinned.
  const pins = names.filter((name) => !realPath(join(folder, name)).includes(`${sep}vduse${sep}`));
  return [
    driver(machine),
    ...devices(machine, folder, names),
    vduse(machine),
    memlockFinding(machine, "vhost-vdpa", pins.length > 0),
  ];
}

function driver(machine: Machine): Finding {
  if (entries(join(machine.sys, "bus/vdpa/drivers")).includes("vhost_vdpa")) {
    return ok("vhost-vdpa", "The driver is loaded.");
  }
  return missing("vhost-vdpa", "The driver is not loaded.", moduleFix(machine, "vhost-vdpa", "VHOST_VDPA"));
}

function devices(machine: Machine, folder: string, names: readonly string[]): Finding[] {
  if (names.length === 0) {
    const fix = "vdpa dev add name vdpa0 mgmtdev NAME, with a NAME that `vdpa mgmtdev show` lists";
    return [missing("device", "There is no vDPA device.", fix)];
  }
  const types = machine.vdpaTypes();
  const titled = (name: string): string => `${name} (${types.get(name) ?? "type not known"})`;
  return oneIsEnough(names.map((name) => device(machine, join(folder, name), titled(name))));
}

/** A device, which is reached by the node that vhost_vdpa makes for it. */
function device(machine: Machine, folder: string, title: string): Finding {
  const name = basename(folder);
  const bound = basename(readLink(join(folder, "driver")) ?? "");
  if (bound !== "vhost_vdpa") {
    const drivers = join(machine.sys, "bus/vdpa/drivers");
    const free = bound === "" ? "" : `echo ${name} > ${join(drivers, bound, "unbind")}; `;
    const fix = `${free}echo ${name} > ${join(drivers, "vhost_vdpa/bind")}`;
    return missing(
      "device",
      `${title} has ${bound === "" ? "no driver" : `the driver ${bound}`}, not vhost_vdpa.`,
      fix,
    );
  }
  const entry = entries(folder).find((each) => each.startsWith("vhost-vdpa-"));
  const node = join(machine.dev, entry ?? "vhost-vdpa-?");
  if (entry === undefined || !entries(machine.dev).includes(entry)) {
    return missing("device", `${title} has no node ${node}.`, "udevadm trigger");
  }
  if (!mayUse(node)) return missing("device", `${title}: this user may not use ${node}.`, `sudo chown $USER ${node}`);
  const openers = openersOf(machine, [node]);
  const state = openers.length > 0 ? `is in use by process ${openers.join(", ")}` : "can be opened";
  return ok("device", `${title}, ${node}, ${state}.`);
}

function vduse(machine: Machine): Finding {
  const node = join(machine.dev, "vduse/control");
  if (entries(join(machine.dev, "vduse")).includes("control")) {
    return ok("VDUSE", `${node} is there: processes can serve vDPA devices.`);
  }
  return notNeeded(
    "VDUSE",
    `There is no ${node}, by which processes serve vDPA devices.`,
    moduleFix(machine, "vduse", "VDPA_USER"),
  );
}
