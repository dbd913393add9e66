"""A worker's weights lie in the checkpoint's file, whatever is done with the model."""

import weakref
from pathlib import Path

import comfy.cli_args
import comfy.sd
import comfy.utils
import pytest
import torch
from random_checkpoints import SMALL, random_model, text, with_lora
from skein import engine
from skein.attributes import changed
from skein.bench.errors import relative_error
from skein.checkpoints import in_file
from skein.demo.sampling import sample
from skein.models import share
from skein.plan import FP8Config, ParallelConfig
from skein.worker.weights import load_from_file
from skein.workers import group, release
from skein.workers.recipe import recipe_of
from small_models import on_a_gpu


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with torch.inference_mode():
        return random_model(tmp_path_factory.mktemp("checkpoints"), 4, torch.float32)


def file_of(model) -> str:
    return model.cached_patcher_init[1][0]


def mappings(pid, path):
    """What a process has of a file in memory: kB by field of /proc/pid/smaps."""
    total, inside = {}, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            inside = line.endswith(str(path))
        elif inside and rest[-1] == "kB":
            total[name[:-1]] = total.get(name[:-1], 0) + int(rest[0])
    return total


def outside(model, path):
    """Names of the weights that are not in the file's memory."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            ranges.append([int(each, 16) for each in line.split()[0].split("-")])
    return [
        name
        for name, weight in model.model.diffusion_model.named_parameters()
        if not any(start <= weight.data_ptr() < end for start, end in ranges)
    ]


def same(first, second):
    pairs = zip(first.model.state_dict().items(), second.model.state_dict().items(), strict=True)
    return all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)


def test_the_weights_are_the_loaders_and_lie_in_the_file(model):
    loaded = load_from_file(recipe_of(model))
    assert same(loaded, model)
    assert outside(model, file_of(model)) and not outside(loaded, file_of(model))


def test_converted_weights_are_the_loaders(model):
    converted = comfy.sd.load_diffusion_model(file_of(model), model_options={"dtype": torch.bfloat16})
    loaded = load_from_file(recipe_of(converted))
    assert same(loaded, converted) and loaded.model.get_dtype() == torch.bfloat16
    assert len(outside(loaded, file_of(model))) == len(list(loaded.model.diffusion_model.parameters()))


def test_the_type_is_the_one_chosen_in_comfyuis_process(model):
    """On a device for which ComfyUI would choose another, weights would not go with what they are multiplied by."""
    with changed([(comfy.cli_args.args, "bf16_unet", True)]):
        chosen = comfy.sd.load_diffusion_model(file_of(model))
    loaded = load_from_file(recipe_of(chosen))
    assert loaded.model.get_dtype() == torch.bfloat16 and same(loaded, chosen)
    out = sample(chosen, text(7), **SMALL)
    workers = sample(engine.edit(chosen, parallel=ParallelConfig("cpu,cpu")), text(7), **SMALL)
    release()
    assert relative_error(workers, out) < 2e-6


def test_a_type_that_a_node_has_chosen_is_computed_in(model):
    """As the node ModelComputeDtype does it; inputs of that type would not go with weights of the file's."""
    chosen = model.clone()
    chosen.set_model_compute_dtype(torch.bfloat16)
    out = sample(chosen, text(7), **SMALL)
    workers = sample(engine.edit(chosen, parallel=ParallelConfig("cpu,cpu")), text(7), **SMALL)
    assert relative_error(out, sample(model, text(7), **SMALL)) > 0
    assert relative_error(workers, out) < 0.01
    back = sample(engine.edit(model, parallel=ParallelConfig("cpu,cpu")), text(7), **SMALL)
    release()
    assert relative_error(back, sample(model, text(7), **SMALL)) < 2e-6


def test_what_is_written_to_a_weight_stays_out_of_the_file(model):
    before = Path(file_of(model)).read_bytes()
    loaded = load_from_file(recipe_of(model))
    next(loaded.model.diffusion_model.parameters()).add_(1)
    assert not outside(loaded, file_of(model))  # in the file's memory, but in a page of its own
    assert not same(loaded, model) and Path(file_of(model)).read_bytes() == before
    assert same(load_from_file(recipe_of(model)), model)


PARTS = pytest.mark.parametrize("part", ["", "diffusion_model.double_blocks.0.img_attn.qkv"], ids=["all", "part"])


@PARTS
def test_weights_that_leave_the_device_are_not_copied(model, part, monkeypatch):
    """Here, where there is no other device: one is said to be left, and another place in memory stands for it."""
    loaded = load_from_file(recipe_of(model))
    module = loaded.model.get_submodule(part)
    module._apply(torch.clone)
    assert len(outside(loaded, file_of(model))) >= len(list(module.parameters()))
    monkeypatch.setattr(in_file, "_comes_to_cpu", lambda *_: True)
    module._apply(lambda tensor: tensor)
    assert same(loaded, model) and not outside(loaded, file_of(model))


