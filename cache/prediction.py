"""Predicting a tensor at a new sigma from its values at earlier ones."""

from collections.abc import Sequence

from torch import Tensor

Point = tuple[float, Tensor]  # sigma, value


def weights(sigmas: Sequence[float], sigma: float) -> list[float]:
    """Lagrange weights of the polynomial through values at `sigmas`, evaluated at `sigma`.

    One sigma gives [1] (reuse), two a line, three a parabola: the Taylor steps of order 0, 1 and 2 of
    TaylorSeer (arXiv 2503.06923) with finite differences, on the sampler's own, uneven grid.
    """
    result = []
    for i, here in enumerate(sigmas):
        weight = 1.0
        for j, other in enumerate(sigmas):
            if i != j:
                weight *= (sigma - other) / (here - other)
        result.append(weight)
    return result


def predict(history: Sequence[Point], sigma: float, order: int) -> Tensor:
    """The value at `sigma` from the last `order` + 1 points of a history of distinct sigmas, oldest first.

    With fewer points than that, the order falls to what they allow. Order 0 returns the stored tensor itself,
    which the caller must not change. Raises IndexError on an empty history.
    """
    points = history[-(order + 1) :]
    if len(points) == 1:
        return points[0][1]
    coefficients = weights([point[0] for point in points], sigma)
    result = points[0][1] * coefficients[0]
    for coefficient, (_, value) in zip(coefficients[1:], points[1:]):
        result.add_(value, alpha=coefficient)
    return result
