"""How much the Hessians H_i of single examples differ: Sigma = (1/n) sum_i H_i^2 - H^2, H their mean.

Everything is in float64 and in one process.

Shapes: n examples, b of them at a time, P entries of a vector, k vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gradscale.curvature.leading import leading_eigenpair
from gradscale.errors import GradscaleError


@dataclass(frozen=True)
class ExampleHessians:
    """The Hessians of n examples as their products: `products(ids, vectors)` is [b, P], H_i v_i, a vector an example.

    Raises: GradscaleError if there is no example.
    """

    examples: int
    size: int
    products: Callable[[range, Tensor], Tensor]
    batch: int = 64

    def __post_init__(self) -> None:
        if self.examples < 1 or self.batch < 1:
            raise GradscaleError(
                f"examples and batch must be at least 1, got {self.examples} and {self.batch}; give some Hessians"
            )

    def batches(self) -> Iterator[range]:
        for start in range(0, self.examples, self.batch):
            yield range(start, min(start + self.batch, self.examples))

    def of_one(self, ids: range, vector: Tensor) -> Tensor:
        """[b, P]: H_i v of one vector [P]."""
        return self.products(ids, vector.expand(len(ids), -1))


def dense_hessians(matrices: Tensor) -> ExampleHessians:
    """Of symmetric matrices [n, P, P] float64."""
    n, size, _ = matrices.shape
    return ExampleHessians(n, size, lambda ids, v: torch.einsum("bij,bj->bi", matrices[ids.start : ids.stop], v))


def rank_one_hessians(rows: Tensor) -> ExampleHessians:
    """H_i = j_i j_i^T of rows [n, P] float64: Gauss-Newton matrices of one output, j_i its gradient.

    Where the loss has a second derivative l'' in the output other than 1, j_i is sqrt(l'') times that gradient.
    """

    def products(ids: range, vectors: Tensor) -> Tensor:
        here = rows[ids.start : ids.stop]
        return here * (here * vectors).sum(dim=1, keepdim=True)

    return ExampleHessians(len(rows), rows.shape[1], products)


@dataclass(frozen=True)
class MeanHessian:
    """H = (1/n) sum_i H_i as an operator. Cost: one product an example."""

    hessians: ExampleHessians

    @property
    def size(self) -> int:
        return self.hessians.size

    @property
    def here(self) -> range:
        return range(self.size)

    def products(self, vectors: Tensor) -> Tensor:
        return torch.stack([self.of(v.double()) for v in vectors]).to(vectors)

    def all_sum(self, parts: Tensor) -> Tensor:
        return parts

    def of(self, v: Tensor) -> Tensor:
        """[P] float64 -> [P]."""
        total = torch.zeros_like(v)
        for ids in self.hessians.batches():
            total += self.hessians.of_one(ids, v).sum(dim=0)
        return total / self.hessians.examples


@dataclass(frozen=True)
class HessianSpread:
    """Sigma as an operator: v -> (1/n) sum_i H_i u_i - H u, u_i = H_i v - H v and u their mean.

    That is (1/n) sum_i (H_i - H)^2 v, without the cancellation of (1/n) sum_i H_i^2 v - H^2 v where the Hessians are
    close to one another: u is zero but for the products' rounding, of which its last term takes off what all examples
    share. Cost: four products an example; no vector of an example is kept.
    """

    hessians: ExampleHessians

    @property
    def size(self) -> int:
        return self.hessians.size

    @property
    def here(self) -> range:
        return range(self.size)

    def products(self, vectors: Tensor) -> Tensor:
        return torch.stack([self.of(v.double()) for v in vectors]).to(vectors)

    def all_sum(self, parts: Tensor) -> Tensor:
        return parts

    def of(self, v: Tensor) -> Tensor:
        """[P] float64 -> [P]."""
        H, total, drift = MeanHessian(self.hessians), torch.zeros_like(v), torch.zeros_like(v)
        mean = H.of(v)
        for ids in self.hessians.batches():
            apart = self.hessians.of_one(ids, v) - mean
            drift += apart.sum(dim=0)
            total += self.hessians.products(ids, apart).sum(dim=0)
        return total / self.hessians.examples - H.of(drift / self.hessians.examples)


class NonUniformity(NamedTuple):
    value: float  # s
    error: float  # s is at least value; a singular value lies within this of it
    vector: Tensor  # [P], the leading eigenvector of Sigma


def non_uniformity(hessians: ExampleHessians, max_steps: int = 200) -> NonUniformity:
    """s = sqrt(lambda_max(Sigma)), by Lanczos.

    Cost: four products an example and step. Not the sqrt((1/n) sum |H_i v|^2 - (v^T H v)^2) of the authors' code,
    which is larger unless v is an eigenvector of H.
    Source: Wu, Ma and E (2018), NeurIPS, "How SGD selects the global minima".
    """
    found = leading_eigenpair(HessianSpread(hessians), max_steps)
    square = max(float(found.values[0]), 0.0)
    return NonUniformity(
        math.sqrt(square), math.sqrt(square + float(found.residuals[0])) - math.sqrt(square), found.vectors[0]
    )


class Along(NamedTuple):
    """What the Hessians are along one direction v, |v| = 1."""

    curvature: float  # v^T H v
    variance: float  # (1/n) sum_i (v^T H_i v - v^T H v)^2
    spread: float  # v^T Sigma v = (1/n) sum_i |H_i v - H v|^2: no more than s^2
    length: float  # |H v|


def along(hessians: ExampleHessians, vector: Tensor) -> Along:
    """By one pass over the examples; sqrt(spread) is a lower bound of s for every v, close to it along v_1 or Sigma's.

    Squares about the mean are added up batch by batch, without cancellation.
    Cost: one product an example.
    Raises: GradscaleError if the vector is zero or not finite.
    Source: Chan, Golub and LeVeque (1983) (the update); the bound is the Rayleigh quotient of Sigma.
    """
    length = float(vector.double().norm())
    if not 0 < length < math.inf:
        raise GradscaleError(f"vector must be finite and not zero, got length {length}; pass an eigenvector")
    v = vector.double() / length
    mean, squares, n = torch.zeros(2, len(v), dtype=torch.float64, device=v.device), v.new_zeros(2), 0
    for ids in hessians.batches():
        products = hessians.of_one(ids, v)
        parts = torch.stack([products, (products @ v)[:, None] * v])  # [2, b, P]: H_i v, and its part along v
        here = parts.mean(dim=1)
        apart, b = here - mean, len(ids)
        squares += (parts - here[:, None]).square().sum(dim=(1, 2)) + apart.square().sum(dim=1) * (n * b / (n + b))
        mean, n = mean + apart * (b / (n + b)), n + b
    spread, variance = (squares / n).tolist()
    return Along(float(mean[0] @ v), variance, spread, float(mean[0].norm()))
