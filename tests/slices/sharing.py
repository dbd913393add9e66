"""Slices of each rank's share, over the ranks that run this script, against one process. Prints a line a model: its
error, and how many tokens the feed-forward of the first block was given at a time on this rank.
"""

import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "scripts")]
from pack import load_pack  # noqa: E402

load_pack()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from skein import engine  # noqa: E402
from skein.bench.errors import relative_error  # noqa: E402
from skein.parallel import Mesh  # noqa: E402
from skein.plan import CacheConfig, Plan, SlicesConfig  # noqa: E402
from tiny_models import CASES, sample  # noqa: E402

FEED_FORWARD = {
    "HunyuanVideo": "double_blocks.0.img_mlp",
    "Wan 2.1": "blocks.0.ffn",
    "FLUX.1": "double_blocks.0.img_mlp",
}
PLANS = {"slices": Plan(slices=SlicesConfig(3)), "cache": Plan(CacheConfig(0.8, order=0), slices=SlicesConfig(3))}


def run(name: str, plan: Plan, mesh: Mesh | None) -> tuple[torch.Tensor, list[int]]:
    """A run as a worker makes it; the latent, and the tokens of each call of the feed-forward."""
    case, tokens = CASES[name], []
    patcher = case.patcher().clone()
    layer = patcher.model.diffusion_model.get_submodule(FEED_FORWARD[name])[0]
    layer.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[1]))
    guider = SimpleNamespace(model_patcher=patcher, model_options=patcher.model_options)
    with engine.applied(plan, guider, mesh):
        patcher.model_options = guider.model_options
        latent = sample(case, patcher, steps=2, near=plan.cache is not None)
    return latent, tokens


dist.init_process_group("gloo", timeout=timedelta(seconds=120))
mesh = Mesh(torch.device("cpu"), tuple(int(each) for each in sys.argv[1].split(",")), timedelta(seconds=120))
for name in FEED_FORWARD:
    for technique, plan in PLANS.items():
        one, _ = run(name, Plan(cache=plan.cache, slices=SlicesConfig(1)), None)
        several, tokens = run(name, plan, mesh)
        if mesh.rank == 0:
            print(f"{name}|{technique}|{relative_error(several, one):.1e}|{tokens[:3]}", flush=True)
