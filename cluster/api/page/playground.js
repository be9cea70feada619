// The same request with and without speculation, side by side.

import { byId, element } from "./dom.js";
import { ApiError, completion } from "./stream.js";

/** One run's text as it comes, and its figures. */
class Pane {
  constructor(root) {
    this.root = root;
    const find = (selector) => root.querySelector(selector);
    this.phase = find(".phase");
    this.progress = find("progress");
    this.text = find(".text");
    this.error = find(".error");
    this.stats = find(".stats");
    this.clear("", "Nothing generated yet.");
  }

  /** Without a text; why stands in its place. */
  clear(phase, why) {
    this.text.replaceChildren(element("span", { className: "empty", textContent: why }));
    this.stats.replaceChildren();
    this.error.hidden = true;
    this.progress.value = 0;
    this.enter(phase);
  }

  enter(phase, { isRunning = false } = {}) {
    this.phase.textContent = phase;
    this.root.classList.toggle("running", isRunning);
    // A screen reader waits for the whole text.
    this.text.setAttribute("aria-busy", String(isRunning));
  }

  /** Adds text; drafted tokens are marked. */
  append(text, kind) {
    const isAtEnd = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 40;
    const last = this.text.lastElementChild;
    if (last?.dataset.kind === kind) last.append(text);
    else {
      const made = element(kind === "drafted" ? "mark" : "span", { className: kind, textContent: text });
      made.dataset.kind = kind;
      this.text.append(made);
    }
    if (isAtEnd) this.text.scrollTop = this.text.scrollHeight;
  }

  fail(message) {
    this.enter("failed");
    this.error.textContent = message;
    this.error.hidden = false;
  }

  showStats(pairs) {
    this.stats.replaceChildren(
      ...pairs.map(([name, value]) =>
        element("div", {}, [element("dt", { textContent: name }), element("dd", { textContent: value })]),
      ),
    );
  }
}

/** A run's tokens and times. */
class Run {
  text = "";
  ids = [];
  began = performance.now();
  first = null; // when the first tokens came, and how many these were
  firstCount = 0;
  last = null;
  stats = null;

  take(choice) {
    this.text += choice.text;
    this.ids.push(...choice.token_ids);
    this.last = performance.now();
    if (this.first === null) {
      this.first = this.last;
      this.firstCount = this.ids.length;
    }
  }

  get seconds() {
    return this.last === null ? 0 : (this.last - this.began) / 1000;
  }

  /** Tokens per second after the first ones. */
  get rate() {
    const count = this.ids.length - this.firstCount;
    return count > 0 && this.last > this.first ? (1000 * count) / (this.last - this.first) : null;
  }

  rows(isSpeculative) {
    const rows = [
      ["Tokens/s", this.rate === null ? "–" : this.rate.toFixed(1)],
      ["Tokens", String(this.ids.length)],
      ["Total time", `${this.seconds.toFixed(2)} s`],
    ];
    if (isSpeculative && this.stats) {
      const { num_draft_tokens: drafted, num_accepted_draft_tokens: accepted } = this.stats;
      rows.push(["Drafts accepted", drafted ? `${accepted} of ${drafted}` : "none drafted"]);
    }
    return rows;
  }
}

