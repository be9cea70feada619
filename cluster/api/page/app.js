// The page: asks the server once a second what it does, and shows it.

import { byId, element, say } from "./dom.js";
import { counters, Figures, History } from "./figures.js";
import { Playground } from "./playground.js";
import { reasonOf, route } from "./stream.js";

const EVERY = 1000; // milliseconds between two looks
const LONGEST_PAUSE = 30_000;
const PATIENCE = 10_000;

const COLUMNS = [
  ["Name", (member) => member.name],
  ["Role", (member) => ({ target: "target", draft: "draft worker" })[member.role] ?? member.role],
  ["State", (member) => member.phase],
  ["Where", (member) => placesOf(member)],
  ["Address", (member) => member.address],
  ["Epoch", (member) => member.epoch],
  ["Note", (member) => member.note],
];
const CODE = new Set(["Where", "Address"]);

const figures = new Figures(byId("figures"));
const histories = new Map();
let models = [];
let chosen = null;
let shownMembers = "";
let failures = 0;
let timer = null;
let isLooking = false;

const model = () => models.find((each) => each.name === chosen) ?? models[0];

async function get(path) {
  const response = await fetch(route(path), { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
  if (!response.ok) throw new Error(await reasonOf(response));
  return response;
}

async function look() {
  timer = null;
  isLooking = true;
  try {
    const [status, metrics] = await Promise.all([
      get("status").then((response) => response.json()),
      get("metrics").then(async (response) => ({ text: await response.text(), at: performance.now() / 1000 })),
    ]);
    failures = 0;
    take(status.models, metrics);
  } catch (error) {
    failures += 1;
    away(error);
  }
  isLooking = false;
  plan(failures ? Math.min(LONGEST_PAUSE, EVERY * 2 ** failures) : EVERY);
}

/** The next look, unless nobody sees the page. */
function plan(pause) {
  clearTimeout(timer);
  timer = document.hidden ? null : setTimeout(look, pause);
}

function take(now, metrics) {
  models = now;
  for (const each of models) {
    if (!histories.has(each.name)) histories.set(each.name, new History());
    histories.get(each.name).add({
      at: metrics.at,
      ...counters(metrics.text, each.name),
      running: each.running,
      waiting: each.waiting,
      kvUsage: each.kv_cache_usage,
      seats: each.serving * each.max_num_seqs,
      workers: each.draft_workers,
    });
  }
  show();
}

function show() {
  offerModels();
  const now = model();
  setState(...stateOf(now));
  say(byId("model-name"), now.name);
  say(byId("dtype"), now.dtype);
  say(byId("numerics"), now.numerics);
  say(byId("drafting"), now.drafting);
  say(byId("context"), `${now.max_model_len.toLocaleString("en")} tokens`);
  say(byId("targets"), `${now.serving}, each for ${now.max_num_seqs} texts at once`);
  say(byId("workers"), now.draft_workers ? `${now.draft_workers} connected` : "none");
  figures.show(histories.get(now.name));
  showMembers(now.members);
}

function stateOf(now) {
  if (!now.serving) return ["bad", "No target serves"];
  const late = now.members.filter((each) => each.phase !== "ready").length;
  if (late) return ["warn", `Serving; ${late} of ${now.members.length} processes not ready`];
  return ["good", now.waiting ? `Serving; ${now.waiting} requests wait` : "Serving"];
}

function away(error) {
  const seconds = Math.min(LONGEST_PAUSE, EVERY * 2 ** failures) / 1000;
  const isReachable = !(error instanceof TypeError || error.name === "TimeoutError");
  const reason = isReachable ? error.message : "the server does not answer";
  setState("bad", `${reason[0].toUpperCase()}${reason.slice(1)}; next try in ${seconds} s`);
  figures.fade();
}

function setState(kind, text) {
  byId("state").className = `state ${kind}`;
  say(byId("state").lastElementChild, text);
}

function offerModels() {
  const select = byId("model");
  const names = models.map((each) => each.name);
  if (names.join("\n") === [...select.options].map((each) => each.value).join("\n")) return;
  select.replaceChildren(...names.map((name) => element("option", { value: name, textContent: name })));
  chosen = names.includes(chosen) ? chosen : names[0];
  select.value = chosen;
  select.hidden = names.length < 2;
  byId("model-name").hidden = !select.hidden;
}

function showMembers(members) {
  const text = JSON.stringify(members);
  if (text === shownMembers) return;
  shownMembers = text;
  const rows = members.map((member) => COLUMNS.map(([, read]) => String(read(member) ?? "")));
  // A column that would be empty says nothing; name, role and state always do.
  const columns = COLUMNS.map((_, index) => index).filter(
    (index) => index < 3 || rows.some((row) => row[index] !== ""),
  );
  const table = byId("members");
  table.tHead.rows[0].replaceChildren(...columns.map((index) => headOf(COLUMNS[index][0])));
  table.tBodies[0].replaceChildren(
    ...rows.map((row) => {
      const cells = columns.map((index) => cellOf(COLUMNS[index][0], row[index]));
      const made = element("tr", {}, cells);
      made.setAttribute("role", "row");
      return made;
    }),
  );
}

function headOf(name) {
  const head = element("th", { scope: "col", textContent: name });
  head.setAttribute("role", "columnheader");
  return head;
}

function cellOf(name, text) {
  const cell = element("td", { className: CODE.has(name) ? "code" : "" });
  cell.setAttribute("role", "cell");
  cell.dataset.label = name;
  if (name === "State") {
    const kind = { ready: "good", failed: "bad", stopped: "bad" }[text] ?? "warn";
    cell.className = kind;
    cell.append(element("span", {}, [element("i", { className: "dot" }), text]));
  } else if (text) cell.append(element("span", { textContent: text }));
  return cell;
}

function placesOf(member) {
  if (member.places) return member.places.map((each) => `${each.node} pid ${each.pid}`).join("\n");
  return member.pid === undefined ? "" : `pid ${member.pid}`;
}

byId("model").addEventListener("change", (event) => {
  chosen = event.target.value;
  show();
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden) plan(EVERY);
  else if (!isLooking) plan(0);
});
new Playground(model);
get("version").then((response) => response.json()).then((body) => say(byId("version"), `Outrider ${body.version}`), () => {});
look();
