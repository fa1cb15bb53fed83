"""Dense Gaussian maps: probes of the Gaussian width, and the reference Johnson-Lindenstrauss sketch.

Entry (p, k) of a parameter's [P, K] block is a standard normal keyed by (version, seed, role, parameter)
and counted by (p, k): the same on every machine, device and sharding.

Shapes: B examples, R rows and C columns of one parameter, P = R C, K outputs.
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
from gradscale.sketches.philox import Key, key_of, normals

VERSION = 1
TOGETHER = 4  # columns made at a time: a call of Philox gives as many numbers


@dataclass(frozen=True)
class GaussianProbes:
    """K independent standard normal vectors v_k: apply gives <g_b, v_k>. Cost: P K products an example.

    The first K' < K probes of a seed are the same whatever K is.
    """

    dim: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_dim("number of probes", self.dim)

    def rows(self, parameter: str, start: int, stop: int, device: torch.device) -> Tensor:
        return _rows(_key("probe", self.seed, parameter), start, stop, self.dim, 1.0, device)

    def columns(self, parameter: str, first: int, last: int, size: int, device: torch.device) -> Tensor:
        """[P, last - first] float32: probes `first` (a multiple of four) to `last`, of a parameter of P = `size`.

        Those of `materialize`, made without the others, and kept as `rows` are.
        """
        key = _key("probe", self.seed, parameter)
        name = ("gaussian columns", key, first, last, size, str(device))
        return kept(name, lambda: normals(key, 0, size, last - first, device, first))

    def apply(self, parameter: str, grads: LayerGrads) -> Tensor:
        return apply_rows(self, parameter, grads)

    def materialize(self, parameter: str, shape: tuple[int, int]) -> Tensor:
        """[P, K] float32: the definition."""
        return normals(_key("probe", self.seed, parameter), 0, math.prod(shape), self.dim, torch.device("cpu"))


@dataclass(frozen=True)
class GaussianSketch:
    """x -> S x with independent entries N(0, 1/K): unbiased for inner products, E <Sx, Sy> = <x, y>.

    The variance of <Sx, Sy> is (|x|^2 |y|^2 + <x, y>^2) / K. Source: Johnson and Lindenstrauss (1984).
    """

    dim: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_dim("sketch dimension", self.dim)

    @property
    def scheme(self) -> dict[str, object]:
        """What makes two sketches comparable; kept beside them."""
        return {"name": "gaussian", "version": VERSION, "seed": self.seed, "dim": self.dim}

    def bind(self, sizes: Mapping[str, int]) -> GaussianSketch:
        """Raises: GradscaleError if K is more than P."""
        check_fits(self.dim, sizes)
        return self

    def rows(self, parameter: str, start: int, stop: int, device: torch.device) -> Tensor:
        return _rows(_key("sketch", self.seed, parameter), start, stop, self.dim, math.sqrt(1 / self.dim), device)

    def apply(self, parameter: str, grads: LayerGrads) -> Tensor:
        return apply_rows(self, parameter, grads)

    def materialize(self, parameter: str, shape: tuple[int, int]) -> Tensor:
        """[P, K] float32: the definition."""
        key = _key("sketch", self.seed, parameter)
        return normals(key, 0, math.prod(shape), self.dim, torch.device("cpu")) * math.sqrt(1 / self.dim)


def _key(role: str, seed: int, parameter: str) -> Key:
    return key_of("gaussian", VERSION, seed, role, parameter)


def _rows(key: Key, start: int, stop: int, dim: int, scale: float, device: torch.device) -> Tensor:
    name = ("gaussian", key, start, stop, dim, str(device))
    return kept(name, lambda: normals(key, start, stop, dim, device).mul_(scale))
