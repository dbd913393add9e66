"""Another node's attention beside ours: it is told of the call and the block that it runs in, and always the same of
the two runs. As ComfyUI's own sparse attention it decides by sigma and block, and is set again before each step.
"""

import pytest
import torch
from comfy.patcher_extension import CallbacksMP
from skein import engine
from skein.bench.errors import relative_error
from skein.demo.sampling import sample
from skein.plan import AttentionConfig, CacheConfig, CompileConfig

SMALL = dict(shape=(1, 16, 3, 8, 8), steps=4, cfg=3.0, negative="a blue square")
PROMPT = "a red circle moves left"
OVERRIDE = "optimized_attention_override"
STOCK, AUTO = AttentionConfig(kernel="stock"), AttentionConfig()
THEIRS = {
    "attention": dict(attention=STOCK),
    "compile": dict(compile=CompileConfig()),
    "attention and compile": dict(attention=STOCK, compile=CompileConfig()),
}
OURS = {"attention": dict(attention=AUTO), "attention and compile": dict(attention=AUTO, compile=CompileConfig())}


class Sparse:
    """Not exact in the later half of the steps, but in block 0; notes what it is told in each call."""

    def __init__(self):
        self.told = []

    def attention(self, before=None):
        def run(func, q, k, v, heads, mask=None, **kwargs):
            options = kwargs["transformer_options"]
            sigma, block = float(options["sigmas"].flatten()[0]), options.get("block_index")
            kind = options.get("block_type") if block is not None else "refiner"
            self.told.append((sigma, kind, block, tuple(options["cond_or_uncond"]), len(options["uuids"]), k.shape[2]))
            if sigma > 0.7 or not block:
                return (before or (lambda func, *a, **k: func(*a, **k)))(func, q, k, v, heads, mask=mask, **kwargs)
            return func(q, k[:, :, ::2], v[:, :, ::2], heads, **kwargs)

        return run

    def on(self, model, way):
        model = model.clone()
        options = model.model_options["transformer_options"]
        if way == "once":
            options[OVERRIDE] = self.attention()
            return model
        if way == "each step, over another":
            options[OVERRIDE] = lambda func, *args, **kwargs: func(*args, **kwargs)

        def prepare(patcher, timestep, model_options=None):
            if model_options is None:
                pytest.skip("this ComfyUI (0.16) does not hand the options to ON_PREPARE_STATE")
            current = model_options["transformer_options"].get(OVERRIDE)
            before = getattr(current, "before", current) if way == "each step, over another" else None
            ours = self.attention(before)
            ours.before = before
            model_options["transformer_options"][OVERRIDE] = ours

        model.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, "sparse", prepare)
        return model


@pytest.fixture
def shown(monkeypatch):
    texts = {}
    monkeypatch.setattr("skein.techniques.show", lambda node, text, about="": texts.update({about or node: text}))
    return texts


@pytest.mark.parametrize("way", ["once", "each step", "each step, over another"])
@pytest.mark.parametrize("name", THEIRS)
def test_where_it_runs_it_is_told_what_it_would_be_told_without_us(tiny_model, name, way, shown):
    alone, beside = Sparse(), Sparse()
    expected = sample(alone.on(tiny_model, way), PROMPT, **SMALL)
    assert relative_error(expected, sample(tiny_model, PROMPT, **SMALL)) > 1e-3  # it does something
    out = sample(engine.edit(beside.on(tiny_model, way), **THEIRS[name]), PROMPT, **SMALL)
    assert beside.told == alone.told
    assert relative_error(out, expected) < 1e-5
    if "attention" in THEIRS[name]:
        assert "another node's attention runs (" in shown["attention"]


@pytest.mark.parametrize("way", ["once", "each step", "each step, over another"])
@pytest.mark.parametrize("name", OURS)
def test_where_ours_runs_it_runs_in_every_step(tiny_model, name, way, shown):
    """But in the text refiner, and what runs is said on the node."""
    beside = Sparse()
    out = sample(engine.edit(beside.on(tiny_model, way), **OURS[name]), PROMPT, **SMALL)
    assert relative_error(out, sample(tiny_model, PROMPT, **SMALL)) < 1e-5
    assert {kind for _, kind, *_ in beside.told} == {"refiner"}
    assert "; choose kernel stock to run the other one" in shown["attention"]


def test_it_is_told_of_blocks_that_the_cache_and_padding_leave(tiny_model):
    """Other calls of the model than the first, some of their blocks passed through."""
    alone, beside = Sparse(), Sparse()
    cached = engine.edit(tiny_model, cache=CacheConfig(threshold=0.9))
    arguments = {**SMALL, "steps": 6}
    sample(engine.edit(alone.on(cached, "each step"), attention=None), PROMPT, **arguments)
    sample(engine.edit(beside.on(cached, "each step"), compile=CompileConfig()), PROMPT, **arguments)
    assert beside.told == alone.told and len(alone.told) < 6 * 6 * 2


def test_eight_bits_in_no_step_are_said(tiny_model, shown):
    config = AttentionConfig(allow_8bit=True, exact_steps=2)
    sample(engine.edit(tiny_model, attention=config), PROMPT, **SMALL)
    assert "nothing is computed in 8 bits: exact_steps is 2 at both ends, and there are 4 steps" in shown["attention"]
    sample(engine.edit(tiny_model, attention=config), PROMPT, **{**SMALL, "steps": 5})
    assert "8 bits" not in shown["attention"]
    assert torch.isfinite(sample(tiny_model, PROMPT, **SMALL)).all()
