#!/usr/bin/env python3
"""Make the shipped subgraph blueprint `subgraphs/<title>.json`: what Speed Up does on one GPU, as separate nodes.

    python3 scripts/dev.py scripts/blueprint.py

ComfyUI 0.30 offers it in the node library and in the search. Names, types and defaults come from the nodes' schemas.
"""

import json
import uuid
from itertools import pairwise
from typing import Any

from workflows import (  # type: ignore[attr-defined]  # scripts/workflows.py, not the folder
    OPTIONAL_SHAPE,
    ROOT,
    default_size,
    inputs_of,
    is_widget,
    make_node,
)

TITLE = "Speed Up in Parts (Skein)"  # the file's name, which is what ComfyUI shows and searches
DESCRIPTION = (
    "What Speed Up (Skein) does on one GPU with the preset balanced, as separate nodes: attention, FP8, compiled "
    "blocks and the first-block cache. Connect it between the model loader and the sampler, and open it to see or "
    "change the parts."
)
PATH = ROOT / "subgraphs" / f"{TITLE}.json"
PARTS = {  # the nodes inside, in their order -> their widgets that are on the outside too: name there -> name inside
    "SkeinAttention": {"kernel": "kernel", "allow_8bit": "allow_8bit"},
    "SkeinFP8Quantize": {"fp8_mode": "mode"},
    "SkeinCompile": {"compile_mode": "mode"},
    "SkeinFirstBlockCache": {"residual_diff_threshold": "residual_diff_threshold"},
}
INPUT, OUTPUT = -10, -20  # what ComfyUI numbers the two ends of a subgraph
OUTSIDE = -1  # and the owner of widgets that its inputs have
LEFT, TOP, GAP = 300, 120, 60
END_SIZE, ROW = (200, 40), 20


def id_of(*names: str) -> str:
    """An id that is always the same for the same thing."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join((TITLE, *names))))


def build(object_info: dict) -> dict:
    """The file: a workflow with one node, whose type is the subgraph defined beside it."""
    parts = make_parts(object_info)
    inputs: list[dict[str, Any]] = [{"name": "model", "type": "MODEL"}]
    ends = [INPUT, *(part["id"] for part in parts), OUTPUT]
    links = [[source, 0, target, 0, "MODEL"] for source, target in pairwise(ends)]
    values = []
    for part in parts:
        slots = {socket["name"]: slot for slot, socket in enumerate(part["inputs"])}
        for name, inside in PARTS[part["type"]].items():
            kind = part["inputs"][slots[inside]]["type"]
            links.append([INPUT, len(inputs), part["id"], slots[inside], kind])
            inputs.append({"name": name, "type": kind, "widget": {"name": name}})
            values.append(inputs_of(object_info[part["type"]])[inside][1]["default"])
    own = {
        "id": len(parts) + 1,
        "type": id_of(),
        "pos": [0, 0],
        "size": [360, 180],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [{**each, "link": None} for each in inputs],
        "outputs": [{"name": "MODEL", "type": "MODEL", "links": []}],
        "title": TITLE,
        "properties": {"proxyWidgets": [[str(OUTSIDE), each["name"]] for each in inputs[1:]]},
        "widgets_values": values,
    }
    return {
        "revision": 0,
        "last_node_id": own["id"],
        "last_link_id": 0,
        "nodes": [own],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [define(parts, inputs, put_links(parts, links))]},
        "extra": {},
    }


def make_parts(object_info: dict) -> list[dict]:
    """The nodes inside, in a row, with the nodes' defaults; widgets have sockets as the canvas gives them."""
    parts: list[dict] = []
    left = LEFT
    for number, class_type in enumerate(PARTS, start=1):
        found = inputs_of(object_info[class_type])
        widgets = {name: options["default"] for name, (kind, options, _) in found.items() if is_widget(kind, options)}
        entry = {"class_type": class_type, "inputs": widgets, "_meta": {"pos": [left, TOP]}}
        part = make_node(str(number), number - 1, entry, object_info)
        part["size"] = default_size(part)
        for name in widgets:
            socket = {"name": name, "shape": OPTIONAL_SHAPE, "type": found[name][0], "widget": {"name": name}}
            part["inputs"].append({**socket, "link": None})
        parts.append(part)
        left += part["size"][0] + GAP
    return parts


def put_links(parts: list[dict], links: list[list]) -> list[dict]:
    """Tell the nodes' sockets of the links; the links as a subgraph has them."""
    by_id = {part["id"]: part for part in parts}
    for number, (source, source_slot, target, slot, _) in enumerate(links, start=1):
        if source != INPUT:
            by_id[source]["outputs"][source_slot]["links"].append(number)
        if target != OUTPUT:
            by_id[target]["inputs"][slot]["link"] = number
    names = ("origin_id", "origin_slot", "target_id", "target_slot", "type")
    return [{"id": number, **dict(zip(names, link))} for number, link in enumerate(links, start=1)]


def define(parts: list[dict], inputs: list[dict], links: list[dict]) -> dict:
    """The subgraph itself."""
    right = parts[-1]["pos"][0] + parts[-1]["size"][0] + GAP
    return {
        "id": id_of(),
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": len(parts), "lastLinkId": len(links), "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": TITLE,
        "inputNode": {"id": INPUT, "bounding": [0, TOP, END_SIZE[0], END_SIZE[1] + ROW * len(inputs)]},
        "outputNode": {"id": OUTPUT, "bounding": [right, TOP, END_SIZE[0], END_SIZE[1] + ROW]},
        "inputs": [
            {
                "id": id_of("input", each["name"]),
                "name": each["name"],
                "type": each["type"],
                "linkIds": [link["id"] for link in links if (link["origin_id"], link["origin_slot"]) == (INPUT, slot)],
                "pos": [END_SIZE[0] - ROW, TOP + ROW * (slot + 1)],
            }
            for slot, each in enumerate(inputs)
        ],
        "outputs": [
            {
                "id": id_of("output", "MODEL"),
                "name": "MODEL",
                "type": "MODEL",
                "linkIds": [link["id"] for link in links if link["target_id"] == OUTPUT],
                "pos": [right + ROW, TOP + ROW],
            }
        ],
        "widgets": [],
        "nodes": parts,
        "groups": [],
        "links": links,
        "extra": {},
        "category": "Skein",
        "description": DESCRIPTION,
    }


def main() -> None:
    from pack import load_pack

    load_pack()
    from skein.demo.server import ComfyServer, comfyui_path

    with ComfyServer(comfyui_path()) as server:
        made = build(server.get("/object_info"))
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    main()
