// The panel without knowing its icon: a command, a key, a menu entry, and Skein's settings. Their texts in other languages are in
// locales/*/commands.json and settings.json, where ComfyUI looks for them.

import { app } from "../../scripts/app.js";

import { fitTitle, hasOurs, isOurs } from "./graph.js";

const SHOW = "Skein.ShowPanel";
const TOGGLE = "Workspace.ToggleBottomPanelTab.skein"; // ComfyUI's own, of our tab
const OPEN_AT_RUN = "Skein.Panel.OpenAtRun";
const DEVICES = "Skein.Nodes.Devices";
const ALL = "all";

const valueOf = (id) => app.extensionManager?.setting?.get(id);

/** What goes into the extension. isShown: whether the panel is on the page. */
export function found(isShown) {
  const show = () => app.extensionManager.command.execute(TOGGLE);
  return {
    commands: [{ id: SHOW, label: "Skein: show the panel", icon: "pi pi-chart-line", function: show }],
    keybindings: [{ commandId: SHOW, combo: { key: "k", alt: true } }],
    menuCommands: [{ path: ["View"], commands: [SHOW] }],
    settings: [
      {
        id: OPEN_AT_RUN,
        category: ["Skein", "Panel", "OpenAtRun"],
        name: "Open the panel when a run starts",
        tooltip: "Only for workflows with a node of Skein.",
        type: "boolean",
        defaultValue: false,
      },
      {
        id: DEVICES,
        category: ["Skein", "Nodes", "Devices"],
        name: "Default devices",
        tooltip: "The devices of new Speed Up, Context Parallel and VAE Decode, Parallel nodes: all, or numbers as in 0,1.",
        type: "text",
        defaultValue: ALL,
      },
    ],
    /** A new node of ours; one of a workflow gets the workflow's values and size after this. */
    nodeCreated(node) {
      if (!isOurs(node)) return;
      fitTitle(node);
      const devices = node.widgets?.find((widget) => widget.name === "devices");
      const wanted = String(valueOf(DEVICES) ?? "").trim();
      if (devices && wanted && wanted !== ALL) devices.value = wanted;
    },
    /** A run of this page starts. */
    runStarts() {
      if (valueOf(OPEN_AT_RUN) && !isShown() && hasOurs()) show();
    },
  };
}
