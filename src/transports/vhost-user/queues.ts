/** Starting and stopping the queues ("Ring states"): order of messages, eventfds, the first kick. */

import {
  VhostUserRequest,
  VRING_BASE_PACKED,
  VRING_BASE_SPLIT,
  vringAddressCodec,
  vringFdCodec,
  vringStateCodec,
} from "../../protocol/vhost-user.js";
import { EventFd, FdWatcher, JamGuard } from "../../sys/index.js";
import type { VirtioError } from "../../errors.js";
import type { QueueNotifier, QueueSetup } from "../transport.js";
import type { Message, RequestChannel } from "./channel.js";
import { vringBaseReply } from "./channel.js";
import { INFLIGHT_REPLY, type InflightRegion, inflightRequest } from "./inflight.js";

/** A started queue: the two eventfds that it shares with the back-end, and one for its distress. */
export class VhostUserQueue implements QueueNotifier {
  readonly index: number;
  readonly completion: EventFd;
  readonly kick: EventFd;
  /** See `QueueNotifier.look`. */
  readonly look: () => VirtioError | undefined;
  readonly #error: EventFd;
  readonly #watcher: FdWatcher;

  constructor(index: number, onError: (index: number) => void, look: () => VirtioError | undefined) {
    this.look = look;
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

/** All queues of one device. */
export class VhostUserQueues {
  readonly #switched: boolean;
  readonly #tracked: boolean;
  readonly #onError: (index: number) => void;
  readonly #onJam: () => void;
  readonly #look: () => VirtioError | undefined;
  #jam: JamGuard | undefined = undefined;
  #channel: RequestChannel;
  #queues: VhostUserQueue[] = [];
  #setups: readonly QueueSetup[] = [];
  #packed = false;
  #inflight: InflightRegion | undefined = undefined;

  /**
   * @param options.switched bit 30 was negotiated: queues begin disabled. Without it they begin enabled and there is no
   *   message.
   * @param options.tracked INFLIGHT_SHMFD is in force.
   * @param options.onJam the back-end fills the counter of our notifications, to make us wait.
   * @param options.look see `QueueNotifier.look`.
   */
  constructor(
    channel: RequestChannel,
    options: {
      switched: boolean;
      tracked: boolean;
      onError: (index: number) => void;
      onJam: () => void;
      look: () => VirtioError | undefined;
    },
  ) {
    this.#channel = channel;
    this.#switched = options.switched;
    this.#tracked = options.tracked;
    this.#onError = options.onError;
    this.#onJam = options.onJam;
    this.#look = options.look;
  }

  /** Whether queues are started, or about to be. */
  get running(): boolean {
    return this.#queues.length > 0;
  }

  /** Highest index of a queue that runs, and one. */
  get count(): number {
    return this.#setups.reduce((most, { index }) => Math.max(most, index + 1), 0);
  }

  /** Whether another back-end can learn what this one has in flight. */
  get isTracked(): boolean {
    return this.#inflight !== undefined;
  }

  /**
   * Start the queues in two steps of one round trip each: first all that a back-end can refuse, then the
   * start itself. Nothing runs when this throws.
   */
  async start(setups: readonly QueueSetup[], packed: boolean): Promise<VhostUserQueue[]> {
    try {
      for (const { index } of setups) this.#queues.push(new VhostUserQueue(index, this.#onError, this.#look));
      this.#jam = new JamGuard(this.#onJam);
      for (const { kick } of this.#queues) this.#jam.add(kick);
      this.#setups = setups;
      this.#packed = packed;
      await this.#begin(setups.map(() => (packed ? VRING_BASE_PACKED : VRING_BASE_SPLIT)));
      return [...this.#queues];
    } catch (error) {
      this.close();
      throw error;
    }
  }

  /**
   * Start the queues on another back-end, which takes the place of the one before. They stay as they are when this
   * throws.
   *
   * @param bases where each goes on, the value of SET_VRING_BASE; undefined for the beginning.
   */
  async startAgain(channel: RequestChannel, bases: readonly (number | undefined)[]): Promise<void> {
    this.#channel = channel;
    // A region that was in use tells of rings that are no more.
    if (bases.includes(undefined)) this.#dropInflight();
    await this.#begin(bases.map((base) => base ?? (this.#packed ? VRING_BASE_PACKED : VRING_BASE_SPLIT)));
  }

  /** Stop the queues: no memory of theirs is touched any more once the back-end has answered. */
  async stop(): Promise<void> {
    await Promise.all(this.#halt());
    this.close();
  }

  /** Free the eventfds, and what tracks requests in flight. */
  close(): void {
    this.#jam?.close();
    this.#jam = undefined;
    for (const queue of this.#queues.splice(0)) queue.close();
    this.#dropInflight();
  }

  async #begin(bases: readonly number[]): Promise<void> {
    const queues = this.#queues;
    // Alone, so that the descriptor in the reply cannot be taken for another's.
    if (this.#tracked) this.#inflight ??= await this.#channel.call(inflightRequest(this.#setups), INFLIGHT_REPLY);
    // The region behind the bases and before the rings start: back-ends go through the queues that they know by then.
    await this.#channel.confirm([
      ...this.#setups.flatMap((setup, i) => position(setup, bases[i])),
      ...(this.#inflight === undefined ? [] : [this.#inflight.handedOver]),
      ...this.#setups.flatMap((setup, i) => [addresses(setup), ...queues[i].listening]),
    ]);
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
  }

  #dropInflight(): void {
    this.#inflight?.close();
    this.#inflight = undefined;
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

/** Size and first position. */
function position({ index, size }: QueueSetup, base: number): Message[] {
  return [
    { request: VhostUserRequest.SET_VRING_NUM, payload: vringStateCodec.encode({ index, num: size }) },
    { request: VhostUserRequest.SET_VRING_BASE, payload: vringStateCodec.encode({ index, num: base }) },
  ];
}

function addresses({ index, descriptorArea, driverArea, deviceArea }: QueueSetup): Message {
  const areas = { index, flags: 0, desc: descriptorArea, used: deviceArea, avail: driverArea, log: 0 };
  return { request: VhostUserRequest.SET_VRING_ADDR, payload: vringAddressCodec.encode(areas) };
}

function enable(index: number, num: 0 | 1): Message {
  return { request: VhostUserRequest.SET_VRING_ENABLE, payload: vringStateCodec.encode({ index, num }) };
}