/** The form and both panes. model(): what /status says of the one that is asked. */
export class Playground {
  constructor(model) {
    this.model = model;
    this.form = byId("form");
    this.prompt = byId("prompt");
    this.generate = byId("generate");
    this.stop = byId("stop");
    this.verdict = byId("verdict");
    this.panes = [new Pane(byId("with")), new Pane(byId("without"))];
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.compare();
    });
    this.form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !this.generate.disabled) {
        event.preventDefault();
        this.form.requestSubmit();
      }
    });
    this.stop.addEventListener("click", () => this.abort.abort());
  }

  /** Both runs, one after the other, and what they say. */
  async compare() {
    const model = this.model();
    const body = this.body(model);
    this.abort = new AbortController();
    this.setBusy(true);
    this.verdict.replaceChildren();
    for (const pane of this.panes) pane.clear("waits", "Waits for the other run.");
    const runs = [];
    for (const [index, pane] of this.panes.entries()) {
      const run = await this.run(pane, { ...body, speculative: { enabled: index === 0 } }, index === 0);
      if (run === null) break;
      runs.push(run);
    }
    for (const pane of this.panes.slice(runs.length + 1)) pane.clear("not run", "Not run.");
    this.setBusy(false);
    if (runs.length === 2) this.judge(...runs, model);
  }

  /** One run; null if it failed or was stopped. */
  async run(pane, body, isSpeculative) {
    pane.text.replaceChildren();
    pane.enter("starts", { isRunning: true });
    pane.append(body.prompt, "given");
    pane.progress.max = body.max_tokens;
    const run = new Run();
    try {
      for await (const chunk of completion(body, this.abort.signal)) {
        for (const choice of chunk.choices) {
          run.take(choice);
          for (const step of choice.steps) {
            for (const part of step.parts) pane.append(part.text, part.drafted ? "drafted" : "own");
          }
        }
        run.stats = chunk.metrics?.speculative_decoding ?? run.stats;
        pane.progress.value = run.ids.length;
        pane.enter("runs", { isRunning: true });
        pane.showStats(run.rows(isSpeculative));
      }
    } catch (error) {
      if (error.name === "AbortError") pane.enter("stopped");
      else pane.fail(error instanceof ApiError ? error.message : `the server cannot be reached: ${error.message}`);
      return null;
    }
    pane.progress.value = pane.progress.max;
    pane.enter("done");
    return run;
  }

  body(model) {
    const seed = byId("seed");
    if (seed.value === "") seed.placeholder = String(Math.floor(Math.random() * 2 ** 32));
    return {
      model: model.name,
      prompt: this.prompt.value,
      max_tokens: Number(byId("max_tokens").value),
      temperature: Number(byId("temperature").value),
      seed: Number(seed.value || seed.placeholder),
      return_token_ids: true,
      return_draft_tokens: true,
    };
  }

  judge(drafted, plain, model) {
    const differs = firstDifference(drafted.ids, plain.ids);
    const isSame = differs === null && drafted.text === plain.text;
    const parts = [];
    if (drafted.rate && plain.rate) {
      const times = (drafted.rate / plain.rate).toFixed(2);
      parts.push(element("span", { className: "big", textContent: `${times} times as fast` }));
    }
    parts.push(
      isSame
        ? element("span", { className: "same", textContent: `✓ Identical texts, ${plain.ids.length} tokens` })
        : element("span", {
            className: "differ",
            textContent: `✗ The texts differ, from token ${(differs ?? 0) + 1} on`,
          }),
    );
    const stats = drafted.stats;
    if (stats.num_draft_tokens) {
      const length = stats.mean_acceptance_length.toFixed(2);
      parts.push(element("span", { textContent: `Mean acceptance length ${length}` }));
    }
    const note = noteOn(isSame, stats, model);
    if (note) parts.push(element("span", { className: "note", textContent: note }));
    this.verdict.replaceChildren(...parts);
  }

  setBusy(isBusy) {
    const had = document.activeElement;
    this.generate.disabled = isBusy;
    this.stop.disabled = !isBusy;
    if (isBusy && had === this.generate) this.stop.focus();
    if (!isBusy && had === this.stop) this.generate.focus();
  }
}

function noteOn(isSame, stats, model) {
  if (!isSame) {
    return model.numerics === "fast"
      ? "With fast numerics a near-tie between two tokens may end either way. Canonical numerics rule that out."
      : "This must not happen. Please report it, with the prompt, the seed and the models.";
  }
  if (stats.num_draft_tokens) return "";
  return "The engine drafted nothing: by its measurements drafting would not have paid here. Both runs decoded plainly.";
}

/** Index of the first token that is not the same; null if there is none. */
function firstDifference(left, right) {
  const length = Math.max(left.length, right.length);
  for (let index = 0; index < length; index += 1) if (left[index] !== right[index]) return index;
  return null;
}
