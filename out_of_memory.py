"""Whether an exception says that a device's memory is full: what ComfyUI itself takes for that."""

import sys

import torch


def is_out_of_memory(error: object) -> bool:
    """PyTorch's own exception, or whatever this ComfyUI knows besides (AcceleratorError).

    ComfyUI is asked only where it runs, so that rooms which import nothing of it can use this.
    """
    memory = sys.modules.get("comfy.model_management")
    known = getattr(memory, "OOM_EXCEPTION", torch.OutOfMemoryError)
    asked = getattr(memory, "is_oom", lambda error: False)  # newer ones
    return isinstance(error, (torch.OutOfMemoryError, known)) or bool(asked(error))
