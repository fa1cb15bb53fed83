"""Dense maps of random signs: a Johnson-Lindenstrauss sketch whose entries cost one random bit each.

Shapes: B examples, R rows and C columns of a parameter, P = R C, K outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradscale.grads.layer import LayerGrads
from gradscale.sketches.blocks import apply_rows, kept
from gradscale.sketches.dimensions import check_dim, check_fits
from gradscale.sketches.philox import Key, key_of
from gradscale.sketches.words import signs

VERSION = 1


@dataclass(frozen=True)
class RademacherSketch:
    """x -> S x with independent entries +-1 / sqrt(K): unbiased for inner products, E <Sx, Sy> = <x, y>.

    The variance of <Sx, Sy> is (|x|^2 |y|^2 + <x, y>^2 - 2 sum_p x_p^2 y_p^2) / K. Cost: P K products an example.
    Source: Achlioptas (2003), "Database-friendly random projections".
    """

    dim: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_dim("sketch dimension", self.dim)

    @property
    def scheme(self) -> dict[str, object]:
        """What makes two sketches comparable; kept beside them."""
        return {"name": "rademacher", "version": VERSION, "seed": self.seed, "dim": self.dim}

    def bind(self, sizes: Mapping[str, int]) -> RademacherSketch:
        """Raises: GradscaleError if K is more than P."""
        check_fits(self.dim, sizes)
        return self

    def rows(self, parameter: str, start: int, stop: int, device: torch.device) -> Tensor:
        key = self._key(parameter)
        name = ("rademacher", key, start, stop, self.dim, str(device))
        return kept(name, lambda: self._rows(key, start, stop, device))

    def apply(self, parameter: str, grads: LayerGrads) -> Tensor:
        return apply_rows(self, parameter, grads)

    def materialize(self, parameter: str, shape: tuple[int, int]) -> Tensor:
        """[P, K] float32: the definition."""
        return self._rows(self._key(parameter), 0, math.prod(shape), torch.device("cpu"))

    def _key(self, parameter: str) -> Key:
        return key_of("rademacher", VERSION, self.seed, "sketch", parameter)

    def _rows(self, key: Key, start: int, stop: int, device: torch.device) -> Tensor:
        return signs(key, start, stop, self.dim, device) * math.sqrt(1 / self.dim)
