#!/usr/bin/env python3
"""Make the shipped workflows `workflows/<title>.json` from the API prompts `workflows/api/<name>.json`, with pictures.

    python3 scripts/dev.py scripts/workflows.py

The API prompt (what POST /prompt takes) is the only source; a node's `_meta` holds what a canvas needs besides:
`pos`, and where wanted `size`, `title` and `properties`. `workflows/api/<name>.md` becomes a note on the canvas.
Names, types and the order of widgets come from the /object_info of a running ComfyUI; every version that the pack
supports gives the same files.
"""

import json
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
UI = ROOT / "workflows"
API = UI / "api"
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
OPTIONAL_SHAPE = 7  # LiteGraph's number for the hollow circle of an optional input
NODE_WIDTH, NOTE_SIZE, NOTE_GAP = 320, (420, 440), 60
HUNYUAN, WAN, FLUX, SD3, QWEN, MOCHI = "#5ea8e2", "#8f7ff0", "#e58f4c", "#62c38a", "#d976b0", "#d9b44a"


@dataclass(frozen=True)
class Template:
    """A shipped workflow as the template browser shows it.

    title: its file's name without `.json`, which is the card's title. The browser's search finds what begins within
        the first 33 characters; a card shows about 43. Without <>:"/\\|?*, which Windows does not allow, and #%, which
        the page does not encode.
    model, task, note, colour: for the drawn picture; a workflow without a model has a picture made elsewhere.
    """

    title: str
    model: str = ""
    task: str = "text to video"
    note: str = ""
    colour: str = HUNYUAN

    @property
    def path(self) -> Path:
        return UI / f"{self.title}.json"

    @property
    def picture(self) -> Path:
        return UI / f"{self.title}.jpg"


TEMPLATES = {  # by the name of the API prompt
    "skein_demo": Template("Skein - Demo, no download, no GPU"),  # its picture: make demo, with --thumbnail
    "hunyuan_video_t2v_speed_up": Template("Skein - HunyuanVideo speed up, one node", "HunyuanVideo"),
    "hunyuan_video_t2v_fast": Template("Skein - HunyuanVideo fast, text to video", "HunyuanVideo"),
    "hunyuan_video_i2v_fast": Template("Skein - HunyuanVideo fast, image to video", "HunyuanVideo", "image to video"),
    "hunyuan_video_t2v_sparse": Template("Skein - HunyuanVideo fast, sparse attention", "HunyuanVideo"),
    "hunyuan_video_t2v_lora_fast": Template("Skein - HunyuanVideo LoRA, fast", "HunyuanVideo"),
    "hunyuan_video_t2v_low_vram": Template(
        "Skein - HunyuanVideo low VRAM, 12-24 GB", "HunyuanVideo", note="12 to 24 GB"
    ),
    "hunyuan_video_t2v_cache": Template("Skein - HunyuanVideo cache only", "HunyuanVideo", note="cache only"),
    "hunyuan_video_t2v_context_parallel": Template("Skein - HunyuanVideo multi GPU", "HunyuanVideo"),
    "hunyuan_video_i2v_context_parallel": Template(
        "Skein - HunyuanVideo multi GPU, I2V", "HunyuanVideo", "image to video"
    ),
    "hunyuan_video_t2v_diffusers": Template("Skein - HunyuanVideo, diffusers folder", "HunyuanVideo", note="diffusers"),
    "hunyuan_video_15_t2v_fast": Template("Skein - HunyuanVideo 1.5 fast", "HunyuanVideo 1.5"),
    "wan22_t2v_fast": Template("Skein - Wan 2.2 14B fast, text to video", "Wan 2.2 14B", colour=WAN),
    "mochi_t2v_fast": Template("Skein - Mochi fast, text to video", "Mochi", colour=MOCHI),
    "flux_dev_fast": Template("Skein - FLUX.1 dev fast, text to image", "FLUX.1 dev", "text to image", colour=FLUX),
    "sd35_large_fast": Template("Skein - SD3.5 large fast, text to image", "SD3.5 large", "text to image", colour=SD3),
    "qwen_image_fast": Template("Skein - Qwen-Image fast, text to image", "Qwen-Image", "text to image", colour=QWEN),
}


def inputs_of(definition: dict) -> dict[str, tuple[Any, dict, bool]]:
    """The visible inputs of a node in their order: name -> (type, options, optional).

    The type of a choice is "COMBO" with its options under "options"; older nodes give the list itself as type.
    """
    found = {}
    for kind in ("required", "optional"):
        declared = definition["input"].get(kind, {})
        for name in definition.get("input_order", {}).get(kind, declared):
            kind_of, *rest = declared[name]
            options = rest[0] if rest else {}
            if isinstance(kind_of, list):
                kind_of, options = "COMBO", {**options, "options": kind_of}
            found[name] = (kind_of, options, kind == "optional")
    return found


def is_widget(type_name: str, options: dict) -> bool:
    return type_name in WIDGET_TYPES and not options.get("forceInput")


def companion(options: dict) -> list[str]:
    """The value of the extra widget that the canvas puts after some inputs: seed control, or the upload button."""
    if options.get("control_after_generate"):
        return ["fixed"]
    return ["image"] if options.get("image_upload") else []


def widget_values(class_type: str, inputs: dict, definition: dict) -> list:
    """The values of a node's widgets in their order; optional ones at the end that are not given are left out."""
    values: list = []
    pending: list = []  # defaults of optional inputs, needed only if a given one follows
    for name, (type_name, options, optional) in inputs_of(definition).items():
        if not is_widget(type_name, options):
            continue
        if name in inputs:
            if isinstance(inputs[name], list):
                raise ValueError(
                    f"{class_type}.{name} is a widget; give it a value, links into widgets are not supported."
                )
            values += [*pending, inputs[name], *companion(options)]
            pending = []
        elif optional:
            pending += [options.get("default"), *companion(options)]
        else:
            raise ValueError(f"{class_type} needs a value for {name}.")
    return values


