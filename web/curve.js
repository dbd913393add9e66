// The cache's picture: the change of each model call over its number, the threshold as a line, what was reused.

import { h, milliseconds, relative, svg, t } from "./dom.js";
import { thresholdOf } from "./estimate.js";

const MARGIN = { left: 44, right: 110, top: 26, bottom: 30 };
const TICKS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1];
const FLOOR = 0.001; // the smallest change that the logarithmic axis shows

/** The curve as an element; show() draws. Arrow keys and the pointer go through the calls. */
export class Curve {
  constructor() {
    this.drawing = svg("svg", { class: "skein-drawing", "aria-hidden": "true" });
    this.tip = h("div", { class: "skein-tip", role: "status", "aria-live": "polite", hidden: true });
    this.element = h(
      "div",
      {
        class: "skein-curve",
        tabindex: "0",
        role: "group",
        "aria-label": t("Relative change of each model call; left and right arrow go through the calls"),
        onpointermove: (event) => this.point(this.nearest(event.offsetX)),
        onpointerleave: () => this.point(null),
        onblur: () => this.point(null),
        onkeydown: (event) => this.press(event),
      },
      this.drawing,
      this.tip,
    );
    this.key = ""; // of what is drawn
    this.at = null; // the call that is looked at
    this.run = null;
    this.resized = new ResizeObserver(() => this.draw());
    this.resized.observe(this.element);
  }

  end() {
    this.resized.disconnect();
  }

  /** Draw a run with its calls coloured by `decisions` (true: reused), and another one behind it. threshold: one that is
   * tried on it; null: the run's own, which may have one for each call. */
  show(run, threshold, decisions, behind) {
    if (run.id !== this.run?.id) this.at = null;
    Object.assign(this, { run, threshold, decisions, behind });
    const last = run.calls.at(-1);
    const key = JSON.stringify([run.id, run.calls.length, run.ended, threshold, last.ms, behind?.id, behind?.version]);
    if (key !== this.key) this.draw();
    this.key = key;
  }

  draw() {
    const { width, height } = this.element.getBoundingClientRect();
    if (!this.run || width < 80 || height < 60) return;
    this.measure(width, height);
    this.drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.drawing.replaceChildren(...this.grid(), ...this.lines(), ...this.thresholdLine(), ...this.points(), ...this.cursor());
    this.describe();
  }

  /** The scales: x over the number of the call, y over the logarithm of the change. */
  measure(width, height) {
    const calls = [...this.run.calls, ...(this.behind?.calls ?? [])];
    const changes = calls.map((call) => call.change).filter((change) => change > 0);
    const levels = this.follows() && changes.length ? [] : [this.level()];
    const low = Math.max(Math.min(...changes, ...levels.map((level) => level || FLOOR)) * 0.7, FLOOR);
    const high = Math.max(Math.max(...changes, ...levels) * 1.4, low * 4);
    const [left, right] = [MARGIN.left, width - MARGIN.right];
    const [top, bottom] = [MARGIN.top, height - MARGIN.bottom];
    const count = Math.max(this.expectedCalls(), this.behind?.calls.length ?? 0, 2);
    Object.assign(this, { left, right, top, bottom, low, high, count });
    this.x = (index) => left + 8 + ((right - left - 16) * index) / (count - 1);
    this.y = (change) => {
      const part = Math.log(Math.max(change, low) / low) / Math.log(high / low);
      return bottom - (bottom - top) * Math.min(part, 1);
    };
  }

  /** How many calls the run will have: as many a step as so far. */
  expectedCalls() {
    const { calls, steps, ended } = this.run;
    if (ended || !steps || !calls.length) return calls.length;
    return Math.max(Math.round((calls.length * steps) / (calls.at(-1).step + 1)), calls.length);
  }

  grid() {
    let room = Infinity; // the lowest place that is free of labels
    const shown = TICKS.filter((tick) => {
      const fits = tick >= this.low && tick <= this.high && this.y(tick) <= room;
      if (fits) room = this.y(tick) - 13;
      return fits;
    });
    const across = shown.flatMap((tick) => [
      svg("line", { class: "skein-grid", x1: this.left, x2: this.right, y1: this.y(tick), y2: this.y(tick) }),
      svg("text", { class: "skein-label", x: this.left - 6, y: this.y(tick) + 4, "text-anchor": "end" }, String(tick)),
    ]);
    const each = Math.max(Math.ceil(this.count / Math.max((this.right - this.left) / 48, 1)), 1);
    const below = [];
    for (let number = 1; number <= this.count; number += each) {
      const place = { class: "skein-label", x: this.x(number - 1), y: this.bottom + 23, "text-anchor": "middle" };
      below.push(svg("text", place, String(number)));
    }
    const name = { class: "skein-label", x: 4, y: 13 };
    const calls = { class: "skein-label", x: this.right + 8, y: this.bottom + 23 };
    below.push(svg("text", name, t("Relative change")), svg("text", calls, t("Model call")));
    const axis = { class: "skein-axis", x1: this.left, x2: this.right, y1: this.bottom + 7, y2: this.bottom + 7 };
    return [...across, svg("line", axis), ...below];
  }

