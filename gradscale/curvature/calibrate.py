"""The step of finite differences: a compromise between curvature of the gradient and rounding, for each quantity.

Central differences with the step eps have the error T eps^2 + R / eps. Flat and sharp directions differ in T, and so in
the best eps, by a factor of 100 and more: no constant serves.

Shapes: P entries, J steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.curvature.layout import gaussian
from gradscale.curvature.products import add_differences, add_gradients, check_fine
from gradscale.curvature.stream import Stream

QUANTITIES = ("vector", "lambda_max", "trace")
_FACTOR = 4  # between one step and the next
_LARGEST, _STEPS = 2e-2, 8  # of float32: down to 1e-6
_STEPS_DOUBLE = 15  # down to 7e-11


class Step(NamedTuple):
    eps: float
    error: float  # estimated, relative


def calibrate(stream: Stream, seed: int = 0) -> dict[str, Step]:
    """For every one of `QUANTITIES` the step with the smallest estimated error, and that error.

    Along a standard normal direction v and the gradient g (where it is not zero), products D(eps) are compared with
    D(eps / 4): where T prevails, they differ by 15 times the error of the latter, where R does, by about that error.

    - `vector`: |D - D'| / |D|, the larger of the two directions. For whole spectra.
    - `lambda_max`: |<u, D - D'>| / |D| along u = g / |g|, where sharpness is. For eigenvalues at the top.
    - `trace`: |<v, D - D'>| / |D|, relative to the scatter of a probe of the trace, which is about |D|.

    Heuristic: T and R are assumed to be constants of a direction. Cost: 4 J forward and backward passes.
    Raises: GradscaleError if a parameter is coarser than float32.
    """
    check_fine(stream.subject)
    coarse = max(torch.finfo(parameter.dtype).eps for parameter in stream.parameters)
    ladder = [_LARGEST / _FACTOR**j for j in range(_STEPS if coarse > 1e-10 else _STEPS_DOUBLE)]
    rows = {name: _changes(stream, v, ladder) for name, v in _directions(stream, seed).items()}
    random, sharp = rows["random"], rows.get("gradient", rows["random"])
    changes = {
        "vector": [max(a.vector, b.vector) for a, b in zip(random, sharp, strict=True)],
        "lambda_max": [change.scalar for change in sharp],
        "trace": [change.scalar for change in random],
    }
    return {quantity: best(ladder, found) for quantity, found in changes.items()}


def best(ladder: Sequence[float], changes: Sequence[float]) -> Step:
    """The step of J with the least error by the `changes` [J - 1], |D(eps_j) - D(eps_j+1)| relative.

    The error at eps_j is the larger of the next coarser change over 15 (T), the next finer one over 4 (R), and that
    after it over 16 (R, of which a single scalar may show little by chance).
    """
    errors = [max(changes[j - 1] / 15, changes[j] / 4, changes[j + 1] / 16) for j in range(1, len(changes) - 1)]
    least = min(range(len(errors)), key=errors.__getitem__)
    return Step(ladder[least + 1], errors[least])


class _Change(NamedTuple):
    vector: float
    scalar: float


def _directions(stream: Stream, seed: int) -> Mapping[str, Tensor]:
    layout, device = stream.layout, stream.subject.device
    random = gaussian(layout, range(layout.size), seed, [0], device)[0].double()
    gradient = torch.zeros(layout.size, dtype=torch.float64, device=device)
    add_gradients(stream, gradient.split(layout.sizes), 1.0)
    length = gradient.norm()
    return {"random": random} | ({"gradient": gradient / length} if float(length) else {})


def _changes(stream: Stream, v: Tensor, ladder: Sequence[float]) -> list[_Change]:
    """Of each step and the next."""
    products = []
    for eps in ladder:
        products.append(torch.zeros_like(v))
        add_differences(stream, v, eps, products[-1])
    return [_change(v, coarse, fine) for coarse, fine in itertools.pairwise(products)]


def _change(v: Tensor, coarse: Tensor, fine: Tensor) -> _Change:
    scale, apart = float(fine.norm()), coarse - fine
    if not math.isfinite(scale) or not bool(apart.isfinite().all()):
        return _Change(math.inf, math.inf)
    if not scale:
        return _Change(*[0.0 if not bool(apart.any()) else math.inf] * 2)
    return _Change(float(apart.norm()) / scale, float((v @ apart).abs()) / scale)
