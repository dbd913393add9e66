// The panel: a run's curve and figures, the slider, the processes. Draws what the store holds; changes nothing itself.

import { Banner } from "./banner.js";
import { card } from "./cards.js";
import { RunChoice, nameOf } from "./choice.js";
import { Curve } from "./curve.js";
import { h, renew, t, times } from "./dom.js";
import { estimate, recorded, thresholdOf } from "./estimate.js";
import { Progress } from "./progress.js";
import { SparseSection } from "./sparse.js";
import { say } from "./status.js";

const REDRAW_MS = 500; // between two pictures while a run goes on
const SAID_MS = 5000; // how long the answer to a button stays
const TECHNIQUES = {
  attention: "Attention",
  sparse: "Sparse Attention",
  fp8: "FP8 Quantize",
  compile: "Compile Blocks",
  parallel: "Context Parallel",
  slices: "Blocks in Slices",
  offloaded: "Weights",
  memory: "Memory",
};

/** One panel on the page. actions: release(), copy(text), save(text, run) and apply(run, threshold), each a
 * promise of a sentence; refusal(run): why apply() would not do, or "".
 * placeOf: which workflow and node a sampling is of. */
export class Panel {
  constructor(store, actions, placeOf) {
    this.store = store;
    this.actions = actions;
    this.banner = new Banner(placeOf);
    this.threshold = null; // of the slider; null while it stands at the run's own
    this.tried = null; // id of the run that the slider was moved on
    this.build();
    this.unsubscribe = store.subscribe(() => this.soon());
    this.draw();
  }

  /** Take the panel off the page. */
  end() {
    this.unsubscribe();
    this.curve.end();
    this.progress.end();
    clearTimeout(this.timer);
    clearTimeout(this.saying);
    this.element.remove();
  }

  /** Draw what has changed, at once or as soon as it may. */
  soon() {
    this.timer ??= setTimeout(() => {
      this.timer = null;
      this.draw();
    }, Math.max(this.drawn + REDRAW_MS - performance.now(), 0));
  }

  build() {
    this.curve = new Curve();
    this.progress = new Progress();
    this.sparseSection = new SparseSection();
    this.choice = new RunChoice(() => {
      this.threshold = null;
      this.draw();
    });
    this.state = h("span", { class: "skein-state", role: "status" });
    this.figures = h("dl", { class: "skein-summary" });
    this.empty = h("div", { class: "skein-empty" });
    this.slider = h("input", {
      type: "range",
      min: "0",
      step: "0.001",
      "aria-label": t("Threshold to try on this run"),
      oninput: () => {
        this.threshold = Number(this.slider.value);
        this.tried = this.run.id;
        this.draw();
      },
    });
    this.estimate = h("output", { class: "skein-estimate" });
    this.apply = h("button", { type: "button", class: "skein-primary", onclick: (event) => this.act(event, () => this.write()) });
    this.message = h("span", { class: "skein-message", role: "status" });
    this.cards = h("ul", { class: "skein-cards", "aria-label": t("Processes") });
    this.notes = h("dl", { class: "skein-notes" });
    const button = (text, action) => h("button", { type: "button", onclick: (event) => this.act(event, action) }, text);
    this.release = button(t("Release workers"), () => this.actions.release());
    this.copy = button(t("Copy report"), () => this.report());
    this.save = button(t("Save report"), () => this.actions.save(this.text(), this.pictured));
    this.fallback = h("textarea", { class: "skein-fallback", readonly: true, hidden: true, "aria-label": t("Report") });
    this.element = this.layout();
  }

  layout() {
    this.behindKey = h("li", { class: "skein-key-behind", hidden: true });
    const legend = h(
      "ul",
      { class: "skein-legend" },
      h("li", { class: "skein-key-computed" }, t("computed")),
      h("li", { class: "skein-key-reused" }, t("reused")),
      h("li", { class: "skein-key-differs" }, t("decided differently than in the run")),
      this.behindKey,
    );
    this.slider.title = t("An estimate: the further a call is from the last computed one, the more it changes.");
    this.picture = h(
      "div",
      { class: "skein-picture" },
      h("div", { class: "skein-curve-and-legend" }, legend, this.curve.element),
      h("div", { class: "skein-try" }, h("span", {}, t("Threshold")), this.slider, this.estimate, this.apply),
    );
    return h(
      "section",
      { class: "skein-panel", "aria-label": "Skein" },
      this.banner.element,
      h(
        "div",
        { class: "skein-columns" },
        h(
          "div",
          { class: "skein-main" },
          this.progress.element,
          h("header", {}, ...this.choice.elements, this.state, this.figures),
          this.empty,
          this.picture,
          this.sparseSection.element,
        ),
        h(
          "aside",
          { class: "skein-side" },
          h("div", { class: "skein-buttons" }, this.release, this.copy, this.save),
          this.fallback,
          this.cards,
          this.notes,
        ),
      ),
    );
  }

