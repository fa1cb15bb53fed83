"""Products by finite differences of an engine's gradients, and the step for them: see `curvature/calibrate.py`.

Shapes: p entries here, k vectors, J steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gradscale.curvature.calibrate import best, error_at
from gradscale.curvature.processes import all_summed
from gradscale.run.engine_losses import Share

_FACTOR = 4  # between one step and the next
_POWERS = 4
_LADDERS = ((1e-10, 2e-2, 15), (2e-7, 2e-2, 8), (1.0, 8e-2, 9))  # rounding unit, the largest step, steps


class Weights(Protocol):
    """Of an engine, of which this rank's slice of a vector is [p]."""

    @property
    def dtype(self) -> torch.dtype: ...

    def sq_norm(self) -> Tensor: ...

    def gradient(self, share: Share, shift: Tensor | None = None) -> Tensor: ...


class Found(NamedTuple):
    """A step, and estimated relative errors with it."""

    eps: float
    error: float  # of the quantity
    vector: float  # of a product


def differences(weights: Weights, share: Share, vector: Tensor, eps: float, shift: Tensor | None = None) -> Tensor:
    """[p] float64: (g(theta + h v) - g(theta - h v)) / 2 h of the mean gradient g, h = eps |theta| / |v|.

    theta are the weights plus `shift`; they are moved once for each sign. Error: O(eps^2), and rounding over eps. Cost:
    two forward and backward passes.
    """
    length = global_norm(vector)
    if not length:
        return torch.zeros_like(vector, dtype=torch.float64)
    h = eps * (math.sqrt(float(all_summed(weights.sq_norm()))) or 1.0) / length
    base = 0.0 if shift is None else shift.double()
    ahead, behind = (weights.gradient(share, base + step * vector.double()) for step in (h, -h))
    return (ahead - behind).div_(2 * h)


def calibrated(weights: Weights, share: Share, random: Tensor) -> dict[str, Found]:
    """For every quantity the step with the least error, along the first of `random` [k, p], the gradient, a sharp one.

    As `calibrate` of one process, but the sharp direction is that of four steps of power iteration, and the error for
    `lambda_max` that of the scalars along it and the gradient. Heuristic. Cost: 6 J forward and backward passes of
    `share`, and a few.
    """
    random = random[0].double()
    coarse = torch.finfo(weights.dtype).eps
    _, largest, count = next(ladder for ladder in _LADDERS if coarse < ladder[0])
    ladder = [largest / _FACTOR**j for j in range(count)]
    gradient = weights.gradient(share)
    start = gradient if global_norm(gradient) else random
    along_random = _changes(weights, share, random, ladder)
    along_gradient = _changes(weights, share, _unit(start), ladder)
    vector = [max(a.vector, b.vector) for a, b in zip(along_random, along_gradient, strict=True)]
    step = best(ladder, vector)
    sharp = _unit(start)
    for _ in range(_POWERS):
        sharp = _unit(differences(weights, share, sharp, step.eps))
    along_sharp = _changes(weights, share, sharp, ladder)
    top = [max(a.scalar, b.scalar) for a, b in zip(along_gradient, along_sharp, strict=True)]
    trace = best(ladder, [change.scalar for change in along_random])
    steps = {"vector": step, "lambda_max": best(ladder, top), "trace": trace}
    return {
        quantity: Found(each.eps, each.error, error_at(vector, ladder.index(each.eps)))
        for quantity, each in steps.items()
    }


def _unit(vector: Tensor) -> Tensor:
    return vector / (global_norm(vector) or 1.0)


def global_norm(vector: Tensor) -> float:
    return math.sqrt(float(all_summed(vector.double().square().sum())))


class _Change(NamedTuple):
    vector: float
    scalar: float


def _changes(weights: Weights, share: Share, v: Tensor, ladder: Sequence[float]) -> list[_Change]:
    products = (differences(weights, share, v, eps) for eps in ladder)
    return [_change(v, coarse, fine) for coarse, fine in itertools.pairwise(products)]


def _change(v: Tensor, coarse: Tensor, fine: Tensor) -> _Change:
    """Relative to the finer product; all ranks find the same."""
    apart = coarse - fine
    scale, size, scalar = (
        float(each) for each in all_summed(torch.stack([fine.square().sum(), apart.square().sum(), (v * apart).sum()]))
    )
    if not math.isfinite(scale + size + scalar) or (not scale and size):
        return _Change(math.inf, math.inf)
    return _Change(math.sqrt(size / scale), abs(scalar) / math.sqrt(scale)) if scale else _Change(0.0, 0.0)
