"""What other nodes put on a model: refused in one sentence where a technique of ours cannot work with it, and not where
it can. Nothing has been compiled, quantized or started then.
"""

from unittest import mock

import comfy.hooks
import pytest
import torch
from comfy.controlnet import ControlBase
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_model_merging import ModelMergeSimple
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from comfy_extras.nodes_torch_compile import TorchCompileModel
from skein import engine
from skein.bench.errors import relative_error
from skein.conflicts import NAMES
from skein.demo.sampling import conditioning, sample
from skein.patchers import TWIN_KEY, keep
from skein.plan import AttentionConfig, CacheConfig, CompileConfig, FP8Config, ParallelConfig
from small_models import around_each_call, random_hunyuan_video
from torch._dynamo.utils import counters

SMALL = dict(shape=(1, 16, 3, 8, 8), steps=3)
PROMPT = "a red circle moves left"
PARTS = {
    "cache": CacheConfig(threshold=0.3),
    "attention": AttentionConfig(),
    "fp8": FP8Config(),
    "compile": CompileConfig(),
    "parallel": ParallelConfig("cpu,cpu"),
}
EVERY = tuple(PARTS)


@pytest.fixture
def model():
    return random_hunyuan_video()


@pytest.fixture(autouse=True)
def _no_workers(monkeypatch):
    def start(*_):
        raise AssertionError("workers are started")

    monkeypatch.setattr("skein.workers.delegation.group_for", start)


def compiled(model, way):
    """The model compiled as a whole: by ComfyUI's node, or by other packs' as an object patch or in place. Backend
    "eager" is PyTorch's tracing without code generation."""
    if way == "TorchCompileModel":
        return TorchCompileModel.execute(model, "eager")[0]
    model = model.clone()
    if way == "object patch":
        network = torch.compile(model.get_model_object("diffusion_model"), backend="eager")
        model.add_object_patch("diffusion_model", network)
    else:
        model.model.diffusion_model.compile(backend="eager")
    return model


@pytest.mark.parametrize("way", ["TorchCompileModel", "object patch", "in place"])
def test_a_compiled_model_is_refused_and_other_workflows_go_on(model, way):
    """In both orders of the nodes, before and after a run of it without ours, which leaves it on the model."""
    torch._dynamo.reset()
    stock = sample(model, PROMPT, **SMALL)
    ours = {technique: engine.edit(model, **{technique: config}) for technique, config in PARTS.items()}

    def refuse_all():
        graphs = counters["stats"]["unique_graphs"]
        for technique, config in PARTS.items():
            orders = [engine.edit(alone, **{technique: config})]
            orders += [] if way == "in place" else [compiled(ours[technique], way)]
            for both in orders:
                with pytest.raises(
                    ValueError, match=f"(compiles the whole model|TorchCompileModel) and {NAMES[technique]}"
                ):
                    sample(both, PROMPT, **SMALL)
        assert counters["stats"]["unique_graphs"] == graphs

    alone = compiled(model, way)
    refuse_all()
    assert relative_error(sample(alone, PROMPT, **SMALL), stock) < 1e-5
    assert counters["stats"]["unique_graphs"]
    refuse_all()
    if way == "in place":
        del model.model.diffusion_model._compiled_call_impl
    for technique in ("cache", "attention", "fp8", "compile"):
        assert relative_error(sample(ours[technique], PROMPT, **SMALL), stock) < 0.3, technique
        assert torch.equal(sample(model, PROMPT, **SMALL), stock)


@pytest.mark.parametrize("technique", EVERY)
def test_compiled_blocks_of_others_are_refused_but_by_the_cache(model, technique):
    """As KJNodes' node does: without guards on the options, so the next workflow would run the attention in them."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    blocks = model.clone()
    keys = [f"diffusion_model.{kind}_blocks.{i}" for kind in ("double", "single") for i in range(2)]
    unguarded = {"guard_filter_fn": lambda entries: ["transformer_options" not in entry.name for entry in entries]}
    set_torch_compile_wrapper(blocks, "eager", keys=keys, options=unguarded)
    both = engine.edit(blocks, **{technique: PARTS[technique]})
    if technique == "cache":
        torch._dynamo.reset()
        expected = sample(engine.edit(model, cache=PARTS["cache"]), PROMPT, **SMALL)
        assert relative_error(sample(both, PROMPT, **SMALL), expected) < 1e-5
    else:
        with pytest.raises(ValueError, match="A node that compiles the model's blocks and"):
            sample(both, PROMPT, **SMALL)


@pytest.mark.parametrize("name", ["double_blocks", "forward_orig"])
@pytest.mark.parametrize("technique", [name for name in EVERY if name != "parallel"])  # tests/workers has that
def test_what_is_put_on_around_each_call_is_refused(model, name, technique):
    """As TeaCache and WaveSpeed's cache do. Before a compiled block is looked for in what they have put there."""
    source = model.clone()
    source.set_model_unet_function_wrapper(around_each_call(model.model.diffusion_model, name))
    with pytest.raises(ValueError, match=f"changes the model's own code while it samples .* {NAMES[technique]}"):
        sample(engine.edit(source, **{technique: PARTS[technique]}), PROMPT, **SMALL)
    assert torch.isfinite(sample(engine.edit(model, **{technique: PARTS[technique]}), PROMPT, **SMALL)).all()


