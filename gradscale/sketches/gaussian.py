"""Dense Gaussian maps: probes of the Gaussian width, and the reference Johnson-Lindenstrauss sketch.

Entry (p, k) of a parameter's [P, K] block is a standard normal keyed by (version, seed, role, parameter)
and counted by (p, k): the same on every machine, device and sharding. Blocks are kept within a memory
budget for each process and made again from their counters beyond it.

Shapes: B examples, P entries of one parameter, K outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradscale.errors import GradscaleError
from gradscale.grads.layer import LayerGrads
from gradscale.grads.sweep import Request, read
from gradscale.sketches.philox import Key, key_of, normals

VERSION = 1
_CACHE_BYTES = 1 << 30


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

    def apply(self, parameter: str, grads: LayerGrads) -> Tensor:
        return _apply(self, parameter, grads)

    def materialize(self, parameter: str, size: int) -> Tensor:
        """[P, K] float32: the definition."""
        return normals(_key("probe", self.seed, parameter), 0, size, self.dim, torch.device("cpu"))


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

    def rows(self, parameter: str, start: int, stop: int, device: torch.device) -> Tensor:
        return _rows(_key("sketch", self.seed, parameter), start, stop, self.dim, math.sqrt(1 / self.dim), device)

    def apply(self, parameter: str, grads: LayerGrads) -> Tensor:
        return _apply(self, parameter, grads)

    def materialize(self, parameter: str, size: int) -> Tensor:
        """[P, K] float32: the definition."""
        key = _key("sketch", self.seed, parameter)
        return normals(key, 0, size, self.dim, torch.device("cpu")) * math.sqrt(1 / self.dim)


def check_dim(what: str, dim: int) -> None:
    if dim < 1:
        raise GradscaleError(f"{what} must be at least 1, got {dim}")


def _key(role: str, seed: int, parameter: str) -> Key:
    return key_of("gaussian", VERSION, seed, role, parameter)


def _apply(dense: GaussianProbes | GaussianSketch, parameter: str, grads: LayerGrads) -> Tensor:
    total = torch.zeros(grads.shape[0], dense.dim, dtype=torch.float64, device=grads.device)

    def rows(start: int, stop: int) -> Tensor:
        return dense.rows(parameter, start, stop, grads.device)

    read(grads, Request(None, (), ((rows, total),)))
    return total


_cache: dict[tuple[Key, int, int, int, str], Tensor] = {}  # blocks of this process, never evicted: they are in use


def _rows(key: Key, start: int, stop: int, dim: int, scale: float, device: torch.device) -> Tensor:
    """Rows start to stop of the map; kept while the budget lasts, since every microbatch asks for the same blocks."""
    name = (key, start, stop, dim, str(device))
    if name in _cache:
        return _cache[name]
    block = normals(key, start, stop, dim, device).mul_(scale)
    if sum(kept.nbytes for kept in _cache.values()) + block.nbytes <= _CACHE_BYTES:
        _cache[name] = block
    return block
