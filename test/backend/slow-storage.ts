/** A disk for the tests of the back-end that answers when it is told to, and waiting until it was asked. */

import assert from "node:assert/strict";
import type { BlockStorage } from "../../src/backend/index.js";
import { turns } from "./front-end.js";

/** A storage in plain memory whose answers the test gives, one by one. */
export class SlowStorage implements BlockStorage {
  readonly capacity = 1024 * 1024;
  readonly calls: { name: string; offset: number; finish: (error?: Error) => void }[] = [];
  private readonly bytes = new Uint8Array(this.capacity);

  read(offset: number, into: Uint8Array): Promise<void> {
    return this.later("read", offset, () => into.set(this.bytes.subarray(offset, offset + into.length)));
  }
  write(offset: number, from: Uint8Array): Promise<void> {
    return this.later("write", offset, () => this.bytes.set(from, offset));
  }
  flush(): Promise<void> {
    return this.later("flush", 0, () => undefined);
  }
  discard(offset: number): Promise<void> {
    return this.later("discard", offset, () => undefined);
  }
  writeZeroes(offset: number, length: number): Promise<void> {
    return this.later("writeZeroes", offset, () => this.bytes.fill(0, offset, offset + length));
  }

  /** Finish the oldest call of this name. */
  finish(name: string, error?: Error): void {
    const at = this.calls.findIndex((call) => call.name === name);
    assert.ok(at >= 0, `no ${name} is waiting`);
    this.calls.splice(at, 1)[0].finish(error);
  }

  /** Finish everything, now and from now on, so that the back-end can close. */
  release(): void {
    for (const { finish } of this.calls.splice(0)) finish();
    this.later = (_name, _offset, work) => Promise.resolve(work());
  }

  private later(name: string, offset: number, work: () => void): Promise<void> {
    return new Promise((resolve, reject) => {
      const finish = (error?: Error): void => {
        if (error !== undefined) return reject(error);
        work();
        resolve();
      };
      this.calls.push({ name, offset, finish });
    });
  }
}

/** Wait, turn by turn, until `condition` holds. */
export async function until(condition: () => boolean): Promise<void> {
  for (let i = 0; i < 10_000 && !condition(); i++) await turns(1);
  assert.ok(condition(), "it did not come to that");
}
