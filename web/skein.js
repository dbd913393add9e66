// Skein in ComfyUI's page: the bottom panel "Skein", fed by the server's messages.

import { app } from "../../scripts/app.js"; // relative: ComfyUI may be served below a path
import { api } from "../../scripts/api.js";

import { t, translateBy } from "./dom.js";
import { Panel } from "./panel.js";
import { Store } from "./store.js";

const STATE = "skein.state";
const CACHE_NODE = "SkeinFirstBlockCache";
const THRESHOLD = "residual_diff_threshold";

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

/** The node with an id as the server knows it: "12", or "5:12" for node 12 in the subgraph that node 5 is. */
function findNode(id) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const part of String(id ?? "").split(":")) {
    node = graph?.getNodeById(Number(part)) ?? null;
    graph = node?.subgraph;
  }
  return node;
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

  async apply(run, threshold) {
    if (run.workflow_id === null) throw new Error(t("This run was sent by a program; there is no workflow to write into."));
    if (run.workflow_id !== (app.rootGraph ?? app.graph).id) {
      throw new Error(t("This run came from another workflow; open that one first."));
    }
    const node = findNode(run.node_id);
    const widget = node?.comfyClass === CACHE_NODE && node.widgets?.find((each) => each.name === THRESHOLD);
    if (!widget) throw new Error(t("The node of this run is not in the open workflow."));
    if (node.inputs?.some((input, slot) => input.widget?.name === THRESHOLD && node.isInputConnected(slot))) {
      throw new Error(t("The threshold of this node comes from another node; change it there."));
    }
    widget.value = threshold;
    widget.callback?.(threshold);
    app.canvas?.setDirty(true, true);
    return t("{value} is in {node}; it counts from the next run on.", { value: threshold, node: node.title });
  },
};

/** The panel's texts in the language that ComfyUI is set to. English needs none. */
async function translations() {
  const language = app.extensionManager?.setting?.get("Comfy.Locale");
  const all = await ask("/i18n");
  return all[language]?.skein;
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

app.registerExtension({
  name: "Skein",
  bottomPanelTabs: [
    {
      id: "skein",
      title: "Skein",
      type: "custom",
      render(element) {
        panel?.end();
        panel = new Panel(store, actions);
        element.style.height = "100%";
        element.replaceChildren(panel.element);
        store.refresh();
      },
      destroy: close,
    },
  ],
  async setup() {
    const style = document.createElement("link");
    style.rel = "stylesheet";
    style.href = new URL("./style.css", import.meta.url).href;
    document.head.append(style);
    api.addEventListener(STATE, receive);
    api.addEventListener("reconnecting", () => store.lost());
    api.addEventListener("reconnected", () => panel && store.refresh());
    try {
      translateBy(await translations());
    } catch {
      // The panel stays English.
    }
  },
});
