"""What other nodes have put on a model that one of our techniques cannot work with.

One table: what is seen on a run's guider, which techniques it hurts, and the sentence that a user gets when sampling
starts, before anything is quantized, compiled or loaded by workers. What shows only when the model is called is
refused then: `watch` and `refuse_call`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP, add_wrapper_with_key
from torch import nn

from .models import OVERRIDE
from .models.share import LEFT, is_own_method, names_in_code, stays_behind
from .plan import PLAN_KEY, Plan

NAMES = {  # of techniques, by the plan's fields
    "cache": "First-Block Cache",
    "attention": "Attention",
    "fp8": "FP8 Quantize",
    "compile": "Compile Blocks",
    "parallel": "Context Parallel",
    "sparse": "Sparse Attention",
    "slices": "Blocks in Slices",
}
SECOND_MODEL = "second model"  # techniques that run another model in the place of the one that nodes have changed
COMPILE_KEY = "torch.compile"  # wrapper key of ComfyUI's set_torch_compile_wrapper, also of KJNodes
OTHER_CACHES = {"easycache": "EasyCache", "lazycache": "LazyCache"}  # wrapper keys of ComfyUI's own caches

BOTH = "{found} and {technique} cannot work on one model; remove one of them."
COMPILED = (
    "{found} and {technique} cannot work on one model; remove one of them, and compile with Skein's Compile Blocks."
)
AWAY = "Context Parallel cannot take {found} to the workers; remove the node that made it, or Context Parallel."


@dataclass(frozen=True)
class Conflict:
    """hurts: techniques, and SECOND_MODEL. seen: of a guider, what stands against them, in words; None: nothing."""

    hurts: tuple[str, ...]
    seen: Callable[[Any], str | None]
    sentence: str = BOTH


def refuse(plan: Plan, guider: Any, left_alone: tuple[str, ...] = ()) -> None:
    """Raises ValueError for the first conflict of a run with its plan. left_alone: techniques that will do nothing."""
    for conflict in CONFLICTS:
        for name in plan.techniques:
            if name not in left_alone:
                _refuse_one(conflict, name, guider)


def refuse_technique(name: str, guider: Any) -> None:
    """Raises ValueError for the first conflict of one technique with what other nodes have put on a guider's model."""
    for conflict in CONFLICTS:
        _refuse_one(conflict, name, guider)


def _refuse_one(conflict: Conflict, name: str, guider: Any) -> None:
    second = name in ("fp8", "parallel") or (name == "compile" and guider.model_patcher.is_dynamic())
    if name not in conflict.hurts and not (second and SECOND_MODEL in conflict.hurts):
        return
    found = conflict.seen(guider)
    if found:
        raise ValueError(conflict.sentence.format(found=found, technique=NAMES[name]))


def refuse_call(options: dict) -> None:
    """Raises ValueError if the options of one model call hold code, which cannot go to workers."""
    found = _code_of_options(options)
    if found:
        raise ValueError(AWAY.format(found=found))


def watch(options: dict, technique: str, patcher: ModelPatcher) -> None:
    """Have a run refuse what other nodes put on a model around each call, as other packs' caches do: our work stands in
    what they replace, or runs a model in its place.

    options: the run's transformer_options. Raises ValueError when the model is called, before compiled blocks are
    entered.
    """
    named = names_in_code(patcher.get_model_object("diffusion_model"))  # once: a call waits for it
    code = _code(patcher, named)

    def around(execute: Callable, *args: Any, **kwargs: Any) -> Any:
        if _code(patcher, named) != code:
            raise ValueError(
                "Another node changes the model's own code while it samples (as TeaCache and WaveSpeed's cache do), "
                f"with which {NAMES[technique]} cannot work; remove one of them."
            )
        return execute(*args, **kwargs)

    add_wrapper_with_key(WrappersMP.APPLY_MODEL, PLAN_KEY, around, options)


def _code(patcher: ModelPatcher, named: frozenset[str]) -> dict[str, Any]:
    """What a network runs: its modules, and functions that stand in for its class's methods. Below ComfyUI's object
    patches, which come and go with the model's loading. named: names_in_code of the network."""
    network, below = patcher.get_model_object("diffusion_model"), patcher.object_patches_backup
    return {
        name: below.get(f"diffusion_model.{name}", value)
        for name, value in (vars(network) | network._modules).items()
        if callable(value) and not stays_behind(name, named)
    }


# What is seen on a guider.


def _options(guider: Any) -> dict:
    return guider.model_options["transformer_options"]


def _compiled_model(guider: Any) -> str | None:
    """The whole model compiled: our wrappers would be part of its graph, or never run."""
    if _is_compiled(guider.model_patcher.get_model_object("diffusion_model")):
        return "A node that compiles the whole model"
    return "TorchCompileModel" if any(whole for whole in _compile_wrappers(guider)) else None


def _compiled_blocks(guider: Any) -> str | None:
    """Blocks compiled by others: without guards on the transformer_options, so for one attention of all runs."""
    return "A node that compiles the model's blocks" if any(True for _ in _compile_wrappers(guider)) else None


def _compile_wrappers(guider: Any) -> Iterator[bool]:
    """ComfyUI's compile wrappers: of each, whether it compiles the whole model. It is asked by running it around no
    call: torch.compile compiles when what it has made is called."""
    model = guider.model_patcher.model
    for wrapper in _options(guider).get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}).get(COMPILE_KEY, ()):
        around_nothing = WrapperExecutor.new_class_executor(
            lambda: _is_compiled(model.diffusion_model), model, [wrapper]
        )
        yield around_nothing.execute()


