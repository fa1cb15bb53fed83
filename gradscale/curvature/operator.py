"""A symmetric linear map of R^P whose vectors are cut into slices, one a process.

Shapes: P entries in all, p of them here, k vectors, a and b vectors of two sets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from gradscale.errors import GradscaleError

_BLOCK = 1 << 18  # entries widened at a time: 2 MiB of float64


@runtime_checkable
class Operator(Protocol):
    """Vectors are float32 or float64; all scalars are float64."""

    @property
    def size(self) -> int:
        """P."""
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
    """[a, b] float64: the inner products of the rows of `left` [a, p] and `right` [b, p].

    Products are formed and added up in float64, block by block: a few MiB beside the vectors. (torch.dot of float32 on
    a CPU is 2 % off at 2e8 entries.)
    """
    total = left.new_zeros(len(left), len(right), dtype=torch.float64)
    width = max(1, _BLOCK // max(1, len(left) + len(right)))
    for start in range(0, left.shape[1], width):
        part = slice(start, start + width)
        total.addmm_(left[:, part].double(), right[:, part].double().mT)
    return operator.all_sum(total)


def norms(operator: Operator, vectors: Tensor) -> Tensor:
    """[k] float64: the norms of the rows of `vectors` [k, p], added up as in `dots`."""
    total = vectors.new_zeros(len(vectors), dtype=torch.float64)
    width = max(1, _BLOCK // max(1, len(vectors)))
    for start in range(0, vectors.shape[1], width):
        total += vectors[:, start : start + width].double().square().sum(dim=1)
    return operator.all_sum(total).sqrt()


@dataclass(frozen=True, eq=False)
class DenseOperator:
    """A matrix [P, P] float64 in one process: for tests and small problems. Only what is symmetric is accepted.

    Raises: GradscaleError unless `matrix` is square, float64 and symmetric up to rounding.
    """

    matrix: Tensor

    def __post_init__(self) -> None:
        shape, dtype = tuple(self.matrix.shape), self.matrix.dtype
        if self.matrix.dim() != 2 or shape[0] != shape[1] or dtype != torch.float64:
            raise GradscaleError(
                f"matrix must be square and float64, got {dtype} of shape {shape}; convert it by .double()"
            )
        defect, largest = float((self.matrix - self.matrix.mT).abs().max()), float(self.matrix.abs().max())
        if not defect <= 1e-9 * largest:
            raise GradscaleError(
                f"matrix must be symmetric, got entries {defect:.3g} from those across the diagonal where the largest "
                f"is {largest:.3g}; take (A + A.T) / 2 if the difference is rounding"
            )

    @property
    def size(self) -> int:
        return len(self.matrix)

    @property
    def here(self) -> range:
        return range(self.size)

    def products(self, vectors: Tensor) -> Tensor:
        return (vectors.double() @ self.matrix.to(vectors.device)).to(vectors.dtype)

    def all_sum(self, parts: Tensor) -> Tensor:
        return parts
