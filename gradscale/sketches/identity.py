"""The gradients themselves, as a sketch: what every other one is measured by, for models of few parameters.

Shapes: B examples, R rows and C columns of a parameter, P entries of all parameters, K = P outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.grads.layer import LayerGrads, materialize
from gradscale.sketches.dimensions import check_dim

VERSION = 1


@dataclass(frozen=True)
class IdentitySketch:
    """x -> x: exact. K must be P; None stands for it. The seed is not used: nothing is drawn.

    Cost: P numbers an example, in memory and stored.
    """

    dim: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dim is not None:
            check_dim("sketch dimension", self.dim)

    def bind(self, sizes: Mapping[str, int]) -> IdentityMap:
        """Raises: GradscaleError if K is not P."""
        entries = sum(sizes.values())
        if self.dim not in (None, entries):
            raise GradscaleError(
                f"the dimension of identity must be that of the gradients, {entries}, got {self.dim}; "
                f"use identity:{entries}, or plain identity"
            )
        return IdentityMap(tuple(sizes.items()))


@dataclass(frozen=True)
class IdentityMap:
    """The identity on these parameters, in this order, of so many entries each."""

    sizes: tuple[tuple[str, int], ...]

    @property
    def dim(self) -> int:
        return sum(size for _, size in self.sizes)

    @property
    def scheme(self) -> dict[str, object]:
        """What makes two sketches comparable; kept beside them."""
        return {"name": "identity", "version": VERSION, "seed": 0, "dim": self.dim}

    def apply(self, parameter: str, grads: LayerGrads) -> Tensor:
        total = torch.zeros(grads.shape[0], self.dim, dtype=torch.float64, device=grads.device)
        total[:, self._entries(parameter)] = materialize(grads).double()
        return total

    def materialize(self, parameter: str, shape: tuple[int, int]) -> Tensor:
        """[P of the parameter, K] float32: the definition."""
        return torch.eye(self.dim)[self._entries(parameter)].view(math.prod(shape), self.dim)

    def _entries(self, parameter: str) -> slice:
        """Where those of `parameter` are among all."""
        ends = dict(zip(dict(self.sizes), accumulate(size for _, size in self.sizes), strict=True))
        return slice(ends[parameter] - dict(self.sizes)[parameter], ends[parameter])
