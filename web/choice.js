// Which run is looked at, and which other one is drawn behind it.

import { h, renew, t } from "./dom.js";

/** Two lists of runs, the newest first. chosen: "" for the newest; other: "" for none. */
export class RunChoice {
  constructor(changed) {
    this.chosen = this.other = "";
    const list = (label, write) => h("select", { "aria-label": label, onchange: (event) => write(event.target.value) });
    this.first = list(t("Run"), (id) => changed((this.chosen = id)));
    this.second = list(t("Compare with"), (id) => changed((this.other = id)));
    this.elements = [this.first, this.second];
  }

  show(runs) {
    const known = (id) => runs.some((run) => run.id === id);
    if (!known(this.chosen)) this.chosen = ""; // it is no longer kept
    const shown = this.run(runs);
    if (!known(this.other) || this.other === shown.id) this.other = "";
    const all = runs.map((run) => [run.id, nameOf(run)]).reverse();
    const others = all.filter(([id], index) => id !== shown.id && runs.at(-1 - index).calls.length);
    this.fill(this.first, [["", t("Newest run")], ...all], this.chosen);
    this.fill(this.second, [["", t("Compare with...")], ...others], this.other);
    this.first.hidden = !runs.length;
    this.second.hidden = !others.length;
  }

  /** Built anew only when it changes, so that it stays open under the pointer. */
  fill(select, options, value) {
    renew(select, options, () => options.map(([id, text]) => h("option", { value: id }, text)));
    select.value = value;
  }

  /** The run that is looked at. */
  run(runs) {
    return runs.find((run) => run.id === this.chosen) ?? runs.at(-1);
  }

  /** The one behind it, or nothing. */
  behind(runs) {
    return runs.find((run) => run.id === this.other);
  }
}

/** A run by when it began and what came of it. */
export function nameOf(run) {
  const began = new Date(1000 * run.started);
  const isToday = began.toDateString() === new Date().toDateString();
  const at = isToday ? began.toLocaleTimeString() : began.toLocaleString([], { dateStyle: "short", timeStyle: "short" });
  if (!run.ended) return t("{at}, running", { at });
  const values = { at, reused: run.reused, calls: run.calls.length };
  return run.finished ? t("{at}, {reused} of {calls} reused", values) : t("{at}, stopped early", values);
}
