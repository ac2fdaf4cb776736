/** The ways to reach a device. */

export type { QueueNotifier, QueueSetup, VirtioTransport, WaitOptions } from "./transport.js";
export { VhostUser, type VhostUserOptions, type VhostUserTarget } from "./vhost-user/vhost-user.js";
