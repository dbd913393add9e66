"""What ComfyUI's nodes save behind ours is what they save without: files that ComfyUI loads again."""

import comfy.sd
import folder_paths
import pytest
import torch
from comfy_extras.nodes_lora_extract import LoraSave
from comfy_extras.nodes_model_merging import (
    CheckpointSave,
    CLIPMergeSimple,
    CLIPSave,
    CLIPSubtract,
    ModelMergeSimple,
    ModelSave,
    ModelSubtract,
)
from loras import with_lora
from safetensors.torch import load_file
from skein import engine
from skein.bench.errors import relative_error
from skein.demo.sampling import sample
from skein.plan import AttentionConfig, CacheConfig, CompileConfig, FP8Config, ParallelConfig
from skein.quantization import quantize_text_encoder as fp8
from small_models import random_clip, random_hunyuan_video
from vaes import vae as random_vae

TEXT = "a red circle moves left over sand"
LAYER = "clip_l.transformer.text_model.encoder.layers.3.mlp.fc1"
PLANS = {
    "fp8": dict(fp8=FP8Config()),
    "compile": dict(compile=CompileConfig()),
    "all": dict(fp8=FP8Config(), compile=CompileConfig(), attention=AttentionConfig(), cache=CacheConfig()),
    "context parallel": dict(parallel=ParallelConfig("cpu,cpu")),
}


@pytest.fixture(autouse=True)
def _output_folder(tmp_path):
    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path))
    yield
    folder_paths.set_output_directory(before)


@pytest.fixture
def saved(tmp_path):
    """The file that a node saves."""

    def file_of(save):
        before = set(tmp_path.rglob("*.safetensors"))
        save()
        (path,) = set(tmp_path.rglob("*.safetensors")) - before
        return path

    return file_of


@pytest.fixture(scope="module")
def clips():
    return random_clip(0), random_clip(1)


def same_files(first, second):
    """Compared, and removed: hundreds of megabytes each."""
    pairs = zip(sorted(load_file(first).items()), sorted(load_file(second).items()), strict=True)
    same = all(a == b and x.dtype == y.dtype and torch.equal(x, y) for (a, x), (b, y) in pairs)
    second.unlink()
    return same


def test_a_text_encoder_is_saved_as_it_was(clips, saved):
    clip, _ = clips
    expected = clip.encode(TEXT)
    stock = saved(lambda: CLIPSave().save(clip, "clip"))
    path = saved(lambda: CLIPSave().save(fp8(clip), "clip"))
    error = relative_error(comfy.sd.load_clip([str(path)]).encode(TEXT), expected)
    assert error == 0 and same_files(stock, path)


def test_with_lora_before_and_after(clips, saved):
    before = with_lora(clips[0], 1.0, [LAYER])
    both = with_lora(before, -0.5, [LAYER], seed=1)
    stock = saved(lambda: CLIPSave().save(both, "clip"))
    path = saved(lambda: CLIPSave().save(with_lora(fp8(before), -0.5, [LAYER], seed=1), "clip"))
    assert relative_error(comfy.sd.load_clip([str(path)]).encode(TEXT), both.encode(TEXT)) < 1e-5
    assert same_files(stock, path)


def test_merged_text_encoders(clips, saved):
    """One merged into the other, in FP8 or not; the FP8 weights are those of the merge, in its rounding."""
    first, second = clips
    (merged,) = CLIPMergeSimple().merge(first, second, 0.5)
    stock, expected = saved(lambda: CLIPSave().save(merged, "clip")), merged.encode(TEXT)
    for one, other in ((first, fp8(second)), (fp8(first), fp8(second))):
        (again,) = CLIPMergeSimple().merge(one, other, 0.5)
        assert relative_error(again.encode(TEXT), expected) < 0.1
        assert same_files(stock, saved(lambda: CLIPSave().save(again, "clip")))  # noqa: B023


def test_a_lora_is_extracted_from_the_original_or_not_at_all(clips, saved):
    first, second = clips

    def extract(one, other):
        (difference,) = CLIPSubtract().merge(one, other, 1.0)
        return saved(lambda: LoraSave.execute("lora", 8, "full_diff", True, text_encoder_diff=difference))

    assert same_files(extract(second, fp8(first)), extract(second, first))
    with pytest.raises(ValueError, match="before FP8 Text Encoder"):
        extract(fp8(second), first)


def test_an_original_that_comfyui_has_dropped_is_not_made_up():
    quantized = fp8(random_clip(0))
    with pytest.raises(ValueError, match="before FP8 Text Encoder"):
        CLIPSave().save(quantized, "clip")


def test_a_checkpoint_is_saved_as_it_was(clips, saved):
    model, vae = random_hunyuan_video(), random_vae()
    planned = engine.edit(model, **PLANS["all"])
    stock = saved(lambda: CheckpointSave().save(model, clips[0], vae, "checkpoint"))
    path = saved(lambda: CheckpointSave().save(planned, fp8(clips[0]), vae, "checkpoint"))
    assert same_files(stock, path)


@pytest.mark.parametrize("plan", list(PLANS))
def test_a_model_is_saved_merged_and_extracted_as_it_was(plan, saved):
    first, second = random_hunyuan_video(), random_hunyuan_video(seed=1)
    model = engine.edit(first, **PLANS[plan])
    if plan == "fp8":
        sample(model, "a red circle", shape=(1, 16, 1, 8, 8), steps=1)  # it has a twin then

    def same(make):
        """Whether what is made of two models is the same file, with the plan on the first."""
        return same_files(*(saved(lambda: make(each, second)) for each in (first, model)))  # noqa: B023

    assert same(lambda one, _: ModelSave().save(one, "m"))
    for node in (ModelMergeSimple, ModelSubtract):
        for order in (1, -1):
            assert same(lambda *two: ModelSave().save(*node().merge(*two[::order], 0.5), "m"))  # noqa: B023
    assert same(lambda *two: LoraSave.execute("l", 4, "full_diff", True, *ModelSubtract().merge(*two, 1.0)))
