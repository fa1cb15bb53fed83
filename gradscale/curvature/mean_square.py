"""At which step sizes SGD near an interpolating minimum stays there, in the mean of squares.

Near a minimum that all examples share, a step on a batch is w <- w - eta H_B w, H_B the mean Hessian of B examples
drawn without replacement. E |w|^2 does not grow exactly up to eta* = 2 / lambda_max(C^+ D), with C = (H + H) / 2 the
Kronecker sum halved, D = (1 - p) H x H + p (1/n) sum_i H_i x H_i, p = (n - B) / (B (n - 1)).

Shapes: n examples, d parameters, r the rank of H, X a matrix [r, r] in the eigenbasis of H.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.curvature.leading import leading_eigenpair
from gradscale.errors import GradscaleError

_ROUNDING = 1e-12  # of eigenvalues, relative


def batch_factor(n: int, batch_size: int) -> float:
    """p_B = (n - B) / (B (n - 1)): the variance of a batch's mean, drawn without replacement, by that of an example.

    Raises: GradscaleError unless 1 <= B <= n.
    """
    if not 1 <= batch_size <= n:
        raise GradscaleError(
            f"batch_size must be from 1 to the number of examples {n}, got {batch_size}; give that of the training"
        )
    return (n - batch_size) / (batch_size * (n - 1)) if n > 1 else 0.0


class Threshold(NamedTuple):
    value: float  # eta*; infinite where all Hessians are zero
    error: float  # of the eigenvalue problem, to first order


def threshold_of_matrices(matrices: Tensor, batch_size: int, iterations: int = 400) -> Threshold:
    """eta* of Hessians [n, d, d] float64.

    C is diagonal in the eigenbasis of H, and D is zero off H's range where no H_i has a negative eigenvalue, so that
    the problem is one of r x r matrices. X -> D X is never made a matrix. Cost: n r^3 an iteration; n r^2 numbers.
    Raises: GradscaleError if a Hessian is not symmetric and positive semi-definite, or as `batch_factor`.
    Source: Mulayoff and Michaeli (2023), arXiv 2306.07850, theorem 3.
    """
    _check(matrices)
    p = batch_factor(len(matrices), batch_size)
    values, vectors = torch.linalg.eigh(matrices.mean(dim=0))
    there = values > _ROUNDING * len(values) * values.abs().max()
    V = vectors[:, there]
    within = V.mT @ matrices @ V  # [n, r, r]

    def spread(x: Tensor) -> Tensor:
        moved: Tensor = within @ x @ within
        return moved.mean(dim=0)

    return _threshold(values[there], spread, p, iterations)


def threshold_of_gram(gram: Tensor, batch_size: int, iterations: int = 400) -> Threshold:
    """eta* of rank-one Hessians H_i = j_i j_i^T, from the products <j_i, j_k> [n, n] float64, whatever d is.

    They span r <= n dimensions. Cost: n r^2 an iteration.
    Raises: GradscaleError if the products are not symmetric and positive semi-definite, or as `batch_factor`.
    Source: Mulayoff and Michaeli (2023), arXiv 2306.07850, theorem 3; the reduction is derived here.
    """
    rows, values = rows_of_gram(gram)
    p = batch_factor(len(gram), batch_size)

    def spread(x: Tensor) -> Tensor:
        within = ((rows @ x) * rows).sum(dim=1)  # [n], j_i^T X j_i
        return rows.mT @ (within[:, None] * rows) / len(rows)

    return _threshold(values, spread, p, iterations)


def rows_of_gram(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n, r] with these products, in the eigenbasis of (1/n) sum_i j_i j_i^T, and its eigenvalues [r], ascending.

    Raises: GradscaleError if the matrix is not symmetric and positive semi-definite.
    """
    _check(gram[None])
    values, vectors = torch.linalg.eigh(gram)
    there = values > _ROUNDING * len(values) * values.abs().max()
    return vectors[:, there] * values[there].sqrt(), values[there] / len(gram)


def bound_along(curvature: float, variance: float, p: float) -> float:
    """eta* <= 2 a / (a^2 + p var), a = v^T H v and var = (1/n) sum_i (v^T H_i v - a)^2 of any v with |v| = 1.

    The quotient <X, C X> / <X, D X> at X = v v^T. Along v_1 it is the paper's (15). Infinite for a = 0.
    Source: Mulayoff and Michaeli (2023), arXiv 2306.07850, proposition 3.
    """
    return 2 * curvature / (curvature**2 + p * variance) if curvature > 0 else math.inf


def bound_of_traces(trace: float, frobenius_sq: float, mean_frobenius_sq: float, p: float) -> float:
    """eta* <= 2 tr H / ((1 - p) |H|_F^2 + p (1/n) sum_i |H_i|_F^2): the paper's (16), the same quotient at X = I.

    Source: Mulayoff and Michaeli (2023), arXiv 2306.07850, proposition 3.
    """
    below = (1 - p) * frobenius_sq + p * mean_frobenius_sq
    return 2 * trace / below if below > 0 else math.inf


@dataclass(frozen=True, eq=False)
class _Quotient:
    """X -> C^-1/2 D C^-1/2 X on [r, r] matrices as vectors of r^2: symmetric, its lambda_max is that of C^+ D."""

    values: Tensor  # [r] of H
    spread: Callable[[Tensor], Tensor]  # X -> (1/n) sum_i H_i X H_i
    p: float

    @property
    def size(self) -> int:
        return len(self.values) ** 2

    @property
    def here(self) -> range:
        return range(self.size)

    def products(self, vectors: Tensor) -> Tensor:
        scale = ((self.values[:, None] + self.values) / 2).rsqrt()
        found = []
        for vector in vectors:
            x = scale * vector.view(len(self.values), -1)
            mean = self.values[:, None] * x * self.values
            found.append((scale * ((1 - self.p) * mean + self.p * self.spread(x))).flatten())
        return torch.stack(found)

    def all_sum(self, parts: Tensor) -> Tensor:
        return parts


def _threshold(values: Tensor, spread: Callable[[Tensor], Tensor], p: float, iterations: int) -> Threshold:
    if not len(values):
        return Threshold(math.inf, 0.0)
    found = leading_eigenpair(_Quotient(values, spread, p), iterations)
    value = float(found.values[0])
    return Threshold(2 / value, 2 * float(found.residuals[0]) / value**2)


def _check(matrices: Tensor) -> None:
    shape = tuple(matrices.shape[1:])
    if matrices.dim() != 3 or shape[0] != shape[1] or not torch.allclose(matrices, matrices.mT):
        raise GradscaleError(f"matrices must be square and symmetric, got shape {shape}; pass (A + A.T) / 2")
    if not len(matrices):
        raise GradscaleError("matrices must be at least one, got none; give that of every example")
    lowest, highest = float(torch.linalg.eigvalsh(matrices).min()), float(matrices.abs().max())
    if lowest < -1e-8 * highest:
        raise GradscaleError(
            f"Hessians must have no negative eigenvalue, as at a minimum of every example, got {lowest:.3g}; take "
            "Gauss-Newton matrices"
        )
