// The live figures: what the counters of /metrics and the gauges of /status say of the last two minutes.

import { element } from "./dom.js";

const SHOWN = 120; // seconds in a sparkline
const WINDOW = 30; // seconds that ratios are taken over
const RATE_WINDOW = 5; // seconds that rates are taken over
const GAP = 5; // seconds without an answer that break a line
const SVG = "http://www.w3.org/2000/svg";

const COUNTERS = {
  tokens: "vllm:generation_tokens_total",
  drafts: "vllm:spec_decode_num_drafts_total",
  drafted: "vllm:spec_decode_num_draft_tokens_total",
  accepted: "vllm:spec_decode_num_accepted_tokens_total",
  draftSeconds: "outrider_draft_seconds_total",
  hiddenSeconds: "outrider_overlapped_draft_seconds_total",
};

/** A model's counters in a text in Prometheus' format, summed over its engines. */
export function counters(text, model) {
  const sums = Object.fromEntries(Object.keys(COUNTERS).map((key) => [key, 0]));
  const keys = new Map(Object.entries(COUNTERS).map(([key, name]) => [name, key]));
  for (const line of text.split("\n")) {
    const parts = /^([\w:]+)\{(.*)\} (\S+)/.exec(line);
    const key = parts && keys.get(parts[1]);
    if (key && label(parts[2], "model_name") === model) sums[key] += Number(parts[3]);
  }
  return sums;
}

function label(text, name) {
  const found = new RegExp(`(?:^|,)${name}="((?:[^"\\\\]|\\\\.)*)"`).exec(text);
  return found && found[1].replace(/\\(.)/g, (_, escaped) => (escaped === "n" ? "\n" : escaped));
}

/** Samples of the last minutes. A sample: counters and gauges, and `at`, in seconds. */
export class History {
  samples = [];

  add(sample) {
    const last = this.samples.at(-1);
    // A server that was started again counts from zero.
    if (last && sample.tokens < last.tokens) this.samples = [];
    this.samples.push(sample);
    const oldest = sample.at - SHOWN - WINDOW;
    this.samples = this.samples.filter((each) => each.at >= oldest);
  }

  /** What `read(newer, older)` says of each sample and the one `seconds` before it, by age. */
  series(seconds, read) {
    const now = this.samples.at(-1)?.at;
    let start = 0;
    const points = this.samples.map((sample, index) => {
      while (this.samples[start].at < sample.at - seconds - 0.5) start += 1;
      const older = this.samples[Math.min(start, Math.max(0, index - 1))];
      const isGap = index > 0 && sample.at - this.samples[index - 1].at > GAP;
      return { age: now - sample.at, value: index && !isGap ? read(sample, older) : null };
    });
    return points.filter((point) => point.age <= SHOWN);
  }
}

const ratio = (part, whole) => (whole > 0 ? part / whole : null);
const fixed = (digits) => (value) => value.toFixed(digits);
const percent = (value) => (100 * value).toFixed(value < 0.1 ? 1 : 0);
const tokens = (value) => (value < 10 ? value.toFixed(1) : Math.round(value).toLocaleString("en"));

/** One figure each. read: of a sample and an older one. top: of the sparkline, at least.
    total: read from the counters alone, since the server's start. */
const FIGURES = [
  {
    title: "Generation", unit: "tokens/s", seconds: RATE_WINDOW, text: tokens, top: 1,
    read: (newer, older) => ratio(newer.tokens - older.tokens, newer.at - older.at),
    foot: (points) => `peak ${tokens(Math.max(...points.map((each) => each.value ?? 0)))}`,
  },
  {
    title: "Requests running", seconds: 0, text: fixed(0), top: 1,
    read: (newer) => newer.running, second: (newer) => newer.waiting,
    unitOf: (last) => `of ${last.seats}`, foot: (_, last) => `${last.waiting} waiting`,
  },
  {
    title: "KV cache in use", unit: "%", seconds: 0, text: percent, top: 1,
    read: (newer) => newer.kvUsage, foot: () => "of the fullest target",
  },
  {
    title: "Mean acceptance length", unit: "tokens/step", seconds: WINDOW, text: fixed(2), top: 2, isRatio: true,
    read: (newer, older) => lengthOf(newer.accepted - older.accepted, newer.drafts - older.drafts),
    total: (last) => lengthOf(last.accepted, last.drafts),
  },
  {
    title: "Acceptance rate", unit: "%", seconds: WINDOW, text: percent, top: 1, isRatio: true,
    read: (newer, older) => ratio(newer.accepted - older.accepted, newer.drafted - older.drafted),
    total: (last) => ratio(last.accepted, last.drafted),
  },
  {
    title: "Drafting hidden", unit: "%", seconds: WINDOW, text: percent, top: 1, isRatio: true,
    read: (newer, older) => ratio(newer.hiddenSeconds - older.hiddenSeconds, newer.draftSeconds - older.draftSeconds),
    total: (last) => ratio(last.hiddenSeconds, last.draftSeconds),
    shown: (last) => last.workers > 0 || last.hiddenSeconds > 0,
  },
];

