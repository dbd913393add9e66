// One card for each process that computes: ComfyUI's own, and the workers.

import { gigabytes, h, milliseconds, t } from "./dom.js";

/** Texts of the states that live.py gives a process. */
export function stateName(state) {
  const names = {
    starting: t("starting"),
    loading: t("loading"),
    ready: t("ready"),
    running: t("running"),
    ended: t("ended"),
    failed: t("failed"),
  };
  return names[state] ?? state;
}

function memory({ memory_used: used, memory_total: total, device }) {
  if (!used || !total) return null;
  const text = t("{used} of {total} GB", { used: gigabytes(used), total: gigabytes(total) });
  const part = Math.min(used / total, 1);
  return h(
    "div",
    { class: "skein-memory" },
    h(
      "div",
      {
        class: "skein-meter",
        role: "meter",
        "aria-label": t("Memory of {device}", { device }),
        "aria-valuemin": "0",
        "aria-valuemax": "100",
        "aria-valuenow": String(Math.round(100 * part)),
        "aria-valuetext": text,
      },
      h("div", { class: part > 0.92 ? "skein-fill skein-full" : "skein-fill", style: `width: ${100 * part}%` }),
    ),
    h("span", {}, text),
  );
}

function figures(process) {
  const percent = (value) => `${Math.round(value)} %`;
  return [
    process.step_ms !== null && [t("Time per call"), milliseconds(process.step_ms)],
    process.utilisation !== null && [t("GPU use"), percent(process.utilisation)],
    process.exchange_share !== null && [t("Exchange"), percent(100 * process.exchange_share)],
    process.pid !== null && [t("Process"), String(process.pid)],
  ]
    .filter(Boolean)
    .map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)));
}

/** The card of a process as live.snapshot() describes it. */
export function card(process) {
  const name = process.rank === null ? "ComfyUI" : t("Worker {rank}", { rank: process.rank });
  return h(
    "li",
    { class: "skein-card", "data-state": process.state },
    h(
      "div",
      { class: "skein-card-head" },
      h("strong", {}, name),
      h("span", { class: "skein-device" }, process.device),
      h("span", { class: "skein-state" }, stateName(process.state)),
    ),
    process.text ? h("p", { class: "skein-why" }, process.text) : null,
    memory(process),
    h("dl", { class: "skein-figures" }, figures(process)),
  );
}
