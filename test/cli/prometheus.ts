/** Reads the Prometheus text format, version 0.0.4, and refuses what does not follow its rules, line by line. */

import assert from "node:assert/strict";

const NAME = "[a-zA-Z_:][a-zA-Z0-9_:]*";
const LABEL = '[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\\\\n]|\\\\[\\\\"n])*"';
const HELP = new RegExp(`^# HELP (${NAME}) (\\S(?:[^\\\\]|\\\\[\\\\n])*)$`);
const TYPE = new RegExp(`^# TYPE (${NAME}) (counter|gauge|histogram|summary|untyped)$`);
const SAMPLE = new RegExp(`^(${NAME})(?:\\{((?:${LABEL})(?:,${LABEL})*)\\})? (\\S+)$`);
const NUMBER = /^(?:[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?|[+-]Inf|Na[nN])$/;

/** A page that has been read. */
export class Page {
  /** Value by series, as it is written: `name{label="value"}`. */
  readonly values = new Map<string, number>();
  /** Type by name of the family. */
  readonly types = new Map<string, string>();

  /** The value of a series, which has to be there. */
  get(series: string): number {
    const value = this.values.get(series);
    assert.ok(value !== undefined, `there is no ${series}`);
    return value;
  }

  /** The sum of all series of a name whose labels contain `part`. */
  sum(name: string, part = ""): number {
    const found = [...this.values].filter(([series]) => series.startsWith(`${name}{`) && series.includes(part));
    assert.ok(found.length > 0, `there is no ${name} with ${part}`);
    return found.reduce((sum, [, value]) => sum + value, 0);
  }

  /** All series that begin so, with their values. */
  all(start: string): Record<string, number> {
    return Object.fromEntries([...this.values].filter(([series]) => series.startsWith(start)));
  }
}

/** Read a page; every line of it is checked. */
export function readPage(text: string): Page {
  const page = new Page();
  assert.ok(text.endsWith("\n"), "the last line has no end");
  let help: string | undefined;
  let family = { name: "", type: "" };
  for (const line of text.slice(0, -1).split("\n")) {
    if (line === "") continue;
    if (line.startsWith("# HELP ")) {
      const [, name] = HELP.exec(line) ?? assert.fail(`wrong: ${line}`);
      help = name;
    } else if (line.startsWith("#")) {
      const [, name, type] = TYPE.exec(line) ?? assert.fail(`wrong: ${line}`);
      assert.equal(name, help, "a type comes behind its help");
      assert.ok(!page.types.has(name), `${name} comes twice`);
      page.types.set(name, type);
      family = { name, type };
    } else {
      const [, name, labels = "", value] = SAMPLE.exec(line) ?? assert.fail(`wrong: ${line}`);
      assert.match(value, NUMBER, line);
      checkName(name, labels, family);
      const series = line.slice(0, line.lastIndexOf(" "));
      assert.ok(!page.values.has(series), `${series} comes twice`);
      const number = Number(value.replace("Inf", "Infinity"));
      page.values.set(series, number);
      if (family.type === "counter") assert.ok(number >= 0, line);
    }
  }
  for (const [name, type] of page.types) if (type === "histogram") checkHistogram(page, name);
  return page;
}

/** A sample stands below the type of its own family, and our names follow the conventions. */
function checkName(name: string, labels: string, { name: family, type }: { name: string; type: string }): void {
  if (type === "histogram") {
    assert.ok([`${family}_bucket`, `${family}_sum`, `${family}_count`].includes(name), `${name} below ${family}`);
    assert.equal(/(^|,)le="/.test(labels), name.endsWith("_bucket"), `${name} has the labels ${labels}`);
    return;
  }
  assert.equal(name, family);
  if (name.startsWith("virtio_")) assert.equal(name.endsWith("_total"), type === "counter", name);
}

/** Buckets rise in their bounds and counts, and end with everything. */
function checkHistogram({ values }: Page, name: string): void {
  const buckets = new Map<string, { le: number; value: number }[]>();
  for (const [series, value] of values) {
    const [, labels] = new RegExp(`^${name}_bucket\\{(.*)\\}$`).exec(series) ?? [];
    if (labels === undefined) continue;
    const [le, bound] = /le="([^"]*)",?/.exec(labels) ?? assert.fail(series);
    const others = labels.replace(le, "").replace(/,$/, "");
    const list = buckets.get(others) ?? [];
    list.push({ le: Number(bound.replace("Inf", "Infinity")), value });
    buckets.set(others, list);
  }
  for (const [labels, list] of buckets) {
    for (const [i, { le, value }] of list.slice(1).entries()) {
      assert.ok(le > list[i].le && value >= list[i].value, `${name}: bucket ${le}`);
    }
    const last = list[list.length - 1];
    assert.equal(last.le, Number.POSITIVE_INFINITY);
    const suffix = labels === "" ? "" : `{${labels}}`;
    assert.equal(values.get(`${name}_count${suffix}`), last.value);
    assert.ok(values.has(`${name}_sum${suffix}`), `${name} has no sum`);
  }
}