function lengthOf(accepted, drafts) {
  const more = ratio(accepted, drafts);
  return more === null ? null : 1 + more;
}

/** The cards, in a list. */
export class Figures {
  constructor(list) {
    this.list = list;
    this.cards = FIGURES.map((figure) => {
      const value = element("span"), unit = element("small"), foot = element("p", { className: "foot" });
      const spark = document.createElementNS(SVG, "svg");
      spark.setAttribute("class", "spark");
      spark.setAttribute("viewBox", `0 0 ${SHOWN} 32`);
      spark.setAttribute("preserveAspectRatio", "none");
      spark.setAttribute("aria-hidden", "true");
      const item = element("li", { className: "figure" }, [
        element("h3", { textContent: figure.title }),
        element("p", { className: "value" }, [value, unit]), spark, foot,
      ]);
      list.append(item);
      return { figure, item, value, unit, foot, spark };
    });
  }

  show(history) {
    this.list.classList.remove("stale");
    const last = history.samples.at(-1);
    for (const { figure, item, value, unit, foot, spark } of this.cards) {
      item.hidden = figure.shown ? !figure.shown(last) : false;
      const points = history.series(figure.seconds, figure.read);
      const latest = points.at(-1)?.value ?? null;
      value.textContent = latest === null ? "–" : figure.text(latest);
      unit.textContent = latest === null && figure.isRatio ? "" : figure.unitOf ? figure.unitOf(last) : figure.unit;
      foot.textContent = figure.isRatio ? footOfRatio(figure, last) : figure.foot(points, last);
      const second = figure.second ? history.series(figure.seconds, figure.second) : [];
      draw(spark, points, second, figure.top);
    }
  }

  /** The server is away: what is shown was so. */
  fade() {
    this.list.classList.add("stale");
  }
}

function footOfRatio(figure, last) {
  const total = figure.total(last);
  if (total === null) return "no drafts yet";
  return `${figure.text(total)}${figure.unit === "%" ? " %" : ""} since the start`;
}

function draw(spark, points, second, least) {
  const top = Math.max(least, ...[...points, ...second].map((each) => each.value ?? 0));
  const paths = [path("floor", `M0 31.5H${SHOWN}`)];
  for (const run of runs(points)) {
    const line = run.map((each) => `${place(each, top)}`).join("L");
    paths.push(path("area", `M${x(run[0])} 31.5L${line}L${x(run.at(-1))} 31.5Z`), path("line", `M${line}`));
  }
  if (second.some((each) => each.value)) {
    for (const run of runs(second)) paths.push(path("second", `M${run.map((each) => place(each, top)).join("L")}`));
  }
  spark.replaceChildren(...paths);
}

function path(kind, data) {
  const made = document.createElementNS(SVG, "path");
  made.setAttribute("class", kind);
  made.setAttribute("d", data);
  return made;
}

const x = (point) => (SHOWN - point.age).toFixed(1);
const place = (point, top) => `${x(point)} ${(31.5 - (28 * point.value) / top).toFixed(1)}`;

/** Points between two gaps. */
function runs(points) {
  const found = [[]];
  for (const point of points) {
    if (point.value === null) found.push([]);
    else found.at(-1).push(point);
  }
  return found.filter((run) => run.length);
}
