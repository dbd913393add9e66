"""ComfyUI's server, where one runs in this process, and the prompt that it executes."""

import os
import re
import sys
import uuid
from collections.abc import MutableMapping
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

METADATA_KEY = "skein_metadata"  # in a prompt's extra_data: the key of its metadata


class _Metadata(dict):
    """What a client wants to have written into what its prompt saves; a dict that can be referred to weakly."""


# ComfyUI hands the prompt's own metadata to nodes that save, others see a copy: so it is noted when a prompt comes.
_metadata: MutableMapping[str, _Metadata] = WeakValueDictionary()


def server() -> Any:
    """ComfyUI's server; None where the pack is used as a library, and in a worker."""
    module = sys.modules.get("server")  # present only inside ComfyUI's server process
    return getattr(getattr(module, "PromptServer", None), "instance", None)


def executing() -> tuple[str | None, str | None, str | None]:
    """The ids of the prompt that the calling thread executes, of the workflow that it was made from, and of the node;
    None where there is none. A program sends prompts without a workflow."""
    execution = sys.modules.get("comfy_execution.utils")
    context = execution.get_executing_context() if execution else None
    instance = server()
    if context is None or instance is None:
        return None, None, None
    return context.prompt_id, _workflow_id(_extra_data(instance, context.prompt_id)), context.node_id


def running_prompt() -> dict[str, dict]:
    """The prompt that the calling thread executes, node by id, as a client has sent it; empty where there is none. Not
    in it are nodes that others have put in their place while it runs."""
    prompt_id, *_ = executing()
    return {} if prompt_id is None else _running(server(), prompt_id)[0]


def keep_metadata(asked: dict) -> dict:
    """For add_to_metadata: a handler of the prompts that the server is sent."""
    extra_data: Any = asked.get("extra_data")
    metadata = extra_data.get("extra_pnginfo") if isinstance(extra_data, dict) else None
    if isinstance(metadata, dict):
        key = uuid.uuid4().hex
        extra_data["extra_pnginfo"] = _metadata[key] = _Metadata(metadata)
        extra_data[METADATA_KEY] = key
    return asked


def add_to_metadata(key: str, value: Any) -> None:
    """Have nodes that save what the running prompt makes write this too: to a list under the key, beside the workflow.
    A program that has sent no metadata gets none."""
    prompt_id, *_ = executing()
    if prompt_id is None:
        return
    metadata = _metadata.get(str(_extra_data(server(), prompt_id).get(METADATA_KEY)))
    if metadata is not None:
        metadata[key] = [*metadata.get(key, []), value]


def _extra_data(instance: Any, prompt_id: str) -> dict:
    """What a client has sent with a prompt that runs."""
    return _running(instance, prompt_id)[1]


def _running(instance: Any, prompt_id: str) -> tuple[dict, dict]:
    """A prompt that runs, and what a client has sent with it."""
    running, _ = instance.prompt_queue.get_current_queue_volatile()
    found = ((prompt, extra_data) for _, each, prompt, extra_data, *_ in running if each == prompt_id)
    return next((each for each in found if isinstance(each[1], dict)), ({}, {}))


def _workflow_id(extra_data: Any) -> str | None:
    """What a client sends as extra_data may have any form."""
    for key in ("extra_pnginfo", "workflow", "id"):
        extra_data = extra_data.get(key) if isinstance(extra_data, dict) else None
    return extra_data if isinstance(extra_data, str) else None


def pack_of(module: str) -> str:
    """The folder, or the file, of the node pack that a module belongs to, as ComfyUI's load_custom_node takes it; empty
    for one of no pack."""
    for root in (module, module.partition(".")[0]):  # a pack of one file may have dots in its name, a folder has none
        file = getattr(sys.modules.get(root), "__file__", None) or ""
        folder = os.path.dirname(file)
        if os.path.isabs(root) and root == os.path.splitext(file)[0]:
            return file
        if os.path.isabs(root) and root == folder.replace(".", "_x_"):
            return folder
    return ""


def origin_of(function: Any) -> str:
    """Whose a function is, in words: the folder of the node pack that it comes from, and its name."""
    while isinstance(function, partial):
        function = function.func
    function = getattr(function, "__func__", function)
    name = getattr(function, "__qualname__", type(function).__qualname__).partition(".")[0]
    module = getattr(function, "__module__", None) or type(function).__module__
    # ComfyUI names a pack's module by its path, with "_x_" for each dot.
    pack = re.search(r"custom_nodes[/\\]([^/\\.]+)", module)
    owner = pack[1].replace("_x_", ".") if pack else "ComfyUI" if module.startswith("comfy") else module
    return f"{name} of {owner}"
