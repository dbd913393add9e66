"""What Speed Up with `low memory` would do for HunyuanVideo on cards of several sizes, by the estimate: nothing runs.

    python3 -m bench.which_card

The model has its true size and no memory (PyTorch's meta device), so this takes seconds on any machine. A row for each
size of a video, a column for each card (in GiB); in it whether blocks run whole or in slices, the working memory of a
call + the weights that stay on the card, and the cache's predict_order. Prints a Markdown table and ends with one JSON
line.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from pack import load_pack  # noqa: E402

load_pack()

import comfy.model_management as memory  # noqa: E402
import comfy.supported_models  # noqa: E402
import torch  # noqa: E402
from skein.attributes import changed  # noqa: E402
from skein.bench import random_model as models  # noqa: E402
from skein.estimate import advice, work_bytes  # noqa: E402
from skein.footprint import load_of, needed_bytes, weight_bytes, with_slices  # noqa: E402
from skein.plan import AttentionConfig, CacheConfig, CompileConfig, FP8Config, Plan, PresetConfig  # noqa: E402
from skein.presets import Case, Choice, fit_cache  # noqa: E402

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

CARDS = 8, 12, 16, 24
SIZES = (1280, 720, 129), (1280, 720, 61), (960, 544, 129), (848, 480, 81)
PLAN = Plan(CacheConfig(), AttentionConfig(), FP8Config(), CompileConfig())


@contextmanager
def card_of(gib: int) -> Iterator[None]:
    """Within: the GPU has so many GiB."""
    with changed([(memory, "get_total_memory", lambda device=None: gib << 30)]):
        yield


def model_without_memory() -> "ModelPatcher":
    from comfy.model_patcher import ModelPatcher

    config = models.MODELS["HunyuanVideo"].config
    kind = comfy.supported_models.HunyuanVideo(dict(config))
    kind.set_inference_dtype(torch.bfloat16, None)
    with torch.device("meta"):
        model = kind.get_model({}, "", device="meta").to(torch.bfloat16)
    return ModelPatcher(model, load_device=torch.device("cuda", 0), offload_device=torch.device("cpu"))


def row_of(patcher: "ModelPatcher", size: tuple[int, int, int], gib: int) -> dict:
    """What would be done for a size on a card."""
    case = Case(PresetConfig("low memory"), patcher, models.latent_shape(*size))
    choice, load = Choice(PLAN), load_of(patcher, case.latent)
    assert load is not None
    fit_cache(choice, case)
    plan = with_slices(choice.plan, patcher, case.latent)
    weights = weight_bytes(patcher.model, plan)
    need = weights + needed_bytes(plan, patcher, case.latent)
    return {
        "size": "{} x {} x {}".format(*size), "card_gib": gib, "fits": not advice(load, plan, case.usable),
        "work_gb": work_bytes(load, plan) / 1e9, "slices": plan.slices.count if plan.slices else 1,
        "cache_order": plan.cache.order if plan.cache else None,
        "weights_gb": weights / 1e9, "off_card_gb": min(max(need - case.usable, 0), weights) / 1e9,
    }  # fmt: skip


def cell(row: dict) -> str:
    """A row in words."""
    if not row["fits"]:
        return "no"
    blocks = "whole" if row["slices"] == 1 else "in slices"
    cache = "no cache" if row["cache_order"] is None else f"order {row['cache_order']}"
    return f"{blocks}, {row['work_gb']:.1f} + {row['weights_gb'] - row['off_card_gb']:.0f} GB, {cache}"


def table(rows: list[dict]) -> str:
    """Sizes by cards."""
    lines = ["| | " + " | ".join(f"{gib} GB" for gib in CARDS) + " |", "| --- |" + " --- |" * len(CARDS)]
    for size in dict.fromkeys(row["size"] for row in rows):
        lines.append(f"| {size} | " + " | ".join(cell(row) for row in rows if row["size"] == size) + " |")
    return "\n".join(lines)


def all_rows() -> list[dict]:
    """Of each size on each card."""
    patcher, rows = model_without_memory(), []
    for size in SIZES:
        for gib in CARDS:
            with card_of(gib):
                rows.append(row_of(patcher, size, gib))
    return rows


def main() -> None:
    rows = all_rows()
    print(table(rows))
    print(json.dumps({"estimated": "nothing was run", "blocks": "20 + 40", "rows": rows}))


if __name__ == "__main__":
    main()