  lines() {
    const line = ({ calls }, kind) => {
      const known = calls.map((call, index) => [index, call.change]).filter(([, change]) => change !== null);
      const points = known.map(([index, change]) => `${this.x(index)},${this.y(change)}`).join(" ");
      return svg("polyline", { class: kind, points });
    };
    return [this.behind && line(this.behind, "skein-behind"), line(this.run, "skein-line")].filter(Boolean);
  }

  /** Whether the threshold shown is one for each call. */
  follows() {
    return this.threshold === null && this.run.share > 0;
  }

  /** The one threshold for all calls. */
  level() {
    return this.threshold ?? thresholdOf(this.run);
  }

  thresholdLine() {
    const { calls } = this.run;
    const places = this.follows()
      ? calls.map((call, index) => [this.x(index), this.y(call.threshold)])
      : [this.left, this.right].map((x) => [x, this.y(this.level())]);
    const end = places.at(-1)[1];
    const text = { class: "skein-label skein-threshold-label", x: this.right + 8, y: end + 4 }; // clear of all points
    const name = this.follows() ? t("Threshold") : t("Threshold {value}", { value: this.level() });
    return [svg("polyline", { class: "skein-threshold", points: places.join(" ") }), svg("text", text, name)];
  }

  /** Reused calls are diamonds, computed ones are circles; those without a change are rings on the axis. */
  points() {
    return this.run.calls.map((call, index) => {
      const [x, y] = [this.x(index), call.change === null ? this.bottom + 7 : this.y(call.change)];
      const reused = this.decisions[index];
      const kind = [
        reused ? "skein-reused" : "skein-computed",
        reused === call.reused ? "" : "skein-differs",
        call.change === null ? "skein-unknown" : "",
      ].join(" ");
      return reused
        ? svg("path", { class: kind, d: `M${x} ${y - 5.5}l5.5 5.5l-5.5 5.5l-5.5-5.5z` })
        : svg("circle", { class: kind, cx: x, cy: y, r: 4 });
    });
  }

  cursor() {
    if (this.at === null || this.at >= this.run.calls.length) return [];
    const x = this.x(this.at);
    return [svg("line", { class: "skein-cursor", x1: x, x2: x, y1: this.top, y2: this.bottom })];
  }

  nearest(x) {
    const index = Math.round(((x - this.left - 8) / (this.right - this.left - 16)) * (this.count - 1));
    return Math.min(Math.max(index, 0), this.run.calls.length - 1);
  }

  press(event) {
    const last = (this.run?.calls.length ?? 0) - 1;
    const at = this.at ?? -1;
    const targets = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last, Escape: null };
    if (!(event.key in targets) || last < 0) return;
    event.preventDefault();
    event.stopPropagation(); // the canvas has arrow keys of its own
    const target = targets[event.key];
    this.point(target === null ? null : Math.min(Math.max(target, 0), last));
  }

  /** Look at one call, or at none. */
  point(index) {
    if (!this.run?.calls.length || index === this.at) return;
    this.at = index;
    this.draw();
  }

  describe() {
    const call = this.at === null ? null : this.run.calls[this.at];
    this.tip.hidden = !call;
    if (!call) return;
    const parts = [
      t("Call {number}, step {step}", { number: this.at + 1, step: call.step + 1 }),
      t("sigma {value}", { value: call.sigma.toPrecision(3) }),
      t("change {value}", { value: relative(call.change) }),
      `${call.reused ? t("reused") : t("computed")}, ${milliseconds(call.ms)}`,
    ];
    if (this.follows()) parts.push(t("threshold {value}", { value: relative(call.threshold) }));
    if (this.decisions[this.at] !== call.reused) {
      const now = this.decisions[this.at] ? t("reused") : t("computed");
      parts.push(t("with threshold {value}: {decision}", { value: this.threshold, decision: now }));
    }
    this.tip.replaceChildren(...parts.map((part) => h("div", {}, part)));
    const x = this.x(this.at);
    this.tip.classList.toggle("skein-tip-left", x > (this.left + this.right) / 2);
    this.tip.style.insetInlineStart = `${x}px`;
  }
}