  /** The run that is looked at. */
  get run() {
    return this.choice.run(this.store.runs);
  }

  /** The run of the cache in the sampling that goes on, or was the last. */
  get newest() {
    const { runs, sampling } = this.store;
    return sampling.techniques.includes("cache") && runs.at(-1)?.started >= sampling.started ? runs.at(-1) : undefined;
  }

  /** The run under sparse attention that belongs to what is looked at: of the same prompt. */
  get sparse() {
    const { sampling, sparse } = this.store;
    if (this.choice.chosen) return nearest(sparse, this.run);
    const newest = sparse.at(-1);
    if (sampling.running) return newest?.prompt_id === sampling.prompt_id ? newest : undefined;
    return this.isOlder(newest) ? undefined : newest;
  }

  /** Whether a run under sparse attention is of an earlier prompt than the newest run under the cache. */
  isOlder(sparse) {
    const newest = this.store.runs.at(-1);
    return Boolean(sparse && newest) && sparse.prompt_id !== newest.prompt_id && sparse.started < newest.started;
  }

  draw() {
    const { store } = this;
    this.choice.show(store.runs);
    const { run, sparse } = this;
    this.drawn = performance.now();
    this.element.dataset.connection = store.connection;
    this.banner.show(store);
    this.progress.show(store, this.newest);
    const shown = Boolean(run?.calls.length) && !this.withoutCache();
    this.picture.hidden = this.figures.hidden = !shown;
    this.empty.hidden = shown;
    this.empty.classList.toggle("skein-short", Boolean(sparse));
    this.sparseSection.show(sparse);
    if (shown) this.drawRun(run);
    else renew(this.empty, this.emptyTexts(), emptyState);
    this.drawState(run);
    renew(this.cards, store.processes, (processes) => processes.map(card));
    this.drawNotes();
    const alive = store.processes.some((each) => each.rank !== null && !["ended", "failed"].includes(each.state));
    const working = store.processes.some((each) => each.rank !== null && ["loading", "running"].includes(each.state));
    const busy = working || (store.sampling.running && store.sampling.techniques.includes("parallel"));
    this.release.disabled = !alive || busy || store.connection !== "ready";
    this.release.title = busy ? t("The workers are at work; interrupt the run first.") : "";
    this.copy.disabled = !run && !sparse;
    this.save.disabled = !this.pictured;
  }

  /** Whether what runs now, or ran last, has no cache, so that the newest run under it is an older one. */
  withoutCache() {
    const { sampling, runs, sparse } = this.store;
    if (this.choice.chosen) return false;
    if (sampling.running) return !sampling.techniques.includes("cache");
    const [cached, last] = [runs.at(-1), sparse.at(-1)];
    return Boolean(last) && last.prompt_id !== cached?.prompt_id && !this.isOlder(last);
  }

  /** What stands in the place of the curve: a title, or "", and lines. */
  emptyTexts() {
    const { connection, sampling } = this.store;
    if (connection === "loading") return ["", t("Reading the status...")];
    if (connection === "error") return ["", t("There is nothing to show.")];
    if (this.withoutCache() && !sampling.running) {
      return ["", t("The newest run has no First-Block Cache, so there is no curve.")];
    }
    if (this.withoutCache()) {
      const calls = t("{calls} model calls so far.", { calls: sampling.calls });
      return ["", t("What runs now has no First-Block Cache, so there is no curve."), calls];
    }
    if (sampling.running) return ["", t("Sampling begins; the curve appears with the first model call.")];
    return [
      t("No run yet"),
      t("Put Speed Up (Skein) between the model loader and the sampler, and run."),
      t("Or start from a template of this pack: Skein - Demo, no download, no GPU."),
    ];
  }

  drawState(run) {
    const state = !run ? "" : !run.ended ? "running" : run.finished ? "finished" : "stopped";
    const names = { running: t("running"), finished: t("finished"), stopped: t("stopped early"), "": "" };
    if (this.state.textContent !== names[state]) this.state.textContent = names[state];
    this.state.dataset.state = state;
    this.state.hidden = !state || this.withoutCache();
    this.state.title = run?.error ?? "";
  }

