"""One call of a diffusion model, as ComfyUI's DIFFUSION_MODEL wrappers see it."""

import inspect
from typing import Any

from torch import Tensor

Options = dict[str, Any]  # ComfyUI's transformer_options
OVERRIDE = "optimized_attention_override"  # ComfyUI's key in them: another attention function
WARM_UP_KEY = "skein_warm_up"  # in the options of a call that is made only to compile: nothing in it counts


def call_options(args: tuple, kwargs: dict) -> Options:
    """The transformer_options among a call's arguments.

    Found by content: their place among the arguments differs between models and versions.
    """
    return next(a for a in (*args, *kwargs.values()) if isinstance(a, dict) and "sigmas" in a)


def call_input(args: tuple, kwargs: dict) -> Tensor:
    """The latent among a call's arguments: their first tensor, in all versions."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def named_arguments(executor: Any, args: tuple, kwargs: dict) -> inspect.BoundArguments:
    """A call's arguments by name, for a wrapper's `executor` (ComfyUI's WrapperExecutor).

    The names are those of the model class's own `_forward`, which a version of ComfyUI may have in another order.
    Call on with `executor(*bound.args, **bound.kwargs)`.
    """
    signature = inspect.signature(type(executor.class_obj)._forward.__get__(executor.class_obj))
    return signature.bind(*args, **kwargs)
