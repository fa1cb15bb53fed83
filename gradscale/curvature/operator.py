"""A symmetric linear map of R^P whose vectors are cut into slices, one a process.

Shapes: P entries in all, p of them here, k vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gradscale.errors import GradscaleError

_ENTRIES = 1 << 17  # widened to float64 at a time: 1 MiB


class Operator(Protocol):
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
    """[a, p], [b, p] -> [a, b] float64: inner products of whole vectors, added up in float64 whatever their dtype."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    step = max(1, _ENTRIES // max(1, len(left) + len(right)))
    for start in range(0, left.shape[1], step):
        part = slice(start, start + step)
        total.addmm_(left[:, part].double(), right[:, part].double().mT)
    return operator.all_sum(total)


def norms(operator: Operator, vectors: Tensor) -> Tensor:
    """[k, p] -> [k] float64: the lengths of whole vectors."""
    total = torch.zeros(len(vectors), dtype=torch.float64, device=vectors.device)
    step = max(1, _ENTRIES // max(1, len(vectors)))
    for part in vectors.split(step, dim=1):
        total += part.double().square().sum(dim=1)
    return operator.all_sum(total).sqrt()


@dataclass(frozen=True, eq=False)
class DenseOperator:
    """A matrix [P, P] float64 in one process: for tests and small problems.

    Raises: GradscaleError if the matrix is not square and symmetric.
    """

    matrix: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.matrix.shape)
        if len(shape) != 2 or shape[0] != shape[1] or not torch.allclose(self.matrix, self.matrix.mT):
            raise GradscaleError(f"matrix must be square and symmetric, got shape {shape}; pass (A + A.T) / 2")

    @property
    def size(self) -> int:
        return len(self.matrix)

    @property
    def here(self) -> range:
        return range(self.size)

    def products(self, vectors: Tensor) -> Tensor:
        return (vectors.to(self.matrix) @ self.matrix).to(vectors)

    def all_sum(self, parts: Tensor) -> Tensor:
        return parts
