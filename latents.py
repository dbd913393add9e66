"""Which run made a latent: a few of its values, kept with the run, tell.

ComfyUI hands latents on as new objects, moves them to another device and may keep them in 16 bits, so neither the
object nor its bytes would do.
"""

import math
from collections.abc import Sequence

from torch import Tensor

VALUES = 64
SAME = 0.02  # relative difference; 16 bits make less than 0.005, another seed about 1


def some_values(latent: Tensor) -> list[float]:
    """Values of a latent, evenly spaced over all of it; none of a nested or an empty one."""
    if getattr(latent, "is_nested", False) or not latent.numel():
        return []
    flat = latent.reshape(-1)
    count = min(VALUES, len(flat))
    return flat[[i * len(flat) // count for i in range(count)]].float().tolist()


def difference(values: Sequence[float], others: Sequence[float]) -> float:
    """The relative difference of two latents by their values; infinite where they cannot be compared."""
    if not values or len(values) != len(others):
        return math.inf
    found = math.dist(values, others) / (math.hypot(*values) or 1.0)
    return found if math.isfinite(found) else math.inf
