"""How a worker comes to the same model: how it was loaded, and the patches that nodes have put on the weights.

Weights never travel. A worker loads the model again, by what is noted on its ModelPatcher (`cached_patcher_init`: a
function of ComfyUI's, of this pack or of another one's), or else by the node that has loaded it, with weights of the
type that ComfyUI chose in its own process: it chooses by the device, and devices may differ. worker/loading.py reads
what is written here.
"""

import sys
from typing import TYPE_CHECKING, Any

import comfy.weight_adapter
import torch

from .. import host
from ..files import files_of
from .fingerprint import fingerprint_of
from .loader_node import UNKNOWN, loader_of, note_loader
from .protocol import NotPlain, pack

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

Patches = dict[str, list[tuple]]
COMFYUI = "comfy.sd"  # the module of ComfyUI whose functions a worker calls
OURS = "skein"  # in the place of a pack's folder: this pack, whatever its folder is called
ROOT = __name__.removesuffix(".workers.recipe")  # of the names of this pack's modules
REFUSED = (
    "Context Parallel loads the model again in each worker, which cannot be done here: {why}. Use a loader without "
    "inputs from other nodes, as Load Diffusion Model, and no node that makes a second model before the first of "
    "Skein's nodes."
)


def recipe_of(patcher: "ModelPatcher") -> dict[str, Any]:
    """How to load the model again, as plain data. Raises ValueError if nothing is known that could travel.

    pack: "": ComfyUI, "skein", or another pack's folder. Then module, function, arguments and index (of the model in
    what it returns), or node (loader_node.loader_of). dtype: of the weights. files: see files_of; another file is
    another model. fingerprint: of the model that this must give; empty: not known.
    """
    how, why = _function_of(patcher)
    if how is None:
        try:
            how = loader_of(patcher)
            pack(how, [])
        except NotPlain as error:
            raise ValueError(REFUSED.format(why=error)) from error
        except ValueError as error:
            raise ValueError(REFUSED.format(why=why or error)) from error
    dtype = str(patcher.model.get_dtype()).removeprefix("torch.")
    return {**how, "dtype": dtype, "files": files_of(patcher), "fingerprint": fingerprint_of(patcher)}


def note_origin(patcher: "ModelPatcher") -> None:
    """Note on a model what is known of where it comes from only while a node is executed that it has come to: the node
    that has loaded it, where there is no function, and what its files are."""
    if _function_of(patcher)[0] is None:
        note_loader(patcher)
    files_of(patcher)


def _function_of(patcher: "ModelPatcher") -> tuple[dict[str, Any] | None, str]:
    """The function that a model's loader has left, if a worker can call it; else why it cannot, if there is one."""
    if patcher.cached_patcher_init is None:
        return None, ""
    function, arguments, *index = patcher.cached_patcher_init
    module, name = getattr(function, "__module__", ""), getattr(function, "__name__", "")
    if getattr(sys.modules.get(module), name, None) is not function:
        return None, UNKNOWN  # a method, or made inside of another function
    owner = OURS if module.startswith(f"{ROOT}.") else host.pack_of(module)
    if not owner and module != COMFYUI:
        return None, UNKNOWN
    try:
        pack(arguments, [])
    except NotPlain as error:
        return None, str(error)
    within = module if not owner else module.removeprefix(ROOT if owner == OURS else root_of(owner))
    how = {"pack": owner, "module": within, "function": name, "arguments": list(arguments)}
    return {**how, "index": index[0] if index else None}, ""


def root_of(folder: str) -> str:
    """What ComfyUI names the modules of a pack by: their names begin so."""
    return folder.removesuffix(".py") if folder.endswith(".py") else folder.replace(".", "_x_")


def inference_type(patcher: "ModelPatcher") -> torch.dtype:
    """The type that the model computes in, and that its inputs have: a node may have changed it (ModelComputeDtype)."""
    return patcher.get_model_object("manual_cast_dtype") or patcher.model.get_dtype()


def export_patches(patcher: "ModelPatcher") -> Patches:
    """The patches on the weights as plain data and tensors. Raises ValueError on one that is code."""
    exported: Patches = {}
    for key, patches in patcher.patches.items():
        for strength, value, strength_model, offset, function in patches:
            if function is not None:
                raise ValueError(f"Context Parallel cannot take a patch of {key} to the workers: it is a function.")
            exported.setdefault(key, []).append((strength, _export(value), strength_model, offset, None))
    try:
        pack(exported, [])
    except NotPlain as error:
        raise ValueError(f"Context Parallel cannot take a patch to the workers: {error}.") from error
    return exported


def import_patches(patches: Patches) -> Patches:
    """What export_patches() was given, in a worker; the tensors are copies on the CPU, where ComfyUI has them too."""
    return {
        key: [(strength, _import(value), *rest) for strength, value, *rest in several]
        for key, several in patches.items()
    }


def _export(value: Any) -> Any:
    if not isinstance(value, comfy.weight_adapter.WeightAdapterBase):
        return value
    return {"adapter": type(value).__name__, "keys": sorted(value.loaded_keys), "weights": value.weights}


def _import(value: Any) -> Any:
    if not isinstance(value, dict):
        return _copied(value)
    adapters = {adapter.__name__: adapter for adapter in comfy.weight_adapter.adapters}
    return adapters[value["adapter"]](set(value["keys"]), _copied(value["weights"]))


def _copied(value: Any) -> Any:
    """The tensors of a message lie in memory that the next message overwrites."""
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value.to("cpu", copy=True) if isinstance(value, torch.Tensor) else value
