"""The node that has loaded a model, found in the prompt that ComfyUI executes, so that a worker can run it again.

For loaders that leave no function to load the model again, as ComfyUI-GGUF's. It is the node at the end of the line of
MODEL inputs, seen from the first of our nodes. What nodes on the way have put on the model is known of its patcher;
whether one of them has made another model shows when the worker has it (fingerprint.py).
"""

import os
import sys
from typing import TYPE_CHECKING, Any

from .. import host
from ..files import FILES_KEY, memory_of_files, note_files

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

NODE_KEY = "_skein_loader_node"  # on a model: the node that has loaded it, or a sentence why it is not known
UNKNOWN = "its loader does not tell how"


def note_loader(patcher: "ModelPatcher") -> None:
    """Note on a model which node has loaded it, if that is not known yet, and its files. To be called while ComfyUI
    executes a node that the model has come to."""
    kept = vars(patcher.model)
    prompt, (_, _, node_id) = host.running_prompt(), host.executing()
    if isinstance(kept.get(NODE_KEY), dict) or node_id is None:
        return
    try:
        kept[NODE_KEY] = loader_in(prompt, node_id)
    except ValueError as error:
        kept[NODE_KEY] = str(error)
        return
    if FILES_KEY not in kept:
        note_files(patcher, _named_files(kept[NODE_KEY]["inputs"].values()) or _mapped_files(patcher.model))


def loader_of(patcher: "ModelPatcher") -> dict[str, Any]:
    """The node that has loaded a model: see loader_in; and `folders`: ComfyUI's model folders, in which its inputs name
    files. Raises ValueError, whose text is the reason, if it is not known."""
    noted = vars(patcher.model).get(NODE_KEY, UNKNOWN)
    if isinstance(noted, str):
        raise ValueError(noted)
    from folder_paths import folder_names_and_paths  # ComfyUI's; not there where it is used as a library

    folders = {name: list(paths) for name, (paths, *_) in folder_names_and_paths.items()}
    return {**noted, "folders": folders}


def loader_in(prompt: dict[str, dict], node_id: str) -> dict[str, Any]:
    """The node of a prompt that has loaded the model which a node is given, as plain data.

    pack: its folder or file; empty: ComfyUI's. node: its class. inputs: as in the prompt. output: which is the model.
    Raises ValueError, whose text is the reason, if there is not one such node, or an input of it comes from another.
    """
    output = 0
    while links := _models(_node(prompt, node_id), prompt):
        if len(links) > 1:
            raise ValueError(f"two models meet in the node {prompt[node_id]['class_type']}")
        ((node_id, output),) = links
    node = _node(prompt, node_id)
    for name, value in node["inputs"].items():
        if _is_link(value):
            raise ValueError(
                f"the input {name} of the node {node['class_type']}, which loads it, comes from another node"
            )
    module = _class(node).__module__
    pack = host.pack_of(module)
    if not pack and module != "nodes":
        raise ValueError(f"the node {node['class_type']}, which loads it, is of no pack that ComfyUI has loaded")
    return {"pack": pack, "node": node["class_type"], "inputs": node["inputs"], "output": output}


def _node(prompt: dict[str, dict], node_id: str) -> dict:
    if node_id not in prompt:
        raise ValueError("a node before this one is not in the prompt, because ComfyUI has made it while it runs")
    return prompt[node_id]


def _models(node: dict, prompt: dict[str, dict]) -> list[tuple[str, int]]:
    """The links over which a node is given models: node and output of each."""
    links = [(name, *value) for name, value in node["inputs"].items() if _is_link(value)]
    kinds = {
        name: kind for each in ("required", "optional") for name, (kind, *_) in _inputs(node).get(each, {}).items()
    }
    return [(source, int(i)) for name, source, i in links if "MODEL" in (kinds.get(name), _kind(prompt, source, i))]


def _inputs(node: dict) -> dict[str, dict]:
    return _class(node).INPUT_TYPES()


def _kind(prompt: dict[str, dict], node_id: str, output: int) -> str:
    """The type of a node's output."""
    kinds = list(_class(_node(prompt, node_id)).RETURN_TYPES)
    return kinds[int(output)] if int(output) < len(kinds) else ""


def _class(node: dict) -> Any:
    return sys.modules["nodes"].NODE_CLASS_MAPPINGS[node["class_type"]]


def _is_link(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) in (int, float)


def _named_files(inputs: Any) -> list[str]:
    """The files that a node's inputs name, in ComfyUI's model folders or by their path."""
    import folder_paths

    found: dict[str, str] = {}
    for value in inputs:
        if not isinstance(value, str) or not value:
            continue
        here = [folder_paths.get_full_path(folder, value) for folder in folder_paths.folder_names_and_paths]
        paths = [path for path in (*here, value) if path and os.path.isabs(path) and os.path.isfile(path)]
        found |= {os.path.realpath(path): path for path in paths}
    return list(found.values())


def _mapped_files(model: Any) -> list[str]:
    """The files that a model's weights lie in, where the system tells."""
    places = [weight.data_ptr() for weight in model.diffusion_model.parameters() if weight.device.type == "cpu"]
    return sorted({file.path for file in memory_of_files() if any(each in file.addresses for each in places)})
