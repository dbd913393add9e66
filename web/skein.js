// Skein in ComfyUI's page: the bottom panel "Skein", fed by the server's messages.

import { app } from "../../scripts/app.js"; // relative: ComfyUI may be served below a path
import { api } from "../../scripts/api.js";

import { t, translateBy } from "./dom.js";
import { findNode, isOurs, placeOf, refusal, writeThreshold } from "./graph.js";
import { Panel } from "./panel.js";
import { found } from "./settings.js";
import { say, sayBy } from "./status.js";
import { Store } from "./store.js";

const STATE = "skein.state";
const STYLES = ["./style.css", "./charts.css"];

/** The JSON answer of one of Skein's routes; a refusal is thrown with the server's sentence. */
async function ask(path, options) {
  const response = await api.fetchApi(path, options);
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error ?? `HTTP ${response.status}`);
  return answer;
}

function post(path, body) {
  return ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
}

let asked = Promise.resolve(); // one question after the other: the last one counts

/** Have the server send its state to this page, or not. They end with a connection, so ask again on a new one. */
function listen(wanted) {
  asked = asked
    .catch(() => {})
    .then(async () => {
      if (!api.clientId) await new Promise((done) => api.addEventListener("status", done, { once: true }));
      return post("/skein/listen", { client_id: api.clientId, listen: wanted });
    });
  return asked;
}

const store = new Store(async () => {
  await listen(true); // first: what happens after the status is read must not be missed
  return ask("/skein/status");
});

/** Have the browser save a file. */
function download(blob, name) {
  const link = document.createElement("a");
  Object.assign(link, { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const actions = {
  async release() {
    const { released } = await post("/skein/release", {});
    return released ? t("The workers have ended; their memory is free.") : t("There were no workers.");
  },

  async copy(text) {
    await navigator.clipboard.writeText(text);
    return t("The report is in the clipboard.");
  },

  async save(text, run) {
    const name = `skein-${new Date(1000 * run.started).toISOString().slice(0, 19).replace(/\D/g, "-")}`;
    const response = await api.fetchApi(`/skein/runs/${run.id}.png`);
    if (!response.ok) throw new Error((await response.json().catch(() => ({}))).error ?? `HTTP ${response.status}`);
    download(await response.blob(), `${name}.png`);
    download(new Blob([text], { type: "application/json" }), `${name}.json`);
    return t("{name}.json and .png are in the downloads.", { name });
  },

  refusal,

  async apply(run, threshold) {
    return writeThreshold(run, threshold);
  },
};

/** Have the panel and the nodes speak the language that ComfyUI is set to. English needs no translations. */
async function translate() {
  const language = app.extensionManager?.setting?.get("Comfy.Locale");
  const { [language]: texts } = await ask("/i18n");
  translateBy(texts?.skein);
  sayBy(texts?.skein_status);
}

/** A node says something. ComfyUI has it on the node already, in English, so the event is sent again. */
function translateStatus({ detail }) {
  const node = findNode(detail.nodeId);
  const text = node && isOurs(node) ? say(detail.text) : detail.text;
  if (text !== detail.text) queueMicrotask(() => api.dispatchCustomEvent("progress_text", { ...detail, text }));
}

let panel = null;

function close() {
  panel?.end();
  panel = null;
  listen(false).catch(() => {}); // a server that is gone sends nothing anyway
}

/** A message. ComfyUI tells nobody that another tab of the bottom panel has taken the place of this one. */
function receive({ detail }) {
  if (panel && !panel.element.isConnected) close();
  else store.receive(detail);
}

const { runStarts, ...seams } = found(() => Boolean(panel?.element.isConnected));

app.registerExtension({
  name: "Skein",
  ...seams,
  bottomPanelTabs: [
    {
      id: "skein",
      title: "Skein",
      type: "custom",
      render(element) {
        panel?.end();
        panel = new Panel(store, actions, placeOf);
        element.style.height = "100%";
        element.replaceChildren(panel.element);
        store.refresh();
      },
      destroy: close,
    },
  ],
  async setup() {
    for (const file of STYLES) {
      const style = document.createElement("link");
      style.rel = "stylesheet";
      style.href = new URL(file, import.meta.url).href;
      document.head.append(style);
    }
    api.addEventListener(STATE, receive);
    api.addEventListener("progress_text", translateStatus);
    api.addEventListener("execution_start", runStarts);
    api.addEventListener("reconnecting", () => store.lost());
    api.addEventListener("reconnected", () => panel && store.refresh());
    try {
      await translate();
    } catch {
      // The panel stays English.
    }
  },
});
