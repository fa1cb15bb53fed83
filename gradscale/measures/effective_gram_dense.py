"""The effective Gram matrix K_n of a small problem, from dense Jacobians along the path of all the data.

Shapes: n examples, C outputs of each, D = n C of all of them, P entries of all parameters, T steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Linearized(NamedTuple):
    """The losses l_i(f_i) and the outputs f_i of the n examples at one point of a path. float64."""

    jacobians: Tensor  # [n, C, P]: J_i = d f_i / d theta
    residuals: Tensor  # [n, C]: r_i = d l_i / d f_i
    hessians: Tensor  # [n, C, C]: Lambda_i = d^2 l_i / d f_i^2


class EffectiveGramMatrix(NamedTuple):
    """K_n and the residual that it is a form of, with the eigenvalues of K_n, largest first.

    `shares[j]` is the part of |r(0)|^2 along eigenvector j. Where eigenvalues are equal only the sum of their shares
    says anything.
    """

    matrix: Tensor  # [D, D]
    residual: Tensor  # [D]: r(0)
    eigenvalues: Tensor  # [D]
    shares: Tensor  # [D]

    @property
    def gap(self) -> float:
        """r(0)^T K_n r(0)."""
        return float(self.residual @ self.matrix @ self.residual)


def perturbation_matrix(jacobians: Tensor) -> Tensor:
    """[D, D]: B = (blockdiag(J_i J_i^T) - Theta / n) / (n (n - 1)), for which r^T B r = tr Sigma / n.

    Theta = J J^T is the tangent kernel. B is positive semi-definite: n (n - 1) r^T B r = sum |g_i|^2 - |sum g_i|^2 / n.
    """
    n, C, _ = jacobians.shape
    kernel = _kernel(jacobians)
    own = torch.block_diag(*(kernel[i * C : (i + 1) * C, i * C : (i + 1) * C] for i in range(n)))
    form: Tensor = (own - kernel / n) / (n * (n - 1))
    return form


def effective_gram(path: Iterable[Linearized], contraction: Tensor, learning_rate: float) -> EffectiveGramMatrix:
    """K_n(T) = int_0^T exp(-int_t^T c_bar) P(t)^T B(t) P(t) dt over the T steps of `path`; c_bar is `contraction` [T].

    P(t) takes r(0) to r(t): the product over the steps of I - (eta / n) Lambda(t) Theta(t), since under the gradient
    flow of the mean loss r' = -(1/n) Lambda Theta r. Integrals are sums over steps of eta = `learning_rate`, as
    gradient descent makes them: of the gradient flow, K_n is off by O(eta). `path` is read once, point by point.

    Cost: T (D^2 P + D^3) operations; memory for one point and five D x D matrices.
    Source: after Yang and Chaudhari (2025), arXiv 2504.16450, of which gap = r(0)^T K_n r(0) could be read; this
    formula of K_n is a reconstruction.
    """
    matrix, carried, start = torch.zeros(0, 0), torch.zeros(0, 0), torch.zeros(0)
    for point, rate in zip(path, contraction.tolist(), strict=True):
        if not len(start):
            start = point.residuals.flatten()
            carried = torch.eye(len(start), dtype=torch.float64)
            matrix = torch.zeros_like(carried)
        source = carried.mT @ perturbation_matrix(point.jacobians) @ carried
        matrix = math.exp(-learning_rate * rate) * matrix + learning_rate * source
        carried = carried - learning_rate * _drift(point, carried)
    return _with_spectrum((matrix + matrix.mT) / 2, start)


def _with_spectrum(matrix: Tensor, residual: Tensor) -> EffectiveGramMatrix:
    values, vectors = torch.linalg.eigh(matrix)
    shares = (vectors.mT @ residual).square() / residual.square().sum()
    return EffectiveGramMatrix(matrix, residual, values.flip(0), shares.flip(0))


def _kernel(jacobians: Tensor) -> Tensor:
    flat = jacobians.flatten(0, 1)
    kernel: Tensor = flat @ flat.mT
    return kernel


def _drift(point: Linearized, carried: Tensor) -> Tensor:
    """[D, D]: (1/n) Lambda Theta P."""
    n, C, _ = point.jacobians.shape
    moved = (_kernel(point.jacobians) @ carried).view(n, C, -1)
    return (point.hessians @ moved).flatten(0, 1) / n
