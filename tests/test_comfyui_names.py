"""What the pack uses of ComfyUI is there, name by name: a ComfyUI that has renamed something fails here first."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import comfy.model_management
import comfy.samplers
import pytest
import vaes
from tiny_models import CASES

ROOT = Path(__file__).resolve().parent.parent
HOST = ("comfy", "comfy_api", "folder_paths")
NOT_PRODUCT = (".dev", "tests", "bench", "scripts")
# Attributes of ComfyUI's objects, which no import names.
ATTRIBUTES = {
    "ModelPatcher": """model load_device offload_device parent size attachments wrappers callbacks patches patches_uuid
        object_patches object_patches_backup model_options hook_patches hook_backup cached_hook_patches injections
        cached_patcher_init force_cast_weights weight_inplace_update clone is_clone get_clone_model_override
        get_model_object get_attachment set_attachments get_additional_models_with_key add_wrapper_with_key
        add_callback_with_key patch_weight_to_device partially_load partially_unload loaded_size model_size pre_run
        cleanup detach set_model_compute_dtype get_free_memory is_dynamic weight_wrapper_patches pinned unpin_weight""",
    "BaseModel": """diffusion_model model_sampling device current_patcher memory_required get_dtype
        get_dtype_inference manual_cast_dtype""",
    "LoadedModel": "model device model_loaded_memory",
    "CFGGuider": "model_patcher model_options",
    "VAE": """first_stage_model patcher device output_device vae_dtype latent_dim upscale_ratio output_channels
        disable_offload process_output memory_used_decode throw_exception_if_invalid get_sd decode decode_tiled
        spacial_compression_decode temporal_compression_decode upscale_index_formula model_size""",
}


def names_in(tree: ast.Module) -> Iterator[str]:
    """The dotted names of ComfyUI's modules, and of what is in them, that a file uses."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                known[each.asname or each.name.partition(".")[0]] = (
                    each.name if each.asname else each.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            known |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
    known = {own: name for own, name in known.items() if name.partition(".")[0] in HOST}
    yield from known.values()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, *rest = ast.unparse(node).split(".")
            if first in known and all(part.isidentifier() for part in rest):
                yield ".".join([known[first], *rest])


def used() -> list[str]:
    files = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in NOT_PRODUCT]
    return sorted({name for path in files for name in names_in(ast.parse(path.read_text()))})


def find(name: str) -> object:
    """What a dotted name stands for. Raises AttributeError if ComfyUI does not have it."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise AttributeError(name)


def test_many_names_are_found():
    """Else the next test would hold for nothing."""
    assert {"comfy.model_management.load_models_gpu", "comfy.patcher_extension.WrappersMP.APPLY_MODEL"} <= {*used()}


@pytest.mark.parametrize("name", used())
def test_a_name_of_comfyui_is_there(name):
    find(name)


@pytest.fixture(scope="module")
def objects():
    patcher = CASES["FLUX.1"].patcher()
    return {
        "ModelPatcher": patcher,
        "BaseModel": patcher.model,
        "LoadedModel": comfy.model_management.LoadedModel(patcher),
        "CFGGuider": comfy.samplers.CFGGuider(patcher),
        "VAE": vaes.vae(),
    }


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in ATTRIBUTES for name in ATTRIBUTES[kind].split()])
def test_an_attribute_of_comfyuis_objects_is_there(kind, name, objects):
    assert hasattr(objects[kind], name)
