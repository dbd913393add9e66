// The workflow that is open: its nodes as the server knows them.

import { app } from "../../scripts/app.js"; // relative: ComfyUI may be served below a path

import { t } from "./dom.js";

const CACHE_NODE = "SkeinFirstBlockCache";
const SPEED_UP_NODE = "SkeinSpeedUp"; // chooses the threshold itself
const THRESHOLD = "residual_diff_threshold";
const SHARE = "reuse_share"; // above 0 it decides, not the threshold
const OUTSIDE = -10; // the origin of links that come from outside of a subgraph

const root = () => app.rootGraph ?? app.graph;

/** The node with an id as the server knows it: "12", or "5:12" for node 12 in the subgraph that node 5 is. */
export function findNode(id) {
  let graph = root();
  let node = null;
  for (const part of String(id ?? "").split(":")) {
    node = graph?.getNodeById(Number(part)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

/** Whether the open workflow, or a subgraph in it, has a node of this pack. */
export function hasOurs(graph = root()) {
  return (graph?.nodes ?? []).some((node) => isOurs(node) || (node.subgraph && hasOurs(node.subgraph)));
}

export function isOurs(node) {
  return String(node.comfyClass ?? "").startsWith("Skein");
}

/** Which workflow and node a sampling is of, as a text. */
export function placeOf({ workflow_id: workflow, node_id: id }) {
  if (workflow === null) return t("A prompt that a program sent");
  const isOpen = workflow === root()?.id;
  const tabs = app.extensionManager?.workflow?.openWorkflows ?? [];
  const tab = tabs.find((each) => (each.activeState ?? each.initialState)?.id === workflow);
  const name = (isOpen ? app.extensionManager?.workflow?.activeWorkflow : tab)?.filename ?? t("another workflow");
  const node = isOpen && findNode(id)?.title;
  return node ? t("{node} in {workflow}", { node, workflow: name }) : name;
}

/** Make a new node as wide as its title. LiteGraph does so for nodes with widgets only. */
export function fitTitle(node) {
  if (node.widgets?.length) return;
  node.setSize([Math.max(node.size[0], node.computeSize()[0] + LiteGraph.NODE_TITLE_HEIGHT), node.size[1]]);
}

/** Why the node of a run takes no threshold; "": nothing is known against it. */
export function refusal(run) {
  const node = run.workflow_id === root().id ? findNode(run.node_id) : null;
  return node?.comfyClass === SPEED_UP_NODE ? t("Add First-Block Cache after Speed Up to set a threshold.") : "";
}

/** The node and the widget that set an input: outside of a subgraph if the widget is there too. path: ids, as findNode's. */
function setBy(path, name) {
  const node = findNode(path.join(":"));
  const link = node?.graph.getLink(node.inputs?.find((input) => input.widget?.name === name)?.link);
  if (!link) return [node, node?.widgets?.find((widget) => widget.name === name)];
  if (Number(link.origin_id) !== OUTSIDE) throw new Error(t("The threshold of this node comes from another node; change it there."));
  return setBy(path.slice(0, -1), node.graph.inputs[link.origin_slot].name);
}

/** Write a threshold into the node of a run; a sentence on it. Raises Error where that cannot be. */
export function writeThreshold(run, threshold) {
  if (run.workflow_id === null) throw new Error(t("This run was sent by a program; there is no workflow to write into."));
  if (run.workflow_id !== root().id) throw new Error(t("This run came from another workflow; open that one first."));
  const isCache = findNode(run.node_id)?.comfyClass === CACHE_NODE;
  const path = String(run.node_id).split(":");
  const [node, widget] = isCache ? setBy(path, THRESHOLD) : [];
  if (!widget) throw new Error(t("The node of this run is not in the open workflow."));
  const [, share] = run.share ? setBy(path, SHARE) : [];
  for (const [each, value] of [[widget, threshold], [share, 0]]) {
    if (!each) continue;
    each.value = value;
    each.callback?.(value);
  }
  app.canvas?.setDirty(true, true);
  return t("{value} is now in {node}; the next run uses it.", { value: threshold, node: node.title });
}
