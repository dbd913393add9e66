"""What a UI-format workflow must keep to so that ComfyUI loads and runs it, checked against /object_info."""

from collections.abc import Iterator
from typing import Any

import workflows

CANVAS_ONLY = {"Note", "MarkdownNote"}  # the server does not know these
MODEL_SUFFIXES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
SEED_CONTROLS = ("fixed", "increment", "decrement", "randomize")
DIRECTORIES = {  # where each loader looks; what the server says has only the names of files
    "CheckpointLoaderSimple": "checkpoints",
    "UNETLoader": "diffusion_models",
    "CLIPLoader": "text_encoders",
    "DualCLIPLoader": "text_encoders",
    "TripleCLIPLoader": "text_encoders",
    "VAELoader": "vae",
    "CLIPVisionLoader": "clip_vision",
    "LoraLoaderModelOnly": "loras",
}

FOLDERS = {("SkeinLoadDiffusersTransformer", "model_name")}  # choices that name folders, which another machine may have


def problems(workflow: dict, object_info: dict, bundled: tuple[str, ...] = ()) -> list[str]:
    """All that is wrong with a workflow, one sentence each; `bundled` names model files that need no download."""
    known = [node for node in workflow["nodes"] if node["type"] in object_info]
    found = [
        f"{label(node)}: ComfyUI has no such node"
        for node in workflow["nodes"]
        if node["type"] not in object_info and node["type"] not in CANVAS_ONLY
    ]
    found += numbering_problems(workflow)
    found += link_problems(workflow, object_info)
    for node in known:
        definition = object_info[node["type"]]
        found += [f"{label(node)}: {problem}" for problem in socket_problems(node, definition)]
        found += [f"{label(node)}: {problem}" for problem in widget_problems(node, definition)]
        found += [f"{label(node)}: {problem}" for problem in model_problems(node, bundled)]
    return found


def label(node: dict) -> str:
    return f"{node['id']} {node['type']}"


def numbering_problems(workflow: dict) -> Iterator[str]:
    """Ids are unique and not above the last one; a node's order comes after those that it takes something from."""
    for what, ids, last in (
        ("node", [node["id"] for node in workflow["nodes"]], workflow["last_node_id"]),
        ("link", [link[0] for link in workflow["links"]], workflow["last_link_id"]),
    ):
        if len(set(ids)) != len(ids):
            yield f"a {what} id is used twice"
        if max(ids) > last:
            yield f"last_{what}_id is {last}, but there is {max(ids)}"
    order = {node["id"]: node["order"] for node in workflow["nodes"]}
    if len(set(order.values())) != len(order):
        yield "two nodes have the same order"
    for _, source, _, target, _, _ in workflow["links"]:
        if order.get(source, -1) > order.get(target, len(order)):
            yield f"node {target} comes before node {source}, which it needs"


