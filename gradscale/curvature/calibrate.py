"""The step of finite differences: a compromise between curvature of the gradient and rounding, for each quantity.

Central differences with the step eps have the error T eps^2 + R / eps. Flat and sharp directions differ in T, and so in
the best eps, by a factor of 100 and more: no constant serves.

Shapes: P entries, J steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.curvature.layout import gaussian
from gradscale.curvature.products import add_differences, add_gradients
from gradscale.curvature.stream import Stream

QUANTITIES = ("vector", "lambda_max", "trace")
_FACTOR = 4  # between one step and the next
_LARGEST, _STEPS = 2e-2, 8  # of float32: down to 1e-6
_STEPS_DOUBLE = 15  # down to 7e-11
_POWERS = 2


class Step(NamedTuple):
    eps: float
    error: float  # estimated, relative


def calibrate(stream: Stream, seed: int = 0) -> dict[str, Step]:
    """For every one of `QUANTITIES` the step with the smallest estimated error, and that error.

    Along a standard normal direction v, the gradient g, and a sharp direction u, two steps of power iteration from g,
    products D(eps) are compared with D(eps / 4): where T prevails, they differ by 15 times the error of the latter,
    where R does, by about that error. A gradient of zero leaves v alone.

    - `vector`: |D - D'| / |D|, the largest of the directions. For whole spectra.
    - `lambda_max`: |<u, D - D'>| / |D|, the square of |D - D'| / |D|, by which what is across u gets into a Ritz value,
      and |<g, D_g - D_g'>| / |g| |D|, where Lanczos begins. For eigenvalues at the top.
    - `trace`: |<v, D - D'>| / |D|, relative to the scatter of a probe of the trace, which is about |D|.

    Heuristic: T and R are assumed to be constants of a direction. Cost: 6 J + 5 forward and backward passes.
    """
    ladder = _ladder(stream)
    layout = stream.layout
    v = gaussian(layout, range(layout.size), seed, [0], stream.subject.device)[0].double()
    random = _changes(stream, v, ladder)
    others = [_changes(stream, u, ladder) for u in _top(stream, ladder[len(ladder) // 2])]
    first, sharp = others or [random, random]
    changes = {
        "vector": [max(change.vector for change in row) for row in zip(random, first, sharp, strict=True)],
        "lambda_max": [
            max(u.scalar, u.vector**2, g.scalar * g.length / (u.length or 1.0))
            for g, u in zip(first, sharp, strict=True)
        ],
        "trace": [change.scalar for change in random],
    }
    return {quantity: best(ladder, found) for quantity, found in changes.items()}


def best(ladder: Sequence[float], changes: Sequence[float]) -> Step:
    """The step of J with the least error by the `changes` [J - 1], |D(eps_j) - D(eps_j+1)| relative.

    The error at eps_j is the larger of the next coarser change over 15 (T), the next finer one over 4 (R), and that
    after it over 16 (R, of which a single scalar may show little by chance).
    """
    least = min(range(1, len(changes) - 1), key=lambda j: error_at(changes, j))
    return Step(ladder[least], error_at(changes, least))


def error_at(changes: Sequence[float], j: int) -> float:
    """Of the step j of J, neither the first nor one of the last two; see `best`."""
    return max(changes[j - 1] / 15, changes[j] / 4, changes[j + 1] / 16)


class CurvatureAlong(NamedTuple):
    value: float  # v^T H v / |v|^2, of the mean loss
    error: float  # estimated


def curvature_along(stream: Stream, v: Tensor) -> CurvatureAlong:
    """Of v [P], such as a Ritz vector, by differences with all steps, extrapolated to none.

    Where products are noisy, as those of rounded weights are, a Ritz value has the noise of every vector of the basis
    in it; this has that of v alone, and the error of a Ritz vector to second order. Of neighbouring steps
    (16 D(eps / 4) - D(eps)) / 15 is without the error T eps^2, and allows longer steps with less rounding. That one is
    taken which differs least from the next coarser one over 15, the next finer one, and that from its own over 4.
    Status: heuristic, as `calibrate`. Cost: 2 J forward and backward passes over the stream.
    Source: Richardson (1911), Phil. Trans. R. Soc. A 210.
    """
    unit = v.double() / v.double().norm()
    found = [float(unit @ product) / stream.total_weight for product in _products(stream, unit, _ladder(stream))]
    better = [(_FACTOR**2 * fine - coarse) / (_FACTOR**2 - 1) for coarse, fine in itertools.pairwise(found)]
    apart = [abs(fine - coarse) for coarse, fine in itertools.pairwise(better)]
    errors = [max(apart[j - 1] / 15, apart[j], apart[j + 1] / 4) for j in range(1, len(apart) - 1)]
    least = min(range(len(errors)), key=errors.__getitem__)
    return CurvatureAlong(better[least + 1], errors[least])


def _ladder(stream: Stream) -> list[float]:
    coarse = max(torch.finfo(parameter.dtype).eps for parameter in stream.parameters)
    return [_LARGEST / _FACTOR**j for j in range(_STEPS if coarse > 1e-10 else _STEPS_DOUBLE)]


class _Change(NamedTuple):
    vector: float
    scalar: float
    length: float  # of the finer product


def _top(stream: Stream, eps: float) -> list[Tensor]:
    """[P] float64, of length 1: the gradient, and where power iteration has led it; none if it is zero."""
    u = torch.zeros(stream.layout.size, dtype=torch.float64, device=stream.subject.device)
    add_gradients(stream, u.split(stream.layout.sizes), 1.0)
    if not 0 < float(u.norm()) < math.inf:
        return []
    found = [u / u.norm()]
    for _ in range(_POWERS):
        image = torch.zeros_like(u)
        add_differences(stream, found[-1], eps, image)
        length = float(image.norm())
        found.append(image / length if 0 < length < math.inf else found[-1])
    return [found[0], found[-1]]


def _products(stream: Stream, v: Tensor, ladder: Sequence[float]) -> Iterator[Tensor]:
    for eps in ladder:
        found = torch.zeros_like(v)
        add_differences(stream, v, eps, found)
        yield found


def _changes(stream: Stream, v: Tensor, ladder: Sequence[float]) -> list[_Change]:
    """Of each step and the next."""
    return [_change(v, coarse, fine) for coarse, fine in itertools.pairwise(_products(stream, v, ladder))]


def _change(v: Tensor, coarse: Tensor, fine: Tensor) -> _Change:
    scale, apart = float(fine.norm()), coarse - fine
    if not math.isfinite(scale) or not bool(apart.isfinite().all()):
        return _Change(math.inf, math.inf, 1.0)
    if not scale:
        change = math.inf if bool(apart.any()) else 0.0
        return _Change(change, change, 1.0)
    return _Change(float(apart.norm()) / scale, float((v @ apart).abs()) / scale, scale)
