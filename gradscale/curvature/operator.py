"""A symmetric linear map of R^P whose vectors are cut into slices, one a process.

Shapes: P entries in all, p of them here, k vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gradscale.curvature.slices import column_blocks
from gradscale.errors import GradscaleError


class Operator(Protocol):
    """Vectors are float32 or float64, all scalars float64."""

    @property
    def size(self) -> int:
        """P"""
        ...

    @property
    def here(self) -> range:
        """The entries of every vector that this process holds; all in one process."""
        ...

    def products(self, vectors: Tensor) -> Tensor:
        """[k, p] -> [k, p], the dtype and device of the vectors kept."""
        ...

    def all_sum(self, parts: Tensor) -> Tensor:
        """The sum over processes of small float64 tensors; itself in one process."""
        ...


def dots(operator: Operator, left: Tensor, right: Tensor) -> Tensor:
    """[a, b] float64: inner products of `left` [a, p] and `right` [b, p], over all processes.

    Entries are widened a block of columns at a time, for float32 sums of many entries are percents off.
    """
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for block in column_blocks(left, len(left) + len(right)):
        total.addmm_(left[:, block].double(), right[:, block].double().mT)
    return operator.all_sum(total)


def norms(operator: Operator, vectors: Tensor) -> Tensor:
    """[k] float64: the lengths of `vectors` [k, p], over all processes."""
    total = torch.zeros(len(vectors), dtype=torch.float64, device=vectors.device)
    for block in column_blocks(vectors, len(vectors)):
        total += vectors[:, block].double().square().sum(dim=1)
    return operator.all_sum(total).sqrt()


@dataclass(frozen=True)
class DenseOperator:
    """A symmetric matrix [P, P] float64, in one process.

    Raises: GradscaleError if it is not square, not symmetric or not float64.
    """

    matrix: Tensor

    def __post_init__(self) -> None:
        matrix = self.matrix
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or matrix.dtype != torch.float64:
            raise GradscaleError(
                f"matrix must be square and float64, got {matrix.dtype} of shape {tuple(matrix.shape)}; "
                "pass matrix.double()"
            )
        difference = float((matrix - matrix.mT).abs().max()) if len(matrix) else 0.0
        if difference > 1e-10 * float(matrix.abs().max() if len(matrix) else 0.0):
            raise GradscaleError(
                f"matrix must be symmetric, got entries that differ by {difference:.6g}; pass (matrix + matrix.mT) / 2"
            )

    @property
    def size(self) -> int:
        return len(self.matrix)

    @property
    def here(self) -> range:
        return range(self.size)

    def products(self, vectors: Tensor) -> Tensor:
        return (vectors.double() @ self.matrix).to(vectors.dtype)

    def all_sum(self, parts: Tensor) -> Tensor:
        return parts