def sockets(inputs: dict, definition: dict) -> list[dict]:
    """The input sockets of a node, not linked yet."""
    return [
        {"name": name, **({"shape": OPTIONAL_SHAPE} if optional else {}), "type": type_name, "link": None}
        for name, (type_name, options, optional) in inputs_of(definition).items()
        if not is_widget(type_name, options)
    ]


def default_size(node: dict) -> list[int]:
    """What LiteGraph would give the node: rows of sockets of 20 pixels, then widgets of 24."""
    rows, widgets = max(len(node["inputs"]), len(node["outputs"]), 1), len(node["widgets_values"])
    return [NODE_WIDTH, 20 * rows + 24 * widgets + (14 if widgets else 6)]


def make_node(key: str, order: int, entry: dict, object_info: dict) -> dict:
    """A node of the canvas, its sockets not linked yet."""
    class_type, inputs, meta = entry["class_type"], entry["inputs"], entry["_meta"]
    if class_type not in object_info:
        raise ValueError(f"ComfyUI does not know the node {class_type}.")
    definition = object_info[class_type]
    unknown = inputs.keys() - inputs_of(definition).keys()
    if unknown:
        raise ValueError(f"{class_type} has no input {', '.join(sorted(unknown))}.")
    node = {
        "id": int(key),
        "type": class_type,
        "pos": meta["pos"],
        "size": meta.get("size"),
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": sockets(inputs, definition),
        "outputs": [
            {"name": name, "type": type_name, "links": []}
            for name, type_name in zip(definition["output_name"], definition["output"])
        ],
        "properties": {"Node name for S&R": class_type, **meta.get("properties", {})},
        "widgets_values": widget_values(class_type, inputs, definition),
    }
    if "title" in meta:
        node["title"] = meta["title"]
    return node


def make_links(prompt: dict, nodes: dict[str, dict]) -> list[list]:
    """Link the sockets as the prompt says; returns the canvas's list of links.

    Outputs after the last linked one go: newer versions of ComfyUI have more, and the canvas adds what is missing.
    """
    links: list[list] = []
    for key, node in nodes.items():
        for slot, socket in enumerate(node["inputs"]):
            if socket["name"] not in prompt[key]["inputs"]:
                continue
            source, source_slot = prompt[key]["inputs"][socket["name"]]
            output = nodes[source]["outputs"][source_slot]
            socket["link"] = len(links) + 1
            output["links"].append(socket["link"])
            links.append([socket["link"], int(source), source_slot, node["id"], slot, output["type"]])
    for node in nodes.values():
        while node["outputs"] and not node["outputs"][-1]["links"]:
            node["outputs"].pop()
    return links


def make_note(text: str, nodes: list[dict]) -> dict:
    """A note to the left of the other nodes."""
    left, top = min(node["pos"][0] for node in nodes), min(node["pos"][1] for node in nodes)
    return {
        "id": max(node["id"] for node in nodes) + 1,
        "type": "MarkdownNote",
        "pos": [left - NOTE_SIZE[0] - NOTE_GAP, top],
        "size": list(NOTE_SIZE),
        "flags": {},
        "order": len(nodes),
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [text],
        "color": "#2a2a2a",  # links are hard to read on the brown of a note
        "bgcolor": "#3c3c3c",  # which the light theme makes lighter
    }


def run_order(prompt: dict) -> list[str]:
    """The node ids, each after those that it takes something from."""
    sources = {
        key: [value[0] for value in entry["inputs"].values() if isinstance(value, list)]
        for key, entry in prompt.items()
    }
    return list(TopologicalSorter(sources).static_order())


def make_workflow(prompt: dict, note: str, object_info: dict) -> dict:
    """The canvas's workflow (format 0.4) of an API prompt; the same input gives the same output."""
    order = run_order(prompt)
    by_key = {key: make_node(key, order.index(key), entry, object_info) for key, entry in prompt.items()}
    links = make_links(prompt, by_key)
    nodes = [*by_key.values()]
    for node in nodes:
        node["size"] = node["size"] or default_size(node)
    nodes.append(make_note(note, nodes))
    return {
        # No "id": the page gives each opening one of its own, so that a run's workflow is told from another copy.
        "revision": 0,
        "last_node_id": max(node["id"] for node in nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def names() -> list[str]:
    """The shipped workflows, by the API prompts they are made from."""
    return sorted(path.stem for path in API.glob("*.json"))


def build(name: str, object_info: dict) -> dict:
    """The workflow made of the API prompt and the note called `name`."""
    prompt, note = (API / f"{name}.json").read_text(), (API / f"{name}.md").read_text()
    return make_workflow(json.loads(prompt), note.strip(), object_info)


def main() -> None:
    from pack import load_pack
    from thumbnails import draw_thumbnail

    load_pack()
    from skein.demo.server import ComfyServer, comfyui_path

    with ComfyServer(comfyui_path()) as server:
        object_info = server.get("/object_info")
    for name in names():
        template, workflow = TEMPLATES[name], build(name, object_info)
        template.path.write_text(json.dumps(workflow, indent=2) + "\n")
        print(template.path.relative_to(ROOT))
        if template.model:
            kinds = {node["type"] for node in workflow["nodes"]}
            draw_thumbnail(template.picture, template.model, template.task, template.note, kinds, template.colour)


if __name__ == "__main__":
    main()
