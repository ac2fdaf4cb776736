/** Starting and stopping the queues ("Ring states"): order of messages, eventfds, the first kick. */

import {
  VhostUserRequest,
  VRING_BASE_PACKED,
  VRING_BASE_SPLIT,
  vringAddressCodec,
  vringFdCodec,
  vringStateCodec,
} from "../../protocol/vhost-user.js";
import { EventFd, FdWatcher } from "../../sys/index.js";
import type { QueueNotifier, QueueSetup } from "../transport.js";
import type { Message, RequestChannel } from "./channel.js";
import { vringBaseReply } from "./channel.js";

/** A started queue: the two eventfds that it shares with the back-end, and one for its distress. */
export class VhostUserQueue implements QueueNotifier {
  readonly index: number;
  readonly completion: EventFd;
  readonly kick: EventFd;
  readonly #error: EventFd;
  readonly #watcher: FdWatcher;

  constructor(index: number, onError: (index: number) => void) {
    const made: EventFd[] = [];
    const make = () => {
      const event = EventFd.create();
      made.push(event);
      return event;
    };
    try {
      this.index = index;
      this.completion = make();
      this.kick = make();
      this.#error = make();
      this.#watcher = new FdWatcher(this.#error.fd, { drain: true }, () => onError(index));
      this.#watcher.unref();
    } catch (error) {
      for (const event of made) event.close();
      throw error;
    }
  }

  /** The value of `VIRTIO_F_NOTIFICATION_DATA` has no way through an eventfd and is not taken. */
  notify(): void {
    this.kick.signal();
  }

  /** `SET_VRING_CALL` and `SET_VRING_ERR`. */
  get listening(): Message[] {
    return [
      this.#pass(VhostUserRequest.SET_VRING_CALL, this.completion),
      this.#pass(VhostUserRequest.SET_VRING_ERR, this.#error),
    ];
  }

  /** `SET_VRING_KICK`, which starts the queue. */
  get starting(): Message {
    return this.#pass(VhostUserRequest.SET_VRING_KICK, this.kick);
  }

  /** Close everything; the back-end has its own descriptors. Idempotent. */
  close(): void {
    this.#watcher.close();
    this.#error.close();
    this.kick.close();
    this.completion.close();
  }

  #pass(request: number, event: EventFd): Message {
    return { request, payload: vringFdCodec.encode({ index: this.index, noFd: false }), fds: [event.fd] };
  }
}

/** All queues of one connection. */
export class VhostUserQueues {
  readonly #channel: RequestChannel;
  /** Bit 30 was negotiated: queues begin disabled. Without it they begin enabled and there is no message. */
  readonly #switched: boolean;
  readonly #onError: (index: number) => void;
  #queues: VhostUserQueue[] = [];

  constructor(channel: RequestChannel, switched: boolean, onError: (index: number) => void) {
    this.#channel = channel;
    this.#switched = switched;
    this.#onError = onError;
  }

  /** Whether queues are started, or about to be. */
  get running(): boolean {
    return this.#queues.length > 0;
  }

  /**
   * Start the queues in two steps of one round trip each: first all that a back-end can refuse, then the
   * start itself. Nothing runs when this throws.
   */
  async start(setups: readonly QueueSetup[], packed: boolean): Promise<VhostUserQueue[]> {
    try {
      for (const { index } of setups) this.#queues.push(new VhostUserQueue(index, this.#onError));
      const queues = this.#queues;
      await this.#channel.confirm(
        setups.flatMap((setup, i) => [...configuration(setup, packed), ...(queues[i]?.listening ?? [])]),
      );
      try {
        await this.#channel.confirm(
          queues.flatMap((queue) => [queue.starting, ...(this.#switched ? [enable(queue.index, 1)] : [])]),
        );
      } catch (error) {
        await Promise.allSettled(this.#halt());
        throw error;
      }
      // Only now, and always once: older back-ends start a queue at its first kick, and one that is kicked
      // while still disabled may consume requests without doing them.
      for (const queue of queues) queue.notify();
      return [...queues];
    } catch (error) {
      this.close();
      throw error;
    }
  }

  /** Stop the queues: no memory of theirs is touched any more once the back-end has answered. */
  async stop(): Promise<void> {
    await Promise.all(this.#halt());
    this.close();
  }

  /** Free the eventfds. */
  close(): void {
    for (const queue of this.#queues.splice(0)) queue.close();
  }

  /** `GET_VRING_BASE` stops a queue; its reply also confirms the message before it. */
  #halt(): Promise<unknown>[] {
    return this.#queues.map(({ index }) => {
      if (this.#switched) this.#channel.post(enable(index, 0));
      const payload = vringStateCodec.encode({ index, num: 0 });
      return this.#channel.call({ request: VhostUserRequest.GET_VRING_BASE, payload }, vringBaseReply(index));
    });
  }
}

/** Size, first position and addresses, in the order that suits every back-end. */
function configuration(setup: QueueSetup, packed: boolean): Message[] {
  const { index, size, descriptorArea, driverArea, deviceArea } = setup;
  const base = packed ? VRING_BASE_PACKED : VRING_BASE_SPLIT;
  const areas = { index, flags: 0, desc: descriptorArea, used: deviceArea, avail: driverArea, log: 0 };
  return [
    { request: VhostUserRequest.SET_VRING_NUM, payload: vringStateCodec.encode({ index, num: size }) },
    { request: VhostUserRequest.SET_VRING_BASE, payload: vringStateCodec.encode({ index, num: base }) },
    { request: VhostUserRequest.SET_VRING_ADDR, payload: vringAddressCodec.encode(areas) },
  ];
}

function enable(index: number, num: 0 | 1): Message {
  return { request: VhostUserRequest.SET_VRING_ENABLE, payload: vringStateCodec.encode({ index, num }) };
}
