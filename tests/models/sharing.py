"""Each architecture's tiny model over the ranks that run this script, against one process: the latent, and which calls
the cache reuses. Prints a line a model and technique.
"""

import gc
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "scripts")]
from pack import load_pack  # noqa: E402

load_pack()

import comfy.model_management as memory  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from skein import engine  # noqa: E402
from skein.bench.errors import relative_error  # noqa: E402
from skein.models import Network  # noqa: E402
from skein.parallel import Mesh  # noqa: E402
from skein.plan import CacheConfig, Plan  # noqa: E402
from skein.report import recent_runs  # noqa: E402
from tiny_models import CASES, guidance, sample  # noqa: E402

PLANS = {"exact": Plan(), "cache": Plan(cache=CacheConfig(threshold=0.8, order=0))}


def run(name: str, plan: Plan, mesh: Mesh | None) -> tuple[torch.Tensor, list[bool]]:
    """A run as a worker makes it; the latent, and which calls were reused."""
    case = CASES[name]
    patcher = case.patcher().clone()
    guider = SimpleNamespace(model_patcher=patcher, model_options=patcher.model_options)
    with engine.applied(plan, guider, mesh):
        patcher.model_options = guider.model_options
        latent = sample(case, patcher, steps=4, cfg=guidance(name), near=plan.cache is not None)
    return latent, [call.reused for call in recent_runs()[-1].calls] if plan.cache else []


def compare(name: str, mesh: Mesh) -> None:
    if "parallel" in Network(CASES[name].patcher().model.diffusion_model).architecture.refuses:
        return
    for technique, plan in PLANS.items():
        one, alone = run(name, plan, None)
        several, shared = run(name, plan, mesh)
        exchanged = mesh.exchange_seconds() > 0
        if mesh.rank == 0:
            error = relative_error(several, one)
            print(f"{name}|{technique}|{exchanged}|{error:.1e}|{alone == shared}|{sum(shared)}", flush=True)


dist.init_process_group("gloo", timeout=timedelta(seconds=120))
degrees = tuple(int(each) for each in sys.argv[1].split(","))
mesh = Mesh(torch.device("cpu"), degrees, timedelta(seconds=120))
for name in sys.argv[2:] or CASES:
    compare(name, mesh)
    memory.unload_all_models()  # which ComfyUI would keep
    gc.collect()
dist.destroy_process_group()
