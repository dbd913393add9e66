"""Attention on real ComfyUI models: padded conditioning gives what trimmed conditioning gives, and no mask is left."""

import pytest
import torch
from skein import engine
from skein.bench.errors import relative_error
from skein.demo.sampling import conditioning, sample
from skein.plan import AttentionConfig, CacheConfig
from small_models import HUNYUAN_VIDEO_15, around_the_text, random_hunyuan_video

VIDEO = (1, 16, 3, 8, 8)
SMALL = dict(shape=VIDEO, steps=4)
PADDED = 256


def padded(prompt: str, tokens: int = PADDED, left: bool = False, **extra) -> list:
    """A prompt's conditioning padded with noise, and its mask."""
    text, settings = conditioning(prompt, **extra)[0]
    noise = torch.randn(1, tokens - text.shape[1], text.shape[2], generator=torch.Generator().manual_seed(5))
    kept, cut = torch.ones(1, text.shape[1], dtype=torch.long), torch.zeros(1, noise.shape[1], dtype=torch.long)
    order = (lambda a, b: torch.cat([b, a], dim=1)) if left else (lambda a, b: torch.cat([a, b], dim=1))
    return [[order(text, noise), {**settings, "attention_mask": order(kept, cut)}]]


def recording(model, seen):
    """The model with an attention override of another pack's, which notes masks and runs ComfyUI's attention."""
    model = model.clone()

    def record(func, q, k, v, heads, mask=None, **kwargs):
        seen.append((mask is not None, k.shape[2]))
        return func(q, k, v, heads, mask=mask, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = record
    return model


@pytest.mark.parametrize("left", [False, True])
def test_padded_conditioning_gives_what_trimmed_conditioning_gives(tiny_model, left):
    seen = []
    trimmed = sample(tiny_model, "a red circle moves left", **SMALL)
    model = engine.edit(recording(tiny_model, seen), attention=AttentionConfig(kernel="stock"))
    assert relative_error(sample(model, padded("a red circle moves left", left=left), **SMALL), trimmed) < 1e-5
    assert seen and not any(masked for masked, _ in seen)  # no mask reached a kernel
    assert max(keys for _, keys in seen) == 3 * 4 * 4 + 5  # nor a padded token
    # The comparison can fail: left in and masked, padding still counts in the mean of the text.
    untrimmed = engine.edit(tiny_model, attention=AttentionConfig(trim_text=False))
    assert relative_error(sample(untrimmed, padded("a red circle moves left", left=left), **SMALL), trimmed) > 2e-5


def test_the_same_in_bfloat16():
    model = random_hunyuan_video(dtype=torch.bfloat16)
    assert model.model.get_dtype() == torch.bfloat16
    trimmed = sample(model, "a red circle moves left", **SMALL)
    masked = sample(engine.edit(model, attention=AttentionConfig()), padded("a red circle moves left"), **SMALL)
    assert relative_error(masked, trimmed) < 1e-2


def test_a_mask_with_holes_is_honoured(tiny_model):
    positive = padded("a red circle moves left")
    positive[0][1]["attention_mask"][0, 2] = 0
    stock = sample(tiny_model, positive, **SMALL)
    assert torch.equal(sample(engine.edit(tiny_model, attention=AttentionConfig()), positive, **SMALL), stock)


@pytest.mark.parametrize("cache", [None, CacheConfig(threshold=0.9)])
def test_cond_and_uncond_of_one_padded_length_are_cut_each_to_its_own(tiny_model, cache):
    trimmed = sample(engine.edit(tiny_model, cache=cache), "a red circle moves left", "a blue square", **SMALL, cfg=3.0)
    both = padded("a red circle moves left"), padded("a blue square")
    model = engine.edit(tiny_model, attention=AttentionConfig(), cache=cache)
    assert relative_error(sample(model, *both, **SMALL, cfg=3.0), trimmed) < 1e-5


def test_samples_of_one_batch_with_texts_of_different_length(tiny_model):
    prompts = "a red circle moves left", "a blue square"
    (first, settings), (second, _) = padded(prompts[0])[0], padded(prompts[1])[0]
    mask = torch.cat([padded(prompt)[0][1]["attention_mask"] for prompt in prompts])
    latent = torch.zeros(2, *VIDEO[1:])
    batch = [[torch.cat([first, second]), {"pooled_output": settings["pooled_output"], "attention_mask": mask}]]
    together = sample(engine.edit(tiny_model, attention=AttentionConfig()), batch, latent=latent, steps=4)
    for i, prompt in enumerate(prompts):
        text, alone = conditioning(prompt)[0]
        same = [[text, {**alone, "pooled_output": settings["pooled_output"]}]]
        assert relative_error(together[i], sample(tiny_model, same, latent=latent, steps=4)[i]) < 1e-5


def test_hunyuan_video_15_with_byt5_and_vision_tokens_around_the_text():
    model, around = random_hunyuan_video(**HUNYUAN_VIDEO_15), around_the_text()
    arguments = dict(shape=(1, 32, 3, 8, 8), steps=4)
    trimmed = sample(model, conditioning("a red circle moves left", **around), **arguments)
    positive = padded("a red circle moves left", **around)
    skein = engine.edit(model, attention=AttentionConfig())
    assert relative_error(sample(skein, positive, **arguments), trimmed) < 1e-5


@pytest.mark.parametrize("extra", [{"guiding_frame_index": 0}, {"ref_latent": torch.ones(1, 16, 1, 8, 8)}])
def test_image_to_video_templates(tiny_model, extra):
    trimmed = sample(tiny_model, conditioning("a red circle moves left", **extra), **SMALL)
    skein = engine.edit(tiny_model, attention=AttentionConfig())
    assert relative_error(sample(skein, padded("a red circle moves left", **extra), **SMALL), trimmed) < 1e-5


def test_another_packs_attention_runs_where_skeins_does_not(tiny_model, caplog):
    """With kernel stock it runs everywhere; otherwise in the text refiner only, and the log says which wins."""
    seen = []
    model = recording(tiny_model, seen)
    stock = sample(model, "a red circle", **SMALL)
    everywhere = len(seen)
    seen.clear()
    assert torch.equal(
        sample(engine.edit(model, attention=AttentionConfig(kernel="stock")), "a red circle", **SMALL), stock
    )
    assert len(seen) == everywhere
    seen.clear()
    with caplog.at_level("INFO", logger="skein"):
        ours = sample(engine.edit(model, attention=AttentionConfig()), "a red circle", **SMALL)
    assert relative_error(ours, stock) < 1e-5 and len(seen) == 2 * 4  # two refiner blocks a step
    assert "in place of another node's (" in caplog.text