def test_weights_that_leave_the_device_outside_of_inference_mode_are_not_copied(model, monkeypatch):
    """As when a button frees the memory."""
    with torch.inference_mode():
        loaded = load_from_file(recipe_of(model))
        loaded.model._apply(torch.clone)
    monkeypatch.setattr(in_file, "_comes_to_cpu", lambda *_: True)
    with torch.inference_mode(False):
        loaded.model._apply(lambda tensor: tensor)
    assert same(loaded, model) and not outside(loaded, file_of(model))


def test_a_model_in_the_file_goes_with_its_last_user(model):
    loaded = load_from_file(recipe_of(model))
    gone = weakref.ref(loaded.model)
    del loaded
    assert gone() is None


@on_a_gpu
@PARTS
def test_weights_that_leave_a_gpu_are_not_copied(model, part):
    loaded = load_from_file(recipe_of(model))
    module = loaded.model.get_submodule(part)
    module.to("cuda").to("cuda")
    assert all(parameter.is_cuda for parameter in module.parameters())
    module.to("cpu")
    assert same(loaded, model) and not outside(loaded, file_of(model))


def test_a_second_model_over_the_same_weights_moves_its_own(model):
    loaded = load_from_file(recipe_of(model))
    second = share(loaded.model)
    second.to("meta")
    assert all(parameter.is_meta for parameter in second.parameters())
    assert same(loaded, model) and not outside(loaded, file_of(model))


def test_patched_weights_are_not_lost_on_the_way(model, monkeypatch):
    loaded = load_from_file(recipe_of(model))
    patched = with_lora(loaded)
    patched.patch_model(torch.device("cpu"))
    before = {name: weight.clone() for name, weight in patched.model.named_parameters()}
    monkeypatch.setattr(in_file, "_comes_to_cpu", lambda *_: True)
    patched.model._apply(torch.clone)
    assert not same(patched, model)
    assert all(torch.equal(weight, before[name]) for name, weight in patched.model.named_parameters())
    patched.detach()
    assert same(loaded, model)
    loaded.model._apply(torch.clone)  # the LoRA has been taken off, by Parameters that are new
    loaded.model._apply(lambda tensor: tensor)
    assert same(loaded, model) and not outside(loaded, file_of(model))


@pytest.mark.parametrize("fp8", [None, FP8Config()])
def test_two_workers_share_the_files_memory(model, fp8):
    """A worker with a copy of the weights would have each of them in memory of its own."""
    sample(engine.edit(model, fp8=fp8, parallel=ParallelConfig("cpu,cpu")), text(7), **SMALL)
    path = file_of(model)
    for pid in group._group.pids.values():
        memory = mappings(pid, path)
        assert memory["Rss"] * 1024 > 0.9 * Path(path).stat().st_size  # they have been read there
        assert memory["Anonymous"] == 0
    release()


def test_a_file_that_is_not_mapped_is_not_kept_in_memory(model, monkeypatch):
    """Its weights leave the host's memory when ComfyUI moves the model."""
    monkeypatch.setattr(comfy.utils, "DISABLE_MMAP", True)
    loaded = load_from_file(recipe_of(model))
    assert same(loaded, model) and len(outside(loaded, file_of(model)))
    weight = next(loaded.model.diffusion_model.parameters())
    memory = weakref.ref(weight.untyped_storage())
    weight.data = weight.data.clone()
    assert memory() is None


def test_fp8_weights_stay_in_the_workers_as_long_as_an_output_has_them(model, caplog, monkeypatch):
    """Two branches of a workflow, with FP8 and without; and then FP8 is removed."""
    release()
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed in the workers goes back to the system
    caplog.set_level("INFO", "skein")
    two = ParallelConfig("cpu,cpu")
    on, off = engine.edit(model, fp8=FP8Config(), parallel=two), engine.edit(model, parallel=two)
    first = sample(on, text(7), **SMALL)
    for _ in range(2):
        sample(off, text(7), **SMALL)
        assert torch.equal(sample(on, text(7), **SMALL), first)
    quantized = [line for line in caplog.text.splitlines() if "LoRA merged" in line or " -> " in line]
    held = [private_bytes(pid) for pid in group._group.pids.values()]
    del on
    sample(off, text(7), **SMALL)
    left = [private_bytes(pid) for pid in group._group.pids.values()]
    release()
    linear = [module.weight for module in model.model.diffusion_model.modules() if isinstance(module, torch.nn.Linear)]
    fp8 = sum(weight.numel() for weight in linear)  # one byte each
    assert len(quantized) == 1 and all(before - after > 0.7 * fp8 for before, after in zip(held, left)), (held, left)


def private_bytes(pid):
    """What a process has in memory that is in no file."""
    (line,) = [each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if each.startswith("RssAnon")]
    return int(line.split()[1]) << 10