def link_problems(workflow: dict, object_info: dict) -> Iterator[str]:
    """Every link joins an output and an input that exist, are of its type and name it; no socket names another."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    named = []
    for node in workflow["nodes"]:
        named += [
            (link, "from", node["id"], slot) for slot, o in enumerate(node["outputs"]) for link in o["links"] or []
        ]
        named += [(i["link"], "to", node["id"], slot) for slot, i in enumerate(node["inputs"]) if i["link"] is not None]
    listed = []
    for link, source, source_slot, target, target_slot, type_name in workflow["links"]:
        listed += [(link, "from", source, source_slot), (link, "to", target, target_slot)]
        if source not in nodes or target not in nodes:
            yield f"link {link}: node {source} or {target} does not exist"
            continue
        outputs = object_info.get(nodes[source]["type"], {}).get("output", [])
        if source_slot >= len(outputs) or outputs[source_slot] != type_name:
            yield f"link {link}: {label(nodes[source])} has no output {source_slot} of type {type_name}"
        sockets = nodes[target]["inputs"]
        declared = declared_inputs(nodes[target], object_info)
        name = sockets[target_slot]["name"] if target_slot < len(sockets) else None
        if name not in declared or declared[name][0] != type_name:
            yield f"link {link}: {label(nodes[target])} has no input {target_slot} of type {type_name}"
    for end in sorted(set(named) ^ set(listed)):
        yield f"link {end[0]}: the list of links and node {end[2]}, slot {end[3]}, disagree"


def declared_inputs(node: dict, object_info: dict) -> dict[str, tuple[Any, dict, bool]]:
    return workflows.inputs_of(object_info[node["type"]]) if node["type"] in object_info else {}


def socket_problems(node: dict, definition: dict) -> Iterator[str]:
    """Sockets are those of the definition, in its order, and all required ones are linked."""
    declared = workflows.inputs_of(definition)
    present = {socket["name"]: socket for socket in node["inputs"]}
    for name, socket in present.items():
        if name not in declared or declared[name][0] != socket["type"]:
            yield f"has no input {name} of type {socket['type']}"
    for name, (type_name, options, optional) in declared.items():
        if workflows.is_widget(type_name, options) or optional:
            continue
        if present.get(name, {}).get("link") is None:
            yield f"the input {name} is not connected"
    if [name for name in declared if name in present] != [name for name in present if name in declared]:
        yield "the inputs are not in the order of the definition"
    for output, name, type_name in zip(node["outputs"], definition["output_name"], definition["output"]):
        if (output["name"], output["type"]) != (name, type_name):
            yield f"the output {output['name']} should be {name} of type {type_name}"
    if len(node["outputs"]) > len(definition["output"]):
        yield "has more outputs than the definition"


def widget_problems(node: dict, definition: dict) -> Iterator[str]:
    """The widgets' values are as many as the definition has, optional ones at the end aside, and allowed."""
    values = list(node.get("widgets_values") or [])
    for name, (type_name, options, optional) in workflows.inputs_of(definition).items():
        if not workflows.is_widget(type_name, options):
            continue
        if not values:
            if not optional:
                yield f"there is no value for {name}"
            continue
        value = values.pop(0)
        if (node["type"], name) not in FOLDERS and not allowed(value, type_name, options):
            yield f"{value!r} is not allowed for {name}"
        if options.get("control_after_generate") and (not values or values.pop(0) not in SEED_CONTROLS):
            yield f"the value after {name} should be one of {', '.join(SEED_CONTROLS)}"
        if options.get("image_upload") and (not values or values.pop(0) != "image"):
            yield f'the value after {name} should be "image"'
    if values:
        yield f"there is no widget for {values}"


def allowed(value: Any, type_name: str, options: dict) -> bool:
    """Whether the server would take the value, were all files on this machine."""
    if type_name == "BOOLEAN":
        return isinstance(value, bool)
    if type_name == "STRING":
        return isinstance(value, str)
    if type_name in ("INT", "FLOAT"):
        kinds = (int,) if type_name == "INT" else (int, float)
        in_kind = isinstance(value, kinds) and not isinstance(value, bool)
        return in_kind and options.get("min", value) <= value <= options.get("max", value) and on_step(value, options)
    if type_name == "COMFY_DYNAMICCOMBO_V3":
        # a choice that brings inputs of its own would need their values too
        return any(choice["key"] == value and not any(choice["inputs"].values()) for choice in options["options"])
    return value in options["options"] or is_file(value, options)


def on_step(value: float, options: dict) -> bool:
    """Whether a slider would stop at a whole number; the server takes any, but the canvas would round it."""
    step = options.get("step", 1)
    return not isinstance(value, int) or step < 1 or (value - options.get("min", 0)) % step == 0


def is_file(value: Any, options: dict) -> bool:
    """Whether a choice is the name of a file, which another machine may have."""
    return isinstance(value, str) and (bool(options.get("image_upload")) or value.endswith(MODEL_SUFFIXES))


def model_problems(node: dict, bundled: tuple[str, ...]) -> Iterator[str]:
    """Every model file that a loader names comes with where to get it and where to put it, and nothing else does."""
    models = {model["name"]: model for model in node["properties"].get("models", [])}
    values = node.get("widgets_values") or []
    named = {value for value in values if isinstance(value, str) and value.endswith(MODEL_SUFFIXES)} - {*bundled}
    for name in sorted(named ^ models.keys()):
        yield f"{name} is in only one of widgets_values and properties.models"
    for name, model in models.items():
        path = model["url"].partition("?")[0]
        if not path.startswith("https://") or not path.endswith(f"/{name}"):
            yield f"{model['url']} is no address of {name}"
        if model["directory"] != DIRECTORIES[node["type"]]:
            yield f"{name} belongs into {DIRECTORIES[node['type']]}, not {model['directory']}"
