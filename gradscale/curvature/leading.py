"""The largest eigenvalue of a symmetric operator, with a bound on its error.

Shapes: P entries of a vector, p of them here, m vectors of the basis.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.curvature.operator import Operator, dots, norms
from gradscale.errors import GradscaleError
from gradscale.sketches.philox import key_of
from gradscale.sketches.words import entry_signs

VERSION = 1


class Leading(NamedTuple):
    """A Ritz pair: `value` is no larger than lambda_max, and an eigenvalue lies within `residual` of it."""

    value: float
    vector: Tensor  # [p] float64, of length 1
    residual: float  # |A v - value v|
    products: int


def leading_eigenpair(
    operator: Operator,
    iterations: int = 200,
    tolerance: float = 1e-10,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Leading:
    """By Lanczos in float64 from a vector of random signs, reorthogonalized twice against the whole basis.

    Ends once the residual is at most `tolerance` times the largest Ritz value in size, or at `iterations`. A residual
    that small at another eigenvalue than the largest takes a start that is all but orthogonal to its eigenvector.

    Cost: one product an iteration; m vectors of memory. The start depends on seed and position alone.
    Raises: GradscaleError if a product is not finite, or `iterations` is less than 1.
    Source: Lanczos (1950); Parlett (1998), "The symmetric eigenvalue problem" (the residual).
    """
    if iterations < 1:
        raise GradscaleError(f"iterations must be at least 1, got {iterations}; 200 is the default")
    here, most = operator.here, min(iterations, operator.size)
    basis = torch.empty(most, len(here), dtype=torch.float64, device=device)
    start = entry_signs(key_of("leading", VERSION, seed), here.start, here.stop, basis.device)
    basis[0] = start.double() / math.sqrt(operator.size)
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        k = len(diagonal)
        there = operator.products(basis[k : k + 1]).double()
        diagonal.append(float(dots(operator, basis[k : k + 1], there)))
        for _ in range(2):
            there = there - dots(operator, there, basis[: k + 1]) @ basis[: k + 1]
        length = float(norms(operator, there))
        if not math.isfinite(length + diagonal[-1]):
            raise GradscaleError(
                f"products of the operator must be finite, got {diagonal[-1]} in iteration {k + 1}; leave out the "
                "examples whose loss or gradient is not"
            )
        values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside))
        residual = length * abs(float(vectors[-1, -1]))
        if residual <= tolerance * float(values.abs().max()) or k + 1 == most:
            vector = vectors[:, -1].to(basis.device) @ basis[: k + 1]
            return Leading(float(values[-1]), vector, residual, k + 1)
        beside.append(length)
        basis[k + 1] = there[0] / length


def _tridiagonal(diagonal: list[float], beside: list[float]) -> Tensor:
    off = torch.tensor(beside, dtype=torch.float64)
    return torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
