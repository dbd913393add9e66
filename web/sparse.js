// What sparse attention did in a run: a map of layers and heads, and density and error over the model calls.

import { h, svg, t } from "./dom.js";

const NAME = 11; // pixels: height of a letter, the least room of a name
const LETTER = 6.2; // pixels: its width
const WIDTH = 280; // pixels: of the map's cells, where they are neither too small nor too large
const HEIGHT = 200;
const CHART = { width: 300, height: 88, left: 44, right: 10, top: 18, bottom: 22 }; // pixels

const percent = (part, digits = 0) => `${(100 * part).toFixed(digits)} %`;
const within = (least, value, most) => Math.min(Math.max(value, least), most);

/** A run in a sentence, as sparse_runs.py says it in English. */
export function summary({ calls, density, error, speedup }) {
  if (!calls.some((call) => call.sparse)) return t("all attention was dense");
  const values = { density: percent(density), error: percent(error, 1) };
  if (speedup === null) return t("{density} of attention computed, {error} error", values);
  const times = `${speedup.toFixed(1)}x`;
  return t("{density} of attention computed, {error} error, attention {times} as fast", { ...values, times });
}

/** The part of the panel that shows a run under sparse attention; show() draws what has changed. */
export class SparseSection {
  constructor() {
    this.map = new DensityMap();
    this.summary = h("span", { class: "skein-sparse-summary" });
    this.later = h("p", { class: "skein-assumption" }, t("The map of layers and heads appears when the run has ended."));
    this.charts = h("div", { class: "skein-charts" });
    this.key = ""; // of the charts that are drawn
    this.element = h(
      "section",
      { class: "skein-sparse", "aria-label": "Sparse Attention", hidden: true },
      h("header", {}, h("strong", {}, "Sparse Attention"), this.summary),
      h("div", { class: "skein-sparse-parts" }, this.map.element, this.later, this.charts),
    );
  }

  /** Draw a run, or nothing. */
  show(run) {
    this.element.hidden = !run;
    if (!run) return;
    const text = summary(run);
    if (this.summary.textContent !== text) this.summary.textContent = text;
    this.map.show(run);
    this.later.hidden = run.ended;
    const key = JSON.stringify([run.id, run.calls.length, run.ended]);
    if (key !== this.key) this.charts.replaceChildren(...(run.calls.length ? charts(run) : []));
    this.key = key;
  }
}

/** The map: a row for each layer, a column for each head. The pointer and arrow keys go through the cells. */
class DensityMap {
  constructor() {
    this.drawing = svg("svg", { class: "skein-map-drawing", "aria-hidden": "true" });
    this.cursor = svg("rect", { class: "skein-map-cursor" });
    this.field = h(
      "div",
      {
        class: "skein-map-field",
        tabindex: "0",
        role: "group",
        "aria-label": t("Part of attention computed, by layer and head; arrow keys go through the cells"),
        onpointermove: (event) => this.point(...this.nearest(event.offsetX, event.offsetY)),
        onpointerleave: () => this.point(null, null),
        onblur: () => this.point(null, null),
        onkeydown: (event) => this.press(event),
      },
      this.drawing,
    );
    this.said = h("p", { class: "skein-map-said", role: "status", "aria-live": "polite" });
    const legend = h(
      "p",
      { class: "skein-map-legend" },
      h("span", {}, t("Part of attention computed")),
      h("span", {}, "0 %"),
      h("span", { class: "skein-map-scale" }),
      h("span", {}, "100 %"),
    );
    this.element = h("div", { class: "skein-map", hidden: true }, legend, this.field, this.said);
    this.key = "";
    this.layers = [];
  }

  /** Draw a run that has ended: its layers do not change any more, so that it is drawn once. */
  show(run) {
    this.element.hidden = !run.ended || !run.layers.length;
    const key = JSON.stringify([run.id, run.layers.length]);
    if (this.element.hidden || key === this.key) return;
    this.key = key;
    this.layers = run.layers;
    this.measure();
    this.drawing.replaceChildren(...this.cells(), ...this.layerNames(), ...this.headNumbers(), this.cursor);
    this.point(null, null);
  }

  measure() {
    const rows = this.layers.length;
    this.columns = Math.max(...this.layers.map((layer) => layer.density.length));
    this.left = Math.ceil(6 + LETTER * Math.max(...this.layers.map((layer) => layer.path.length)));
    this.wide = within(5, Math.floor(WIDTH / this.columns), 40);
    this.high = within(3, Math.floor(HEIGHT / rows), 20);
    const size = { width: this.left + this.columns * this.wide + 2, height: rows * this.high + 2 * NAME + 10 };
    for (const element of [this.drawing, this.field]) {
      element.style.width = `${size.width}px`;
      element.style.height = `${size.height}px`;
    }
    this.cursor.setAttribute("width", this.wide);
    this.cursor.setAttribute("height", this.high);
  }

  cells() {
    const { left, wide, high } = this;
    const frame = { class: "skein-map-frame", x: left - 1, y: 0 };
    const size = { width: this.columns * wide + 2, height: this.layers.length * high + 2 };
    const drawn = this.layers.flatMap(({ density }, row) =>
      density.map((part, head) => {
        const place = { x: left + head * wide, y: 1 + row * high, width: wide, height: high };
        return svg("rect", { class: "skein-cell", ...place, style: `--part: ${100 * part}%` });
      }),
    );
    return [svg("rect", { ...frame, ...size }), ...drawn];
  }

