"""Loads a model by its recipe (workers/recipe.py): by a function of ComfyUI's, of this pack or of another one's, or by
a node. Another pack is imported only for a recipe that names it, by ComfyUI's own code and under the name that it has
in ComfyUI's process.
"""

import asyncio
import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from comfy.cli_args import args

from ..attributes import changed
from ..workers.fingerprint import fingerprint
from ..workers.recipe import OURS, ROOT, root_of

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

TYPES = {"float32": "fp32_unet", "bfloat16": "bf16_unet", "float16": "fp16_unet"}  # ComfyUI's options for each
IMPORT = "Context Parallel's workers cannot import the node pack {pack}, whose node has loaded this model: {why}"


def load(recipe: dict[str, Any]) -> "ModelPatcher":
    """The model of a recipe. Raises ValueError if a pack cannot be had, or if the model is another one than in
    ComfyUI's process."""
    options = [(args, option, dtype == recipe["dtype"]) for dtype, option in TYPES.items()]
    with changed(options if recipe["dtype"] in TYPES else []):
        patcher = _by_node(recipe) if "node" in recipe else _by_function(recipe)
    if recipe["fingerprint"] and fingerprint(patcher) != recipe["fingerprint"]:
        loader = recipe.get("node") or recipe["function"]
        raise ValueError(
            f"{loader} gives another model in Context Parallel's workers than in ComfyUI's process, where a node after "
            "the loader may have made a second one; remove that node, or Context Parallel."
        )
    return patcher


def _by_function(recipe: dict[str, Any]) -> "ModelPatcher":
    root = ROOT if recipe["pack"] == OURS else import_pack(recipe["pack"]) if recipe["pack"] else ""
    loaded = getattr(importlib.import_module(root + recipe["module"]), recipe["function"])(*recipe["arguments"])
    return loaded if recipe["index"] is None else loaded[recipe["index"]]


def _by_node(recipe: dict[str, Any]) -> "ModelPatcher":
    nodes = _nodes()
    import execution

    _add_folders(recipe["folders"])
    if recipe["pack"]:
        import_pack(recipe["pack"])
        _add_folders(recipe["folders"])  # those that only the pack knows
    name = recipe["node"]
    if name not in nodes.NODE_CLASS_MAPPINGS:
        raise ValueError(IMPORT.format(pack=_called(recipe["pack"]), why=f"alone it has no node {name}."))
    node = nodes.NODE_CLASS_MAPPINGS[name]
    inputs, _, hidden = execution.get_input_data(recipe["inputs"], node, "")
    outputs, *_ = asyncio.run(execution.get_output_data("", "", node(), inputs, v3_data=hidden))
    return outputs[recipe["output"]][0]


def _nodes() -> Any:
    """ComfyUI's module `nodes`. It puts a folder in front of the path in which there is another module `utils`, so
    that ComfyUI's own has to be imported before, as its main.py does."""
    importlib.import_module("utils.extra_config")
    return importlib.import_module("nodes")


@cache
def import_pack(folder: str) -> str:
    """Import a node pack; what the names of its modules begin with. Raises ValueError if that cannot be done."""
    nodes = _nodes()
    if not os.path.exists(folder):
        raise ValueError(IMPORT.format(pack=_called(folder), why=f"{folder} is not there."))
    with _server(), _warnings() as said:
        done = asyncio.run(nodes.load_custom_node(folder))
    if not done:
        raise ValueError(IMPORT.format(pack=_called(folder), why=said[-1] if said else "it has no nodes."))
    return root_of(folder)


def _called(folder: str) -> str:
    return os.path.basename(folder)


def _add_folders(folders: dict[str, list[str]]) -> None:
    """ComfyUI's model folders are those of its own process: of the kinds that are known here."""
    import folder_paths

    for kind, paths in folders.items():
        for path in paths if kind in folder_paths.folder_names_and_paths else ():
            folder_paths.add_model_folder_path(kind, path)


@contextmanager
def _server() -> Iterator[None]:
    """Within: there is ComfyUI's server, to which packs add routes when they are imported. It listens nowhere."""
    from server import PromptServer

    loop = asyncio.new_event_loop()
    with changed([(args, "front_end_root", os.path.dirname(__file__))]):  # or it would look for a front end
        PromptServer(loop)
    try:
        yield
    finally:
        del PromptServer.instance
        loop.close()


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Within: what is logged as a warning is in the list too; so ComfyUI says why a pack cannot be imported."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener = Listener(logging.WARNING)
    logging.getLogger().addHandler(listener)
    try:
        yield said
    finally:
        logging.getLogger().removeHandler(listener)
