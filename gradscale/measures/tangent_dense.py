"""Linear algebra of a dense tangent kernel: what lies in which of its eigenspaces.

Rows and columns are the outputs of the examples, an example's next to one another. All in float64.

Shapes: n examples, C outputs, m = n C.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Eigen(NamedTuple):
    """Of a symmetric matrix."""

    values: Tensor  # [m], descending
    vectors: Tensor  # [m, m], in the columns


class FirstOrder(NamedTuple):
    """A change of the outputs in an eigenbasis, beside what gradient flow gives to first order."""

    change: Tensor  # [m], u_j^T df
    predicted: Tensor  # [m], -eta lambda_j u_j^T r / n
    eta: float
    r_squared: float


def eigen(matrix: Tensor) -> Eigen:
    values, vectors = torch.linalg.eigh(matrix)
    return Eigen(values.flip(0), vectors.flip(1))


def shares(vectors: Tensor, vector: Tensor) -> Tensor:
    """[m]: (u_j^T v)^2 / |v|^2, which add up to 1 over a whole basis; NaN of a zero vector."""
    return (vectors.mT @ vector).square() / vector.square().sum()


def from_the_bottom(parts: Tensor) -> Tensor:
    """[m]: at place j, the sum of `parts` from j to the last, that of the smallest eigenvalue."""
    return parts.flip(0).cumsum(dim=0).flip(0)


def lower_half(parts: Tensor) -> float:
    """The sum of `parts` over the floor(m / 2) smallest eigenvalues."""
    return float(parts[len(parts) - len(parts) // 2 :].sum())


def by_example(theta: Tensor, n: int) -> Tensor:
    """[n, C, C]: the blocks J_i J_i^T on the diagonal."""
    C = len(theta) // n
    return theta.view(n, C, n, C).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def effective_gram(theta: Tensor, n: int) -> Tensor:
    """[m, m]: B = (blockdiag(J_i J_i^T) - Theta / n) / (n (n - 1)), so that r^T B r = tr Sigma / n; NaN for n = 1."""
    if n < 2:
        return torch.full_like(theta, math.nan)
    diagonal: Tensor = torch.block_diag(*by_example(theta, n))
    return (diagonal - theta / n) / (n * (n - 1))


def centred(theta: Tensor, n: int) -> Tensor:
    """[m, m]: H Theta H, every output's features less their mean over examples."""
    C = len(theta) // n
    blocks = theta.view(n, C, n, C)
    blocks = blocks - blocks.mean(dim=0, keepdim=True)
    return (blocks - blocks.mean(dim=2, keepdim=True)).reshape(n * C, n * C)


def alignment(kernel: Tensor, y: Tensor) -> float:
    """y^T K y / (|K|_F |y|^2); NaN where either is zero."""
    scale = float(kernel.norm() * y.square().sum())
    return float(y @ kernel @ y) / scale if scale > 0 else math.nan


def first_order(basis: Eigen, residual: Tensor, change: Tensor, n: int) -> FirstOrder:
    """Of outputs that changed by `change` [m], against -eta Theta r / n, eta fitted by least squares.

    r = `residual`, n the gradient of the mean loss' number of examples. `r_squared` = 1 - |df - predicted|^2 / |df|^2,
    without an intercept: the squared cosine between the two. NaN where either is zero.
    """
    found = basis.vectors.mT @ change
    direction = -basis.values * (basis.vectors.mT @ residual) / n
    along, square, total = float(direction @ found), float(direction.square().sum()), float(found.square().sum())
    if not (square > 0 and total > 0):
        return FirstOrder(found, direction * math.nan, math.nan, math.nan)
    eta = along / square
    return FirstOrder(found, eta * direction, eta, along**2 / (square * total))
