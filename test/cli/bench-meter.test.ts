/** Tests of what `virtio bench` counts: after the ramp and before the end, and how the speed changed in between. */

import assert from "node:assert/strict";
import { mock, test } from "node:test";
import { Meter } from "../../src/cli/bench-meter.js";
import { Timeline } from "../../src/cli/bench-timeline.js";
import { LatencyHistogram } from "../../src/cli/histogram.js";

test("a meter counts what completes after the ramp, as long as it was told, and nothing else", () => {
  const latency = new LatencyHistogram();
  const meter = new Meter({ rampMs: 10, runMs: 20 }, [latency]);
  const since = new Float64Array(1);
  /** A request of 1 second where it must not count, of 1 µs where it must. */
  const complete = (): void => {
    since[0] = meter.time[0] - (meter.countedMs > 0 && meter.isRunning ? 0.001 : 1000);
    meter.completed(latency, since, 0);
  };
  const begin = performance.now();
  meter.start();
  let counted = 0;
  while (meter.isRunning) {
    meter.forget();
    meter.refresh();
    if (meter.countedMs > 0 && meter.isRunning) counted++;
    complete();
  }
  const elapsed = performance.now() - begin;
  complete();
  assert.deepEqual([latency.count, meter.countedMs], [counted, meter.countedMs]);
  assert.ok(latency.max < 2000, `${latency.max} ns`);
  assert.ok(meter.countedMs >= 20 && meter.countedMs <= elapsed - 10, `${meter.countedMs} of ${elapsed} ms`);
  assert.ok(meter.cpuMicros >= 0);

  meter.runUncounted();
  meter.forget();
  meter.refresh();
  complete();
  assert.deepEqual([meter.isRunning, latency.count], [true, counted]);
});

test("a timeline has the speed of each stretch, joins what is too short, and leaves out the ramp", () => {
  mock.timers.enable({ apis: ["setInterval"] });
  try {
    const now = { countedMs: 0, count: 0 };
    const timeline = new Timeline(4000); // a look each 40 ms
    const end = timeline.follow({
      get countedMs() {
        return now.countedMs;
      },
      counts: () => {
        const latency = new LatencyHistogram();
        for (let i = 0; i < now.count; i++) latency.record(1);
        return latency;
      },
    });
    const look = (countedMs: number, count: number): void => {
      Object.assign(now, { countedMs, count });
      mock.timers.tick(40);
    };
    look(0, 17);
    look(40, 80);
    look(45, 1000); // right after the one before
    look(140, 280);
    Object.assign(now, { countedMs: 150, count: 390 });
    end();
    look(500, 500);
    assert.deepEqual(timeline.stretches(), [
      { seconds: 0.04, iops: 2000 },
      { seconds: 0.15, iops: (310 / 110) * 1000 },
    ]);
  } finally {
    mock.timers.reset();
  }
});

test("a timeline of a run that is over at once has one stretch", () => {
  const timeline = new Timeline(1);
  timeline.follow({ countedMs: 1, counts: () => new LatencyHistogram() })();
  assert.deepEqual(timeline.stretches(), [{ seconds: 0.001, iops: 0 }]);
});