  drawRun(run) {
    if (this.tried !== run.id) this.threshold = null;
    const own = thresholdOf(run);
    const threshold = this.threshold ?? own;
    const estimated = this.threshold === null ? recorded(run) : estimate(run, threshold);
    const behind = this.choice.behind(this.store.runs);
    this.curve.show(run, this.threshold, estimated.decisions, behind);
    this.behindKey.hidden = !behind;
    if (behind) this.behindKey.textContent = nameOf(behind);
    const figures = [
      [t("Calls"), run.ended || !run.steps ? String(run.calls.length) : `${run.calls.length} / ${this.curve.expectedCalls()}`],
      [t("Reused"), String(run.reused)],
      [run.ended ? t("Speedup") : t("Speedup so far"), times(run.speedup)],
    ];
    renew(this.figures, figures, definitions);
    this.drawSlider(run, own, threshold, estimated);
  }

  drawSlider(run, own, threshold, { reused, speedup }) {
    const largest = Math.max(own * 2, 0.05, ...run.calls.map((call) => call.change ?? 0));
    this.slider.max = String(Math.min(Math.ceil(largest * 105) / 100, 1));
    if (this.threshold === null) this.slider.value = String(own);
    const range = (ends, text) => [...new Set(ends.map(text))].join(" - ");
    const asked = this.threshold === null && run.share;
    const value = asked ? t("{percent} % asked for", { percent: Math.round(100 * run.share) }) : threshold;
    const values = { value, reused: range(reused, String), calls: run.calls.length };
    this.estimate.textContent =
      asked || threshold === own || speedup.includes(null) // of its own threshold the figures above tell
        ? t("{value}: {reused} of {calls} reused", values)
        : t("{value}: {reused} of {calls} reused, {times} as fast", { ...values, times: range(speedup, times) });
    this.slider.setAttribute("aria-valuetext", this.estimate.textContent);
    this.apply.textContent = t("Write {value} into the node", { value: threshold });
    this.apply.title = this.actions.refusal(run);
    this.apply.disabled = this.threshold === null || Boolean(this.apply.title);
  }

  drawNotes() {
    const { cache, ...notes } = this.store.sampling.notes; // the cache's are the figures above its curve
    const named = Object.entries(notes).map(([about, text]) => [say(TECHNIQUES[about] ?? about), say(text)]);
    renew(this.notes, named, definitions);
  }

  write() {
    const { run } = this;
    return this.actions.apply(run, this.threshold ?? thresholdOf(run));
  }

  /** The run whose picture the server can draw. */
  get pictured() {
    const shown = this.withoutCache() ? this.sparse : this.run;
    return shown?.ended && shown.calls.length ? shown : undefined;
  }

  /** All that is shown, as JSON. */
  text() {
    const { sparse, store } = this;
    const run = this.withoutCache() && sparse ? undefined : this.run; // else they would be of two prompts
    return JSON.stringify({ run, sparse, sampling: store.sampling, processes: store.processes }, null, 1);
  }

  async report() {
    const text = this.text();
    this.fallback.hidden = true;
    try {
      return await this.actions.copy(text);
    } catch {
      // Pages over plain http have no clipboard.
      this.fallback.value = text;
      this.fallback.hidden = false;
      this.fallback.focus();
      this.fallback.select();
      return t("The browser does not let a page write to the clipboard here; copy the selected text.");
    }
  }

  /** Do something and say beside its button, for a while, what came of it. */
  async act({ currentTarget: button }, action) {
    clearTimeout(this.saying);
    button.after(this.message);
    this.message.textContent = "";
    try {
      this.message.textContent = await action();
    } catch (error) {
      this.message.textContent = error.message;
    }
    this.saying = setTimeout(() => this.message.remove(), SAID_MS);
  }
}

/** Of the runs under sparse attention those of a run's prompt, and of these the one that began when it did: a prompt may
 * sample more than once. */
function nearest(sparse, run) {
  const distance = (each) => Math.abs(each.started - run.started);
  const same = sparse.filter((each) => each.prompt_id === run.prompt_id);
  return same.sort((one, other) => distance(one) - distance(other))[0];
}

function emptyState([title, ...lines]) {
  return [title && h("strong", {}, title), ...lines.map((line) => h("p", {}, line))].filter(Boolean);
}

function definitions(pairs) {
  return pairs.filter(Boolean).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)));
}
