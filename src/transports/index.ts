/** The ways to reach a device. */

export {
  type QueueNotifier,
  type QueueSetup,
  type VirtioTransport,
  type WaitOptions,
  waitOptions,
} from "./transport.js";
export { VhostUser, type VhostUserOptions, type VhostUserTarget } from "./vhost-user/vhost-user.js";