  /** As many as have room. */
  layerNames() {
    const each = Math.ceil((NAME + 1) / this.high);
    const shown = this.layers.map((layer, row) => [layer.path, row]).filter(([, row]) => row % each === 0);
    return shown.map(([path, row]) => {
      const place = { x: this.left - 5, y: (row + 0.5) * this.high + 5, "text-anchor": "end" };
      return svg("text", { class: "skein-label", ...place }, path);
    });
  }

  headNumbers() {
    const { left, wide, columns } = this;
    const each = Math.ceil((LETTER * (String(columns).length + 1)) / wide);
    const y = this.layers.length * this.high + NAME + 4;
    const label = (x, below, text) => svg("text", { class: "skein-label", x, y: below, "text-anchor": "middle" }, text);
    const numbers = [];
    for (let head = 0; head < columns; head += each) numbers.push(label(left + (head + 0.5) * wide, y, String(head)));
    return [...numbers, label(left + (columns * wide) / 2, y + NAME + 1, t("Head"))];
  }

  /** The cell at a point, as row and head; nulls beside the map. */
  nearest(x, y) {
    const [row, head] = [Math.floor((y - 1) / this.high), Math.floor((x - this.left) / this.wide)];
    const inside = this.layers[row]?.density[head] !== undefined;
    return inside ? [row, head] : [null, null];
  }

  press(event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (!(event.key in steps) && event.key !== "Escape") return;
    event.preventDefault();
    event.stopPropagation(); // the canvas has arrow keys of its own
    if (event.key === "Escape") return this.point(null, null);
    if (this.row === null) return this.point(0, 0);
    const [down, right] = steps[event.key];
    const row = within(0, this.row + down, this.layers.length - 1);
    this.point(row, within(0, this.head + right, this.layers[row].density.length - 1));
  }

  /** Look at one cell, or at none. Only the cursor moves: the cells are not drawn again. */
  point(row, head) {
    Object.assign(this, { row, head });
    this.cursor.style.display = row === null ? "none" : "";
    if (row === null) {
      this.said.textContent = "";
      return;
    }
    const { path, density, error } = this.layers[row];
    this.cursor.setAttribute("x", this.left + head * this.wide);
    this.cursor.setAttribute("y", 1 + row * this.high);
    const values = { layer: path, head, density: percent(density[head]), error: percent(error[head], 1) };
    this.said.textContent = t("{layer}, head {head}: {density} computed, {error} error", values);
  }
}

/** Density and error of each call, one below the other. */
function charts(run) {
  const errors = run.calls.map((call) => call.error);
  const highest = Math.max(...errors, run.max_error ?? 0, 0.001);
  return [
    chart(run, { name: t("Part of attention computed"), kind: "skein-density-line", most: 1 }, (call) => call.density),
    chart(run, { name: t("Error"), kind: "skein-error-line", most: highest, limit: run.max_error }, (call) => call.error),
  ];
}

/** One value of each call as a line, over the steps. most: the highest value shown. limit: what is accepted. */
function chart(run, { name, kind, most, limit }, value) {
  const { width, height, left, right, top, bottom } = CHART;
  const [far, floor] = [width - right, height - bottom];
  const x = (index) => left + ((far - left) * index) / Math.max(run.calls.length - 1, 1);
  const y = (part) => floor - ((floor - top) * part) / most;
  const digits = most < 0.1 ? 1 : 0;
  const across = [0, most].flatMap((part) => [
    svg("line", { class: part ? "skein-grid" : "skein-axis", x1: left, x2: far, y1: y(part), y2: y(part) }),
    svg("text", { class: "skein-label", x: left - 5, y: y(part) + 4, "text-anchor": "end" }, percent(part, digits)),
  ]);
  const title = svg("text", { class: "skein-label", x: left, y: 11 }, name);
  const line = run.calls.map((call, index) => `${x(index)},${y(value(call))}`);
  if (line.length === 1) line.push(`${x(0) + 4},${y(value(run.calls[0]))}`); // of one call there would be no line
  return svg(
    "svg",
    { class: "skein-chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": name },
    ...across,
    ...(limit ? [svg("line", { class: "skein-threshold", x1: left, x2: far, y1: y(limit), y2: y(limit) })] : []),
    svg("polyline", { class: kind, points: line.join(" ") }),
    title,
    ...stepNumbers(run.calls, x, height - 3),
  );
}

/** The number of a step at its first call, as many as have room, and what they are. */
function stepNumbers(calls, x, y) {
  const label = (at, anchor, text) => svg("text", { class: "skein-label", x: at, y, "text-anchor": anchor }, text);
  const name = t("Step");
  const numbers = [label(CHART.left - 5, "end", name)];
  let free = CHART.left;
  calls.forEach(({ step }, index) => {
    if (calls[index - 1]?.step === step || x(index) < free) return;
    numbers.push(label(x(index), "middle", String(step + 1)));
    free = x(index) + 24;
  });
  return numbers;
}