def _is_compiled(network: nn.Module) -> bool:
    # By name: packs that compile the model change what OptimizedModule says of its class.
    wrapped = any(base.__name__ == "OptimizedModule" for base in type(network).__mro__)
    return wrapped or getattr(network, "_compiled_call_impl", None) is not None


def _other_cache(guider: Any) -> str | None:
    wrappers = _options(guider).get("wrappers", {})
    return next((name for key, name in OTHER_CACHES.items() if any(kind.get(key) for kind in wrappers.values())), None)


def _multigpu(guider: Any) -> str | None:
    """Copies of the model on other devices, which these techniques do not reach."""
    return "ComfyUI's MultiGPU CFG Split" if guider.model_patcher.get_additional_models_with_key("multigpu") else None


def _injections(guider: Any) -> str | None:
    return "layers" if guider.model_patcher.injections else None


def _own_methods(guider: Any) -> str | None:
    """A method that another node has put on one of the model's modules: a second model would be without it, or its
    copy would run the first."""
    patcher = guider.model_patcher
    put_on = patcher.object_patches_backup  # path -> the model's own, where ComfyUI has an object patch on it now
    for path, module in _below_patches(patcher):
        for name, value in vars(module).items():
            if not callable(value) or not callable(getattr(type(module), name, None)):
                continue
            known = name in LEFT or f"{path}.{name}".lstrip(".") in put_on or is_own_method(module, name, value)
            if not known:
                return f"the {name} of the model's {type(module).__name__}"
    return None


def _holding_patch(guider: Any) -> str | None:
    """An object patch that holds modules of the first model."""
    patcher = guider.model_patcher
    if not patcher.object_patches:
        return None
    kept = [value for value in patcher.object_patches_backup.values() if isinstance(value, nn.Module)]
    own = {module for value in kept for module in value.modules()} | {module for _, module in _below_patches(patcher)}
    for path, value in patcher.object_patches.items():
        bound_to = [value.__self__] if isinstance(value, MethodType) else []
        held = value.modules() if isinstance(value, nn.Module) else bound_to
        if any(isinstance(each, nn.Module) and each in own for each in held):
            return path
    return None


def _below_patches(patcher: ModelPatcher) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules by path, without those that ComfyUI has put there for an object patch."""
    put_on = patcher.object_patches_backup
    for path, module in patcher.model.named_modules():
        if not any(f"{path}.".startswith(f"{patched}.") for patched in put_on):
            yield path, module


def _replaced_part(guider: Any) -> str | None:
    paths = [path for path in guider.model_patcher.object_patches if path.startswith("diffusion_model")]
    return f"a replaced part of the model ({paths[0]})" if paths else None


def _hooks(guider: Any) -> str | None:
    patcher = guider.model_patcher
    hooks = patcher.weight_wrapper_patches or patcher.hook_patches
    return "hooks (a scheduled LoRA, say)" if hooks else None


def _code_of_options(options: dict) -> str | None:
    patches = [name for name, value in options.get("patches", {}).items() if value]
    replaced = options.get("patches_replace", {})
    patches += [f"{name} of block {next(iter(blocks))}" for name, blocks in replaced.items() if blocks]
    if patches:
        return f"a patch inside of the model ({patches[0]})"
    return "another attention function" if options.get(OVERRIDE) is not None else None


def _perturbed_guidance(guider: Any) -> str | None:
    """Guidance that calls the model once more with patches inside: those are put on in the middle of a step."""
    functions = []
    for kind in ("sampler_post_cfg_function", "sampler_pre_cfg_function", "sampler_calc_cond_batch_function"):
        several = guider.model_options.get(kind) or []
        functions += several if isinstance(several, list) else [several]
    for function in functions:
        if "set_model_options_patch_replace" in getattr(getattr(function, "__code__", None), "co_names", ()):
            return f"the patches of {function.__qualname__.partition('.')[0]}"
    return None


def _controlnet(guider: Any) -> str | None:
    conditionings = [each for several in getattr(guider, "conds", {}).values() for each in several]
    return "a ControlNet" if any(each.get("control") is not None for each in conditionings) else None


def _merge(guider: Any) -> str | None:
    patches = [patch for several in guider.model_patcher.patches.values() for patch in several]
    return "another model" if any(isinstance(value, list) for _, value, *_ in patches) else None


CONFLICTS = (
    Conflict(tuple(NAMES), _compiled_model, COMPILED),
    Conflict(("attention", "fp8", "compile", "parallel", "sparse"), _compiled_blocks, COMPILED),
    Conflict(("cache",), _other_cache),
    Conflict(("fp8", "compile", "parallel"), _multigpu),
    Conflict(
        (SECOND_MODEL,),
        _injections,
        "{technique} cannot work with {found} that another node puts into the model while it samples (a LoRA in bypass "
        "mode, say); use an ordinary LoRA node, or remove {technique}.",
    ),
    Conflict(
        (SECOND_MODEL,),
        _own_methods,
        "Another node has replaced {found}, with which {technique} cannot work; remove one of them.",
    ),
    Conflict(
        (SECOND_MODEL,),
        _holding_patch,
        "Another node has replaced {found} by an object with the model in it, with which {technique} cannot work; "
        "remove one of them.",
    ),
    Conflict(("parallel",), _replaced_part, AWAY),
    Conflict(("parallel",), _hooks, AWAY),
    Conflict(("parallel",), lambda guider: _code_of_options(_options(guider)), AWAY),
    Conflict(("parallel",), _perturbed_guidance, AWAY),
    Conflict(("parallel",), _controlnet, AWAY),
    Conflict(
        ("parallel",),
        _merge,
        "A ModelMerge node has merged this model with {found}, and the workers of {technique} load a model from one "
        "file; save the merge with the ModelSave node, and load that file.",
    ),
)
