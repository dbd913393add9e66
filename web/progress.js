// What goes on now, in a line that counts: what is waited for, steps, time, memory, and what the cache has saved.

import { duration, gigabytes, h, t } from "./dom.js";
import { say } from "./status.js";

const TICK_MS = 1000;

/** The line; show() draws it, and it counts on by itself while something goes on. */
export class Progress {
  constructor() {
    this.activity = h("strong", { class: "skein-activity", role: "status" });
    this.seconds = h("span", {});
    this.facts = h("span", { class: "skein-facts" });
    this.fill = h("div", { class: "skein-fill" });
    this.bar = h("div", { class: "skein-meter", role: "progressbar", "aria-valuemin": "0", "aria-valuemax": "100" }, this.fill);
    const words = h("div", { class: "skein-words" }, this.activity, this.seconds, this.facts);
    this.element = h("div", { class: "skein-progress", hidden: true }, words, this.bar);
  }

  end() {
    clearInterval(this.timer);
  }

  /** store: what is known; run: the cache's, where what goes on has one. */
  show(store, run) {
    Object.assign(this, { store, run });
    const { sampling, connection } = store;
    const goes = connection === "ready" && (sampling.running || Boolean(sampling.activity));
    if (goes) this.timer ??= setInterval(() => this.draw(), TICK_MS);
    else {
      clearInterval(this.timer);
      this.timer = null;
    }
    this.goes = goes;
    this.draw();
  }

  draw() {
    const { sampling, now } = this.store;
    const { activity } = sampling;
    const facts = this.goes ? running(this.store, this.run) : over(sampling, this.run);
    this.element.hidden = !this.goes && !facts.length;
    write(this.activity, this.goes && activity ? say(activity.text) : "");
    write(this.seconds, this.goes && activity ? duration(now - activity.since) : "");
    write(this.facts, facts.join(" \u00b7 "));
    this.facts.title = this.goes ? source(sampling) : "";
    const part = activity ? activity.part : done(sampling, now);
    this.bar.hidden = !this.goes || part === null;
    this.fill.style.width = `${100 * (part ?? 0)}%`;
    this.bar.setAttribute("aria-valuenow", String(Math.round(100 * (part ?? 0))));
    this.bar.setAttribute("aria-label", activity ? say(activity.text) : t("Sampling"));
  }
}

/** Text that has not changed is not written: screen readers would say it again. */
function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** What is known of a sampling in progress, as texts. */
function running(store, run) {
  const { sampling, now } = store;
  if (!sampling.running) return [];
  const { step, steps, started, expected_end: end, expected_bytes: bytes } = sampling;
  const total = memoryOf(store.processes);
  return [
    step !== null && steps ? t("Step {step} of {steps}", { step: step + 1, steps }) : "",
    t("{time} elapsed", { time: duration(now - started) }),
    end === null ? "" : t("about {time} remaining", { time: duration(Math.max(end - now, 0)) }),
    bytes && total ? t("about {used} of {total} GB expected", { used: gigabytes(bytes), total: gigabytes(total) }) : "",
    saved(run),
  ].filter(Boolean);
}

/** What is said of the last sampling. */
function over({ started, ended }, run) {
  if (!started || !ended) return [];
  return [t("Took {time}", { time: duration(ended - started) }), saved(run)].filter(Boolean);
}

/** What the cache has saved, from the times of typical calls. */
function saved(run) {
  if (!run?.reused || !run.computed_ms || !run.reused_ms) return "";
  const seconds = (run.reused * (run.computed_ms - run.reused_ms)) / 1000;
  return seconds >= 1 ? t("the cache saved about {time}", { time: duration(seconds) }) : "";
}

function source({ expected_from: from, step }) {
  if (step !== null && step > 1) return t("Remaining time from the steps so far");
  if (from === "measured") return t("Remaining time from an earlier run like this one");
  return from === "scaled" ? t("Remaining time from an earlier run of another size") : "";
}

/** The part of the sampling that is over, by time where its end is expected, else by steps; null: unknown. */
function done({ started, expected_end: end, step, steps }, now) {
  if (end !== null && end > started) return Math.min((now - started) / (end - started), 1);
  return step !== null && steps ? step / steps : null;
}

/** The memory of the smallest device that samples. */
function memoryOf(processes) {
  const workers = processes.filter((each) => each.rank !== null && !["ended", "failed"].includes(each.state));
  const totals = (workers.length ? workers : processes).map((each) => each.memory_total).filter(Boolean);
  return totals.length ? Math.min(...totals) : null;
}
