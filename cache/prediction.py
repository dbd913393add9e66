"""Predicting what the skipped blocks would have done, as a weighted sum of what they did before.

Each computed call left a point: the sigma, the first block's change (signature) and the other blocks' change
(residual). A prediction is one weight a point, summing to one. Two ways to choose the weights:

- `taylor_weights`: the polynomial through the points over sigma, evaluated at the new sigma (TaylorSeer, arXiv
  2503.06923, with finite differences on the sampler's own grid). Needs no look at the new call.
- `fitted_weights`: the combination of the old signatures that comes closest to the new one. The first
  block has already run, so the new signature is known, and the blocks behind it map like combinations to like
  combinations to first order. This is the multisecant step of Anderson acceleration (Walker and Ni 2011).

On the demo model fitted weights are better at every distance and order; docs/LOG.md has the figures.

Letters: B batch, S tokens, C channels, N points.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]  # the sum of a tensor over all processes that share a video's tokens
SUMMED = 4096  # tokens that are summed at once
RIDGE = 0.01  # of the diagonal: keeps nearly parallel differences from cancelling each other with large weights


def taylor_weights(sigmas: Sequence[float], sigma: float, batch: int) -> Tensor:
    """Lagrange weights (N, B), float32 on the CPU, of distinct `sigmas` at `sigma`: order N - 1."""
    weights = []
    for i, here in enumerate(sigmas):
        weight = 1.0
        for j, other in enumerate(sigmas):
            if i != j:
                weight *= (sigma - other) / (here - other)
        weights.append(weight)
    return torch.tensor(weights).unsqueeze(1).repeat(1, batch)


def fitted_weights(signatures: Sequence[Tensor], signature: Tensor, total: Total) -> Tensor:
    """Weights (N, B), float32 on the CPU, of old signatures (B, S, C), oldest first, that fit the new one.

    Least squares over the differences between neighbours, for each sample of the batch apart; total sums over the
    processes that have the other tokens.
    """
    newest, batch = signatures[-1], signature.shape[0]
    differences = [(later - earlier).float() for earlier, later in itertools.pairwise(signatures)]
    if not differences:
        return torch.ones(1, batch)
    target = (signature - newest).float()
    products = [torch.stack([_dot(a, b) for b in (*differences, target)]) for a in differences]
    system = total(torch.stack(products)).permute(2, 0, 1).cpu().double()  # (B, N-1, N); not every device has float64
    gram, right = system[:, :, :-1], system[:, :, -1]
    diagonal = torch.diagonal(gram, dim1=1, dim2=2)
    floor = 1e-9 * diagonal.sum(dim=1, keepdim=True) + 1e-30  # equal signatures (difference zero) get no weight
    gram = gram + torch.diag_embed(RIDGE * diagonal + floor)
    steps = torch.linalg.solve(gram, right).T.float()  # (N-1, B): how far along each difference
    weights = torch.zeros(len(signatures), batch)
    weights[-1] = 1
    weights[1:] += steps
    weights[:-1] -= steps
    return weights


def combine(values: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum of N tensors (B, S, C) under weights (N, B), rounded once. A single one is returned as it is: do
    not change the result in place."""
    if len(values) == 1:
        return values[0]
    weights = weights.to(values[0].device)[:, :, None, None]
    result = torch.empty_like(values[0])
    # Weights of several signs cancel: in float32, but only so many tokens of it at a time.
    for to, first, *others in zip(*(each.split(SUMMED, dim=1) for each in (result, *values))):
        part = first * weights[0]
        for value, weight in zip(others, weights[1:]):
            part.addcmul_(value.float(), weight)
        to.copy_(part)
    return result


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=(1, 2))
