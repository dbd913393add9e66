"""Blocks that are recorded once and run again (recorder.py). What CUDA itself does: `-m bench.graphs` on a GPU."""

from loras import with_lora
from recorder import Again
from skein import engine, live
from skein.bench.errors import relative_error
from skein.compilation import graphs
from skein.demo.sampling import sample
from skein.plan import AttentionConfig, CacheConfig, CompileConfig, FP8Config
from skein.report import recent_runs

SMALL = dict(shape=(1, 16, 3, 8, 8), steps=6)
PROMPT = "a red circle moves left"
BLOCKS, KINDS = 4, 2  # of the tiny model


def counted(recorder):
    counts = {name: recorder.calls.count(name) for name in ("prepare", "record", "replay")}
    recorder.calls.clear()
    return counts


def test_each_block_is_recorded_once_in_a_run_and_computes_the_same(tiny_model, recorder):
    stock = sample(tiny_model, PROMPT, **SMALL)
    compiled = engine.edit(tiny_model, compile=CompileConfig())
    for _ in range(2):  # nothing is left of the first run
        assert relative_error(sample(compiled, PROMPT, **SMALL), stock) < 1e-5
        counts = counted(recorder)
        # A block of each kind runs, another is timed, and the time of one graph of each kind is taken once more.
        assert counts == {"prepare": KINDS, "record": BLOCKS, "replay": BLOCKS * SMALL["steps"] - 2 * KINDS + KINDS}


def test_with_the_other_techniques(tiny_model, recorder):
    """The cache's misses and hits, FP8, LoRA and an attention kernel: as without graphs."""
    patched = with_lora(tiny_model, 0.5, ["diffusion_model.double_blocks.0.img_attn.qkv"])
    plan = dict(cache=CacheConfig(threshold=0.9), fp8=FP8Config(), attention=AttentionConfig())
    plain = sample(engine.edit(patched, compile=CompileConfig("no-cudagraphs"), **plan), PROMPT, **SMALL)
    assert counted(recorder)["record"] == 0
    reused = recent_runs()[-1].reused
    recorded = sample(engine.edit(patched, compile=CompileConfig(), **plan), PROMPT, **SMALL)
    assert counted(recorder)["record"] > 0
    assert relative_error(recorded, plain) < 1e-5
    assert recent_runs()[-1].reused == reused > 0


def test_two_conditionings_of_different_lengths_have_graphs_of_their_own(tiny_model, recorder):
    inputs = dict(positive=PROMPT, negative="a small blue square moves right over sand", cfg=4.0, **SMALL)
    stock = sample(tiny_model, **inputs)
    assert relative_error(sample(engine.edit(tiny_model, compile=CompileConfig()), **inputs), stock) < 1e-5
    assert counted(recorder)["record"] in (BLOCKS, 2 * BLOCKS)  # ComfyUI may pad them to one length


def test_where_the_gpu_is_slower_than_the_host_blocks_run_as_they_are(tiny_model, recorder, monkeypatch):
    monkeypatch.setattr(Again, "gpu_s", 1e9)
    stock = sample(tiny_model, PROMPT, **SMALL)
    compiled = engine.edit(tiny_model, compile=CompileConfig())
    assert relative_error(sample(compiled, PROMPT, **SMALL), stock) < 1e-5
    assert counted(recorder) == {"prepare": KINDS, "record": KINDS, "replay": 2 * KINDS}


def test_what_cannot_be_recorded_runs_as_it_is(tiny_model, recorder, monkeypatch):
    def fails(self, compute):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Again, "record", fails)
    stock = sample(tiny_model, PROMPT, **SMALL)
    compiled = engine.edit(tiny_model, compile=CompileConfig())
    assert relative_error(sample(compiled, PROMPT, **SMALL), stock) < 1e-5
    assert counted(recorder) == {"prepare": KINDS, "record": 0, "replay": 0}


def test_8_bit_attention_which_not_all_steps_have_is_not_recorded(tiny_model, recorder):
    plan = dict(compile=CompileConfig(), attention=AttentionConfig(allow_8bit=True))
    sample(engine.edit(tiny_model, **plan), PROMPT, **SMALL)
    assert not recorder.calls


def test_blocks_that_are_large_are_not_recorded(tiny_model, recorder, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_VALUES", 100)
    sample(engine.edit(tiny_model, compile=CompileConfig()), PROMPT, **SMALL)
    assert not recorder.calls


def test_other_weights_are_recorded_anew(tiny_model, recorder):
    """A weight that has moved between two calls: its graph would read what is there now."""
    linear = tiny_model.model.diffusion_model.single_blocks[1].linear2

    def move(step, *_):
        if step == 3:
            linear.weight.data = linear.weight.data.clone()

    compiled = engine.edit(tiny_model, compile=CompileConfig())
    stock = sample(tiny_model, PROMPT, **SMALL)
    out = sample(compiled, PROMPT, callback=move, **SMALL)
    assert relative_error(out, stock) < 1e-5
    assert counted(recorder)["record"] == BLOCKS + 1


def test_not_under_the_allocator_that_cannot(tiny_model, recorder, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_allocator_backend", lambda: "cudaMallocAsync")
    assert not graphs.supported()
    monkeypatch.setattr("torch.cuda.get_allocator_backend", lambda: "native")
    assert graphs.supported()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(graphs, "supported", lambda: False)
    sample(engine.edit(tiny_model, compile=CompileConfig()), PROMPT, **SMALL)
    assert not recorder.calls


def test_attention_in_a_graph_is_not_said_to_be_missing(tiny_model, recorder, monkeypatch):
    """No Python runs in a graph, so its attentions are not counted again."""
    record = recorder.record
    monkeypatch.setattr(recorder, "record", lambda self, compute: (record(self, compute), lambda: None)[1])
    sample(engine.edit(tiny_model, compile=CompileConfig(), attention=AttentionConfig()), PROMPT, **SMALL)
    assert counted(recorder)["record"] == BLOCKS
    assert live.snapshot()["sampling"]["notes"]["attention"].startswith("FlashAttention-2 runs")
    assert "does not ask" not in live.snapshot()["sampling"]["notes"]["attention"]