@pytest.mark.parametrize("node", [EasyCacheNode, LazyCacheNode])
def test_other_caches_are_refused_by_the_cache_alone(model, node):
    other = node.execute(model, 0.2, 0.15, 0.95, False)[0]
    expected = sample(other, PROMPT, **SMALL)
    with pytest.raises(ValueError, match=r"(Easy|Lazy)Cache and First-Block Cache cannot work on one model"):
        sample(engine.edit(other, cache=PARTS["cache"]), PROMPT, **SMALL)
    off = engine.edit(other, cache=CacheConfig(threshold=0), attention=AttentionConfig())
    assert relative_error(sample(off, PROMPT, **SMALL), expected) < 1e-5


@pytest.mark.parametrize("technique", ["fp8", "compile", "parallel"])
def test_multigpu_is_refused(model, technique):
    several = model.clone()
    several.set_additional_models("multigpu", [model.clone()])
    with pytest.raises(ValueError, match="ComfyUI's MultiGPU CFG Split and"):
        sample(engine.edit(several, **{technique: PARTS[technique]}), PROMPT, **SMALL)
    assert keep(several, TWIN_KEY).value is None


def scheduled_lora(model):
    key = "diffusion_model.time_in.in_layer.weight"
    hooks = comfy.hooks.create_hook_model_as_lora({}, {}, 1.0, 1.0)
    hook = hooks.hooks[0]
    hook.weights, hook.need_weight_init = {key: ("diff", (torch.ones_like(model.get_model_object(key)),))}, False
    return model, conditioning(PROMPT, hooks=hooks)


def merged(model):
    return ModelMergeSimple().merge(model, random_hunyuan_video(seed=1), 0.5)[0], PROMPT


def skip_layer_guidance(model):
    return SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, "1", "1")[0], PROMPT


def attention_patch(model):
    model = model.clone()
    model.set_model_attn1_output_patch(lambda out, extra_options: out)  # as core's NAGuidance
    return model, PROMPT


def block_replacement(model):
    model = model.clone()
    model.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit", "double_block", 1)
    return model, PROMPT


def other_attention(model):
    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda func, *a, **k: func(*a, **k)
    return model, PROMPT


def controlnet(model):
    return model, conditioning(PROMPT, control=ControlBase(), control_apply_to_uncond=False)


AWAY = {
    scheduled_lora: "hooks",
    merged: "A ModelMerge node has merged .* save the merge",
    skip_layer_guidance: "the patches of SkipLayerGuidanceDiT",
    attention_patch: "attn1_output_patch",
    block_replacement: "dit of block",
    other_attention: "another attention function",
    controlnet: "a ControlNet",
}


@pytest.mark.parametrize("make", AWAY, ids=lambda make: make.__name__)
def test_what_cannot_go_to_workers_is_refused_before_they_start(model, make):
    changed, positive = make(model)
    with pytest.raises(ValueError, match=AWAY[make]):
        sample(engine.edit(changed, parallel=PARTS["parallel"]), positive, **SMALL)


@pytest.mark.parametrize("make", [merged, skip_layer_guidance, block_replacement, scheduled_lora])
@pytest.mark.parametrize("technique", ["cache", "attention", "fp8", "compile"])
def test_what_works_beside_is_not_refused(model, make, technique):
    changed, positive = make(model)
    out = sample(engine.edit(changed, **{technique: PARTS[technique]}), positive, **SMALL)
    assert relative_error(out, sample(changed, positive, **SMALL)) < 0.3


def test_a_wrapper_of_another_name_that_compiles_is_seen_when_the_model_is_called(model):
    """The table does not know its key."""
    network = torch.compile(model.model.diffusion_model, backend="eager")

    def swap(executor, *args, **kwargs):
        with mock.patch.object(executor.class_obj, "diffusion_model", network):
            return executor(*args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "another", swap)
    for technique in ("cache", "attention"):
        with pytest.raises(ValueError, match="changes the model's own code"):
            sample(engine.edit(model, **{technique: PARTS[technique]}), PROMPT, **SMALL)
