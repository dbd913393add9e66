"""ComfyUI's server, where one runs in this process, and the prompt that it executes."""

import re
import sys
from functools import partial
from typing import Any


def server() -> Any:
    """ComfyUI's server; None where the pack is used as a library, and in a worker."""
    module = sys.modules.get("server")  # present only inside ComfyUI's server process
    return getattr(getattr(module, "PromptServer", None), "instance", None)


def executing() -> tuple[str | None, str | None]:
    """The ids of the prompt that the calling thread executes and of the workflow that it was made from; None where
    there is none. A program sends prompts without a workflow."""
    execution = sys.modules.get("comfy_execution.utils")
    context = execution.get_executing_context() if execution else None
    instance = server()
    if context is None or instance is None:
        return None, None
    running, _ = instance.prompt_queue.get_current_queue_volatile()
    for _, prompt_id, _, extra_data, *_ in running:
        if prompt_id == context.prompt_id:
            return prompt_id, _workflow_id(extra_data)
    return context.prompt_id, None


def _workflow_id(extra_data: Any) -> str | None:
    """What a client sends as extra_data may have any form."""
    for key in ("extra_pnginfo", "workflow", "id"):
        extra_data = extra_data.get(key) if isinstance(extra_data, dict) else None
    return extra_data if isinstance(extra_data, str) else None


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
