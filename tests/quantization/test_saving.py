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
    pairs = zip(sorted(load_file(first).items()), sorted(load_file(second).items()), strict=True)
    return all(a == b and x.dtype == y.dtype and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_a_text_encoder_is_saved_as_it_was(clips, saved):
    clip, _ = clips
    expected = clip.encode(TEXT)
    stock = saved(lambda: CLIPSave().save(clip, "clip"))
    path = saved(lambda: CLIPSave().save(fp8(clip), "clip"))
    error = relative_error(comfy.sd.load_clip([str(path)]).encode(TEXT), expected)
    assert error == 0 and same_files(path, stock)


def test_with_lora_before_and_after(clips, saved):
    before = with_lora(clips[0], 1.0, [LAYER])
    both = with_lora(before, -0.5, [LAYER], seed=1)
    stock = saved(lambda: CLIPSave().save(both, "clip"))
    path = saved(lambda: CLIPSave().save(with_lora(fp8(before), -0.5, [LAYER], seed=1), "clip"))
    assert relative_error(comfy.sd.load_clip([str(path)]).encode(TEXT), both.encode(TEXT)) < 1e-5
    assert same_files(path, stock)


def test_merged_text_encoders(clips, saved):
    """One merged into the other, in FP8 or not; the FP8 weights are those of the merge, in its rounding."""
    first, second = clips
    (merged,) = CLIPMergeSimple().merge(first, second, 0.5)
    stock, expected = saved(lambda: CLIPSave().save(merged, "clip")), merged.encode(TEXT)
    for one, other in ((first, fp8(second)), (fp8(first), second), (fp8(first), fp8(second))):
        (again,) = CLIPMergeSimple().merge(one, other, 0.5)
        assert relative_error(again.encode(TEXT), expected) < 0.1
        assert same_files(saved(lambda: CLIPSave().save(again, "clip")), stock)  # noqa: B023


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


@pytest.mark.parametrize("plan", list(PLANS))
def test_a_model_is_saved_as_it_was(plan, saved, clips):
    first, second, vae = random_hunyuan_video(), random_hunyuan_video(seed=1), random_vae()
    model = engine.edit(first, **PLANS[plan])
    if "parallel" not in PLANS[plan] and "compile" not in PLANS[plan]:
        sample(model, "a red circle", shape=(1, 16, 1, 8, 8), steps=1)
    for node in (lambda each, clip: ModelSave().save(each, "m"), lambda *two: CheckpointSave().save(*two, vae, "m")):
        stock, path = saved(lambda: node(first, clips[0])), saved(lambda: node(model, fp8(clips[0])))  # noqa: B023
        assert same_files(path, stock)
    for one, other in ((first, second), (second, first)):
        mine = [engine.edit(each, **PLANS[plan]) if each is first else each for each in (one, other)]
        (stock,), (merged,) = ModelMergeSimple().merge(one, other, 0.5), ModelMergeSimple().merge(*mine, 0.5)
        paths = [saved(lambda: ModelSave().save(each, "m")) for each in (stock, merged)]  # noqa: B023
        assert same_files(*paths)
        (stock,), (difference,) = ModelSubtract().merge(one, other, 1.0), ModelSubtract().merge(*mine, 1.0)
        paths = [saved(lambda: LoraSave.execute("l", 4, "full_diff", True, each)) for each in (stock, difference)]  # noqa: B023
        assert same_files(*paths)
