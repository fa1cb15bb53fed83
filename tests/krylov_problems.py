"""Operators with given spectra, and quick probes, for the tests of Krylov and trace algorithms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradscale.curvature.operator import DenseOperator

GOLDEN = [30.0, 12.0, 5.0, *torch.linspace(1, 0.01, 37, dtype=torch.float64).tolist()]  # math: n = 40


def rotated(values: Sequence[float], seed: int = 0) -> Tensor:
    """[P, P] float64 with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.tensor(values, dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))
    matrix = basis * spectrum @ basis.mT
    return (matrix + matrix.mT) / 2


def dense(values: Sequence[float], seed: int = 0) -> DenseOperator:
    return DenseOperator(rotated(values, seed))


@dataclass(frozen=True)
class Drawn:
    """Probes of torch's generator: quick, for statements over many seeds."""

    size: int
    seed: int
    kind: str = "gaussian"
    dtype: torch.dtype = torch.float64

    def __call__(self, ids: range) -> Tensor:
        generator = torch.Generator().manual_seed(100_000 * self.seed + ids.start)
        shape = (len(ids), self.size)
        if self.kind == "gaussian":
            return torch.randn(shape, dtype=self.dtype, generator=generator)
        return (torch.randint(0, 2, shape, generator=generator) * 2 - 1).to(self.dtype)


class Spoilt:
    """An operator of which the product of number `at` is multiplied by `factor`."""

    def __init__(self, operator: DenseOperator, at: int, factor: float) -> None:
        self.operator, self.at, self.factor, self.calls = operator, at, factor, 0
        self.size, self.here = operator.size, operator.here

    def products(self, vectors: Tensor) -> Tensor:
        self.calls += 1
        return self.operator.products(vectors) * (self.factor if self.calls - 1 == self.at else 1.0)

    def all_sum(self, parts: Tensor) -> Tensor:
        return parts
