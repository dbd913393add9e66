// What has gone wrong, above the panel: whose it is, until it is closed or the next run begins.

import { h, renew, t } from "./dom.js";

/** The banner; show() draws it. placeOf: which workflow and node a sampling is of. */
export class Banner {
  constructor(placeOf) {
    this.placeOf = placeOf;
    this.closed = null; // when the sampling began whose error was closed
    this.element = h("div", { class: "skein-banner", role: "alert", hidden: true });
  }

  show(store) {
    const { connection, error, sampling } = store;
    const failed = sampling.error !== "interrupted" && this.closed !== sampling.started && sampling.error;
    const text = {
      reconnecting: t("The connection to ComfyUI is lost; trying again. The panel shows the last known state."),
      error: t("Skein's status could not be read ({error}).", { error }),
      ready: failed ? `${this.placeOf(sampling)}: ${failed}` : "",
    }[connection];
    this.element.hidden = !text;
    renew(this.element, [text ?? "", connection], () => [h("span", {}, text ?? ""), this.button(store)].filter(Boolean));
  }

  button(store) {
    const { connection, sampling } = store;
    if (connection === "error") return h("button", { type: "button", onclick: () => store.refresh() }, t("Try again"));
    if (connection !== "ready") return null;
    const close = () => {
      this.closed = sampling.started;
      this.element.hidden = true;
    };
    return h("button", { type: "button", class: "skein-close", "aria-label": t("Close"), onclick: close }, "\u00d7");
  }
}
