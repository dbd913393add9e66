"""How far a result is from another."""

import torch


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference, in float32."""
    return float((result.float() - reference.float()).norm() / reference.float().norm())
